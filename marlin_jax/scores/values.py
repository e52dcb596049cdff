"""Scores of K predicted numbers, such as valence and arousal.

Axes: V examples, K numbers, R sets of weights. "(R)" in a shape: the axis is
there if the weights have it. NaN marks an unknown target, whose example does
not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marlin_jax.scores import arrays, binary


def scores(
  targets: np.ndarray,
  predictions: np.ndarray,
  weights: np.ndarray | None = None,
  scale: Sequence[float] = (),
) -> dict[str, np.ndarray]:
  """Returns all scores of K numbers: means over those that define them.

  Args:
    targets: (V, K).
    predictions: (V, K).
    weights: (V,) or (V, R); None: 1 each.
    scale: least and largest whole number of the rating that the targets are
      averages of; adds the scores of `rating_scores`. Empty: none.

  Returns:
    float64 (R) by name; see `per_value`.

  Raises:
    ValueError: shapes differ, or predictions are not finite.
  """
  means = {
    name: arrays.mean_of_defined(values)
    for name, values in per_value(targets, predictions, weights).items()
    if name != "videos"
  }
  if not scale:
    return means
  rated = [
    rating_scores(targets[:, k], predictions[:, k], *scale, weights)
    for k in range(targets.shape[1])
  ]
  return means | {
    name: arrays.mean_of_defined(np.stack([r[name] for r in rated], axis=-1))
    for name in rated[0]
  }


def per_value(
  targets: np.ndarray,
  predictions: np.ndarray,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns the scores of each number.

  Args:
    targets, predictions, weights: see `scores`.

  Returns:
    float64 ((R), K) by name: the weight `videos`; `mae` and `rmse`, mean
    absolute error and root of the mean squared error; `pearson` and `spearman`,
    correlations, NaN where targets or predictions are constant, as in SciPy;
    and `ccc`, Lin's concordance correlation coefficient (Biometrics 1989), 0
    for a constant prediction, NaN only where targets and predictions are one
    and the same constant.
  """
  weights = arrays.weights_of(weights, len(targets))
  columns = [
    _one_value(targets[:, k], predictions[:, k], weights)
    for k in range(targets.shape[1])
  ]
  return {
    name: np.stack([column[name] for column in columns], axis=-1)
    for name in columns[0]
  }


def _one_value(targets, predictions, weights):
  targets, predictions, weights = _known(targets, predictions, weights)
  total = weights.sum(0)
  errors = predictions - targets
  x, y = _centred(targets, weights), _centred(predictions, weights)
  var_x, var_y, covariance = (
    _mean(a * b, weights) for a, b in ((x, x), (y, y), (x, y))
  )
  bias = _mean(errors, weights)
  return {
    "videos": total,
    "mae": _mean(np.abs(errors), weights),
    "rmse": np.sqrt(_mean(np.square(errors), weights)),
    "pearson": _correlation(covariance, var_x, var_y),
    "spearman": _spearman(targets, predictions, weights),
    "ccc": arrays.ratio(
      2 * covariance, var_x + var_y + np.square(bias), np.nan
    ),
  }


def rating_scores(
  targets: np.ndarray,
  predictions: np.ndarray,
  least: float,
  largest: float,
  weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns the scores of a rating as published for CMU-MOSEI and CMU-MOSI.

  Those of the Multimodal Transformer (Tsai et al., ACL 2019) and of MMSA (Mao
  et al., ACL 2022).

  Args:
    targets, predictions: (V,).
    least, largest: the rating's first and last whole number.
    weights: (V,) or (V, R); None: 1 each.

  Returns:
    float64 (R) by name: `accuracy_N` of the N whole numbers of the rating, to
    which both are rounded (halves to the even one) after they are limited to
    it; `accuracy_2` and `f1_weighted_2` of the decision between negative and
    not negative, 0 counting as not negative; `accuracy_2_without_0` and
    `f1_weighted_2_without_0` of that between positive and not, over the
    examples whose target is not 0.
  """
  targets, predictions, weights = _known(
    targets, predictions, arrays.weights_of(weights, len(targets))
  )
  rounded = [
    np.round(np.clip(v, least, largest)) for v in (targets, predictions)
  ]
  number = int(largest - least) + 1
  result = {f"accuracy_{number}": _mean(rounded[0] == rounded[1], weights)}
  for suffix, rows, true, predicted in (
    ("", np.isfinite(targets), targets >= 0, predictions >= 0),
    ("_without_0", targets != 0, targets > 0, predictions > 0),
  ):
    tp, fp, fn, tn = binary.counts(
      np.where(rows, true, np.nan), predicted, weights
    )
    total = tp + fp + fn + tn
    result[f"accuracy_2{suffix}"] = arrays.ratio(tp + tn, total, np.nan)
    result[f"f1_weighted_2{suffix}"] = binary.weighted_f1(tp, fp, fn, tn)
  return result


# --- Moments ------------------------------------------------------------------


def _known(targets, predictions, weights):
  """Returns the examples with a target, in float64."""
  targets, predictions = arrays.checked(targets, predictions)
  known = ~np.isnan(targets)
  return targets[known], predictions[known].astype(np.float64), weights[known]


def _mean(values, weights):
  """Returns weighted means (R) of values, (V,) or (V, R)."""
  values = values if np.ndim(values) == weights.ndim else values[:, None]
  return arrays.ratio((weights * values).sum(0), weights.sum(0), np.nan)


def _centred(values, weights):
  """Returns values less their mean; exactly 0 where they are one constant.

  Args:
    values: (V,), or (V, R).
    weights: (V, (R)).
  """
  if np.ndim(values) < weights.ndim:
    values = values[:, None]
  counted = weights > 0
  # A mean rounds, and a variance of 1e-34 would make a correlation of any size.
  lowest = np.where(counted, values, np.inf).min(0, initial=np.inf)
  highest = np.where(counted, values, -np.inf).max(0, initial=-np.inf)
  return np.where(
    counted & (highest > lowest), values - _mean(values, weights), 0.0
  )


def _correlation(covariance, var_x, var_y):
  ratio = arrays.ratio(covariance, np.sqrt(var_x) * np.sqrt(var_y), np.nan)
  return np.clip(ratio, -1, 1)


def _spearman(targets, predictions, weights):
  """Returns the correlation of the ranks; equal values share their mean one."""
  x, y = (
    _centred(_ranks(values, weights), weights)
    for values in (targets, predictions)
  )
  return _correlation(
    _mean(x * y, weights), _mean(x * x, weights), _mean(y * y, weights)
  )


def _ranks(values, weights):
  """Returns ranks (V, (R)), counting an example as often as its weight says."""
  order = np.argsort(values, kind="stable")
  ordered = values[order]
  sums = arrays.running_sums(weights[order])
  first = np.searchsorted(ordered, values, side="left")
  end = np.searchsorted(ordered, values, side="right")
  return (sums[first] + sums[end] + 1) / 2
