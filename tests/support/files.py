"""Reads files that programs wrote into Python objects, for comparison."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from marlin_jax.models import stacking


def content(path: Path) -> dict[str, bytes]:
  """Returns the content of every file below a folder, by relative path."""
  return {
    file.relative_to(path).as_posix(): file.read_bytes()
    for file in path.rglob("*")
    if file.is_file()
  }


def read_lines(path: Path) -> list[dict]:
  """Returns the objects of a JSON Lines file."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(workdir: Path) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl."""
  return read_lines(workdir / "metrics.jsonl")


def arrays_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """Returns all arrays of a checkpoint by path, whatever its `scan` was."""
  path = workdir / "checkpoints" / str(step) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(path).item_metadata.tree
    args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    tree = reader.restore(path, ocp.args.PyTreeRestore(restore_args=args))
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      stacking.unstack(tree)
    )
  }
