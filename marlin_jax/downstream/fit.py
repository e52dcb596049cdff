"""Trains a head or an encoder in rounds of steps and keeps the best round."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.devices import distributed, sharding
from marlin_jax.downstream.learner import Learner
from marlin_jax.downstream.protocols import Plateau, TrainingPlan
from marlin_jax.records.signals import StopSignal
from marlin_jax.training.skipped_steps import NotFiniteError
from marlin_jax.training.workdir import SaveTimer

Pytree = Any
# x, labels, known; see Learner.step.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]

# Folder, within that of the rounds, of the checkpoint within a round.
_WITHIN = "within"
# Longest training that a kill can lose.
_SAVE_MINUTES = 15.0
# Steps whose time is measured, after the first, which compiles.
_TIMED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Result of a training.

  Attributes:
    trained: parameters after the best round.
    score: score on the validation split after that round.
    num_rounds: number of rounds trained.
    losses: mean loss of each round since the start or the last resume.
  """

  trained: Pytree
  score: float
  num_rounds: int
  losses: list[float]


def fit(
  learner: Learner,
  plan: TrainingPlan,
  batches: Callable[[int], Iterator[Batch]],
  score: Callable[[Pytree, Callable[[], None]], float],
  *,
  seed: int,
  folder: Path | None = None,
  identity: dict[str, Any] | None = None,
  report: Callable[[str, int], None] = lambda text, steps: None,
  forecast: Callable[[float], None] = lambda secs_per_step: None,
) -> Fitted:
  """Trains until the plan ends, or resumes from the last checkpoint.

  All processes call it together. With a folder it saves after each round, and
  within a round from time to time and on SIGINT and SIGTERM. A resumed training
  gives the same bits as an uninterrupted one.

  Args:
    learner: model and its training step.
    plan: length and learning rate.
    batches: maps a step to an iterator over the batches from that step on.
    score: maps parameters to their score on the validation split, such as the
      AUC, the higher the better; calls its second argument before each batch,
      which may end the training.
    seed: seed of the random draws within steps.
    folder: checkpoints to resume from and to save to; None: none.
    identity: values that a resumed training must share.
    report: called with a status text, or '', and the number of steps done since
      the last call.
    forecast: called once, with the seconds per step of the first steps.

  Raises:
    NotFiniteError: the loss is not finite.
    KeyboardInterrupt: SIGINT or SIGTERM, after saving.
    ResumeError, SaveError: see `checkpoints.manager`.
  """
  with contextlib.ExitStack() as stack:
    training = _Training(
      learner, plan, seed, folder, identity or {}, report, forecast, stack
    )
    return training.run(batches, score)


class _Training:
  """A training in progress.

  Its checkpoints hold `state`, `best`, the parameters after the best round, and
  `progress`, see `_pack`. One within a round also holds `within`: the number of
  its steps done, and the sum of their losses.
  """

  def __init__(
    self, learner, plan, seed, folder, identity, report, forecast, stack
  ):
    self._learner, self._plan, self._identity = learner, plan, identity
    self._report, self._forecast = report, forecast
    self._key = jax.random.key(seed)
    self._num_timed, self._timed_since = 0, time.monotonic()
    self._stack, self._folder = stack, folder
    self._rounds = self._within = self._stop = None
    self._requests = distributed.Requests(learner.mesh)
    self._timer = SaveTimer(_SAVE_MINUTES)
    if folder is not None:
      self._rounds = self._opened(folder)
      self._stop = stack.enter_context(StopSignal())

  def _opened(self, folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(str(folder), keep=1)
    self._stack.callback(checkpoints.close)
    return checkpoints

  def _put(self, tree: Pytree) -> Pytree:
    return sharding.put(tree, sharding.replicated(self._learner.mesh))

  def run(self, batches, score) -> Fitted:
    plan, losses = self._plan, []
    name = self._learner.task.score_name.upper()
    saved, within = self._restored()
    first = int(saved["progress"]["round"])
    num_done = int(within["steps"])
    self._report("", first * plan.round_steps + num_done)
    source = batches(first * plan.round_steps + num_done)
    for number in range(first, plan.num_rounds):
      plateau, best = _unpack(saved["progress"])
      if plan.schedule is None and plateau.lr <= plan.stop_lr:
        break
      within = self._round(number, saved, within, source, plateau)
      loss = _finite(float(within["total"]) / plan.round_steps, number)
      losses.append(loss)
      trained = saved["state"]["trained"]
      pause = functools.partial(self._pause, number, saved, within)
      found = score(trained, pause)
      # The last of equally good rounds, and the last of all if it is undefined.
      if not found < best:
        saved["best"], best = jax.tree.map(jnp.copy, trained), found
      plateau.update(loss, factor=plan.factor, patience=plan.patience)
      progress = _pack(plateau, np.float32(best), number + 1)
      saved["progress"] = self._put(progress)
      self._report(f"loss {loss:.4f}, {name} {found:.4f}, best {best:.4f}", 0)
      if self._rounds:
        self._rounds.save(number + 1, saved, self._identity)
        self._timer.restart()
      within = self._nothing_within()
    return Fitted(
      saved["best"],
      float(saved["progress"]["auc"]),
      int(saved["progress"]["round"]),
      losses,
    )

  def _round(self, number, saved, within, source, plateau) -> Pytree:
    """Runs the other steps of a round; returns `within` after the last."""
    plan, total = self._plan, within["total"]
    num_done = int(within["steps"])
    steps = number * plan.round_steps + np.arange(num_done, plan.round_steps)
    rates = np.full(len(steps), plateau.lr)
    if plan.schedule is not None:
      rates = np.asarray(plan.schedule(steps), np.float32)
    for step, lr in zip(steps, rates, strict=True):
      rng = jax.random.fold_in(self._key, step)
      saved["state"], loss = self._learner.step(
        saved["state"], *next(source), rng, lr
      )
      total = total + loss
      num_done += 1
      self._report("", 1)
      self._time(loss)
      within = {"steps": np.int32(num_done), "total": total}
      self._pause(number, saved, within)
    return within

  def _time(self, loss: jax.Array) -> None:
    """Measures the first steps of this process, then calls `forecast`."""
    self._num_timed += 1
    if self._num_timed in (1, 1 + _TIMED_STEPS):
      jax.block_until_ready(loss)
      secs = time.monotonic() - self._timed_since
      self._timed_since += secs
      if self._num_timed > 1:
        self._forecast(secs / _TIMED_STEPS)

  # --- Checkpoints ------------------------------------------------------------

  def _nothing_within(self) -> Pytree:
    return {"steps": np.int32(0), "total": self._put(np.float32(0))}

  def _restored(self) -> tuple[Pytree, Pytree]:
    """Returns the newest checkpoint, or the start, and its `within`."""
    learner = self._learner
    state = learner.begin()
    progress = _pack(Plateau(np.float32(self._plan.lr)), np.float32(np.nan), 0)
    saved = {
      "state": state,
      "best": jax.tree.map(jnp.copy, state["trained"]),
      "progress": self._put(progress),
    }
    within = self._nothing_within()
    if self._rounds is None:
      return saved, within
    everywhere = sharding.replicated(learner.mesh)
    shardings = {
      "state": learner.shardings,
      "best": learner.shardings["trained"],
      "progress": jax.tree.map(lambda _: everywhere, progress),
    }
    last_step = (self._rounds.last_saved or 0) * self._plan.round_steps
    if (self._folder / _WITHIN).is_dir():
      self._within = self._opened(self._folder / _WITHIN)
      if (self._within.last_saved or 0) > last_step:
        saved = self._within.restore(
          self._within.last_saved,
          saved | {"within": self._put(within)},
          shardings | {"within": jax.tree.map(lambda _: everywhere, within)},
          self._identity,
        )
        return saved, saved.pop("within")
    if self._rounds.last_saved:
      saved = self._rounds.restore(
        self._rounds.last_saved, saved, shardings, self._identity
      )
    return saved, within

  def _pause(self, number: int, saved: Pytree, within: Pytree) -> None:
    """Saves within a round if it is time; ends the training after a signal.

    All processes call it at the same time.

    Raises:
      KeyboardInterrupt: one of them got a signal.
    """
    if self._stop is None:
      return
    signum, saves = self._requests(self._stop.received, self._timer.is_due())
    if signum is None and not saves:
      return
    if self._within is None:
      self._within = self._opened(self._folder / _WITHIN)
    step = number * self._plan.round_steps + int(within["steps"])
    if step != self._within.last_saved:
      within = within | {"steps": self._put(np.int32(within["steps"]))}
      self._within.save(step, saved | {"within": within}, self._identity)
    self._timer.restart()
    if signum is not None:
      self._within.wait()
      raise KeyboardInterrupt


def _finite(loss: float, number: int) -> float:
  if not math.isfinite(loss):
    raise NotFiniteError(
      f"the loss of round {number + 1} is {loss}: lower the learning rate, or "
      "use float32"
    )
  return loss


def _pack(plateau: Plateau, best: np.float32, num_rounds: int) -> Pytree:
  """Returns the progress of a training as arrays for its checkpoint."""
  values = dataclasses.asdict(plateau) | {"auc": best, "round": num_rounds}
  return {name: jnp.float32(value) for name, value in values.items()}


def _unpack(progress: Pytree) -> tuple[Plateau, float]:
  """Returns the plateau and the best score so far."""
  values = {name: np.float32(value) for name, value in progress.items()}
  best = float(values.pop("auc"))
  del values["round"]
  return Plateau(**values), best
