"""Rules of the pretraining configuration, configs/pretrain_b.py.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from marlin_jax.models.options import DTYPES
from marlin_jax.objectives import table
from marlin_jax.records.schema import FRAME_SIZE, PATCH_SIZE
from marlin_jax.training.configuration import (
  ABOVE_0_TO_1,
  BELOW_1,
  BETWEEN_0_AND_1,
  FRAME_SIZES,
  FROM_0_TO_1,
  LOCAL,
  SPLIT,
  TRAINING_KEYS,
  above,
  at_least,
  check_keys,
  fixed,
  fixed_values,
  free,
  get,
  one_of,
  refuse,
  training_violations,
  violations,
)

# masking.Masking describes each.
MASKING_STRATEGIES = (
  "fasking",
  "fasking_opp",
  "random",
  "tube",
  "frame",
  "crfr_p",
)
# data/sampling.py describes each; it is not imported, as it imports much.
SAMPLE_BY = ("video", "record", "subject")
ORDERS = ("hashed", "stored")

KEYS = TRAINING_KEYS | {
  "batch_size": fixed(at_least(1)),
  "clips_per_device": free(at_least(0)),
  # A checkpoint records the number of steps that follows from the two.
  "num_epochs": free(at_least(0)),
  "num_steps": fixed(at_least(0)),
  "curriculum": fixed(before=""),
  # A checkpoint records the data set's fingerprint instead of its path.
  "data.path": free(),
  "data.split": fixed(SPLIT),
  "data.eval_split": free(),
  "data.min_quality": fixed(FROM_0_TO_1),
  "data.sample_by": fixed(
    one_of(*SAMPLE_BY), before="record", keeps_before=True
  ),
  "data.order": fixed(one_of(*ORDERS), before="stored", keeps_before=True),
  "data.shuffle_window": fixed(at_least(0), before=0),
  "data.num_frames": fixed(at_least(1)),
  "data.stride": fixed(at_least(1)),
  "data.clips_per_record": fixed(at_least(1)),
  "data.draws_per_unit": fixed(at_least(1), before=1),
  "data.frame_size": fixed(FRAME_SIZES, before=FRAME_SIZE),
  "augment.flip_ratio": fixed(FROM_0_TO_1, before=0.0),
  "augment.min_crop_ratio": fixed(ABOVE_0_TO_1, before=1.0),
  "augment.max_crop_aspect": fixed(at_least(1), before=1.0),
  "augment.stride_jitter": fixed(at_least(0), before=0),
  "augment.colour_jitter": fixed(FROM_0_TO_1, before=0.0),
  "init_from": fixed(LOCAL),
  "model.tubelet_size": fixed(at_least(1)),
  "model.patch_size": fixed(at_least(1), before=PATCH_SIZE),
  "model.width": fixed(at_least(1)),
  "model.depth": fixed(at_least(1)),
  "model.num_heads": fixed(at_least(1)),
  "model.mlp_dim": fixed(at_least(1)),
  "model.dec_width": fixed(at_least(1)),
  "model.dec_depth": fixed(at_least(1)),
  "model.dec_num_heads": fixed(at_least(1)),
  "model.dec_mlp_dim": fixed(at_least(1)),
  "model.start_grey": fixed(),
  "mask.strategy": fixed(one_of(*MASKING_STRATEGIES)),
  "mask.ratio": fixed(BETWEEN_0_AND_1),
  "mask.decoder_ratio": fixed(BELOW_1),
  "target.norm_pix": fixed(),
  "target.motion_weight": fixed(BELOW_1, before=0.0),
  "loss.region_weight": fixed(at_least(0), before=0.0),
  "loss.pixel_weight": fixed(at_least(0), before=1.0),
  "input.imagenet_norm": fixed(),
  "adv.weight": fixed(at_least(0)),
  "adv.hidden": fixed(at_least(1)),
  "adv.gp_weight": fixed(at_least(0)),
  "adv.d_steps": fixed(at_least(1)),
  "adv.g_steps": fixed(at_least(1)),
  "adv.max_pull": fixed(at_least(0)),
  "float32_sums": free(),
  "optim.base_lr": fixed(above(0)),
  "optim.min_lr": fixed(at_least(0)),
  "optim.schedule": fixed(one_of("cosine", "constant"), before="cosine"),
  "optim.warmup_ratio": fixed(BELOW_1),
  "optim.warmup_steps": fixed(at_least(0), before=0),
  "optim.cooldown_steps": free(at_least(0)),
  "optim.layer_decay": fixed(ABOVE_0_TO_1, before=1.0),
  "optim.b1": fixed(BELOW_1),
  "optim.b2": fixed(BELOW_1),
  "optim.eps": fixed(above(0)),
  "optim.weight_decay": fixed(at_least(0)),
  "optim.decay_params": fixed(one_of("all", "kernels"), before="all"),
  "optim.mu_dtype": fixed(one_of(*DTYPES)),
  "optim.clip_norm": fixed(at_least(0), before=0.0),
  "optim.spike_sigmas": fixed(at_least(0), before=0.0),
  "matmul_precision": fixed(
    one_of("default", "high", "highest"), before="default"
  ),
  "ema_decay": fixed(BELOW_1),
  "ema_warmup": fixed(before=False),
  "scan": free(),
  "mesh.fsdp": free(at_least(1)),
  "mesh.tensor": free(at_least(1)),
  "eval_steps": free(at_least(1)),
  "eval_batches": free(at_least(1)),
  "probe.steps": free(at_least(0)),
  "probe.path": free(),
  "probe.label": free(),
  "probe.split": free(),
  "probe.eval_split": free(),
  "probe.num_videos": free(at_least(1)),
  "probe.num_windows": free(at_least(1)),
  "probe.batch_size": free(at_least(1)),
  "probe.penalty": free(at_least(0)),
  "probe.k": free(at_least(1)),
  "probe.pool": free(one_of("grid", "mean")),
  "probe.num_blocks": free(at_least(0)),
  "profile.start_step": free(at_least(0)),
  "profile.num_steps": free(at_least(1)),
  **table.KEYS,
}

# Recorded in checkpoints, but not a key of the configuration.
_FINGERPRINT = "data.fingerprint"


def validate(config: ConfigDict) -> None:
  """Checks a configuration and reports all problems at once.

  Raises:
    ConfigError: one line per problem: key, value, expected value.
  """
  check_keys(config, KEYS)
  refuse(_problems(config))


class DataSet(NamedTuple):
  """One of the data sets of `data.path`.

  Attributes:
    path: its folder.
    weight: its part of the sum of all weights is its share of the clips.
    name: names its metrics: the last part of the path, made unique.
  """

  path: str
  weight: float
  name: str


def data_sets(config: ConfigDict) -> list[DataSet]:
  """Returns the data sets of `data.path`: FOLDER[:WEIGHT],FOLDER[:WEIGHT],...

  Raises:
    ValueError: a weight is not above 0, or too small; or there is no folder.
  """
  found: list[DataSet] = []
  for item in config.data.path.split(","):
    path, colon, text = item.strip().rpartition(":")
    # The scheme of a bucket has a colon too.
    if not colon or text.startswith("//"):
      path, text = item.strip(), "1"
    try:
      weight = float(text)
    except ValueError:
      raise ValueError(f"{text!r} is not a weight") from None
    if not 0 < weight < math.inf or not path:
      raise ValueError(f"{item!r} is not FOLDER:WEIGHT with a weight above 0")
    name = path.rstrip("/").rpartition("/")[2]
    while name in {other.name for other in found}:
      name = f"{name}_{len(found)}"
    found.append(DataSet(path, weight, name))
  total = sum(data.weight for data in found)
  for data in found:
    if data.weight < total / 10_000:
      raise ValueError(f"the weight of {data.path} is below 1/10000 of the sum")
  return found


class StageConfig(NamedTuple):
  """A stage of `curriculum`: steps on clips of one size.

  Attributes:
    num_steps: its steps; 0 for the last stage, which takes the others.
    config: the configuration with the sizes of the stage and no curriculum.
  """

  num_steps: int
  config: ConfigDict


# Keys that a stage may change, and how its values are written.
STAGE_KEYS = {
  "data.num_frames": int,
  "data.frame_size": int,
  "mask.ratio": float,
}
# Sizes whose largest value is that of the last stage.
_NETWORK_SIZES = ("data.num_frames", "data.frame_size")


def stages(config: ConfigDict) -> list[StageConfig]:
  """Returns the stages: STEPS: KEY=VALUE, KEY=VALUE; STEPS: ...

  The last one has the sizes of the configuration itself, and is the only one
  if `curriculum` is ''.

  Raises:
    ValueError: `curriculum` has another form.
  """
  found = []
  for text in filter(None, map(str.strip, config.curriculum.split(";"))):
    steps, colon, sizes = text.partition(":")
    if not colon or not steps.strip().isdecimal() or not int(steps):
      raise ValueError(
        f"{text!r} does not begin with a number of steps and ':'"
      )
    values: dict[str, Any] = {"curriculum": ""}
    for assignment in sizes.split(","):
      key, _, value = map(str.strip, assignment.partition("="))
      if key not in STAGE_KEYS:
        raise ValueError(f"{key!r} is not a key of a stage")
      if key in values:
        raise ValueError(f"{text!r} has {key} twice")
      try:
        values[key] = STAGE_KEYS[key](value)
      except ValueError:
        raise ValueError(f"{value!r} is not a value of {key}") from None
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(values)
    found.append(StageConfig(int(steps), changed))
  return [*found, StageConfig(0, config)]


def check_curriculum(config: ConfigDict, num_steps: int) -> None:
  """Refuses a curriculum that leaves no steps for the last stage.

  Args:
    config: a valid configuration.
    num_steps: steps of the whole run.

  Raises:
    ConfigError: it does.
  """
  if config.curriculum:
    refuse(_length_problems(stages(config), num_steps))


def check_cooldown(
  config: ConfigDict, num_steps: int, begun: Mapping[str, Any], last_step: int
) -> None:
  """Refuses another cool-down in the middle of one, or after it.

  Args:
    config: a valid configuration.
    num_steps: steps of the whole run.
    begun: flat configuration that the run had before, whose `num_steps` is
      counted even if the run was given in epochs.
    last_step: step that the run resumes from.

  Raises:
    ConfigError: the rate would fall at once, or not at all, or rise again.
  """
  length = config.optim.cooldown_steps
  before = begun["num_steps"], begun.get("optim.cooldown_steps", 0)
  is_meant = "optim.cooldown_steps" in config.allow_change.split(",")
  if before == (num_steps, length) or is_meant:
    return
  told = (
    f"optim.cooldown_steps={length} with num_steps={num_steps}: the rate "
    "{} from step {} on, and the run resumes from "
    f"step {last_step}: expected "
  )
  begins, began = (
    max(steps - cooldown, config.optim.warmup_steps)
    for steps, cooldown in ((num_steps, length), before)
  )
  if length and last_step > begins:
    refuse(
      [
        told.format("would fall", begins)
        + f"num_steps of at least {last_step + length}, or fewer steps to cool "
        "down in"
      ]
    )
  if before[1] and last_step > began:
    refuse(
      [
        told.format("has fallen", began)
        + f"optim.cooldown_steps={before[1]} with num_steps={before[0]}, or a "
        "checkpoint before the fall; if the rate is to rise again: "
        "--config.allow_change=optim.cooldown_steps"
      ]
    )


def unreached(config: ConfigDict, num_steps: int) -> Iterator[str]:
  """Yields a line for each thing that the run is too short for.

  They are not refused: with a constant rate the run may become longer.

  Args:
    config: a valid configuration.
    num_steps: steps of the whole run.
  """
  warmup, cooldown = config.optim.warmup_steps, config.optim.cooldown_steps
  if warmup > num_steps:
    yield (
      f"optim.warmup_steps={warmup}: the learning rate ends at "
      f"{num_steps / warmup:.0%} of its peak"
    )
  elif cooldown > num_steps - warmup:
    yield (
      f"optim.cooldown_steps={cooldown}: the warm-up leaves "
      f"{num_steps - warmup} of them"
    )
  if config.profile.start_step > num_steps:
    yield f"profile.start_step={config.profile.start_step}: no step is profiled"


def _length_problems(
  stages: list[StageConfig], num_steps: int
) -> Iterator[str]:
  taken = sum(stage.num_steps for stage in stages)
  if taken >= num_steps:
    yield (
      f"curriculum: its stages take {taken} steps, and the run has "
      f"{num_steps}: expected fewer, so that steps with the run's own sizes "
      "follow; or curriculum=''"
    )


def identity(
  config: ConfigDict, fingerprint: str, num_steps: int
) -> dict[str, Any]:
  """Returns what a checkpoint records about a run; a resumed run must match it.

  Args:
    config: a valid configuration.
    fingerprint: fingerprint of the training data, `Dataset.fingerprint`.
    num_steps: steps of the whole run.

  Returns:
    Values by dotted key, ready for JSON.
  """
  values = fixed_values(config, KEYS) | {
    "num_steps": num_steps,
    _FINGERPRINT: fingerprint,
  }
  if config.optim.schedule == "constant":
    # Nothing depends on the end of the run until it cools down.
    del values["num_steps"]
  return values


def _problems(config: ConfigDict) -> Iterator[str]:
  extra = (_FINGERPRINT, *table.IDENTITIES)
  yield from training_violations(config, KEYS, extra)
  if (config.num_epochs > 0) == (config.num_steps > 0):
    yield (
      f"num_epochs={config.num_epochs} and num_steps={config.num_steps}: "
      "exactly one must be above 0"
    )
  data = config.data
  per_record, per_unit = data.clips_per_record, data.draws_per_unit
  together = per_record * per_unit
  if together >= 1 and config.batch_size % together:
    yield (
      f"batch_size={config.batch_size}: expected a multiple of "
      f"data.clips_per_record={per_record} times "
      f"data.draws_per_unit={per_unit}"
    )
  if per_unit > 1 and data.sample_by == "record":
    yield (
      f"data.draws_per_unit={per_unit}: expected 1 with "
      "data.sample_by='record'; set data.clips_per_record"
    )
  window = data.shuffle_window
  if window and data.order != "hashed":
    yield (
      f"data.shuffle_window={window}: expected 0 with data.order={data.order}"
    )
  for prefix in ("", "dec_"):
    width, heads = (config.model[prefix + k] for k in ("width", "num_heads"))
    if heads >= 1 and width % (2 * heads):
      yield (
        f"model.{prefix}width={width}: expected a multiple of twice "
        f"model.{prefix}num_heads={heads}"
      )
  yield from _schedule_problems(config.optim)
  try:
    data_sets(config)
  except ValueError as e:
    yield (
      f"data.path={config.data.path!r}: {e}; expected a folder, or several as "
      "FOLDER:WEIGHT,FOLDER:WEIGHT"
    )
  yield from _probe_problems(config.probe, config.model.depth)
  yield from _mask_problems(config)
  yield from _curriculum_problems(config)
  yield from table.problems(config)


def _schedule_problems(settings: ConfigDict) -> Iterator[str]:
  if settings.min_lr > settings.base_lr:
    yield (
      f"optim.min_lr={settings.min_lr}: expected at most "
      f"optim.base_lr={settings.base_lr}, from which the rate falls"
    )
  if settings.schedule == "cosine" and settings.cooldown_steps:
    yield (
      f"optim.cooldown_steps={settings.cooldown_steps}: expected 0 with "
      "optim.schedule='cosine', which falls from the warm-up on"
    )
  by_share = settings.warmup_ratio and not settings.warmup_steps
  if settings.schedule == "constant" and by_share:
    yield (
      f"optim.warmup_ratio={settings.warmup_ratio}: expected "
      "optim.warmup_steps, or a ratio of 0, with optim.schedule='constant': "
      "the number of steps may change"
    )


def _probe_problems(settings: ConfigDict, depth: int) -> Iterator[str]:
  if not settings.steps:
    return
  if not settings.label:
    yield (
      f"probe.label='' with probe.steps={settings.steps}: name a label of the "
      "data set"
    )
  if settings.split == settings.eval_split:
    yield (
      f"probe.split={settings.split!r} and probe.eval_split="
      f"{settings.eval_split!r}: expected two splits"
    )
  if settings.num_blocks > depth:
    yield (
      f"probe.num_blocks={settings.num_blocks}: expected at most "
      f"model.depth={depth}"
    )


def _mask_problems(config: ConfigDict) -> Iterator[str]:
  frames, tubelet = config.data.num_frames, max(config.model.tubelet_size, 1)
  if frames % tubelet:
    yield (
      f"data.num_frames={frames}: expected a multiple of "
      f"model.tubelet_size={tubelet}"
    )
    return
  size, patch = config.data.frame_size, max(config.model.patch_size, 1)
  if size % patch:
    yield (
      f"data.frame_size={size}: expected a multiple of model.patch_size={patch}"
    )
    return
  if config.target.motion_weight and tubelet == 1:
    yield (
      f"target.motion_weight={config.target.motion_weight}: expected 0 with "
      "model.tubelet_size=1, where a token has no second frame"
    )
  if config.loss.region_weight and config.mask.strategy != "crfr_p":
    yield (
      f"loss.region_weight={config.loss.region_weight}: expected 0 with "
      f"mask.strategy={config.mask.strategy!r}; only crfr_p hides a whole "
      "region"
    )
  ratio = config.mask.ratio
  num_tokens = (size // patch) ** 2 * frames // tubelet
  has_tokens = num_tokens > 0 and 0 < ratio < 1
  if has_tokens and int((1 - ratio) * num_tokens + 1e-6) < 1:
    highest = math.floor((1 - 1 / num_tokens) * 1e4) / 1e4
    yield (
      f"mask.ratio={ratio}: leaves nothing visible of {num_tokens} tokens; "
      f"expected at most {highest:.4f}"
    )


def _curriculum_problems(config: ConfigDict) -> Iterator[str]:
  try:
    found = stages(config)
  except ValueError as e:
    yield (
      f"curriculum={config.curriculum!r}: {e}; expected '' or "
      "'STEPS: KEY=VALUE, KEY=VALUE; STEPS: KEY=VALUE', with the keys "
      f"{', '.join(STAGE_KEYS)}"
    )
    return
  rules = {key: KEYS[key] for key in STAGE_KEYS}
  known = {*_mask_problems(config)}
  for i, stage in enumerate(found[:-1]):
    problems = [*violations(stage.config, rules)] or [
      *(p for p in _mask_problems(stage.config) if p not in known),
      *(
        f"{key}={get(stage.config, key)}: expected at most {get(config, key)}, "
        "the run's own, which is that of the last stage"
        for key in _NETWORK_SIZES
        if get(stage.config, key) > get(config, key)
      ),
    ]
    yield from (f"curriculum, stage {i + 1}: {problem}" for problem in problems)
  if len(found) > 1 and config.num_steps > 0:
    yield from _length_problems(found, config.num_steps)
