"""The estimate of what fits, against what the compiler allocates."""

import jax
import pytest

from configs import pretrain_s
from marlin_jax.devices import sharding
from marlin_jax.pretraining import experiment, memory


@pytest.mark.parametrize(
  ("attention", "remat"),
  [
    ("plain", "none"),
    ("by_head", "none"),
    ("chunked", "none"),
    ("chunked", "full"),
  ],
)
def test_the_estimate_is_on_the_safe_side_and_no_more_than_double(
  attention, remat
):
  config = pretrain_s.get_config()
  config.model.depth = 3
  config.model.dec_depth = 2
  config.attention, config.remat = attention, remat
  config.batch_size = 2
  config.clips_per_device = 2
  made = experiment.build(config, num_steps=10)
  trainer = made.trainer
  state = jax.eval_shape(made.initialise)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  layout = experiment.lay_out(config, mesh, state)
  compiled = experiment.lower_step(
    trainer, state, layout, mesh, config.batch_size
  ).compile()
  gradients = 4 * experiment.count((state.params, state.disc_params))
  found = compiled.memory_analysis().temp_size_in_bytes - gradients
  estimate = 2 * memory.clip_bytes(
    model=config.model,
    num_tokens=trainer.task.masking.num_tokens,
    num_visible=trainer.task.masking.num_visible,
    pixels=trainer.task.tubelets.pixels,
    dtype=config.dtype,
    attention=attention,
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
