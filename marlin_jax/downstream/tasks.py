"""Tasks: targets derived from the labels of a data set.

The metadata.json of a data set names the labels of its records, of three kinds:
  binary  K independent attributes, each present or absent;
  class   one of K names;
  value   K numbers.
A task predicts such a label, or one derived from it: classes of a value between
`cuts`, or every class against one of them, `negative`.

Axes: V videos, K labels or classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marlin_jax.inference.classifier import activated
from marlin_jax.records.cli import UserError
from marlin_jax.records.folders import METADATA
from marlin_jax.scores import binary, classes, ranking

KINDS = ("binary", "class", "value")


class TaskError(UserError):
  """The data set lacks a label for a task; the message lists those it has."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A label to predict.

  Attributes:
    name: name of the task, for tables and messages.
    label: label of the records, from which targets are derived.
    is_class: the target is one of several classes, not K independent labels.
    names: names of the K labels or classes.
    cuts: ascending boundaries of a value; a value equal to a cut belongs to the
      class above it.
    classes: names of all classes of the label; empty without `negative`.
    negative: class that becomes label 0; all others become 1.
    only: the single class that becomes 1; videos of other classes are left out.
    included: the classes that become 1, as `only`; empty: all.
  """

  name: str
  label: str
  is_class: bool
  names: tuple[str, ...]
  cuts: tuple[float, ...] = ()
  classes: tuple[str, ...] = ()
  negative: str = ""
  only: str = ""
  included: tuple[str, ...] = ()

  def targets(self, values: np.ndarray) -> np.ndarray:
    """Derives the targets from label values.

    Args:
      values: (V, K), values of the label in the records; NaN where unknown.

    Returns:
      float64 (V, K) of 0 and 1, or class numbers (V,). NaN where unknown.
    """
    values = values.astype(np.float64)
    unknown = np.isnan(values)
    if self.cuts:
      places = np.searchsorted(self.cuts, np.nan_to_num(values), side="right")
      values = np.where(unknown, np.nan, places)
    elif self.negative:
      is_positive = values != self.classes.index(self.negative)
      values = np.where(unknown, np.nan, is_positive)
    return values[:, 0] if self.is_class else values

  def chosen(self, values: np.ndarray) -> np.ndarray:
    """Selects the videos of the task.

    Args:
      values: as for `targets`.

    Returns:
      bool (V,).
    """
    known = ~np.isnan(values).all(axis=1)
    names = (self.only,) if self.only else self.included
    if not names:
      return known
    numbers = [self.classes.index(name) for name in (self.negative, *names)]
    return known & np.isin(values[:, 0], numbers)

  def limited_to(self, classes: Sequence[str]) -> Task:
    """Returns the task on videos of the negative class and of `classes`.

    Args:
      classes: names of positive classes; all if empty.

    Raises:
      TaskError: the task has no negative class, or no such classes.
    """
    if not classes:
      return self
    if not self.negative or self.only:
      raise TaskError(
        f"task '{self.name}' has no positive classes to choose from, and "
        f"config.data.train_classes names {', '.join(classes)}"
      )
    positive = [name for name in self.classes if name != self.negative]
    if unknown := sorted({*classes} - {*positive}):
      raise TaskError(
        f"config.data.train_classes names '{unknown[0]}', and task "
        f"'{self.name}' has {', '.join(positive)}"
      )
    return dataclasses.replace(self, included=tuple(classes))

  def parts(self, values: np.ndarray) -> dict[str, np.ndarray]:
    """Selects, for each positive class, its videos and the negative ones.

    Args:
      values: see `targets`.

    Returns:
      bool (V,) by class; empty unless several classes are positive.
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
    """Maps logits (V, K) to float64 probabilities: sigmoid or softmax."""
    return activated(logits, self.is_class)

  def encode(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes targets for a loss.

    Returns:
      float32 (V, K) labels in [0, 1], classes as one-hot rows; and float32
      (V, K), 1 where the label is known.
    """
    if self.is_class:
      targets = classes.one_hot(targets, self.num_outputs)
    known = ~np.isnan(targets)
    labels = np.where(known, targets, 0.0)
    return labels.astype(np.float32), known.astype(np.float32)

  def cross_entropies(
    self, targets: np.ndarray, probabilities: np.ndarray
  ) -> np.ndarray:
    """Returns the mean loss of each label over the videos where it is known.

    Returns:
      float64 (K,), or (1,) for classes; NaN where no video is known.
    """
    labels, known = self.encode(targets)
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    losses = -labels * np.log(p)
    if self.is_class:
      losses, known = losses.sum(axis=1, keepdims=True), known[:, :1]
    else:
      losses -= (1 - labels) * np.log(1 - p)
    num_known = known.sum(axis=0)
    means = (losses * known).sum(axis=0) / np.maximum(num_known, 1)
    return np.where(num_known > 0, means, np.nan)

  def cross_entropy(
    self, targets: np.ndarray, probabilities: np.ndarray
  ) -> float:
    """Returns the mean over the labels of `cross_entropies`; NaN if none."""
    means = self.cross_entropies(targets, probabilities)
    means = means[np.isfinite(means)]
    return float(means.mean()) if len(means) else float("nan")

  def auc(
    self, targets: np.ndarray, probabilities: np.ndarray, *, micro: bool
  ) -> float:
    """Returns the AUC by which models are selected.

    Args:
      targets: result of `targets`.
      probabilities: float (V, K).
      micro: pool all labels instead of averaging over them. Classes are always
        averaged.
    """
    if self.is_class:
      return float(classes.scores(targets, probabilities)["auc"])
    if micro:
      return float(ranking.roc_auc(targets.ravel(), probabilities.ravel()))
    aucs = binary.per_label(targets, probabilities)["auc"]
    aucs = aucs[np.isfinite(aucs)]
    return float(aucs.mean()) if len(aucs) else float("nan")


def read_labels(path: str) -> dict[str, dict[str, Any]]:
  """Returns the labels of a data set from its metadata.json.

  Args:
    path: directory of a prepared data set.

  Returns:
    {label: {"kind": one of KINDS, "names": column names}}.
  """
  metadata = json.loads((epath.Path(path) / METADATA).read_text())
  return metadata.get("labels", {})


def describe_labels(labels: Mapping[str, Mapping[str, Any]]) -> str:
  """Lists labels with their kinds, for messages."""
  return (
    ", ".join(f"{name} ({v['kind']})" for name, v in sorted(labels.items()))
    or "none at all: prepare it with labels"
  )


def make_tasks(
  names: Sequence[str],
  labels: Mapping[str, Mapping[str, Any]],
  derive: Mapping[str, Mapping[str, Any]],
  where: str,
) -> list[Task]:
  """Returns the tasks of these names.

  Args:
    names: keys of `derive`, or labels of the data set.
    labels: result of `read_labels`.
    derive: rules by name: `label` and `cuts`, or `label`, `negative` and
      optionally `only`.
    where: path of the data set, for messages.

  Raises:
    TaskError: there is no such label, or it does not fit its rule.
  """
  return [
    make_task(name, labels, derive.get(name, {}), where) for name in names
  ]


def make_task(
  name: str,
  labels: Mapping[str, Mapping[str, Any]],
  rule: Mapping[str, Any],
  where: str,
) -> Task:
  """Returns a single task.

  Args:
    name: name of the task.
    labels: labels of the data set, from `read_labels`.
    rule: derives the target from a label, see `make_tasks`; {}: the label is
      the target.
    where: path of the data set, for messages.

  Raises:
    TaskError: there is no such label, or it does not fit the rule.
  """
  label = rule.get("label", name)
  if label not in labels:
    raise TaskError(
      f"task '{name}' needs the label '{label}', and {where} has "
      f"{describe_labels(labels)}. Name one of them in config.tasks"
    )
  kind, columns = labels[label]["kind"], tuple(labels[label]["names"])
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
      f"task '{name}': label '{label}' of {where} is a value; give the "
      f"boundaries of its classes, e.g. --config.derive.{name}.cuts='(0.0,)' "
      f"beside .label={label}"
    )
  if list(cuts) != sorted(set(cuts)):
    raise TaskError(f"task '{name}': cuts {cuts}, expected ascending numbers")
  if len(cuts) > 1:
    if len(columns) > 1:
      raise TaskError(
        f"task '{name}': label '{label}' has {len(columns)} values; several "
        "cuts need a label of a single value"
      )
    return Task(name, label, True, _interval_names(cuts), cuts)
  if cuts:
    names = tuple(f"{c}>={cuts[0]:g}" for c in columns or (label,))
    return Task(name, label, False, names, cuts)
  if negative:
    for class_name in filter(None, (negative, only)):
      if class_name not in columns:
        raise TaskError(
          f"task '{name}': label '{label}' of {where} has no class "
          f"'{class_name}', it has {', '.join(columns)}"
        )
    return Task(name, label, False, (name,), (), columns, negative, only)
  return Task(name, label, kind == "class", columns)


def _interval_names(cuts: tuple[float, ...]) -> tuple[str, ...]:
  middle = (f"{a:g}..{b:g}" for a, b in zip(cuts, cuts[1:], strict=False))
  return (f"<{cuts[0]:g}", *middle, f">={cuts[-1]:g}")
