"""Detection of steps whose loss or gradient is far above that of recent steps.

A step is a spike if its reconstruction loss, or the norm of the autoencoder's
gradient, is more than a number of standard deviations above the mean of the
last steps. Spikes count as recent steps too: if values stay high, they soon are
the normal ones, and training goes on (as in OLMo-core's SkipStepAdamW).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Metrics of a step that are compared.
METRICS = ("loss_rec", "grad_norm")
# Steps in the mean.
WINDOW = 128
# Steps before the first that can be a spike.
LEAST = WINDOW // 2

Recent = dict[str, jax.Array]


def no_steps() -> Recent:
  """Returns the state before the first step.

  Returns:
    `values`: float32 (WINDOW, len(METRICS)), a ring; `num`: int32, steps so
    far.
  """
  return {
    "values": jnp.zeros((WINDOW, len(METRICS)), jnp.float32),
    "num": jnp.zeros((), jnp.int32),
  }


def follow(
  recent: Recent,
  metrics: dict[str, jax.Array],
  is_finite: jax.Array,
  sigmas: float,
) -> tuple[Recent, dict[str, jax.Array]]:
  """Adds a step.

  Args:
    recent: the steps before.
    metrics: metrics of the step.
    is_finite: bool; if not, the step is not added.
    sigmas: standard deviations from the mean to the limit.

  Returns:
    The steps with this one, and the limit of each of METRICS, from the steps
    before; infinite after fewer than LEAST.
  """
  values, num = recent["values"], recent["num"]
  is_used = (jnp.arange(WINDOW) < num)[:, None]
  mean, deviation = (
    moment(values, axis=0, where=is_used) for moment in (jnp.mean, jnp.std)
  )
  limits = jnp.where(num < LEAST, jnp.inf, mean + sigmas * deviation)
  step = jnp.stack([metrics[name] for name in METRICS])
  added = values.at[num % WINDOW].set(step)
  return {
    "values": jnp.where(is_finite, added, values),
    "num": num + is_finite,
  }, dict(zip(METRICS, limits, strict=True))
