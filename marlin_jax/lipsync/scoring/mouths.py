"""Compares drawn mouths with those of the original videos.

LSE-D and LSE-C ask whether lips fit a sound, and may be better than those of
real videos. These three ask whether the mouth is the one that spoke, for videos
that were generated with their own sound:

  mouth_psnr  peak signal-to-noise ratio of the lower half of the face, in dB
  mouth_ssim  its structural similarity (Wang et al., 2004)
  landmark_distance  mean distance of 40 lip landmarks after their means are
    aligned (Chen et al., ECCV 2018), in pixels of a face crop of 224

Axes: N frames, H W pixels.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.scoring import face_crops, talking_video
from marlin_jax.records.schema import FRAME_SIZE

if TYPE_CHECKING:
  from data_prep.video import video_to_records

# Landmarks of the face mesh on the outer and the inner edge of the lips.
_LIPS = (
  *(61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291),
  *(146, 91, 181, 84, 17, 314, 405, 321, 375),
  *(78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
  *(95, 88, 178, 87, 14, 317, 402, 318, 324),
)
# Where a record's crop shows the face, to find its mesh.
_FACE = FRAME_SIZE * np.array([0.14, 0.1, 0.86, 0.9])


class MouthScore(NamedTuple):
  """Means over the frames of a video; names as in the module's docstring.

  `landmark_distance` is NaN where no frame has a mesh of both faces.

  Attributes:
    num_frames: frames of both videos in which the original shows a face.
  """

  mouth_psnr: float
  mouth_ssim: float
  landmark_distance: float
  num_frames: int


METRICS = MouthScore._fields[:3]


def compare(
  path: str | os.PathLike,
  original: str | os.PathLike,
  models: video_to_records.Models,
) -> MouthScore:
  """Compares a generated video with its original, frame by frame.

  Args:
    path: the generated video, whose frames are those of `original` but for the
      mouth, from the first one on.
    original: the original video.
    models: open face models.

  Raises:
    FaceVideoError: a video cannot be read, or the two share no frame with a
      face, or have frames of different sizes.
  """
  from data_prep.faces import boxes

  real = talking_video.read(original, crop=face_crops.RECORD, models=models)
  rows = []
  for i, frame in enumerate(talking_video.pictures(path)):
    if i == 0:
      _check_size(path, frame.shape[:2], real.frame_size)
    if i == len(real):
      break
    if not real.has_face[i]:
      continue
    drawn = boxes.crop_frame(frame, real.boxes[i])
    half = slice(FRAME_SIZE // 2, None)
    distance = _landmark_distance(drawn, real.frames[i], models)
    rows.append(
      (
        psnr(drawn[half], real.frames[i][half]),
        ssim(drawn[half], real.frames[i][half]),
        distance,
      )
    )
  if not rows:
    raise FaceVideoError(
      path, f"it shares no frame with a face with {original}"
    )
  psnrs, ssims, distances = map(np.array, zip(*rows, strict=True))
  # Frames in which a mesh is not found have no distance.
  distances = distances[~np.isnan(distances)]
  return MouthScore(
    float(psnrs.mean()),
    float(ssims.mean()),
    float(distances.mean()) if len(distances) else float("nan"),
    num_frames=len(rows),
  )


def _check_size(path, size: tuple[int, int], original: tuple[int, int]) -> None:
  # Odd sizes are extended by one row or column.
  if any(b not in (a, a + 1) for a, b in zip(original, size, strict=True)):
    raise FaceVideoError(
      path,
      f"its frames have {size[1]} x {size[0]} pixels, those of the original "
      f"{original[1]} x {original[0]}",
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the peak signal-to-noise ratio of uint8 (H, W, 3) in dB, <= 100."""
  error = np.mean((a.astype(float) - b) ** 2)
  return float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the structural similarity of the grey values of uint8 (H, W, 3).

  With the published 11 x 11 Gaussian of 1.5 pixels, over its whole windows.
  """
  import cv2

  x, y = (cv2.cvtColor(v, cv2.COLOR_RGB2GRAY).astype(float) for v in (a, b))
  kernel = cv2.getGaussianKernel(11, 1.5)

  def mean(values: np.ndarray) -> np.ndarray:
    return cv2.sepFilter2D(values, -1, kernel, kernel)[5:-5, 5:-5]

  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  mx, my = mean(x), mean(y)
  vx, vy = mean(x * x) - mx * mx, mean(y * y) - my * my
  shared = mean(x * y) - mx * my
  similarity = ((2 * mx * my + c1) * (2 * shared + c2)) / (
    (mx * mx + my * my + c1) * (vx + vy + c2)
  )
  return float(similarity.mean())


def _landmark_distance(
  a: np.ndarray, b: np.ndarray, models: video_to_records.Models
) -> float:
  meshes = [models.finder.mesh(crop, _FACE) for crop in (a, b)]
  if any(mesh is None for mesh in meshes):
    return float("nan")
  lips = [mesh[list(_LIPS)] for mesh in meshes]
  aligned = [points - points.mean(axis=0) for points in lips]
  return float(np.linalg.norm(aligned[0] - aligned[1], axis=1).mean())
