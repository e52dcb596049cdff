"""Training protocols of heads and encoders: optimiser, learning rate, length.

Two protocols:
  paper    MARLIN's, for every training: Adam at 1e-4 with betas (0.5, 0.9) and
           no weight decay. The rate is halved when the training loss has not
           fallen for 7 epochs; training ends at a rate of 1e-6. The epoch with
           the best AUC on the validation split is kept.
           Differences from the authors' code: the AUC is over the whole split,
           not the mean over its batches; the validation split is not reduced in
           low-data runs; tests use all windows of a video, where the authors
           took one random clip after finetuning; batches cross epoch ends.
  default  common practice: AdamW, warm-up and cosine, learning rates that decay
           from the last layer to the first (BEiT, Bao et al., ICLR 2022).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from marlin_jax.pretraining import optimizer

Pytree = Any

# Default `threshold` of PyTorch's ReduceLROnPlateau, used by the authors.
_LEAST_GAIN = 1e-4


@dataclasses.dataclass
class Plateau:
  """Learning rate that falls when the loss stops falling.

  Equals PyTorch's ReduceLROnPlateau. Values are float32, so that a checkpoint
  stores them exactly.

  Attributes:
    lr: current learning rate.
    best: lowest loss so far.
    num_bad: epochs since the lowest loss.
  """

  lr: np.float32
  best: np.float32 = np.float32(np.inf)
  num_bad: np.float32 = np.float32(0)

  def update(self, loss: float, *, factor: float, patience: int) -> None:
    """Updates the rate after an epoch.

    Args:
      loss: mean loss of the epoch.
      factor: factor by which the rate falls.
      patience: epochs without improvement before the rate falls.
    """
    if loss < self.best * (1 - _LEAST_GAIN):
      self.best, self.num_bad = np.float32(loss), np.float32(0)
      return
    self.num_bad = np.float32(self.num_bad + 1)
    if self.num_bad > patience:
      self.lr = np.float32(self.lr * factor)
      self.num_bad = np.float32(0)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
  """Length and learning rate of a training.

  Attributes:
    num_rounds: maximum number of rounds; the validation split is scored after
      each.
    round_steps: steps per round; an epoch under the paper's protocol.
    schedule: maps a step to its learning rate; None: the rate follows a
      `Plateau`.
    lr: initial learning rate.
    stop_lr: rate at which a plateau ends the training.
    factor, patience: as for `Plateau.update`.
  """

  num_rounds: int
  round_steps: int
  schedule: Callable[[int], jax.Array] | None
  lr: float
  stop_lr: float = 0.0
  factor: float = 0.5
  patience: int = 7

  @property
  def least_rounds(self) -> int:
    """Rounds of the shortest training: one without any gain after the first."""
    if self.schedule is not None:
      return self.num_rounds
    lr, num_rounds = np.float32(self.lr), 1
    while lr > self.stop_lr and num_rounds < self.num_rounds:
      lr = np.float32(lr * self.factor)
      num_rounds += self.patience + 1
    return min(num_rounds, self.num_rounds)


def plan_training(config: ConfigDict, num_videos: int) -> TrainingPlan:
  """Returns the plan of a training.

  Args:
    config: section `paper`, `finetune` or `attentive` of the configuration of
      an evaluation; see configs/eval_far.py.
    num_videos: number of training videos.
  """
  if "patience" in config:
    return TrainingPlan(
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
  schedule = optimizer.learning_rate(
    base_lr=config.base_lr,
    min_lr=config.min_lr,
    warmup_steps=round(config.warmup_ratio * num_steps),
    batch_size=config.batch_size,
    num_steps=num_steps,
  )
  return TrainingPlan(config.num_rounds, round_steps, schedule, config.base_lr)


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
  """Returns Adam without its learning rate, which `updated` applies.

  Args:
    config: see `plan_training`.
  """
  decay = config.get("weight_decay", 0.0)
  parts = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
  if decay:
    parts.append(optax.add_decayed_weights(decay, mask=_is_decayed))
  return optax.chain(*parts)


def updated(params: Pytree, updates: Pytree, lr: jax.Array, factors: Pytree):
  """Returns the parameters after a step; see `layer_factors`."""
  return jax.tree.map(lambda p, u, f: p - lr * f * u, params, updates, factors)


def layer_factors(params: Pytree, depth: int, decay: float) -> Pytree:
  """Returns the factor of the learning rate of each parameter.

  Args:
    params: nested dicts by name, with unstacked blocks.
    depth, decay: see optimizer.layer_factor.

  Returns:
    Tree of float32 scalars with the structure of `params`.
  """

  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.float32(
      optimizer.layer_factor(
        jax.tree_util.keystr(path, simple=True, separator="/"),
        x.ndim,
        depth,
        decay,
      )
    ),
    params,
  )


def _is_decayed(params: Pytree) -> Pytree:
  """Selects matrices: biases and norms are not decayed."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == "kernel", params
  )
