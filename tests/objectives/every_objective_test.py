"""What must hold for every objective: microbatches, bfloat16, one pass, export.

Layouts are in tests/devices/sharding_test.py, resumption in
tests/pretraining/resume_test.py, over the same table.
"""

import jax
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.pretraining import build
from tests.support import layouts, objectives


def step_of(name, folder, num_steps=2, **overrides):
  """Takes steps; returns the experiment, the last state, and the scalars."""
  config = pretrain_b.get_config()
  settings = layouts.SMALL | objectives.overrides(name, folder)
  config.update_from_flattened_dict(settings | overrides)
  made = build.Experiment(config, 10)
  step = made.lower_step().compile()
  state = jax.jit(made.initialise)()
  batch = objectives.random_batch(made.batch_shapes)
  found = []
  for _ in range(num_steps):
    state, scalars = step(state, batch, jax.random.key(0), **made.constants)
    found.append({k: float(v) for k, v in scalars.items()})
  return made, state, found


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_bfloat16_gives_nearly_the_same(name, tmp_path):
  _, _, want = step_of(name, tmp_path)
  made, state, got = step_of(name, tmp_path, dtype="bfloat16")
  for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)):
    assert leaf.dtype in (np.float32, np.int32)
  for exact, found in zip(want, got, strict=True):
    assert exact.keys() == found.keys()
    for key in (
      "loss",
      "loss_rec",
      *(f"loss_{x.name}" for x in made.objectives),
    ):
      assert found[key] == pytest.approx(exact[key], rel=0.03), key


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_two_updates_and_every_option_of_the_step_work(name, tmp_path):
  options = {
    "adv.g_steps": 2,
    "adv.max_pull": 1.0,
    "clips_per_device": 4,
    "mask.decoder_ratio": 0.5,
    "optim.clip_norm": 0.5,
    "optim.spike_sigmas": 6.0,
    "remat": "full",
    "scan": True,
  }
  made, state, found = step_of(name, tmp_path, **options)
  assert made.trainer.num_microbatches == 2
  assert found[-1]["num_skipped"] == 0
  first = jax.jit(made.initialise)()
  # All that is trained has moved, but for the biases before a norm.
  moved = jax.tree.map(
    lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, first.params
  )
  assert all(jax.tree.leaves(moved)), moved
