"""MARLIN's masked autoencoder: encoder on visible tokens, light decoder.

Axes: B batch, N all tokens, V visible, M masked, D width, P pixels per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.affine import Affine

# About the mean of a face crop's pixels.
_GREY = 0.45


def gather_tokens(tokens: jax.Array, indices: jax.Array) -> jax.Array:
  """Picks tokens: (B, N, D) and int (B, V) -> (B, V, D)."""
  return jnp.take_along_axis(tokens, indices[..., None], axis=1)


class Encoder(nnx.Module):
  """Patch embedding, fixed positions, transformer, final norm."""

  def __init__(
    self,
    *,
    num_tokens: int,
    pixels: int,
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
    norm_eps: float = vit.NORM_EPS,
    **transformer,
  ):
    self.patch_embedding = vit.dense(pixels, width, rngs, dtype)
    self.positions = vit.Fixed(
      jnp.asarray(vit.sincos_positions(num_tokens, width))
    )
    self.transformer = vit.Transformer(
      width=width,
      depth=depth,
      num_heads=num_heads,
      mlp_dim=mlp_dim,
      dtype=dtype,
      norm_eps=norm_eps,
      rngs=rngs,
      **transformer,
    )
    self.norm = vit.layer_norm(width, rngs, norm_eps)
    self.dtype = dtype

  def __call__(self, patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Encodes some tokens of each clip.

    Args:
      patches: (B, V, P) pixels, in [0, 1].
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
    """As `__call__`, before the final norm; without indices of all tokens.

    Args:
      patches, indices: as there.
      keep: float32 (depth, 2, B), from vit.drop_path.
    """
    return self.transformer(self.embed(patches, indices), keep=keep)

  def embed(
    self, patches: jax.Array, indices: jax.Array | None = None
  ) -> jax.Array:
    """The transformer's input: (B, V, P) -> (B, V, D), positions added."""
    positions = self.positions[...]
    if indices is not None:
      positions = positions[indices]
    return (self.patch_embedding(patches) + positions).astype(self.dtype)


class MAE(nnx.Module):
  """The autoencoder (paper section 3.2).

  Attributes:
    start_grey: the first prediction is plain grey instead of noise, so that a
      short run need not spend its first steps on finding the mean colour; the
      reference starts with a random head.
  """

  def __init__(
    self,
    *,
    num_tokens: int,
    pixels: int,
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    dec_width: int,
    dec_depth: int,
    dec_num_heads: int,
    dec_mlp_dim: int,
    start_grey: bool,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
    attention: str = "plain",
    scan: bool = False,
    remat: str = "none",
    norm_eps: float = vit.NORM_EPS,
  ):
    transformer = {
      "attention": attention,
      "scan": scan,
      "remat": remat,
      "norm_eps": norm_eps,
    }
    self.encoder = Encoder(
      num_tokens=num_tokens,
      pixels=pixels,
      width=width,
      depth=depth,
      num_heads=num_heads,
      mlp_dim=mlp_dim,
      dtype=dtype,
      rngs=rngs,
      **transformer,
    )
    self.enc_to_dec = vit.dense(width, dec_width, rngs, dtype, use_bias=False)
    self.mask_token = nnx.Param(
      nnx.initializers.truncated_normal(0.02)(
        rngs.params(), (dec_width,), jnp.float32
      )
    )
    self.dec_positions = vit.Fixed(
      jnp.asarray(vit.sincos_positions(num_tokens, dec_width))
    )
    self.decoder = vit.Transformer(
      width=dec_width,
      depth=dec_depth,
      num_heads=dec_num_heads,
      mlp_dim=dec_mlp_dim,
      dtype=dtype,
      rngs=rngs,
      **transformer,
    )
    self.dec_norm = vit.layer_norm(dec_width, rngs, norm_eps)
    self.head = vit.dense(dec_width, pixels, rngs, dtype)
    if start_grey:
      self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])
      self.head.bias[...] = jnp.full_like(self.head.bias[...], _GREY)
    self.dtype = dtype

  def __call__(
    self, patches: jax.Array, visible: jax.Array, masked: jax.Array
  ) -> jax.Array:
    """Predicts the masked tokens from the visible ones.

    Args:
      patches: (B, V, P), pixels of the visible tokens.
      visible: int (B, V), their positions.
      masked: int (B, M), the positions to predict.

    Returns:
      float32 (B, M, P).
    """
    return self.predict(patches, visible, masked).value.astype(jnp.float32)

  def predict(
    self, patches: jax.Array, visible: jax.Array, masked: jax.Array
  ) -> Affine:
    """As `__call__`, with the head, a linear layer, not worked out."""
    latent = self.enc_to_dec(self.encoder(patches, visible))
    positions = self.dec_positions[...]
    x = jnp.concatenate(
      [latent + positions[visible], self.mask_token[...] + positions[masked]],
      axis=1,
    )
    # Only masked tokens are predicted: the last block's queries, the norm and
    # the head run on them alone.
    x = self.decoder(x.astype(self.dtype), start=visible.shape[1])
    return Affine.of(self.head, self.dec_norm(x))
