"""Probe of the encoder being trained: linear probe and nearest neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from marlin_jax.data import loader
from marlin_jax.devices import distributed, sharding
from marlin_jax.evaluators import quick_probe
from marlin_jax.inference import clip_features
from marlin_jax.pretraining.course import PretrainingCourse
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.records import cli
from marlin_jax.training.evaluation import Result
from marlin_jax.training.workdir import Workdir


class Probe:
  """Evaluator that fits a linear probe and nearest neighbours to features.

  The encoder stays on the mesh of the run.
  """

  def __init__(
    self,
    course: PretrainingCourse,
    workdir: Workdir,
    alive: Callable[..., None],
  ):
    """Reads the labels of the data set and prints the task and the videos.

    Args:
      course: network, devices and `probe_path`.
      workdir: workdir of the run; keeps what `splits.open_split` caches.
      alive: resets the watchdog, see `Watchdog.alive`.

    Raises:
      DatasetError: see `quick_probe.open_data`.
      TaskError: see `quick_probe.open_data`.
      StartError: processes see different data sets.
    """
    config, architecture = course.config, course.architecture
    path = course.probe_path
    # Of a data set of an earlier version process 0 reads all records and keeps
    # their labels in the workdir, which may be in a bucket; the others and
    # later runs read that.
    cache = workdir.path / "probe"
    alive("reading the labels of the probe", is_limited=False)
    with distributed.process_0_first():
      data = quick_probe.open_data(config.probe, architecture, path, cache)
    distributed.check_same(
      {f"the data set in {path}": data.train.split.dataset.fingerprint}
    )
    if jax.process_index() == 0:
      row = cli.Row("probe", f"{data.task.label}: {data.train}, {data.test}")
      print(cli.format_rows([row]))
      for warning in data.warnings:
        print(f"WARNING: {warning}")
    self._config, self._alive = config.probe, alive
    self._probe = quick_probe.QuickProbe(
      data,
      config.probe,
      course.mesh,
      num_threads=loader.reading(0, config.data.num_threads).num_threads,
    )
    self._split = sharding.batch_sharding(course.mesh)
    self._features = jax.jit(
      functools.partial(_features, course.trainer, architecture, config.probe),
      out_shardings=sharding.replicated(course.mesh),
    )

  def __call__(self, state: TrainState) -> Result:
    """Probes the averaged weights if the run keeps an average."""

    def encode(video: np.ndarray) -> jax.Array:
      x = jax.make_array_from_process_local_data(self._split, video)
      return self._features(state.best_params, state.fixed, x)

    # Minutes on a slow machine.
    scores = self._probe.scores(encode, lambda _: self._alive("the probe"))
    return Result(
      {f"eval/{name}": value for name, value in scores.items()},
      f"AUC for {self._config.label} on {self._config.eval_split}: linear "
      f"probe {scores['probe/auc']:.4f}, neighbours {scores['knn/auc']:.4f}",
    )


def _features(trainer, architecture, settings, params, fixed, video):
  with trainer.tracing():
    encoder = trainer.bind(params, fixed).encoder
    pool = (
      clip_features.features
      if settings.pool == "mean"
      else clip_features.grid_features
    )
    return pool(encoder, architecture, video, num_blocks=settings.num_blocks)
