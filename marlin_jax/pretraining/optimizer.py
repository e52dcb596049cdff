"""Optimiser and learning-rate schedule, from section `optim`.

No setting but `mu_dtype` changes the arrays of the optimiser's state, so that
all others may change when a run resumes.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Pytree = Any


# --- Learning rate ------------------------------------------------------------


def make_schedule(
  settings: ConfigDict, batch_size: int, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate of each step; see `learning_rate`.

  Args:
    settings: section `optim` of a configuration.
    batch_size: clips per step over all devices.
    num_steps: steps of the whole run.
  """
  return learning_rate(
    base_lr=settings.base_lr,
    min_lr=settings.min_lr,
    warmup_steps=settings.warmup_steps
    or round(settings.warmup_ratio * num_steps),
    batch_size=batch_size,
    num_steps=num_steps,
    cooldown_steps=settings.cooldown_steps
    if settings.schedule == "constant"
    else None,
  )


def learning_rate(
  *,
  base_lr: float,
  min_lr: float,
  warmup_steps: int,
  batch_size: int,
  num_steps: int,
  cooldown_steps: int | None = None,
) -> optax.Schedule:
  """Returns a schedule of linear warm-up, then decay to the minimum.

  Both rates are scaled by batch_size / 256 (Goyal et al. 2017). The reference
  changes the rate once per epoch; here it changes every step, which is smoother
  and independent of the size of the data set.

  Args:
    base_lr: peak rate at batch 256.
    min_lr: final rate at batch 256.
    warmup_steps: steps that warm up.
    batch_size: clips per step, over all devices.
    num_steps: steps of the whole run.
    cooldown_steps: number of last steps in which the rate decays linearly from
      the peak (Hägele et al. 2024); before them it does not depend on
      num_steps. None: decay by a cosine from the warm-up on.
  """
  scale = batch_size / 256
  if cooldown_steps is None:
    decay_start = warmup_steps
    decay = optax.cosine_decay_schedule(
      base_lr * scale,
      max(num_steps - warmup_steps, 1),
      alpha=min_lr / base_lr,
    )
  else:
    decay_start = max(num_steps - cooldown_steps, warmup_steps)
    decay = optax.linear_schedule(
      base_lr * scale, min_lr * scale, max(num_steps - decay_start, 1)
    )
  parts = [(decay_start, decay)]
  if decay_start > warmup_steps:
    parts.insert(0, (warmup_steps, optax.constant_schedule(base_lr * scale)))
  if warmup_steps:
    # The first step has a rate above 0, so that it is not wasted.
    warmup = optax.linear_schedule(
      base_lr * scale / warmup_steps, base_lr * scale, warmup_steps - 1
    )
    parts.insert(0, (0, warmup))
  starts, schedules = zip(*parts, strict=True)
  if len(schedules) == 1:
    return schedules[0]
  return optax.join_schedules(schedules, starts[1:])


def per_update(
  schedule: optax.Schedule, updates_per_step: int
) -> optax.Schedule:
  """Returns a schedule by optimiser updates from one by steps.

  optax counts updates. All updates of a step have the step's rate.

  Args:
    schedule: step -> learning rate.
    updates_per_step: updates that the optimiser makes in a step.
  """
  if updates_per_step == 1:
    return schedule
  return lambda count: schedule(count // updates_per_step)


def last_rate(schedule: optax.Schedule, opt_state: optax.OptState) -> float:
  """Returns the learning rate of an optimiser's last update.

  Args:
    schedule: the optimiser's schedule.
    opt_state: its state, with concrete arrays. Before the first update, the
      rate of the first is returned.
  """
  count = optax.tree.get(
    opt_state,
    "count",
    filtering=lambda path, _: (
      getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
    ),
  )
  return float(schedule(max(int(count) - 1, 0)))


# --- Optimiser ----------------------------------------------------------------


def make_optimizer(
  settings: ConfigDict, schedule: optax.Schedule, depth: int
) -> optax.GradientTransformation:
  """Returns AdamW with weight and layer-wise decay, and gradient clipping.

  Args:
    settings: section `optim` of a configuration.
    schedule: number of updates so far -> learning rate.
    depth: blocks of the encoder.
  """
  adam = {
    "b1": settings.b1,
    "b2": settings.b2,
    "eps": settings.eps,
    "mu_dtype": settings.mu_dtype,
  }
  decay, layer_decay = settings.weight_decay, settings.layer_decay
  if settings.decay_params == "all" and layer_decay == 1:
    optimizer = optax.adamw(schedule, weight_decay=decay, **adam)
  else:

    def scale(path, update, param):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if settings.decay_params == "all" or name.endswith("kernel"):
        update += decay * param
      if layer_decay != 1 and name.startswith("encoder/"):
        update *= layer_factor(name, update.ndim, depth, layer_decay)
      return update

    # In place of adamw's mask and of optax.multi_transform, whose states have
    # another structure.
    optimizer = optax.chain(
      optax.scale_by_adam(**adam),
      optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
          scale, updates, params
        )
      ),
      optax.scale_by_learning_rate(schedule),
    )
  return _clipped(optimizer, settings.clip_norm)


def _clipped(
  optimizer: optax.GradientTransformation, max_norm: float
) -> optax.GradientTransformation:
  """Returns the optimiser with the global norm of its gradients clipped.

  Args:
    optimizer: the optimiser.
    max_norm: the limit; 0: none.
  """
  if not max_norm:
    return optimizer
  clip = optax.clip_by_global_norm(max_norm)

  def update(grads, state, params=None):
    grads, _ = clip.update(grads, optax.EmptyState())
    return optimizer.update(grads, state, params)

  return optax.GradientTransformation(optimizer.init, update)


def layer_factor(
  name: str, ndim: int, depth: int, decay: float
) -> float | jax.Array:
  """Returns the factor of an encoder parameter's learning rate.

  Rates fall from the last layer to the first (BEiT, Bao et al., ICLR 2022): the
  final norm has the full rate.

  Args:
    name: path of the parameter, such as
      'encoder/transformer/blocks/0/mlp_in/bias'.
    ndim: number of its axes.
    depth: number of blocks.
    decay: factor from each layer to the one before it.

  Returns:
    A number; for parameters that are stacked over blocks (models.stacking) one
    for each block, float32 (depth, 1, ...).
  """
  if block := re.search(r"blocks/(\d+)/", name):
    return decay ** (depth - int(block[1]))
  if "blocks/" in name:
    exponents = jnp.arange(depth, 0, -1, dtype=jnp.float32)
    return (decay**exponents).reshape(depth, *[1] * (ndim - 1))
  return decay ** (depth + 1) if "patch_embedding/" in name else 1.0
