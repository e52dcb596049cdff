"""Folds of a cross-validation: which videos train, choose and test.

  fold1,fold2,...    splits of these names, as published for DFEW and MAFW: each
                     is tested by models of the others
  people:K           K groups of people of equal size, in the order of their
                     names, each tested by models of the others
  leave_person_out   as many groups as people
  leave_class_out    each positive class is tested by a model of the others
  single_class       all classes are tested by a model of each positive one

The first three take all videos, and set part of the people of the training
folds apart to choose on. The last two keep the splits for training, choice and
test; they are for deepfakes: unseen manipulations, and each against each.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from marlin_jax.downstream import low_data, splits
from marlin_jax.downstream.splits import Split, TaskSplit
from marlin_jax.downstream.tasks import Task, TaskError
from marlin_jax.records.cli import counted

# The videos of a fold by role: 'train', 'val', to choose on, and 'test'.
Fold = dict[str, TaskSplit]


def of_classes(
  task: Task, by_role: Mapping[str, Split], *, single: bool
) -> dict[str, Fold]:
  """Returns, by name, a fold for each positive class of a task.

  Classes without videos to train or test on, such as manipulations that were
  not prepared, have none.

  Args:
    task: a task with a negative class.
    by_role: splits to train, choose and test on.
    single: train on this class and test on all; else train on the others and
      test on this one.

  Raises:
    TaskError: the task has fewer than two positive classes, or no videos of
      any where they are needed.
  """
  positive = [name for name in task.classes if name != task.negative]
  if not task.negative or task.only or len(positive) < 2:
    raise TaskError(
      f"config.data.folds: task '{task.name}' has no two positive classes to "
      "train and test on, as 'deepfake' in configs/eval_dfd.py has"
    )
  found = {}
  for name in positive:
    others = [other for other in positive if other != name]
    trained, tested = ([name], positive) if single else (others, [name])
    fold = {
      role: splits.task_split(
        task.limited_to(tested if role == "test" else trained), split
      )
      for role, split in by_role.items()
    }
    if all((fold[role].targets == 1).any() for role in ("train", "test")):
      found[name] = fold
  if not found:
    raise TaskError(
      f"config.data.folds: task '{task.name}' has no video of "
      f"{', '.join(positive)} to train on, or none to test on"
    )
  return found


def of_splits(
  task: Task, split: Split, names: Sequence[str], val_ratio: float
) -> dict[str, Fold]:
  """Returns, by name, a fold for each of several splits.

  Args:
    task: task of the videos.
    split: the splits as one, 'fold1+fold2+fold3'.
    names: their names.
    val_ratio: share of the people in the training folds to choose on.

  Raises:
    TaskError: there are too few people.
  """
  videos = splits.task_split(task, split)
  parts = np.array([split.parts[row] for row in videos.rows])
  return _each(task, videos, {n: parts == n for n in names}, val_ratio)


def of_people(
  task: Task, split: Split, num_groups: int, val_ratio: float
) -> dict[str, Fold]:
  """Returns, by name, a fold for each group of people, in their names' order.

  Args:
    task, split, val_ratio: see `of_splits`.
    num_groups: number of groups; 0: one for each person.

  Raises:
    TaskError: there are too few people.
  """
  videos = splits.task_split(task, split)
  people = np.array(videos.people)
  names = np.unique(people)
  num = num_groups or len(names)
  if num > len(names):
    raise TaskError(
      f"config.data.folds=people:{num}: the videos of task '{task.name}' show "
      f"{counted(len(names), 'person')}"
    )
  digits = len(str(num))
  groups = {
    f"people{number:0{digits}}": np.isin(people, group)
    for number, group in enumerate(np.array_split(names, num), 1)
  }
  return _each(task, videos, groups, val_ratio)


def _each(
  task: Task,
  videos: TaskSplit,
  groups: Mapping[str, np.ndarray],
  val_ratio: float,
) -> dict[str, Fold]:
  """Returns, by name, a fold for each group of videos, bool (V,)."""
  found = {}
  for name, tested in groups.items():
    if not tested.any():  # the label is unknown there
      continue
    rest = videos.subset(np.flatnonzero(~tested))
    num_people = len(set(rest.people))
    if num_people < 2:
      raise TaskError(
        f"config.data.folds: without fold '{name}' there are videos of "
        f"{counted(num_people, 'person')} for task '{task.name}'; expected two "
        "or more, to train and to choose on"
      )
    chosen = low_data.take(val_ratio, task.strata(rest.targets), rest.people, 0)
    trained = np.setdiff1d(np.arange(len(rest)), chosen)
    if not len(trained):
      raise TaskError(
        f"config.data.fold_val={val_ratio:g} leaves no video to train on "
        f"beside fold '{name}' of task '{task.name}'"
      )
    found[name] = {
      "train": rest.subset(trained),
      "val": rest.subset(chosen),
      "test": videos.subset(np.flatnonzero(tested)),
    }
  return found


def warnings(split: Split) -> Iterator[str]:
  """Yields a line for each two joined splits that share people."""
  people = collections.defaultdict(set)
  for part, subject in zip(split.parts, split.subject_ids, strict=True):
    people[part].add(subject)
  for first, second in itertools.combinations(people, 2):
    if common := people[first] & people[second] - {""}:
      yield (
        f"'{first}' and '{second}' share {counted(len(common), 'person')} "
        f"(e.g. {min(common)!r}): scores are too high"
      )
