"""Command-line flags of the commands that take --config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from marlin_jax.training.configuration import ConfigError

CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="Configuration file, such as configs/pretrain_b.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the results; for training it may be on gs://BUCKET/FOLDER. Run "
  "the same command again to resume. Default: runs/NAME, the name of the "
  "configuration file.",
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
  return _WORKDIR.value or f"runs/{_config_path().stem}"


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; a bad --config flag ends the process with a short error.

  Args:
    argv: command line, including the program's name.

  Returns:
    The program's name and the positional arguments.
  """
  try:
    args = app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    # ml_collections raises these for an unknown key or a value of another type,
    # and may wrap one in another.
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]
    sys.exit(f"error: in a --config flag: {e.args[0]}")
  path = _config_path()
  if not path.is_file():
    names = ", ".join(sorted(p.name for p in path.parent.glob("*.py")))
    sys.exit(
      f"error: no configuration file at {path}; {path.parent} holds: "
      f"{names or 'none'}"
    )
  return args


def _config_path() -> Path:
  return Path(config_flags.get_config_filename(flags.FLAGS["config"]))
