"""`Marlin` with the names, argument order and shapes of marlin-pytorch.

For code that was written for marlin-pytorch; docs/COMING_FROM_PYTORCH.md says
what differs. New code uses `marlin_jax.Marlin`, which this class wraps.

  from marlin_jax.compat import Marlin
  model = Marlin.from_file("marlin_vit_base_ytf", "base.encoder.pt")
  model.extract_features(clips)          # (B, 3, 16, 224, 224)
  model.extract_video("clip.mp4", True)  # (windows, 768)

Axes: B clips, C colours, T frames, H W pixels, N tokens (ordered t h w), V
visible and M masked tokens, P pixels per token, D width, W windows of a video.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.inference import clip_features, marlin, stream
from marlin_jax.models import vit
from marlin_jax.weights import formats
from marlin_jax.weights.weights import Weights, WeightsError


class Marlin:
  """marlin-pytorch's Marlin on JAX.

  Clips are (B, C, T, H, W) in [0, 1], as NumPy or JAX arrays or PyTorch
  tensors; results are NumPy arrays, without gradients.

  Attributes:
    marlin: the `marlin_jax.Marlin` behind it.
    as_feature_extractor: True without a decoder.
    clip_frames: frames of a clip, T.
  """

  def __init__(self, weights: Weights):
    self.marlin = marlin.Marlin(weights)
    self.as_feature_extractor = not weights.architecture.has_decoder
    self.clip_frames = weights.architecture.num_frames

  @classmethod
  def from_file(
    cls,
    model_name: str,
    path: str | os.PathLike,
    *,
    num_heads: int = 0,
    dec_num_heads: int = 0,
  ) -> Marlin:
    """Opens a file.

    Args:
      model_name: name of a published model, whose width the file must have, or
        any other, such as one registered with marlin-pytorch.
      path: the authors' .pt or .ckpt file, or weights in any other format.
      num_heads, dec_num_heads: heads of a network that was not published, which
        a file does not hold.

    Raises:
      WeightsError: see `marlin_jax.Marlin.from_pretrained`, or the file is of
        another published model.
    """
    heads = {"num_heads": num_heads, "dec_num_heads": dec_num_heads}
    weights = formats.read(
      formats.resolve(os.fspath(path)), **{k: v for k, v in heads.items() if v}
    )
    width = formats.PUBLISHED.get(model_name, weights.architecture.width)
    if weights.architecture.width != width:
      raise WeightsError(
        f"{path} has width {weights.architecture.width}, and {model_name} has "
        f"{width}: it is another model"
      )
    return cls(weights)

  @classmethod
  def from_online(cls, model_name: str, full_model: bool = False) -> Marlin:
    """Opens a published model; downloads it on first use.

    Args:
      model_name: a key of `formats.PUBLISHED`.
      full_model: open it with its decoder.

    Raises:
      WeightsError: there is no such model, or it cannot be downloaded.
    """
    if model_name not in formats.PUBLISHED:
      raise WeightsError(
        f"no published model '{model_name}', expected one of "
        f"{', '.join(formats.PUBLISHED)}"
      )
    return cls(formats.read(formats.resolve(model_name, full=full_model)))

  @classmethod
  def clean_cache(cls, verbose: bool = True) -> None:
    """Deletes the published models that were downloaded."""
    for path in formats.downloaded():
      path.unlink()
      if verbose:
        print(f"deleted {path}")

  def eval(self) -> Marlin:
    """Returns the model: it never trains."""
    return self

  def extract_features(self, x: Any, keep_seq: bool = True) -> np.ndarray:
    """Returns the features of clips.

    Args:
      x: clips, (B, C, T, H, W).
      keep_seq: return a feature per token instead of one per clip.

    Returns:
      float32 (B, N, D), or (B, D) without `keep_seq`.

    Raises:
      ValueError: see `marlin_jax.Marlin.extract_features`.
    """
    clips = _channels_last(x)
    return np.asarray(self.marlin.extract_features(clips, keep_seq=keep_seq))

  def extract_video(
    self,
    video_path: str | os.PathLike,
    crop_face: bool = False,
    sample_rate: int = 2,
    stride: int = 16,
    reduction: str = "none",
    keep_seq: bool = False,
    detector_device: Any = None,
  ) -> np.ndarray:
    """Returns features of the windows that marlin-pytorch takes.

    They leave out the end of most videos; `marlin_jax.Marlin.extract_video`
    covers every frame.

    Args:
      video_path: path of the video.
      crop_face: follow and crop the main face, with this project's detector.
      sample_rate: distance between the frames of a window.
      stride: sampled frames from one window to the next.
      reduction: 'none', or 'mean' or 'max' over the windows.
      keep_seq: return a feature per token instead of one per window.
      detector_device: unused: faces are found on the CPU.

    Returns:
      float32 (W, D), or (W, N, D) with `keep_seq`; a reduction removes W.

    Raises:
      FaceVideoError, ValueError: see `marlin_jax.Marlin.extract_video`.
    """
    del detector_device
    features = self.marlin.extract_video(
      video_path,
      crop_face=crop_face,
      sample_rate=sample_rate,
      stride=stride,
      keep_seq=keep_seq,
      window_rule="authors",
    )
    return stream.reduced(features, reduction)

  def __call__(self, x: Any, mask: Any) -> np.ndarray:
    """Predicts the masked tokens of clips from the visible ones.

    Args:
      x: clips, (B, C, T, H, W).
      mask: bool (B, N), True where a token is visible; V for each clip.

    Returns:
      float32 (B, M, P), the masked tokens in order.

    Raises:
      WeightsError: the weights have no decoder.
      ValueError: clips or mask have wrong shapes.
    """
    predict = self._predict  # raises before anything is computed
    tubelets = self.marlin.architecture.tubelets
    clips, mask = _channels_last(x), _as_array(mask).astype(bool)
    clips = marlin.checked_clips(clips, tubelets)
    num_visible = {*mask.sum(axis=-1).tolist()} if mask.ndim == 2 else set()
    if mask.shape != (len(clips), tubelets.num_tokens) or len(num_visible) > 1:
      raise ValueError(
        f"mask of shape {mask.shape} with {sorted(num_visible)} visible "
        f"tokens, expected ({len(clips)}, {tubelets.num_tokens}), with the "
        "same number in each clip"
      )
    visible, masked = (
      np.stack([np.flatnonzero(row) for row in rows]) for rows in (mask, ~mask)
    )
    return np.asarray(predict(clips, visible, masked))

  @functools.cached_property
  def _predict(self) -> Callable[..., jax.Array]:
    graphdef, params = nnx.split(self.marlin.mae)

    @jax.jit
    def predict(params, clips, visible, masked):
      tokens = clip_features.to_tokens(clips, self.marlin.architecture)
      patches = jnp.take_along_axis(tokens, visible[..., None], axis=1)
      with vit.exact_matmuls("float32"):
        return nnx.merge(graphdef, params)(patches, visible, masked)

    return functools.partial(predict, params)


def _channels_last(x: Any) -> np.ndarray:
  """Returns clips as (B, T, H, W, C)."""
  clips = _as_array(x)
  if clips.ndim != 5 or clips.shape[1] != 3:
    raise ValueError(
      f"clips of shape {clips.shape}, expected (B, 3, T, H, W): "
      "marlin_jax.Marlin takes (B, T, H, W, 3)"
    )
  return np.ascontiguousarray(clips.transpose(0, 2, 3, 4, 1))


def _as_array(x: Any) -> np.ndarray:
  """Converts an array or a PyTorch tensor, on any device."""
  return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
