"""Face detectors and face mesh, on one picture.

Boxes are x0, y0, x1, y1 in pixels of the picture, where pixel (i, j) covers
[j, j+1) x [i, i+1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, Self

import numpy as np

from data_prep import assets
from data_prep.faces import boxes, mediapipe_tasks

# Each model, and the score from which on its detections are confident. The
# full-range model misses faces that fill the frame. The short-range model
# misses faces below about 8% of the frame's width; it gives a cartoon animal
# 0.6, and people 0.69 and more.
DETECTORS = (
  ("face_detector.tflite", 0.65),
  ("face_detection_full_range_sparse.tflite", 0.5),
)
LANDMARKER = "face_landmarker.task"
MODELS = (*(name for name, _ in DETECTORS), LANDMARKER)
# Frames with at least this ratio of longer to shorter side are searched in
# parts.
MIN_TILED_RATIO = 1.4
# A detection smaller than this share of the frame is detected again in a
# close-up of CLOSE_UP_RATIO times its side: its box is too rough for the mesh
# model.
SMALL_RATIO = 0.08
CLOSE_UP_RATIO = 4.0
# Height of a mesh over that of the detector's box. Those of real faces are in
# 0.8 to 1.2.
MESH_HEIGHT_RANGE = (0.65, 1.8)


@dataclasses.dataclass(frozen=True)
class Detection:
  """A face reported by a detector.

  Attributes:
    box: float64 (4,).
    score: score of the detector, in [0.5, 1].
    confident: True if the score reaches the detector's threshold in DETECTORS,
      above which it is seldom wrong.
  """

  box: np.ndarray
  score: float
  confident: bool

  def shifted(self, x: int, y: int) -> Detection:
    """Returns the detection moved by x and y pixels."""
    return dataclasses.replace(self, box=self.box + np.tile([x, y], 2))


class FaceFinder:
  """Face detectors and mesh model; a context manager.

  It keeps no state between calls, so one finder serves any number of videos.
  Faces below about 8% of the frame's shorter side may be missed.

  Raises:
    assets.AssetError: a model file cannot be downloaded or read.
    mediapipe_tasks.ModelError: a system library is missing.
  """

  def __init__(self) -> None:
    with contextlib.ExitStack() as stack:
      self._detectors = [
        (
          stack.enter_context(
            mediapipe_tasks.open_task("FaceDetector", assets.fetch(asset_name))
          ),
          min_score,
        )
        for asset_name, min_score in DETECTORS
      ]
      # Two, because a neighbour may stand in the same crop.
      self._landmarker = stack.enter_context(
        mediapipe_tasks.open_task(
          "FaceLandmarker",
          assets.fetch(LANDMARKER),
          num_faces=2,
        )
      )
      self._stack = stack.pop_all()

  def close(self) -> None:
    """Closes the models."""
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def detect(self, frame: np.ndarray) -> list[Detection]:
    """Finds the faces of a frame.

    Args:
      frame: uint8 (H, W, 3), RGB.

    Returns:
      Confident detections first, then by falling score. No two overlap by 0.4
      or more.
    """
    short_range, full_range = self._detectors
    candidates = _run(*short_range, frame)
    for x, y, tile in _tiles(frame):
      for face in _run(*full_range, tile):
        candidates.append(face.shifted(x, y))
    candidates.sort(key=lambda face: (not face.confident, -face.score))
    faces: list[Detection] = []
    for face in candidates:
      if all(boxes.overlap(face.box, other.box) < 0.4 for other in faces):
        faces.append(face)
    small = SMALL_RATIO * max(frame.shape[:2])
    return [
      self._close_up(frame, face) if boxes.square(face.box)[2] < small else face
      for face in faces
    ]

  def _close_up(self, frame: np.ndarray, face: Detection) -> Detection:
    """Returns the face as the short-range detector finds it in a close-up."""
    x0, y0, x1, y1 = boxes.square_around(face.box, CLOSE_UP_RATIO)
    x0, y0 = max(int(x0), 0), max(int(y0), 0)
    picture = frame[y0 : math.ceil(y1), x0 : math.ceil(x1)]
    near = [f.shifted(x0, y0) for f in _run(*self._detectors[0], picture)]
    overlaps = [boxes.overlap(other.box, face.box) for other in near]
    if max(overlaps, default=0.0) < 0.1:
      return face
    best = near[int(np.argmax(overlaps))]
    return dataclasses.replace(best, confident=best.confident or face.confident)

  def mesh(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """Returns the landmarks of the face in a box.

    Args:
      frame: uint8 (H, W, 3), RGB.
      box: (4,), roughly around the face; the model sees it with a margin.

    Returns:
      float32 (478, 2), x and y in source pixels; None if the box holds no face.
    """
    mesh = self.mesh_3d(frame, box)
    return None if mesh is None else mesh[:, :2]

  def mesh_3d(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """Returns the landmarks with depth, float32 (478, 3); see `mesh`.

    Depth is in source pixels too, smaller for points nearer to the camera.
    """
    height, width = frame.shape[:2]
    x, y, side = boxes.square(box)
    x0, y0 = max(int(x - side), 0), max(int(y - side), 0)
    x1 = min(math.ceil(x + side), width)
    y1 = min(math.ceil(y + side), height)
    if x1 - x0 < 8 or y1 - y0 < 8:
      return None
    result = self._landmarker.detect(
      mediapipe_tasks.as_image(frame[y0:y1, x0:x1])
    )
    # Depth is in units of the picture's width.
    scale = np.float32([x1 - x0, y1 - y0, x1 - x0])
    best, best_overlap = None, 0.25
    for face in result.face_landmarks:
      points = np.array([(p.x, p.y, p.z) for p in face], np.float32)
      points = points * scale + np.float32([x0, y0, 0])
      bounds = boxes.bounds(points[:, :2])
      ratio = (bounds[3] - bounds[1]) / side
      if not MESH_HEIGHT_RANGE[0] < ratio < MESH_HEIGHT_RANGE[1]:
        continue
      overlap = boxes.overlap(bounds, box)
      if overlap > best_overlap:
        best, best_overlap = points, overlap
    return best


def _run(
  detector: Any, min_score: float, picture: np.ndarray
) -> list[Detection]:
  """Returns the detections of one detector, in pixels of the picture."""
  detections = []
  result = detector.detect(mediapipe_tasks.as_image(picture))
  for detection in result.detections:
    x, y = detection.bounding_box.origin_x, detection.bounding_box.origin_y
    width, height = detection.bounding_box.width, detection.bounding_box.height
    score = detection.categories[0].score
    box = np.array([x, y, x + width, y + height], np.float64)
    detections.append(Detection(box, score, score >= min_score))
  return detections


def _tiles(frame: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
  """Returns overlapping square tiles of a picture, each as (x, y, pixels).

  A detector scales its input to a square of fixed size, in which the faces of a
  wide or high picture would be small. Other pictures are a single tile.
  """
  height, width = frame.shape[:2]
  if max(height, width) < MIN_TILED_RATIO * min(height, width):
    return [(0, 0, frame)]
  side = min(height, width)
  num_tiles = math.ceil(max(height, width) / side)
  tiles = []
  for start in np.linspace(0, max(height, width) - side, num_tiles).astype(int):
    x, y = (start, 0) if width > height else (0, start)
    tiles.append((x, y, frame[y : y + side, x : x + side]))
  return tiles
