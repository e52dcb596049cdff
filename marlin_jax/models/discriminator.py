"""The token discriminator of the adversarial loss (paper section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.prediction import Prediction


class Discriminator(nnx.Module):
  """MLP that scores single tokens.

  Axes: B clips, M tokens, P pixels per token.
  """

  def __init__(
    self,
    *,
    pixels: int,
    hidden: int,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
  ):
    self.hidden = vit.dense(pixels, hidden, rngs, dtype)
    self.out = vit.dense(hidden, 1, rngs, dtype)

  def __call__(self, tokens: jax.Array | Prediction) -> jax.Array:
    """Scores tokens.

    Args:
      tokens: pixels (B, M, P), or the autoencoder's prediction of them, whose
        pixels are not computed.

    Returns:
      (B, M, 1) in the network's dtype.
    """
    if isinstance(tokens, Prediction):
      hidden = tokens.through(self.hidden)
    else:
      hidden = self.hidden(tokens)
    return self.out(jax.nn.leaky_relu(hidden, 0.01))
