"""Losses: arrays in, scalars out, in float32.

Axes: B batch, M masked tokens, P pixels per token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def reconstruction_loss(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Mean squared error over masked tokens, (B, M, P) each (paper eq. 5)."""
  return jnp.mean(jnp.square(pred.astype(jnp.float32) - target))


def mean_colour_loss(target: jax.Array) -> jax.Array:
  """The loss of predicting every token's own mean colour: the bar to clear.

  A model below it knows more than a mosaic of flat patches.

  Args:
    target: (B, M, P), P ordered c pt ph pw.
  """
  colours = target.reshape(*target.shape[:2], 3, -1)
  return jnp.mean(jnp.var(colours, axis=-1))


def generator_adversarial_loss(d_fake: jax.Array) -> jax.Array:
  """-mean D(pred): the autoencoder's part of the Wasserstein game (eq. 7)."""
  return -jnp.mean(d_fake.astype(jnp.float32))


def discriminator_loss(d_real: jax.Array, d_fake: jax.Array) -> jax.Array:
  """mean D(pred) - mean D(target) (paper eq. 6)."""
  d_real, d_fake = d_real.astype(jnp.float32), d_fake.astype(jnp.float32)
  return jnp.mean(d_fake) - jnp.mean(d_real)


def gradient_penalty(
  discriminator: Callable[[jax.Array], jax.Array],
  pred: jax.Array,
  target: jax.Array,
  keys: jax.Array,
) -> jax.Array:
  """Two-sided gradient penalty (Gulrajani et al. 2017, eq. 3).

  The discriminator judges single tokens, so a token is a sample: each has its
  own interpolation between prediction and target.

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
  # The root's gradient is infinite at 0.
  norm = jnp.sqrt(jnp.sum(jnp.square(slopes), axis=-1) + 1e-12)
  return jnp.mean(jnp.square(norm - 1))
