"""Checks of a training configuration, before any device is touched."""

from __future__ import annotations

from collections.abc import Iterator

from ml_collections import ConfigDict

from marlin_jax.records.schema import FRAME_SIZE, PATCH_SIZE
from marlin_jax.training.configuration import get, refuse

# As masking and softmax_attention have them, which need jax to be imported.
ATTENTION = ("auto", "plain", "chunked", "by_head", "cudnn", "flash")
_CHOICES = {
  "mask.strategy": ("fasking", "fasking_opp", "random", "tube", "frame"),
  "dtype": ("float32", "bfloat16"),
  "attention": ATTENTION,
  "remat": ("none", "dots", "full"),
  "optim.mu_dtype": ("float32", "bfloat16"),
}
_AT_LEAST_1 = (
  "batch_size",
  "data.num_frames",
  "data.stride",
  "data.num_threads",
  "data.clips_per_record",
  "model.tubelet_size",
  "model.width",
  "model.depth",
  "model.num_heads",
  "model.mlp_dim",
  "model.dec_width",
  "model.dec_depth",
  "model.dec_num_heads",
  "model.dec_mlp_dim",
  "adv.hidden",
  "adv.d_steps",
  "adv.g_steps",
  "log_steps",
  "eval_steps",
  "eval_batches",
  "picture_steps",
  "picture_clips",
  "checkpoint_steps",
  "keep_checkpoints",
  "max_skipped_steps",
  "probe.num_videos",
  "probe.num_windows",
  "probe.batch_size",
  "probe.k",
  "profile.num_steps",
  "mesh.fsdp",
  "mesh.tensor",
  "distributed.timeout_secs",
)
_AT_LEAST_0 = (
  "seed",
  "num_epochs",
  "num_steps",
  "clips_per_device",
  "data.max_bad_records",
  "probe.steps",
  "probe.penalty",
  "profile.start_step",
  "adv.weight",
  "adv.gp_weight",
  "adv.max_pull",
  "optim.min_lr",
  "optim.weight_decay",
  "distributed.num_processes",
  "distributed.process_id",
  "watchdog.dump_secs",
  "watchdog.exit_secs",
)


def validate(config: ConfigDict) -> None:
  """Reports everything that is wrong with a configuration at once.

  Raises:
    ConfigError: one line per problem: key, value found, what is expected.
  """
  refuse(_problems(config))


def _problems(config: ConfigDict) -> Iterator[str]:
  values = {
    key: get(config, key) for key in (*_CHOICES, *_AT_LEAST_1, *_AT_LEAST_0)
  }
  for key, choices in _CHOICES.items():
    if values[key] not in choices:
      yield f"{key}={values[key]!r}: expected one of {', '.join(choices)}"
  for keys, least in ((_AT_LEAST_1, 1), (_AT_LEAST_0, 0)):
    for key in keys:
      if values[key] < least:
        yield f"{key}={values[key]}: expected at least {least}"
  if (config.num_epochs > 0) == (config.num_steps > 0):
    yield (
      f"num_epochs={config.num_epochs} and num_steps={config.num_steps}: "
      "exactly one must be above 0"
    )
  per_record = config.data.clips_per_record
  if per_record >= 1 and config.batch_size % per_record:
    yield (
      f"batch_size={config.batch_size}: expected a multiple of "
      f"data.clips_per_record={per_record}"
    )
  for prefix in ("", "dec_"):
    width, heads = (config.model[prefix + k] for k in ("width", "num_heads"))
    if heads >= 1 and width % (2 * heads):
      yield (
        f"model.{prefix}width={width}: expected a multiple of twice "
        f"model.{prefix}num_heads={heads}"
      )
  for key in ("b1", "b2", "warmup_ratio"):
    if not 0 <= config.optim[key] < 1:
      yield f"optim.{key}={config.optim[key]}: expected 0 <= value < 1"
  for key in ("ema_decay", "mask.decoder_ratio"):
    value = get(config, key)
    if not 0 <= value < 1:
      yield f"{key}={value}: expected 0 <= value < 1"
  quality = config.data.min_quality
  if not 0 <= quality <= 1:
    yield f"data.min_quality={quality}: expected 0 <= value <= 1"
  if config.optim.base_lr <= 0:
    yield f"optim.base_lr={config.optim.base_lr}: expected a value above 0"
  if config.mesh.data != -1 and config.mesh.data < 1:
    yield f"mesh.data={config.mesh.data}: expected -1 (all) or at least 1"
  for key in filter(None, config.allow_change.split(",")):
    try:
      get(config, key)
    except (AttributeError, KeyError, TypeError):
      if key != "data.fingerprint":
        yield f"allow_change names {key!r}, which is no key"
  yield from _probe_problems(config.probe)
  yield from distributed_problems(config.distributed)
  yield from _mask_problems(config)


def _probe_problems(settings: ConfigDict) -> Iterator[str]:
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


def distributed_problems(settings: ConfigDict) -> Iterator[str]:
  """What is wrong with config.distributed, a line for each."""
  address, num = settings.coordinator, settings.num_processes
  if address in ("", "auto", "none"):
    return
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    yield (
      f"distributed.coordinator={address!r}: expected host:port, 'auto', "
      "'none' or ''"
    )
  if num < 1:
    yield (
      f"distributed.num_processes={num}: expected at least 1 with "
      "distributed.coordinator=host:port"
    )
  elif settings.process_id >= num:
    yield (
      f"distributed.process_id={settings.process_id}: expected less than "
      f"distributed.num_processes={num}"
    )


def _mask_problems(config: ConfigDict) -> Iterator[str]:
  frames, tubelet = config.data.num_frames, config.model.tubelet_size
  if tubelet >= 1 and frames % tubelet:
    yield (
      f"data.num_frames={frames}: expected a multiple of "
      f"model.tubelet_size={tubelet}"
    )
    return
  ratio = config.mask.ratio
  if not 0 < ratio < 1:
    yield f"mask.ratio={ratio}: expected a value between 0 and 1"
    return
  spatial = (FRAME_SIZE // PATCH_SIZE) ** 2
  units = {"tube": spatial, "frame": frames // max(tubelet, 1)}.get(
    config.mask.strategy, spatial * frames // max(tubelet, 1)
  )
  if int((1 - ratio) * units + 1e-6) < 1:
    yield (
      f"mask.ratio={ratio}: leaves nothing visible with "
      f"mask.strategy={config.mask.strategy}, which draws among {units} units; "
      f"expected at most {1 - 1 / units:.4f}"
    )
