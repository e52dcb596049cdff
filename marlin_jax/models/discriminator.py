"""The token discriminator of the adversarial loss (paper section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit


class Discriminator(nnx.Module):
  """An MLP that judges single tokens; (B, M, P) -> (B, M, 1)."""

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

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return self.out(jax.nn.leaky_relu(self.hidden(tokens), 0.01))
