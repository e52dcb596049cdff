"""Boxes of faces, and the crops at them.

Boxes are x0, y0, x1, y1 in source pixels, where pixel (i, j) covers
[j, j+1) x [i, i+1).
"""

from __future__ import annotations

import math

import numpy as np

from marlin_jax.records.schema import FRAME_SIZE

# Side of the crop over the height of the mesh: resembles the paper's framing.
CROP_RATIO = 1.25


def crop_frame(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Crops a square and scales it; pixels beyond the frame are 0.

  Args:
    frame: uint8 (H, W, 3).
    box: (4,), a square in source pixels. Fractions of a pixel count, so that a
      smooth path of boxes gives a steady picture.

  Returns:
    uint8 (224, 224, 3).

  Raises:
    ValueError: the box is empty or not finite.
  """
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  if not (math.isfinite(x0 + y0 + x1 + y1) and x1 > x0 and y1 > y0):
    raise ValueError(f"box {box} is not x0 < x1, y0 < y1 in source pixels")
  # Area averaging at any fraction of a pixel: sample at least once per source
  # pixel, then average whole blocks.
  block = max(math.ceil(max(x1 - x0, y1 - y0) / FRAME_SIZE - 1e-6), 1)
  size = block * FRAME_SIZE
  sx, sy = (x1 - x0) / size, (y1 - y0) / size
  if block == 1:
    return sampled(frame, (sx, x0), (sy, y0), size, cv2.INTER_CUBIC)
  # OpenCV interpolates four channels in half the time of three.
  left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
  part = frame[top : max(int(y1) + 2, 0), left : max(int(x1) + 2, 0)]
  if not part.size:
    return np.zeros((FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
  out = sampled(
    cv2.cvtColor(part, cv2.COLOR_RGB2RGBA),
    (sx, x0 - left),
    (sy, y0 - top),
    size,
    cv2.INTER_LINEAR,
  )
  out = cv2.resize(out, (FRAME_SIZE, FRAME_SIZE), interpolation=cv2.INTER_AREA)
  return cv2.cvtColor(out, cv2.COLOR_RGBA2RGB)


def sampled(
  image: np.ndarray,
  x: tuple[float, float],
  y: tuple[float, float],
  size: int,
  interpolation: int,
  border: int = 0,
) -> np.ndarray:
  """Samples (size, size[, C]) from an image (H, W[, C]).

  Args:
    image: the image.
    x: step and start along its width in pixels.
    y: step and start along its height.
    size: side of the result.
    interpolation: OpenCV's flag.
    border: OpenCV's border mode for pixels beyond the image; 0 makes them 0.
  """
  import cv2

  (sx, x0), (sy, y0) = x, y
  return cv2.warpAffine(
    image,
    np.array([[sx, 0, x0 + sx / 2 - 0.5], [0, sy, y0 + sy / 2 - 0.5]]),
    (size, size),
    flags=cv2.WARP_INVERSE_MAP | interpolation,
    borderMode=border,
  )


def bounds(points: np.ndarray) -> np.ndarray:
  """Returns the bounding box (4,) of points (N, 2)."""
  x, y = points.T  # numpy is slow over pairs
  return np.array([x.min(), y.min(), x.max(), y.max()])


def square(box: np.ndarray) -> tuple[float, float, float]:
  """Returns centre x, centre y and the longer side."""
  x0, y0, x1, y1 = (float(v) for v in box)
  return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)


def square_around(box: np.ndarray, ratio: float) -> np.ndarray:
  """Returns the square (4,) around a box, `ratio` times its longer side."""
  x, y, side = square(box)
  half = ratio * side / 2
  return np.array([x - half, y - half, x + half, y + half])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the intersection over union of two boxes."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  if width <= 0 or height <= 0:
    return 0.0
  shared = width * height
  area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
  return float(shared / (area - shared))


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
  """Removes outliers from a series, then smooths it with a Gaussian.

  A uniform motion is not changed, even at the ends: the series is continued
  there by its point reflection.

  Args:
    values: float64 (T,).
    sigma: standard deviation of the Gaussian in frames.

  Returns:
    float64 (T,).
  """
  padded = np.pad(values, 2, mode="reflect", reflect_type="odd")
  windows = np.lib.stride_tricks.sliding_window_view(padded, 5)
  values = np.median(windows, axis=1)
  radius = min(math.ceil(3 * sigma), len(values) - 1)
  kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  padded = np.pad(values, radius, mode="reflect", reflect_type="odd")
  return np.convolve(padded, kernel / kernel.sum(), mode="valid")
