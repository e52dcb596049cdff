"""Losses of the paper: arrays to float32 scalars.

Axes: B batch, M masked tokens, P pixels per token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def reconstruction_loss(
  pred: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Returns the mean squared error over masked tokens (paper eq. 5).

  Args:
    pred: (B, M, P).
    target: float32 (B, M, P).
    weights: float32, broadcasts to (B, M, P); None: all are 1.
  """
  return jnp.mean(squared_errors(pred, target, weights))


def squared_errors(
  pred: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Returns the terms of `reconstruction_loss`, float32 (B, M, P)."""
  errors = jnp.square(pred.astype(jnp.float32) - target)
  return errors if weights is None else weights * errors


def flat_patch_losses(
  tokens: jax.Array, masked: jax.Array
) -> dict[str, jax.Array]:
  """Returns reconstruction losses of flat patches, baselines for a network.

  Args:
    tokens: float (B, N, P), whole clips, P ordered c pt ph pw.
    masked: int (B, M), the tokens over which the mean is taken.

  Returns:
    `batch_colour`: loss if every patch has its mean colour over the batch,
    which uses nothing of the clip itself; `own_colour`: loss if every patch has
    its own mean colour, a perfect mosaic.
  """
  colours = tokens.reshape(*tokens.shape[:2], 3, -1)
  own = colours.mean(-1, keepdims=True)
  losses = {}
  for name, flat in (
    ("batch_colour", own.mean(0, keepdims=True)),
    ("own_colour", own),
  ):
    per_token = jnp.square(colours - flat).mean((-2, -1))  # (B, N)
    losses[name] = jnp.take_along_axis(per_token, masked, axis=1).mean()
  return losses


def generator_adversarial_loss(d_fake: jax.Array) -> jax.Array:
  """Returns -mean D(pred), the adversarial term (paper eq. 7)."""
  return -jnp.mean(d_fake.astype(jnp.float32))


def discriminator_loss(d_real: jax.Array, d_fake: jax.Array) -> jax.Array:
  """Returns mean D(pred) - mean D(target) (paper eq. 6)."""
  d_real, d_fake = d_real.astype(jnp.float32), d_fake.astype(jnp.float32)
  return jnp.mean(d_fake) - jnp.mean(d_real)


def gradient_penalty(
  discriminator: Callable[[jax.Array], jax.Array],
  pred: jax.Array,
  target: jax.Array,
  keys: jax.Array,
) -> jax.Array:
  """Returns the two-sided gradient penalty (Gulrajani et al. 2017, eq. 3).

  The discriminator scores single tokens, so each token is a sample with its own
  interpolation between prediction and target.

  Args:
    discriminator: (B, M, P) -> (B, M, 1).
    pred: (B, M, P).
    target: (B, M, P).
    keys: B jax keys.
  """
  draw = jax.vmap(lambda key: jax.random.uniform(key, (pred.shape[1], 1)))
  mix = draw(keys)
  points = mix * target + (1 - mix) * pred.astype(jnp.float32)
  slopes = jax.grad(lambda x: discriminator(x).astype(jnp.float32).sum())(
    points
  )
  # The gradient of the square root is infinite at 0.
  norm = jnp.sqrt(jnp.sum(jnp.square(slopes), axis=-1) + 1e-12)
  return jnp.mean(jnp.square(norm - 1))
