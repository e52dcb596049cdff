"""What is predicted: from the labels of a data set to targets.

A data set's metadata.json says what labels its records have, and of which kind:
  binary  K attributes that are there or not;
  class   one of several names;
  value   numbers.
A task is such a label, or is derived from one: classes of a value between
`cuts`, or everything but one class, `negative`, against it.

Axes: V videos, K labels or classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marlin_jax.downstream import scores
from marlin_jax.downstream.labelled import Split
from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

KINDS = ("binary", "class", "value")
_RULES = ("label", "cuts", "negative", "only")


class TaskError(UserError):
  """The data set does not have what is asked for; the message says what has."""


@dataclasses.dataclass(frozen=True)
class Task:
  """One thing to predict.

  Attributes:
    name: of the task, for people.
    label: of the records, that it is made of.
    is_class: one of several classes, not K independent labels.
    names: of the K labels, or classes.
    cuts: of a value; what is at least a cut is in the next class.
    classes: names of the classes that `negative` is one of.
    negative: the class that is label 0; all others are 1.
    only: the one class that is 1; videos of the rest are left out.
  """

  name: str
  label: str
  is_class: bool
  names: tuple[str, ...]
  cuts: tuple[float, ...] = ()
  classes: tuple[str, ...] = ()
  negative: str = ""
  only: str = ""

  def targets(self, values: np.ndarray) -> np.ndarray:
    """What is true of each video.

    Args:
      values: (V, K), of the label in the records; NaN where unknown.

    Returns:
      float64 (V, K) of 0 and 1; or of classes (V,), their numbers. NaN where
      unknown.
    """
    values = values.astype(np.float64)
    unknown = np.isnan(values)
    if self.cuts:
      found = np.searchsorted(self.cuts, np.nan_to_num(values), side="right")
      values = np.where(unknown, np.nan, found)
    elif self.negative:
      values = np.where(
        unknown, np.nan, values != self.classes.index(self.negative)
      )
    return values[:, 0] if self.is_class else values

  def chosen(self, values: np.ndarray) -> np.ndarray:
    """Says which videos the task is about: bool (V,).

    Args:
      values: as for `targets`.
    """
    known = ~np.isnan(values).all(axis=1)
    if not self.only:
      return known
    kept = [self.classes.index(name) for name in (self.negative, self.only)]
    return known & np.isin(values[:, 0], kept)

  def parts(self, values: np.ndarray) -> dict[str, np.ndarray]:
    """The videos of each class with those of the negative one: bool (V,).

    Args:
      values: as for `targets`.
    """
    if not self.negative or self.only:
      return {}
    negative = self.classes.index(self.negative)
    return {
      name: np.isin(values[:, 0], (negative, number))
      for number, name in enumerate(self.classes)
      if number != negative
    }

  @property
  def num_outputs(self) -> int:
    return len(self.names)

  def probabilities(self, logits: np.ndarray) -> np.ndarray:
    """float64 (V, K), of each label or class."""
    logits = logits.astype(np.float64)
    if not self.is_class:
      return 0.5 * (1 + np.tanh(logits / 2))
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

  def encode(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets for a loss.

    Returns:
      float32 (V, K) in [0, 1], and float32 (V, K), 1 where it is known.
    """
    if self.is_class:
      targets = scores.one_hot(targets, self.num_outputs)
    known = ~np.isnan(targets)
    wanted = np.where(known, targets, 0.0)
    return wanted.astype(np.float32), known.astype(np.float32)

  def cross_entropy(
    self, targets: np.ndarray, probabilities: np.ndarray
  ) -> float:
    """Mean over what is known, as the loss of a training; NaN of nothing."""
    wanted, known = self.encode(targets)
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    each = -wanted * np.log(p)
    if self.is_class:
      return float(each.sum() / known[:, 0].sum())
    each -= (1 - wanted) * np.log(1 - p)
    return float((each * known).sum() / known.sum())

  def auc(
    self, targets: np.ndarray, probabilities: np.ndarray, *, micro: bool
  ) -> float:
    """What a model is chosen by; of classes the macro average in any case."""
    if self.is_class:
      return float(scores.class_scores(targets, probabilities)["auc"])
    if micro:
      return float(scores.roc_auc(targets.ravel(), probabilities.ravel()))
    each = scores.per_label(targets, probabilities)["auc"]
    each = each[np.isfinite(each)]
    return float(each.mean()) if len(each) else float("nan")


def known_labels(path: str) -> dict[str, dict[str, Any]]:
  """What metadata.json of a data set says about labels.

  Args:
    path: directory of a prepared data set.
  """
  meta = json.loads((epath.Path(path) / folders.METADATA).read_text())
  return meta.get("labels", {})


def make_tasks(
  names: Sequence[str],
  known: Mapping[str, Mapping[str, Any]],
  derive: Mapping[str, Mapping[str, Any]],
  where: str,
) -> list[Task]:
  """The tasks of these names.

  Args:
    names: keys of `derive`, or labels of the data set.
    known: from `known_labels`.
    derive: rules by name: `label` and `cuts`, or `label`, `negative` and, where
      wanted, `only`.
    where: the data set, for messages.

  Raises:
    TaskError: there is no such label, or it does not fit its rule.
  """
  return [make_task(name, known, derive.get(name, {}), where) for name in names]


def make_task(
  name: str,
  known: Mapping[str, Mapping[str, Any]],
  rule: Mapping[str, Any],
  where: str,
) -> Task:
  """One of `make_tasks`; `rule` is empty for a label as it is."""
  label = rule.get("label", name)
  if label not in known:
    there = ", ".join(f"{k} ({v['kind']})" for k, v in sorted(known.items()))
    raise TaskError(
      f"task '{name}' needs the label '{label}', and {where} has "
      + (there or "none at all: prepare it with labels")
      + ". Name one of them in config.tasks"
    )
  kind, columns = known[label]["kind"], tuple(known[label]["names"])
  cuts = tuple(float(cut) for cut in rule.get("cuts", ()))
  negative, only = rule.get("negative", ""), rule.get("only", "")
  expected = "value" if cuts else "class" if negative else kind
  if kind != expected or kind not in KINDS:
    raise TaskError(
      f"task '{name}': label '{label}' of {where} is of kind {kind}, and "
      f"{'cuts are' if cuts else 'negative is'} for kind {expected}"
    )
  if kind == "value" and not cuts:
    raise TaskError(
      f"task '{name}': label '{label}' of {where} is a value; say where its "
      f"classes end, e.g. --config.derive.{name}.cuts='(0.0,)' beside "
      f".label={label}"
    )
  if list(cuts) != sorted(set(cuts)):
    raise TaskError(f"task '{name}': cuts {cuts}, expected ascending ones")
  if len(cuts) > 1:
    if len(columns) > 1:
      raise TaskError(
        f"task '{name}': several cuts of {len(columns)} values; label "
        f"'{label}' must be one"
      )
    return Task(name, label, True, _between(cuts), cuts)
  if cuts:
    names = tuple(f"{c}>={cuts[0]:g}" for c in columns or (label,))
    return Task(name, label, False, names, cuts)
  if negative:
    for asked in filter(None, (negative, only)):
      if asked not in columns:
        raise TaskError(
          f"task '{name}': label '{label}' of {where} has no class "
          f"'{asked}', it has {', '.join(columns)}"
        )
    return Task(name, label, False, (name,), (), columns, negative, only)
  return Task(name, label, kind == "class", columns)


def _between(cuts: tuple[float, ...]) -> tuple[str, ...]:
  middle = (f"{a:g}..{b:g}" for a, b in zip(cuts, cuts[1:], strict=False))
  return (f"<{cuts[0]:g}", *middle, f">={cuts[-1]:g}")


@dataclasses.dataclass(frozen=True)
class Part:
  """Videos of a split that a task is about.

  Attributes:
    split: all videos of the split.
    rows: int (V,), numbers of the videos in the split.
    targets: targets of the videos; see `Task.targets`.
  """

  split: Split
  rows: np.ndarray
  targets: np.ndarray


def part_of(task: Task, split: Split) -> Part:
  """Returns the videos of a split that a task is about.

  Raises:
    TaskError: the label is unknown for all videos.
  """
  values = split.labels.get(task.label)
  if values is None:
    values = np.full((len(split), 1), np.nan)
  rows = np.flatnonzero(task.chosen(values))
  if not len(rows):
    raise TaskError(
      f"task '{task.name}': label '{task.label}' is unknown for all "
      f"{len(split)} videos of split '{split.name}'"
    )
  return Part(split, rows, task.targets(values[rows]))
