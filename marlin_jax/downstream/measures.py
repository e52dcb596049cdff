"""Scores of predictions, each with a bootstrap interval.

Axes: V videos, K labels, classes or numbers, R draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from marlin_jax.downstream.tasks import Task
from marlin_jax.inference.classifier import rescaled
from marlin_jax.scores import (
  arrays,
  binary,
  bootstrap,
  classes,
  ranking,
  values,
)


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions and true targets of videos.

  Attributes:
    video_ids, people: names of the V videos, and of the person in each.
    targets: (V, K), or (V,) for classes; see `Task.targets`.
    predicted: float64 (V, K), probabilities or numbers.
  """

  video_ids: Sequence[str]
  people: Sequence[str]
  targets: np.ndarray
  predicted: np.ndarray

  @classmethod
  def joined(cls, parts: Sequence[Predictions]) -> Predictions:
    """Returns the predictions of several sets of videos as of one."""
    return cls(
      [video for part in parts for video in part.video_ids],
      [person for part in parts for person in part.people],
      np.concatenate([part.targets for part in parts]),
      np.concatenate([part.predicted for part in parts]),
    )

  def subset(self, rows: np.ndarray) -> Predictions:
    """Returns the predictions of the videos where `rows`, bool (V,), is set."""
    indices = np.flatnonzero(rows)
    return self.of_windows(self.predicted[indices], indices)

  def of_windows(
    self, predicted: np.ndarray, owners: np.ndarray
  ) -> Predictions:
    """Returns other predictions, each with the target of its video.

    Args:
      predicted: float64 (W, K).
      owners: int (W,), the video of each.
    """
    return Predictions(
      [self.video_ids[i] for i in owners],
      [self.people[i] for i in owners],
      self.targets[owners],
      predicted,
    )


def window_auc(
  task: Task, windows: Predictions, num_resamples: int
) -> tuple[dict[str, float | None], np.ndarray]:
  """Returns the AUC of windows, each an example; and its draws.

  What detectors of manipulated videos call the AUC of frames. With several
  labels or classes it is the mean over them.

  Args:
    task: task that was predicted; not of numbers.
    windows: predictions of W windows, with the targets of their videos.
    num_resamples: number of resamples of the bootstrap over people.

  Returns:
    `value`, `low` and `high`, None if not defined; and float64 (R,).
  """
  targets = windows.targets
  if task.is_class:
    is_known = np.isfinite(targets)[:, None]
    one_hot = targets[:, None] == np.arange(task.num_outputs)
    targets = np.where(is_known, one_hot, np.nan)

  def auc(weights: np.ndarray | None) -> dict[str, np.ndarray]:
    columns = [
      ranking.roc_auc(targets[:, k], windows.predicted[:, k], weights)
      for k in range(task.num_outputs)
    ]
    return {"auc": arrays.mean_of_defined(np.stack(columns, axis=-1))}

  draws = bootstrap.draws(auc, windows.people, num_resamples=num_resamples)
  return _with_interval(auc(None)["auc"], draws["auc"]), draws["auc"]


def thresholds(task: Task, val: Predictions, protocol: str) -> np.ndarray:
  """Returns the decision threshold of each label, float64 (K,).

  The paper's protocol uses 0.5, with which a rare label is never predicted. The
  default protocol uses the threshold with the highest balanced accuracy on the
  validation split. Classes need no threshold; theirs is 0.5. Numbers have none.
  """
  if task.is_value:
    return np.empty(0)
  found = np.full(task.num_outputs, 0.5)
  if protocol == "paper" or task.is_class:
    return found
  for k in range(task.num_outputs):
    found[k] = ranking.best_threshold(val.targets[:, k], val.predicted[:, k])
  return found


def temperature(task: Task, val: Predictions) -> float:
  """Returns the temperature that calibrates the probabilities on a split.

  It minimises the cross-entropy of probabilities whose logits are divided by it
  (Guo et al., ICML 2017). Limited to 0.05 to 20, where separable data end.
  Numbers have none: 1.
  """
  from scipy import optimize

  if task.is_value:
    return 1.0

  def loss(log_temperature: float) -> float:
    scaled = rescaled(
      val.predicted, math.exp(log_temperature), is_class=task.is_class
    )
    return task.loss(val.targets, scaled)

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
    thresholds: result of `thresholds`, (K,); or (V, K) where the predictions
      are of several models, without `parts`.
    parts: subsets of the videos by name, bool (V,), to score separately.
    num_resamples: number of resamples of the bootstrap over people.

  Returns:
    `num_videos`, `num_people`; `metrics`: {name: {value, low, high}};
    `per_class`: a dict per label, class or number; `confusion`, for classes;
    `parts`: {name: metrics}. And the draws of each metric, float64 (R,), the
    same people in each draw for all predictions of the same videos.
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
    result["confusion"] = classes.confusion(
      predictions.targets, predictions.predicted.argmax(1), task.num_outputs
    ).tolist()
  return result, draws


def _metrics(task, predictions, thresholds, num_resamples):
  targets, predicted = predictions.targets, predictions.predicted

  def weighted_scores(weights):
    if task.is_value:
      return values.scores(targets, predicted, weights, task.scale)
    if task.is_class:
      return classes.scores(targets, predicted, weights)
    return binary.scores(targets, predicted, thresholds, weights)

  found = weighted_scores(None)
  # Shown only if it takes seconds: for many videos with many labels.
  with tqdm(
    desc="intervals", total=num_resamples, unit="draw", delay=2.0, leave=False
  ) as bar:
    draws = bootstrap.draws(
      weighted_scores,
      predictions.people,
      num_resamples=num_resamples,
      report=bar.update,
    )
  metrics = {
    name: _with_interval(value, draws[name]) for name, value in found.items()
  }
  return metrics, draws


def _with_interval(value, draws: np.ndarray) -> dict[str, float | None]:
  low, high = bootstrap.interval(draws)
  return {
    "value": finite_or_none(value),
    "low": finite_or_none(low),
    "high": finite_or_none(high),
  }


def _per_class(task, predictions, thresholds):
  targets, predicted = predictions.targets, predictions.predicted
  if task.is_value:
    columns = values.per_value(targets, predicted)
  elif task.is_class:
    columns = classes.per_class(targets, predicted)
  else:
    columns = binary.per_label(targets, predicted, thresholds)
    if thresholds.ndim == 1:
      columns["threshold"] = thresholds
  return [
    {"name": name}
    | {
      column: finite_or_none(numbers[i]) for column, numbers in columns.items()
    }
    for i, name in enumerate(task.names)
  ]


def finite_or_none(value: Any) -> float | None:
  """Returns a float for JSON, which cannot hold NaN and infinity."""
  value = float(value)
  return value if math.isfinite(value) else None
