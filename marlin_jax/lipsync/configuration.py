"""Rules of the lip-sync configuration, configs/eval_ls.py.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.training.configuration import (
  ABOVE_0_TO_1,
  BELOW_1,
  FRAME_SIZES,
  FROM_0_TO_1,
  SPLIT,
  TRAINING_KEYS,
  above,
  at_least,
  check_keys,
  fixed,
  fixed_values,
  free,
  one_of,
  random_keys,
  random_violations,
  refuse,
  training_violations,
)

KEYS = TRAINING_KEYS | {
  "data.train": fixed(SPLIT),
  "data.val": fixed(SPLIT),
  "data.sample_by": fixed(one_of("record", "subject"), before="record"),
  "expert.num_frames": fixed(one_of(5, 16)),
  "expert.width": fixed(above(0)),
  "expert.height": fixed(one_of(24, 48), before=48),
  "expert.frame_size": fixed(FRAME_SIZES, before=FRAME_SIZE),
  "expert.loss": fixed(one_of("cosine", "contrastive"), before="cosine"),
  "expert.temperature": fixed(above(0), before=0.1),
  "expert.clips_per_record": fixed(at_least(1), before=1),
  "expert.flip_ratio": fixed(FROM_0_TO_1, before=0.0),
  "expert.min_crop_ratio": fixed(ABOVE_0_TO_1, before=1.0),
  "expert.colour_jitter": fixed(BELOW_1, before=0.0),
  "expert.gain_jitter": fixed(at_least(0), before=0.0),
  "expert.batch_size": fixed(at_least(1)),
  "expert.lr": fixed(above(0)),
  "expert.weight_decay": fixed(at_least(0), before=0.0),
  "expert.num_steps": free(at_least(1)),
  "expert.eval_steps": free(at_least(1)),
  "expert.eval_batches": free(at_least(1)),
  "expert.max_offset": free(at_least(1)),
  "generator.kind": fixed(one_of("marlin", "wav2lip")),
  "generator.train_encoder": fixed(),
  "generator.width": fixed(above(0)),
  "generator.batch_size": fixed(at_least(1)),
  "generator.lr": fixed(above(0)),
  "generator.b1": fixed(BELOW_1),
  "generator.b2": fixed(BELOW_1),
  "generator.num_steps": free(at_least(1)),
  # Fixed because the evaluation decides when the sync loss gets its weight.
  "generator.eval_steps": fixed(at_least(1)),
  "generator.eval_batches": fixed(at_least(1)),
  "generator.sync_weight": fixed(at_least(0)),
  "generator.sync_threshold": fixed(at_least(0)),
  "generator.adv_weight": fixed(at_least(0)),
  # A checkpoint records the encoder's architecture and hash instead.
  **random_keys(free),
}

# Recorded in checkpoints, but not a key of the configuration.
_EXTRA = (
  "data.fingerprint",
  "eval_data.fingerprint",
  "start_sha256",
  "expert_sha256",
  "encoder",
  "encoder_sha256",
)


def validate(config: ConfigDict) -> None:
  """Checks a configuration and reports all problems at once.

  Args:
    config: configuration to check; see configs/eval_ls.py.

  Raises:
    ConfigError: one line per problem: key, value, expected value.
  """
  check_keys(config, KEYS)
  refuse(_problems(config))


def identity(config: ConfigDict, section: str) -> dict[str, Any]:
  """Returns the configuration's values that a resumed run must share.

  Args:
    config: a valid configuration.
    section: 'expert' or 'generator', the network that is trained.

  Returns:
    Values by dotted key, ready for JSON.
  """
  other = {"expert": "generator.", "generator": "expert."}[section]
  values = fixed_values(config, KEYS)
  return {k: v for k, v in values.items() if not k.startswith(other)}


def _problems(config: ConfigDict) -> Iterator[str]:
  yield from training_violations(config, KEYS, extra=_EXTRA)
  generator, expert = config.generator, config.expert
  per_record = expert.clips_per_record
  if expert.batch_size % max(per_record, 1):
    yield (
      f"expert.batch_size={expert.batch_size}: expected a multiple of "
      f"expert.clips_per_record={per_record}"
    )
  if expert.loss == "contrastive" and per_record < 2:
    yield (
      f"expert.clips_per_record={per_record}: expected at least 2 with "
      "expert.loss='contrastive', which compares the clips of a record"
    )
  if generator.kind == "wav2lip" and generator.train_encoder:
    yield (
      "generator.train_encoder=True: expected False with "
      "generator.kind='wav2lip', which has no pretrained encoder"
    )
  yield from random_violations(config.random)
  weights = generator.sync_weight + generator.adv_weight
  if weights >= 1:
    yield (
      f"generator.sync_weight + generator.adv_weight = {weights}: expected "
      "less than 1; the rest is the weight of L1"
    )
