"""Command-line flags of the commands that take --config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from marlin_jax.records import cli, extras
from marlin_jax.training.configuration import ConfigError

# In a wheel configs/ lies in the package, in a clone beside it.
_PACKAGE = Path(__file__).parents[1]
_CONFIGS = next(
  path
  for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs")
  if path.is_dir()
)
# absl's flags that print help and end the command.
_HELP = {
  f"{dashes}{name}"
  for dashes in ("-", "--")
  for name in ("?", "help", "helpfull", "helpshort", "helpxml")
}
CONFIG = config_flags.DEFINE_config_file(
  "config",
  help_string="Configuration: a Python file with get_config(), as in configs/, "
  "whose files explain their keys; or the name of one that comes with the "
  "package, such as pretrain_b or eval_far.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the results; for training it may be on gs://BUCKET/FOLDER. Run "
  "the same command again to resume. Default: runs/NAME, the name of the "
  "configuration file.",
)


def run(main: Callable[[Sequence[str]], int | None], *required: str) -> None:
  """Parses the flags, runs a command and exits with its exit code.

  Args:
    main: the command; takes the program's name and positional arguments.
    *required: flags that must be given, beside --config.
  """

  def checked(argv: Sequence[str]) -> int | None:
    try:
      extras.require("train", "this command")
    except extras.MissingLibraryError as e:
      sys.exit(f"error: {e}")
    return main(argv)

  module = sys.modules["__main__"]  # whose docstring --help prints
  module.__doc__ = cli.as_started(module.__doc__)
  app.run(checked, flags_parser=lambda argv: parse(argv, *required))


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


def parse(argv: Sequence[str], *required: str) -> list[str]:
  """Parses the flags; a bad one ends the process with a short error.

  Args:
    argv: command line, including the program's name.
    *required: flags that must be given, beside --config.

  Returns:
    The program's name and the positional arguments.
  """
  try:
    args = app.parse_flags_with_usage(with_path(argv))
  except SystemExit as e:
    # absl ends with 1 after its help too.
    sys.exit(0 if _HELP & {*argv} else e.code)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    # ml_collections raises these for an unknown key or a value of another type,
    # and may wrap one in another.
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]
    kind = "no key " if isinstance(e, KeyError) else ""
    reason = str(e.args[0]).replace("\n", ". ")
    sys.exit(f"error: in a --config flag: {kind}{reason}")
  packaged = f"These come with the package: {', '.join(names_of_configs())}"
  if missing := [
    f"--{name}"
    for name in dict.fromkeys(["config", *required])
    if flags.FLAGS[name].value is None
  ]:
    choice = f". {packaged}" if "--config" in missing else ""
    sys.exit(
      f"error: {' and '.join(missing)} must be given; --help explains{choice}"
    )
  path = _config_path()
  if not path.is_file():
    names = ", ".join(
      sorted(
        p.name
        for p in path.parent.glob("*.py")
        if "def get_config(" in p.read_text(errors="replace")
      )
    )
    sys.exit(
      f"error: no configuration file at {path}; {path.parent} holds: "
      f"{names or 'none'}. {packaged}"
    )
  return args


def names_of_configs() -> list[str]:
  """Returns the names that --config takes instead of a path."""
  return sorted(path.stem for path in _CONFIGS.glob("[a-z]*.py"))


def with_path(argv: Sequence[str]) -> list[str]:
  """Returns a command line with the path of a configuration for its name.

  A file that is no Python file ends the process.
  """
  args = list(argv)
  for i, arg in enumerate(args):
    flag, equals, value = arg.partition("=")
    if flag in ("-config", "--config"):
      if equals:
        args[i] = f"{flag}={_path_of(value)}"
      elif i + 1 < len(args):
        args[i + 1] = _path_of(args[i + 1])
  return args


def _path_of(config: str) -> str:
  if Path(config).is_file():
    if not config.endswith(".py"):
      sys.exit(
        f"error: --config={config}: expected a Python file with get_config(), "
        "such as configs/pretrain_b.py; --config.KEY=VALUE changes its values"
      )
    return config
  known = config in names_of_configs()
  return str(_CONFIGS / f"{config}.py") if known else config


def _config_path() -> Path:
  return Path(config_flags.get_config_filename(flags.FLAGS["config"]))
