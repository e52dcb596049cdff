"""Scores of K independent labels.

Axes: V examples, K labels or classes, R sets of weights, N = V, or V K for all
pairs of an example and a label. "(R)" in a shape: the axis is there if the
weights have it. A label is 0 or 1; NaN marks an unknown one, whose example does
not count.
"""

from __future__ import annotations

import numpy as np

from marlin_jax.scores import arrays, ranking

# Bins of `calibration_error`; Guo et al., ICML 2017.
NUM_BINS = 15


def counts(
  labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns the weights of TP, FP, FN and TN.

  Args:
    labels, weights: see `ranking.roc_auc`.
    predicted: bool (N,).

  Returns:
    float64 (R) each: true and false positives, false and true negatives.
  """
  labels, predicted = arrays.checked(labels, predicted)
  sums = arrays.weights_of(weights, len(labels)).T @ _decisions(
    labels, predicted
  )
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
    labels, weights: see `ranking.roc_auc`.
    probabilities: (N,) of label 1, in [0, 1].

  Returns:
    float64 (R); NaN without examples.
  """
  labels, probabilities = arrays.checked(labels, probabilities)
  weights = arrays.weights_of(weights, len(labels))
  gaps = weights.T @ _gaps(labels, probabilities)
  num = weights.T @ (~np.isnan(labels)).astype(np.float64)
  return arrays.ratio(np.abs(gaps).sum(-1), num, np.nan)


def scores(
  targets: np.ndarray,
  probabilities: np.ndarray,
  thresholds: np.ndarray | float = 0.5,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns all scores of K independent labels.

  Args:
    targets: (V, K) of 0, 1 and NaN.
    probabilities: (V, K) of label 1.
    thresholds: (K,), or (V, K) where predictions of several models are pooled;
      of every decision but that of `accuracy`, which is at 0.5.
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
  weights = arrays.weights_of(weights, num_examples)
  labels, pooled = arrays.checked(targets.ravel(), probabilities.ravel())
  # The labels of an example share its weight: they are summed first.
  shape = (num_examples, num_labels, -1)
  decisions = _decisions(labels, pooled > 0.5).reshape(shape).sum(1)
  gaps = _gaps(labels, pooled).reshape(shape).sum(1)
  decisions, gaps = weights.T @ decisions, weights.T @ gaps
  num = decisions.sum(-1)
  per_label_scores = per_label(targets, probabilities, thresholds, weights)
  return {
    "accuracy": arrays.ratio(
      decisions[..., 0] + decisions[..., 3], num, np.nan
    ),
    "auc_micro": ranking.roc_auc(
      labels, pooled, np.repeat(weights, num_labels, axis=0)
    ),
    "calibration_error": arrays.ratio(np.abs(gaps).sum(-1), num, np.nan),
  } | {
    name: arrays.mean_of_defined(values)
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
    targets, probabilities, thresholds, weights: see `scores`.

  Returns:
    float64 ((R), K) by name: the weights `positives` and `negatives`; and, NaN
    where one of these is 0, `accuracy` and the means of `scores`. (For
    a label that is always 0, sklearn's balanced accuracy is the recall of 0,
    half of the usual scale, which would distort a mean over labels.)
  """
  thresholds = np.broadcast_to(thresholds, targets.shape)
  weights = arrays.weights_of(weights, len(targets))
  columns = [
    _one_label(targets[:, k], probabilities[:, k], thresholds[:, k], weights)
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
    arrays.ratio(tp, positives, np.nan),
    arrays.ratio(tn, negatives, np.nan),
  )
  ranked = ranking.rank(labels, probabilities, weights)
  values = {
    "auc": ranked.roc_auc(),
    "average_precision": ranked.average_precision(),
    "accuracy": arrays.ratio(tp + tn, total, np.nan),
    "balanced_accuracy": (recall + recall_of_0) / 2,
    "eer": ranked.equal_error_rate(),
    "tpr_at_fpr_1": ranked.recall_at(0.01),
    "tpr_at_fpr_0.1": ranked.recall_at(0.001),
    "f1": arrays.ratio(2 * tp, 2 * tp + fp + fn, 0.0),
    "f1_weighted": weighted_f1(tp, fp, fn, tn),
    "f1_weighted_at_0.5": weighted_f1(
      *counts(labels, probabilities > 0.5, weights)
    ),
  }
  defined = (positives > 0) & (negatives > 0)
  return {"positives": positives, "negatives": negatives} | {
    name: np.where(defined, value, np.nan) for name, value in values.items()
  }


def weighted_f1(tp, fp, fn, tn) -> np.ndarray:
  """Returns the F1 of 1 and of 0, weighted by how often each occurs."""
  f1 = arrays.ratio(2 * tp, 2 * tp + fp + fn, 0.0)
  f1_of_0 = arrays.ratio(2 * tn, 2 * tn + fp + fn, 0.0)
  sums = (tp + fn) * f1 + (tn + fp) * f1_of_0
  return arrays.ratio(sums, tp + fp + fn + tn, np.nan)


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
