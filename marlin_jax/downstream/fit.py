"""Training a head or an encoder: rounds of steps, of which the best counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.downstream.learner import Learner
from marlin_jax.downstream.protocols import Plan, Plateau
from marlin_jax.training.checkpoint import Checkpoints
from marlin_jax.training.nonfinite import NotFiniteError

Pytree = Any
# x, wanted, known: see Learner.step.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What came of a training.

  Attributes:
    trained: the parameters of the best round.
    auc: of the validation split, then.
    num_rounds: of the training.
    losses: of each round of this process.
  """

  trained: Pytree
  auc: float
  num_rounds: int
  losses: list[float]


def fit(
  learner: Learner,
  plan: Plan,
  batches: Callable[[int], Iterator[Batch]],
  score: Callable[[Pytree], float],
  *,
  seed: int,
  checkpoints: Checkpoints | None = None,
  identity: dict[str, Any] | None = None,
  report: Callable[[str, int], None] = lambda text, steps: None,
) -> Fitted:
  """Trains.

  Args:
    learner: what.
    plan: how long and how fast.
    batches: number of a step -> the batches from there on.
    score: parameters -> the number to be highest, of the validation split.
    seed: of what is drawn in steps.
    checkpoints: where to go on from, and to save after each round.
    identity: what must not have changed since.
    report: told after each step how things are, and of 1 step.

  Raises:
    NotFiniteError: the loss is not finite.
    ResumeError, SaveError: as in `checkpoint`.
  """
  state = learner.begin()
  best = jax.tree.map(jnp.copy, state["trained"])
  progress = _progress(Plateau(np.float32(plan.lr)), np.float32(np.nan), 0)
  whole = {"state": state, "best": best, "progress": progress}
  where = {
    "state": learner.shardings,
    "best": learner.shardings["trained"],
    "progress": jax.tree.map(lambda x: x.sharding, progress),
  }
  if checkpoints and checkpoints.last_saved:
    whole = checkpoints.restore(
      checkpoints.last_saved, whole, where, identity or {}
    )
  first, losses = int(whole["progress"]["round"]), []
  report("", first * plan.round_steps)
  source = batches(first * plan.round_steps)
  for number in range(first, plan.num_rounds):
    plateau, best_auc = _host(whole["progress"])
    if plan.schedule is None and plateau.lr <= plan.stop_lr:
      break
    state, loss = _round(
      learner, plan, number, whole["state"], source, plateau, seed, report
    )
    losses.append(loss)
    best, auc = whole["best"], score(state["trained"])
    # Of equal ones the last, and the last of all where AUC is not defined.
    if not auc < best_auc:
      best, best_auc = jax.tree.map(jnp.copy, state["trained"]), auc
    plateau.update(loss, factor=plan.factor, patience=plan.patience)
    whole = {
      "state": state,
      "best": best,
      "progress": _progress(plateau, np.float32(best_auc), number + 1),
    }
    report(f"loss {loss:.4f}, AUC {auc:.4f}, best {best_auc:.4f}", 0)
    if checkpoints:
      checkpoints.save(number + 1, whole, identity or {})
  if checkpoints:
    checkpoints.wait()
  return Fitted(
    whole["best"],
    float(whole["progress"]["auc"]),
    int(whole["progress"]["round"]),
    losses,
  )


def _round(learner, plan, number, state, source, plateau, seed, report):
  """The steps of a round; returns the state and the mean loss."""
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


def _progress(plateau: Plateau, auc: np.float32, number: int) -> Pytree:
  """Where a training is, as arrays, which checkpoints keep."""
  numbers = dataclasses.asdict(plateau) | {"auc": auc, "round": number}
  return {name: jnp.float32(value) for name, value in numbers.items()}


def _host(progress: Pytree) -> tuple[Plateau, float]:
  numbers = {name: np.float32(value) for name, value in progress.items()}
  auc = float(numbers.pop("auc"))
  del numbers["round"]
  return Plateau(**numbers), auc
