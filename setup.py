"""Builds a wheel with one top-level package; pyproject.toml has the rest.

In the repository, configs/ and data_prep/ lie beside marlin_jax/. In
site-packages such common names would hide a user's own folders, or be hidden by
them. So a wheel has them as marlin_jax.configs and marlin_jax.data_prep, and
its modules name them so. An editable install leaves all files as they are.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MOVED = ("configs", "data_prep")
# Names of modules, in imports and in text: not paths, not words of a sentence.
_NAMES = (
  (r"(?<![\w./])data_prep(?=\.[a-z])", r"marlin_jax.data_prep"),
  (r"(?m)^( *from )(configs|data_prep)(?= import )", r"\1marlin_jax.\2"),
)


def renamed(text: str) -> str:
  """Returns the text of a module with the names that a wheel has."""
  for pattern, name in _NAMES:
    text = re.sub(pattern, name, text)
  return text


class BuildPy(build_py):
  """Copies modules to the places and with the names that a wheel has."""

  def run(self):
    if not self.editable_mode:
      # Modules of an earlier build, since renamed, would get into the wheel.
      shutil.rmtree(self.build_lib, ignore_errors=True)
    super().run()

  def get_module_outfile(self, build_dir, package, module):
    if package[0] in MOVED and not self.editable_mode:
      package = ["marlin_jax", *package]
    return super().get_module_outfile(build_dir, package, module)

  def build_module(self, module, module_file, package):
    built = super().build_module(module, module_file, package)
    if not self.editable_mode:
      path = Path(built[0])
      path.write_text(renamed(path.read_text()))
    return built


if __name__ == "__main__":
  setup(cmdclass={"build_py": BuildPy})
