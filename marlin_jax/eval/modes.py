"""The four ways to find out what an encoder knows.

Each learns from the training split, makes its choices on the validation split,
and tells probabilities of the videos of the test split.

Axes: V videos, D features, K labels or classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
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
  knn,
  learner,
  logistic,
  protocols,
)
from marlin_jax.downstream.labelled import Split
from marlin_jax.downstream.tasks import Part, Task
from marlin_jax.training.checkpoint import Checkpoints
from marlin_jax.weights.weights import Weights

# They have the same result whatever the seed.
DETERMINISTIC = {"default": ("linear", "knn"), "paper": ("knn",)}


@dataclasses.dataclass(frozen=True)
class Job:
  """What a mode is given.

  Attributes:
    task: to learn.
    train, val, test: the videos.
    seed: of all that is drawn.
    name: for people.
    checkpoints: folder for those of a long training.
    identity: what these depend on.
  """

  task: Task
  train: Part
  val: Part
  test: Part
  seed: int
  name: str
  checkpoints: Path
  identity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Learned:
  """What comes of it.

  Attributes:
    val, test: float64 (V, K), probabilities.
    chosen: what was chosen on the validation split.
  """

  val: np.ndarray
  test: np.ndarray
  chosen: dict[str, Any]


class Modes:
  """An encoder with a configuration, ready for any job."""

  def __init__(
    self, config: ConfigDict, weights: Weights, mesh: Mesh, cache: Path
  ):
    """Computes nothing yet.

    Args:
      config: see configs/eval_far.py.
      weights: of the encoder.
      mesh: the devices.
      cache: folder of features.
    """
    self._config, self._weights, self._mesh = config, weights, mesh
    self._cache = cache
    self._pooled: dict[str, np.ndarray] = {}
    shards = sharding.num_shards(mesh)
    self._batch_size = -(-config.batch_size // shards) * shards

  def run(self, mode: str, job: Job) -> Learned:
    """Does a job in one of configuration.MODES."""
    if mode == "knn":
      return self._knn(job)
    if mode == "linear":
      if self._config.protocol == "paper":
        return self._linear_by_steps(job)
      return self._linear(job)
    return self._on_encoder(job, attentive=mode == "attentive")

  # --- On features ------------------------------------------------------------

  def features(self, split: Split) -> np.ndarray:
    """float32 (V, D): of all videos of a split, pooled over their windows."""
    if split.name not in self._pooled:
      windows = split.windows(self._weights.architecture.clip)
      found = feature_cache.window_features(
        self._frozen,
        split,
        windows,
        self._cache,
        batch_size=self._batch_size,
        num_threads=self._config.data.num_threads,
      )
      self._pooled[split.name] = feature_cache.pooled(
        found, split.video_of(windows), len(split), self._config.pool
      )
    return self._pooled[split.name]

  @functools.cached_property
  def _frozen(self) -> feature_cache.FrozenEncoder:
    config = self._config
    return feature_cache.FrozenEncoder(
      self._weights, self._mesh, config.dtype, config.attention
    )

  def _of(self, part: Part) -> np.ndarray:
    return self.features(part.split)[part.rows]

  def _knn(self, job: Job) -> Learned:
    wanted, known = job.task.encode(job.train.targets)
    val, test = (
      knn.predict(
        self._of(part), self._of(job.train), wanted, known, **self._config.knn
      )
      for part in (job.val, job.test)
    )
    return Learned(val, test, {})

  def _linear(self, job: Job) -> Learned:
    task, val = job.task, self._of(job.val)

    def score(probe: logistic.Probe) -> float:
      probabilities = task.probabilities(probe.logits(val))
      # Not AUC: on few videos many penalties have the same.
      return -task.cross_entropy(job.val.targets, probabilities)

    probe = logistic.fit(
      task,
      self._of(job.train),
      job.train.targets,
      self._config.linear.penalties,
      score,
      self._config.linear.max_iterations,
    )
    return Learned(
      task.probabilities(probe.logits(val)),
      task.probabilities(probe.logits(self._of(job.test))),
      {"penalty": probe.penalty},
    )

  def _linear_by_steps(self, job: Job) -> Learned:
    """The same by gradient steps; on one device, however many there are."""
    config, task = self._config.paper, job.task
    train, val = self._of(job.train), self._of(job.val)
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    probe = learner.linear_probe(task, train.shape[1], config, one, job.seed)
    wanted, known = task.encode(job.train.targets)
    order = clip_batches.Order(np.arange(len(train)), job.seed)

    def batches(step: int) -> Iterator[fit.Batch]:
      while True:
        rows = order.rows(step, config.batch_size)
        yield train[rows], wanted[rows], known[rows]
        step += 1

    def predict(trained, features: np.ndarray) -> np.ndarray:
      return task.probabilities(np.asarray(probe.logits(trained, features)))

    plan = protocols.plan_of(config, len(train))
    with _Bar(job.name, plan) as report:
      fitted = fit.fit(
        probe,
        plan,
        batches,
        lambda trained: task.auc(
          job.val.targets, predict(trained, val), micro=True
        ),
        seed=job.seed,
        report=report,
      )
    return Learned(
      predict(fitted.trained, val),
      predict(fitted.trained, self._of(job.test)),
      _told(fitted),
    )

  # --- On clips ---------------------------------------------------------------

  def _on_encoder(self, job: Job, *, attentive: bool) -> Learned:
    config, task = self._config, job.task
    paper = config.protocol == "paper"
    section = "paper" if paper else "attentive" if attentive else "finetune"
    how = config[section]
    head = learner.on_encoder(
      task,
      self._weights,
      how,
      self._mesh,
      job.seed,
      attentive=attentive,
      frozen=attentive,
      dtype=config.dtype,
      attention=config.attention,
      remat=config.remat,
    )
    split, clip = job.train.split, self._weights.architecture.clip
    wanted, known = task.encode(job.train.targets)
    place = {int(video): i for i, video in enumerate(job.train.rows)}
    plan = protocols.plan_of(how, len(job.train.rows))

    def batches(step: int) -> Iterator[fit.Batch]:
      for videos, clips in clip_batches.drawn_batches(
        clip_batches.ClipReader(split, clip),
        split,
        clip,
        clip_batches.Order(job.train.rows, job.seed),
        batch_size=how.batch_size,
        seed=job.seed,
        start_step=step,
        num_steps=plan.num_rounds * plan.round_steps,
        num_threads=config.data.num_threads,
      ):
        rows = [place[int(video)] for video in videos]
        yield clips, wanted[rows], known[rows]

    def score(trained) -> float:
      found = self._predict(head, trained, job.val)
      return task.auc(job.val.targets, found, micro=paper)

    checkpoints = Checkpoints(str(job.checkpoints), keep=1)
    try:
      with _Bar(job.name, plan) as report:
        fitted = fit.fit(
          head,
          plan,
          batches,
          score,
          seed=job.seed,
          checkpoints=checkpoints,
          identity=job.identity,
          report=report,
        )
    finally:
      checkpoints.close()
    return Learned(
      self._predict(head, fitted.trained, job.val),
      self._predict(head, fitted.trained, job.test),
      _told(fitted),
    )

  def _predict(self, head: learner.Learner, trained, part: Part) -> np.ndarray:
    """Probabilities of videos: means over those of all their windows."""
    clip, number = self._weights.architecture.clip, {}
    for i, video in enumerate(part.rows):
      number[int(video)] = i
    every = part.split.windows(clip)
    owners = part.split.video_of(every)
    chosen = [i for i, video in enumerate(owners) if int(video) in number]
    windows = [every[i] for i in chosen]
    found = [
      np.asarray(head.logits(trained, video))
      for video in clip_batches.window_batches(
        clip_batches.ClipReader(part.split, clip),
        windows,
        self._batch_size,
        self._config.data.num_threads,
      )
    ]
    probabilities = head.task.probabilities(
      np.concatenate(found)[: len(windows)]
    )
    own = np.array([number[int(owners[i])] for i in chosen])
    return feature_cache.pooled(probabilities, own, len(part.rows), "mean")


def _told(fitted: fit.Fitted) -> dict[str, Any]:
  return {"num_rounds": fitted.num_rounds}


class _Bar:
  """Shows a training; a context manager that gives what `fit` reports to."""

  def __init__(self, name: str, plan: protocols.Plan):
    total = plan.num_rounds * plan.round_steps
    self._bar = tqdm(
      desc=name,
      # Nobody knows when a plateau's rate is low enough.
      total=total if plan.schedule is not None else None,
      unit="step",
      mininterval=1.0,
    )

  def __enter__(self):
    return self._report

  def _report(self, text: str, steps: int) -> None:
    if text:
      self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(steps)

  def __exit__(self, *_) -> None:
    self._bar.close()
