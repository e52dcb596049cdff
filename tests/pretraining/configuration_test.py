"""Configurations that cannot be run are refused at once, with every reason."""

import contextlib
import importlib
import math
import pkgutil

import jax
import numpy as np
import pytest

import configs
from configs import pretrain_b
from marlin_jax.pretraining import configuration, masking, optimizer
from marlin_jax.pretraining.configuration import (
  MASKING_STRATEGIES,
  validate,
)
from marlin_jax.training.configuration import ConfigError


def refuse(**changes):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError) as error:
    validate(config)
  return str(error.value)


def test_all_problems_are_reported_together():
  message = refuse(
    **{
      "batch_size": 0,
      "mask.strategy": "faces",
      "model.width": 100,
      "data.num_frames": 15,
      "num_steps": 5,
    }
  )
  assert "5 problems" in message
  assert "batch_size=0: expected at least 1" in message
  assert "mask.strategy='faces': expected one of fasking, " in message
  assert "model.width=100: expected a multiple of twice" in message
  assert "data.num_frames=15: expected a multiple of model.tubelet_size=2" in (
    message
  )
  assert "num_epochs=2000.0 and num_steps=5: exactly one" in message


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"mask.ratio": 0.9995},
      "nothing visible of 1568 tokens; expected at most 0.9993",
    ),
    (
      {"mask.ratio": 0.9995, "mask.strategy": "frame"},
      "nothing visible of 1568 tokens; expected at most 0.9993",
    ),
    (
      {"mask.ratio": 0.999, "data.frame_size": 112},
      "nothing visible of 392 tokens; expected at most 0.9974",
    ),
    (
      {"data.frame_size": 100},
      "data.frame_size=100: expected a multiple of model.patch_size=16",
    ),
    (
      {"data.order": "stored", "data.shuffle_window": 64},
      "data.shuffle_window=64: expected 0 with data.order=stored",
    ),
    ({"data.frame_size": 256}, "data.frame_size=256: expected 1 <= value <="),
    ({"model.patch_size": 0}, "model.patch_size=0: expected at least 1"),
    ({"augment.min_crop_ratio": 0.0}, "augment.min_crop_ratio=0.0: expected"),
    ({"augment.max_crop_aspect": 0.5}, "augment.max_crop_aspect=0.5: exp"),
    ({"mask.ratio": 1.0}, "mask.ratio=1.0: expected"),
    ({"data.path": "a:1,b:0"}, "'b:0' is not FOLDER:WEIGHT with a weight abov"),
    ({"data.path": "a:x,b:1"}, "'x' is not a weight; expected a folder, or"),
    ({"data.path": "a:1,:2"}, "':2' is not FOLDER:WEIGHT"),
    ({"data.path": "a:1,b:1e-5"}, "the weight of b is below 1/10000"),
    (
      {"data.clips_per_record": 3},
      "batch_size=32: expected a multiple of data.clips_per_record=3",
    ),
    ({"data.clips_per_record": 0}, "data.clips_per_record=0: expected at"),
    (
      {"data.clips_per_record": 2, "data.draws_per_unit": 3},
      "data.clips_per_record=2 times data.draws_per_unit=3",
    ),
    (
      {"data.draws_per_unit": 2, "data.sample_by": "record"},
      "data.draws_per_unit=2: expected 1 with data.sample_by='record'",
    ),
    ({"data.min_quality": 1.5}, "data.min_quality=1.5: expected 0 <= value"),
    ({"data.min_quality": -0.1}, "data.min_quality=-0.1: expected 0 <= value"),
    ({"mesh.data": 0}, "mesh.data=0"),
    ({"optim.base_lr": 0.0}, "optim.base_lr=0.0"),
    ({"init_from": "gs://b/run"}, "init_from='gs://b/run': expected a local"),
    ({"teacher.path": "gs://b/run"}, "expected a local path or a name; copy "),
    ({"optim.min_lr": 1.0}, "optim.min_lr=1.0: expected at most optim.base_lr"),
    ({"optim.eps": -1.0}, "optim.eps=-1.0: expected a value above 0"),
    # It would make all weights infinite in one step.
    (
      {"optim.base_lr": math.inf},
      "optim.base_lr=inf: expected a value above 0, and finite",
    ),
    ({"adv.weight": math.inf}, "adv.weight=inf: expected at least 0, and fin"),
    ({"watchdog.exit_secs": math.nan}, "watchdog.exit_secs=nan: expected at"),
    ({"data.frame_size": 0}, "data.frame_size=0: expected 1 <= value <= 224"),
    ({"data.num_frames": 0}, "data.num_frames=0: expected at least 1"),
    ({"num_epochs": float("inf")}, "num_epochs=inf: expected at least 0, and"),
    ({"dtype": "float16"}, "dtype='float16'"),
    ({"optim.layer_decay": 1.5}, "layer_decay=1.5: expected 0 < value <= 1"),
    (
      {"optim.cooldown_steps": 5},
      "optim.cooldown_steps=5: expected 0 with optim.schedule='cosine'",
    ),
    (
      {"optim.schedule": "constant"},
      "expected optim.warmup_steps, or a ratio of 0",
    ),
    (
      {"loss.region_weight": 0.1},
      "expected 0 with mask.strategy='fasking'; only crfr_p hides a whole",
    ),
    (
      {"target.motion_weight": 0.5, "model.tubelet_size": 1},
      "target.motion_weight=0.5: expected 0 with model.tubelet_size=1",
    ),
    ({"target.motion_weight": 1.0}, "target.motion_weight=1.0: expected"),
    ({"probe.steps": 5}, "probe.label='' with probe.steps=5: name a label"),
    (
      {"probe.steps": 5, "probe.label": "x", "probe.eval_split": "train"},
      "probe.eval_split='train': expected two splits",
    ),
    (
      {"probe.steps": 5, "probe.label": "x", "probe.num_blocks": 13},
      "probe.num_blocks=13: expected at most model.depth=12",
    ),
  ],
)
def test_values_that_make_no_sense_are_refused(changes, words):
  assert words in refuse(**changes)


@pytest.mark.parametrize("strategy", MASKING_STRATEGIES)
def test_every_masking_strategy_of_the_table_exists(strategy):
  masks = masking.Masking(strategy, 0.5)
  regions = np.zeros((1, 8, 14, 14), np.uint16)
  visible, masked = masks(regions, jax.random.split(jax.random.key(0), 1))
  tokens = np.concatenate([visible[0], masked[0]])
  assert sorted(tokens.tolist()) == list(range(1568))


SHIPPED = sorted(
  module.name
  for module in pkgutil.iter_modules(configs.__path__)
  if not module.name.startswith("eval_")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_configuration_is_valid(name):
  validate(importlib.import_module(f"configs.{name}").get_config())


def test_a_run_that_differs_in_a_fixed_value_is_another():
  config = pretrain_b.get_config()
  saved = configuration.identity(config, "abc", 7)
  assert saved["num_steps"] == 7
  assert saved["data.fingerprint"] == "abc"
  config.log_steps, config.mesh.fsdp, config.data.path = 1, 2, "elsewhere"
  assert configuration.identity(config, "abc", 7) == saved
  config.mask.ratio = 0.75
  changed = configuration.identity(config, "abc", 7)
  assert changed == saved | {"mask.ratio": 0.75}


def test_the_length_of_a_run_with_a_constant_rate_may_change():
  config = pretrain_b.get_config()
  config.optim.schedule = "constant"
  saved = configuration.identity(config, "abc", 7)
  config.optim.cooldown_steps = 2
  assert configuration.identity(config, "abc", 9) == saved


def test_a_checkpoint_from_before_a_key_existed_fits_its_old_value():
  config = pretrain_b.get_config()
  saved = configuration.identity(config, "abc", 7)
  later = {
    "optim.decay_params": "kernels",
    "ema_warmup": True,
    "data.frame_size": 112,
    "model.patch_size": 8,
    "augment.flip_ratio": 0.5,
    "augment.min_crop_ratio": 0.5,
    "augment.max_crop_aspect": 1.5,
    "augment.stride_jitter": 1,
    "augment.colour_jitter": 0.3,
  }
  assert not saved.keys() & later.keys()
  config.update_from_flattened_dict(later)
  assert configuration.identity(config, "abc", 7) == saved | later


def test_only_keys_may_be_allowed_to_change():
  config = pretrain_b.get_config()
  config.allow_change = "dtype,optim.b1,data.fingerprint"
  validate(config)
  assert "'beta'" in refuse(allow_change="dtype,beta")


def test_data_sets_have_paths_weights_and_names():
  config = pretrain_b.get_config()
  config.data.path = "data/ytf"
  assert configuration.data_sets(config) == [("data/ytf", 1.0, "ytf")]
  config.data.path = "data/ytf:1, gs://bucket/vox2/:2.5,gs://other/ytf"
  assert configuration.data_sets(config) == [
    ("data/ytf", 1.0, "ytf"),
    ("gs://bucket/vox2/", 2.5, "vox2"),
    ("gs://other/ytf", 1.0, "ytf_2"),
  ]
  config.data.path = "a/x_2,b/x,c/x"
  names = [data.name for data in configuration.data_sets(config)]
  assert names == ["x_2", "x", "x_2_2"]


@pytest.mark.parametrize(
  ("before", "last_step", "told"),
  [
    # Steps of the run and of its cool-down; they become 100 and 30.
    ((100, 0), 70, ""),
    ((100, 0), 71, "would fall from step 70"),
    # The run has ended: nothing would cool down.
    ((100, 0), 100, "expected num_steps of at least 130"),
    ((90, 0), 71, "would fall from step 70"),
    # It resumes in its cool-down.
    ((100, 30), 90, ""),
    ((90, 30), 90, "would fall from step 70"),
    # It would have to rise again.
    ((80, 20), 60, ""),
    ((80, 20), 61, "has fallen from step 60"),
    # It begins after the warm-up.
    ((60, 60), 50, ""),
    ((60, 60), 51, "has fallen from step 50"),
  ],
)
def test_a_cool_down_changes_only_before_it_begins(before, last_step, told):
  config = pretrain_b.get_config()
  config.optim.warmup_steps = 50
  config.optim.schedule, config.optim.cooldown_steps = "constant", 30
  begun = dict(zip(("num_steps", "optim.cooldown_steps"), before, strict=True))
  expected = contextlib.nullcontext()
  if told:
    expected = pytest.raises(ConfigError, match=told)
  with expected:
    configuration.check_cooldown(config, 100, begun, last_step)
  config.allow_change = "optim.cooldown_steps"
  configuration.check_cooldown(config, 100, begun, last_step)


def test_a_cool_down_may_begin_with_the_end_of_the_warm_up():
  config = pretrain_b.get_config()
  config.optim.warmup_steps = 50
  config.optim.schedule, config.optim.cooldown_steps = "constant", 60
  configuration.check_cooldown(config, 60, {"num_steps": 100}, 50)
  with pytest.raises(ConfigError, match="would fall from step 50 on"):
    configuration.check_cooldown(config, 60, {"num_steps": 100}, 51)


@pytest.mark.parametrize(
  ("num_steps", "told"),
  [
    (130, []),
    (129, ["cooldown_steps=30: the warm-up leaves 29"]),
    (99, ["warmup_steps=100: the learning rate ends at 99%", "start_step=100"]),
  ],
)
def test_a_run_too_short_for_its_settings_is_told(num_steps, told):
  config = pretrain_b.get_config()
  config.optim.schedule = "constant"
  config.optim.warmup_steps, config.optim.cooldown_steps = 100, 30
  config.profile.start_step = 100
  notes = configuration.unreached(config, num_steps)
  assert all(words in note for words, note in zip(told, notes, strict=True))
  rate = optimizer.make_schedule(config.optim, 256, num_steps)
  top = max(float(rate(step)) for step in range(num_steps))
  assert (top < 0.995 * config.optim.base_lr) == (num_steps < 100)
