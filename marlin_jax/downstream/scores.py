"""How good predictions are: numbers as scikit-learn gives them, and intervals.

Everything takes weights of examples, of any number of leading axes, and works
on all of them at once: a bootstrap is a few hundred rows of weights.

Axes: V examples, K labels or classes, N = V or V K, R rows of weights ("..." in
shapes). A label is 0 or 1, a class a number from 0; NaN where it is unknown,
and then the example does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

NUM_BINS = 15  # of `calibration_error`; Guo et al., ICML 2017

# Of examples drawn at once, times the labels that each may have: more would
# need gigabytes.
_MAX_WEIGHTS = 20_000_000


# --- One label ----------------------------------------------------------------


def roc_auc(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Area under the ROC curve, ties counted half; sklearn's roc_auc_score.

  Args:
    labels: (N,) of 0 and 1.
    scores: (N,), higher for 1.
    weights: (..., N), at least 0; 1 each where None.

  Returns:
    float64 (...); NaN where one of the two labels does not occur.

  Raises:
    ValueError: shapes differ, or scores are not finite.
  """
  return _areas(labels, scores, weights)[0]


def average_precision(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Precision averaged over recall; sklearn's average_precision_score.

  Args:
    labels, scores, weights: as for `roc_auc`.

  Returns:
    float64 (...); 0, as there, where no label is 1.
  """
  return _areas(labels, scores, weights)[1]


def roc_curve(
  labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
  true, false = (
    np.concatenate([[0.0], counts]) for counts in _ranked(labels, scores)
  )
  return _ratio(false, false[-1], np.nan), _ratio(true, true[-1], np.nan)


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
  """Where to cut scores so that the balanced accuracy is highest.

  Args:
    labels, scores: as for `roc_auc`; scores in [0, 1].

  Returns:
    Half-way between two scores; 0.5 where one of the two labels is missing.
  """
  known = ~np.isnan(labels)
  true, false = _ranked(labels, scores)
  if not (len(true) and true[-1] and false[-1]):
    return 0.5
  values = np.unique(scores[known])[::-1]
  best = int(np.argmax(true / true[-1] - false / false[-1]))
  below = values[best + 1] if best + 1 < len(values) else 0.0
  return float(values[best] + below) / 2


def counts(
  labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Weight of true positives, false positives, false and true negatives.

  Args:
    labels, weights: as for `roc_auc`.
    predicted: bool (N,).

  Returns:
    float64 (...) each.
  """
  labels, predicted = _checked(labels, predicted)
  found = _weights(weights, len(labels)) @ _decisions(labels, predicted)
  return tuple(found[..., i] for i in range(4))


def calibration_error(
  labels: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Expected calibration error over bins of equal width.

  The mean distance between what was predicted in a bin and what was found
  (Guo et al., ICML 2017), with the bins of sklearn's calibration_curve.

  Args:
    labels, weights: as for `roc_auc`.
    probabilities: (N,) of label 1, in [0, 1].

  Returns:
    float64 (...); NaN without examples.
  """
  labels, probabilities = _checked(labels, probabilities)
  weights = _weights(weights, len(labels))
  gaps = weights @ _gaps(labels, probabilities)
  num = weights @ (~np.isnan(labels)).astype(np.float64)
  return _ratio(np.abs(gaps).sum(-1), num, np.nan)


# --- Several labels -----------------------------------------------------------


def binary_scores(
  targets: np.ndarray,
  probabilities: np.ndarray,
  thresholds: np.ndarray | float = 0.5,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """All numbers of K independent labels.

  Args:
    targets: (V, K) of 0, 1 and NaN.
    probabilities: (V, K), of 1.
    thresholds: (K,), for what needs a decision but `accuracy`, which is at 0.5.
    weights: (..., V).

  Returns:
    float64 (...) by name. `accuracy`, `auc_micro` and `calibration_error` pool
    all pairs of example and label (the paper's accuracy and AUC). The others
    are means over the labels of which both values occur: `auc`,
    `average_precision`, `balanced_accuracy`, `f1` (of 1), and `f1_weighted`,
    sklearn's weighted F1 over 0 and 1, as CMU-MOSEI's emotions are scored.
  """
  weights = _weights(weights, len(targets))
  flat = _checked(targets.ravel(), probabilities.ravel())
  owners = np.repeat(np.arange(len(targets)), targets.shape[1])
  # Of all labels of an example together: it has one weight.
  shape = (*targets.shape, -1)
  decisions = weights @ _decisions(flat[0], flat[1] > 0.5).reshape(shape).sum(1)
  gaps = weights @ _gaps(*flat).reshape(shape).sum(1)
  num = decisions.sum(-1)
  pooled = {
    "accuracy": _ratio(decisions[..., 0] + decisions[..., 3], num, np.nan),
    "auc_micro": _areas(*flat, weights, owners)[0],
    "calibration_error": _ratio(np.abs(gaps).sum(-1), num, np.nan),
  }
  rows = per_label(targets, probabilities, thresholds, weights)
  return pooled | {
    name: _mean_of_defined(rows[name])
    for name in (
      "auc",
      "average_precision",
      "balanced_accuracy",
      "f1",
      "f1_weighted",
    )
  }


def per_label(
  targets: np.ndarray,
  probabilities: np.ndarray,
  thresholds: np.ndarray | float = 0.5,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Numbers of each label.

  Args:
    targets, probabilities, thresholds, weights: as for `binary_scores`.

  Returns:
    float64 (..., K) by name: `positives`, `negatives` (weights of them), and
    NaN where one of these is 0, `auc`, `average_precision`, `accuracy`,
    `balanced_accuracy`, `f1`, `f1_weighted`. (Of a label that is always 0,
    sklearn's balanced accuracy is the recall of 0: half of what it is
    elsewhere, and in a mean over labels not to be told from the rest.)
  """
  thresholds = np.broadcast_to(thresholds, targets.shape[1])
  weights = _weights(weights, len(targets))
  columns = [
    _one_label(targets[:, k], probabilities[:, k], thresholds[k], weights)
    for k in range(targets.shape[1])
  ]
  return {
    name: np.stack([column[name] for column in columns], axis=-1)
    for name in columns[0]
  }


def _one_label(labels, probabilities, threshold, weights):
  tp, fp, fn, tn = counts(labels, probabilities > threshold, weights)
  positives, negatives = tp + fn, tn + fp
  f1 = _ratio(2 * tp, 2 * tp + fp + fn, 0.0)
  f1_of_0 = _ratio(2 * tn, 2 * tn + fp + fn, 0.0)
  both = positives + negatives
  auc, precision = _areas(labels, probabilities, weights)
  found = {
    "auc": auc,
    "average_precision": precision,
    "accuracy": _ratio(tp + tn, both, np.nan),
    "balanced_accuracy": (
      _ratio(tp, positives, np.nan) + _ratio(tn, negatives, np.nan)
    )
    / 2,
    "f1": f1,
    "f1_weighted": _ratio(positives * f1 + negatives * f1_of_0, both, np.nan),
  }
  defined = (positives > 0) & (negatives > 0)
  return {"positives": positives, "negatives": negatives} | {
    name: np.where(defined, value, np.nan) for name, value in found.items()
  }


# --- Classes ------------------------------------------------------------------


def confusion(
  targets: np.ndarray,
  predicted: np.ndarray,
  num_classes: int,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """sklearn's confusion_matrix: float64 (..., K, K), true x predicted.

  Args:
    targets: (V,), NaN where unknown.
    predicted: int (V,).
    num_classes: K.
    weights: (..., V).
  """
  targets, predicted, weights = _known(targets, predicted, weights)
  pairs = targets.astype(int) * num_classes + predicted.astype(int)
  chosen = pairs[:, None] == np.arange(num_classes**2)
  matrix = weights @ chosen.astype(np.float64)
  return matrix.reshape(*matrix.shape[:-1], num_classes, num_classes)


def class_scores(
  targets: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """All numbers of one label of K classes.

  Args:
    targets: (V,), NaN where unknown.
    probabilities: (V, K), rows sum to 1.
    weights: (..., V).

  Returns:
    float64 (...) by name. `auc` and `average_precision` are means over classes,
    each against the rest, of those that occur; `balanced_accuracy` of the
    classes that occur; `f1` (macro) of those that occur or are predicted, and
    `f1_weighted`, as sklearn has them; `calibration_error` is of the predicted
    class.
  """
  num_classes = probabilities.shape[1]
  weights = _weights(weights, len(targets))
  predicted = probabilities.argmax(axis=1)
  matrix = confusion(targets, predicted, num_classes, weights)
  right = np.diagonal(matrix, axis1=-2, axis2=-1)
  true, given = matrix.sum(-1), matrix.sum(-2)
  f1 = _ratio(2 * right, true + given, 0.0)
  recall = _ratio(right, true, np.nan)
  rest = per_label(one_hot(targets, num_classes), probabilities, 0.5, weights)
  correct = np.where(np.isnan(targets), np.nan, predicted == targets)
  return {
    "accuracy": _ratio(right.sum(-1), true.sum(-1), np.nan),
    "balanced_accuracy": _mean_of_defined(recall),
    "f1": _mean_of_defined(np.where(true + given > 0, f1, np.nan)),
    "f1_weighted": _ratio((true * f1).sum(-1), true.sum(-1), np.nan),
    "auc": _mean_of_defined(rest["auc"]),
    "average_precision": _mean_of_defined(rest["average_precision"]),
    "calibration_error": calibration_error(
      correct, probabilities.max(axis=1), weights
    ),
  }


def per_class(
  targets: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
  """Numbers of each class against the rest.

  Args:
    targets, probabilities: as for `class_scores`.

  Returns:
    float64 (K,) by name: `positives`, `negatives`, `auc`, `average_precision`,
    `recall` and `f1` of the decisions for the likeliest class.
  """
  num_classes = probabilities.shape[1]
  matrix = confusion(targets, probabilities.argmax(axis=1), num_classes)
  right, true, given = np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
  rest = per_label(one_hot(targets, num_classes), probabilities)
  names = ("positives", "negatives", "auc", "average_precision")
  return {name: rest[name] for name in names} | {
    "recall": _ratio(right, true, np.nan),
    "f1": _ratio(2 * right, true + given, 0.0),
  }


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
  """(V,) -> float64 (V, K); a row of NaN where the class is unknown."""
  hot = (targets[:, None] == np.arange(num_classes)).astype(np.float64)
  return np.where(np.isnan(targets)[:, None], np.nan, hot)


# --- Intervals ----------------------------------------------------------------


def bootstrap(
  measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
  groups: Sequence[str],
  *,
  num_resamples: int,
  seed: int = 0,
  level: float = 0.95,
  report: Callable[[int], object] = lambda num: None,
) -> dict[str, tuple[float, float]]:
  """Percentile intervals, by drawing whole groups with replacement.

  The videos of one person are alike: drawing videos instead of people would
  make intervals that are too narrow (Field and Welsh, JRSS B 2007).

  Args:
    measure: weights (R, V) -> (R,) by name.
    groups: V names, of the person in each example.
    num_resamples: how many draws.
    seed: of the draws.
    level: share of the draws inside.
    report: told how many more are done.

  Returns:
    Lowest and highest by name; NaN where a number is never defined, or there
    is one group only.
  """
  names, group = np.unique(np.asarray(groups), return_inverse=True)
  np_rng = np.random.default_rng(seed)
  found: dict[str, list[np.ndarray]] = {}
  rows_at_once = max(1, _MAX_WEIGHTS // (100 * len(group)))
  for first in range(0, num_resamples, rows_at_once):
    rows = min(rows_at_once, num_resamples - first)
    times = np_rng.multinomial(
      len(names), np.full(len(names), 1 / len(names)), size=rows
    )
    weights = _take(times.astype(np.float64), group)
    for name, values in measure(weights).items():
      found.setdefault(name, []).append(values)
    report(rows)
  tails = [50 * (1 - level), 50 * (1 + level)]
  intervals = {}
  for name, parts in found.items():
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if len(names) < 2 or not len(values):
      intervals[name] = (float("nan"), float("nan"))
    else:
      low, high = np.percentile(values, tails)
      intervals[name] = (float(low), float(high))
  return intervals


# --- Parts --------------------------------------------------------------------


def _weights(weights: np.ndarray | None, num: int) -> np.ndarray:
  if weights is None:
    return np.ones(num)
  if weights.shape[-1] != num:
    raise ValueError(f"{weights.shape[-1]} weights of {num} examples")
  return weights


def _checked(labels, others):
  """(N,) each, whatever they were given as."""
  labels, others = np.asarray(labels, np.float64), np.asarray(others)
  if labels.ndim != 1 or labels.shape != others.shape:
    raise ValueError(
      f"labels of shape {labels.shape} and predictions of shape "
      f"{others.shape}, expected the same (N,)"
    )
  if not np.isfinite(others).all():
    raise ValueError(
      f"{(~np.isfinite(others)).sum()} of {len(others)} predictions are not "
      "finite: has the training diverged?"
    )
  return labels, others


def _known(labels, others, weights):
  """Drops examples of unknown label."""
  labels, others = _checked(labels, others)
  weights = _weights(weights, len(labels))
  known = np.flatnonzero(~np.isnan(labels))
  return labels[known], others[known], _take(weights, known)


def _decisions(labels, predicted):
  """True and false positives, false and true negatives: float64 (N, 4)."""
  yes, true, false = predicted.astype(bool), labels == 1, labels == 0
  kinds = (true & yes, false & yes, true & ~yes, false & ~yes)
  return np.stack(kinds, axis=-1).astype(np.float64)


def _gaps(labels, probabilities):
  """Predicted minus true, in the bin of the prediction: float64 (N, bins)."""
  edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
  chosen = np.searchsorted(edges, probabilities)[:, None] == np.arange(NUM_BINS)
  return chosen * np.nan_to_num(probabilities - labels)[:, None]


def _take(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
  """weights[..., index], with the rows of weights side by side in memory.

  Thousands of rows are worked on at once: with the examples as the first axis
  in memory, to take one and to add it up are each one sweep over its rows.
  """
  return np.moveaxis(np.moveaxis(weights, -1, 0)[index], 0, -1)


def _ranked(labels, scores):
  """How many 1s and 0s there are down to each distinct score, falling."""
  labels, scores, _ = _known(labels, scores, None)
  order = np.argsort(-scores, kind="stable")
  labels, scores = labels[order], scores[order]
  ends = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
  return np.cumsum(labels)[ends], np.cumsum(1 - labels)[ends]


def _areas(labels, scores, weights, owners=None):
  """Under the ROC curve, and the average precision: float64 (...) each.

  Both are sums over the 1s (P of them): of the 0s ranked below each, and of the
  precision down to it; so all but one running sum are over the 1s alone.

  Args:
    labels, scores: (N,).
    weights: (..., V), or None.
    owners: int (N,), in [0, V): whose weight each has; None: its own.
  """
  labels, scores = _checked(labels, scores)
  if owners is None:
    owners, weights = np.arange(len(labels)), _weights(weights, len(labels))
  known = np.flatnonzero(~np.isnan(labels))
  order = known[np.argsort(-scores[known], kind="stable")]
  labels, scores = labels[order], scores[order]
  ones = np.flatnonzero(labels > 0.5)
  # Those of equal score: the first, and the one after the last.
  firsts = np.searchsorted(-scores, -scores[ones], side="left")
  ends = np.searchsorted(-scores, -scores[ones], side="right")
  both = _running(
    np.moveaxis(_take(weights, owners[order]), -1, 0)
  )  # (N + 1, ...)
  each = np.diff(both, axis=0)[ones]  # (P, ...)
  true = _running(each)
  true_down = true[np.searchsorted(ones, ends)]
  true_above = true[np.searchsorted(ones, firsts)]
  false_down, false_above = both[ends] - true_down, both[firsts] - true_above
  num_true, num_false = true[-1], both[-1] - true[-1]
  area = (each * (num_false - (false_down + false_above) / 2)).sum(0)
  precision = (each * _ratio(true_down, both[ends], 0.0)).sum(0)
  return (
    _ratio(area, num_true * num_false, np.nan),
    _ratio(precision, num_true, 0.0),
  )


def _running(values: np.ndarray) -> np.ndarray:
  """Sums of the first 0, 1, 2, ... along the first axis."""
  sums = np.zeros((len(values) + 1, *values.shape[1:]))
  np.cumsum(values, axis=0, out=sums[1:])
  return sums


def _ratio(a, b, otherwise: float) -> np.ndarray:
  a, b = np.broadcast_arrays(np.asarray(a, np.float64), b)
  return np.divide(a, b, out=np.full(a.shape, otherwise), where=b > 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
  """Over the last axis; NaN where nothing is defined."""
  defined = np.isfinite(values)
  return _ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1), np.nan)
