"""Scores of one label of K classes.

Axes: V examples, K labels or classes, R sets of weights. "(R)" in a shape: the
axis is there if the weights have it. A class is a number from 0; NaN marks an
unknown one, whose example does not count.
"""

from __future__ import annotations

import numpy as np

from marlin_jax.scores import arrays, binary


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
  targets, predicted = arrays.checked(targets, predicted)
  known = ~np.isnan(targets)
  weights = arrays.weights_of(weights, len(targets))[known]
  pairs = targets[known].astype(int) * num_classes + predicted[known]
  one_hot_pairs = pairs[:, None] == np.arange(num_classes**2)
  matrix = weights.T @ one_hot_pairs.astype(np.float64)
  return matrix.reshape(*matrix.shape[:-1], num_classes, num_classes)


def scores(
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
  weights = arrays.weights_of(weights, len(targets))
  predicted = probabilities.argmax(axis=1)
  matrix = confusion(targets, predicted, num_classes, weights)
  correct = np.diagonal(matrix, axis1=-2, axis2=-1)
  num_true, num_predicted = matrix.sum(-1), matrix.sum(-2)
  f1 = arrays.ratio(2 * correct, num_true + num_predicted, 0.0)
  recall = arrays.ratio(correct, num_true, np.nan)
  one_vs_rest = binary.per_label(
    one_hot(targets, num_classes), probabilities, 0.5, weights
  )
  is_correct = np.where(np.isnan(targets), np.nan, predicted == targets)
  occurs = num_true + num_predicted > 0
  accuracy = arrays.ratio(correct.sum(-1), num_true.sum(-1), np.nan)
  balanced_accuracy = arrays.mean_of_defined(recall)
  return {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "war": accuracy,
    "uar": balanced_accuracy,
    "f1": arrays.mean_of_defined(np.where(occurs, f1, np.nan)),
    "f1_weighted": arrays.ratio(
      (num_true * f1).sum(-1), num_true.sum(-1), np.nan
    ),
    "auc": arrays.mean_of_defined(one_vs_rest["auc"]),
    "average_precision": arrays.mean_of_defined(
      one_vs_rest["average_precision"]
    ),
    "calibration_error": binary.calibration_error(
      is_correct, probabilities.max(axis=1), weights
    ),
  }


def per_class(
  targets: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the scores of each class against the rest.

  Args:
    targets, probabilities: see `scores`.

  Returns:
    float64 (K,) by name: `positives`, `negatives`, `auc`, `average_precision`,
    and `recall` and `f1` of predicting the likeliest class.
  """
  num_classes = probabilities.shape[1]
  matrix = confusion(targets, probabilities.argmax(axis=1), num_classes)
  correct, num_true = np.diagonal(matrix), matrix.sum(1)
  one_vs_rest = binary.per_label(one_hot(targets, num_classes), probabilities)
  names = ("positives", "negatives", "auc", "average_precision")
  return {name: one_vs_rest[name] for name in names} | {
    "recall": arrays.ratio(correct, num_true, np.nan),
    "f1": arrays.ratio(2 * correct, num_true + matrix.sum(0), 0.0),
  }


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
  """Maps (V,) to float64 (V, K); a row is NaN where the class is unknown."""
  rows = (targets[:, None] == np.arange(num_classes)).astype(np.float64)
  return np.where(np.isnan(targets)[:, None], np.nan, rows)
