"""Scores of a ranking by one label: ROC curve, precision and recall.

Axes: N examples, R sets of weights. "(R)" in a shape: the axis is there if the
weights have it. A label is 0 or 1; NaN marks an unknown one, whose example does
not count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marlin_jax.scores import arrays


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
  return rank(labels, scores, weights).roc_auc()


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
  return rank(labels, scores, weights).average_precision()


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
  return rank(labels, scores, weights).equal_error_rate()


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
  return rank(labels, scores, weights).recall_at(false_positive_rate)


def roc_curve(
  labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns false and true positive rates per threshold, from 0 to 1."""
  true, false = (
    np.concatenate([[0.0], counts])
    for counts in _counts_per_threshold(labels, scores)
  )
  return arrays.ratio(false, false[-1], np.nan), arrays.ratio(
    true, true[-1], np.nan
  )


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


def _counts_per_threshold(labels, scores):
  """Returns the number of 1s and of 0s at or above each score, descending."""
  labels, scores = arrays.checked(labels, scores)
  known = np.flatnonzero(~np.isnan(labels))
  order = known[np.argsort(-scores[known], kind="stable")]
  labels, scores = labels[order], scores[order]
  ends = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
  return np.cumsum(labels)[ends], np.cumsum(1 - labels)[ends]


class Ranking(NamedTuple):
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

  def roc_auc(self) -> np.ndarray:
    """Returns the share of (1, 0) pairs in which the 1 has the higher score."""
    num_negatives = self.num_all - self.num_positives
    negatives_above = self.all_above - self.positives_above
    negatives_at_least = self.all_at_least - self.positives_at_least
    outranked = num_negatives - (negatives_at_least + negatives_above) / 2
    area = (self.own * outranked).sum(0)
    return arrays.ratio(area, self.num_positives * num_negatives, np.nan)

  def equal_error_rate(self) -> np.ndarray:
    """Returns the rate where the ROC curve meets 1 - x.

    The curve is horizontal between the scores of positives, and a straight line
    over the examples of one score.
    """
    num_negatives = self.num_all - self.num_positives
    if not len(self.own):
      return np.full(np.shape(num_negatives), np.nan)
    true, false = (
      np.stack(
        [arrays.ratio(above, num, np.nan), arrays.ratio(at_least, num, np.nan)]
      )
      for above, at_least, num in (
        (self.positives_above, self.positives_at_least, self.num_positives),
        (
          self.all_above - self.positives_above,
          self.all_at_least - self.positives_at_least,
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
    share = arrays.ratio(-beyond[0], beyond[1] - beyond[0], 0.0)
    inside = false[0] + share * (false[1] - false[0])
    rate = np.where(beyond[0] >= 0, 1 - true[0], inside)
    return np.where(
      (self.num_positives > 0) & (num_negatives > 0), rate, np.nan
    )

  def recall_at(self, false_positive_rate: float) -> np.ndarray:
    """Returns the highest recall up to a rate of false positives."""
    num_negatives = self.num_all - self.num_positives
    false = self.all_at_least - self.positives_at_least
    allowed = false <= false_positive_rate * num_negatives * (1 + 1e-12)
    recalls = arrays.ratio(self.positives_at_least, self.num_positives, np.nan)
    best = np.where(allowed, recalls, 0.0).max(axis=0, initial=0.0)
    return np.where(
      (self.num_positives > 0) & (num_negatives > 0), best, np.nan
    )

  def average_precision(self) -> np.ndarray:
    """Returns the mean over the 1s of the precision at their score."""
    precision = arrays.ratio(self.positives_at_least, self.all_at_least, 0.0)
    return arrays.ratio((self.own * precision).sum(0), self.num_positives, 0.0)


def rank(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> Ranking:
  """Sorts the known examples by descending score and sums up their weights."""
  labels, scores = arrays.checked(labels, scores)
  weights = arrays.weights_of(weights, len(labels))
  known = np.flatnonzero(~np.isnan(labels))
  order = known[np.argsort(-scores[known], kind="stable")]
  labels, scores, weights = labels[order], scores[order], weights[order]
  positives = np.flatnonzero(labels == 1)
  # Ranks [first, end) have the score of the positive.
  first = np.searchsorted(-scores, -scores[positives], side="left")
  end = np.searchsorted(-scores, -scores[positives], side="right")
  own = weights[positives]
  all_sums, positive_sums = (
    arrays.running_sums(weights),
    arrays.running_sums(own),
  )
  return Ranking(
    own=own,
    positives_above=positive_sums[np.searchsorted(positives, first)],
    positives_at_least=positive_sums[np.searchsorted(positives, end)],
    all_above=all_sums[first],
    all_at_least=all_sums[end],
    num_positives=positive_sums[-1],
    num_all=all_sums[-1],
  )
