"""Features of clips as pure functions of the encoder, to jit and train through.

Axes: B clips, T frames, H W pixels (S S of a square), N tokens (ordered t h w),
P pixels per token, D width, R rows of a mel spectrogram.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from marlin_jax.data.clip_geometry import imagenet_normalised
from marlin_jax.devices import sharding
from marlin_jax.models import partition, softmax_attention, vit
from marlin_jax.models.mae import Encoder
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import SoundWeights, Weights, encoder_sha256

# Cells along a side of `grid_features`.
_GRID_CELLS = 4


def to_tokens(x: jax.Array, architecture: Architecture) -> jax.Array:
  """Cuts clips into tokens as the encoder takes them.

  Args:
    x: (B, T, H, W, 3), uint8, or floating point in [0, 1].
    architecture: sets the token grid and the input convention.

  Returns:
    float32 (B, N, P).
  """
  tokens = architecture.tubelets.patchify(x).astype(jnp.float32)
  if jnp.issubdtype(x.dtype, jnp.integer):
    tokens = tokens / 255
  return imagenet_normalised(tokens) if architecture.imagenet_input else tokens


def features(
  encoder: Encoder,
  architecture: Architecture,
  x: jax.Array,
  *,
  keep_seq: bool = False,
  num_blocks: int = 0,
) -> jax.Array:
  """Returns the features of clips; see `Marlin.extract_features`.

  Args:
    encoder: an nnx module; gradients flow into its parameters.
    architecture: architecture of the encoder.
    x: clips, see `Marlin.extract_features`; not checked.
    keep_seq: return a feature per token instead of one per clip.
    num_blocks: number of blocks to run, from the first one; 0: all.

  Returns:
    float32 (B, D), or (B, N, D) with `keep_seq`.
  """
  return _pooled(encoder, to_tokens(x, architecture), keep_seq, num_blocks)


def _pooled(
  encoder: Encoder, patches: jax.Array, keep_seq: bool, num_blocks: int
) -> jax.Array:
  """Returns the features of all tokens of clips, see `features`."""
  if num_blocks:
    embedded = encoder.embed(patches)
    tokens = encoder.transformer.part(embedded, 0, num_blocks)
  else:
    tokens = encoder.tokens(patches)
  tokens = tokens.astype(jnp.float32)
  return encoder.norm(tokens if keep_seq else tokens.mean(axis=1))


def check_num_blocks(num_blocks: int, architecture: Architecture) -> None:
  """Raises a ValueError unless the encoder has so many blocks."""
  if not 1 <= num_blocks <= architecture.depth:
    raise ValueError(
      f"num_blocks={num_blocks}: expected 1 to {architecture.depth}, the "
      "blocks of the encoder"
    )


def grid_features(
  encoder: Encoder,
  architecture: Architecture,
  x: jax.Array,
  *,
  num_blocks: int = 0,
) -> jax.Array:
  """Returns features of clips that keep where things are.

  Those of the tokens, averaged over time and over the cells of a grid of 4 x 4
  cells, or as many as there are patches along a side.

  Args:
    encoder, architecture, x, num_blocks: see `features`.

  Returns:
    float32 (B, 16 D), ordered by row, column and feature.
  """
  tokens = features(
    encoder, architecture, x, keep_seq=True, num_blocks=num_blocks
  )
  _, height, width = architecture.tubelets.grid
  rows, columns = (_cells(side) for side in (height, width))
  tokens = tokens.reshape(len(x), -1, height, width, tokens.shape[-1])
  # Sums of few numbers: exact products cost nothing here.
  pooled = jnp.einsum(
    "bthwd,ih,jw->bijd",
    tokens,
    rows,
    columns,
    precision=jax.lax.Precision.HIGHEST,
  )
  return (pooled / tokens.shape[1]).reshape(len(x), -1)


def _cells(side: int) -> jax.Array:
  """Returns the share of each patch in the mean of each cell, (cells, side)."""
  num = min(_GRID_CELLS, side)
  is_in = jnp.arange(side) * num // side == jnp.arange(num)[:, None]
  return is_in / is_in.sum(axis=1, keepdims=True)


def jitted_features(
  graphdef: nnx.GraphDef,
  architecture: Architecture,
  *,
  placement: partition.Placement | None = None,
  out_shardings: jax.sharding.Sharding | None = None,
) -> Callable[..., jax.Array]:
  """Compiles `features` as a function of the encoder's parameters and clips.

  Args:
    graphdef: structure of the encoder, from nnx.split.
    architecture: architecture of the encoder.
    placement: placement of parameters and tokens on a mesh; None on a single
      device.
    out_shardings: sharding of the features.

  Returns:
    A jitted function (params, x, keep_seq=False, num_blocks=0) -> features.
    Matmuls of a float32 encoder are exact on every device.
  """

  return _jitted(
    graphdef,
    functools.partial(to_tokens, architecture=architecture),
    placement,
    out_shardings,
  )


def _jitted(graphdef, to_patches, placement=None, out_shardings=None):
  """Returns `jitted_features` of inputs that `to_patches` cuts into tokens."""

  @functools.partial(
    jax.jit,
    static_argnames=("keep_seq", "num_blocks"),
    out_shardings=out_shardings,
  )
  def apply(params, x, keep_seq=False, num_blocks=0):
    encoder = nnx.merge(graphdef, params)
    with partition.use(placement), vit.exact_matmuls(encoder.dtype):
      return _pooled(encoder, to_patches(x), keep_seq, num_blocks)

  return apply


class _Replicated:
  """Encoder with fixed weights, replicated over the devices of a mesh.

  Attributes:
    mesh: mesh of the devices.
  """

  def __init__(self, make, to_patches, mesh: Mesh, dtype: str, attention: str):
    """Puts the encoder on the devices.

    Args:
      make: execution options -> the encoder.
      to_patches: inputs (B, ...) -> tokens (B, N, P).
      mesh, dtype, attention: see FrozenEncoder.
    """
    self.mesh = mesh
    platform = mesh.devices.flat[0].platform
    attention = softmax_attention.choose(attention, platform, dtype)
    everywhere = sharding.replicated(mesh)
    graphdef, params = nnx.split(make(dtype=dtype, attention=attention))
    self._params = sharding.put(params, everywhere)
    placement = sharding.MeshPlacement(mesh, dtype) if mesh.size > 1 else None
    self._features = _jitted(graphdef, to_patches, placement, everywhere)

  def __call__(
    self, inputs: np.ndarray, keep_seq: bool = False, num_blocks: int = 0
  ) -> jax.Array:
    """Returns the features of a batch, which must divide over the devices.

    Args:
      inputs: (B, ...), see the class; of several processes each gives its own
        rows, see `loader.own_rows`.
      keep_seq, num_blocks: see `features`.

    Returns:
      float32 (B, D), or (B, N, D) with `keep_seq`, on every process; see
      `features`.
    """
    split = sharding.batch_sharding(self.mesh)
    x = jax.make_array_from_process_local_data(split, inputs)
    return self._features(
      self._params, x, keep_seq=keep_seq, num_blocks=num_blocks
    )


class FrozenEncoder(_Replicated):
  """Function from clips, uint8 (B, T, S, S, 3), to features.

  Attributes:
    mesh: mesh of the devices.
    architecture: architecture of the encoder.
    identity: all that features depend on, except the clips; fit for JSON.
  """

  def __init__(self, weights: Weights, mesh: Mesh, dtype: str, attention: str):
    """Puts the encoder on the devices.

    Args:
      weights: weights of the encoder.
      mesh: mesh of the devices; clips are sharded over all axes but `tensor`.
      dtype: dtype of matmuls.
      attention: one of models.options.ATTENTION.
    """
    self.architecture = weights.architecture.without_decoder()
    self.identity = {"encoder": encoder_sha256(weights), "dtype": dtype}
    super().__init__(
      weights.encoder_only().autoencoder,
      functools.partial(to_tokens, architecture=self.architecture),
      *(mesh, dtype, attention),
    )


class FrozenSoundEncoder(_Replicated):
  """Function from sound, float32 (B, R, 80), to features.

  Attributes:
    mesh: mesh of the devices.
  """

  def __init__(
    self, weights: SoundWeights, mesh: Mesh, dtype: str, attention: str
  ):
    """Puts the encoder on the devices.

    Args:
      weights: weights of the encoder.
      mesh, dtype, attention: see FrozenEncoder.
    """
    super().__init__(
      weights.encoder,
      weights.patches.patchify,
      *(mesh, dtype, attention),
    )


def with_sound(
  modality: str,
  of_video: Callable[..., jax.Array] | None,
  of_sound: Callable[..., jax.Array],
  *,
  keep_seq: bool = False,
) -> Callable[[dict[str, np.ndarray]], jax.Array]:
  """Returns the function from batches of windows with sound to features.

  Args:
    modality: 'sound' or 'both', see stream.check_modality.
    of_video: clips -> float32 (B, D), as FrozenEncoder; None for 'sound'.
    of_sound: sound -> float32 (B, F), as FrozenSoundEncoder.
    keep_seq: return a feature per token instead of one per clip.

  Returns:
    {"video": ..., "mel": ...}, see face_windows.Window.clip -> float32 (B, F);
    for 'both' (B, D + F), those of video first.
  """
  if modality == "sound":
    return lambda clips: of_sound(clips["mel"], keep_seq=keep_seq)
  return lambda clips: jnp.concatenate(
    [of_video(clips["video"]), of_sound(clips["mel"])], axis=-1
  )
