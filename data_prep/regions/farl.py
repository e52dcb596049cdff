"""The parser of the paper: FaRL fine-tuned on LaPa, a TorchScript file.

The face is aligned by five points and warped so that a tanh compresses the
border of the picture, far from the face (Lin et al., "Face Parsing with RoI
Tanh-Warping", CVPR 2019), as in github.com/FacePerceiver/facer.

A TorchScript file is a program: use one from a known source.

Axes: S = 224 crop pixels, P = 448 pixels of the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.faces.mediapipe_tasks import ModelError
from data_prep.regions import lapa
from marlin_jax.records.schema import FRAME_SIZE, REGIONS

if TYPE_CHECKING:
  from data_prep.regions.parsers import Parser

INPUT_SIZE = 448
# Share of the picture, from each border, in which the warp is not linear.
WARP_FACTOR = 0.8
# Largest tanh that is inverted: at 1 the inverse is infinite.
MAX_TANH = 0.999
# Aligned places of the eyes, the tip of the nose and the corners of the mouth
# in 512 pixels; the eye on the left of the picture first.
TARGET_POINTS = np.array(
  [[196, 226], [316, 226], [256, 286], [220, 360.4], [292, 360.4]]
)


@contextlib.contextmanager
def open_model(model: Path) -> Iterator[Parser]:
  """Opens the parser; see `parsers.open_parser`."""
  try:
    import torch
  except ImportError as e:
    raise ModelError(
      "the parser farl needs PyTorch: pip install 'marlin-jax[torch]'"
    ) from e
  # There is a worker for every core already.
  torch.set_num_threads(1)
  try:
    with warnings.catch_warnings():
      # TorchScript is deprecated, but the weights are published only in it.
      warnings.simplefilter("ignore", DeprecationWarning)
      network = torch.jit.load(str(model), map_location="cpu").eval()
  except (RuntimeError, ValueError) as e:
    raise ModelError(f"PyTorch does not open {model}: {e}") from e
  yield FarlParser(network)


class FarlParser:
  """Parses with a TorchScript network of LaPa's 11 classes.

  Args:
    network: takes float32 (1, 3, P, P) in [0, 1]; returns a tuple whose first
      element is the logits (1, 11, P, P).
  """

  def __init__(self, network: Any) -> None:
    self._network = network

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; returns None without landmarks or skin.

    Raises:
      ModelError: the model has other classes.
    """
    import torch

    if not lapa.has_mesh(landmarks):
      return None
    matrix = alignment(landmarks)
    warped = _sampled(frame, unwarped(_pixel_centres(INPUT_SIZE), matrix))
    batch = warped.astype(np.float32).transpose(2, 0, 1)[None] / 255
    with torch.inference_mode():
      logits = self._network(torch.from_numpy(batch))[0][0].numpy()
    if len(logits) != len(REGIONS):
      raise ModelError(
        f"the model has {len(logits)} classes, expected LaPa's {len(REGIONS)}"
      )
    step = (box[2] - box[0]) / FRAME_SIZE
    source = _pixel_centres(FRAME_SIZE) * step + np.asarray(box[:2])
    points = to_model(source, matrix) * (logits.shape[-1] / INPUT_SIZE)
    resampled = np.stack([_sampled(plane, points) for plane in logits])
    labels = resampled.argmax(axis=0)
    labels = labels.astype(np.uint8)
    if not (labels == lapa.CODE["skin"]).any():
      return None
    lapa.clear_outside(labels, frame, box)
    return labels


def alignment(landmarks: np.ndarray) -> np.ndarray:
  """Returns the similarity (2, 3) from source pixels to aligned pixels.

  It is the least-squares fit of five points (Umeyama without reflection).

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
  """Maps points (..., 2) from source pixels to pixels of the model."""
  aligned = points @ matrix[:, :2].T + matrix[:, 2]
  unit = aligned / INPUT_SIZE * 2 - 1
  linear = 1 - WARP_FACTOR
  over = np.abs(unit) - linear
  squeezed = linear + WARP_FACTOR * np.tanh(over / WARP_FACTOR)
  unit = np.where(over > 0, np.sign(unit) * squeezed, unit)
  return (unit + 1) / 2 * INPUT_SIZE


def unwarped(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Maps points (..., 2) from pixels of the model to source pixels.

  The inverse of `to_model`; at the border it is cut off at MAX_TANH.
  """
  unit = points / INPUT_SIZE * 2 - 1
  linear = 1 - WARP_FACTOR
  over = np.clip((np.abs(unit) - linear) / WARP_FACTOR, 0, MAX_TANH)
  stretched = linear + WARP_FACTOR * np.arctanh(over)
  unit = np.where(np.abs(unit) > linear, np.sign(unit) * stretched, unit)
  aligned = (unit + 1) / 2 * INPUT_SIZE
  return (aligned - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def _pixel_centres(size: int) -> np.ndarray:
  """Returns float64 (size, size, 2), x and y."""
  centres = np.arange(size) + 0.5
  return np.stack(np.meshgrid(centres, centres), axis=-1)


def _sampled(image: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Samples an image (H, W[, C]) at points (h, w, 2), 0 outside of it."""
  import cv2

  points = (points - 0.5).astype(np.float32)
  return cv2.remap(
    image,
    points[..., 0],
    points[..., 1],
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
  )
