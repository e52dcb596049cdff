"""Means over the parts of a batch, which are processed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Pytree = Any


def split(
  batch: Pytree, num_microbatches: int, num_together: int = 1
) -> Pytree:
  """Splits arrays (B, ...) into microbatches: (M, B / M, ...).

  Args:
    batch: the arrays.
    num_microbatches: M.
    num_together: rows that follow each other and stay together.
  """
  unit = (num_together,) if num_together > 1 else ()

  def split_array(x):
    # Microbatch is the minor axis, so that each device splits its own clips.
    units = x.reshape(-1, num_microbatches, *unit, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(num_microbatches, -1, *x.shape[1:])

  return jax.tree.map(split_array, batch)


def mean_over(microbatches, function: Callable[[Pytree], Pytree]) -> Pytree:
  """Returns the mean of `function` over microbatches stacked on axis 0."""
  num_microbatches = jax.tree.leaves(microbatches)[0].shape[0]
  first = jax.tree.map(lambda x: x[0], microbatches)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)
  )

  def add(total, microbatch):
    return jax.tree.map(jnp.add, total, function(microbatch)), None

  total, _ = jax.lax.scan(add, zeros, microbatches)
  return jax.tree.map(lambda x: x / num_microbatches, total)
