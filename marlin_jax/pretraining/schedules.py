"""The learning-rate schedule of the recipe."""

from __future__ import annotations

import optax


def learning_rate(
  *,
  base_lr: float,
  min_lr: float,
  warmup_ratio: float,
  batch_size: int,
  num_steps: int,
) -> optax.Schedule:
  """Returns a schedule of linear warm-up, then cosine decay to the minimum.

  Both rates are scaled by batch_size / 256 (Goyal et al. 2017). The reference
  changes the rate once per epoch; here it changes every step, which is smoother
  and independent of the size of the data set.

  Args:
    base_lr: peak rate at batch 256.
    min_lr: final rate at batch 256.
    warmup_ratio: share of the steps that warm up.
    batch_size: clips per step, over all devices.
    num_steps: steps of the whole run.
  """
  scale = batch_size / 256
  warmup_steps = round(warmup_ratio * num_steps)
  cosine = optax.cosine_decay_schedule(
    base_lr * scale, max(num_steps - warmup_steps, 1), alpha=min_lr / base_lr
  )
  if not warmup_steps:
    return cosine
  # The first step has a rate above 0, so that it is not wasted.
  warmup = optax.linear_schedule(
    base_lr * scale / warmup_steps, base_lr * scale, warmup_steps - 1
  )
  return optax.join_schedules([warmup, cosine], [warmup_steps])


def per_update(
  schedule: optax.Schedule, updates_per_step: int
) -> optax.Schedule:
  """Returns a schedule of steps as a schedule of an optimiser's updates.

  optax counts updates. Every update of a step has the step's rate.

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
    schedule: that the optimiser was made with.
    opt_state: its state, with concrete arrays. Before the first update the rate
      is that of the first.
  """
  count = optax.tree.get(
    opt_state,
    "count",
    filtering=lambda path, _: (
      getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
    ),
  )
  return float(schedule(max(int(count) - 1, 0)))
