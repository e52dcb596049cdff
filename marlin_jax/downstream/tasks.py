"""Tasks: targets derived from the labels of a data set.

The metadata.json of a data set names the labels of its records, of three kinds:
  binary  K independent attributes, each present or absent;
  class   one of K names;
  value   K numbers.
A task predicts such a label, or one derived from it: classes of a value between
`cuts`, or every class against one of them, `negative`.

Axes: V videos, K labels, classes or numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marlin_jax.inference.classifier import activated
from marlin_jax.records.cli import UserError
from marlin_jax.records.folders import METADATA
from marlin_jax.scores import binary, classes, ranking, values

BINARY, CLASS, VALUE = KINDS = ("binary", "class", "value")
_RULES = ("label", "cuts", "apart", "negative", "only", "scale")
# Of each pair a rule has one.
_EXCLUSIVE = (
  ("cuts", "scale"),
  ("cuts", "negative"),
  ("apart", "scale"),
  ("apart", "negative"),
  ("scale", "negative"),
)
# Classes of numbers by which subsets are stratified.
_NUM_STRATA = 4


class TaskError(UserError):
  """The data set lacks a label for a task; the message lists those it has."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A label to predict.

  Attributes:
    name: name of the task, for tables and messages.
    label: label of the records, from which targets are derived.
    kind: one of KINDS: K independent labels, one of K classes, or K numbers.
    names: names of the K labels, classes or numbers.
    cuts: ascending boundaries of a value; a value equal to a cut belongs to the
      class above it.
    apart: a value that is a class of its own; a value equal to a cut then
      belongs to the class on its side of the cut. None: there is none.
    classes: names of all classes of the label; empty without `negative`.
    negative: class that becomes label 0; all others become 1.
    only: the single class that becomes 1; videos of other classes are left out.
    included: the classes that become 1, as `only`; empty: all.
    scale: least and largest whole number of a rating, whose scores are added;
      see `values.rating_scores`. Empty: none.
  """

  name: str
  label: str
  kind: str
  names: tuple[str, ...]
  cuts: tuple[float, ...] = ()
  apart: float | None = None
  classes: tuple[str, ...] = ()
  negative: str = ""
  only: str = ""
  included: tuple[str, ...] = ()
  scale: tuple[float, ...] = ()

  @property
  def is_class(self) -> bool:
    """True if the target is one of several classes."""
    return self.kind == CLASS

  @property
  def is_value(self) -> bool:
    """True if the targets are numbers."""
    return self.kind == VALUE

  @property
  def sha256(self) -> str:
    """Hash of the definition; the same when attributes are added later."""
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != field.default
    }
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

  def targets(self, values: np.ndarray) -> np.ndarray:
    """Derives the targets from label values.

    Args:
      values: (V, K), values of the label in the records; NaN where unknown.

    Returns:
      float64 (V, K) of 0 and 1, or of numbers; or class numbers (V,). NaN where
      unknown.
    """
    values = values.astype(np.float64)
    unknown = np.isnan(values)
    if self.cuts or self.apart is not None:
      values = np.where(unknown, np.nan, self._places(np.nan_to_num(values)))
    elif self.negative:
      is_positive = values != self.classes.index(self.negative)
      values = np.where(unknown, np.nan, is_positive)
    return values[:, 0] if self.is_class else values

  def _places(self, values: np.ndarray) -> np.ndarray:
    """Returns the class of each value between the cuts, int."""
    # As labels are held: 0.7 would be below the cut 0.7.
    values, cuts = np.float32(values), np.float32(self.cuts)
    above = np.searchsorted(cuts, values, side="right")
    if self.apart is None:
      return above
    # Classes are closed towards the value apart, and one more follows it.
    apart = np.float32(self.apart)
    below = np.searchsorted(cuts, values, side="left")
    places = np.where(values < apart, above, below + 2)
    at = np.searchsorted(cuts, apart)
    return np.where(values == apart, at + 1, places)

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
    """Selects the videos of each positive class that occurs, and the negative.

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
      if number != negative and (values == number).any()
    }

  @property
  def num_outputs(self) -> int:
    return len(self.names)

  def predicted(self, outputs: np.ndarray) -> np.ndarray:
    """Maps outputs (V, K) of a head to float64 predictions.

    Probabilities by sigmoid or softmax; numbers are the outputs themselves.
    """
    return activated(outputs, self.kind)

  def encode(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes targets for a loss.

    Returns:
      float32 (V, K) labels in [0, 1], classes as one-hot rows, or numbers; and
      float32 (V, K), 1 where the label is known.
    """
    if self.is_class:
      targets = classes.one_hot(targets, self.num_outputs)
    known = ~np.isnan(targets)
    labels = np.where(known, targets, 0.0)
    return labels.astype(np.float32), known.astype(np.float32)

  def as_labels(self, targets: np.ndarray) -> np.ndarray:
    """Returns float32 (V, K), one-hot for classes; NaN where unknown."""
    labels, known = self.encode(targets)
    return np.where(known > 0, labels, np.nan)

  def strata(self, targets: np.ndarray) -> np.ndarray:
    """Returns the stratum of each video, for subsets of the same mixture.

    Its class; its rarest label; or the quarter of all videos in which its first
    number is.

    Args:
      targets: result of `targets`.

    Returns:
      int (V,); 0 where the class or number is unknown or no label is 1.
    """
    if self.is_class:
      return np.nan_to_num(targets + 1).astype(int)
    if self.is_value:
      first = targets[:, 0]
      known = ~np.isnan(first)
      if not known.any():
        return np.zeros(len(first), int)
      levels = np.arange(1, _NUM_STRATA) / _NUM_STRATA
      cuts = np.quantile(first[known], levels)
      places = 1 + np.searchsorted(cuts, first, side="right")
      return np.where(known, places, 0)
    present = targets == 1
    by_rarity = np.argsort(present.sum(axis=0), kind="stable")
    rarest = by_rarity[present[:, by_rarity].argmax(axis=1)]
    return np.where(present.any(axis=1), 1 + rarest, 0)

  def losses(self, targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns the mean loss of each label over the videos where it is known.

    Cross-entropies, or squared errors of numbers.

    Args:
      targets: result of `targets`.
      predicted: result of `predicted`.

    Returns:
      float64 (K,), or (1,) for classes; NaN where no video is known.
    """
    labels, known = self.encode(targets)
    if self.is_value:
      losses = np.square(predicted - labels)
    else:
      p = np.clip(predicted, 1e-7, 1 - 1e-7)
      losses = -labels * np.log(p)
      if self.is_class:
        losses, known = losses.sum(axis=1, keepdims=True), known[:, :1]
      else:
        losses -= (1 - labels) * np.log(1 - p)
    num_known = known.sum(axis=0)
    means = (losses * known).sum(axis=0) / np.maximum(num_known, 1)
    return np.where(num_known > 0, means, np.nan)

  def loss(self, targets: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the mean over the labels of `losses`; NaN if none."""
    return _mean_of_finite(self.losses(targets, predicted))

  @property
  def score_name(self) -> str:
    """Name of `score`."""
    return "ccc" if self.is_value else "auc"

  def score(
    self, targets: np.ndarray, predicted: np.ndarray, *, micro: bool
  ) -> float:
    """Returns the score by which models are selected: AUC, of numbers CCC.

    Args:
      targets: result of `targets`.
      predicted: result of `predicted`, float (V, K).
      micro: pool all labels instead of averaging over them. Classes and numbers
        are always averaged.
    """
    if self.is_value:
      return float(values.scores(targets, predicted)["ccc"])
    if self.is_class:
      return float(classes.scores(targets, predicted)["auc"])
    if micro:
      return float(ranking.roc_auc(targets.ravel(), predicted.ravel()))
    return _mean_of_finite(binary.per_label(targets, predicted)["auc"])


def _mean_of_finite(numbers: np.ndarray) -> float:
  numbers = numbers[np.isfinite(numbers)]
  return float(numbers.mean()) if len(numbers) else float("nan")


@dataclasses.dataclass(frozen=True)
class Units:
  """Centre and spread of a task's targets, in which heads are trained.

  Those of labels and classes are 0 and 1.

  Attributes:
    mean, spread: float32 (K,).
  """

  mean: np.ndarray
  spread: np.ndarray

  @classmethod
  def of(cls, task: Task, targets: np.ndarray) -> Units:
    """Returns the mean and standard deviation of the training targets.

    Args:
      task: task of the targets.
      targets: result of `Task.targets`.
    """
    mean = np.zeros(task.num_outputs, np.float32)
    spread = np.ones(task.num_outputs, np.float32)
    if task.is_value:
      for k, column in enumerate(targets.T):
        if len(column := column[~np.isnan(column)]):
          mean[k], spread[k] = column.mean(), column.std()
    return cls(mean, np.where(spread > 0, spread, 1).astype(np.float32))

  def standardised(self, labels: np.ndarray) -> np.ndarray:
    """Maps labels (V, K) to those of a head."""
    return (labels - self.mean) / self.spread

  def folded(self, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a linear layer whose outputs are in the units of the targets.

    Args:
      layer: `kernel` (D, K) and `bias` (K,).
    """
    return {
      "kernel": layer["kernel"] * self.spread,
      "bias": layer["bias"] * self.spread + self.mean,
    }


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
    derive: rules by name: `label`, and `cuts` with or without `apart`,
      `negative` with or without `only`, or `scale`; see `Task`.
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
  _check_rule(name, rule)
  if "/" in name:
    raise TaskError(
      f"task '{name}': expected a name without '/', which names files"
    )
  kind, columns = labels[label]["kind"], tuple(labels[label]["names"])
  cuts = tuple(float(cut) for cut in rule.get("cuts", ()))
  negative, only = rule.get("negative", ""), rule.get("only", "")
  apart, scale = rule.get("apart"), tuple(map(float, rule.get("scale", ())))
  of_values = bool(cuts) or bool(scale) or apart is not None
  expected = VALUE if of_values else CLASS if negative else kind
  if kind != expected or kind not in KINDS:
    raise TaskError(
      f"task '{name}': label '{label}' of {where} is of kind {kind}, and "
      f"{', '.join(sorted({*rule} - {'label'}))} is for kind {expected}"
    )
  if cuts or apart is not None:
    return _between_cuts(name, label, columns, cuts, apart)
  if negative:
    for class_name in filter(None, (negative, only)):
      if class_name not in columns:
        raise TaskError(
          f"task '{name}': label '{label}' of {where} has no class "
          f"'{class_name}', it has {', '.join(columns)}"
        )
    return Task(
      name,
      label,
      BINARY,
      (name,),
      classes=columns,
      negative=negative,
      only=only,
    )
  if scale and not (len(scale) == 2 and scale[0] < scale[1]):
    raise TaskError(
      f"task '{name}': scale {scale}, expected its least and largest number"
    )
  return Task(name, label, kind, columns or (label,), scale=scale)


def _check_rule(name: str, rule: Mapping[str, Any]) -> None:
  """Raises TaskError if parts of a rule are unknown or exclude each other."""
  if unknown := sorted({*rule} - {*_RULES}):
    raise TaskError(
      f"task '{name}': config.derive.{name} has '{unknown[0]}', expected some "
      f"of {', '.join(_RULES)}"
    )
  given = [key for key in _RULES if rule.get(key) not in (None, "", (), [])]
  if "only" in given and "negative" not in given:
    raise TaskError(
      f"task '{name}': only={rule['only']!r} needs the class that becomes 0, "
      "negative"
    )
  for first, second in _EXCLUSIVE:
    if {first, second} <= {*given}:
      raise TaskError(
        f"task '{name}': {first} and {second} make different targets: give one "
        "of them"
      )


def _between_cuts(
  name: str,
  label: str,
  columns: tuple[str, ...],
  cuts: tuple[float, ...],
  apart: float | None,
) -> Task:
  if list(cuts) != sorted(set(cuts)):
    raise TaskError(f"task '{name}': cuts {cuts}, expected ascending numbers")
  if apart in cuts:
    raise TaskError(f"task '{name}': apart={apart:g} is one of the cuts {cuts}")
  if len(cuts) == 1 and apart is None:
    names = tuple(f"{c}>={cuts[0]:g}" for c in columns or (label,))
    return Task(name, label, BINARY, names, cuts)
  if len(columns) > 1:
    raise TaskError(
      f"task '{name}': label '{label}' has {len(columns)} values; several "
      "classes need a label of a single value"
    )
  return Task(name, label, CLASS, _interval_names(cuts, apart), cuts, apart)


def _interval_names(
  cuts: tuple[float, ...], apart: float | None
) -> tuple[str, ...]:
  edges = cuts
  if apart is not None:
    edges = tuple(sorted((*cuts, apart)))
  middle = [f"{a:g}..{b:g}" for a, b in zip(edges, edges[1:], strict=False)]
  names = [f"<{edges[0]:g}", *middle]
  if apart is None:
    return (*names, f">={edges[-1]:g}")
  names.insert(edges.index(apart) + 1, f"={apart:g}")
  return (*names, f">{edges[-1]:g}")
