"""`Marlin`: features, reconstructions and attention maps of face videos.

Axes: B clips, T frames, H W pixels, C colours, N tokens (ordered t h w),
D width, L layers, W windows of a video. H also counts heads in (B, L, H, N).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.devices import sharding
from marlin_jax.inference import (
  attention_maps,
  clip_features,
  face_windows,
  reconstruction,
  stream,
)
from marlin_jax.inference.classifier import VideoClassifier
from marlin_jax.inference.clips import as_clips, read_clips, window_settings
from marlin_jax.models import softmax_attention
from marlin_jax.models.mae import MAE, Encoder
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.weights import (
  formats,
  hub,
  run_checkpoint,
  safetensors_folder,
)
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import (
  SoundWeights,
  Weights,
  WeightsError,
  encoder_sha256,
)


class Marlin:
  """Encoder of face videos, with a decoder if the weights include one.

    marlin = Marlin.from_pretrained("marlin_vit_base_ytf", full_model=True)
    marlin.extract_video("clip.mp4", crop_face=True, reduction="mean")  # (768,)
    marlin.reconstruct("clip.mp4", crop_face=True).save("clip.gif")

  Attributes:
    architecture: sizes, clip geometry and input conventions.
    weights: all arrays by name.
    model: nnx module, a models.mae.MAE, or an Encoder without a decoder.
    sound: weights of an encoder of sound, or None.
  """

  def __init__(
    self,
    weights: Weights,
    *,
    dtype="float32",
    attention: str = "auto",
    sound: SoundWeights | None = None,
  ):
    """Builds the network.

    Args:
      weights: see `weights.formats.read`.
      dtype: dtype of matrix products. 'float32' products are exact on every
        device, see `vit.exact_matmuls` for the price; 'bfloat16' is several
        times faster on TPU and GPU and accurate to about two digits. Results
        are float32.
      attention: one of models.options.ATTENTION.
      sound: weights of an encoder of sound, see `run_checkpoint.read_sound`.
    """
    self.weights, self.sound = weights, sound
    self._execution = dtype, attention
    attention = softmax_attention.choose(
      attention, jax.default_backend(), dtype
    )
    self.model = weights.autoencoder(dtype=dtype, attention=attention)
    graphdef, params = nnx.split(self.encoder)
    self._params = params
    self._features = clip_features.jitted_features(graphdef, self.architecture)

  @classmethod
  def from_pretrained(
    cls, source: str, *, full_model: bool = False, **options
  ) -> Marlin:
    """Opens weights.

    Args:
      source: the workdir of a run; a folder or file in any other format of
        `weights.formats`; OWNER/NAME on the HuggingFace hub, see `hub.fetch`;
        or the name of a published model, marlin_vit_small_ytf,
        marlin_vit_base_ytf or marlin_vit_large_ytf. Downloads are kept.
      full_model: download a published model with its decoder, which
        `reconstruct` needs.
      **options: `dtype` and `attention`, see `__init__`.

    Raises:
      WeightsError: the weights are missing, cannot be downloaded or read, or do
        not fit; the message says what to do.
    """
    path = formats.resolve(source, full=full_model)
    weights, sound = formats.read(path), None
    if run_checkpoint.has_sound(path):
      sound = run_checkpoint.read_sound(path)
    return cls(weights, sound=sound, **options)

  @staticmethod
  def load_classifier(path: str | os.PathLike, **options) -> VideoClassifier:
    """Opens a model that an evaluation has trained.

      classifier = Marlin.load_classifier("runs/far/models/mood-linear-1-0")
      classifier.predict("clip.mp4").as_dict()

    Args:
      path, **options: see `VideoClassifier.load`.

    Raises:
      WeightsError: see `VideoClassifier.load`.
    """
    return VideoClassifier.load(path, **options)

  def push_to_hub(
    self,
    target: str,
    *,
    license: str,
    data: str,
    results: Iterable[str | os.PathLike] = (),
    private: bool = False,
  ) -> str:
    """Publishes the weights on the HuggingFace hub, with a model card.

      marlin.push_to_hub("me/marlin_b", license="cc-by-nc-4.0",
                         data="YouTube Faces", results=["runs/far"])

    Args:
      target, private: see `hub.push`.
      license, data: see `hub.Card`.
      results: workdirs of evaluations of this encoder, for the card.

    Returns:
      The address of the commit.

    Raises:
      WeightsError: see `hub.push` and `hub.read_results`.
    """
    a, sha256 = self.architecture, encoder_sha256(self.weights)
    decoder = (
      f", decoder {a.dec_width}/{a.dec_depth}/{a.dec_num_heads}"
      if a.has_decoder
      else ""
    )
    card = hub.Card(
      license=license,
      data=data,
      description="Encoder of face videos, pretrained as a masked autoencoder "
      "with [MARLIN](https://arxiv.org/abs/2211.06627)'s method.",
      usage="from marlin_jax import Marlin\n"
      'marlin = Marlin.from_pretrained("NAME")\n'
      'marlin.extract_video("clip.mp4", crop_face=True)',
      facts={
        "width/depth/heads": f"encoder {a.width}/{a.depth}/{a.num_heads}"
        f"{decoder}",
        "input": f"{a.num_frames} frames, every {a.stride} of a video, of "
        f"{a.image_size}x{a.image_size} pixels in [0, 1]",
        "sha256 of the encoder": sha256,
      },
      results=hub.read_results(results, sha256),
    )
    return hub.push(
      functools.partial(safetensors_folder.write, self.weights),
      target,
      card,
      private=private,
    )

  @property
  def architecture(self) -> Architecture:
    """Sizes, clip geometry and input conventions."""
    return self.weights.architecture

  @property
  def encoder(self) -> Encoder:
    """The encoder, an nnx module."""
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
    self,
    x: np.ndarray | jax.Array,
    *,
    keep_seq: bool = False,
    num_blocks: int | None = None,
  ) -> jax.Array:
    """Returns features of clips, differentiable in the pixels.

    Args:
      x: (B, T, H, W, C) RGB, uint8 or floating point in [0, 1], with the
        architecture's number of frames and image size.
      keep_seq: return a feature per token instead of one per clip.
      num_blocks: run the first blocks only, and the final LayerNorm; None: all.
        Linear probes may find more in the middle, see docs/RESULTS.md.

    Returns:
      float32 (B, D), LayerNorm of the mean over tokens; with `keep_seq`
      (B, N, D), LayerNorm of each token (paper section 3.3; the order of mean
      and LayerNorm differs as in the authors' code).

    Raises:
      ValueError: wrong shape or dtype, floating point outside [0, 1], or the
        encoder has fewer blocks.
    """
    x = checked_clips(x, self.architecture.tubelets)
    if num_blocks is not None:
      clip_features.check_num_blocks(num_blocks, self.architecture)
    return self._features(
      self._params, x, keep_seq=keep_seq, num_blocks=num_blocks or 0
    )

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
    modality: str = "video",
  ) -> np.ndarray:
    """Returns features of the windows of a video of any size, rate and length.

    Windows cover every frame, see `Clip.window_starts`. Parameters are named as
    in marlin-pytorch.

    Args:
      path: a video file that FFmpeg decodes.
      crop_face: track the main face, large and long visible, and crop it;
        windows cover the frames of its track. If False, whole frames are used,
        padded to squares with black bars, which is right for videos of face
        crops.
      sample_rate: distance between the frames of a window; by default as in
        training, 2.
      stride: sampled frames from the start of one window to the start of the
        next; by default the length of a window, 16, so that windows do not
        overlap. Windows start every stride * sample_rate frames of the video.
      reduction: 'none', or over the windows 'mean', 'max', 'std' (of the
        population) or 'mean_std', which concatenates both.
      keep_seq: return a feature per token instead of one per window.
      window_rule: 'cover', or for comparison 'authors', the windows of
        marlin-pytorch, which leave out the end of most videos.
      batch_size: windows per batch; by default 1 on CPU, else 16.
      modality: 'video'; or, of a run that was trained with sound, 'sound' for
        the features of the windows' sound, or 'both' for those of video and
        then of sound.

    Returns:
      float32 (W, D), or (W, N, D) with `keep_seq`. A reduction removes the axis
      W; 'mean_std' doubles D.

    Raises:
      FaceVideoError: the video is damaged or over a limit, or has no sound that
        is asked for.
      NoFaceError: the video shows no face, with `crop_face`; a subclass of
        FaceVideoError.
      ValueError: the reduction, the rule or the modality is unknown, or the
        stride leaves out frames between windows.
      WeightsError: there is no encoder of sound.
      UserError: this machine lacks a face model or a library.
    """
    stream.check_reduction(reduction)
    stream.check_modality(modality, keep_seq)
    if batch_size is not None and batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: expected at least 1")
    settings = window_settings(
      self.architecture,
      crop_face=crop_face,
      sample_rate=sample_rate,
      stride=stride,
      window_rule=window_rule,
    )
    function = functools.partial(self.extract_features, keep_seq=keep_seq)
    if modality != "video":
      encoder = self._sound_encoder
      settings = dataclasses.replace(settings, sound=self.sound.patches)
      function = clip_features.with_sound(
        modality, self.extract_features, encoder, keep_seq=keep_seq
      )
    with contextlib.closing(face_windows.read_ahead(path, settings)) as windows:
      features = stream.encode(
        function,
        _checked(windows, path, crop_face=crop_face),
        batch_size or stream.default_batch_size(),
      )
      return stream.reduced(np.stack(list(features)), reduction)

  @functools.cached_property
  def _sound_encoder(self) -> clip_features.FrozenSoundEncoder:
    if self.sound is None:
      raise WeightsError(
        f"{self.weights.source} has no encoder of sound, which a run trains "
        "with config.sound.weight above 0 and keeps in its workdir"
      )
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    return clip_features.FrozenSoundEncoder(self.sound, mesh, *self._execution)

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
  ) -> reconstruction.ReconstructedClips:
    """Masks most of a video and reconstructs it.

    Args:
      source: a video file, or clips uint8 (B, T, H, W, 3) with the
        architecture's number of frames and image size.
      crop_face: crop the face of a video file, see `extract_video`; ignored for
        clips.
      num_clips: number of windows of a video file, from its start; None: all.
        Ignored for clips.
      regions: region bits of clips, uint16 (B, T/2, h, w) as in
        `schema.Record`, which the fasking strategies need. Ignored for a file,
        whose face regions are parsed.
      strategy: one of pretraining.configuration.MASKING_STRATEGIES.
      ratio: share of masked tokens. A network does best at its training ratio:
        0.9 in the recipe, 0.5 in configs/quickstart.py.
      seed: seed of the masks.

    Raises:
      WeightsError: the weights have no decoder.
      FaceVideoError: as for `extract_video`.
      ValueError: the strategy is unknown, no token would be visible, or clips
        or regions have a wrong shape or dtype.
    """
    mae = self.mae  # raises before a long video is read
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
      source = checked_clips(source, self.architecture.tubelets)
      if source.dtype != np.uint8:
        raise ValueError(f"clips of {source.dtype}, expected uint8")
      clips = as_clips(np.asarray(source), regions, self.architecture.stride)
    return reconstruction.reconstruct(mae, clips, task, seed)

  def attention_maps(
    self, x: np.ndarray | jax.Array
  ) -> attention_maps.AttentionMaps:
    """Returns the attention that each token of each clip receives.

    Args:
      x: clips, see `extract_features`; `clips.read_clips` reads those of a
        video.

    Returns:
      Maps by layer and head, (B, L, H, N), and their rollout, (B, N); see
      attention_maps.attention_maps, and attention_maps.region_shares for the
      share of each face region.

    Raises:
      ValueError: wrong shape or dtype, or floating point outside [0, 1].
    """
    x = checked_clips(x, self.architecture.tubelets)
    # Clip by clip: the matrices of a clip take 150 MB for B/16.
    maps = [
      attention_maps.attention_maps(
        self.encoder,
        clip_features.to_tokens(jnp.asarray(clip[None]), self.architecture),
      )
      for clip in x
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *maps)


def _checked(
  windows: Iterator[face_windows.Window],
  path: str | os.PathLike,
  *,
  crop_face: bool,
) -> Iterator[np.ndarray | dict[str, np.ndarray]]:
  """Yields the clips of windows; warns of whole frames with black bars."""
  for number, window in enumerate(windows):
    if not crop_face and not number and face_windows.letterboxed(window):
      warnings.warn(
        f"{os.fspath(path)} is not square, so that its frames are padded with "
        "black bars. The encoder knows crops of faces: unless this is one, use "
        "crop_face=True",
        stacklevel=3,
      )
    yield window.clip


def checked_clips(
  x: np.ndarray | jax.Array, tubelets: Tubelets
) -> np.ndarray | jax.Array:
  """Returns clips, (B, T, H, W, C), in the machine's byte order.

  Args:
    x: see `Marlin.extract_features`.
    tubelets: geometry of the network.

  Raises:
    ValueError: they are not an array, there are none, or their shape, dtype or
      range is wrong.
  """
  if not isinstance(x, (np.ndarray, jax.Array)):
    raise ValueError(
      f"clips of type {type(x).__module__}.{type(x).__qualname__}, expected a "
      "NumPy or JAX array: np.stack(clips) of a list, clips.numpy() of a "
      "PyTorch tensor"
    )
  size = tubelets.image_size
  expected = (tubelets.num_frames, size, size, 3)
  if x.ndim != 5 or x.shape[1:] != expected:
    raise ValueError(
      f"clips of shape {x.shape}, expected (B, T, H, W, C) = "
      f"(B, {', '.join(map(str, expected))})"
    )
  if not len(x):
    raise ValueError(f"no clips: shape {x.shape}, expected at least one")
  if isinstance(x, np.ndarray):
    # JAX reads the bytes of other orders as they are.
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
  if jnp.issubdtype(x.dtype, jnp.floating):
    if isinstance(x, jax.core.Tracer):
      return x
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
  return x
