"""Linear probe: regularised logistic regression; for numbers, ridge regression.

The problem is convex and is solved in float64 on the host, so that the optimum
depends on the data alone: not on a learning rate, the order of the videos, the
devices or their matmul precision (like CLIP's probe, Radford et al., ICML 2021,
section 3.2). Each label has a problem and a penalty of its own; its probe is
the same alone and beside other labels.

Axes: V videos, D features, K labels, classes or numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from marlin_jax.downstream.tasks import Task

# Penalties are not searched beyond these.
_LEAST_PENALTY, _LARGEST_PENALTY = 1e-12, 1e3
# Largest absolute gradient at the optimum, in preconditioned coordinates.
_TOLERANCE = 1e-6
# Of penalties whose scores differ by less, the largest is taken.
_SCORE_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Linear layer on standardised features.

  Attributes:
    mean, scale: float64 (D,), mean and standard deviation of the training
      features.
    kernel, bias: float64 (D, K), (K,).
    penalty: float64 (K,), L2 penalty of each label; of classes, K times the
      same.
    at_edge: bool (K,), the penalty is the last one that was tried, and was
      chosen by scores.
    converged: the solver reached the optimum of each penalty that was chosen.
  """

  mean: np.ndarray
  scale: np.ndarray
  kernel: np.ndarray
  bias: np.ndarray
  penalty: np.ndarray
  at_edge: np.ndarray
  converged: bool = True

  def logits(self, features: np.ndarray) -> np.ndarray:
    """Maps features (V, D) to float64 logits or numbers (V, K)."""
    x = (features.astype(np.float64) - self.mean) / self.scale
    return x @ self.kernel + self.bias


def fit(
  task: Task,
  features: np.ndarray,
  targets: np.ndarray,
  penalties: Sequence[float],
  score: Callable[[LinearProbe], np.ndarray],
  max_iterations: int,
) -> LinearProbe:
  """Fits a probe for each penalty and returns the best one of each label.

  The loss of a label is its mean cross-entropy over the videos where it is
  known, plus penalty / 2 times the sum of squares of its column of the kernel,
  on features of mean 0 and standard deviation 1: scikit-learn's
  LogisticRegression with C = 1 / (penalty * number of known videos). That of a
  number is half its mean squared error: scikit-learn's Ridge with alpha =
  penalty * number of known videos.

  While the best penalty of a label is the first or the last one tried, the grid
  continues with its last ratio, down to 1e-12 and up to 1e3. A single penalty,
  and a grid with the penalty 0, are taken as they are.

  Args:
    task: defines the targets. Classes share one softmax and one penalty.
    features: (V, D), features of the training videos.
    targets: see `Task.targets`.
    penalties: L2 penalties to try.
    score: returns the scores of a probe on the validation split, the higher
      the better: float (K,), or (1,) for classes. A label whose scores are NaN
      takes the largest penalty.
    max_iterations: maximum number of iterations of L-BFGS per penalty.
  """
  if task.is_value:
    problem = _Ridge(task, features, targets)
  else:
    problem = _Logistic(task, features, targets, max_iterations)
  grid = sorted(set(map(float, penalties)), reverse=True)
  probes, scores = [], []
  # From the largest penalty on: each optimum is near the previous one.
  for penalty in grid:
    probes.append(problem.solve(penalty, probes[-1] if probes else None))
    scores.append(score(probes[-1]))
  while len(grid) > 1 and grid[-1] > 0:
    best = _best(scores)[np.isfinite(scores[0])]
    ratio = grid[-1] / grid[-2]
    if len(grid) - 1 in best and grid[-1] * ratio >= _LEAST_PENALTY:
      place, penalty, start = len(grid), grid[-1] * ratio, probes[-1]
    elif 0 in best and grid[0] / ratio <= _LARGEST_PENALTY:
      place, penalty, start = 0, grid[0] / ratio, probes[0]
    else:
      break
    grid.insert(place, penalty)
    probes.insert(place, problem.solve(penalty, start))
    scores.insert(place, score(probes[place]))
  best = np.broadcast_to(_best(scores), task.num_outputs)
  chosen = [probes[i] for i in best]
  return LinearProbe(
    problem.mean,
    problem.scale,
    np.stack([probe.kernel[:, k] for k, probe in enumerate(chosen)], axis=1),
    np.array([probe.bias[k] for k, probe in enumerate(chosen)]),
    np.array([grid[i] for i in best]),
    (len(grid) > 1)
    & np.isin(best, (0, len(grid) - 1))
    & np.isfinite(scores[0]),
    all(probe.converged for probe in chosen),
  )


def _best(scores: list[np.ndarray]) -> np.ndarray:
  """Returns the number of each label's best probe; 0 if it has no score."""
  scores = np.nan_to_num(scores, nan=-np.inf)
  return np.argmax(scores >= scores.max(axis=0) - _SCORE_TOLERANCE, axis=0)


def _components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the variances of principal components, and their directions.

  Without those of variance 0: the optimum has nothing in them.

  Args:
    x: (V, D), features of mean 0.

  Returns:
    (R,) and (D, R).
  """
  num, width = x.shape
  is_wide = width > num
  gram = x @ x.T if is_wide else x.T @ x
  variances, directions = np.linalg.eigh(gram / num)
  kept = variances > 1e-12 * max(variances[-1], 1e-10)
  variances, directions = variances[kept], directions[:, kept]
  if is_wide:
    directions = x.T @ directions / np.sqrt(num * variances)
  return variances, directions


class _Problem:
  """Training data, prepared for any penalty."""

  def __init__(self, task, features, targets):
    self._task = task
    self.mean = features.mean(axis=0, dtype=np.float64)
    scale = features.std(axis=0, dtype=np.float64)
    # A constant feature carries no information and must not be scaled up.
    is_constant = scale <= 1e-6 * (1 + np.abs(self.mean))
    self.scale = np.where(is_constant, 1.0, scale)
    labels, known = task.encode(targets)
    self._labels = labels.astype(np.float64)
    self._known = known.astype(bool)

  def _standardised(self, features: np.ndarray) -> np.ndarray:
    return (features - self.mean) / self.scale

  def _probe(self, kernel, bias, penalty, *, converged=True) -> LinearProbe:
    num = self._task.num_outputs
    return LinearProbe(
      self.mean,
      self.scale,
      kernel,
      bias,
      np.full(num, penalty),
      np.zeros(num, bool),
      converged,
    )


class _Ridge(_Problem):
  """Numbers, by the closed form."""

  def __init__(self, task, features, targets):
    super().__init__(task, features, targets)
    x = self._standardised(features)
    eigen: dict[bytes, tuple] = {}
    # Of each number: variances, rotation, covariances, means of x and of y.
    self._solved = []
    for k in range(task.num_outputs):
      known = self._known[:, k]
      if known.tobytes() not in eigen:
        # An unknown number leaves other videos, with means of their own.
        rows = x[known] if known.any() else x[:1]
        centre = rows.mean(axis=0)
        rows = rows - centre
        variances, rotation = _components(rows)
        eigen[known.tobytes()] = variances, rotation, rows, centre
      variances, rotation, rows, centre = eigen[known.tobytes()]
      y = self._labels[known, k] if known.any() else np.zeros(1)
      covariances = rotation.T @ (rows.T @ (y - y.mean()) / len(y))
      self._solved.append((variances, rotation, covariances, centre, y.mean()))

  def solve(self, penalty: float, start: LinearProbe | None) -> LinearProbe:
    """Returns the optimum for a penalty; `start` is not needed."""
    del start
    kernels, biases = [], []
    for variances, rotation, covariances, centre, mean in self._solved:
      kernels.append(rotation @ (covariances / (variances + penalty)))
      biases.append(mean - centre @ kernels[-1])
    return self._probe(np.stack(kernels, axis=1), np.array(biases), penalty)


class _Logistic(_Problem):
  """Labels or classes, by L-BFGS."""

  def __init__(self, task, features, targets, max_iterations):
    super().__init__(task, features, targets)
    self._max_iterations = max_iterations
    self._weights = self._known / np.maximum(self._known.sum(axis=0), 1)
    x = self._standardised(features)
    # Rotated to uncorrelated features, whose curvatures are known: the solver
    # takes tens of iterations in place of thousands. The penalty is the same.
    variances, self._rotation = _components(x)
    self._x = x @ self._rotation
    frequency = (self._labels * self._weights).sum(axis=0)
    frequency = np.clip(frequency, 1 / (len(x) + 2), 1 - 1 / (len(x) + 2))
    self._bias = np.log(frequency) - (
      0 if task.is_class else np.log1p(-frequency)
    )
    self._spread = frequency * (1 - frequency)
    self._curvature = variances[:, None] * self._spread

  def solve(self, penalty: float, start: LinearProbe | None) -> LinearProbe:
    """Returns the optimum for a penalty, beginning at another one's."""
    # Imported here: it takes half a second, and every training imports this
    # module.
    from scipy import optimize

    step = np.concatenate(
      [
        1 / np.sqrt(self._curvature + penalty),
        1 / np.sqrt(self._spread)[None],
      ]
    )
    if start is None:
      layer = np.zeros_like(step)
      layer[-1] = self._bias
    else:
      layer = np.vstack([self._rotation.T @ start.kernel, start.bias])

    def objective(flat):
      layer = flat.reshape(step.shape) * step
      loss, gradient = self._loss(layer)
      loss += penalty / 2 * np.square(layer[:-1]).sum()
      gradient[:-1] += penalty * layer[:-1]
      return loss, (gradient * step).ravel()

    result = optimize.minimize(
      objective,
      (layer / step).ravel(),
      jac=True,
      method="L-BFGS-B",
      options={
        "maxiter": self._max_iterations,
        "maxfun": 2 * self._max_iterations,
        "gtol": _TOLERANCE,
        "ftol": 1e-15,
      },
    )
    layer = result.x.reshape(step.shape) * step
    if self._task.is_class:
      # What all logits share changes no probability; the optimum has none.
      layer -= layer.mean(axis=1, keepdims=True)
    return self._probe(
      self._rotation @ layer[:-1],
      layer[-1],
      penalty,
      # Status 1: out of iterations; 2: no better point within rounding.
      converged=result.status != 1,
    )

  def _loss(self, layer: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the sum of the labels' mean losses, and its gradient."""
    logits = self._x @ layer[:-1] + layer[-1]
    if self._task.is_class:
      top = logits.max(axis=1, keepdims=True)
      exponentials = np.exp(logits - top)
      total = exponentials.sum(axis=1, keepdims=True)
      losses = self._labels * (top + np.log(total) - logits)
      errors = exponentials / total - self._labels
    else:
      losses = np.logaddexp(0, logits) - self._labels * logits
      errors = self._task.predicted(logits) - self._labels
    errors *= self._weights
    gradient = np.vstack([self._x.T @ errors, errors.sum(axis=0)])
    return float((losses * self._weights).sum()), gradient
