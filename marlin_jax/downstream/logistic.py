"""The linear probe as an optimum: regularised logistic regression.

Convex, so what comes out depends on the data alone: on no rate, batch, order or
number of devices (as CLIP's probe, Radford et al., ICML 2021, section 3.2).

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
class Probe:
  """A linear layer on standardised features.

  Attributes:
    mean, scale: float64 (D,), of the training features.
    kernel, bias: float64 (D, K), (K,).
    penalty: that it was fitted with.
  """

  mean: np.ndarray
  scale: np.ndarray
  kernel: np.ndarray
  bias: np.ndarray
  penalty: float

  def logits(self, features: np.ndarray) -> np.ndarray:
    """(V, D) -> float64 (V, K)."""
    x = (features.astype(np.float64) - self.mean) / self.scale
    return x @ self.kernel + self.bias


def fit(
  task: Task,
  features: np.ndarray,
  targets: np.ndarray,
  penalties: Sequence[float],
  score: Callable[[Probe], float],
  max_iterations: int,
) -> Probe:
  """The best of the optima of several penalties.

  The loss is the mean cross-entropy plus penalty / 2 times the sum of squares
  of the kernel, features having mean 0 and deviation 1.

  Args:
    task: what the targets mean.
    features: (V, D) of the training videos.
    targets: from Task.targets.
    penalties: to be tried.
    score: the higher, the better; on the validation split.
    max_iterations: of L-BFGS for each penalty.
  """
  # Imported here: it takes half a second, and every training imports this file.
  from scipy import optimize

  mean = features.mean(axis=0, dtype=np.float64)
  scale = features.std(axis=0, dtype=np.float64)
  # A feature that never changes tells nothing, and must not be blown up.
  scale = np.where(scale > 1e-6 * (1 + np.abs(mean)), scale, 1.0)
  x = jnp.asarray((features - mean) / scale, jnp.float32)
  wanted, known = map(jnp.asarray, task.encode(targets))
  shape = (features.shape[1] + 1, task.num_outputs)

  def objective(flat, penalty):
    value, grad = _value_and_grad(
      task, flat.astype(np.float32), x, wanted, known, penalty
    )
    return float(value), np.asarray(grad, np.float64)

  best, best_score = None, -np.inf
  flat = np.zeros(shape).ravel()
  # From the strongest on: each optimum is near the one before.
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
    probe = Probe(mean, scale, layer[:-1], layer[-1], penalty)
    found = score(probe)
    if best is None or found > best_score:
      best, best_score = probe, found
  return best


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def _value_and_grad(task, flat, x, wanted, known, penalty):
  layer = flat.reshape(x.shape[1] + 1, -1)
  logits = x @ layer[:-1] + layer[-1]
  squares = jnp.square(layer[:-1]).sum()
  return loss_of(task, logits, wanted, known) + penalty / 2 * squares
