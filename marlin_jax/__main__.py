"""All commands under one name: marlin.

  marlin COMMAND ...     the same as marlin-COMMAND ...
  marlin COMMAND --help
  marlin --version       versions, devices, and what is not installed

In a clone that is not installed: python -m marlin_jax.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import runpy
import sys
from pathlib import Path

import marlin_jax
from marlin_jax.records import cli, extras

# Each is a console script too, as marlin-NAME in pyproject.toml.
COMMANDS = {
  "prepare": "data_prep.prepare",
  "verify": "data_prep.verify",
  "report": "data_prep.report",
  "contact-sheet": "data_prep.contact_sheet",
  "train": "marlin_jax.train",
  "show": "marlin_jax.show",
  "plan": "marlin_jax.plan",
  "features": "marlin_jax.features",
  "reconstruct": "marlin_jax.reconstruct",
  "convert": "marlin_jax.convert",
  "eval-far": "marlin_jax.eval.far",
  "eval-fer": "marlin_jax.eval.fer",
  "eval-dfd": "marlin_jax.eval.dfd",
  "eval-ls": "marlin_jax.eval.ls",
  "predict": "marlin_jax.predict",
  "compare": "marlin_jax.compare",
  "demo": "marlin_jax.demo",
}
_SCRIPT = "marlin-"
# Distributions on which results and errors depend.
_VERSIONS = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
  *("av", "mediapipe", "tensorflow-datasets"),
)


def main() -> int:
  """Runs the command that the script's name or the first argument names.

  A command runs as `python -m MODULE` would run it, so that its worker
  processes find it.

  Returns:
    0, or 2 for a command that does not exist; a command itself exits.
  """
  program = Path(sys.argv[0]).stem
  arguments = sys.argv[1:]
  if program.startswith(_SCRIPT):
    cli.prefix = _SCRIPT
    arguments.insert(0, program.removeprefix(_SCRIPT))
  elif arguments:
    is_module = program == "__main__"
    cli.prefix = "python -m marlin_jax " if is_module else f"{program} "
  name = arguments[0] if arguments else "--help"
  if name in ("--help", "-h", "help"):
    print(_help())
  elif name in ("--version", "-V", "version"):
    print(_versions())
  elif name in COMMANDS:
    module = COMMANDS[name]
    sys.argv = [module, *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  else:
    print(
      f"error: no command '{name}': expected one of {', '.join(COMMANDS)}",
      file=sys.stderr,
    )
    return 2
  return 0


def _help() -> str:
  rows = (f"  {name:<14}{_summary(COMMANDS[name])}" for name in COMMANDS)
  return "\n".join([__doc__, "Commands", *rows])


def _summary(module: str) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  path = importlib.util.find_spec(module).origin
  text = ast.get_docstring(ast.parse(Path(path).read_text()))
  return text.partition("\n")[0]


def _versions() -> str:
  """Returns versions, devices and extras, one per line."""
  rows = [("marlin_jax", marlin_jax.__version__)]
  rows += [("python", f"{platform.python_version()}, {platform.platform()}")]
  for name in _VERSIONS:
    try:
      rows.append((name, importlib.metadata.version(name)))
    except importlib.metadata.PackageNotFoundError:
      rows.append((name, "not installed"))
  for extra in extras.LIBRARIES:
    missing = extras.missing(extra)
    state = f"lacks {', '.join(missing)}" if missing else "installed"
    rows.append((f"[{extra}]", state))
  rows.append(("devices", _devices()))
  return "\n".join(f"{label:<20} {value}" for label, value in rows)


def _devices() -> str:
  import jax

  try:
    kinds = [device.device_kind for device in jax.devices()]
  except RuntimeError as e:
    return f"none: {e}"
  return ", ".join(
    f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)
  )


if __name__ == "__main__":
  sys.exit(main())
