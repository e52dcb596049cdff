"""The library's front door: weights in, features of face videos out.

Axes: B clips, T frames, H W pixels, C colours, N tokens (ordered t h w),
D width, W windows of a video.
"""

from __future__ import annotations

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.inference import (
  attention_maps,
  clip_features,
  face_windows,
  reconstruction,
  stream,
)
from marlin_jax.inference.clips import as_clips, read_clips, window_settings
from marlin_jax.models import softmax_attention
from marlin_jax.models.mae import MAE, Encoder
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.weights import formats, published
from marlin_jax.weights.weights import Architecture, Weights, WeightsError


class Marlin:
  """A face-video encoder, with its decoder where the weights have one.

    marlin = Marlin.from_pretrained("marlin_vit_base_ytf", full_model=True)
    marlin.extract_video("clip.mp4", crop_face=True, reduction="mean")  # (768,)
    marlin.reconstruct("clip.mp4", crop_face=True).save("clip.gif")

  Attributes:
    architecture: sizes, clip and conventions.
    weights: all arrays by name.
    model: the network, an nnx module: models.mae.MAE, or Encoder where there is
      no decoder.
  """

  def __init__(
    self, weights: Weights, *, dtype="float32", attention: str = "auto"
  ):
    """Builds the network.

    Args:
      weights: see formats.
      dtype: of matrix products; 'bfloat16' on TPU and GPU is faster and good
        for about two digits. Results are float32.
      attention: one of models.options.ATTENTION.
    """
    self.weights = weights
    attention = softmax_attention.choose(
      attention, jax.default_backend(), dtype
    )
    self.model = weights.autoencoder(dtype=dtype, attention=attention)
    graphdef, params = nnx.split(self.encoder)
    self._params = params
    self._features = clip_features.jitted_features(graphdef, self.architecture)

  @classmethod
  def from_pretrained(
    cls, source: str, *, full_model: bool = False, **how
  ) -> Marlin:
    """Opens weights.

    Args:
      source: a folder or file of any format (see formats.detect), or the name
        of a published model: marlin_vit_small_ytf, marlin_vit_base_ytf or
        marlin_vit_large_ytf, downloaded once into MARLIN_HOME.
      full_model: of a published model, fetch the decoder too, which
        `reconstruct` needs.
      **how: see `__init__`.

    Raises:
      WeightsError: there are no such weights, or they cannot be had, be read,
        or do not fit; the message says which and what to do.
    """
    return cls(formats.read(published.resolve(source, full=full_model)), **how)

  @property
  def architecture(self) -> Architecture:
    return self.weights.architecture

  @property
  def encoder(self) -> Encoder:
    return self.model.encoder if self.architecture.has_decoder else self.model

  @property
  def mae(self) -> MAE:
    """The autoencoder.

    Raises:
      WeightsError: the weights have no decoder.
    """
    if not self.architecture.has_decoder:
      raise WeightsError(
        f"{self.weights.source} has no decoder, so nothing can be "
        "reconstructed: use a full checkpoint (of the authors' .full.pt or "
        ".ckpt; by name: full_model=True)"
      )
    return self.model

  def extract_features(
    self, x: np.ndarray | jax.Array, *, keep_seq: bool = False
  ) -> jax.Array:
    """Features of clips, differentiable in the pixels.

    Args:
      x: (B, T, H, W, C) RGB, uint8, or floating point in [0, 1]; of the
        architecture's number of frames and image size.
      keep_seq: one feature per token instead of one per clip.

    Returns:
      float32 (B, D), LayerNorm of the mean over tokens; with `keep_seq`
      (B, N, D), LayerNorm of each (paper section 3.3; the two orders differ on
      purpose, as in the authors' code).

    Raises:
      ValueError: wrong shape or dtype, or floating point outside [0, 1].
    """
    _check_clips(x, self.architecture.tubelets)
    return self._features(self._params, x, keep_seq=keep_seq)

  def extract_video(
    self,
    path: str | os.PathLike,
    *,
    crop_face: bool = False,
    sample_rate: int | None = None,
    stride: int | None = None,
    reduction: str = "none",
    keep_seq: bool = False,
    window_rule: str = "cover",
    batch_size: int | None = None,
  ) -> np.ndarray:
    """Features of the windows of a video, whatever its size, rate and length.

    Windows cover every frame, by `video.Clip.window_starts`. The names are
    those of marlin-pytorch.

    Args:
      path: a file in anything that FFmpeg decodes.
      crop_face: find the face that is there longest, and follow it; windows
        then cover the frames in which it is followed. Else whole frames are
        taken, with black bars where they are no squares: right for videos that
        are face crops already.
      sample_rate: every such frame is seen; by default as in training, 2.
      stride: frames that are seen from the start of one window to that of the
        next; by default those of a window, 16, so that windows lie side by
        side. Windows start every stride * sample_rate frames of the video.
      reduction: 'none', or over windows 'mean', 'max', 'std' (of the whole
        population) or 'mean_std', both side by side.
      keep_seq: one feature per token instead of one per window.
      window_rule: 'cover', or for comparison 'authors', the windows of
        marlin-pytorch, which leave out the end of most videos.
      batch_size: windows computed at a time; by default 1 on CPU, else 16.

    Returns:
      float32 (W, D), or (W, N, D) with `keep_seq`; reduced (D,) or (N, D), with
      'mean_std' twice as wide.

    Raises:
      FaceVideoError: the video is damaged or over a limit.
      NoFaceError: a face was to be cropped, and there is none; a kind of
        FaceVideoError.
      ValueError: no such reduction or rule, or windows that would leave out
        frames between them.
      UserError: this machine lacks a face model or a library.
    """
    stream.check_reduction(reduction)
    settings = window_settings(
      self.architecture,
      crop_face=crop_face,
      sample_rate=sample_rate,
      stride=stride,
      window_rule=window_rule,
    )
    with contextlib.closing(face_windows.read_ahead(path, settings)) as windows:
      features = stream.encode(
        functools.partial(self.extract_features, keep_seq=keep_seq),
        (window.frames for window in windows),
        batch_size or stream.default_batch_size(),
      )
      return stream.reduced(np.stack(list(features)), reduction)

  def reconstruct(
    self,
    source: str | os.PathLike | np.ndarray,
    *,
    crop_face: bool = False,
    num_clips: int | None = None,
    regions: np.ndarray | None = None,
    strategy: str = "fasking",
    ratio: float = 0.9,
    seed: int = 0,
  ) -> reconstruction.Reconstruction:
    """Hides most of a video and fills it in again.

    Args:
      source: a video file, or clips uint8 (B, T, H, W, 3) of the architecture's
        number of frames and image size.
      crop_face: of a file, as for `extract_video`.
      num_clips: of a file, how many windows from its beginning; None is all.
      regions: of clips, uint16 (B, T/2, h, w) bits as in records.Record, which
        the fasking strategies need; of a file they are found here.
      strategy: one of pretraining.configuration.MASKING_STRATEGIES.
      ratio: share of the tokens to hide. A network does best at what it was
        trained with: the recipe's is 0.9, that of configs/quickstart.py 0.5.
      seed: of the masks.

    Raises:
      WeightsError: the weights have no decoder.
      FaceVideoError: as for `extract_video`.
      ValueError: no such strategy, a ratio that leaves nothing visible, or
        clips or regions that do not fit.
    """
    mae = self.mae  # or an error, before a long video is read
    task = PretextTask.from_architecture(self.architecture, strategy, ratio)
    if isinstance(source, (str, os.PathLike)):
      clips = read_clips(
        source,
        self.architecture,
        crop_face=crop_face,
        regions=task.masking.needs_regions,
        num_clips=num_clips,
      )
    else:
      _check_clips(source, self.architecture.tubelets)
      if source.dtype != np.uint8:
        raise ValueError(f"clips of {source.dtype}, expected uint8")
      clips = as_clips(np.asarray(source), regions, self.architecture.stride)
    return reconstruction.reconstruct(mae, clips, task, seed)

  def attention_maps(
    self, x: np.ndarray | jax.Array
  ) -> attention_maps.AttentionMaps:
    """How much attention each token of each clip receives.

    Args:
      x: as for `extract_features`; a video's are `clips.read_clips`.

    Returns:
      Maps by layer and head, (B, L, H, N), and their rollout, (B, N); see
      attention_maps.attention_maps, and attention_maps.region_shares for the
      share of each face region.

    Raises:
      ValueError: wrong shape or dtype, or floating point outside [0, 1].
    """
    _check_clips(x, self.architecture.tubelets)
    # One by one: the matrices of a clip take 150 MB for B/16.
    maps = [
      attention_maps.attention_maps(
        self.encoder,
        clip_features.to_tokens(jnp.asarray(clip[None]), self.architecture),
      )
      for clip in x
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *maps)


def _check_clips(x, tubelets: Tubelets) -> None:
  size = tubelets.image_size
  expected = (tubelets.num_frames, size, size, 3)
  if x.ndim != 5 or x.shape[1:] != expected:
    raise ValueError(
      f"clips of shape {x.shape}, expected (B, T, H, W, C) = "
      f"(B, {', '.join(map(str, expected))})"
    )
  if jnp.issubdtype(x.dtype, jnp.floating):
    if isinstance(x, jax.core.Tracer):
      return
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
      raise ValueError(
        f"floating-point clips between {low:g} and {high:g}, expected [0, 1]: "
        "divide by 255, and undo any normalisation"
      )
  elif x.dtype != np.uint8:
    raise ValueError(
      f"clips of {x.dtype}, expected uint8, or floating point in [0, 1]"
    )
