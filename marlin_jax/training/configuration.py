"""Rules for the keys of a configuration, and checks of a configuration.

Each family of configurations (pretraining, evaluation, lip-sync) has one table,
`KEYS`, from each dotted key to its rule. A rule says which values are valid,
and whether a resumed run may change the value.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from marlin_jax.models.options import ATTENTION, DTYPES, REMAT
from marlin_jax.records.cli import UserError, counted
from marlin_jax.records.schema import FRAME_SIZE


class ConfigError(UserError):
  """Configuration that cannot be run; the message lists every problem."""


# --- Rules --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
  """Values that a key accepts.

  Attributes:
    expected: describes the values; completes the sentence "expected ...".
    accepts: returns True for a valid value.
  """

  expected: str
  accepts: Callable[[Any], bool]


ANY = Rule("any value", lambda value: True)
BELOW_1 = Rule("0 <= value < 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = Rule("0 <= value <= 1", lambda value: 0 <= value <= 1)
ABOVE_0_TO_1 = Rule("0 < value <= 1", lambda value: 0 < value <= 1)
BETWEEN_0_AND_1 = Rule("0 < value < 1", lambda value: 0 < value < 1)
# Records hold frames of FRAME_SIZE, which are scaled down.
FRAME_SIZES = Rule(
  f"1 <= value <= {FRAME_SIZE}", lambda value: 1 <= value <= FRAME_SIZE
)
# Of weights.
LOCAL = Rule(
  "a local path or a name; copy weights from a bucket with gcloud storage cp "
  "-r",
  lambda value: "://" not in value.removeprefix("hf://"),
)
SPLIT = Rule("the name of a split", bool)
# Seeds of jax and NumPy alike.
SEED = Rule("0 <= value < 2**31", lambda value: 0 <= value < 2**31)
NUM_DEVICES = Rule(
  "-1 (all) or at least 1", lambda value: value == -1 or value >= 1
)


def at_least(least: float) -> Rule:
  """Accepts numbers from `least` on."""
  return Rule(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Rule:
  """Accepts numbers above `bound`."""
  return Rule(f"a value above {bound}", lambda value: value > bound)


def one_of(*choices: Any) -> Rule:
  """Accepts the listed values."""
  names = ", ".join(map(str, choices))
  return Rule(f"one of {names}", lambda value: value in choices)


def some_of(*choices: str) -> Rule:
  """Accepts listed words, joined by commas, and ''."""
  return Rule(
    f"'' or some of {', '.join(choices)}, joined by commas",
    lambda value: value == "" or {*value.split(",")} <= {*choices},
  )


@dataclasses.dataclass(frozen=True)
class Key:
  """Rule of one configuration key.

  Attributes:
    rule: the values that the key accepts.
    is_fixed: a resumed run must have the value of the run that it resumes,
      because the value changes what is learned, or from which data.
    before: value of the runs that were saved before the key existed; a
      checkpoint does not record it. None: every checkpoint records the key.
    keeps_before: a run that began with `before` goes on with it, and says so,
      instead of being refused. For a key whose default is another value.
  """

  rule: Rule
  is_fixed: bool
  before: Any = None
  keeps_before: bool = False


def fixed(
  rule: Rule = ANY, before: Any = None, *, keeps_before: bool = False
) -> Key:
  """Returns a key whose value a resumed run must share.

  Args:
    rule: the values that the key accepts.
    before, keeps_before: see `Key`; for a key that is added to the table.
  """
  return Key(rule, True, before, keeps_before)


def free(rule: Rule = ANY) -> Key:
  """Returns a key whose value a resumed run may change."""
  return Key(rule, is_fixed=False)


# Implementations of attention that run on one platform only.
_PLATFORM_OF = {"cudnn": "gpu", "flash": "tpu"}


def check_attention(attention: str, platform: str, dtype: str) -> None:
  """Refuses an implementation of attention that the devices lack.

  Args:
    attention: one of models.options.ATTENTION.
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: one of models.options.DTYPES.

  Raises:
    ConfigError: it runs on another platform, or in another dtype.
  """
  if _PLATFORM_OF.get(attention, platform) != platform:
    others = [name for name in ATTENTION if name not in _PLATFORM_OF]
    raise ConfigError(
      f"attention={attention!r} needs a {_PLATFORM_OF[attention].upper()}, and "
      f"the devices are {platform}: expected one of {', '.join(others)}"
    )
  if attention == "cudnn" and dtype != "bfloat16":
    raise ConfigError(
      f"attention='cudnn' needs dtype='bfloat16', and it is {dtype!r}: "
      "expected attention='auto', or that dtype"
    )


# Where metrics go beside metrics.jsonl.
TRACKERS = ("tensorboard", "wandb", "trackio")

# Keys of every configuration of a program for several processes.
DISTRIBUTED_KEYS = {
  "distributed.coordinator": free(),
  "distributed.num_processes": free(at_least(0)),
  "distributed.process_id": free(at_least(0)),
  "distributed.timeout_secs": free(at_least(1)),
}

# Keys of every configuration that trains networks step by step.
TRAINING_KEYS = {
  **DISTRIBUTED_KEYS,
  "seed": fixed(SEED),
  "data.num_workers": free(at_least(-1)),
  "data.num_threads": free(at_least(0)),
  "data.max_bad_records": free(at_least(0)),
  "dtype": fixed(one_of(*DTYPES)),
  "attention": free(one_of(*ATTENTION)),
  "remat": free(one_of(*REMAT)),
  "mesh.data": free(NUM_DEVICES),
  "watchdog.dump_secs": free(at_least(0)),
  "watchdog.exit_secs": free(at_least(0)),
  "compilation_cache": free(),
  "deterministic": free(),
  "allow_change": free(),
  "max_skipped_steps": free(at_least(1)),
  "log_steps": free(at_least(1)),
  "trackers": free(some_of(*TRACKERS)),
  "picture_steps": free(at_least(1)),
  "picture_clips": free(at_least(1)),
  "checkpoint_steps": free(at_least(0)),
  "checkpoint_minutes": free(at_least(0)),
  "keep_checkpoints": free(at_least(1)),
  "keep_every_steps": free(at_least(0)),
  "best_metric": free(),
  "best_mode": free(one_of("min", "max")),
}


def random_keys(key: Callable[[Rule], Key]) -> dict[str, Key]:
  """Returns the keys of config.random, sizes of an untrained encoder.

  Args:
    key: `fixed`, or `free` where a checkpoint records the encoder instead.
  """
  names = (
    *("width", "depth", "num_heads", "mlp_dim"),
    *("num_frames", "tubelet_size", "patch_size"),
  )
  return {
    "random.image_size": key(FRAME_SIZES),
    **{f"random.{name}": key(at_least(1)) for name in names},
  }


# --- Checks -------------------------------------------------------------------


def refuse(problems: Iterable[str]) -> None:
  """Raises a ConfigError that lists the problems, if there are any."""
  problems = list(problems)
  if problems:
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise ConfigError(
      f"the configuration has {counted(len(problems), 'problem')}:\n" + lines
    )


def check_keys(
  config: ConfigDict, keys: Mapping[str, Key], prefix: str | None = None
) -> None:
  """Refuses a configuration that lacks keys of its family or has others.

  The configuration of another command does, and a misspelt key in a file.

  Args:
    config: the configuration.
    keys: the table of the family.
    prefix: begins keys that the table does not list; None: there are none.

  Raises:
    ConfigError: it does.
  """
  found = flat(config).keys()
  problems = [f"{key} is missing" for key in keys if key not in found]
  for key in sorted(found - keys.keys()):
    if prefix is None or not key.startswith(prefix):
      alike = difflib.get_close_matches(key, keys, 1)
      expected = f", expected {alike[0]}" if alike else ""
      problems.append(f"{key} is no key{expected}")
  if problems:
    more = len(problems) - 5
    lines = problems[:5] + [f"and {more} more"] * (more > 0)
    raise ConfigError(
      "these are not the keys of this command:\n"
      + "\n".join(f"  {line}" for line in lines)
      + "\nexpected those of its configuration in configs/"
    )


def violations(config: ConfigDict, keys: Mapping[str, Key]) -> Iterator[str]:
  """Yields a line for each value that its rule does not accept.

  No number may be NaN or infinite; rules of lists check their own items.
  """
  for key, entry in keys.items():
    value, expected = get(config, key), entry.rule.expected
    if isinstance(value, float) and not math.isfinite(value):
      yield f"{key}={value!r}: expected {expected}, and finite"
    elif not entry.rule.accepts(value):
      yield f"{key}={value!r}: expected {expected}"


def training_violations(
  config: ConfigDict, keys: Mapping[str, Key], extra: Collection[str] = ()
) -> Iterator[str]:
  """Yields the violations of `keys` and of rules that span TRAINING_KEYS.

  Args:
    config: a configuration with all TRAINING_KEYS.
    keys: the table of its family.
    extra: names that `allow_change` accepts in addition to the keys: values
      that a checkpoint records but that are not in the configuration.
  """
  yield from violations(config, keys)
  names = {*flat(config), *extra}
  for name in filter(None, config.allow_change.split(",")):
    if name not in names:
      yield f"allow_change names {name!r}, which is not a key"
  yield from distributed_violations(config.distributed)


def distributed_violations(settings: ConfigDict) -> Iterator[str]:
  """Yields a line for each problem of config.distributed."""
  address, num_processes = settings.coordinator, settings.num_processes
  if address in ("", "auto", "none"):
    return
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    yield (
      f"distributed.coordinator={address!r}: expected host:port, 'auto', "
      "'none' or ''"
    )
  if num_processes < 1:
    yield (
      f"distributed.num_processes={num_processes}: expected at least 1 with "
      "distributed.coordinator=host:port"
    )
  elif settings.process_id >= num_processes:
    yield (
      f"distributed.process_id={settings.process_id}: expected less than "
      f"distributed.num_processes={num_processes}"
    )


def random_violations(settings: ConfigDict) -> Iterator[str]:
  """Yields a line for each problem of config.random, sizes of an encoder."""
  for key, unit, factor in (
    ("width", "num_heads", 2),
    ("num_frames", "tubelet_size", 1),
    ("image_size", "patch_size", 1),
  ):
    value, divisor = settings[key], factor * settings[unit]
    if divisor >= 1 and value % divisor:
      twice = "twice " if factor == 2 else ""
      yield (
        f"random.{key}={value}: expected a multiple of {twice}random.{unit}="
        f"{settings[unit]}"
      )


# --- Values -------------------------------------------------------------------


def get(config: ConfigDict, key: str) -> Any:
  """Returns the value of a dotted key, such as 'data.path'."""
  for name in key.split("."):
    config = config[name]
  return config


def flat(config: ConfigDict) -> dict[str, Any]:
  """Returns the configuration under dotted keys: {"data.path": ...}."""

  def walk(tree: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
      if isinstance(value, ConfigDict):
        yield from walk(value, f"{prefix}{name}.")
      else:
        yield prefix + name, value

  return dict(walk(config, ""))


def fixed_values(config: ConfigDict, keys: Mapping[str, Key]) -> dict[str, Any]:
  """Returns the values that a resumed run must share, under dotted keys.

  Keys without a rule, such as those below `derive`, are fixed. A key with its
  value from before it existed is left out. Values are as JSON returns them:
  lists in place of tuples.
  """

  def is_shared(key, value):
    if key not in keys:
      return True
    entry = keys[key]
    is_implied = entry.before is not None and value == entry.before
    return entry.is_fixed and not is_implied

  values = {k: v for k, v in flat(config).items() if is_shared(k, v)}
  return json.loads(json.dumps(values))
