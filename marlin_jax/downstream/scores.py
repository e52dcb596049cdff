"""Scores of predictions, equal to scikit-learn's, for many weights at once.

Every score takes weights of the examples, (V,) or (V, R) for R sets of weights:
a bootstrap is a few hundred sets, and scikit-learn takes one set per call.

Axes: V examples, K labels or classes, R sets of weights, N = V, or V K for all
pairs of an example and a label. "(R)" in a shape: the axis is there if the
weights have it. A label is 0 or 1, a class is a number from 0; NaN marks an
unknown one, whose example does not count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Bins of `calibration_error`; Guo et al., ICML 2017.
NUM_BINS = 15


# --- One label ----------------------------------------------------------------


def roc_auc(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Returns the area under the ROC curve; ties count half.

  Equals sklearn.metrics.roc_auc_score.

  Args:
    labels: (N,) of 0, 1 and NaN where unknown.
    scores: (N,), higher where label 1 is more likely.
    weights: (N,) or (N, R), at least 0; None: 1 each.

  Returns:
    float64 (R); NaN where one of the two labels does not occur.

  Raises:
    ValueError: shapes differ, or scores are not finite.
  """
  return _roc_auc(_rank(labels, scores, weights))


def average_precision(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Returns the mean of the precision over the recall.

  Equals sklearn.metrics.average_precision_score.

  Args:
    labels, scores, weights: see `roc_auc`.

  Returns:
    float64 (R); 0, as in scikit-learn, where no label is 1.
  """
  return _average_precision(_rank(labels, scores, weights))


def equal_error_rate(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Returns the rate at which false positives equal false negatives.

  Where the ROC curve, with straight lines between its points, meets
  1 - x.

  Args:
    labels, scores, weights: see `roc_auc`.

  Returns:
    float64 (R); NaN where one of the two labels does not occur.
  """
  return _equal_error_rate(_rank(labels, scores, weights))


def recall_at(
  labels: np.ndarray,
  scores: np.ndarray,
  false_positive_rate: float,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the highest true positive rate up to a false positive rate.

  Args:
    labels, scores, weights: see `roc_auc`.
    false_positive_rate: largest share of the 0s that a threshold may accept.

  Returns:
    float64 (R); NaN where one of the two labels does not occur.
  """
  return _recall_at(_rank(labels, scores, weights), false_positive_rate)


def roc_curve(
  labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns false and true positive rates per threshold, from 0 to 1."""
  true, false = (
    np.concatenate([[0.0], counts])
    for counts in _counts_per_threshold(labels, scores)
  )
  return _ratio(false, false[-1], np.nan), _ratio(true, true[-1], np.nan)


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
  """Returns the threshold with the highest balanced accuracy.

  Args:
    labels, scores: see `roc_auc`; scores in [0, 1].

  Returns:
    The middle between two scores; 0.5 where one of the two labels is missing.
  """
  true, false = _counts_per_threshold(labels, scores)
  if not (len(true) and true[-1] and false[-1]):
    return 0.5
  thresholds = np.unique(scores[~np.isnan(labels)])[::-1]
  best = int(np.argmax(true / true[-1] - false / false[-1]))
  below = thresholds[best + 1] if best + 1 < len(thresholds) else 0.0
  return float(thresholds[best] + below) / 2


def counts(
  labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns the weights of TP, FP, FN and TN.

  Args:
    labels, weights: see `roc_auc`.
    predicted: bool (N,).

  Returns:
    float64 (R) each: true and false positives, false and true negatives.
  """
  labels, predicted = _checked(labels, predicted)
  sums = _weights(weights, len(labels)).T @ _decisions(labels, predicted)
  return tuple(sums[..., i] for i in range(4))


def calibration_error(
  labels: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the expected calibration error over bins of equal width.

  The mean distance between the predicted probability and the share of ones in
  a bin (Guo et al., ICML 2017), with the bins of sklearn's calibration_curve.

  Args:
    labels, weights: see `roc_auc`.
    probabilities: (N,) of label 1, in [0, 1].

  Returns:
    float64 (R); NaN without examples.
  """
  labels, probabilities = _checked(labels, probabilities)
  weights = _weights(weights, len(labels))
  gaps = weights.T @ _gaps(labels, probabilities)
  num = weights.T @ (~np.isnan(labels)).astype(np.float64)
  return _ratio(np.abs(gaps).sum(-1), num, np.nan)


# --- Several labels -----------------------------------------------------------


def binary_scores(
  targets: np.ndarray,
  probabilities: np.ndarray,
  thresholds: np.ndarray | float = 0.5,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns all scores of K independent labels.

  Args:
    targets: (V, K) of 0, 1 and NaN.
    probabilities: (V, K) of label 1.
    thresholds: (K,), of every decision but that of `accuracy`, which is at 0.5.
    weights: (V,) or (V, R); None: 1 each.

  Returns:
    float64 (R) by name. `accuracy`, `auc_micro` and `calibration_error` pool
    all pairs of an example and a label (the paper's accuracy and AUC). The
    others are means over the labels for which both values occur: `auc`,
    `average_precision`, `eer` (equal error rate), `tpr_at_fpr_1` and
    `tpr_at_fpr_0.1` (true positive rate at 1% and 0.1% of false positives),
    `balanced_accuracy`, `f1` (of 1), `f1_weighted` (sklearn's weighted F1 over
    0 and 1), and `f1_weighted_at_0.5`, the same with the threshold 0.5, as
    CMU-MOSEI's emotions are scored.
  """
  num_examples, num_labels = targets.shape
  weights = _weights(weights, num_examples)
  labels, pooled = _checked(targets.ravel(), probabilities.ravel())
  # The labels of an example share its weight: they are summed first.
  shape = (num_examples, num_labels, -1)
  decisions = _decisions(labels, pooled > 0.5).reshape(shape).sum(1)
  gaps = _gaps(labels, pooled).reshape(shape).sum(1)
  decisions, gaps = weights.T @ decisions, weights.T @ gaps
  num = decisions.sum(-1)
  per_label_scores = per_label(targets, probabilities, thresholds, weights)
  return {
    "accuracy": _ratio(decisions[..., 0] + decisions[..., 3], num, np.nan),
    "auc_micro": roc_auc(
      labels, pooled, np.repeat(weights, num_labels, axis=0)
    ),
    "calibration_error": _ratio(np.abs(gaps).sum(-1), num, np.nan),
  } | {
    name: _mean_of_defined(values)
    for name, values in per_label_scores.items()
    if name not in ("positives", "negatives", "accuracy")
  }


def per_label(
  targets: np.ndarray,
  probabilities: np.ndarray,
  thresholds: np.ndarray | float = 0.5,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns the scores of each label.

  Args:
    targets, probabilities, thresholds, weights: see `binary_scores`.

  Returns:
    float64 ((R), K) by name: the weights `positives` and `negatives`; and, NaN
    where one of these is 0, `accuracy` and the means of `binary_scores`. (For
    a label that is always 0, sklearn's balanced accuracy is the recall of 0,
    half of the usual scale, which would distort a mean over labels.)
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
  total = positives + negatives
  recall, recall_of_0 = (
    _ratio(tp, positives, np.nan),
    _ratio(tn, negatives, np.nan),
  )
  ranking = _rank(labels, probabilities, weights)
  scores = {
    "auc": _roc_auc(ranking),
    "average_precision": _average_precision(ranking),
    "accuracy": _ratio(tp + tn, total, np.nan),
    "balanced_accuracy": (recall + recall_of_0) / 2,
    "eer": _equal_error_rate(ranking),
    "tpr_at_fpr_1": _recall_at(ranking, 0.01),
    "tpr_at_fpr_0.1": _recall_at(ranking, 0.001),
    "f1": _ratio(2 * tp, 2 * tp + fp + fn, 0.0),
    "f1_weighted": _weighted_f1(tp, fp, fn, tn),
    "f1_weighted_at_0.5": _weighted_f1(
      *counts(labels, probabilities > 0.5, weights)
    ),
  }
  defined = (positives > 0) & (negatives > 0)
  return {"positives": positives, "negatives": negatives} | {
    name: np.where(defined, score, np.nan) for name, score in scores.items()
  }


def _weighted_f1(tp, fp, fn, tn) -> np.ndarray:
  f1 = _ratio(2 * tp, 2 * tp + fp + fn, 0.0)
  f1_of_0 = _ratio(2 * tn, 2 * tn + fp + fn, 0.0)
  sums = (tp + fn) * f1 + (tn + fp) * f1_of_0
  return _ratio(sums, tp + fp + fn + tn, np.nan)


# --- Classes ------------------------------------------------------------------


def confusion(
  targets: np.ndarray,
  predicted: np.ndarray,
  num_classes: int,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Returns sklearn's confusion_matrix, true x predicted.

  Args:
    targets: (V,), NaN where unknown.
    predicted: int (V,).
    num_classes: K.
    weights: (V,) or (V, R); None: 1 each.

  Returns:
    float64 ((R), K, K).
  """
  targets, predicted = _checked(targets, predicted)
  known = ~np.isnan(targets)
  weights = _weights(weights, len(targets))[known]
  pairs = targets[known].astype(int) * num_classes + predicted[known]
  one_hot_pairs = pairs[:, None] == np.arange(num_classes**2)
  matrix = weights.T @ one_hot_pairs.astype(np.float64)
  return matrix.reshape(*matrix.shape[:-1], num_classes, num_classes)


def class_scores(
  targets: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns all scores of one label of K classes.

  Args:
    targets: (V,), NaN where unknown.
    probabilities: (V, K), rows sum to 1.
    weights: (V,) or (V, R); None: 1 each.

  Returns:
    float64 (R) by name. `auc` and `average_precision` are means over the
    classes that occur, each against the rest; `balanced_accuracy` over the
    classes that occur. Expression recognition calls `accuracy` WAR and
    `balanced_accuracy` UAR: `war` and `uar` are the same numbers. `f1` (macro)
    is over those that occur or are predicted, and `f1_weighted`, both as in
    scikit-learn; `calibration_error` is of the predicted class.
  """
  num_classes = probabilities.shape[1]
  weights = _weights(weights, len(targets))
  predicted = probabilities.argmax(axis=1)
  matrix = confusion(targets, predicted, num_classes, weights)
  correct = np.diagonal(matrix, axis1=-2, axis2=-1)
  num_true, num_predicted = matrix.sum(-1), matrix.sum(-2)
  f1 = _ratio(2 * correct, num_true + num_predicted, 0.0)
  recall = _ratio(correct, num_true, np.nan)
  one_vs_rest = per_label(
    one_hot(targets, num_classes), probabilities, 0.5, weights
  )
  is_correct = np.where(np.isnan(targets), np.nan, predicted == targets)
  occurs = num_true + num_predicted > 0
  accuracy = _ratio(correct.sum(-1), num_true.sum(-1), np.nan)
  balanced_accuracy = _mean_of_defined(recall)
  return {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "war": accuracy,
    "uar": balanced_accuracy,
    "f1": _mean_of_defined(np.where(occurs, f1, np.nan)),
    "f1_weighted": _ratio((num_true * f1).sum(-1), num_true.sum(-1), np.nan),
    "auc": _mean_of_defined(one_vs_rest["auc"]),
    "average_precision": _mean_of_defined(one_vs_rest["average_precision"]),
    "calibration_error": calibration_error(
      is_correct, probabilities.max(axis=1), weights
    ),
  }


def per_class(
  targets: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the scores of each class against the rest.

  Args:
    targets, probabilities: see `class_scores`.

  Returns:
    float64 (K,) by name: `positives`, `negatives`, `auc`, `average_precision`,
    and `recall` and `f1` of predicting the likeliest class.
  """
  num_classes = probabilities.shape[1]
  matrix = confusion(targets, probabilities.argmax(axis=1), num_classes)
  correct, num_true = np.diagonal(matrix), matrix.sum(1)
  one_vs_rest = per_label(one_hot(targets, num_classes), probabilities)
  names = ("positives", "negatives", "auc", "average_precision")
  return {name: one_vs_rest[name] for name in names} | {
    "recall": _ratio(correct, num_true, np.nan),
    "f1": _ratio(2 * correct, num_true + matrix.sum(0), 0.0),
  }


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
  """Maps (V,) to float64 (V, K); a row is NaN where the class is unknown."""
  rows = (targets[:, None] == np.arange(num_classes)).astype(np.float64)
  return np.where(np.isnan(targets)[:, None], np.nan, rows)


# --- Weights and decisions ----------------------------------------------------


def _weights(weights: np.ndarray | None, num: int) -> np.ndarray:
  if weights is None:
    return np.ones(num)
  if len(weights) != num:
    raise ValueError(f"{len(weights)} weights of {num} examples")
  return weights


def _checked(labels, others):
  """Returns labels as float64 and predictions, (N,) each, or raises."""
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


def _decisions(labels, predicted):
  """Returns one-hot (N, 4): true, false positives; false, true negatives."""
  yes, true, false = predicted.astype(bool), labels == 1, labels == 0
  kinds = (true & yes, false & yes, true & ~yes, false & ~yes)
  return np.stack(kinds, axis=-1).astype(np.float64)


def _gaps(labels, probabilities):
  """Returns prediction minus label in the prediction's bin: (N, NUM_BINS)."""
  edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
  bins = np.searchsorted(edges, probabilities)[:, None] == np.arange(NUM_BINS)
  return bins * np.nan_to_num(probabilities - labels)[:, None]


# --- Ranking ------------------------------------------------------------------


def _counts_per_threshold(labels, scores):
  """Returns the number of 1s and of 0s at or above each score, descending."""
  labels, scores = _checked(labels, scores)
  known = np.flatnonzero(~np.isnan(labels))
  order = known[np.argsort(-scores[known], kind="stable")]
  labels, scores = labels[order], scores[order]
  ends = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
  return np.cumsum(labels)[ends], np.cumsum(1 - labels)[ends]


class _Ranking(NamedTuple):
  """Weights of the examples that score as high as each positive, or higher.

  P examples have the label 1; each array is float64 (P, (R)), the last two (R).

  Attributes:
    own: weight of the positive itself.
    positives_above, all_above: weight of the positives, and of all examples,
      with a higher score.
    positives_at_least, all_at_least: the same, with an equal or higher score.
    num_positives, num_all: weights of all known examples.
  """

  own: np.ndarray
  positives_above: np.ndarray
  positives_at_least: np.ndarray
  all_above: np.ndarray
  all_at_least: np.ndarray
  num_positives: np.ndarray
  num_all: np.ndarray


def _rank(labels, scores, weights) -> _Ranking:
  """Sorts the known examples by descending score and sums up their weights."""
  labels, scores = _checked(labels, scores)
  weights = _weights(weights, len(labels))
  known = np.flatnonzero(~np.isnan(labels))
  order = known[np.argsort(-scores[known], kind="stable")]
  labels, scores, weights = labels[order], scores[order], weights[order]
  positives = np.flatnonzero(labels == 1)
  # Ranks [first, end) have the score of the positive.
  first = np.searchsorted(-scores, -scores[positives], side="left")
  end = np.searchsorted(-scores, -scores[positives], side="right")
  own = weights[positives]
  all_sums, positive_sums = _running_sums(weights), _running_sums(own)
  return _Ranking(
    own=own,
    positives_above=positive_sums[np.searchsorted(positives, first)],
    positives_at_least=positive_sums[np.searchsorted(positives, end)],
    all_above=all_sums[first],
    all_at_least=all_sums[end],
    num_positives=positive_sums[-1],
    num_all=all_sums[-1],
  )


def _roc_auc(ranking: _Ranking) -> np.ndarray:
  """Returns the share of (1, 0) pairs in which the 1 has the higher score."""
  r = ranking
  num_negatives = r.num_all - r.num_positives
  negatives_above = r.all_above - r.positives_above
  negatives_at_least = r.all_at_least - r.positives_at_least
  outranked = num_negatives - (negatives_at_least + negatives_above) / 2
  area = (r.own * outranked).sum(0)
  return _ratio(area, r.num_positives * num_negatives, np.nan)


def _equal_error_rate(ranking: _Ranking) -> np.ndarray:
  """Returns the rate where the ROC curve meets 1 - x.

  The curve is horizontal between the scores of positives, and a straight line
  over the examples of one score.
  """
  r = ranking
  num_negatives = r.num_all - r.num_positives
  if not len(r.own):
    return np.full(np.shape(num_negatives), np.nan)
  true, false = (
    np.stack([_ratio(above, num, np.nan), _ratio(at_least, num, np.nan)])
    for above, at_least, num in (
      (r.positives_above, r.positives_at_least, r.num_positives),
      (
        r.all_above - r.positives_above,
        r.all_at_least - r.positives_at_least,
        num_negatives,
      ),
    )
  )
  # Positive where the curve has passed the diagonal; ascends with the rank.
  beyond = true + false - 1
  rank = np.argmax(beyond[1] >= 0, axis=0)
  true, false, beyond = (
    np.take_along_axis(x, rank[None, None], axis=1)[:, 0]
    for x in (true, false, beyond)
  )
  share = _ratio(-beyond[0], beyond[1] - beyond[0], 0.0)
  inside = false[0] + share * (false[1] - false[0])
  rate = np.where(beyond[0] >= 0, 1 - true[0], inside)
  return np.where((r.num_positives > 0) & (num_negatives > 0), rate, np.nan)


def _recall_at(ranking: _Ranking, false_positive_rate: float) -> np.ndarray:
  r = ranking
  num_negatives = r.num_all - r.num_positives
  false = r.all_at_least - r.positives_at_least
  allowed = false <= false_positive_rate * num_negatives * (1 + 1e-12)
  recalls = _ratio(r.positives_at_least, r.num_positives, np.nan)
  best = np.where(allowed, recalls, 0.0).max(axis=0, initial=0.0)
  return np.where((r.num_positives > 0) & (num_negatives > 0), best, np.nan)


def _average_precision(ranking: _Ranking) -> np.ndarray:
  """Returns the mean over the 1s of the precision at their score."""
  r = ranking
  precision = _ratio(r.positives_at_least, r.all_at_least, 0.0)
  return _ratio((r.own * precision).sum(0), r.num_positives, 0.0)


def _running_sums(values: np.ndarray) -> np.ndarray:
  """Returns sums of the first 0, 1, ... N rows: (N, (R)) -> (N + 1, (R))."""
  sums = np.zeros((len(values) + 1, *values.shape[1:]))
  np.cumsum(values, axis=0, out=sums[1:])
  return sums


def _ratio(a, b, otherwise: float) -> np.ndarray:
  """Returns a / b, and `otherwise` where b is 0."""
  a, b = np.broadcast_arrays(np.asarray(a, np.float64), b)
  return np.divide(a, b, out=np.full(a.shape, otherwise), where=b > 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
  """Returns the mean of finite values over the last axis; NaN without any."""
  defined = np.isfinite(values)
  return _ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1), np.nan)
