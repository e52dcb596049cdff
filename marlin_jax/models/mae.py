"""MARLIN's masked autoencoder: an encoder of visible tokens, a light decoder.

Axes: B clips, N tokens of a clip, V visible, M masked, D width, P pixels per
token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.prediction import Prediction


def gather_tokens(tokens: jax.Array, indices: jax.Array) -> jax.Array:
  """Selects tokens: (B, N, D) and int (B, V) -> (B, V, D)."""
  return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def value_stats(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns mean and standard deviation over the last axis, which is kept.

  They normalise targets. The standard deviation is the unbiased one plus 1e-6
  (VideoMAE's run_mae_pretraining), so that dividing by it is finite for equal
  values.
  """
  mean = values.mean(-1, keepdims=True)
  return mean, jnp.sqrt(values.var(-1, ddof=1, keepdims=True)) + 1e-6


class Encoder(nnx.Module):
  """Patch embedding, fixed positions, transformer, final norm."""

  def __init__(
    self,
    *,
    num_tokens: int,
    pixels: int,
    size: vit.Size,
    execution: vit.Execution,
    rngs: nnx.Rngs,
    norm_eps: float = vit.NORM_EPS,
  ):
    dtype = execution.dtype
    self.patch_embedding = vit.dense(pixels, size.width, rngs, dtype)
    self.positions = vit.position_table(num_tokens, size.width)
    self.transformer = vit.Transformer(size, execution, norm_eps, rngs)
    self.norm = vit.layer_norm(size.width, rngs, norm_eps)
    self.dtype = dtype

  def __call__(self, patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Encodes some tokens of each clip.

    Args:
      patches: (B, V, P), pixels in [0, 1].
      indices: int (B, V), the position of each token in the clip.

    Returns:
      float32 (B, V, D), after the final norm.
    """
    return self.norm(self.tokens(patches, indices))

  def tokens(
    self,
    patches: jax.Array,
    indices: jax.Array | None = None,
    keep: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes tokens without the final norm.

    Args:
      patches: (B, V, P), pixels in [0, 1].
      indices: int (B, V), the position of each token; None: the patches are
        all N tokens in order.
      keep: float32 (depth, 2, B), from vit.drop_path.

    Returns:
      (B, V, D) in the network's dtype.
    """
    return self.transformer(self.embed(patches, indices), keep=keep)

  def embed(
    self, patches: jax.Array, indices: jax.Array | None = None
  ) -> jax.Array:
    """Returns the transformer's input: (B, V, P) -> (B, V, D)."""
    positions = self.positions[...]
    if indices is not None:
      positions = positions[indices]
    return (self.patch_embedding(patches) + positions).astype(self.dtype)


class MAE(nnx.Module):
  """Masked autoencoder (paper section 3.2).

  Args:
    num_tokens: N, tokens of a clip.
    pixels: P, pixel values of a token.
    encoder: size of the encoder.
    decoder: size of the decoder.
    execution: dtype, attention, scan and remat of both.
    rngs: draws the parameters.
    first_prediction: float32 (P,), what an untrained head predicts for every
      token, so that a short run does not spend its first steps on learning the
      mean. None: the head is random, as in the authors' code.
    norm_eps: epsilon of every LayerNorm.
  """

  def __init__(
    self,
    *,
    num_tokens: int,
    pixels: int,
    encoder: vit.Size,
    decoder: vit.Size,
    execution: vit.Execution,
    rngs: nnx.Rngs,
    first_prediction: jax.Array | None = None,
    norm_eps: float = vit.NORM_EPS,
  ):
    dtype = execution.dtype
    self.encoder = Encoder(
      num_tokens=num_tokens,
      pixels=pixels,
      size=encoder,
      execution=execution,
      rngs=rngs,
      norm_eps=norm_eps,
    )
    self.enc_to_dec = vit.dense(
      encoder.width, decoder.width, rngs, dtype, use_bias=False
    )
    self.mask_token = vit.learned_token(decoder.width, rngs)
    self.dec_positions = vit.position_table(num_tokens, decoder.width)
    self.decoder = vit.Transformer(decoder, execution, norm_eps, rngs)
    self.dec_norm = vit.layer_norm(decoder.width, rngs, norm_eps)
    self.head = vit.dense(decoder.width, pixels, rngs, dtype)
    if first_prediction is not None:
      self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])
      self.head.bias[...] = first_prediction
    self.dtype = dtype

  def __call__(
    self, patches: jax.Array, visible: jax.Array, masked: jax.Array
  ) -> jax.Array:
    """Predicts the masked tokens from the visible ones.

    Args:
      patches: (B, V, P), pixels of the visible tokens.
      visible: int (B, V), token numbers of the visible tokens.
      masked: int (B, M), token numbers of the tokens to predict.

    Returns:
      float32 (B, M, P).
    """
    return self.predict(patches, visible, masked).pixels.astype(jnp.float32)

  def predict(
    self, patches: jax.Array, visible: jax.Array, masked: jax.Array
  ) -> Prediction:
    """Predicts like `__call__`, but computes pixels only when they are read.

    Args:
      patches, visible, masked: see `__call__`.

    Returns:
      A Prediction in the network's dtype.
    """
    return self.decode(self.encoder(patches, visible), visible, masked)

  def decode(
    self, encoded: jax.Array, visible: jax.Array, masked: jax.Array
  ) -> Prediction:
    """Predicts the masked tokens from the encoder's output.

    Args:
      encoded: float32 (B, V, D), from the encoder.
      visible, masked: see `__call__`.

    Returns:
      A Prediction in the network's dtype.
    """
    latent = self.enc_to_dec(encoded)
    positions = self.dec_positions[...]
    x = jnp.concatenate(
      [latent + positions[visible], self.mask_token[...] + positions[masked]],
      axis=1,
    )
    # Only masked tokens are predicted: the last block's queries, the norm and
    # the head run on them alone.
    x = self.decoder(x.astype(self.dtype), start=visible.shape[1])
    return Prediction.from_head(self.head, self.dec_norm(x))
