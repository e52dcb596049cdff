"""Where compiled programs are kept, in processes of their own."""

import os
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

PROGRAM = """
import sys
import jax
from marlin_jax.devices import compilation_cache
compilation_cache.set_up(sys.argv[1], sys.argv[2])
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
"""


def compile_something(setting, workdir, **variables):
  env = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
  env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  subprocess.run(
    [sys.executable, "-c", PROGRAM, setting, workdir],
    env=env | variables,
    cwd=ROOT,
    check=True,
    timeout=60,
  )


def num_programs(folder):
  return len(list(folder.glob("*-cache")))


def test_a_run_keeps_its_programs_in_its_workdir(tmp_path):
  compile_something("auto", tmp_path / "run")
  assert num_programs(tmp_path / "run" / "compiled") > 0


@pytest.mark.parametrize("setting", ["auto", "other"])
def test_another_folder_can_be_named(tmp_path, setting):
  variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "variable")}
  path = tmp_path / ("variable" if setting == "auto" else "other")
  setting = setting if setting == "auto" else str(path)
  compile_something(setting, tmp_path / "run", **variables)
  assert num_programs(path) > 0
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_nothing_is_kept_on_request(tmp_path):
  variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "variable")}
  compile_something("", tmp_path / "run", **variables)
  assert not list(tmp_path.iterdir())
