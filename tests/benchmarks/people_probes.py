"""Probes on frozen features, and their scores over people.

Axes: W windows, N tokens, D features, K labels, V test windows, R draws.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy import linalg

from marlin_jax.models import heads
from marlin_jax.scores import ranking
from tests.benchmarks.people_windows import FIT, UNSEEN

# Times the mean of the kernel's diagonal.
PENALTIES = tuple(10.0 ** np.arange(-1, 4.1, 0.5))
NUM_FOLDS = 5
_STEPS, _STEPS_PER_CHECK, _BATCH = 400, 25, 64


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Predictions of a probe.

  Attributes:
    predictions: float64 (V, K).
    r2: float64 (K,), on training people that the fit left out; chooses the
      penalty, and between probes.
  """

  predictions: np.ndarray
  r2: np.ndarray


def folds(people: np.ndarray, num: int = NUM_FOLDS) -> np.ndarray:
  """Returns the fold of each window, int (W,); a person's are in one."""
  names, numbers = np.unique(people, return_inverse=True)
  order = np.random.default_rng(0).permutation(len(names))
  return order[numbers] % num


def ridge(
  x: np.ndarray,
  y: np.ndarray,
  people: np.ndarray,
  test_x: np.ndarray,
  *,
  is_odd: bool = False,
) -> Fitted:
  """Fits ridge regressions on standardised features.

  Each label has the penalty with the least squared error on training people
  who were left out. Answers are limited to the range of the training labels.

  Args:
    x: (W, D).
    y: (W, K).
    people: names (W,).
    test_x: (V, D).
    is_odd: fit an odd function, with neither mean nor intercept: for
      differences of features.
  """
  kernel, test_kernel = _kernels(x, test_x, is_odd)
  fold = folds(people)
  errors = np.zeros((len(PENALTIES), y.shape[1]))
  total = 0.0
  for i in range(NUM_FOLDS):
    fit, held = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
    if not (len(fit) and len(held)):
      continue
    predicted = _solve(
      kernel[np.ix_(fit, fit)],
      y[fit],
      kernel[np.ix_(held, fit)],
      PENALTIES,
      is_odd,
    )
    errors += np.square(predicted - y[held]).sum(axis=1)
    total += np.square(y[held] - (0 if is_odd else y.mean(axis=0))).sum(axis=0)
  best = errors.argmin(axis=0)
  predicted = np.stack(
    [
      _solve(kernel, y[:, [k]], test_kernel, (PENALTIES[i],), is_odd)[0, :, 0]
      for k, i in enumerate(best)
    ],
    axis=1,
  )
  if not is_odd:
    predicted = predicted.clip(y.min(axis=0), y.max(axis=0))
  return Fitted(predicted, 1 - errors.min(axis=0) / total)


def _kernels(x, test_x, is_odd) -> tuple[np.ndarray, np.ndarray]:
  """Returns inner products of standardised features, (W, W) and (V, W)."""
  mean = 0 if is_odd else x.mean(axis=0)
  scale = np.sqrt(np.square(x - mean).mean(axis=0))
  # A constant feature carries no information and must not be scaled up.
  scale = np.where(scale > 1e-6 * (1 + np.abs(mean)), scale, np.inf)
  x, test_x = (((a - mean) / scale).astype(np.float32) for a in (x, test_x))
  kernel = (x @ x.T).astype(np.float64)
  size = kernel.diagonal().mean()
  return kernel / size, (test_x @ x.T).astype(np.float64) / size


def _solve(kernel, y, test_kernel, penalties, is_odd) -> np.ndarray:
  """Returns predictions for each penalty, (penalties, V, K)."""
  mean = 0 if is_odd else y.mean(axis=0)
  predicted = []
  for penalty in penalties:
    ridged = kernel + penalty * np.eye(len(kernel))
    dual = linalg.solve(ridged, y - mean, assume_a="pos")
    predicted.append(mean + test_kernel @ dual)
  return np.stack(predicted)


def attentive(
  x: np.ndarray,
  y: np.ndarray,
  people: np.ndarray,
  test_x: np.ndarray,
  *,
  num_heads: int,
) -> Fitted:
  """Trains one attentive head for all labels.

  Two fifths of the training people are left out. Each label has the step with
  the least squared error on the one half, and its `r2` on the other.

  Args:
    x: float (W, N, D), tokens.
    y: (W, K).
    people: names (W,).
    test_x: (V, N, D).
    num_heads: number of attention heads.
  """
  # float16 sums overflow.
  x, test_x = x.astype(np.float32), test_x.astype(np.float32)
  mean, scale = x.mean(axis=(0, 1)), x.std(axis=(0, 1)) + 1e-6
  x, test_x = ((a - mean) / scale for a in (x, test_x))
  fold = folds(people)
  fit = np.flatnonzero(fold > 1)
  held, unused = (np.flatnonzero(fold == i) for i in (0, 1))
  centre, spread = y[fit].mean(axis=0), y[fit].std(axis=0) + 1e-12
  targets = ((y - centre) / spread).astype(np.float32)
  head = heads.AttentiveHead(
    x.shape[-1], y.shape[1], nnx.Rngs(0), num_heads=num_heads
  )
  graphdef, params = nnx.split(head)
  optimizer = optax.adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1e-3, _STEPS // 20, _STEPS),
    weight_decay=0.05,
  )

  @jax.jit
  def step(params, state, x, y):
    def loss(params):
      return jnp.square(nnx.merge(graphdef, params)(x) - y).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))

  def predict(params, x):
    parts = np.array_split(x, max(len(x) // 256, 1))
    return np.concatenate([np.asarray(apply(params, part)) for part in parts])

  state = optimizer.init(params)
  np_rng = np.random.default_rng(0)
  least = np.full(y.shape[1], np.inf)
  predicted = np.zeros((len(test_x), y.shape[1]))
  r2 = np.full(y.shape[1], -np.inf)
  for i in range(1, _STEPS + 1):
    rows = np_rng.choice(fit, _BATCH)
    params, state = step(params, state, x[rows], targets[rows])
    if i % _STEPS_PER_CHECK == 0:
      errors = np.square(predict(params, x[held]) - targets[held]).mean(axis=0)
      better = errors < least
      if better.any():
        least = np.minimum(errors, least)
        predicted[:, better] = predict(params, test_x)[:, better]
        errors = np.square(predict(params, x[unused]) - targets[unused])
        spread_of = np.square(targets[unused]).mean(axis=0)
        r2[better] = (1 - errors.mean(axis=0) / spread_of)[better]
  return Fitted(predicted * spread + centre, r2)


# --- Scores -------------------------------------------------------------------


def r_squared(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray):
  """Returns 1 - squared error / variance: (V, K), (V, K), (V, R) -> (R, K)."""
  shares = (weights / weights.sum(axis=0)).T
  variance = shares @ np.square(y) - np.square(shares @ y)
  return 1 - shares @ np.square(y - predicted) / variance


def video_pairs(
  video: np.ndarray, person: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns pairs of different videos, and whether the person is the same.

  Args:
    video, person: names of each window.

  Returns:
    Numbers of the videos in the order of their names, int (P, 2); float64 (P,)
    of 0 and 1.
  """
  names, first = np.unique(video, return_index=True)
  pairs = np.stack(np.triu_indices(len(names), 1), axis=1)
  who = person[first]
  return pairs, (who[pairs[:, 0]] == who[pairs[:, 1]]).astype(np.float64)


def similarities(
  x: np.ndarray, test_x: np.ndarray, video: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
  """Returns the cosine between the mean features of videos, (P,).

  Args:
    x: (W, D), whose mean and deviation standardise.
    test_x: (V, D).
    video: name of each test window.
    pairs: see `video_pairs`.
  """
  scale = x.std(axis=0)
  scale = np.where(scale > 1e-6, scale, np.inf)
  test_x = (test_x - x.mean(axis=0)) / scale
  means = np.stack(
    [test_x[video == name].mean(axis=0) for name in np.unique(video)]
  )
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  return (means @ means.T)[tuple(pairs.T)]


def pair_auc(same, similarity, first, second, weights) -> np.ndarray:
  """Returns the AUC over pairs: a pair weighs the product of its people."""
  return ranking.roc_auc(same, similarity, weights[first] * weights[second])


def order_pairs(windows, rows: np.ndarray) -> np.ndarray:
  """Returns successive windows of each track, int (P, 2), the earlier first.

  Args:
    windows: people_windows.Windows.
    rows: numbers of the windows to pair.
  """
  order = rows[np.lexsort((windows.start[rows], windows.video[rows]))]
  same = windows.video[order[:-1]] == windows.video[order[1:]]
  return np.stack([order[:-1][same], order[1:][same]], axis=1)


def changes(values: np.ndarray, people: np.ndarray) -> np.ndarray:
  """Returns values less the mean of their person's, (W, D)."""
  _, numbers, counts = np.unique(
    people, return_inverse=True, return_counts=True
  )
  sums = np.zeros((len(counts), values.shape[1]))
  np.add.at(sums, numbers, values)
  return (values - (sums / counts[:, None])[numbers]).astype(values.dtype)


# --- Answers ------------------------------------------------------------------


def answers(
  windows,
  features: dict[str, np.ndarray],
  tokens: np.ndarray | None = None,
  num_heads: int = 0,
) -> dict[str, np.ndarray]:
  """Fits all probes on the people seen; answers about the others.

  Args:
    windows: people_windows.Windows.
    features: (W, D) by name.
    tokens: (W, N, D) for the attentive probe; None: it is left out.
    num_heads: of the attentive probe.

  Returns:
    For each name, `NAME/labels` (V, K), `NAME/r2` (K,), see `Fitted`,
    `NAME/changes` (V, K), the answers of a probe on the `changes` of features
    and labels, `NAME/same` (P,), see `similarities`, and `NAME/order` (Q,),
    above 0 where the later window is recognised; of `attentive`, the first two.
  """
  fit, test = windows.rows(*FIT), windows.rows(UNSEEN)
  y, people = windows.labels[fit], windows.person[fit]
  found = {}
  if tokens is not None:
    fitted = attentive(
      tokens[fit], y, people, tokens[test], num_heads=num_heads
    )
    found |= {"attentive/labels": fitted.predictions, "attentive/r2": fitted.r2}
  pairs = video_pairs(windows.video[test], windows.person[test])[0]
  first, second = order_pairs(windows, fit).T
  test_first, test_second = order_pairs(windows, test).T
  y_changes = changes(y, people)
  for name, x in features.items():
    fitted = ridge(x[fit], y, people, x[test])
    order = ridge(
      x[second] - x[first],
      np.ones((len(first), 1)),
      windows.person[first],
      x[test_second] - x[test_first],
      is_odd=True,
    )
    change = ridge(
      changes(x[fit], people),
      y_changes,
      people,
      changes(x[test], windows.person[test]),
    )
    found |= {
      f"{name}/labels": fitted.predictions,
      f"{name}/r2": fitted.r2,
      f"{name}/changes": change.predictions,
      f"{name}/same": similarities(x[fit], x[test], windows.video[test], pairs),
      f"{name}/order": order.predictions[:, 0],
    }
  return found
