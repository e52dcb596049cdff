"""Variance and covariance of features: a guard against collapse.

Two of VICReg's three terms (Bardes et al. 2022, ICLR) on the mean of a clip's
visible tokens: every feature is to vary over the clips of a batch, and no two
are to vary together. C-JEPA (Mo & Tong 2024, arXiv 2410.19560) joins them to
latent targets, whose prediction is the third term; here `teacher`.

Axes: B clips, D encoder width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from marlin_jax.objectives import collapse
from marlin_jax.objectives.objective import Objective

# Added to variances before their root, as in VICReg.
_EPS = 1e-4


class Variance(Objective):
  """Variance and covariance of pooled features; see the module."""

  name = "variance"
  least_clips = 2

  def loss(self, own, frozen, forward, batch):
    del own, frozen, batch
    pooled = forward.encoded.mean(1)
    variance, covariance = variance_and_covariance(pooled)
    loss = variance + self.settings.covariance_weight * covariance
    metrics = {"hinge": variance, "covariance": covariance}
    return loss, metrics | collapse.spread(pooled)

  @property
  def flops(self) -> float:
    # The covariance matrix is one product, and its gradient two.
    return 3 * 2 * self.run.architecture.width**2

  def describe(self) -> str:
    return f"covariance_weight {self.settings.covariance_weight:g}"


def variance_and_covariance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns VICReg's two terms, float32 scalars.

  Args:
    x: float32 (B, D), B at least 2.

  Returns:
    The mean over features of how far their standard deviation over clips falls
    short of 1; and the sum of the squared covariances of different features,
    over D.
  """
  num_clips, width = x.shape
  x = x - x.mean(0)
  covariance = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
  covariance /= num_clips - 1
  variances = jnp.square(x).sum(0) / (num_clips - 1)
  short = jax.nn.relu(1 - jnp.sqrt(variances + _EPS)).mean()
  off_diagonal = covariance * (1 - jnp.eye(width))
  return short, jnp.square(off_diagonal).sum() / width
