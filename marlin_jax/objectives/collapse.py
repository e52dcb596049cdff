"""Signs of collapse: features that no longer tell inputs apart.

A loss between two networks' features can be lowered by features that are the
same for all inputs, or that vary along few directions.

Axes: R rows, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def spread(features: jax.Array) -> dict[str, jax.Array]:
  """Returns how widely features are spread; gradients are stopped.

  Args:
    features: float (..., D); every vector is a row.

  Returns:
    `features_std`: mean over the features of their standard deviation over
      rows, 0 if all rows are the same (Bardes et al. 2022, VICReg).
    `features_rank`: effective number of directions, from 1 to min(R - 1, D):
      the squared sum of the covariance's eigenvalues over the sum of their
      squares (the participation ratio, Gao et al. 2017). It needs no
      eigenvalues: both sums are traces. 0 if all rows are the same.
  """
  rows = jax.lax.stop_gradient(features).astype(jnp.float32)
  rows = rows.reshape(-1, rows.shape[-1])
  rows -= rows.mean(0)
  # The products over rows and over features have the same traces.
  num_rows, width = rows.shape
  product = rows @ rows.T if num_rows < width else rows.T @ rows
  squares = jnp.square(product).sum()
  rank = jnp.square(jnp.trace(product)) / jnp.maximum(squares, 1e-30)
  return {"features_std": rows.std(0).mean(), "features_rank": rank}
