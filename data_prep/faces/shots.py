"""Where one shot, or one face, gives way to another between two frames."""

from __future__ import annotations

import numpy as np


class CutTest:
  """Says whether a frame begins a new shot, from small thumbnails."""

  # Mean difference in grey levels, and how many times the usual one, between
  # two frames that do not belong together.
  MIN_DIFFERENCE = 16.0
  MIN_RATIO = 4.0

  def __init__(self) -> None:
    self._previous: np.ndarray | None = None
    self._usual = 0.0

  def __call__(self, frame: np.ndarray) -> bool:
    import cv2

    # To average all pixels of a large frame would cost more than a detector.
    small = cv2.resize(frame, (160, 160), interpolation=cv2.INTER_NEAREST)
    small = cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    previous, self._previous = self._previous, small
    if previous is None:
      return False
    difference = float(np.abs(small - previous).mean())
    cut = difference > max(self.MIN_DIFFERENCE, self.MIN_RATIO * self._usual)
    # A cut says nothing about how much moves within a shot.
    if not cut:
      self._usual += 0.2 * (difference - self._usual)
    return cut


# Grey levels by which all but COVERED of a face differ when it is another's.
# Within 12 frames of one face it is at most 7 on the sample videos, between
# two people 18 and more.
OTHER_FACE = 12.0
COVERED = 0.7


class Look:
  """A thumbnail of a face, to tell whether a mesh is still on the same one.

  A mesh goes on from one face to another that takes its place: in a cut
  between two shots of one room, in a dissolve, or where people cross.

  Args:
    frame: uint8 (H, W, 3), RGB.
    box: (4,), the bounds of the face's mesh.
  """

  def __init__(self, frame: np.ndarray, box: np.ndarray) -> None:
    self._box = box
    self._thumbnail = _thumbnail(frame, box)

  def is_other_face(self, frame: np.ndarray, later: Look) -> bool:
    """Says whether a mesh shows another face than a few frames before.

    A face that moves looks the same within its mesh; one that is covered for
    the most part, which shifts the mesh, looks the same at its old place. Only
    where neither holds is it another face.

    Args:
      frame: the one that `later` was made of.
      later: the face in question.
    """
    return self._differs(later._thumbnail) and self._differs(
      _thumbnail(frame, self._box)
    )

  def _differs(self, thumbnail: np.ndarray) -> bool:
    difference = np.abs(self._thumbnail - thumbnail).mean(axis=-1).ravel()
    rank = int((1 - COVERED) * len(difference))
    return float(np.partition(difference, rank)[rank]) > OTHER_FACE


def _thumbnail(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns float32 (16, 16, 3), the box stretched to that."""
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  sx, sy = (x1 - x0) / 64, (y1 - y0) / 64
  face = cv2.warpAffine(
    frame,
    np.array([[sx, 0, x0 + sx / 2 - 0.5], [0, sy, y0 + sy / 2 - 0.5]]),
    (64, 64),
    flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
  )
  face = cv2.resize(face, (16, 16), interpolation=cv2.INTER_AREA)
  return face.astype(np.float32)
