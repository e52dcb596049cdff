"""Faults of the launch: what is not installed.

Wrong settings are in configuration_test.py and train_test.py, missing processes
in rendezvous_test.py and distributed_test.py, --help in help_test.py.
"""

import os
import subprocess
import sys

from tests.support.processes import ROOT

# Needed for some things only, or for another machine.
OPTIONAL = (
  "torch",
  "cv2",
  "mediapipe",
  "av",
  "tensorflow_datasets",
  "libtpu",
  "gcsfs",
  "pyarrow",
)
IMPORT_ALL = """
import importlib, pathlib, sys
for name in sys.argv[1:]:
  sys.modules[name] = None  # importing it fails
for path in sorted(pathlib.Path("marlin_jax").rglob("*.py")):
  parts = path.with_suffix("").parts
  importlib.import_module(".".join(parts))
print(len(sys.modules))
"""


def python(code, *args):
  return subprocess.run(
    [sys.executable, "-c", code, *args],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ,
    check=False,
    timeout=120,
  )


def test_every_module_can_be_imported_without_what_only_some_need():
  result = python(IMPORT_ALL, *OPTIONAL)
  assert result.returncode == 0, result.stderr
  assert int(result.stdout) > 100


def test_torch_files_without_torch_name_the_command(tmp_path):
  code = """
import sys
sys.modules["torch"] = None
from marlin_jax.weights import formats, weights
try:
  formats.read(sys.argv[1])
except weights.WeightsError as e:
  print(e)
"""
  (tmp_path / "weights.pt").write_bytes(b"PK")
  result = python(code, str(tmp_path / "weights.pt"))
  assert result.returncode == 0, result.stderr
  assert "pip install" in result.stdout
