"""LaPa label maps: functions that all parsers share.

Codes, polygons of the mesh, and pictures sampled from boxes.

Axes: S = 224 crop pixels; N landmarks. Points are x, y; pixel (i, j) covers
[j, j+1) x [i, i+1).
"""

from __future__ import annotations

import numpy as np

from data_prep.faces import boxes
from marlin_jax.records.schema import FRAME_SIZE, REGIONS

CODE = {name: code for code, name in enumerate(REGIONS)}
# Largest grey level, of 255, of a black bar.
BLACK = 10

# Indices into the mesh, as rings. Right and left are the person's own, as in
# LaPa: in an unmirrored picture the right eye is on the left.
RIGHT_EYE = (
  33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7,
)  # fmt: skip
LEFT_EYE = (
  263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390,
  249,
)  # fmt: skip
RIGHT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
LEFT_BROW = (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)
# From between the eyes down the sides, around the wings, below the nostrils.
_NOSE = (
  168, 193, 188, 217, 209, 129, 64, 98, 97, 2, 326, 327, 294, 358, 429, 437,
  412, 417,
)  # fmt: skip
_OUTER_LIP_TOP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
_OUTER_LIP_BOTTOM = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
_INNER_LIP_TOP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
_INNER_LIP_BOTTOM = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
_UPPER_LIP = _OUTER_LIP_TOP + _INNER_LIP_TOP[::-1]
_LOWER_LIP = _OUTER_LIP_BOTTOM + _INNER_LIP_BOTTOM[::-1]
_INNER_MOUTH = _INNER_LIP_TOP + _INNER_LIP_BOTTOM[::-1]
OVAL = np.array([
  10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378,
  400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21,
  54, 103, 67, 109,
])  # fmt: skip
_FOREHEAD_TOP, _CHIN = 10, 152
# The chin of the mesh is above that of the picture: by this share of the height
# of the face in the hand-drawn masks, more under a beard or a wide open mouth.
CHIN_DROP = 0.05
NOSE_TIP = 4
# The person's right one first.
MOUTH_CORNERS = (61, 291)

# In drawing order: a later one covers an earlier one.
POLYGONS = tuple(
  (name, np.array(ring))
  for name, ring in (
    ("nose", _NOSE),
    ("upper_lip", _UPPER_LIP),
    ("lower_lip", _LOWER_LIP),
    ("inner_mouth", _INNER_MOUTH),
    ("right_eye", RIGHT_EYE),
    ("left_eye", LEFT_EYE),
    ("right_brow", RIGHT_BROW),
    ("left_brow", LEFT_BROW),
  )
)


def grown(box: np.ndarray, ratio: float) -> np.ndarray:
  """Returns a box (4,) scaled about its centre."""
  centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
  return np.concatenate([centre - ratio * half, centre + ratio * half])


def warped(
  image: np.ndarray, box: np.ndarray, box_size: int, border: int
) -> np.ndarray:
  """Samples a square box of an image.

  Args:
    image: (H, W[, C]).
    box: (4,), in pixels of the image.
    box_size: side of the result in pixels.
    border: OpenCV's border mode for pixels beyond the image.

  Returns:
    (box_size, box_size[, C]).
  """
  import cv2

  step = float(box[2] - box[0]) / box_size
  x, y = ((step, float(start)) for start in box[:2])
  return boxes.sampled(image, x, y, box_size, cv2.INTER_LINEAR, border)


def fill(image: np.ndarray, ring: np.ndarray, value: int) -> None:
  """Fills the polygon with points (N, 2) in an image (H, W), in place."""
  _fill(image, _fixed_point(ring), value)


def _fixed_point(points: np.ndarray) -> np.ndarray:
  """Returns points in 1/16 pixel; the centre of pixel 0 is at 0.5."""
  return np.round((points - 0.5) * 16).astype(np.int32)


def _fill(image: np.ndarray, fixed_ring: np.ndarray, value: int) -> None:
  import cv2

  cv2.fillPoly(image, [fixed_ring], value, shift=4)


def picture_area(frame: np.ndarray) -> np.ndarray:
  """Returns the box (4,) of a frame (H, W, 3) without its black bars.

  Bars are rows and columns at the border in which all pixels are black.
  """
  import cv2

  edges = frame[0, ::8], frame[-1, ::8], frame[::8, 0], frame[::8, -1]
  if all(edge.max() > BLACK for edge in edges):  # the fast path of most videos
    return np.array([0, 0, frame.shape[1], frame.shape[0]], np.float64)
  # One pixel in eight is enough.
  tall = cv2.resize(
    frame, None, fx=1 / 8, fy=1, interpolation=cv2.INTER_NEAREST
  )
  rows = tall.reshape(len(frame), -1).max(axis=1) > BLACK
  columns = (frame[::8].max(axis=0) > BLACK).any(axis=-1)
  if not rows.any() or not columns.any():
    return np.array([0, 0, frame.shape[1], frame.shape[0]], np.float64)
  y, x = np.flatnonzero(rows), np.flatnonzero(columns)
  return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], np.float64)


def inside(area: np.ndarray, box: np.ndarray, box_size: int) -> np.ndarray:
  """Returns which pixels of a sampled box have their centre in an area.

  Args:
    area: (4,), in source pixels.
    box: (4,), the box that was sampled.
    box_size: side of the sampled picture.

  Returns:
    bool (box_size, box_size).
  """
  centres = (np.arange(box_size) + 0.5) * ((box[2] - box[0]) / box_size)
  x, y = centres + box[0], centres + box[1]
  within_rows = (y >= area[1]) & (y < area[3])
  return within_rows[:, None] & ((x >= area[0]) & (x < area[2]))


def clear_outside(
  labels: np.ndarray, frame: np.ndarray, box: np.ndarray
) -> None:
  """Labels pixels beyond the picture as background, in place.

  Args:
    labels: uint8 (S, S).
    frame: uint8 (H, W, 3), with or without black bars.
    box: (4,), the crop.
  """
  is_inside = inside(picture_area(frame), box, FRAME_SIZE)
  labels[~is_inside] = CODE["background"]


def has_mesh(landmarks: np.ndarray | None) -> bool:
  """Returns whether landmarks (478, 2) were found: neither None nor NaN."""
  return landmarks is not None and bool(np.isfinite(landmarks).all())


def in_crop(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns landmarks (N, 2) in pixels of the crop at a box (4,)."""
  return (landmarks - box[:2]) * (FRAME_SIZE / (box[2] - box[0]))


def moved(image: np.ndarray, points: np.ndarray, to: np.ndarray) -> np.ndarray:
  """Shifts a picture by the mean motion of a face; the border is repeated.

  Args:
    image: (S, S[, C]) in crop pixels.
    points: (478, 2), the mesh in this picture.
    to: (478, 2), the mesh in the result.

  Returns:
    (S, S[, C]).
  """
  import cv2

  shift = (to - points).mean(axis=0)
  out = cv2.warpAffine(
    image,
    np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float64),
    image.shape[1::-1],
    flags=cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_REPLICATE,
  )
  return out.reshape(image.shape)  # OpenCV drops a single channel


def outline(points: np.ndarray) -> np.ndarray:
  """Returns the outline (36, 2) of a face: the mesh's, with its jaw lowered.

  Args:
    points: (478, 2), the mesh.
  """
  ring = points[OVAL].astype(np.float64)
  axis = (points[_FOREHEAD_TOP] - points[_CHIN]).astype(np.float64)
  up = (ring - points[_CHIN]) @ axis / max(float(axis @ axis), 1.0)
  # Largest at the chin, 0 above the mouth.
  drop = CHIN_DROP * np.clip(1 - up / 0.4, 0, 1)
  return ring - drop[:, None] * axis


def draw_features(labels: np.ndarray, points: np.ndarray) -> None:
  """Draws nose, mouth, eyes and brows into a label map, in place.

  Args:
    labels: uint8 (S, S).
    points: (478, 2), the mesh in crop pixels.
  """
  fixed = _fixed_point(points)
  for name, ring in POLYGONS:
    _fill(labels, fixed[ring], CODE[name])


def face_coordinates(
  points: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns coordinates along and across the face, two float32 (size, size).

  The first is 0 at the chin and 1 at the top of the mesh, along the line
  between them. The second is 0 on that line and 1 where the mesh is widest on
  that side.

  Args:
    points: (478, 2), the mesh in pixels of the picture.
    size: side of the picture.
  """
  chin, top = points[_CHIN], points[_FOREHEAD_TOP]
  axis = top - chin
  length = max(float(np.hypot(*axis)), 1.0)
  axis = axis / length
  normal = np.array([-axis[1], axis[0]])
  ring = (points[OVAL] - chin) @ normal
  grid = np.arange(size, dtype=np.float32) + 0.5
  x, y = grid[None] - chin[0], grid[:, None] - chin[1]
  up = (x * axis[0] + y * axis[1]) / length
  across = x * normal[0] + y * normal[1]
  low, high = min(float(ring.min()), -1.0), max(float(ring.max()), 1.0)
  across = np.where(across < 0, across / low, across / high)
  return up.astype(np.float32), across.astype(np.float32)
