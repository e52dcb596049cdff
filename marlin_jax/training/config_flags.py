"""The command line of the binaries that take --config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from marlin_jax.training.configuration import ConfigError

CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="Configuration file, e.g. configs/pretrain_b.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the results, which training may keep on gs://BUCKET/FOLDER too; "
  "the same command goes on from there. Default: runs/<name of the "
  "configuration>.",
)


def config(validate: Callable[[ConfigDict], None]) -> ConfigDict:
  """Returns the configuration of --config; exits with an error if it is bad.

  Args:
    validate: raises a ConfigError for a configuration that cannot be run.
  """
  try:
    validate(CONFIG.value)
  except ConfigError as e:
    sys.exit(f"error: {e}")
  return CONFIG.value


def workdir() -> str:
  """Returns --workdir, or its default."""
  path = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  return _WORKDIR.value or f"runs/{path.stem}"


def parse(argv: Sequence[str]) -> list[str]:
  """Parses absl flags with --config; errors in them are for people.

  Args:
    argv: the command line.

  Returns:
    What is left of it.
  """
  try:
    args = app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    # What ml_collections raises for an unknown key or a value of another type;
    # one error may be the only argument of the next.
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]
    sys.exit(f"error: in a --config flag: {e.args[0]}")
  path = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  if not path.is_file():
    there = sorted(path.parent.glob("*.py"))
    sys.exit(
      f"error: no configuration file at {path}; in {path.parent} there are: "
      + (", ".join(p.name for p in there) or "none")
    )
  return args
