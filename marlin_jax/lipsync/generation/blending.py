"""Puts a drawn face back into its frame: the lower half, with a soft edge.

Axes: H W pixels of the frame, S of the square picture of the face, h w of the
part of the frame that is touched. Boxes are x0, y0, x1, y1 in pixels of the
frame, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import math

import numpy as np

# Where the drawn picture shows, as shares of the face's crop: a rounded
# rectangle within the half that the generator draws, as wide as a jaw, from
# under the eyes to under the chin of an open mouth.
CENTRE = 0.5, 0.745  # x, y
RADII = 0.42, 0.245
_ROUNDNESS = 4  # 2 is an ellipse, more is nearer to a rectangle
# Share of the radii within which the drawn picture alone is seen.
SOLID_RATIO = 0.72


def opacity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns how much of the drawn face is seen, 0 in the upper half.

  Args:
    x: where across the crop, as shares of its width.
    y: where down the crop, as shares of its height; of a shape that fits x's.

  Returns:
    float32 in [0, 1].
  """
  across = np.abs((x - CENTRE[0]) / RADII[0]) ** _ROUNDNESS
  down = np.abs((y - CENTRE[1]) / RADII[1]) ** _ROUNDNESS
  radius = (across + down) ** (1 / _ROUNDNESS)
  share = np.clip((1 - radius) / (1 - SOLID_RATIO), 0, 1)
  return (share * share * (3 - 2 * share)).astype(np.float32)


def paste(
  frame: np.ndarray, picture: np.ndarray, box: np.ndarray
) -> np.ndarray:
  """Returns the frame with the lower half of a drawn face in it.

  Args:
    frame: uint8 (H, W, 3).
    picture: uint8 (S, S, 3), of what the box shows.
    box: (4,), may have fractions and reach past the frame.

  Returns:
    uint8 (H, W, 3), a new array; where `opacity` is 0 the very same pixels.
  """
  out = frame.copy()
  x0, y0, x1, y1 = (float(v) for v in box)
  height, width = frame.shape[:2]
  left, right = _covered(x0, x1, CENTRE[0], RADII[0], width)
  top, bottom = _covered(y0, y1, CENTRE[1], RADII[1], height)
  if left >= right or top >= bottom:
    return out
  x = (np.arange(left, right) + 0.5 - x0) / (x1 - x0)
  y = (np.arange(top, bottom)[:, None] + 0.5 - y0) / (y1 - y0)
  share = opacity(x, y)[..., None]
  drawn = _scaled(picture, (x0, y0, x1, y1), (left, top, right, bottom))
  part = out[top:bottom, left:right]
  mixed = share * drawn + (1 - share) * part
  # float32 of a uint8 times 1 is exact: what is not touched stays as it is.
  part[:] = np.rint(mixed).astype(np.uint8)
  return out


def _covered(
  start: float, stop: float, centre: float, radius: float, size: int
) -> tuple[int, int]:
  """Returns the pixels of the frame that the mask reaches, along one axis."""
  side = stop - start
  first = math.floor(start + (centre - radius) * side)
  last = math.ceil(start + (centre + radius) * side)
  return max(first, 0), min(last, size)


def _scaled(
  picture: np.ndarray,
  box: tuple[float, float, float, float],
  part: tuple[int, int, int, int],
) -> np.ndarray:
  """Returns a part of the frame as the picture shows it.

  The counterpart of `data_prep.faces.boxes.crop_frame`: fractions of a pixel
  are honoured, and where the face is smaller in the frame pixels are averaged.

  Args:
    picture: uint8 (S, S, 3).
    box: what of the frame it shows.
    part: the pixels that are wanted: left, top, right, bottom.

  Returns:
    float32 (h, w, 3), in [0, 255].
  """
  import cv2

  left, top, right, bottom = part
  x0, y0, x1, y1 = box
  # Pixels of the picture for one of the frame's.
  step_x, step_y = (picture.shape[0] / side for side in (x1 - x0, y1 - y0))
  n = max(math.ceil(max(step_x, step_y) - 1e-6), 1)
  sx, sy = step_x / n, step_y / n
  shift_x = (left - x0) * step_x + sx / 2 - 0.5
  shift_y = (top - y0) * step_y + sy / 2 - 0.5
  size = right - left, bottom - top
  out = cv2.warpAffine(
    picture.astype(np.float32),
    np.array([[sx, 0, shift_x], [0, sy, shift_y]]),
    (n * size[0], n * size[1]),
    flags=cv2.WARP_INVERSE_MAP
    | (cv2.INTER_LINEAR if n > 1 else cv2.INTER_CUBIC),
    borderMode=cv2.BORDER_REPLICATE,
  )
  if n > 1:
    out = cv2.resize(out, size, interpolation=cv2.INTER_AREA)
  return np.clip(out, 0, 255)
