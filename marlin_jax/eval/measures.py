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
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns all scores, ready for JSON: None for undefined ones; and draws.

  Args:
    task: task that was predicted.
    predictions: predictions on the test split.
    thresholds: result of `thresholds`.
    parts: subsets of the videos by name, bool (V,), to score separately.
    num_resamples: number of resamples of the bootstrap over people.

  Returns:
    `num_videos`, `num_people`; `metrics`: {name: {value, low, high}};
    `per_class`: a dict per label or class; `confusion`, for classes; `parts`:
    {name: metrics}. And the draws of each metric, float64 (R,), the same people
    in each draw for all predictions of the same videos.
  """
  metrics, draws = _metrics(task, predictions, thresholds, num_resamples)
  result = {
    "num_videos": len(predictions.video_ids),
    "num_people": len(set(predictions.people)),
    "metrics": metrics,
    "per_class": _per_class(task, predictions, thresholds),
    "parts": {
      name: _metrics(task, predictions.subset(rows), thresholds, num_resamples)[
        0
      ]
      for name, rows in parts.items()
      if rows.any()
    },
  }
  if task.is_class:
    predicted = predictions.probabilities.argmax(axis=1)
    result["confusion"] = scores.confusion(
      predictions.targets, predicted, task.num_outputs
    ).tolist()
  return result, draws


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
    draws = bootstrap(
      weighted_scores,
      predictions.people,
      num_resamples=num_resamples,
      report=bar.update,
    )
  metrics = {}
  for name, value in values.items():
    low, high = interval(draws[name])
    metrics[name] = {
      "value": finite_or_none(value),
      "low": finite_or_none(low),
      "high": finite_or_none(high),
    }
  return metrics, draws


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
  report: Callable[[int], object] = lambda num: None,
) -> dict[str, np.ndarray]:
  """Returns scores of resampled data, by drawing whole groups.

  The videos of one person are alike, so intervals from resampling videos would
  be too narrow (Field and Welsh, JRSS B 2007).

  Args:
    measure: maps weights (V, R) to scores (R,) by name.
    groups: V names: the group of each example, such as a person.
    num_resamples: number of draws with replacement.
    seed: seed of the draws: with the same groups the draws are the same.
    report: called with the number of draws done since the last call.

  Returns:
    float64 (R,) by name; NaN where a score is not defined, or if there is a
    single group.
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
  draws = {name: np.concatenate(parts) for name, parts in draws.items()}
  if len(names) < 2:
    draws = {
      name: np.full_like(values, np.nan) for name, values in draws.items()
    }
  return draws


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Returns the percentile interval of draws, (R,); NaN if none is defined."""
  draws = draws[np.isfinite(draws)]
  if not len(draws):
    return float("nan"), float("nan")
  low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
  return float(low), float(high)
