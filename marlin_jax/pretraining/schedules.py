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
