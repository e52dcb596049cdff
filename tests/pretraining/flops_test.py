"""FLOPs counted from sizes, against the paper's networks and against XLA."""

import types

import numpy as np
import pytest

from configs import pretrain_b, pretrain_h, pretrain_l, pretrain_s
from marlin_jax.devices import chips
from marlin_jax.pretraining import build, flops
from marlin_jax.weights.architecture import Architecture

# A step that compiles in seconds and yet consists almost entirely of matrix
# products. All sizes differ.
SMALL = {
  "batch_size": 4,
  "clips_per_device": 4,
  "data.num_frames": 4,
  "model.width": 192,
  "model.depth": 2,
  "model.num_heads": 2,
  "model.mlp_dim": 1152,
  "model.dec_width": 256,
  "model.dec_depth": 3,
  "model.dec_num_heads": 2,
  "model.dec_mlp_dim": 640,
  "adv.hidden": 704,
}


def our_count(config, num_microbatches=1):
  """Returns our FLOPs per clip and step."""
  experiment = build.Experiment(config, num_steps=10)
  return flops.training_step(
    experiment.architecture,
    experiment.trainer,
    config.batch_size,
    num_microbatches=num_microbatches,
  )


def xlas_count(config, compiled=False):
  """Returns XLA's FLOPs per clip and step, and the number of microbatches."""
  experiment = build.Experiment(config, num_steps=10)
  step = experiment.lower_step()
  if compiled:
    step = step.compile()
  per_clip = step.cost_analysis()["flops"] / config.batch_size
  return per_clip, experiment.trainer.num_microbatches


def mesh_of(device_kind, num_devices):
  """As much of a mesh of such devices as the peak depends on."""
  device = types.SimpleNamespace(device_kind=device_kind)
  devices = np.array([device] * num_devices)
  return types.SimpleNamespace(devices=devices, size=num_devices)


@pytest.mark.parametrize(
  ("module", "step", "features"),
  [
    # The authors' step, counted by PyTorch, without what it computes twice, the
    # decoder's last block on visible tokens, and the discriminator's first
    # layer on predicted pixels.
    (pretrain_s, 71.4, 113.8),
    (pretrain_b, 219.5, 360.7),
    (pretrain_l, 863.4, 1193.7),
  ],
)
def test_the_papers_networks(module, step, features):
  config = module.get_config()
  assert our_count(config) / 1e9 == pytest.approx(step, abs=0.06)
  architecture = Architecture.from_config(config)
  assert flops.features(architecture) / 1e9 == pytest.approx(features, abs=0.06)


@pytest.mark.parametrize(
  "overrides",
  [
    pytest.param({}, id="recipe"),
    pytest.param({"adv.weight": 0.0}, id="no_game"),
    pytest.param({"adv.g_steps": 2}, id="two_g_steps"),
    pytest.param({"mask.decoder_ratio": 0.5}, id="decoder_mask"),
    pytest.param({"remat": "dots"}, id="remat_dots"),
    pytest.param({"remat": "full"}, id="remat_full"),
  ],
)
def test_a_step_has_the_flops_that_xla_counts(overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  found, num_microbatches = xlas_count(config)
  assert num_microbatches == 1
  experiment = build.Experiment(config, num_steps=10)
  expected = our_count(config) + flops.repeated_by_remat(
    experiment.architecture, experiment.trainer, config.remat
  )
  assert found == pytest.approx(expected, rel=0.03)


def test_the_papers_step_has_at_most_3_percent_more_than_the_model():
  """Unrolled, with plain attention: XLA counts the body of a loop once."""
  config = pretrain_b.get_config()
  config.batch_size = config.clips_per_device = 2
  config.attention = "plain"
  found, _ = xlas_count(config)
  assert our_count(config) < found < 1.03 * our_count(config)


@pytest.mark.parametrize(
  "overrides",
  [
    pytest.param({}, id="recipe"),
    # The penalty needs pixels that the compiler has already computed.
    pytest.param(
      {"adv.gp_weight": 10.0, "adv.d_steps": 2},
      id="penalty_and_two_d_steps",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_compiled_step_has_the_same(overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  found, _ = xlas_count(config, compiled=True)
  assert found == pytest.approx(our_count(config), rel=0.03)


def test_microbatches_cost_the_discriminator_a_forward_of_its_own():
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | {"clips_per_device": 2})
  found, num_microbatches = xlas_count(config)
  assert num_microbatches == 2
  # XLA counts the body of a loop once: here half of the batch.
  assert 2 * found == pytest.approx(our_count(config, 2), rel=0.03)
  config.adv.weight = 0.0
  assert our_count(config, 2) == our_count(config)


def test_a_larger_network_takes_more():
  large, huge = (m.get_config() for m in (pretrain_l, pretrain_h))
  assert our_count(huge) > 1.5 * our_count(large)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5", "TPU v5p"),
    ("NVIDIA H100 80GB HBM3", "H100"),
  ],
)
def test_chips_are_found_by_what_jax_calls_them(kind, name):
  assert chips.find(kind).name == name


def test_what_is_not_in_the_table_is_no_chip():
  assert chips.find("cpu") is None


def test_the_peak_is_that_of_all_chips_in_the_dtype_in_use():
  flops_per_clip = our_count(pretrain_b.get_config())

  def peak(num_devices, dtype):
    mesh = mesh_of("NVIDIA H200", num_devices)
    return flops.peak_clips_per_sec(flops_per_clip, mesh, dtype)

  # 989 TFLOP/s; 219.5 GFLOP per clip, as above.
  assert peak(1, "bfloat16") == pytest.approx(989e12 / 219.5e9, rel=1e-3)
  assert peak(8, "bfloat16") == 8 * peak(1, "bfloat16")
  assert peak(1, "float32") < 0.6 * peak(1, "bfloat16")


@pytest.mark.parametrize(
  ("kind", "high", "highest"),
  [("TPU v5 lite", 1 / 3, 1 / 6), ("NVIDIA H200", 1, 67 / 494)],
)
def test_exact_products_have_a_lower_peak(kind, high, highest):
  def share(precision):
    peaks = (
      flops.peak_clips_per_sec(1e9, mesh_of(kind, 1), "float32", x)
      for x in (precision, "default")
    )
    return next(peaks) / next(peaks)

  assert share("high") == pytest.approx(high)
  assert share("highest") == pytest.approx(highest)


def test_a_device_whose_peak_is_unknown_has_no_utilisation():
  mesh = mesh_of("cpu", 1)
  assert flops.peak_clips_per_sec(219.5e9, mesh, "float32") is None
