"""Squares of a frame that judges look at.

SyncNet's published scores are of the crops of run_pipeline.py in
github.com/joonson/syncnet_python: a square 1.4 times as wide as the face, which
reaches down to the chest. Its scores of other crops are no LSE-D and LSE-C.

Axes: N frames, H W pixels of a frame.
"""

from __future__ import annotations

import numpy as np

from marlin_jax.records.schema import FRAME_SIZE

# The crop as in records; SyncNet's; the whole frame, of videos that are face
# crops already.
RECORD, SYNCNET, FRAME = "record", "syncnet", "frame"

# Box of the detector S3FD in a record's face crop, which is 1.25 times as high
# as the face mesh: from the top to the bottom of the mesh, and as wide as a
# face. It follows from the descriptions of both; it was not measured.
_FACE = 0.18, 0.1, 0.82, 0.9
# run_pipeline.py, --crop_scale, its median filter and the grey beyond a frame.
_CROP_SCALE = 0.4
_MEDIAN_FRAMES = 13
_GREY = 110


def syncnet_boxes(crops: np.ndarray) -> np.ndarray:
  """Returns SyncNet's crops.

  Args:
    crops: float (N, 4), face crops as in records; NaN without a face.

  Returns:
    float (N, 4), squares that may reach past the frame; NaN without a face.
  """
  from scipy import signal

  side = crops[:, 2] - crops[:, 0]
  left, top, right, bottom = _FACE
  half = max(right - left, bottom - top) / 2 * side
  x = crops[:, 0] + (left + right) / 2 * side
  y = crops[:, 1] + (top + bottom) / 2 * side
  boxes = np.full(crops.shape, np.nan)
  has_face = ~np.isnan(side)
  edges = np.flatnonzero(np.diff(has_face)) + 1
  for run in np.split(np.arange(len(crops)), edges):
    if not len(run) or not has_face[run[0]]:
      continue
    # Odd, as the filter needs it. It counts 0 beyond the ends of a run.
    length = min(_MEDIAN_FRAMES, len(run) - 1 + len(run) % 2)
    s, cx, cy = (
      signal.medfilt(v[run].astype(float), length) for v in (half, x, y)
    )
    reach, below = s * (1 + _CROP_SCALE), s * (1 + 2 * _CROP_SCALE)
    boxes[run] = np.stack([cx - reach, cy - s, cx + reach, cy + below], axis=1)
  return boxes


def syncnet_crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns a crop as run_pipeline.py cuts it, uint8 (224, 224, 3).

  Args:
    frame: uint8 (H, W, 3).
    box: (4,), one of `syncnet_boxes`.
  """
  x0, y0, x1, y1 = np.floor(box).astype(int)
  height, width = frame.shape[:2]
  crop = np.full((max(y1 - y0, 1), max(x1 - x0, 1), 3), _GREY, np.uint8)
  rows = slice(max(y0, 0), min(y1, height))
  columns = slice(max(x0, 0), min(x1, width))
  part = frame[rows, columns]
  if part.size:
    top, left = rows.start - y0, columns.start - x0
    crop[top : top + part.shape[0], left : left + part.shape[1]] = part
  return resized(crop)


def resized(frame: np.ndarray) -> np.ndarray:
  """Returns a frame as the scorers read it, uint8 (224, 224, 3).

  By cv2's default interpolation; a frame that is no square is stretched.
  """
  import cv2

  return cv2.resize(frame, (FRAME_SIZE, FRAME_SIZE))
