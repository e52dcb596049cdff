"""Trains a head or an encoder in rounds of steps and keeps the best round."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.downstream.learner import Learner
from marlin_jax.downstream.protocols import Plateau, TrainingPlan
from marlin_jax.training.checkpoint import Checkpoints
from marlin_jax.training.skipped_steps import NotFiniteError

Pytree = Any
# x, labels, known; see Learner.step.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


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
  score: Callable[[Pytree], float],
  *,
  seed: int,
  checkpoints: Checkpoints | None = None,
  identity: dict[str, Any] | None = None,
  report: Callable[[str, int], None] = lambda text, steps: None,
) -> Fitted:
  """Trains until the plan ends, or resumes from the last checkpoint.

  Args:
    learner: model and its training step.
    plan: length and learning rate.
    batches: maps a step to an iterator over the batches from that step on.
    score: maps parameters to their score on the validation split, such as the
      AUC; the higher the better.
    seed: seed of the random draws within steps.
    checkpoints: checkpoints to resume from and to save to after each round;
      None: none.
    identity: values that a resumed training must share.
    report: called with a status text, or '', and the number of steps done since
      the last call.

  Raises:
    NotFiniteError: the loss is not finite.
    ResumeError, SaveError: see `training.checkpoint`.
  """
  state = learner.begin()
  best = jax.tree.map(jnp.copy, state["trained"])
  progress = _pack(Plateau(np.float32(plan.lr)), np.float32(np.nan), 0)
  saved = {"state": state, "best": best, "progress": progress}
  if checkpoints and checkpoints.last_saved:
    shardings = {
      "state": learner.shardings,
      "best": learner.shardings["trained"],
      "progress": jax.tree.map(lambda x: x.sharding, progress),
    }
    saved = checkpoints.restore(
      checkpoints.last_saved, saved, shardings, identity or {}
    )
  name = learner.task.score_name.upper()
  first, losses = int(saved["progress"]["round"]), []
  report("", first * plan.round_steps)
  source = batches(first * plan.round_steps)
  for number in range(first, plan.num_rounds):
    plateau, best_score = _unpack(saved["progress"])
    if plan.schedule is None and plateau.lr <= plan.stop_lr:
      break
    state, loss = _round(
      learner, plan, number, saved["state"], source, plateau, seed, report
    )
    losses.append(loss)
    best, found = saved["best"], score(state["trained"])
    # The last of equally good rounds, and the last of all if it is undefined.
    if not found < best_score:
      best, best_score = jax.tree.map(jnp.copy, state["trained"]), found
    plateau.update(loss, factor=plan.factor, patience=plan.patience)
    saved = {
      "state": state,
      "best": best,
      "progress": _pack(plateau, np.float32(best_score), number + 1),
    }
    report(f"loss {loss:.4f}, {name} {found:.4f}, best {best_score:.4f}", 0)
    if checkpoints:
      checkpoints.save(number + 1, saved, identity or {})
  if checkpoints:
    checkpoints.wait()
  return Fitted(
    saved["best"],
    float(saved["progress"]["auc"]),
    int(saved["progress"]["round"]),
    losses,
  )


def _round(learner, plan, number, state, source, plateau, seed, report):
  """Runs the steps of a round; returns the state and the mean loss."""
  total = jnp.float32(0)
  key = jax.random.key(seed)
  steps = number * plan.round_steps + np.arange(plan.round_steps)
  rates = np.full(len(steps), plateau.lr)
  if plan.schedule is not None:
    rates = np.asarray(plan.schedule(steps), np.float32)
  for step, lr in zip(steps, rates, strict=True):
    rng = jax.random.fold_in(key, step)
    state, loss = learner.step(state, *next(source), rng, lr)
    total = total + loss
    report("", 1)
  mean = float(total) / plan.round_steps
  if not math.isfinite(mean):
    raise NotFiniteError(
      f"the loss of round {number + 1} is {mean}: lower the learning rate, or "
      "use float32"
    )
  return state, mean


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
