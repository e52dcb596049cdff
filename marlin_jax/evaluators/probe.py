"""What the encoder has learned so far: a linear probe and nearest neighbours.

On features of a fixed, bounded set of labelled videos, by the code of
marlin_jax/downstream: small and fast beside the evaluations of eval/, whose
intervals and choices it lacks. It takes the encoder of a run as it trains, on
any mesh and with several processes, or any weights:

  weights = detect.read(path)
  data = probe.open_data(config.probe, weights.architecture, DATASET)
  encode = feature_cache.FrozenEncoder(weights, mesh, "float32", "auto")
  probe.Probe(data, config.probe, mesh, num_threads=4).metrics(encode)

Axes: B clips, V videos, W windows, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.devices import distributed, sharding
from marlin_jax.downstream import (
  clip_batches,
  feature_cache,
  knn,
  labelled,
  logistic,
  low_data,
  scores,
  tasks,
)
from marlin_jax.downstream.labelled import Split, Window
from marlin_jax.downstream.tasks import Task, TaskError
from marlin_jax.eval import modes
from marlin_jax.inference import clip_features
from marlin_jax.models import partition
from marlin_jax.pretraining.course import PretrainingCourse
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.training import remote_files
from marlin_jax.training.configuration import flat
from marlin_jax.training.loop import Result
from marlin_jax.training.workdir import Workdir
from marlin_jax.weights import run_checkpoint
from marlin_jax.weights.weights import Architecture

_TEMPERATURE = 0.07  # DINO's
_MAX_ITERATIONS = 200
# Those that need no threshold to be chosen; balanced accuracy of classes alone.
_BINARY = ("auc", "average_precision", "accuracy")
_CLASSES = (*_BINARY, "balanced_accuracy")


@dataclasses.dataclass(frozen=True)
class Examples:
  """Videos of a split, and the windows that stand for each.

  Attributes:
    split: where they are.
    targets: of the V videos; see Task.targets.
    windows: W of them, those of a video side by side.
    owners: int (W,), in [0, V), ascending.
  """

  split: Split
  targets: np.ndarray
  windows: list[Window]
  owners: np.ndarray


@dataclasses.dataclass(frozen=True)
class Data:
  """What a probe learns from and is scored on.

  Attributes:
    task: the label.
    train, test: the videos.
    clip: the windows' frames.
    warnings: of splits that share people; a line each.
  """

  task: Task
  train: Examples
  test: Examples
  clip: Clip
  warnings: list[str]

  def __str__(self) -> str:
    return f"probe    {self.task.label}: " + ", ".join(
      f"{len(of.targets)} of {len(of.split)} videos of '{of.split.name}' in "
      f"{len(of.windows)} windows"
      for of in (self.train, self.test)
    )


def task_of(config: ConfigDict, path: str) -> Task:
  """Finds the label and both splits; reads no record.

  Args:
    config: `probe` of a run's configuration.
    path: directory of the data set.

  Raises:
    DatasetError: it is no data set, or lacks a split.
    TaskError: it has no such label, or that is a value.
  """
  prepared_dataset.open_dataset(path, config.split)
  known = tasks.known_labels(path)
  if known.get(config.label, {"kind": "value"})["kind"] == "value":
    there = ", ".join(f"{k} ({v['kind']})" for k, v in sorted(known.items()))
    raise TaskError(
      f"config.probe.label={config.label!r}: expected a label of kind binary "
      f"or class, and {path} has "
      + (there or "none at all: prepare it with labels")
    )
  prepared_dataset.open_dataset(path, config.eval_split)
  return tasks.make_task(config.label, known, {}, path)


def open_data(
  config: ConfigDict,
  architecture: Architecture,
  path: str,
  cache: Path | None = None,
) -> Data:
  """Chooses the videos; reads all records of both splits for their labels.

  Args:
    config: as for `task_of`.
    architecture: of the encoder.
    path: likewise.
    cache: as for labelled.open_split.

  Raises:
    DatasetError, TaskError: as `task_of`, and of labels that are all unknown.
  """
  task, clip = task_of(config, path), architecture.clip
  train, test = (
    labelled.open_split(path, split, cache)
    for split in (config.split, config.eval_split)
  )
  chosen = (
    _examples(task, split, clip, config.num_videos, config.num_windows)
    for split in (train, test)
  )
  return Data(task, *chosen, clip, labelled.shared((train, test)))


def _examples(task, split, clip, num_videos, num_windows) -> Examples:
  """So many videos, each stratum with its share, and some windows of each."""
  part = modes.part_of(task, split)
  order = low_data.nested_order(
    low_data.strata_of(part.targets),
    [split.people[row] for row in part.rows],
    seed=0,
  )
  kept = np.sort(np.concatenate(order)[:num_videos])
  track_of = {track.video: i for i, track in enumerate(split.tracks)}
  windows, owners = [], []
  for i, video in enumerate(part.rows[kept]):
    number = track_of[int(video)]
    starts = clip.window_starts(split.tracks[number].num_frames)
    num = min(num_windows, len(starts))
    # The middles of equal parts.
    places = (2 * np.arange(num) + 1) * len(starts) // (2 * num)
    windows += [Window(number, int(starts[place])) for place in places]
    owners += [i] * num
  return Examples(split, part.targets[kept], windows, np.array(owners))


class Probe:
  """The same videos every time it is called."""

  def __init__(
    self, data: Data, config: ConfigDict, mesh: Mesh, *, num_threads: int
  ):
    """Reads nothing yet.

    Args:
      data: from `open_data`.
      config: `probe` of a run's configuration.
      mesh: the devices, over which clips are spread.
      num_threads: that read.
    """
    self._data, self._config = data, config
    shards = sharding.num_shards(mesh)
    self._batch_size = -(-config.batch_size // shards) * shards
    self._rows = loader.own_rows(
      sharding.batch_sharding(mesh), self._batch_size
    )
    self._num_threads = num_threads

  def metrics(
    self,
    encode: Callable[[np.ndarray], jax.Array],
    report: Callable[[int], object] = lambda num: None,
  ) -> dict[str, float]:
    """Fits both on the one split and scores them on the other.

    To be called by all processes; each fits for itself, on the same features.

    Args:
      encode: this process's clips of a batch, uint8 (b, T, S, S, 3), to the
        features of all of it, float32 (B, D); in a single process a
        feature_cache.FrozenEncoder is one.
      report: told how many more windows are done.

    Returns:
      `probe/NAME` and `knn/NAME`: `loss`, the cross-entropy, and numbers of
        scores.binary_scores or class_scores; NaN where one is not defined.

    Raises:
      DatasetError: a record is damaged.
    """
    task, train, test = self._data.task, self._data.train, self._data.test
    x, new_x = (self._features(encode, of, report) for of in (train, test))
    probe = logistic.fit(
      task,
      x,
      train.targets,
      (self._config.penalty,),
      lambda probe: 0.0,  # there is one penalty: no choice
      _MAX_ITERATIONS,
    )
    neighbours = knn.predict(
      new_x,
      x,
      *task.encode(train.targets),
      k=self._config.k,
      temperature=_TEMPERATURE,
    )
    found = {
      "probe": task.probabilities(probe.logits(new_x)),
      "knn": neighbours,
    }
    return {
      f"{method}/{name}": value
      for method, probabilities in found.items()
      for name, value in _scores(task, test.targets, probabilities).items()
    }

  def _features(self, encode, examples: Examples, report) -> np.ndarray:
    """float32 (V, D), means over windows."""
    batches = clip_batches.window_batches(
      clip_batches.ClipReader(examples.split, self._data.clip),
      examples.windows,
      self._batch_size,
      self._num_threads,
      rows=self._rows,
    )
    found = feature_cache.batch_features(
      encode, batches, len(examples.windows), report
    )
    num = len(examples.targets)
    return modes.pooled(found, examples.owners, num, "mean")


def _scores(task: Task, targets, probabilities) -> dict[str, float]:
  if task.is_class:
    found, names = scores.class_scores(targets, probabilities), _CLASSES
  else:
    found, names = scores.binary_scores(targets, probabilities), _BINARY
  loss = task.cross_entropy(targets, probabilities)
  return {"loss": loss} | {name: float(found[name]) for name in names}


class TrainingProbe:
  """Probes the encoder of a run in place, on any mesh."""

  def __init__(
    self,
    course: PretrainingCourse,
    config: ConfigDict,
    path: str,
    workdir: Workdir,
    alive: Callable[[str], None],
  ):
    """Reads the labels of the data set and prints what is probed.

    Args:
      course: network and devices.
      config: configuration of the run.
      path: labelled data set.
      workdir: where to cache the labels, unless it is in a bucket.
      alive: tells the watchdog that the probe is at work.

    Raises:
      DatasetError, TaskError: as `open_data`.
      StartError: processes see different data sets.
    """
    trainer, mesh = course.trainer, course.mesh
    architecture = run_checkpoint.architecture_of(flat(config))
    cache = None
    if not remote_files.is_remote(workdir.path):
      cache = workdir.files.path / "probe"
    with distributed.leader_first():
      data = open_data(config.probe, architecture, path, cache)
    distributed.check_same(
      {f"the data set in {path}": data.train.split.dataset.fingerprint}
    )
    if jax.process_index() == 0:
      print("\n".join([str(data), *(f"WARNING: {w}" for w in data.warnings)]))
    self._config, self._alive = config.probe, alive
    self._probe = Probe(
      data, config.probe, mesh, num_threads=config.data.num_threads
    )
    self._split = sharding.batch_sharding(mesh)
    self._features = jax.jit(
      functools.partial(_features, trainer, architecture),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(self, state: TrainState) -> Result:
    """Probes the averaged weights if the run keeps an average."""

    def encode(video: np.ndarray) -> jax.Array:
      x = jax.make_array_from_process_local_data(self._split, video)
      return self._features(state.best_params, state.fixed, x)

    scores = self._probe.metrics(encode, lambda _: self._alive("the probe"))
    return Result(
      {f"eval/{name}": value for name, value in scores.items()},
      f"AUC for {self._config.label} on {self._config.eval_split}: linear "
      f"probe {scores['probe/auc']:.4f}, neighbours {scores['knn/auc']:.4f}",
    )


def _features(trainer, architecture, params, fixed, video):
  with partition.use(trainer.placement):
    network = nnx.merge(trainer.mae, partition.weights(params), fixed)
    return clip_features.features(network.encoder, architecture, video)
