"""Scores of predictions, each with a bootstrap interval.

Axes: V videos, K labels or classes, R draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from marlin_jax.downstream import scores
from marlin_jax.downstream.tasks import Task
from marlin_jax.inference.classifier import rescaled

# Draws at once times examples times an allowance of 100 labels per example.
# More would need gigabytes.
_MAX_WEIGHTS = 20_000_000
_ALLOWED_LABELS = 100


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predicted probabilities and true targets of videos.

  Attributes:
    video_ids, people: names of the V videos, and of the person in each.
    targets: (V, K), or (V,) for classes; see `Task.targets`.
    probabilities: float64 (V, K).
  """

  video_ids: Sequence[str]
  people: Sequence[str]
  targets: np.ndarray
  probabilities: np.ndarray

  def subset(self, rows: np.ndarray) -> Predictions:
    """Returns the predictions of the videos where `rows`, bool (V,), is set."""
    indices = np.flatnonzero(rows)
    return Predictions(
      [self.video_ids[i] for i in indices],
      [self.people[i] for i in indices],
      self.targets[rows],
      self.probabilities[rows],
    )


def thresholds(task: Task, val: Predictions, protocol: str) -> np.ndarray:
  """Returns the decision threshold of each label, float64 (K,).

  The paper's protocol uses 0.5, with which a rare label is never predicted. The
  default protocol uses the threshold with the highest balanced accuracy on the
  validation split. Classes need no threshold; theirs is 0.5.
  """
  values = np.full(task.num_outputs, 0.5)
  if protocol == "paper" or task.is_class:
    return values
  for k in range(task.num_outputs):
    values[k] = scores.best_threshold(
      val.targets[:, k], val.probabilities[:, k]
    )
  return values


def temperature(task: Task, val: Predictions) -> float:
  """Returns the temperature that calibrates the probabilities on a split.

  It minimises the cross-entropy of probabilities whose logits are divided by it
  (Guo et al., ICML 2017). Limited to 0.05 to 20, where separable data end.
  """
  from scipy import optimize

  def loss(log_temperature: float) -> float:
    scaled = rescaled(
      val.probabilities, math.exp(log_temperature), task.is_class
    )
    return task.cross_entropy(val.targets, scaled)

  limit = math.log(20)
  best = optimize.minimize_scalar(loss, bounds=(-limit, limit))
  return math.exp(best.x)


def measure(
  task: Task,
  predictions: Predictions,
  thresholds: np.ndarray,
  parts: Mapping[str, np.ndarray],
  num_resamples: int,
) -> dict[str, Any]:
  """Returns all scores, ready for JSON: None for undefined ones.

  Args:
    task: task that was predicted.
    predictions: predictions on the test split.
    thresholds: result of `thresholds`.
    parts: subsets of the videos by name, bool (V,), to score separately.
    num_resamples: number of resamples of the bootstrap over people.

  Returns:
    `num_videos`, `num_people`; `metrics`: {name: {value, low, high}};
    `per_class`: a dict per label or class; `confusion`, for classes; `parts`:
    {name: metrics}.
  """
  result = {
    "num_videos": len(predictions.video_ids),
    "num_people": len(set(predictions.people)),
    "metrics": _metrics(task, predictions, thresholds, num_resamples),
    "per_class": _per_class(task, predictions, thresholds),
    "parts": {
      name: _metrics(task, predictions.subset(rows), thresholds, num_resamples)
      for name, rows in parts.items()
      if rows.any()
    },
  }
  if task.is_class:
    predicted = predictions.probabilities.argmax(axis=1)
    result["confusion"] = scores.confusion(
      predictions.targets, predicted, task.num_outputs
    ).tolist()
  return result


def _metrics(task, predictions, thresholds, num_resamples):
  targets, probabilities = predictions.targets, predictions.probabilities

  def weighted_scores(weights):
    if task.is_class:
      return scores.class_scores(targets, probabilities, weights)
    return scores.binary_scores(targets, probabilities, thresholds, weights)

  values = weighted_scores(None)
  # Shown only if it takes seconds: for many videos with many labels.
  with tqdm(
    desc="intervals", total=num_resamples, unit="draw", delay=2.0, leave=False
  ) as bar:
    intervals = bootstrap(
      weighted_scores,
      predictions.people,
      num_resamples=num_resamples,
      report=bar.update,
    )
  return {
    name: {
      "value": finite_or_none(value),
      "low": finite_or_none(intervals[name][0]),
      "high": finite_or_none(intervals[name][1]),
    }
    for name, value in values.items()
  }


def _per_class(task, predictions, thresholds):
  targets, probabilities = predictions.targets, predictions.probabilities
  if task.is_class:
    columns = scores.per_class(targets, probabilities)
  else:
    columns = scores.per_label(targets, probabilities, thresholds)
    columns["threshold"] = thresholds
  return [
    {"name": name}
    | {column: finite_or_none(values[i]) for column, values in columns.items()}
    for i, name in enumerate(task.names)
  ]


def finite_or_none(value: Any) -> float | None:
  """Returns a float for JSON, which cannot hold NaN and infinity."""
  value = float(value)
  return value if math.isfinite(value) else None


def bootstrap(
  measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
  groups: Sequence[str],
  *,
  num_resamples: int,
  seed: int = 0,
  level: float = 0.95,
  report: Callable[[int], object] = lambda num: None,
) -> dict[str, tuple[float, float]]:
  """Returns percentile intervals from resampling whole groups.

  The videos of one person are alike, so intervals from resampling videos would
  be too narrow (Field and Welsh, JRSS B 2007).

  Args:
    measure: maps weights (V, R) to scores (R,) by name.
    groups: V names: the group of each example, such as a person.
    num_resamples: number of draws with replacement.
    seed: seed of the draws.
    level: share of the draws inside the interval.
    report: called with the number of draws done since the last call.

  Returns:
    Lower and upper end by name; NaN for a score that is never defined, or if
    there is a single group.
  """
  names, group = np.unique(np.asarray(groups), return_inverse=True)
  np_rng = np.random.default_rng(seed)
  draws: dict[str, list[np.ndarray]] = {}
  draws_at_once = max(1, _MAX_WEIGHTS // (_ALLOWED_LABELS * len(group)))
  for first in range(0, num_resamples, draws_at_once):
    num = min(draws_at_once, num_resamples - first)
    times = np_rng.multinomial(
      len(names), np.full(len(names), 1 / len(names)), size=num
    )
    weights = times.astype(np.float64).T[group]
    for name, values in measure(weights).items():
      draws.setdefault(name, []).append(values)
    report(num)
  tails = [50 * (1 - level), 50 * (1 + level)]
  intervals = {}
  for name, parts in draws.items():
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if len(names) < 2 or not len(values):
      intervals[name] = (float("nan"), float("nan"))
    else:
      low, high = np.percentile(values, tails)
      intervals[name] = (float(low), float(high))
  return intervals
