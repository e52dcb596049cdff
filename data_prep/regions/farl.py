"""The paper's parser: FaRL fine-tuned on LaPa, as a TorchScript file.

The face is aligned by five points and warped so that the picture's border, far
from the face, is squeezed by a tanh (Lin et al., "Face Parsing with RoI
Tanh-Warping", CVPR 2019), as github.com/FacePerceiver/facer does.

A TorchScript file is a program: use one whose origin is known.

Axes: S = 224 crop pixels, P = 448 pixels of the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.regions import lapa
from marlin_jax.records.schema import FRAME_SIZE, REGIONS

if TYPE_CHECKING:
  from data_prep.regions.parsers import Parser

INPUT_SIZE = 448
# Share of the picture, from each border, in which the warp is not linear.
WARP_FACTOR = 0.8
# How far the inverse goes into the border.
MAX_TANH = 0.999
# Where the eyes, the tip of the nose and the corners of the mouth are put, of
# 512; the eye on the left of the picture first.
TARGET_POINTS = np.array(
  [[196, 226], [316, 226], [256, 286], [220, 360.4], [292, 360.4]]
)


@contextlib.contextmanager
def open_model(model: Path) -> Iterator[Parser]:
  """Opens the parser; see `parsers.open_parser`."""
  try:
    import torch
  except ImportError as e:
    raise RuntimeError(
      "the parser farl needs PyTorch: pip install 'marlin-jax[torch]'"
    ) from e
  # There is a worker for every core already.
  torch.set_num_threads(1)
  try:
    with warnings.catch_warnings():
      # Deprecated, but the weights are published in no other way.
      warnings.simplefilter("ignore", DeprecationWarning)
      network = torch.jit.load(str(model), map_location="cpu").eval()
  except (RuntimeError, ValueError) as e:
    raise RuntimeError(f"PyTorch does not open {model}: {e}") from e
  yield FarlParser(network)


class FarlParser:
  """Parses with a TorchScript network of LaPa's 11 classes.

  Args:
    network: takes float32 (1, 3, P, P) in [0, 1], gives logits (1, 11, P, P)
      and something else.
  """

  def __init__(self, network: Any) -> None:
    self._network = network

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; None where there are no landmarks or no skin.

    Raises:
      RuntimeError: the model has other classes.
    """
    import torch

    if landmarks is None or not np.isfinite(landmarks).all():
      return None
    matrix = alignment(landmarks)
    warped = _sampled(frame, unwarped(_pixel_centres(INPUT_SIZE), matrix))
    batch = warped.astype(np.float32).transpose(2, 0, 1)[None] / 255
    with torch.inference_mode():
      logits = self._network(torch.from_numpy(batch))[0][0].numpy()
    if len(logits) != len(REGIONS):
      raise RuntimeError(
        f"the model has {len(logits)} classes, expected LaPa's {len(REGIONS)}"
      )
    step = (box[2] - box[0]) / FRAME_SIZE
    source = _pixel_centres(FRAME_SIZE) * step + np.asarray(box[:2])
    at = to_model(source, matrix) * (logits.shape[-1] / INPUT_SIZE)
    labels = np.stack([_sampled(one, at) for one in logits]).argmax(axis=0)
    labels = labels.astype(np.uint8)
    if not (labels == lapa.CODE["skin"]).any():
      return None
    area = lapa.picture_area(frame)
    labels[~lapa.inside(area, box, FRAME_SIZE)] = lapa.CODE["background"]
    return labels


def alignment(landmarks: np.ndarray) -> np.ndarray:
  """Returns the similarity (2, 3) from source pixels to the unwarped picture.

  Least squares over five points (Umeyama without reflection).

  Args:
    landmarks: (478, 2) in source pixels.
  """
  landmarks = np.asarray(landmarks, np.float64)
  points = np.stack(
    [
      landmarks[list(lapa.RIGHT_EYE)].mean(axis=0),
      landmarks[list(lapa.LEFT_EYE)].mean(axis=0),
      landmarks[lapa.NOSE_TIP],
      *landmarks[list(lapa.MOUTH_CORNERS)],
    ]
  )
  target = TARGET_POINTS / 512 * (INPUT_SIZE - 1)
  source_mean, target_mean = points.mean(axis=0), target.mean(axis=0)
  source, target = points - source_mean, target - target_mean
  size = (source**2).sum()
  cosine = (source * target).sum() / size
  sine = (
    source[:, 0] * target[:, 1] - source[:, 1] * target[:, 0]
  ).sum() / size
  rotation = np.array([[cosine, -sine], [sine, cosine]])
  return np.column_stack([rotation, target_mean - rotation @ source_mean])


def to_model(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Brings points (..., 2) in source pixels to the model's picture."""
  aligned = points @ matrix[:, :2].T + matrix[:, 2]
  at = aligned / INPUT_SIZE * 2 - 1
  linear = 1 - WARP_FACTOR
  over = np.abs(at) - linear
  squeezed = linear + WARP_FACTOR * np.tanh(over / WARP_FACTOR)
  at = np.where(over > 0, np.sign(at) * squeezed, at)
  return (at + 1) / 2 * INPUT_SIZE


def unwarped(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """The inverse of `to_model`; at the very border it ends in MAX_TANH."""
  at = points / INPUT_SIZE * 2 - 1
  linear = 1 - WARP_FACTOR
  over = np.clip((np.abs(at) - linear) / WARP_FACTOR, 0, MAX_TANH)
  stretched = linear + WARP_FACTOR * np.arctanh(over)
  at = np.where(np.abs(at) > linear, np.sign(at) * stretched, at)
  aligned = (at + 1) / 2 * INPUT_SIZE
  return (aligned - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def _pixel_centres(size: int) -> np.ndarray:
  """Returns float64 (size, size, 2), x and y."""
  at = np.arange(size) + 0.5
  return np.stack(np.meshgrid(at, at), axis=-1)


def _sampled(image: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Samples an image (H, W[, C]) at points (h, w, 2), zero outside."""
  import cv2

  at = (at - 0.5).astype(np.float32)
  return cv2.remap(
    image,
    at[..., 0],
    at[..., 1],
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
  )
