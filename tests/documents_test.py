"""Every command in docs/REPRODUCING.md parses."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from data_prep import prepare, verify
from marlin_jax.eval import configuration
from marlin_jax.pretraining.configuration import validate

PAGE = Path(__file__).parents[1] / "docs" / "REPRODUCING.md"
PARSERS = {"data_prep.prepare": prepare, "data_prep.verify": verify}


def commands():
  """Returns the arguments of each `python -m` in an indented block."""
  blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(), re.MULTILINE)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  found = [shlex.split(line) for line in lines if "python -m" in line]
  assert len(found) > 10
  return [words[2:] for words in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_page_is_understood(words):
  binary, *arguments = words
  if binary in PARSERS:
    PARSERS[binary]._parser().parse_args(arguments)
    return
  assert importlib.util.find_spec(binary)
  flags = dict(
    argument.removeprefix("--").split("=", 1) for argument in arguments
  )
  module = flags.pop("config").removesuffix(".py").replace("/", ".")
  config = importlib.import_module(module).get_config()
  settings = {
    name.removeprefix("config."): value
    for name, value in flags.items()
    if name.startswith("config.")
  }
  config.update_from_flattened_dict(
    {key: _typed(config, key, value) for key, value in settings.items()}
  )
  if binary == "marlin_jax.train":
    validate(config)
    others = {"workdir"}
  else:
    configuration.validate(config)
    others = {"checkpoint", "data", "workdir"}
  assert flags.keys() - {f"config.{key}" for key in settings} == others


def _typed(config, key, value):
  """Converts as the command line does; an unknown key is an error."""
  for part in key.split("."):
    config = config[part]
  return type(config)(value)
