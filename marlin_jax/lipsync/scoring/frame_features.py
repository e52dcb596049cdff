"""What pictures are compared by: features of faces, for Frechet distances.

Only Inception's features make an FID. Its weights are not ours to give; a
file comes of pytorch-fid (pip install pytorch-fid onnx), on any machine:

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

Axes: F frames, N pictures, D numbers of a feature.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import numpy as np

from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  from marlin_jax.inference.marlin import Marlin

INCEPTION_SIZE, INCEPTION_DIM = 299, 2048

_BATCH_SIZE = 16


class FeatureError(UserError):
  """The feature network cannot be used; the message says what to do."""


class FrameFeatures(Protocol):
  """What scoring asks.

  Attributes:
    metric_name: of the distance between two sets of such features.
  """

  metric_name: str

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """Features of a stretch.

    Args:
      frames: uint8 (F, 224, 224, 3), RGB face crops in a row.

    Returns:
      float32 (N, D), of each frame or of each window; (0, D) of too few.
    """


def open_features(source: str) -> FrameFeatures:
  """Opens a network by path.

  Args:
    source: an .onnx file, for FID; anything else is taken for weights of MARLIN
      in any format, or the name of a published model.

  Raises:
    FeatureError: the file is no such network.
    formats.weights.WeightsError: there are no such weights.
  """
  if source.endswith(".onnx"):
    return InceptionFeatures(source)
  from marlin_jax.inference.marlin import Marlin

  return MarlinFeatures(Marlin.from_pretrained(source))


class InceptionFeatures:
  """Inception's pool of 2048 numbers, from an ONNX file: of an FID."""

  metric_name = "fid"

  def __init__(self, path: str | os.PathLike):
    """Opens the file.

    Args:
      path: takes float32 (N, 3, 299, 299), RGB in [0, 1], of any N, and gives
        (N, 2048); see above how to make one.

    Raises:
      FeatureError: onnxruntime is missing, or this is no such file.
    """
    try:
      import onnxruntime
    except ImportError as e:
      raise FeatureError(
        "FID needs onnxruntime: pip install 'marlin-jax[parsers]'"
      ) from e
    if not os.path.isfile(path):
      raise FeatureError(
        f"there is no feature network {path}; how to make one: the docstring "
        "of marlin_jax/lipsync/scoring/frame_features.py"
      )
    try:
      self._session = onnxruntime.InferenceSession(
        os.fspath(path), providers=["CPUExecutionProvider"]
      )
    except Exception as e:  # onnxruntime's own kinds, which it does not export
      raise FeatureError(f"onnxruntime does not open {path}: {e}") from e
    (taken, *others), (given, *_) = (
      self._session.get_inputs(),
      self._session.get_outputs(),
    )
    sides = taken.shape[1:]
    if others or sides != [3, INCEPTION_SIZE, INCEPTION_SIZE]:
      raise FeatureError(
        f"{path} takes {taken.shape}, expected one input (N, 3, "
        f"{INCEPTION_SIZE}, {INCEPTION_SIZE})"
      )
    self._path, self._taken, self._given = path, taken.name, given.name

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: one of each frame."""
    found = [np.zeros((0, INCEPTION_DIM), np.float32)]
    for first in range(0, len(frames), _BATCH_SIZE):
      pictures = np.stack(
        [_inception_picture(f) for f in frames[first : first + _BATCH_SIZE]]
      )
      (features,) = self._session.run([self._given], {self._taken: pictures})
      if features.shape != (len(pictures), INCEPTION_DIM):
        raise FeatureError(
          f"{self._path} gives {features.shape} of {len(pictures)} pictures, "
          f"expected ({len(pictures)}, {INCEPTION_DIM})"
        )
      found.append(features)
    return np.concatenate(found)


def _inception_picture(frame: np.ndarray) -> np.ndarray:
  """Returns float32 (3, 299, 299), enlarged as pytorch-fid does."""
  import cv2

  size = INCEPTION_SIZE, INCEPTION_SIZE
  large = cv2.resize(
    frame.astype(np.float32) / 255, size, interpolation=cv2.INTER_LINEAR
  )
  return np.ascontiguousarray(large.transpose(2, 0, 1))


class PixelFeatures:
  """Eight by eight mean colours: needs no network and is no FID.

  It sees colours and the coarse look of a face, neither sharpness nor teeth.
  """

  metric_name = "frechet_pixels"

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: one of each frame, of 192 numbers in [0, 1]."""
    side = frames.shape[1] // 8
    blocks = frames.reshape(len(frames), 8, side, 8, side, 3)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(-1, 192) / 255


class MarlinFeatures:
  """MARLIN's features of clips that lie side by side: no FID either.

  Frames that are left over at a stretch's end are not seen.
  """

  metric_name = "frechet_marlin"

  def __init__(self, marlin: Marlin):
    self._marlin = marlin
    self._num_frames = marlin.architecture.tubelets.num_frames

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """See `FrameFeatures`: one of each clip."""
    t = self._num_frames
    clips = frames[: len(frames) // t * t].reshape(-1, t, *frames.shape[1:])
    found = [
      np.asarray(self._marlin.extract_features(clip[None])) for clip in clips
    ]
    if not found:
      return np.zeros((0, self._marlin.architecture.width), np.float32)
    return np.concatenate(found)
