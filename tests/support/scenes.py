"""Scenes composed of real faces at known places in each frame."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np


def read(path: Path, num_frames: int | None = None) -> list[np.ndarray]:
  """Returns the first frames of a video, uint8 (H, W, 3) RGB."""
  frames = []
  with av.open(str(path)) as container:
    for frame in container.decode(video=0):
      if len(frames) == num_frames:
        break
      frames.append(frame.to_ndarray(format="rgb24"))
  return frames


def scaled(frame: np.ndarray, factor: float) -> np.ndarray:
  """Returns the picture at `factor` times its size."""
  shrinks = factor < 1
  return cv2.resize(
    frame,
    None,
    fx=factor,
    fy=factor,
    interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
  )


def room(height: int, width: int) -> np.ndarray:
  """Returns a wall with some structure, uint8 (H, W, 3)."""
  patches = np.random.default_rng(0).integers(
    60, 180, (height // 24 + 1, width // 24 + 1, 3), np.uint8
  )
  return cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)


def paste(canvas: np.ndarray, picture: np.ndarray, x: int, y: int) -> None:
  """Puts a picture into another, in place; what lies outside is cut off."""
  height, width = picture.shape[:2]
  x0, y0 = max(x, 0), max(y, 0)
  x1, y1 = min(x + width, canvas.shape[1]), min(y + height, canvas.shape[0])
  if x1 > x0 and y1 > y0:
    canvas[y0:y1, x0:x1] = picture[y0 - y : y1 - y, x0 - x : x1 - x]


def noisy(frame: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
  noise = np.random.default_rng(seed).normal(0, sigma, frame.shape)
  return np.clip(frame + noise, 0, 255).astype(np.uint8)


def turned(frame: np.ndarray, mesh: np.ndarray, degrees: float) -> np.ndarray:
  """Draws a face turned about the vertical, on a plain ground.

  The mesh's triangles are moved with the picture on them, far ones first; what
  turns away from the camera is left out.

  Args:
    frame: uint8 (H, W, 3).
    mesh: float32 (478, 3), of `FaceFinder.mesh_3d`.
    degrees: positive turns towards the picture's left.
  """
  from scipy.spatial import Delaunay

  angle = np.deg2rad(degrees)
  c, s = np.cos(angle), np.sin(angle)
  centre = mesh.mean(axis=0)
  moved = (mesh - centre) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
  moved = (moved + centre).astype(np.float32)
  triangles = Delaunay(mesh[:, :2]).simplices
  far_first = np.argsort(-moved[triangles][..., 2].mean(axis=1))
  out = np.empty_like(frame)
  out[:] = 60 + np.median(frame.reshape(-1, 3), axis=0) / 2
  for triangle in triangles[far_first]:
    before, after = mesh[triangle, :2], moved[triangle, :2]
    if _area(before) * _area(after) <= 0:
      continue
    low = np.maximum(np.floor(after.min(axis=0)).astype(int) - 1, 0)
    high = np.ceil(after.max(axis=0)).astype(int) + 2
    high = np.minimum(high, frame.shape[1::-1])
    if (high <= low).any():
      continue
    after = after - low.astype(np.float32)
    size = tuple(int(v) for v in high - low)
    patch = cv2.warpAffine(
      frame,
      cv2.getAffineTransform(before, after),
      size,
      borderMode=cv2.BORDER_REPLICATE,
    )
    inside = np.zeros(size[::-1], np.uint8)
    points = np.round(after * 16).astype(np.int32)
    cv2.fillConvexPoly(inside, points, 1, shift=4)
    part = out[low[1] : high[1], low[0] : high[0]]
    part[inside > 0] = patch[inside > 0]
  return out


def _area(triangle: np.ndarray) -> float:
  a, b = triangle[1] - triangle[0], triangle[2] - triangle[0]
  return float(a[0] * b[1] - a[1] * b[0])
