"""Runs commands for tests, in this process and in processes of their own."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Finished:
  """Exit code and output of a command that ran in this process."""

  returncode: int
  stdout: str
  stderr: str


def run_here(command: Callable[[], int | None]) -> Finished:
  """Runs a command in this process, where its modules are loaded already.

  Args:
    command: returns the exit code or None, or raises SystemExit. Other
      exceptions, which would end a process, are raised.
  """
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      code = command() or 0
    except SystemExit as e:
      code = e.code or 0
      if not isinstance(code, int):  # as Python does with a message
        print(code, file=err)
        code = 1
  return Finished(code, out.getvalue(), err.getvalue())


def run_prepare(*args: object) -> Finished:
  """Runs data_prep.prepare in this process; it starts its own workers.

  One unless `args` say how many: each takes seconds to open the models.
  """
  from data_prep import prepare

  argv = [str(arg) for arg in args]
  if not any(arg.startswith("--num_workers") for arg in argv):
    argv.insert(0, "--num_workers=1")
  return run_here(lambda: prepare.main(argv))


def start_prepare(*args: object) -> subprocess.CompletedProcess[str]:
  """Runs data_prep.prepare in a process of its own."""
  return start_module("data_prep.prepare", *args)


def start_module(name: str, *args: object) -> subprocess.CompletedProcess[str]:
  """Runs a command in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", name, *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=250,
  )


def children(process_id: int) -> set[int]:
  """Returns the processes that a process has started."""
  found = subprocess.run(
    ["ps", "-o", "pid=", "--ppid", str(process_id)],
    capture_output=True,
    text=True,
    check=False,
  )
  return {int(i) for i in found.stdout.split()}


def seeing_devices(num_devices: int) -> dict[str, str]:
  """Returns the environment of a process with `num_devices` CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": flags}


def on_eight_devices(script: str, *args: str) -> Any:
  """Runs a file of this folder; returns the JSON that it prints."""
  result = subprocess.run(
    [sys.executable, ROOT / "tests" / "support" / script, *args],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=seeing_devices(8),
    check=False,
    timeout=500,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)
