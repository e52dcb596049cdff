"""The estimate of what fits, against what the compiler allocates."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import pretrain_s
from marlin_jax import experiment, memory, train_step


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_estimate_is_on_the_safe_side_and_no_more_than_double(remat):
  config = pretrain_s.get_config()
  config.model.depth = 3
  config.model.dec_depth = 2
  config.remat = remat
  config.batch_size = 2
  config.clips_per_device = 2
  made = experiment.build(config, num_steps=10)
  trainer = made.trainer
  state = jax.eval_shape(made.initialise)
  grid = trainer.task.tubelets.grid
  batch = {
    "video": jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.uint8),
    "regions": jax.ShapeDtypeStruct((2, *grid), jnp.uint16),
  }
  rng = jax.eval_shape(lambda: jax.random.key(0))
  compiled = (
    jax.jit(functools.partial(train_step.train_step, trainer), donate_argnums=0)
    .lower(state, batch, rng)
    .compile()
  )
  gradients = 4 * experiment.count((state.params, state.disc_params))
  found = compiled.memory_analysis().temp_size_in_bytes - gradients
  estimate = 2 * memory.clip_bytes(
    model=config.model,
    num_tokens=trainer.task.masking.num_tokens,
    num_visible=trainer.task.masking.num_visible,
    pixels=trainer.task.tubelets.pixels,
    dtype=config.dtype,
    remat=config.remat,
  )
  assert found <= estimate <= 2 * found, (found / 2e6, estimate / 2e6)


@pytest.mark.parametrize(
  ("batch_size", "num_devices", "fit", "num_parts"),
  [
    (32, 1, 100, 1),
    (32, 1, 31, 2),
    (32, 1, 3, 16),
    (32, 8, 3, 2),
    (32, 8, 0, 4),
    (30, 1, 4, 10),
  ],
)
def test_a_batch_is_cut_into_the_fewest_parts_that_fit(
  batch_size, num_devices, fit, num_parts
):
  assert memory.num_parts(batch_size, num_devices, fit) == num_parts
