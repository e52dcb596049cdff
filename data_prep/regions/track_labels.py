"""Labels the face of a segment frame by frame.

Hair and skin change slowly compared with the muscles of a face. Therefore a
`parsers.TwoStepParser` analyses the pixels of some frames only; in between, its
maps are warped along with the mesh and blended.
"""

from __future__ import annotations

import numpy as np

from data_prep.regions import lapa, parsers


class Labeller:
  """Makes a label map for each frame of a segment, added in order.

  Args:
    parser: parser that labels the faces.
    num_frames: number of frames that will be added.
  """

  def __init__(self, parser: parsers.Parser, num_frames: int) -> None:
    self._parser = parser
    self._num_frames = num_frames
    self.label_maps: list[np.ndarray | None] = []
    self._has_two_steps = isinstance(parser, parsers.TwoStepParser)
    # Frames that wait for the next analysis: number and mesh in crop pixels.
    self._waiting: list[tuple[int, np.ndarray]] = []
    # The last analysed frame: number, mesh, and maps.
    self._last: tuple[int, np.ndarray, np.ndarray] | None = None

  def add(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray
  ) -> None:
    """Adds the next frame; arguments as for `Parser.parse`."""
    i = len(self.label_maps)
    if not self._has_two_steps:
      self.label_maps.append(self._parser.parse(frame, box, landmarks))
      return
    self.label_maps.append(None)
    if not lapa.has_mesh(landmarks):
      return
    points = lapa.in_crop(landmarks, box)
    is_due = (
      self._last is None or i - self._last[0] >= self._parser.ANALYSIS_STEPS
    )
    if not is_due and i < self._num_frames - 1:
      self._waiting.append((i, points))
      return
    maps = self._parser.analyse(frame, box, landmarks)
    self._label_waiting((i, points, maps))
    self.label_maps[i] = self._parser.label(maps, points)
    self._last = i, points, maps

  def finish(self) -> list[np.ndarray | None]:
    """Returns a label map, uint8 (224, 224), or None, for each frame."""
    self._label_waiting(self._last)
    return self.label_maps

  def _label_waiting(
    self, after: tuple[int, np.ndarray, np.ndarray] | None
  ) -> None:
    """Labels the waiting frames, between the last analysed one and `after`."""
    for i, points in self._waiting:
      self._blend(i, points, after)
    self._waiting.clear()

  def _blend(
    self, i: int, points: np.ndarray, after: tuple[int, np.ndarray, np.ndarray]
  ) -> None:
    """Labels a frame between two analysed ones; the nearer counts more."""
    import cv2

    around = [self._last, after] if after is not self._last else [after]
    moved = [lapa.moved(maps, mesh, points) for _, mesh, maps in around]
    maps = moved[0]
    if len(moved) == 2:
      first, second = around[0][0], around[1][0]
      share = (i - first) / (second - first)
      maps = cv2.addWeighted(moved[0], 1 - share, moved[1], share, 0)
      maps = maps.reshape(moved[0].shape)  # OpenCV drops a single channel
    self.label_maps[i] = self._parser.label(maps, points)
