"""Checks of an evaluation's configuration, before anything is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from marlin_jax.pretraining.configuration import ATTENTION
from marlin_jax.training.configuration import get, refuse

MODES = ("linear", "attentive", "finetune", "knn")
# As in the modules that they are for, which need jax to be imported.
_CHOICES = {
  "protocol": ("paper", "default"),
  "pool": ("mean", "std", "mean_std"),
  "dtype": ("float32", "bfloat16"),
  "attention": ATTENTION,
  "remat": ("none", "dots", "full"),
}
_AT_LEAST_1 = (
  "num_seeds",
  "batch_size",
  "num_resamples",
  "data.num_threads",
  "knn.k",
  "linear.max_iterations",
  "paper.batch_size",
  "paper.max_epochs",
  "attentive.batch_size",
  "attentive.num_rounds",
  "finetune.batch_size",
  "finetune.num_rounds",
  "mesh.fsdp",
  "mesh.tensor",
)
_ABOVE_0 = (
  "knn.temperature",
  "paper.lr",
  "attentive.base_lr",
  "attentive.epochs",
  "finetune.base_lr",
  "finetune.epochs",
  "finetune.layer_decay",
)
_BELOW_1 = (
  "paper.factor",
  "attentive.warmup_ratio",
  "finetune.warmup_ratio",
  "finetune.drop_path",
)

# They change neither what is learned nor from what.
_FREE = (
  *("attention", "batch_size", "cache", "modes", "num_seeds", "plots"),
  *("remat", "tasks", "data.num_threads", "data.ratio"),
  *("mesh.data", "mesh.fsdp", "mesh.tensor"),
)


def identity(flat: dict[str, Any]) -> dict[str, Any]:
  """What of a configuration all results of a workdir must agree in.

  Args:
    flat: as from training.configuration.flat.

  Returns:
    A flat dict that survives JSON.
  """
  kept = {k: v for k, v in flat.items() if k not in _FREE}
  return json.loads(json.dumps(kept))


def split_names(text: str) -> list[str]:
  """'a, b' -> ['a', 'b']."""
  return [name.strip() for name in text.split(",") if name.strip()]


def ratios(config: ConfigDict) -> list[float]:
  """Of the training data, ascending; `config.data.ratio` may be a list."""
  return sorted({float(part) for part in split_names(str(config.data.ratio))})


def validate(config: ConfigDict) -> None:
  """Reports everything that is wrong with a configuration at once.

  Raises:
    ConfigError: one line per problem: key, value found, what is expected.
  """
  refuse(_problems(config))


def _problems(config: ConfigDict) -> Iterator[str]:
  for key, choices in _CHOICES.items():
    if config[key] not in choices:
      yield f"{key}={config[key]!r}: expected one of {', '.join(choices)}"
  for key in _AT_LEAST_1:
    if get(config, key) < 1:
      yield f"{key}={get(config, key)}: expected at least 1"
  for key in _ABOVE_0:
    if get(config, key) <= 0:
      yield f"{key}={get(config, key)}: expected a value above 0"
  for key in _BELOW_1:
    if not 0 <= get(config, key) < 1:
      yield f"{key}={get(config, key)}: expected 0 <= value < 1"
  if not split_names(config.tasks):
    yield "tasks='': name labels of the data set, with commas between"
  modes = split_names(config.modes)
  if not modes or set(modes) - set(MODES):
    yield (
      f"modes={config.modes!r}: expected some of {', '.join(MODES)}, with "
      "commas between"
    )
  for key in ("train", "val", "test"):
    if not config.data[key]:
      yield f"data.{key}='': expected the name of a split"
  try:
    bad = [r for r in ratios(config) if not 0 < r <= 1] or not ratios(config)
  except ValueError:
    bad = True
  if bad:
    yield (
      f"data.ratio={config.data.ratio!r}: expected numbers in (0, 1], with "
      "commas between"
    )
  penalties = config.linear.penalties
  if not penalties or min(penalties) < 0:
    yield f"linear.penalties={penalties}: expected some, from 0 on"
  if config.protocol == "paper" and config.pool != "mean":
    yield f"pool={config.pool!r}: the paper's protocol has 'mean'"
