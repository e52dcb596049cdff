"""The label maps of a face through a segment, frame by frame.

What a parser looks for in the pixels changes slowly next to a face's muscles.
Where it can tell one from the other (`parsers.SteadyParser`), the pixels are
looked at in every few frames, and what was seen there is moved along with the
face and blended in between.
"""

from __future__ import annotations

import numpy as np

from data_prep.regions import lapa, parsers


class Labeller:
  """Takes frames in order, and gives a label map for each.

  Args:
    parser: what labels the faces.
    num_frames: how many frames will come.
  """

  def __init__(self, parser: parsers.Parser, num_frames: int) -> None:
    self._parser = parser
    self._num_frames = num_frames
    self.label_maps: list[np.ndarray | None] = []
    self._steady = isinstance(parser, parsers.SteadyParser)
    # Frames that wait for the next look: number, and mesh in the crop.
    self._waiting: list[tuple[int, np.ndarray]] = []
    # The last look, with its frame's number and mesh.
    self._last: tuple[int, np.ndarray, np.ndarray] | None = None

  def add(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray
  ) -> None:
    """Takes the next frame; arguments as for `Parser.parse`."""
    i = len(self.label_maps)
    if not self._steady:
      self.label_maps.append(self._parser.parse(frame, box, landmarks))
      return
    self.label_maps.append(None)
    if not np.isfinite(landmarks).all():
      return
    points = lapa.in_crop(landmarks, box)
    is_due = self._last is None or i - self._last[0] >= self._parser.LOOK_STEPS
    if not is_due and i < self._num_frames - 1:
      self._waiting.append((i, points))
      return
    seen = self._parser.look(frame, box, landmarks)
    self._label_waiting((i, points, seen))
    self.label_maps[i] = self._parser.label(seen, points)
    self._last = i, points, seen

  def finish(self) -> list[np.ndarray | None]:
    """Returns uint8 (224, 224) per frame, None where no face was parsed."""
    self._label_waiting(self._last)
    return self.label_maps

  def _label_waiting(
    self, after: tuple[int, np.ndarray, np.ndarray] | None
  ) -> None:
    for i, points in self._waiting:
      self._blend(i, points, after)
    self._waiting.clear()

  def _blend(
    self, i: int, points: np.ndarray, after: tuple[int, np.ndarray, np.ndarray]
  ) -> None:
    """Labels a frame between two looks, the nearer one counting more."""
    import cv2

    looks = [self._last, after] if after is not self._last else [after]
    moved = [lapa.moved(seen, was, points) for _, was, seen in looks]
    seen = moved[0]
    if len(moved) == 2:
      first, second = looks[0][0], looks[1][0]
      share = (i - first) / (second - first)
      seen = cv2.addWeighted(moved[0], 1 - share, moved[1], share, 0)
      seen = seen.reshape(moved[0].shape)  # OpenCV drops a single channel
    self.label_maps[i] = self._parser.label(seen, points)
