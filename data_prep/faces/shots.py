"""Tests whether one shot, or one face, gives way to another between frames."""

from __future__ import annotations

import numpy as np

from data_prep.faces import boxes


class CutTest:
  """Tests whether each frame of a video begins a new shot.

  Called with the frames, uint8 (H, W, 3), in order.
  """

  # At a cut, small thumbnails differ by more than so many grey levels in the
  # mean, and by more than so many times the usual difference.
  MIN_DIFFERENCE = 16.0
  MIN_RATIO = 4.0

  def __init__(self) -> None:
    self._previous: np.ndarray | None = None
    self._usual = 0.0

  def __call__(self, frame: np.ndarray) -> bool:
    import cv2

    # Averaging all pixels of a large frame would cost more than a detector.
    small = cv2.resize(frame, (160, 160), interpolation=cv2.INTER_NEAREST)
    small = cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    previous, self._previous = self._previous, small
    if previous is None:
      return False
    difference = float(np.abs(small - previous).mean())
    is_cut = difference > max(self.MIN_DIFFERENCE, self.MIN_RATIO * self._usual)
    # A cut says nothing about the motion within a shot.
    if not is_cut:
      self._usual += 0.2 * (difference - self._usual)
    return is_cut


# Two thumbnails show different faces if more than 1 - COVERED of their pixels
# differ by more than OTHER_FACE grey levels. Within 12 frames of one face this
# difference is at most 7 on the sample videos, between two people 18 and more.
OTHER_FACE = 12.0
COVERED = 0.7


class Look:
  """Thumbnail of a face, which tells whether a mesh is still on that face.

  A mesh moves on to another face that takes its place: in a cut between two
  shots of one room, in a dissolve, or where people cross.

  Args:
    frame: uint8 (H, W, 3), RGB.
    box: (4,), the bounds of the face's mesh.
  """

  def __init__(self, frame: np.ndarray, box: np.ndarray) -> None:
    self._box = box
    self._thumbnail = _thumbnail(frame, box)

  def is_other_face(self, frame: np.ndarray, later: Look) -> bool:
    """Returns whether a mesh shows another face than a few frames before.

    A face that moves looks the same within its mesh. A face that is mostly
    covered, which shifts the mesh, looks the same at its old place. If neither
    holds, it is another face.

    Args:
      frame: the frame that `later` was made of.
      later: the look at the face in question.
    """
    return self._differs(later._thumbnail) and self._differs(
      _thumbnail(frame, self._box)
    )

  def _differs(self, thumbnail: np.ndarray) -> bool:
    difference = np.abs(self._thumbnail - thumbnail).mean(axis=-1).ravel()
    rank = int((1 - COVERED) * len(difference))
    return float(np.partition(difference, rank)[rank]) > OTHER_FACE


def _thumbnail(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns float32 (16, 16, 3), the part of the frame in a box (4,)."""
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  sx, sy = (x1 - x0) / 64, (y1 - y0) / 64
  face = boxes.sampled(frame, (sx, x0), (sy, y0), 64, cv2.INTER_LINEAR)
  face = cv2.resize(face, (16, 16), interpolation=cv2.INTER_AREA)
  return face.astype(np.float32)
