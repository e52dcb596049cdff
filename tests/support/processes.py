"""Processes that tests start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_prepare(*args: object) -> subprocess.CompletedProcess[str]:
  """Runs the real binary."""
  return subprocess.run(
    [sys.executable, "-m", "data_prep.prepare", *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=250,
  )


def seeing_devices(num_devices: int) -> dict[str, str]:
  """An environment in which a process sees so many CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": flags}


def on_eight_devices(script: str) -> Any:
  """Runs a file of this folder; returns the JSON that it prints."""
  result = subprocess.run(
    [sys.executable, ROOT / "tests" / "support" / script],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=seeing_devices(8) | {"PYTHONPATH": str(ROOT)},
    check=False,
    timeout=280,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)
