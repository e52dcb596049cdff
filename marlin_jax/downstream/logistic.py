"""Linear probe by regularised logistic regression.

The problem is convex: the optimum depends on the data alone, not on a learning
rate, batches, their order or the number of devices (like CLIP's probe, Radford
et al., ICML 2021, section 3.2).

Axes: V videos, D features, K labels or classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.downstream.learner import loss_of
from marlin_jax.downstream.tasks import Task

_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Linear layer on standardised features.

  Attributes:
    mean, scale: float64 (D,), mean and standard deviation of the training
      features.
    kernel, bias: float64 (D, K), (K,).
    penalty: L2 penalty of the fit.
  """

  mean: np.ndarray
  scale: np.ndarray
  kernel: np.ndarray
  bias: np.ndarray
  penalty: float

  def logits(self, features: np.ndarray) -> np.ndarray:
    """Maps features (V, D) to float64 (V, K)."""
    x = (features.astype(np.float64) - self.mean) / self.scale
    return x @ self.kernel + self.bias


def fit(
  task: Task,
  features: np.ndarray,
  targets: np.ndarray,
  penalties: Sequence[float],
  score: Callable[[LinearProbe], float],
  max_iterations: int,
) -> LinearProbe:
  """Fits a probe for each penalty and returns the best one.

  The loss is the mean cross-entropy plus penalty / 2 times the sum of squares
  of the kernel, on features of mean 0 and standard deviation 1.

  Args:
    task: defines the targets.
    features: (V, D), features of the training videos.
    targets: (V, K), or (V,) for classes; see `Task.targets`.
    penalties: L2 penalties to try.
    score: returns the score of a probe on the validation split; the highest
      wins.
    max_iterations: maximum number of iterations of L-BFGS per penalty.
  """
  # Imported here: it takes half a second, and every training imports this
  # module.
  from scipy import optimize

  mean = features.mean(axis=0, dtype=np.float64)
  scale = features.std(axis=0, dtype=np.float64)
  # A constant feature carries no information and must not be scaled up.
  scale = np.where(scale > 1e-6 * (1 + np.abs(mean)), scale, 1.0)
  x = jnp.asarray((features - mean) / scale, jnp.float32)
  labels, known = map(jnp.asarray, task.encode(targets))
  shape = (features.shape[1] + 1, task.num_outputs)

  def objective(flat, penalty):
    value, grad = _value_and_grad(
      task, flat.astype(np.float32), x, labels, known, penalty
    )
    return float(value), np.asarray(grad, np.float64)

  best, best_score = None, -np.inf
  flat = np.zeros(shape).ravel()
  # From the strongest penalty on: each optimum is near the previous one.
  for penalty in sorted(penalties, reverse=True):
    flat = optimize.minimize(
      objective,
      flat,
      args=(np.float32(penalty),),
      jac=True,
      method="L-BFGS-B",
      options={"maxiter": max_iterations, "gtol": _TOLERANCE},
    ).x
    layer = flat.reshape(shape)
    probe = LinearProbe(mean, scale, layer[:-1], layer[-1], penalty)
    probe_score = score(probe)
    if best is None or probe_score > best_score:
      best, best_score = probe, probe_score
  return best


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def _value_and_grad(task, flat, x, labels, known, penalty):
  layer = flat.reshape(x.shape[1] + 1, -1)
  logits = x @ layer[:-1] + layer[-1]
  squares = jnp.square(layer[:-1]).sum()
  return loss_of(task, logits, labels, known) + penalty / 2 * squares
