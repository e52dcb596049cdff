"""Weights, checks and quotients that all scores share."""

from __future__ import annotations

import numpy as np


def weights_of(weights: np.ndarray | None, num: int) -> np.ndarray:
  """Returns weights of `num` examples, (num,) or (num, R); None: 1 each."""
  if weights is None:
    return np.ones(num)
  if len(weights) != num:
    raise ValueError(f"{len(weights)} weights of {num} examples")
  return weights


def checked(labels, others) -> tuple[np.ndarray, np.ndarray]:
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


def ratio(a, b, otherwise: float) -> np.ndarray:
  """Returns a / b, and `otherwise` where b is 0."""
  a, b = np.broadcast_arrays(np.asarray(a, np.float64), b)
  return np.divide(a, b, out=np.full(a.shape, otherwise), where=b > 0)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
  """Returns the mean of finite values over the last axis; NaN without any.

  In a bootstrap a label that no drawn person shows thus counts as the mean of
  the others; docs/EVALUATION.md says why.
  """
  defined = np.isfinite(values)
  return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1), np.nan)


def running_sums(values: np.ndarray) -> np.ndarray:
  """Returns sums of the first 0, 1, ... N rows: (N, (R)) -> (N + 1, (R))."""
  sums = np.zeros((len(values) + 1, *values.shape[1:]))
  np.cumsum(values, axis=0, out=sums[1:])
  return sums
