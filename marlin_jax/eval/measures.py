"""From predictions to numbers, each with its interval.

Axes: V videos, K labels or classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from marlin_jax.downstream import intervals, scores
from marlin_jax.downstream.tasks import Task


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model says of videos, beside what is true.

  Attributes:
    video_ids, people: V names each.
    targets: as from Task.targets.
    probabilities: float64 (V, K).
  """

  video_ids: Sequence[str]
  people: Sequence[str]
  targets: np.ndarray
  probabilities: np.ndarray

  def of(self, rows: np.ndarray) -> Predictions:
    """Those of some videos; rows are bool (V,)."""
    return Predictions(
      [name for name, kept in zip(self.video_ids, rows, strict=True) if kept],
      [name for name, kept in zip(self.people, rows, strict=True) if kept],
      self.targets[rows],
      self.probabilities[rows],
    )


def thresholds(task: Task, val: Predictions, protocol: str) -> np.ndarray:
  """Where each label is cut, float64 (K,).

  The paper cuts at 0.5. A rare label is then never predicted; by default each
  has the cut of the highest balanced accuracy on the validation split. Of
  classes the likeliest is taken in any case.
  """
  cuts = np.full(task.num_outputs, 0.5)
  if protocol == "paper" or task.is_class:
    return cuts
  for k in range(task.num_outputs):
    cuts[k] = scores.best_threshold(val.targets[:, k], val.probabilities[:, k])
  return cuts


def measure(
  task: Task,
  found: Predictions,
  cuts: np.ndarray,
  parts: dict[str, np.ndarray],
  num_resamples: int,
) -> dict[str, Any]:
  """All numbers, ready for JSON: None where one is not defined.

  Args:
    task: what was predicted.
    found: on the test split.
    cuts: from `thresholds`.
    parts: of the videos, bool (V,); each is measured on its own too.
    num_resamples: of the bootstrap over people.

  Returns:
    `metrics`: {name: {value, low, high}}; `per_class`: a dict for each;
    `confusion` (of classes); `parts`: {name: metrics}.
  """
  result = {
    "num_videos": len(found.video_ids),
    "num_people": len(set(found.people)),
    "metrics": _metrics(task, found, cuts, num_resamples),
    "per_class": _per_class(task, found, cuts),
    "parts": {
      name: _metrics(task, found.of(rows), cuts, num_resamples)
      for name, rows in parts.items()
      if rows.any()
    },
  }
  if task.is_class:
    predicted = found.probabilities.argmax(axis=1)
    result["confusion"] = scores.confusion(
      found.targets, predicted, task.num_outputs
    ).tolist()
  return result


def _metrics(task, found, cuts, num_resamples):
  def numbers(weights):
    if task.is_class:
      return scores.class_scores(found.targets, found.probabilities, weights)
    return scores.binary_scores(
      found.targets, found.probabilities, cuts, weights
    )

  values = numbers(None)
  # Seconds of many videos with many labels; of few nobody sees the bar.
  with tqdm(
    desc="intervals", total=num_resamples, unit="draw", delay=2.0, leave=False
  ) as bar:
    ends = intervals.bootstrap(
      numbers, found.people, num_resamples=num_resamples, report=bar.update
    )
  return {
    name: {
      "value": defined(value),
      "low": defined(ends[name][0]),
      "high": defined(ends[name][1]),
    }
    for name, value in values.items()
  }


def _per_class(task, found, cuts):
  if task.is_class:
    columns = scores.per_class(found.targets, found.probabilities)
  else:
    columns = scores.per_label(found.targets, found.probabilities, cuts)
    columns["threshold"] = cuts
  return [
    {"name": name} | {k: defined(values[i]) for k, values in columns.items()}
    for i, name in enumerate(task.names)
  ]


def defined(value: Any) -> float | None:
  """A number for JSON, which has no NaN."""
  value = float(value)
  return value if math.isfinite(value) else None
