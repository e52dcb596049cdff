"""Ways to predict a task from an encoder: linear, knn, attentive, finetune.

Each mode fits on the training split, selects on the validation split, and
predicts any videos.

Axes: V videos, W windows, D features, K labels, classes or numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  feature_cache,
  fit,
  learner,
  linear_probe,
  protocols,
)
from marlin_jax.downstream.feature_table import FeatureTable
from marlin_jax.downstream.splits import Split, TaskSplit
from marlin_jax.downstream.tasks import Task, Units
from marlin_jax.inference import nearest_neighbours, stream
from marlin_jax.inference.classifier import Head
from marlin_jax.training.checkpoint import Checkpoints
from marlin_jax.weights.architecture import flatten
from marlin_jax.weights.weights import Weights

# Modes whose result does not depend on the seed, by protocol.
DETERMINISTIC = {"default": ("linear", "knn"), "paper": ("knn",)}


@dataclasses.dataclass(frozen=True)
class Job:
  """Input of a mode.

  Attributes:
    task: task to predict.
    train, val: videos to train on, and to choose hyperparameters on.
    seed: seed of all random draws.
    name: name of the job in progress bars.
    checkpoints: folder for the checkpoints of a long training.
    identity: values that a resumed training must share.
  """

  task: Task
  train: TaskSplit
  val: TaskSplit
  seed: int
  name: str
  checkpoints: Path
  identity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModeResult:
  """Output of a mode.

  Attributes:
    predict: returns the predictions of V videos, float64 (V, K).
    head: the trained model.
    chosen: hyperparameters selected on the validation split.
    warnings: lines for the user about the choice.
  """

  predict: Callable[[TaskSplit], np.ndarray]
  head: Head
  chosen: dict[str, Any]
  warnings: tuple[str, ...] = ()


class ModeRunner:
  """Runs jobs in any mode with one encoder and configuration."""

  def __init__(
    self,
    config: ConfigDict,
    weights: Weights | None,
    mesh: Mesh,
    cache: Path,
    table: FeatureTable | None = None,
  ):
    """Initialises the runner without computing anything.

    Args:
      config: a valid configuration; see configs/eval_far.py.
      weights: weights of the encoder; None with a table.
      mesh: mesh of the devices.
      cache: folder of cached features.
      table: features from elsewhere.
    """
    self._config, self._weights, self._mesh = config, weights, mesh
    self._cache, self._table = cache, table
    if weights is not None:
      self._clip = weights.architecture.clip
      self._image_size = weights.architecture.image_size
    self._split_features: dict[tuple[str, str], np.ndarray] = {}
    self._batch_size = clip_batches.rounded_batch_size(config.batch_size, mesh)

  def run(self, mode: str, job: Job) -> ModeResult:
    """Runs a job in one of configuration.MODES."""
    if mode == "knn":
      return self._knn(job)
    if mode == "linear":
      if self._config.protocol == "paper":
        return self._linear_by_steps(job)
      return self._linear(job)
    return self._on_encoder(job, attentive=mode == "attentive")

  # --- On features ------------------------------------------------------------

  def features(self, split: Split) -> np.ndarray:
    """Returns features of all videos, pooled over windows: float32 (V, D)."""
    if self._table is not None:
      return self._table.of(split)
    key = split.dataset.fingerprint, split.name
    if key not in self._split_features:
      windows = split.windows(self._clip)
      features = feature_cache.window_features(
        self._encoder,
        split,
        windows,
        self._cache,
        batch_size=self._batch_size,
        num_threads=self._config.data.num_threads,
      )
      self._split_features[key] = feature_cache.pooled(
        features, split.video_of(windows), len(split), self._config.pool
      )
    return self._split_features[key]

  @functools.cached_property
  def _encoder(self) -> feature_cache.FrozenEncoder:
    config = self._config
    return feature_cache.FrozenEncoder(
      self._weights, self._mesh, config.dtype, config.attention
    )

  def _features_of(self, videos: TaskSplit) -> np.ndarray:
    return self.features(videos.split)[videos.rows]

  def _knn(self, job: Job) -> ModeResult:
    train = self._features_of(job.train)
    labels, known = job.task.encode(job.train.targets)

    def predict(videos: TaskSplit) -> np.ndarray:
      return nearest_neighbours.predict(
        self._features_of(videos), train, labels, known, **self._config.knn
      )

    bank = {"train": train, "labels": labels, "known": known}
    head = Head("neighbours", bank, dict(self._config.knn))
    return ModeResult(predict, head, {})

  def _linear(self, job: Job) -> ModeResult:
    task, val = job.task, self._features_of(job.val)
    units = Units.of(task, job.train.targets)

    def score(probe: linear_probe.LinearProbe) -> np.ndarray:
      # Not the AUC: with few videos many penalties tie.
      losses = task.losses(job.val.targets, task.predicted(probe.logits(val)))
      return -losses / np.square(units.spread)

    probe = linear_probe.fit(
      task,
      self._features_of(job.train),
      job.train.targets,
      self._config.linear.penalties,
      score,
      self._config.linear.max_iterations,
    )
    return ModeResult(
      lambda videos: task.predicted(probe.logits(self._features_of(videos))),
      # The standardisation is folded into the layer.
      Head(
        "linear",
        {
          "kernel": probe.kernel / probe.scale[:, None],
          "bias": probe.bias - probe.mean / probe.scale @ probe.kernel,
        },
      ),
      {"penalty": dict(zip(task.names, probe.penalty.tolist(), strict=True))},
      tuple(_probe_warnings(task, probe)),
    )

  def _linear_by_steps(self, job: Job) -> ModeResult:
    """Fits a linear probe by gradient steps, as the paper does.

    Runs on a single device: the batches are small.
    """
    config, task = self._config.paper, job.task
    train, val = self._features_of(job.train), self._features_of(job.val)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    probe = learner.linear_probe(
      task, train.shape[1], config, mesh, job.seed, self._config.value_loss
    )
    units = Units.of(task, job.train.targets)
    labels, known = task.encode(job.train.targets)
    labels = units.standardised(labels)
    order = clip_batches.Order(np.arange(len(train)), job.seed)

    def batches(step: int) -> Iterator[fit.Batch]:
      while True:
        rows = order.rows(step, config.batch_size)
        yield train[rows], labels[rows], known[rows]
        step += 1

    def predict(trained, features: np.ndarray) -> np.ndarray:
      trained = learner.in_units(trained, units)
      return task.predicted(np.asarray(probe.logits(trained, features)))

    plan = protocols.plan_training(config, len(train))
    with _ProgressBar(job.name, plan) as report:
      fitted = fit.fit(
        probe,
        plan,
        batches,
        lambda trained: task.score(
          job.val.targets, predict(trained, val), micro=True
        ),
        seed=job.seed,
        report=report,
      )
    return ModeResult(
      lambda videos: predict(fitted.trained, self._features_of(videos)),
      Head("linear", _float64(units.folded(fitted.trained["linear"]))),
      {"num_rounds": fitted.num_rounds},
    )

  # --- On clips ---------------------------------------------------------------

  def _on_encoder(self, job: Job, *, attentive: bool) -> ModeResult:
    """Trains an attentive head, or finetunes the encoder with a linear one."""
    config, task = self._config, job.task
    is_paper = config.protocol == "paper"
    section = "paper" if is_paper else "attentive" if attentive else "finetune"
    training = config[section]
    model = learner.on_encoder(
      task,
      self._weights,
      training,
      self._mesh,
      job.seed,
      attentive=attentive,
      tuned="nothing" if attentive else "all",
      dtype=config.dtype,
      attention=config.attention,
      remat=config.remat,
      clips_per_device=config.clips_per_device,
      value_loss=config.value_loss,
    )
    units = Units.of(task, job.train.targets)
    plan = protocols.plan_training(training, len(job.train))

    def score(trained) -> float:
      predicted = self._predict(
        model, learner.in_units(trained, units), job.val
      )
      return task.score(job.val.targets, predicted, micro=is_paper)

    checkpoints = Checkpoints(str(job.checkpoints), keep=1)
    try:
      with _ProgressBar(job.name, plan) as report:
        fitted = fit.fit(
          model,
          plan,
          self._training_batches(job, plan, training.batch_size, units),
          score,
          seed=job.seed,
          checkpoints=checkpoints,
          identity=job.identity,
          report=report,
        )
    finally:
      checkpoints.close()
    trained = learner.in_units(model.gathered(fitted.trained), units)
    return ModeResult(
      functools.partial(self._predict, model, trained),
      Head(
        "attentive" if attentive else "mean",
        flatten(trained["head"]),
        {"num_heads": model.architecture.num_heads} if attentive else {},
        None if attentive else model.encoder_weights(trained),
      ),
      {"num_rounds": fitted.num_rounds},
    )

  def _training_batches(
    self,
    job: Job,
    plan: protocols.TrainingPlan,
    batch_size: int,
    units: Units,
  ) -> Callable[[int], Iterator[fit.Batch]]:
    """Returns a function from a step to the batches from there on."""
    split = job.train.split
    labels, known = job.task.encode(job.train.targets)
    labels = units.standardised(labels)
    index_of = {int(video): i for i, video in enumerate(job.train.rows)}

    def batches(step: int) -> Iterator[fit.Batch]:
      for videos, clips in clip_batches.drawn_batches(
        clip_batches.ClipReader(split, self._clip, self._image_size),
        split,
        self._clip,
        clip_batches.Order(job.train.rows, job.seed),
        batch_size=batch_size,
        seed=job.seed,
        start_step=step,
        num_steps=plan.num_rounds * plan.round_steps,
        num_threads=self._config.data.num_threads,
      ):
        rows = [index_of[int(video)] for video in videos]
        yield clips, labels[rows], known[rows]

    return batches

  def _predict(
    self, model: learner.Learner, trained, videos: TaskSplit
  ) -> np.ndarray:
    """Returns predictions (V, K), means over the windows of each video."""
    index_of = {int(video): i for i, video in enumerate(videos.rows)}
    all_windows = videos.split.windows(self._clip)
    windows, owners = [], []
    for window, video in zip(
      all_windows, videos.split.video_of(all_windows), strict=True
    ):
      if int(video) in index_of:
        windows.append(window)
        owners.append(index_of[int(video)])
    batches = clip_batches.window_batches(
      clip_batches.ClipReader(videos.split, self._clip, self._image_size),
      windows,
      self._batch_size,
      self._config.data.num_threads,
    )
    logits = np.concatenate(
      list(
        stream.encode_batches(functools.partial(model.logits, trained), batches)
      )
    )[: len(windows)]
    return feature_cache.pooled(
      model.task.predicted(logits), np.array(owners), len(videos), "mean"
    )


def _float64(layer: dict[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(array, np.float64) for name, array in layer.items()}


def _probe_warnings(
  task: Task, probe: linear_probe.LinearProbe
) -> Iterator[str]:
  for edge in np.unique(probe.penalty[probe.at_edge]):
    names = [
      name
      for name, penalty in zip(task.names, probe.penalty, strict=True)
      if penalty == edge
    ]
    yield (
      f"the best penalty is the last one tried, {edge:.0e}, for "
      f"{', '.join(names)}: "
      + (
        "the features separate the training and validation videos"
        if edge < 1
        else "the features tell nothing about the validation videos"
      )
    )
  if not probe.converged:
    yield (
      "the linear probe has not reached its optimum: raise "
      "config.linear.max_iterations"
    )


class _ProgressBar:
  """Context manager of a bar for one training; gives `report` of `fit.fit`."""

  def __init__(self, name: str, plan: protocols.TrainingPlan):
    total = plan.num_rounds * plan.round_steps
    self._bar = tqdm(
      desc=name,
      # Unknown under a plateau, which ends at a learning rate.
      total=total if plan.schedule is not None else None,
      unit="step",
      mininterval=1.0,
    )

  def __enter__(self) -> Callable[[str, int], None]:
    return self._report

  def _report(self, text: str, steps: int) -> None:
    if text:
      self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(steps)

  def __exit__(self, *_) -> None:
    self._bar.close()
