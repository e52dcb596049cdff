"""The memory estimate, against what the compiler allocates."""

import pytest

from configs import pretrain_s
from marlin_jax.models import vit
from marlin_jax.pretraining import build, memory


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
  made = build.Experiment(config, num_steps=10)
  state = made.shapes
  compiled = made.lower_step().compile()
  gradients = 4 * build.count((state.params, state.disc_params))
  found = compiled.memory_analysis().temp_size_in_bytes - gradients
  estimate = 2 * memory.clip_bytes(
    made.architecture,
    made.task.masking.num_visible,
    vit.Execution(config.dtype, attention, config.scan, config.remat),
  )
  assert found <= estimate <= 2 * found, (found / 2e6, estimate / 2e6)


@pytest.mark.parametrize(
  ("batch_size", "num_devices", "fit", "expected"),
  [
    (32, 1, 100, 1),
    (32, 1, 31, 2),
    (32, 1, 3, 16),
    (32, 8, 3, 2),
    (32, 8, 0, 4),
    (30, 1, 4, 10),
  ],
)
def test_a_batch_is_split_into_the_fewest_microbatches_that_fit(
  batch_size, num_devices, fit, expected
):
  assert memory.num_microbatches(batch_size // num_devices, fit) == expected
