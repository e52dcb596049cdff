"""Documents and docstrings are true: commands, keys, paths, targets, tables."""

import ast
import importlib
import json
import re
import shlex

import jax
import pytest
from absl import flags
from flax import nnx

from configs import eval_far, eval_fer, eval_ls, pretrain_b
from data_prep import contact_sheet, prepare, report, verify
from marlin_jax import (
  compare,
  convert,
  demo,
  features,
  predict,
  reconstruct,
  show,
)
from marlin_jax.__main__ import COMMANDS as SCRIPTS
from marlin_jax.eval import configuration as eval_configuration
from marlin_jax.eval import ls
from marlin_jax.lipsync import configuration as lipsync_configuration
from marlin_jax.pretraining import configuration
from marlin_jax.weights.architecture import Architecture
from tests.layout_test import COMMANDS, MODULES, ROOT
from tools import compare_parsers

DOCUMENTS = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
  *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
# Documents, and programs whose docstrings show commands.
PAGES = [
  *DOCUMENTS,
  NOTEBOOK,
  *sorted((ROOT / "configs").glob("*.py")),
  *(MODULES[command] for command in COMMANDS),
]
PARSERS = {
  "data_prep.contact_sheet": lambda argv: contact_sheet._parser().parse_args(
    argv
  ),
  "data_prep.prepare": lambda argv: prepare._parser().parse_args(argv),
  "data_prep.report": lambda argv: report._parser().parse_args(argv),
  "data_prep.verify": lambda argv: verify._parser().parse_args(argv),
  "marlin_jax.compare": lambda argv: compare._parser().parse_args(argv),
  "marlin_jax.convert": convert.parse_args,
  "marlin_jax.demo": lambda argv: demo._parser().parse_args(argv),
  "marlin_jax.features": lambda argv: features._parser().parse_args(argv),
  "marlin_jax.predict": lambda argv: predict._parser().parse_args(argv),
  "marlin_jax.reconstruct": reconstruct._parse_args,
  "marlin_jax.show": lambda argv: show._parser().parse_args(argv),
  "tools.compare_parsers": lambda argv: compare_parsers._parser().parse_args(
    argv
  ),
}
VALIDATORS = {
  "marlin_jax.eval.ls": lipsync_configuration.validate,
  "marlin_jax.plan": configuration.validate,
  "marlin_jax.train": configuration.validate,
}
# Launchers that pass their arguments to marlin_jax.train.
LAUNCHERS = (
  "marlin:cuda marlin_jax.train",
  "tools/slurm.sh",
  "tools/tpu_vm.sh babysit --",
)
# What a document abbreviates, and a value that a parser accepts.
PLACEHOLDERS = {
  "prepare ...": "prepare --input=VIDEOS --output=DATASET",
  "\\$SLURM_ARRAY_TASK_ID": "0",
  "--num_workers N": "--num_workers 2",
  "[": "",
  "]": "",
}
NUMBERS = {"HOST:PORT": "host:1", "=N": "=2", "=I": "=1"}


def text_of(page):
  """Returns a document, the docstring of a module or a notebook's commands."""
  text = page.read_text()
  if page.suffix == ".ipynb":
    return "\n".join(notebook_commands(json.loads(text)))
  if page.suffix == ".py":
    return ast.get_docstring(ast.parse(text)) or ""
  return text


def notebook_commands(notebook):
  """Yields the commands that the cells of a notebook run."""
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      for node in ast.walk(ast.parse("".join(cell["source"]))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run":
          (text,) = node.args
          parts = text.values if isinstance(text, ast.JoinedStr) else [text]
          yield "python -m " + "".join(
            part.value if isinstance(part, ast.Constant) else "FOLDER"
            for part in parts
          )


def commands():
  """Returns module and arguments of each command of ours, in all pages."""
  parameters = {}
  for page in PAGES:
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    for launcher in LAUNCHERS:
      text = text.replace(launcher, "python -m marlin_jax.train")
    text = re.sub(
      r"^( +)marlin-(\S+)",
      lambda found: f"{found[1]}python -m {SCRIPTS[found[2]]}",
      text,
      flags=re.MULTILINE,
    )
    for command in re.findall(
      r"^ *(?:|\.venv/bin/|(?:docker|sbatch) [^`\n]*)"
      r"python -m ((?:marlin_jax|data_prep|tools)\..*)",
      text,
      re.MULTILINE,
    ):
      for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
      words = tuple(shlex.split(command.rstrip('"'), comments=True))
      name = f"{page.name} {' '.join(words)}"
      parameters.setdefault(words, pytest.param(words, id=name))
  assert len(parameters) > 50
  return list(parameters.values())


@pytest.mark.parametrize("words", commands())
def test_a_command_is_understood(words):
  module, *arguments = words
  if module in PARSERS:
    PARSERS[module](arguments)
    return
  importlib.import_module(module)
  defined = {f.name for f in flags.FLAGS.get_key_flags_for_module(module)}
  given = dict(
    argument.removeprefix("--").partition("=")[::2] for argument in arguments
  )
  overrides = {
    name.removeprefix("config."): given.pop(name)
    for name in list(given)
    if name.startswith("config.")
  }
  for name in given:
    assert {name, name.removeprefix("no")} & defined, name
  file = given["config"].removesuffix(".py").replace("/", ".")
  file = file if "." in file else f"configs.{file}"
  config = importlib.import_module(file).get_config()
  config.update_from_flattened_dict(
    {key: _typed(config, key, value) for key, value in overrides.items()}
  )
  VALIDATORS.get(module, eval_configuration.validate)(config)
  if module == "marlin_jax.eval.ls":
    required, optional = ls._MODES[given["mode"]]
    assert {*required} <= given.keys()
    assert given.keys() <= {"config", "mode", *required, *optional}
  elif module.startswith("marlin_jax.eval."):
    encoder = set() if config.features else {"checkpoint"}
    assert given.keys() == {"config", "data", "workdir", *encoder}


def _typed(config, key, value):
  """Converts as the command line does; an unknown key is an error."""
  for part in key.split("."):
    config = config[part]
  return value == "True" if isinstance(config, bool) else type(config)(value)


def lines_of_flags():
  """Returns the lines of documents that show flags without a command."""
  lines = []
  for page in DOCUMENTS:
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines += re.findall(r"^    (--config\..*)", text, re.MULTILINE)
  assert len(lines) > 4
  return lines


@pytest.mark.parametrize("line", lines_of_flags())
def test_flags_without_a_command_make_a_valid_configuration(line):
  for placeholder, value in NUMBERS.items():
    line = line.replace(placeholder, value)
  config = pretrain_b.get_config()
  for flag in shlex.split(line):
    key, _, value = flag.removeprefix("--config.").partition("=")
    config.update_from_flattened_dict({key: _typed(config, key, value)})
  configuration.validate(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_exist(page):
  configs = [c.get_config() for c in (pretrain_b, eval_far, eval_fer, eval_ls)]
  for key in re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)", text_of(page)):
    assert any(_has(config, key) for config in configs), key


def _has(config, key):
  for part in key.split("."):
    if not hasattr(config, "keys") or part not in config:
      return False
    config = config[part]
  return True


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_paths_and_make_targets_exist(page):
  text = page.read_text()
  folders = "configs|data_prep|docs|marlin_jax|tests|tools"
  for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text):
    assert (ROOT / path).exists(), path
  for path in re.findall(r"\]\(([\w/.-]+)\)", text):
    assert (page.parent / path).exists(), path
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
  for target in re.findall(r"(?:`|^    )make\s+([a-z-]+)\b(?!\.)", text, re.M):
    assert target in targets, target


def test_the_table_of_configurations_equals_the_configurations():
  rows = re.findall(
    r"^\| `(\w+)` \| ([\d/]+) \| ([\d/]+) \| ([\d.]+)M \|",
    (ROOT / "README.md").read_text(),
    re.MULTILINE,
  )
  assert len(rows) == 6
  for name, encoder, decoder, millions in rows:
    config = importlib.import_module(f"configs.{name}").get_config()
    model = config.model
    assert encoder == f"{model.width}/{model.depth}/{model.num_heads}", name
    assert decoder == (
      f"{model.dec_width}/{model.dec_depth}/{model.dec_num_heads}"
    ), name
    make = Architecture.from_config(config).make_autoencoder
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    assert millions == f"{num_params / 1e6:.1f}", name


def test_the_layout_in_the_readme_exists():
  text = (ROOT / "README.md").read_text()
  block = text.partition("## Layout")[2].partition("\n## ")[0]
  lines = re.findall(r"^    (\S+/|  .*)", block, re.MULTILINE)
  top, packages = None, set()
  for line in lines:
    if not line.startswith(" "):
      top = line
      assert (ROOT / top).is_dir(), top
      continue
    for name in re.findall(r"\b\w+/", line):
      assert (ROOT / top / name).is_dir(), f"{top}{name}"
      packages.add(f"{top}{name}")
  present = {
    f"{top}/{path.name}/"
    for top in ("data_prep", "marlin_jax")
    for path in (ROOT / top).iterdir()
    if (path / "__init__.py").is_file()
  }
  assert present == packages
