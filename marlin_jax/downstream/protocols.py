"""How heads and encoders are trained: the optimiser, its rate, when to stop.

Two protocols:
  paper    MARLIN's, for all that is trained: Adam at 1e-4 with betas (0.5,
           0.9), no decay; the rate is halved when the training loss of an epoch
           has not fallen for 7 of them; the end is at a rate of 1e-6; of all
           epochs the one with the best AUC on the validation split counts.
           Unlike the authors' code: that AUC is over the whole split, not the
           mean over its batches; the split is never cut down with the training
           data; whoever is tested is tested on all windows of the video, where
           theirs took one random clip after fine-tuning; batches pass over
           the ends of epochs.
  default  the field's: AdamW, a warm-up and a cosine, rates that fall from the
           last layer to the first (BEiT, Bao et al., ICLR 2022).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from marlin_jax.pretraining import schedules

Pytree = Any

# Of PyTorch's ReduceLROnPlateau, which the authors leave as it is.
_LEAST_GAIN = 1e-4


@dataclasses.dataclass
class Plateau:
  """A rate that falls when the loss no longer does; PyTorch's rule.

  Numbers are float32, which a checkpoint keeps as they are.

  Attributes:
    lr: the rate.
    best: the lowest loss so far.
    num_bad: epochs since.
  """

  lr: np.float32
  best: np.float32 = np.float32(np.inf)
  num_bad: np.float32 = np.float32(0)

  def update(self, loss: float, *, factor: float, patience: int) -> None:
    """Takes the loss of an epoch.

    Args:
      loss: its mean.
      factor: what the rate is multiplied with.
      patience: so many epochs without gain are borne.
    """
    if loss < self.best * (1 - _LEAST_GAIN):
      self.best, self.num_bad = np.float32(loss), np.float32(0)
      return
    self.num_bad = np.float32(self.num_bad + 1)
    if self.num_bad > patience:
      self.lr = np.float32(self.lr * factor)
      self.num_bad = np.float32(0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How long to train, and how fast.

  Attributes:
    num_rounds: at most; after each the validation split is scored.
    round_steps: of one round; an epoch under the paper's protocol.
    schedule: step -> rate; None: as `plateau` says.
    lr: the first rate.
    stop_lr: the plateau's last.
    factor, patience: see Plateau.
  """

  num_rounds: int
  round_steps: int
  schedule: Callable[[int], jax.Array] | None
  lr: float
  stop_lr: float = 0.0
  factor: float = 0.5
  patience: int = 7


def plan_of(config: ConfigDict, num_videos: int) -> Plan:
  """The plan of a training.

  Args:
    config: `paper`, or `finetune` or `attentive` of an evaluation's
      configuration; see configs/eval_far.py.
    num_videos: in the training split, or the part of it.
  """
  if "patience" in config:
    return Plan(
      num_rounds=config.max_epochs,
      round_steps=max(1, round(num_videos / config.batch_size)),
      schedule=None,
      lr=config.lr,
      stop_lr=config.stop_lr,
      factor=config.factor,
      patience=config.patience,
    )
  num_steps = max(
    config.min_steps, math.ceil(config.epochs * num_videos / config.batch_size)
  )
  round_steps = math.ceil(num_steps / config.num_rounds)
  num_steps = round_steps * config.num_rounds
  schedule = schedules.learning_rate(
    base_lr=config.base_lr,
    min_lr=config.min_lr,
    warmup_ratio=config.warmup_ratio,
    batch_size=config.batch_size,
    num_steps=num_steps,
  )
  return Plan(config.num_rounds, round_steps, schedule, config.base_lr)


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
  """Adam's directions; the rate and its sign are put on by `moved`.

  Args:
    config: as for `plan_of`.
  """
  decay = config.get("weight_decay", 0.0)
  parts = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
  if decay:
    parts.append(optax.add_decayed_weights(decay, mask=_is_decayed))
  return optax.chain(*parts)


def moved(params: Pytree, updates: Pytree, lr: jax.Array, factors: Pytree):
  """Parameters after a step; `factors` as from `layer_factors`."""
  return jax.tree.map(lambda p, u, f: p - lr * f * u, params, updates, factors)


def layer_factors(params: Pytree, depth: int, decay: float) -> Pytree:
  """What the rate of each layer is multiplied with.

  Args:
    params: nested dicts by name, blocks one by one.
    depth: blocks.
    decay: from each layer to the one before it; 1: all learn alike.

  Returns:
    A tree like the parameters, of float32 scalars.
  """

  def factor(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if block := re.search(r"blocks/(\d+)/", name):
      return jnp.float32(decay ** (depth - int(block[1])))
    first = "patch_embedding/" in name
    return jnp.float32(decay ** (depth + 1) if first else 1.0)

  return jax.tree_util.tree_map_with_path(factor, params)


def _is_decayed(params: Pytree) -> Pytree:
  """Matrices, not biases or norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == "kernel", params
  )
