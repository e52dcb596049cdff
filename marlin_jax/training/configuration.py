"""Rules for the keys of a configuration, and the error that lists violations.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from marlin_jax.records.cli import UserError


class ConfigError(UserError):
  """Configuration that cannot be run; the message lists every problem."""


def refuse(problems: Iterable[str]) -> None:
  """Raises a ConfigError that lists the problems, if there are any."""
  problems = list(problems)
  if problems:
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise ConfigError(
      f"the configuration has {len(problems)} problem(s):\n" + lines
    )


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
