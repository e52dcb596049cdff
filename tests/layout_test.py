"""Rules of the layout: package floors, sizes, commands, configurations."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from marlin_jax.eval import configuration as eval_configuration
from marlin_jax.lipsync import configuration as lipsync_configuration
from marlin_jax.pretraining import configuration

ROOT = Path(__file__).parents[1]
PROGRAMS = ("marlin_jax", "data_prep")
# Modules of the programs themselves that are no commands.
SINGLE_MODULES = ("data_prep.assets", "data_prep.storage", "marlin_jax.compat")


def read_floors() -> dict[str, set[str]]:
  """Returns package -> packages it may import, from docs/ARCHITECTURE.md."""

  def full(name: str) -> str:
    return name if name.startswith("data_prep") else f"marlin_jax.{name}"

  floors = {}
  for line in (ROOT / "docs" / "ARCHITECTURE.md").read_text().splitlines():
    if row := re.fullmatch(r"\| `([\w.]+)` \|.*\|([^|]*)\|", line):
      names = re.findall(r"`([\w.]+)`", row[2])
      floors[full(row[1])] = {full(name) for name in names}
  return floors


FLOORS = read_floors()
MODULES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts): path
  for program in PROGRAMS
  for path in sorted((ROOT / program).rglob("*.py"))
}


def package_of(module: str) -> str:
  """Returns the package of a module; the program's name for a command."""
  if module in SINGLE_MODULES or module in FLOORS:
    return module
  return module.rpartition(".")[0]


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
  """Returns dotted names that a file imports, wherever in it."""
  return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        is_module = name in MODULES or f"{name}.__init__" in MODULES
        yield name if is_module else node.module


def is_command(module: str) -> bool:
  if module in SINGLE_MODULES or module.endswith("__init__"):
    return False
  if module.startswith("marlin_jax.eval."):
    return "__main__" in MODULES[module].read_text()
  return module.count(".") == 1


COMMANDS = sorted(filter(is_command, MODULES))


def test_every_package_is_in_the_table():
  packages = {
    package_of(module)
    for module, path in MODULES.items()
    if path.read_text() and not is_command(module)
  }
  assert packages - set(PROGRAMS) == set(FLOORS)


def test_the_table_has_no_cycle():
  seen: set[str] = set()
  # Rows stand in an order in which each package follows those it may import.
  for package, below in FLOORS.items():
    assert below <= seen, f"{package}: {below - seen}"
    seen.add(package)


@pytest.mark.parametrize("package", FLOORS)
def test_packages_import_only_packages_below_them(package):
  for module, path in MODULES.items():
    if package_of(module) == package and not is_command(module):
      for name in imports(path):
        if name.partition(".")[0] in PROGRAMS:
          other = package_of(name)
          assert other == package or other in FLOORS[package], (
            f"{path.relative_to(ROOT)} imports {name}"
          )


def test_commands_import_no_command():
  for module, path in MODULES.items():
    for name in imports(path):
      if name in COMMANDS:
        assert name == module, f"{path.relative_to(ROOT)} imports {name}"


def test_data_prep_imports_the_records_package_alone():
  for module, path in MODULES.items():
    for name in imports(path):
      top = name.partition(".")[0]
      if module.startswith("data_prep"):
        assert top not in ("jax", "flax", "grain"), f"{path}: {name}"
        if top == "marlin_jax":
          assert name.startswith("marlin_jax.records"), f"{path}: {name}"
      if module.startswith("marlin_jax.records"):
        assert top not in ("jax", "flax", "grain", "cv2"), f"{path}: {name}"
      if top == "torch":
        allowed = (
          "data_prep.regions.farl",
          "marlin_jax.convert",
          "marlin_jax.weights.torch_",
        )
        assert module.startswith(allowed), f"{path}: {name}"


def test_packages_are_small():
  for package in (*PROGRAMS, *FLOORS):
    modules = [
      m
      for m in MODULES
      if m.rpartition(".")[0] == package and not m.endswith("__init__")
    ]
    assert len(modules) <= 12, package


def test_docstrings_do_not_begin_with_what_or_whether():
  for path in MODULES.values():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(
        node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
      ):
        text = ast.get_docstring(node) or ""
        assert not re.match(r"(What|Whether)\b", text), f"{path}: {text[:60]}"


def test_a_definition_has_one_docstring():
  for path in MODULES.values():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(body := getattr(node, "body", None), list):
        for statement in body[1:]:
          dead = isinstance(statement, ast.Expr) and isinstance(
            statement.value, ast.Constant
          )
          assert not dead or statement.value.value is ..., (
            f"{path}:{statement.lineno}"
          )


def test_configurations_import_nothing_of_the_programs():
  for path in sorted((ROOT / "configs").glob("*.py")):
    for name in imports(path):
      assert name.partition(".")[0] in ("ml_collections", "configs"), path


@pytest.mark.parametrize(
  "name", [path.stem for path in sorted((ROOT / "configs").glob("[a-z]*.py"))]
)
def test_every_configuration_is_valid(name):
  validate = configuration.validate
  if name == "eval_ls":
    validate = lipsync_configuration.validate
  elif name.startswith("eval_"):
    validate = eval_configuration.validate
  validate(importlib.import_module(f"configs.{name}").get_config())


def test_every_file_with_a_main_is_a_command():
  for module, path in MODULES.items():
    # The decoder's child process is started by its parent alone.
    if module != "data_prep.decoder.process":
      has_main = '__name__ == "__main__"' in path.read_text()
      assert has_main == (module in COMMANDS), path
