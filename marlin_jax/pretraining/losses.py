"""Losses of the paper: arrays to float32 scalars.

Axes: B batch, M masked tokens, P pixels per token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


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


def flat_patches(tokens: jax.Array, masked: jax.Array) -> dict[str, jax.Array]:
  """Returns the losses of flat patches, baselines for a network.

  Args:
    tokens: float (B, N, P), whole clips, P ordered c pt ph pw.
    masked: int (B, M), the tokens over which the mean is taken.

  Returns:
    `loss_own_colour`: loss if every patch has its own mean colour, a perfect
    mosaic; `colour_sums`: float32 (N, 8), sums over the clips, which
    `batch_colour_loss` takes.
  """
  num_clips, num_tokens, _ = tokens.shape
  colours = tokens.reshape(num_clips, num_tokens, 3, -1)
  own = colours.mean(-1)  # (B, N, 3)
  errors = jnp.square(colours - own[..., None]).mean((-2, -1))  # (B, N)
  is_masked = jax.vmap(lambda index: jnp.zeros(num_tokens).at[index].set(1.0))
  weights = is_masked(masked)[..., None]  # (B, N, 1)
  squares = jnp.square(own).mean(-1, keepdims=True)
  columns = (own, weights * own, weights * squares, weights)
  return {
    "loss_own_colour": jnp.take_along_axis(errors, masked, axis=1).mean(),
    "colour_sums": jnp.concatenate(columns, axis=-1).sum(0),
  }


def batch_colour_loss(
  own_colour: float, colour_sums: np.ndarray, num_clips: int
) -> float:
  """Returns the loss if every patch has its mean colour over a batch.

  This uses nothing of the clip itself.

  Args:
    own_colour: mean of `loss_own_colour` over the parts of the batch.
    colour_sums: (N, 8), sum over the parts; see `flat_patches`.
    num_clips: clips of the batch.
  """
  sums = np.asarray(colour_sums, np.float64)
  colours, masked, squares, num_masked = np.split(sums, (3, 6, 7), axis=1)
  colours = colours / num_clips
  # Squared differences between the patches' own colours and those.
  between = (
    squares.sum()
    - 2 * (colours * masked).mean(1).sum()
    + (num_masked * np.square(colours)).mean(1).sum()
  )
  return own_colour + float(between / num_masked.sum())


def clip_share(clip_means: np.ndarray, mean_square: float) -> float:
  """Returns the share of the variance of features that tells clips apart.

  The rest is between tokens of a clip. Near 1 the features name the clip, all
  tokens alike, and say nothing about its parts: what memorising a few videos
  leads to.

  Args:
    clip_means: (B, D), mean features of the tokens of each clip.
    mean_square: mean of the squares of all features.
  """
  means = np.asarray(clip_means, np.float64)
  total = mean_square - np.square(means.mean(axis=0)).mean()
  return float(means.var(axis=0).mean() / total) if total > 0 else 0.0


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
