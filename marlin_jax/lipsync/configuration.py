"""Checks of the configuration of lip synchronisation, before any compute."""

from __future__ import annotations

from collections.abc import Iterator

from ml_collections import ConfigDict

from marlin_jax.pretraining import configuration as checks
from marlin_jax.training.configuration import get, refuse

# As in the modules that they are for, which need jax to be imported.
_CHOICES = {
  "expert.num_frames": (5, 16),
  "generator.kind": ("marlin", "wav2lip"),
  "dtype": ("float32", "bfloat16"),
  "attention": checks.ATTENTION,
  "remat": ("none", "dots", "full"),
}
# What a resumed run must agree in beside keys of the configuration.
_NO_KEYS = (
  *("data.fingerprint", "eval_data.fingerprint"),
  *("expert_sha256", "encoder", "encoder_sha256"),
)
_AT_LEAST_1 = (
  "data.num_threads",
  "expert.batch_size",
  "expert.num_steps",
  "expert.eval_steps",
  "expert.eval_batches",
  "expert.max_offset",
  "generator.batch_size",
  "generator.num_steps",
  "generator.eval_steps",
  "generator.eval_batches",
  "distributed.timeout_secs",
  "max_skipped_steps",
  "log_steps",
  "picture_steps",
  "picture_clips",
  "checkpoint_steps",
  "keep_checkpoints",
)
_AT_LEAST_0 = (
  "seed",
  "data.max_bad_records",
  "generator.sync_weight",
  "generator.sync_threshold",
  "generator.adv_weight",
  "distributed.num_processes",
  "distributed.process_id",
  "watchdog.dump_secs",
  "watchdog.exit_secs",
)
_ABOVE_0 = ("expert.lr", "expert.width", "generator.lr", "generator.width")


def validate(config: ConfigDict) -> None:
  """Reports everything that is wrong with a configuration at once.

  Args:
    config: see configs/eval_ls.py.

  Raises:
    ConfigError: one line per problem: key, value found, what is expected.
  """
  refuse(_problems(config))


def _problems(config: ConfigDict) -> Iterator[str]:
  for keys, is_bad, expected in (
    (_AT_LEAST_1, lambda x: x < 1, "at least 1"),
    (_AT_LEAST_0, lambda x: x < 0, "at least 0"),
    (_ABOVE_0, lambda x: x <= 0, "a value above 0"),
  ):
    for key in keys:
      value = get(config, key)
      if is_bad(value):
        yield f"{key}={value}: expected {expected}"
  for key, choices in _CHOICES.items():
    if get(config, key) not in choices:
      yield (
        f"{key}={get(config, key)!r}: expected one of "
        f"{', '.join(map(str, choices))}"
      )
  generator = config.generator
  if generator.kind == "wav2lip" and generator.train_encoder:
    yield (
      "generator.train_encoder=True with generator.kind='wav2lip': that has no "
      "pretrained encoder and learns from scratch; expected False"
    )
  weights = generator.sync_weight + generator.adv_weight
  if weights >= 1:
    yield (
      f"generator.sync_weight + generator.adv_weight = {weights}: expected "
      "less than 1, what is left is the weight of L1"
    )
  for key in ("b1", "b2"):
    if not 0 <= generator[key] < 1:
      yield f"generator.{key}={generator[key]}: expected 0 <= value < 1"
  for key in ("train", "val"):
    if not config.data[key]:
      yield f"data.{key}='': expected the name of a split"
  if config.mesh.data != -1 and config.mesh.data < 1:
    yield f"mesh.data={config.mesh.data}: expected -1 (all) or at least 1"
  for key in filter(None, config.allow_change.split(",")):
    if key not in _NO_KEYS:
      try:
        get(config, key)
      except (AttributeError, KeyError, TypeError):
        yield f"allow_change names {key!r}, which is no key"
  yield from checks.distributed_problems(config.distributed)
