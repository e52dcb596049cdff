"""Rules of the evaluation configurations, configs/eval_{far,fer,dfd}.py.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from marlin_jax.models.options import ATTENTION, DTYPES, REMAT
from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.training.configuration import (
  BELOW_1,
  DISTRIBUTED_KEYS,
  FRAME_SIZES,
  NUM_DEVICES,
  SPLIT,
  Key,
  Rule,
  above,
  at_least,
  check_keys,
  distributed_violations,
  fixed,
  fixed_values,
  free,
  one_of,
  random_keys,
  random_violations,
  refuse,
  violations,
)

MODES = (
  "linear",
  "attentive",
  "layernorm",
  "lora",
  "finetune",
  "knn",
  "knn_centred",
)
# Mode of the baseline that predicts the shares or means of the training split.
CONSTANT = "constant"
# Modes that train on clips: what they tune of the encoder, see learner.TUNED.
TUNED = {
  "attentive": "nothing",
  "layernorm": "norms",
  "lora": "lora",
  "finetune": "all",
}
# Begins the keys of rules of tasks; a workdir may get further ones.
DERIVE = "derive."
# Modes that need the features of whole videos only.
FEATURE_MODES = ("linear", "knn", "knn_centred")


def split_names(text: str) -> list[str]:
  """Splits a comma-separated list, without repetitions: 'a, b,a' -> a, b."""
  names = (name.strip() for name in text.split(","))
  return list(dict.fromkeys(filter(None, names)))


def _are_modes(text: str) -> bool:
  modes = split_names(text)
  return bool(modes) and set(modes) <= set(MODES)


def _are_ratios(text: str) -> bool:
  try:
    ratios = [float(part) for part in split_names(str(text))]
  except ValueError:
    return False
  return bool(ratios) and all(0 < ratio <= 1 for ratio in ratios)


def other_tests(text: str) -> list[tuple[str, str]]:
  """Splits 'a/b:test,c:val' into paths and splits."""
  pairs = (part.rpartition(":") for part in split_names(text))
  return [(path, split) for path, _, split in pairs]


def _are_tests(text: str) -> bool:
  return all(path and split for path, split in other_tests(text))


class FoldRule(NamedTuple):
  """How the folds of a cross-validation are made; see `downstream.folds`.

  Attributes:
    kind: 'splits', 'people', 'leave_class_out' or 'single_class'; '': none.
    splits: names of the splits that are the folds.
    num_groups: number of groups of people; 0: one for each person.
  """

  kind: str
  splits: tuple[str, ...] = ()
  num_groups: int = 0

  @property
  def of_classes(self) -> bool:
    """True if the splits for training, choice and test are kept."""
    return self.kind in ("leave_class_out", "single_class")


def fold_rule(text: str) -> FoldRule:
  """Returns the rule of config.data.folds.

  Raises:
    ValueError: it is none.
  """
  if text in ("", "leave_class_out", "single_class"):
    return FoldRule(text)
  if text == "leave_person_out":
    return FoldRule("people")
  kind, colon, number = text.partition(":")
  if kind == "people" and colon:
    if int(number) < 2:
      raise ValueError(text)
    return FoldRule("people", num_groups=int(number))
  names = tuple(split_names(text))
  if len(names) < 2:
    raise ValueError(text)
  return FoldRule("splits", names)


def _are_folds(text: str) -> bool:
  try:
    fold_rule(text)
  except ValueError:
    return False
  return True


def section_of(mode: str, protocol: str) -> str:
  """Returns the section of the configuration with a mode's training."""
  if protocol == "paper":
    return "paper"
  return mode if mode in ("attentive", "finetune") else "light"


# Rules of the keys that every section with an optimiser has.
_OPTIMISER = {
  "batch_size": at_least(1),
  "epochs": above(0),
  "min_steps": at_least(0),
  "num_rounds": at_least(1),
  "base_lr": above(0),
  "min_lr": at_least(0),
  "warmup_ratio": BELOW_1,
  "weight_decay": at_least(0),
  "b1": BELOW_1,
  "b2": BELOW_1,
  "eps": above(0),
}


def _optimiser(
  section: str, before: Mapping[str, float] | None = None
) -> dict[str, Key]:
  """Returns the keys of a section with an optimiser.

  Args:
    section: name of the section.
    before: values from before the section existed, see `Key`.
  """
  before = before or {}
  return {
    f"{section}.{name}": fixed(rule, before.get(name))
    for name, rule in _OPTIMISER.items()
  }


# All results in a workdir share the fixed values.
KEYS = {
  "tasks": free(Rule("labels of the data set, comma-separated", split_names)),
  "modes": free(Rule(f"some of {', '.join(MODES)}", _are_modes)),
  "protocol": fixed(one_of("paper", "default")),
  "pool": fixed(one_of("mean", "std", "mean_std")),
  "num_seeds": free(at_least(1)),
  "data.train": fixed(SPLIT),
  "data.val": fixed(SPLIT),
  "data.test": fixed(SPLIT),
  "data.tests": fixed(
    Rule("PATH:SPLIT, comma-separated", _are_tests), before=""
  ),
  "data.train_classes": fixed(before=""),
  "data.folds": fixed(
    Rule(
      "splits 'fold1,fold2', 'people:NUMBER', 'leave_person_out', "
      "'leave_class_out', 'single_class' or ''",
      _are_folds,
    ),
    before="",
  ),
  "data.fold_val": fixed(
    Rule("a number in (0, 1)", lambda value: 0 < value < 1), before=0.1
  ),
  "data.pairs": fixed(before=False),
  "data.val_windows": fixed(at_least(0), before=0),
  "data.ratio": free(Rule("numbers in (0, 1], comma-separated", _are_ratios)),
  "data.all_tracks": fixed(),
  "data.num_threads": free(at_least(1)),
  "value_loss": fixed(one_of("mse", "ccc"), before="mse"),
  "linear.penalties": fixed(
    Rule(
      "finite numbers from 0 on",
      lambda values: values and all(0 <= x < math.inf for x in values),
    )
  ),
  "linear.max_iterations": fixed(at_least(1)),
  "knn.k": fixed(at_least(1)),
  "knn.temperature": fixed(above(0)),
  **_optimiser("attentive"),
  "attentive.flip": fixed(),
  **_optimiser("finetune"),
  "finetune.layer_decay": fixed(above(0)),
  "finetune.drop_path": fixed(BELOW_1),
  "finetune.mixup": fixed(at_least(0)),
  "finetune.flip": fixed(),
  **_optimiser(
    "light",
    {
      "batch_size": 32,
      "epochs": 30.0,
      "min_steps": 500,
      "num_rounds": 10,
      "base_lr": 5e-3,
      "min_lr": 1e-6,
      "warmup_ratio": 0.1,
      "weight_decay": 0.01,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
    },
  ),
  "light.drop_path": fixed(BELOW_1, before=0.0),
  "light.mixup": fixed(at_least(0), before=0.0),
  "light.flip": fixed(before=True),
  "lora.rank": fixed(at_least(1), before=8),
  "lora.alpha": fixed(above(0), before=16.0),
  "paper.batch_size": fixed(at_least(1)),
  "paper.max_epochs": fixed(at_least(1)),
  "paper.lr": fixed(above(0)),
  "paper.b1": fixed(BELOW_1),
  "paper.b2": fixed(BELOW_1),
  "paper.eps": fixed(above(0)),
  "paper.patience": fixed(at_least(0)),
  "paper.factor": fixed(BELOW_1),
  "paper.stop_lr": fixed(at_least(0)),
  "num_resamples": fixed(at_least(1)),
  "plots": free(),
  "keep_models": free(),
  **random_keys(fixed),
  "random.image_size": fixed(FRAME_SIZES, before=FRAME_SIZE),
  "random.stride": fixed(at_least(1)),
  # Their hash is fixed, as the encoder's.
  "features": free(),
  "batch_size": free(at_least(1)),
  "clips_per_device": free(at_least(0)),
  "cache": free(),
  "dtype": fixed(one_of(*DTYPES)),
  "attention": free(one_of(*ATTENTION)),
  "remat": free(one_of(*REMAT)),
  "mesh.data": free(NUM_DEVICES),
  "mesh.fsdp": free(at_least(1)),
  "mesh.tensor": free(at_least(1)),
  **DISTRIBUTED_KEYS,
}


def identity(config: ConfigDict) -> dict[str, Any]:
  """Returns the values that all results of a workdir share.

  Returns:
    Values by dotted key, ready for JSON.
  """
  return fixed_values(config, KEYS)


def ratios(config: ConfigDict) -> list[float]:
  """Returns the shares of the training data, ascending.

  `config.data.ratio` may list several.
  """
  return sorted({float(part) for part in split_names(str(config.data.ratio))})


def validate(config: ConfigDict) -> None:
  """Checks a configuration and reports all problems at once.

  Raises:
    ConfigError: one line per problem: key, value, expected value.
  """
  check_keys(config, KEYS, DERIVE)
  refuse(_problems(config))


def _problems(config: ConfigDict) -> Iterator[str]:
  yield from violations(config, KEYS)
  yield from distributed_violations(config.distributed)
  if config.protocol == "paper" and config.pool != "mean":
    yield f"pool={config.pool!r}: expected 'mean' with protocol='paper'"
  for key in ("tests", "train_classes"):
    if config.data.folds and config.data[key]:
      yield (
        f"data.{key}={config.data[key]!r}: expected '' with data.folds, whose "
        "models are several"
      )
  for section in {section_of(mode, config.protocol) for mode in TUNED}:
    size = config[section].batch_size
    if config.data.pairs and size % 2:
      yield (
        f"{section}.batch_size={size}: expected an even number with "
        "data.pairs=True"
      )
  others = set(split_names(config.modes)) - set(FEATURE_MODES)
  if config.features and others:
    yield (
      f"modes={config.modes!r}: {', '.join(sorted(others))} needs an encoder; "
      f"on features there are {', '.join(FEATURE_MODES)}"
    )
  yield from random_violations(config.random)
  for section in ("attentive", "finetune", "light"):
    least, most = config[section].min_lr, config[section].base_lr
    if least > most:
      yield (
        f"{section}.min_lr={least}: expected at most {section}.base_lr={most}, "
        "from which the rate falls"
      )
