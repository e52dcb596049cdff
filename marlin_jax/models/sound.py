"""Masked autoencoder of a clip's sound, which also sees the clip's video.

Axes: B clips, N tokens of a clip's sound, V visible, M masked, D width, P
values per token, W visible tokens of the video, E width of the video's encoder.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.mae import Encoder


class SoundAutoencoder(nnx.Module):
  """Encoder of visible sound tokens, and a decoder of both modalities' tokens.

  Masked sound is predicted from the visible sound and the visible video
  together. The encoders stay apart, so that each modality has features of its
  own.
  """

  def __init__(
    self,
    *,
    num_tokens: int,
    values: int,
    encoder: vit.Size,
    decoder: vit.Size,
    video_width: int,
    execution: vit.Execution,
    rngs: nnx.Rngs,
  ):
    """Draws the parameters.

    Args:
      num_tokens: N.
      values: P.
      encoder: size of the sound's encoder.
      decoder: size of the decoder.
      video_width: E.
      execution: dtype, attention, scan and remat.
      rngs: draws the parameters.
    """
    dtype = self.dtype = execution.dtype
    self.encoder = Encoder(
      num_tokens=num_tokens,
      pixels=values,
      size=encoder,
      execution=execution,
      rngs=rngs,
    )
    shared = encoder.width
    self.sound = _Projections(encoder.width, decoder.width, shared, rngs, dtype)
    self.video = _Projections(video_width, decoder.width, shared, rngs, dtype)
    self.mask_token = vit.learned_token(decoder.width, rngs)
    self.dec_positions = vit.position_table(num_tokens, decoder.width)
    self.decoder = vit.Transformer(decoder, execution, vit.NORM_EPS, rngs)
    self.dec_norm = vit.layer_norm(decoder.width, rngs)
    self.head = vit.dense(decoder.width, values, rngs, dtype)

  def decode(
    self,
    sound: jax.Array,
    visible: jax.Array,
    masked: jax.Array,
    video: jax.Array,
  ) -> jax.Array:
    """Predicts the masked sound tokens.

    Args:
      sound: (B, V, D), from `encoder`.
      visible: int (B, V), token numbers of the visible sound.
      masked: int (B, M), token numbers of the sound to predict.
      video: (B, W, E), encoded visible tokens of the video, whose places the
        encoder has added.

    Returns:
      float32 (B, M, P).
    """
    positions = self.dec_positions[...]
    context = jnp.concatenate(
      [
        self.video.enc_to_dec(video),
        self.sound.enc_to_dec(sound) + positions[visible],
      ],
      axis=1,
    )
    hidden = self.mask_token[...] + positions[masked]
    x = jnp.concatenate([context, hidden], axis=1).astype(self.dtype)
    x = self.decoder(x, start=context.shape[1])
    return self.head(self.dec_norm(x)).astype(jnp.float32)


class _Projections(nnx.Module):
  """Projections of a modality's tokens.

  Attributes:
    enc_to_dec: to the decoder's width. Its bias tells the decoder which
      modality a token is of.
    head: to the space in which both modalities are compared.
  """

  def __init__(self, width, dec_width, shared_width, rngs, dtype):
    self.enc_to_dec = vit.dense(width, dec_width, rngs, dtype)
    self.head = vit.dense(width, shared_width, rngs, dtype, use_bias=False)

  def pooled(self, tokens: jax.Array) -> jax.Array:
    """Returns unit vectors to compare: (B, V, D) -> float32 (B, F)."""
    x = self.head(tokens.mean(axis=1)).astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
    return x / norm
