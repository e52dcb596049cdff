"""The notebook of docs/ is stored without outputs, and runs."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def test_outputs_are_stripped():
  for cell in code_cells(NOTEBOOK):
    assert cell["outputs"] == []
    assert cell["execution_count"] is None
    assert cell["metadata"] == {}


def test_what_it_imports_exists():
  names = [
    (node.module, alias.name)
    for cell in code_cells(NOTEBOOK)
    for node in ast.walk(ast.parse("".join(cell["source"])))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if node.module.partition(".")[0] in ("marlin_jax", "data_prep")
  ]
  assert len(names) >= 5
  for module, name in names:
    try:
      importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
      assert hasattr(importlib.import_module(module), name), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs_from_top_to_bottom(
  sample_videos, face_models, tmp_path
):
  if not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))):
    pytest.skip("needs the packages nbclient and ipykernel")
  # In a process of its own: the kernel leaves sockets open.
  program = f"""
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read({str(NOTEBOOK)!r}, 4)
NotebookClient(notebook, timeout=1000, kernel_name="python3").execute()
nbformat.write(notebook, {str(tmp_path / "run.ipynb")!r})
"""
  result = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path)},
    check=False,
  )
  assert result.returncode == 0, result.stderr
  cells = code_cells(tmp_path / "run.ipynb")
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert not [o for o in outputs if o["output_type"] == "error"]
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(pictures) == 4  # crops, loss, similarities, reconstruction
  text = "".join("".join(o.get("text", "")) for o in outputs)
  assert "accuracy" in text
  assert "squared error" in text
  (workdir,) = tmp_path.glob("marlin_tour_*/run")
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  losses = [row["train/loss_rec"] for row in rows if "train/loss_rec" in row]
  assert losses[-1] < 0.6 * losses[0]
