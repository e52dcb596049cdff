"""Features of face crops, for Frechet distances.

Only with Inception's features the distance is FID. This project does not
distribute Inception's weights. Export them from pytorch-fid (pip install
pytorch-fid onnx), on any machine:

  import torch
  from pytorch_fid.inception import InceptionV3

  class Pooled(torch.nn.Module):
    def __init__(self):
      super().__init__()
      block = InceptionV3.BLOCK_INDEX_BY_DIM[2048]
      self.net = InceptionV3([block], resize_input=False).eval()

    def forward(self, pictures):  # (N, 3, 299, 299), RGB in [0, 1]
      return self.net(pictures)[0].flatten(1)

  torch.onnx.export(
    Pooled(), torch.zeros(2, 3, 299, 299), "inception.onnx", dynamo=False,
    input_names=["pictures"], dynamic_axes={"pictures": {0: "N"}},
  )

Axes: F frames, N images, D feature size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import numpy as np

from marlin_jax.records import schema
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  from marlin_jax.inference.marlin import Marlin

INCEPTION_SIZE, INCEPTION_DIM = 299, 2048

_BATCH_SIZE = 16


class FeatureError(UserError):
  """Raised if a feature network cannot be used; the message says what to do."""


class FrameFeatures(Protocol):
  """Features that scoring compares faces by.

  Attributes:
    metric_name: name of the distance between two sets of these features.
  """

  metric_name: str

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """Returns the features of consecutive frames.

    Args:
      frames: uint8 (F, 224, 224, 3), RGB face crops.

    Returns:
      float32 (N, D), one row per frame or per window; (0, D) if there are too
      few frames.
    """


def open_features(source: str) -> FrameFeatures:
  """Opens a feature network.

  Args:
    source: an .onnx file, for FID; otherwise MARLIN weights in any format, or
      the name of a published model.

  Raises:
    FeatureError: the file does not exist or is no such network.
    WeightsError: the weights do not exist or cannot be read.
  """
  if source.endswith(".onnx"):
    return InceptionFeatures(source)
  from marlin_jax.inference.marlin import Marlin

  return MarlinFeatures(Marlin.from_pretrained(source))


class InceptionFeatures:
  """Inception's pooled features of size 2048, from an ONNX file: for FID."""

  metric_name = "fid"

  def __init__(self, path: str | os.PathLike):
    """Opens the file.

    Args:
      path: an ONNX network that maps float32 (N, 3, 299, 299), RGB in [0, 1],
        to (N, 2048), for any N; see the module's docstring.

    Raises:
      FeatureError: onnxruntime is missing, or the file does not exist or is no
        such network.
    """
    try:
      import onnxruntime
    except ImportError as e:
      raise FeatureError(
        "FID needs onnxruntime: pip install 'marlin-jax[parsers]'"
      ) from e
    if not os.path.isfile(path):
      raise FeatureError(
        f"there is no feature network {path}; the docstring of "
        "marlin_jax/lipsync/scoring/frame_features.py says how to export it"
      )
    try:
      self._session = onnxruntime.InferenceSession(
        os.fspath(path), providers=["CPUExecutionProvider"]
      )
    except Exception as e:  # onnxruntime does not export its error classes
      raise FeatureError(f"onnxruntime does not open {path}: {e}") from e
    first_input, *other_inputs = self._session.get_inputs()
    image_shape = [3, INCEPTION_SIZE, INCEPTION_SIZE]
    if other_inputs or first_input.shape[1:] != image_shape:
      raise FeatureError(
        f"{path} takes {first_input.shape}, expected one input (N, 3, "
        f"{INCEPTION_SIZE}, {INCEPTION_SIZE})"
      )
    self._path = path
    self._input_name = first_input.name
    self._output_name = self._session.get_outputs()[0].name

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: returns one row per frame."""
    batches = [np.zeros((0, INCEPTION_DIM), np.float32)]
    for first in range(0, len(frames), _BATCH_SIZE):
      images = np.stack(
        [_inception_image(f) for f in frames[first : first + _BATCH_SIZE]]
      )
      (features,) = self._session.run(
        [self._output_name], {self._input_name: images}
      )
      if features.shape != (len(images), INCEPTION_DIM):
        raise FeatureError(
          f"{self._path} returns {features.shape} for {len(images)} images, "
          f"expected ({len(images)}, {INCEPTION_DIM})"
        )
      batches.append(features)
    return np.concatenate(batches)


def _inception_image(frame: np.ndarray) -> np.ndarray:
  """Returns float32 (3, 299, 299) in [0, 1], resized as pytorch-fid does."""
  import cv2

  size = INCEPTION_SIZE, INCEPTION_SIZE
  resized = cv2.resize(
    frame.astype(np.float32) / 255, size, interpolation=cv2.INTER_LINEAR
  )
  return np.ascontiguousarray(resized.transpose(2, 0, 1))


class PixelFeatures:
  """Mean colours of 8 x 8 blocks: needs no network, and is not FID.

  It measures colours and the coarse look of a face, not sharpness or teeth.
  """

  metric_name = "frechet_pixels"

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: returns one row of 192 in [0, 1] per frame."""
    side = frames.shape[1] // 8
    blocks = frames.reshape(len(frames), 8, side, 8, side, 3)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(-1, 192) / 255


class MarlinFeatures:
  """MARLIN's features of adjacent clips; not FID.

  The frames after the last whole clip are ignored.
  """

  metric_name = "frechet_marlin"

  def __init__(self, marlin: Marlin):
    self._marlin = marlin
    self._num_frames = marlin.architecture.num_frames
    self._image_size = marlin.architecture.image_size

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: returns one row per clip."""
    t, size = self._num_frames, self._image_size
    frames = np.stack([schema.resized(frame, size) for frame in frames])
    clips = frames[: len(frames) // t * t].reshape(-1, t, *frames.shape[1:])
    rows = [np.zeros((0, self._marlin.architecture.width), np.float32)]
    rows += [
      np.asarray(self._marlin.extract_features(clip[None])) for clip in clips
    ]
    return np.concatenate(rows)
