"""Encoder, tasks and labelled videos of an evaluation, checked and opened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import prepared_dataset
from marlin_jax.devices import distributed, sharding
from marlin_jax.downstream import feature_table, folds, splits, tasks
from marlin_jax.downstream.feature_table import FeatureTable
from marlin_jax.downstream.folds import Fold
from marlin_jax.downstream.splits import Split, TaskSplit
from marlin_jax.downstream.tasks import Task
from marlin_jax.eval import configuration
from marlin_jax.records.cli import UserError
from marlin_jax.training.configuration import check_attention
from marlin_jax.weights import formats
from marlin_jax.weights.weights import Weights, encoder_sha256

_ROLES = ("train", "val", "test")


class InputError(UserError):
  """The command line names no encoder, or two."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Inputs that are checked before records are read or features computed.

  Attributes:
    data: directory of the data set.
    split_names: name of the split of each role: train, val and test; of folds
      that take all videos, 'all'.
    tasks: tasks to predict.
    tests: the other data sets to score.
    weights: weights of the encoder; None if features are from elsewhere.
    features: features from elsewhere, in place of an encoder.
    mesh: mesh of the devices.
    settings: values that all results of a workdir share.
  """

  data: str
  split_names: dict[str, str]
  tasks: list[Task]
  tests: list[OtherTest]
  weights: Weights | None
  features: FeatureTable | None
  mesh: Mesh
  settings: dict[str, Any]

  def task_of(self, test: str, task: Task) -> Task:
    """Returns a task as defined by another data set."""
    return next(t.tasks[task.name] for t in self.tests if t.name == test)


@dataclasses.dataclass(frozen=True)
class OtherTest:
  """A split of another data set that is scored too.

  Attributes:
    name: PATH:SPLIT, as in the configuration.
    path: directory of the data set.
    split: name of the split.
    fingerprint: see `prepared_dataset.Dataset`.
    tasks: the tasks by name, as the labels of this data set define them.
  """

  name: str
  path: str
  split: str
  fingerprint: str
  tasks: dict[str, Task]


def open_inputs(config: ConfigDict, checkpoint: str, data: str) -> Inputs:
  """Opens and checks everything but the records; see `evaluate`."""
  if bool(checkpoint) == bool(config.features):
    raise InputError(
      "an evaluation needs either an encoder, --checkpoint, or features from "
      "elsewhere, --config.features"
    )
  split_names = _split_names(config, data)
  datasets = {
    role: prepared_dataset.open_joined(data, name)
    for role, name in split_names.items()
  }
  chosen = tasks.make_tasks(
    configuration.split_names(config.tasks),
    tasks.read_labels(data),
    config.derive,
    data,
  )
  for task in chosen:  # raises for classes that it lacks
    task.limited_to(configuration.split_names(config.data.train_classes))
    if config.data.pairs and (task.kind != "binary" or task.num_outputs > 1):
      raise tasks.TaskError(
        f"config.data.pairs pairs videos with and without one label, and task "
        f"'{task.name}' has {task.num_outputs}: expected a task such as "
        "'deepfake' in configs/eval_dfd.py"
      )
  tests = _open_tests(config, chosen)
  weights = features = None
  if config.features:
    features = feature_table.read(config.features, config.pool)
    sha256 = features.sha256
  else:
    with distributed.process_0_first():  # which may download it
      weights = formats.open_encoder(checkpoint, config.random)
    sha256 = encoder_sha256(weights)
  mesh = sharding.make_mesh(**config.mesh)
  platform = mesh.devices.flat[0].platform
  check_attention(config.attention, platform, config.dtype)
  for mode in configuration.TUNED.keys() & set(
    configuration.split_names(config.modes)
  ):
    section = configuration.section_of(mode, config.protocol)
    sharding.check_batch(
      mesh, config[section].batch_size, f"{section}.batch_size"
    )
  settings = configuration.identity(config) | {
    "checkpoint": sha256,
    **{
      f"data.{role}": dataset.fingerprint for role, dataset in datasets.items()
    },
    **{f"data.tests.{test.name}": test.fingerprint for test in tests},
  }
  return Inputs(
    data, split_names, chosen, tests, weights, features, mesh, settings
  )


def _split_names(config: ConfigDict, data: str) -> dict[str, str]:
  """Returns the split of each role; several joined as in 'a+b'."""
  rule = configuration.fold_rule(config.data.folds)
  if not rule.kind or rule.of_classes:
    return {role: config.data[role] for role in _ROLES}
  names = rule.splits or dict.fromkeys(
    name
    for role in _ROLES
    for name in prepared_dataset.split_names(config.data[role])
    if role == "train" or prepared_dataset.has_split(data, name)
  )
  return {"all": "+".join(names)}


def _open_tests(config: ConfigDict, chosen: list[Task]) -> list[OtherTest]:
  """Opens the other data sets.

  Raises:
    DatasetError: there is no such data set or split.
    TaskError: a task has other classes or labels there.
  """
  tests = []
  for path, split in configuration.other_tests(config.data.tests):
    dataset = prepared_dataset.open_joined(path, split)
    labels = tasks.read_labels(path)
    theirs = tasks.make_tasks(
      [task.name for task in chosen], labels, config.derive, path
    )
    for our, their in zip(chosen, theirs, strict=True):
      if (our.names, our.kind) != (their.names, their.kind):
        raise tasks.TaskError(
          f"task '{our.name}' is of {', '.join(our.names)}, and in {path} of "
          f"{', '.join(their.names)}: scores would not compare"
        )
    by_name = {task.name: task for task in theirs}
    tests.append(
      OtherTest(f"{path}:{split}", path, split, dataset.fingerprint, by_name)
    )
  return tests


@dataclasses.dataclass(frozen=True)
class Videos:
  """Labelled videos of an evaluation.

  Attributes:
    splits: splits by role.
    folds: videos of each task, by task name, fold and role. The only fold of an
      evaluation without is named ''.
    others: videos of each task in the other data sets, by task name and name of
      the test.
    warnings: lines about splits that are not independent, or do not show what
      a task is about.
  """

  splits: dict[str, Split]
  folds: dict[str, dict[str, Fold]]
  others: dict[str, dict[str, TaskSplit]]
  warnings: list[str]


def open_videos(inputs: Inputs, config: ConfigDict, cache: Path) -> Videos:
  """Opens the splits and selects the videos of each task."""
  by_name = {
    name: splits.open_split(
      inputs.data, name, cache, all_tracks=config.data.all_tracks
    )
    for name in dict.fromkeys(inputs.split_names.values())
  }
  by_role = {role: by_name[name] for role, name in inputs.split_names.items()}
  others = {
    test.name: splits.open_split(
      test.path, test.split, cache, all_tracks=config.data.all_tracks
    )
    for test in inputs.tests
  }
  if inputs.features is not None:
    _check_distinct(inputs.features, [*by_name.values(), *others.values()])
  of_tasks = {task.name: _folds(task, by_role, config) for task in inputs.tasks}
  return Videos(
    by_role,
    of_tasks,
    {
      task.name: {
        test.name: splits.task_split(test.tasks[task.name], others[test.name])
        for test in inputs.tests
      }
      for task in inputs.tasks
    },
    splits.split_warnings(by_role.values())
    + _fold_warnings(by_role, config)
    + [x for split in by_name.values() for x in splits.record_warnings(split)]
    + [
      f"{name}: {line}"
      for name, split in others.items()
      for line in [
        *splits.record_warnings(split),
        *splits.split_warnings([by_role["train"], split]),
        *splits.shared_warnings(by_role["val"], split),
      ]
    ]
    + list(_coverage_warnings(inputs.tasks, of_tasks)),
  )


def _check_distinct(features: FeatureTable, opened: list[Split]) -> None:
  """Raises FeatureTableError if two videos would get the same features."""
  owners: dict[str | None, tuple[str, str]] = {}
  for split in opened:
    path = os.path.realpath(split.dataset.path)
    for video_id in split.video_ids:
      name = features.name_of(video_id)
      other_path, other_id = owners.setdefault(name, (path, video_id))
      if name is not None and (other_path, other_id) != (path, video_id):
        raise feature_table.FeatureTableError(
          f"{features.source} holds features by id, and both {other_id!r} of "
          f"{other_path} and {video_id!r} of {path} would get those of "
          f"{name!r}. Name them with their suffixes; evaluate another data set "
          "by itself, or with an encoder"
        )


def _coverage_warnings(
  chosen: list[Task], of_tasks: dict[str, dict[str, Fold]]
) -> Iterator[str]:
  """Yields a line for each way in which splits are too small for a task.

  What folds test is pooled, and not too small.
  """
  for task in chosen:
    by_fold = of_tasks[task.name]
    for role in ("train", "val"):
      lines = [
        line
        for name, fold in by_fold.items()
        if name
        for line in splits.label_warnings(
          task, fold[role], f"'{role}' of fold '{name}'"
        )
      ]
      if lines:
        yield f"{lines[0]}; such folds: {len(lines)} of {len(by_fold)}"
    for role, videos in by_fold.get("", {}).items():
      yield from splits.label_warnings(task, videos)
      if role == "test" and len(set(videos.people)) == 1:
        yield (
          f"task '{task.name}': '{videos.split.name}' shows one person: scores "
          "have no intervals"
        )


def _fold_warnings(by_role: dict[str, Split], config: ConfigDict) -> list[str]:
  if configuration.fold_rule(config.data.folds).kind != "splits":
    return []
  return list(folds.warnings(by_role["all"]))


def _folds(
  task: Task, by_role: dict[str, Split], config: ConfigDict
) -> dict[str, Fold]:
  """Returns the videos of a task by fold."""
  rule = configuration.fold_rule(config.data.folds)
  if rule.of_classes:
    single = rule.kind == "single_class"
    return folds.of_classes(task, by_role, single=single)
  if rule.kind == "people":
    return folds.of_people(
      task, by_role["all"], rule.num_groups, config.data.fold_val
    )
  if rule.kind == "splits":
    return folds.of_splits(
      task, by_role["all"], rule.splits, config.data.fold_val
    )
  classes = configuration.split_names(config.data.train_classes)
  return {
    "": {
      role: splits.task_split(
        task if role == "test" else task.limited_to(classes), split
      )
      for role, split in by_role.items()
    }
  }
