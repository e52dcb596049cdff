"""Linear probe and nearest neighbours on a bounded set of labelled videos.

Small and fast beside the evaluations of eval/: a fixed set of videos, one
penalty, no intervals. The encoder is any function from clips to features; in
training it is the network being trained, on any mesh and with any number of
processes. With weights from a file:

  weights = formats.read(path)
  data = quick_probe.open_data(config.probe, weights.architecture, DATASET)
  encode = clip_features.FrozenEncoder(weights, mesh, "float32", "auto")
  quick_probe.QuickProbe(data, config.probe, mesh, num_threads=4).scores(encode)

Axes: B clips, V videos, W windows, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  feature_cache,
  linear_probe,
  low_data,
  splits,
  tasks,
)
from marlin_jax.downstream.splits import Split, TrackWindow
from marlin_jax.downstream.tasks import Task, TaskError
from marlin_jax.inference import nearest_neighbours
from marlin_jax.scores import binary, classes
from marlin_jax.weights.architecture import Architecture

_TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO
_MAX_ITERATIONS = 200
# Scores that need no threshold; balanced accuracy only for classes.
_BINARY_SCORES = ("auc", "average_precision", "accuracy")
_CLASS_SCORES = (*_BINARY_SCORES, "balanced_accuracy")


@dataclasses.dataclass(frozen=True)
class Examples:
  """Videos of a split and the windows that represent them.

  Attributes:
    split: split that holds the videos.
    targets: targets of the V videos; see `Task.targets`.
    windows: W windows, those of a video side by side.
    owners: int (W,), in [0, V), ascending: the video of each window.
  """

  split: Split
  targets: np.ndarray
  windows: list[TrackWindow]
  owners: np.ndarray

  def __str__(self) -> str:
    return (
      f"{len(self.targets)} of {len(self.split)} videos of "
      f"'{self.split.name}' in {len(self.windows)} windows"
    )


@dataclasses.dataclass(frozen=True)
class Data:
  """Task and videos of a probe.

  Attributes:
    task: label to predict.
    train, test: videos to fit on, and videos to score.
    architecture: sets the windows and the size of their frames.
    warnings: a line for each problem with the splits, such as shared people or
      a class that is missing.
  """

  task: Task
  train: Examples
  test: Examples
  architecture: Architecture
  warnings: list[str]


def open_task(config: ConfigDict, path: str) -> Task:
  """Returns the task of `config.label`; reads no record.

  Args:
    config: section `probe` of a training configuration.
    path: directory of a labelled data set.

  Raises:
    DatasetError: there is no data set, or it lacks a split.
    TaskError: the data set has no such label, or the label is a value.
  """
  prepared_dataset.open_joined(path, config.split)
  labels = tasks.read_labels(path)
  if labels.get(config.label, {"kind": "value"})["kind"] == "value":
    raise TaskError(
      f"config.probe.label={config.label!r}: expected a label of kind binary "
      f"or class, and {path} has {tasks.describe_labels(labels)}"
    )
  prepared_dataset.open_joined(path, config.eval_split)
  return tasks.make_task(config.label, labels, {}, path)


def open_data(
  config: ConfigDict,
  architecture: Architecture,
  path: str,
  cache: Path | None = None,
) -> Data:
  """Chooses the videos of both splits; see `splits.open_split`.

  Args:
    config, path: see `open_task`.
    architecture: architecture of the encoder.
    cache: see `splits.open_split`.

  Raises:
    DatasetError: as `open_task`.
    TaskError: as `open_task`, and if the label is unknown for all videos.
  """
  task = open_task(config, path)
  train, test = (
    splits.open_split(path, split, cache)
    for split in (config.split, config.eval_split)
  )
  train_examples, test_examples = (
    _examples(
      task, split, architecture.clip, config.num_videos, config.num_windows
    )
    for split in (train, test)
  )
  warnings = splits.split_warnings((train, test))
  for split in (train, test):
    warnings += splits.label_warnings(task, splits.task_split(task, split))
  return Data(task, train_examples, test_examples, architecture, warnings)


def _examples(task, split, clip, num_videos, num_windows) -> Examples:
  """Chooses videos, stratified by target, and windows spread over each."""
  videos = splits.task_split(task, split)
  order = low_data.nested_order(
    task.strata(videos.targets), videos.people, seed=0
  )
  chosen = np.sort(np.concatenate(order)[:num_videos])
  videos = videos.subset(chosen)
  windows, owners = clip_batches.windows_of(videos, clip, num_windows)
  return Examples(split, videos.targets, windows, owners)


class QuickProbe:
  """Fits and scores on the same videos at every call."""

  def __init__(
    self, data: Data, config: ConfigDict, mesh: Mesh, *, num_threads: int
  ):
    """Initialises the probe without reading a record.

    Args:
      data: result of `open_data`.
      config: section `probe` of a training configuration.
      mesh: devices, over which clips are spread.
      num_threads: number of reader threads.
    """
    self._data, self._config = data, config
    self._num_threads = num_threads
    self._batch_size = clip_batches.rounded_batch_size(config.batch_size, mesh)
    self._rows = loader.own_rows(
      sharding.batch_sharding(mesh), self._batch_size
    )

  def scores(
    self,
    encode: Callable[[np.ndarray], jax.Array],
    report: Callable[[int], object] = lambda num: None,
  ) -> dict[str, float]:
    """Fits linear probe and neighbours on one split, scores them on the other.

    Called by all processes together; each fits for itself, on the same
    features.

    Args:
      encode: maps this process's clips of a batch, uint8 (b, T, S, S, 3), to
        the features of the whole batch, float32 (B, D).
      report: called with the number of windows encoded since the last call.

    Returns:
      `probe/NAME` and `knn/NAME`: `loss`, the cross-entropy, and scores of
      `binary.scores` or `classes.scores`; NaN where undefined, and all of them
      where a feature is not finite.

    Raises:
      DatasetError: a record is damaged.
    """
    task, train, test = self._data.task, self._data.train, self._data.test
    x, test_x = (
      self._features(encode, examples, report) for examples in (train, test)
    )
    if not (np.isfinite(x).all() and np.isfinite(test_x).all()):
      # Not an error: a run can go on.
      names = ("loss", *_names(task))
      return {f"{m}/{n}": np.nan for m in ("probe", "knn") for n in names}
    linear = linear_probe.fit(
      task,
      x,
      train.targets,
      (self._config.penalty,),
      lambda probe: np.zeros(1),  # a single penalty: nothing to choose
      _MAX_ITERATIONS,
    )
    neighbours = nearest_neighbours.predict(
      test_x,
      x,
      *task.encode(train.targets),
      k=self._config.k,
      temperature=_TEMPERATURE,
    )
    probabilities = {
      "probe": task.predicted(linear.logits(test_x)),
      "knn": neighbours,
    }
    return {
      f"{method}/{name}": value
      for method, predicted in probabilities.items()
      for name, value in _scores(task, test.targets, predicted).items()
    }

  def _features(self, encode, examples: Examples, report) -> np.ndarray:
    """Returns float32 (V, D), means over the windows of each video."""
    architecture = self._data.architecture
    batches = clip_batches.window_batches(
      clip_batches.ClipReader(
        examples.split, architecture.clip, architecture.image_size
      ),
      examples.windows,
      self._batch_size,
      self._num_threads,
      rows=self._rows,
    )
    features = feature_cache.batch_features(
      encode, batches, len(examples.windows), report
    )
    num_videos = len(examples.targets)
    return feature_cache.pooled(features, examples.owners, num_videos, "mean")


def _scores(task: Task, targets, probabilities) -> dict[str, float]:
  measure = classes.scores if task.is_class else binary.scores
  values = measure(targets, probabilities)
  loss = task.loss(targets, probabilities)
  return {"loss": loss} | {name: float(values[name]) for name in _names(task)}


def _names(task: Task) -> tuple[str, ...]:
  return _CLASS_SCORES if task.is_class else _BINARY_SCORES
