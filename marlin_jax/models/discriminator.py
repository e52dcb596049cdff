"""The token discriminator of the adversarial loss (paper section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.affine import Affine


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
    return self._verdict(self.hidden(tokens))

  def judge(self, pred: Affine) -> jax.Array:
    """As `__call__`, of predictions that need not be worked out for it."""
    return self._verdict(pred.then(self.hidden).value)

  def _verdict(self, hidden):
    return self.out(jax.nn.leaky_relu(hidden, 0.01))
