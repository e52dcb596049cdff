"""Ways to predict a task from an encoder: probes, light tuning, fine-tuning.

Each mode fits on the training split, selects on the validation split, and
predicts any videos.

Axes: V videos, W windows, D features, K labels, classes or numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from marlin_jax.data import loader
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
from marlin_jax.downstream.tasks import Task, TaskError, Units
from marlin_jax.eval import configuration
from marlin_jax.inference import clip_features, nearest_neighbours, stream
from marlin_jax.inference.classifier import Head
from marlin_jax.weights.architecture import flatten
from marlin_jax.weights.weights import Weights

# Modes whose result does not depend on the seed, by protocol.
_NEIGHBOURS = ("knn", "knn_centred")
DETERMINISTIC = {"default": ("linear", *_NEIGHBOURS), "paper": _NEIGHBOURS}


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
    num_alike: work of this training and of those of its mode that follow, in
      units of this one.
  """

  task: Task
  train: TaskSplit
  val: TaskSplit
  seed: int
  name: str
  checkpoints: Path
  identity: dict[str, Any]
  num_alike: float = 1.0


class Predicted(NamedTuple):
  """Predictions of videos, and of each of their windows by itself.

  Attributes:
    videos: float64 (V, K).
    windows: float64 (W, K); None if features are pooled by their deviation,
      which a window does not have, or are from elsewhere.
    owners: int (W,), the video of each window.
  """

  videos: np.ndarray
  windows: np.ndarray | None = None
  owners: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ModeResult:
  """Output of a mode.

  Attributes:
    predict: predicts videos.
    head: the trained model.
    chosen: hyperparameters selected on the validation split.
    warnings: lines for the user about the choice.
  """

  predict: Callable[[TaskSplit], Predicted]
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
    # Rows of this process in each batch.
    self._own = functools.partial(
      loader.own_rows, sharding.batch_sharding(mesh)
    )

  def run(self, mode: str, job: Job) -> ModeResult:
    """Runs a job in one of configuration.MODES."""
    if mode in _NEIGHBOURS:
      return self._knn(job, centred=mode == "knn_centred")
    if mode == "linear":
      if self._config.protocol == "paper":
        return self._linear_by_steps(job)
      return self._linear(job)
    return self._on_encoder(mode, job)

  # --- On features ------------------------------------------------------------

  def features(self, split: Split) -> np.ndarray:
    """Returns features of all videos, pooled over windows: float32 (V, D)."""
    if self._table is not None:
      return self._table.of(split)
    key = split.dataset.fingerprint, split.name
    if key not in self._split_features:
      features, owners = self._window_features(split)
      self._split_features[key] = feature_cache.pooled(
        features, owners, len(split), self._config.pool
      )
    return self._split_features[key]

  def _window_features(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of all windows, float32 (W, D), and their videos."""
    windows = split.windows(self._clip)
    features = feature_cache.window_features(
      self._encoder,
      split,
      windows,
      self._cache,
      batch_size=self._batch_size,
      num_threads=self._config.data.num_threads,
    )
    return features, split.video_of(windows)

  def _predicted(
    self, videos: TaskSplit, function: Callable[[np.ndarray], np.ndarray]
  ) -> Predicted:
    """Applies a function of features to videos and to their windows."""
    predicted = function(self._features_of(videos))
    if self._table is not None or self._config.pool != "mean":
      return Predicted(predicted)
    features, owners = self._window_features(videos.split)
    owners = videos.positions[owners]
    known = owners >= 0
    return Predicted(predicted, function(features[known]), owners[known])

  @functools.cached_property
  def _encoder(self) -> clip_features.FrozenEncoder:
    config = self._config
    return clip_features.FrozenEncoder(
      self._weights, self._mesh, config.dtype, config.attention
    )

  def _features_of(self, videos: TaskSplit) -> np.ndarray:
    return self.features(videos.split)[videos.rows]

  def _knn(self, job: Job, *, centred: bool) -> ModeResult:
    train = self._features_of(job.train)
    labels, known = job.task.encode(job.train.targets)
    bank = {"train": train, "labels": labels, "known": known}
    if centred:
      bank["centre"] = train.mean(axis=0)

    def predict(features: np.ndarray) -> np.ndarray:
      return nearest_neighbours.predict(features, **bank, **self._config.knn)

    return ModeResult(
      lambda videos: self._predicted(videos, predict),
      Head("neighbours", bank, dict(self._config.knn)),
      {},
    )

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
      lambda videos: self._predicted(
        videos, lambda features: task.predicted(probe.logits(features))
      ),
      # The standardisation is folded into the layer.
      Head(
        "linear",
        {
          "kernel": probe.kernel / probe.scale[:, None],
          "bias": probe.bias - probe.mean / probe.scale @ probe.kernel,
        },
      ),
      {"penalty": dict(zip(task.names, probe.penalty.tolist(), strict=True))},
      tuple(_probe_warnings(task, probe, job.val.targets)),
    )

  def _linear_by_steps(self, job: Job) -> ModeResult:
    """Fits a linear probe by gradient steps, as the paper does.

    Runs on a single device: the batches are small.
    """
    config, task = self._config.paper, job.task
    train, val = self._features_of(job.train), self._features_of(job.val)
    mesh = sharding.make_mesh(1, devices=jax.local_devices()[:1])
    probe = learner.linear_probe(
      task, train.shape[1], config, mesh, job.seed, self._config.value_loss
    )
    units = Units.of(task, job.train.targets)
    labels, known = task.encode(job.train.targets)
    labels = units.standardised(labels)
    order = self._order(job, np.arange(len(train)))

    def batches(step: int) -> Iterator[fit.Batch]:
      while True:
        rows = order.rows(step, config.batch_size)
        yield train[rows], labels[rows], known[rows]
        step += 1

    def predict(trained, features: np.ndarray) -> np.ndarray:
      trained = learner.in_units(trained, units)
      return task.predicted(np.asarray(probe.logits(trained, features)))

    plan = protocols.plan_training(config, len(train))
    with _ProgressBar(job, plan) as bar:
      fitted = fit.fit(
        probe,
        plan,
        batches,
        lambda trained, pause: task.score(
          job.val.targets, predict(trained, val), micro=True
        ),
        seed=job.seed,
        report=bar.report,
      )
    return ModeResult(
      lambda videos: self._predicted(
        videos, functools.partial(predict, fitted.trained)
      ),
      Head("linear", _float64(units.folded(fitted.trained["linear"]))),
      {"num_rounds": fitted.num_rounds},
    )

  # --- On clips ---------------------------------------------------------------

  def _on_encoder(self, mode: str, job: Job) -> ModeResult:
    """Trains an attentive head, or tunes the encoder with a linear one."""
    config, task = self._config, job.task
    is_paper, attentive = config.protocol == "paper", mode == "attentive"
    training = config[configuration.section_of(mode, config.protocol)]
    model = learner.on_encoder(
      task,
      self._weights,
      training,
      self._mesh,
      job.seed,
      attentive=attentive,
      tuned=configuration.TUNED[mode],
      dtype=config.dtype,
      attention=config.attention,
      remat=config.remat,
      clips_per_device=config.clips_per_device,
      value_loss=config.value_loss,
      **config.lora,
    )
    units = Units.of(task, job.train.targets)
    plan = protocols.plan_training(training, len(job.train))
    val_windows, _ = clip_batches.windows_of(
      job.val, self._clip, config.data.val_windows
    )

    def score(trained, pause) -> float:
      trained = learner.in_units(trained, units)
      predicted = self._predict(
        model, trained, job.val, config.data.val_windows, pause
      ).videos
      return task.score(job.val.targets, predicted, micro=is_paper)

    with _ProgressBar(job, plan) as bar:
      fitted = fit.fit(
        model,
        plan,
        self._training_batches(job, plan, training.batch_size, units),
        score,
        seed=job.seed,
        folder=job.checkpoints,
        identity=job.identity,
        report=bar.report,
        # The forward pass of a clip takes a third of its training.
        forecast=functools.partial(
          bar.forecast,
          score_steps=len(val_windows) / training.batch_size / 3,
          note=_microbatch_note(model),
        ),
      )
    trained = learner.in_units(model.gathered(fitted.trained), units)
    placed = sharding.put(trained, model.shardings["trained"])
    return ModeResult(
      functools.partial(self._predict, model, placed),
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
        self._order(job, job.train.rows),
        batch_size=batch_size,
        seed=job.seed,
        start_step=step,
        num_steps=plan.num_rounds * plan.round_steps,
        num_threads=self._config.data.num_threads,
        rows=self._own(batch_size),
      ):
        rows = [index_of[int(video)] for video in videos]
        yield clips, labels[rows], known[rows]

    return batches

  def _order(
    self, job: Job, numbers: np.ndarray
  ) -> clip_batches.Order | clip_batches.PairedOrder:
    """Returns the order of the training videos, by the numbers given."""
    if not self._config.data.pairs:
      return clip_batches.Order(numbers, job.seed)
    is_positive = job.train.targets[:, 0] == 1
    if is_positive.all() or not is_positive.any():
      raise TaskError(
        f"task '{job.task.name}': config.data.pairs needs videos with the "
        "label and without it, and those to train on are all alike"
      )
    return clip_batches.PairedOrder(
      numbers, is_positive, job.train.people, job.seed
    )

  def _predict(
    self,
    model: learner.Learner,
    trained,
    videos: TaskSplit,
    most: int = 0,
    pause: Callable[[], None] = lambda: None,
  ) -> Predicted:
    """Predicts videos, by the means over their windows, and the windows."""
    windows, owners = clip_batches.windows_of(videos, self._clip, most)
    batches = clip_batches.window_batches(
      clip_batches.ClipReader(videos.split, self._clip, self._image_size),
      windows,
      self._batch_size,
      self._config.data.num_threads,
      self._own(self._batch_size),
    )

    def logits(clips: np.ndarray) -> jax.Array:
      pause()
      return model.logits(trained, clips)

    found = list(stream.encode_batches(logits, batches))
    predicted = model.task.predicted(np.concatenate(found)[: len(windows)])
    pooled = feature_cache.pooled(predicted, owners, len(videos), "mean")
    return Predicted(pooled, predicted, owners)


def _float64(layer: dict[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(array, np.float64) for name, array in layer.items()}


def _probe_warnings(
  task: Task, probe: linear_probe.LinearProbe, val_targets: np.ndarray
) -> Iterator[str]:
  is_known = task.encode(val_targets)[1].any(axis=0)
  if not is_known.all():
    names = itertools.compress(task.names, ~is_known)
    yield (
      f"{', '.join(names)} is unknown in all validation videos: the penalty is "
      "the largest one, and nothing chooses a threshold"
    )
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


def _microbatch_note(model: learner.Learner) -> str:
  num = model.num_microbatches
  return f", each in {num} microbatches" if num > 1 else ""


class _ProgressBar:
  """Context manager of the bar of a training; process 0 shows it."""

  def __init__(self, job: Job, plan: protocols.TrainingPlan):
    self._job, self._plan = job, plan
    total = plan.num_rounds * plan.round_steps
    self._bar = tqdm(
      desc=job.name,
      # Unknown under a plateau, which ends at a learning rate.
      total=total if plan.schedule is not None else None,
      unit="step",
      mininterval=1.0,
      disable=jax.process_index() != 0,
    )

  def __enter__(self) -> Self:
    return self

  def report(self, text: str, steps: int) -> None:
    """Implements `report` of `fit.fit`."""
    if text:
      self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(steps)

  def forecast(self, secs: float, *, score_steps: float, note: str) -> None:
    """Prints how long the training will take; `forecast` of `fit.fit`.

    Args:
      secs: time of a step.
      score_steps: time of a validation, in steps.
      note: how a step is done.
    """
    plan = self._plan
    round_secs = secs * (plan.round_steps + score_steps)
    least, most = plan.least_rounds * round_secs, plan.num_rounds * round_secs
    text = f"about {_duration(most)}"
    if least < most:
      text = f"{_duration(least)} to {_duration(most)}"
    if self._job.num_alike > 1:
      text += (
        ", with the trainings of this mode that follow "
        f"{_duration(least * self._job.num_alike)}"
      )
      text += " or more" if least < most else ""
    if not self._bar.disable:
      self._bar.write(
        f"{self._job.name}: {text}; {plan.round_steps} steps of {secs:.2f} s"
        f"{note} in each of {plan.num_rounds} rounds"
      )

  def __exit__(self, *_) -> None:
    self._bar.close()


def _duration(secs: float) -> str:
  if secs < 3600:
    return f"{math.ceil(secs / 60)} min"
  return f"{secs / 3600:.1f} h"
