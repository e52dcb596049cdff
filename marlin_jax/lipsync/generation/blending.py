"""Blends the lower half of a generated face into its frame.

Axes: H W pixels of the frame, S side of the square face image, h w pixels of
the region of the frame that changes. Boxes are x0, y0, x1, y1 in pixels of the
frame, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import math

import numpy as np

# The mask is a rounded rectangle in the half that the generator draws, as wide
# as a jaw, from below the eyes to below the chin of an open mouth. Centre and
# radii are x, y, as ratios of the sides of the face crop.
CENTRE = 0.5, 0.745
RADII = 0.42, 0.245
# Exponent of the outline: 2 is an ellipse, larger is closer to a rectangle.
_ROUNDNESS = 4
# Ratio of the radii within which the mask is 1.
SOLID_RATIO = 0.72
# Width of the soft edge of a face that is smaller than the crop, as a ratio of
# its own sides.
EDGE_RATIO = 0.06


def opacity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the opacity of the generated face; 0 in the upper half.

  Args:
    x: horizontal positions in the crop, as ratios of its width.
    y: vertical positions in the crop, as ratios of its height; broadcastable
      with `x`.

  Returns:
    float32 in [0, 1].
  """
  horizontal = np.abs((x - CENTRE[0]) / RADII[0]) ** _ROUNDNESS
  vertical = np.abs((y - CENTRE[1]) / RADII[1]) ** _ROUNDNESS
  radius = (horizontal + vertical) ** (1 / _ROUNDNESS)
  ramp = np.clip((1 - radius) / (1 - SOLID_RATIO), 0, 1)
  return _smooth(ramp).astype(np.float32)


def paste(
  frame: np.ndarray,
  face: np.ndarray,
  box: np.ndarray,
  crop: np.ndarray | None = None,
) -> np.ndarray:
  """Pastes the lower half of a face into a frame, with a soft edge.

  Args:
    frame: uint8 (H, W, 3).
    face: uint8 (S, S, 3).
    box: float (4,), place of `face` in the frame; may reach past the frame.
    crop: float (4,), the face crop as in records, by which the mask is placed;
      None: `box`. The mask ends softly where `box` does.

  Returns:
    uint8 (H, W, 3), a new array. Pixels where `opacity` is 0 are unchanged.
  """
  pasted = frame.copy()
  crop = box if crop is None else crop
  height, width = frame.shape[:2]
  left, right = _extent(box, crop, 0, width)
  top, bottom = _extent(box, crop, 1, height)
  if left >= right or top >= bottom:
    return pasted
  x, y = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
  alpha = opacity(_ratio(x, crop, 0), _ratio(y, crop, 1))
  if not np.array_equal(crop, box):
    alpha = alpha * _edge(_ratio(x, box, 0)) * _edge(_ratio(y, box, 1))
  alpha = alpha[..., None]
  drawn = _resample(
    face, tuple(float(v) for v in box), (left, top, right, bottom)
  )
  region = pasted[top:bottom, left:right]
  blended = alpha * drawn + (1 - alpha) * region
  # A uint8 as float32 times 1 is exact, so pixels with opacity 0 do not change.
  region[:] = np.rint(blended).astype(np.uint8)
  return pasted


def _smooth(ramp: np.ndarray) -> np.ndarray:
  """Returns a ramp from 0 to 1 without corners."""
  return ramp * ramp * (3 - 2 * ramp)


def _edge(ratio: np.ndarray) -> np.ndarray:
  """Returns the opacity near the edges of a box, by the place in it."""
  distance = np.minimum(ratio, 1 - ratio)
  return _smooth(np.clip(distance / EDGE_RATIO, 0, 1))


def _ratio(pixels: np.ndarray, box: np.ndarray, axis: int) -> np.ndarray:
  """Returns places along an axis as ratios of a box."""
  start, stop = float(box[axis]), float(box[axis + 2])
  return (pixels - start) / (stop - start)


def _extent(
  box: np.ndarray, crop: np.ndarray, axis: int, size: int
) -> tuple[int, int]:
  """Returns first and end pixel of the mask in the frame, along one axis."""
  start, stop = float(crop[axis]), float(crop[axis + 2])
  side, centre, radius = stop - start, CENTRE[axis], RADII[axis]
  first = max(start + (centre - radius) * side, float(box[axis]))
  last = min(start + (centre + radius) * side, float(box[axis + 2]))
  return max(math.floor(first), 0), min(math.ceil(last), size)


def _resample(
  face: np.ndarray,
  box: tuple[float, float, float, float],
  region: tuple[int, int, int, int],
) -> np.ndarray:
  """Resamples a face image onto pixels of the frame.

  The inverse of `data_prep.faces.boxes.crop_frame`: exact to fractions of a
  pixel, and averaging where the face is smaller in the frame.

  Args:
    face: uint8 (S, S, 3).
    box: place of `face` in the frame: x0, y0, x1, y1 in pixels.
    region: pixels of the frame: left, top, right, bottom.

  Returns:
    float32 (h, w, 3), in [0, 255].
  """
  import cv2

  left, top, right, bottom = region
  x0, y0, x1, y1 = box
  # Pixels of the face image per pixel of the frame.
  step_x, step_y = (face.shape[0] / side for side in (x1 - x0, y1 - y0))
  # To average, n x n points are sampled per pixel of the frame.
  n = max(math.ceil(max(step_x, step_y) - 1e-6), 1)
  sx, sy = step_x / n, step_y / n
  shift_x = (left - x0) * step_x + sx / 2 - 0.5
  shift_y = (top - y0) * step_y + sy / 2 - 0.5
  size = right - left, bottom - top
  resampled = cv2.warpAffine(
    face.astype(np.float32),
    np.array([[sx, 0, shift_x], [0, sy, shift_y]]),
    (n * size[0], n * size[1]),
    flags=cv2.WARP_INVERSE_MAP
    | (cv2.INTER_LINEAR if n > 1 else cv2.INTER_CUBIC),
    borderMode=cv2.BORDER_REPLICATE,
  )
  if n > 1:
    resampled = cv2.resize(resampled, size, interpolation=cv2.INTER_AREA)
  return np.clip(resampled, 0, 255)
