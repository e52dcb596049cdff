"""The command line of the binaries that take --config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

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


def workdir() -> str:
  """The folder of the results, as asked for or by the default."""
  config = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  return _WORKDIR.value or f"runs/{config.stem}"


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
