"""Inventory of a run's checkpoints: which there are, and which are intact.

A checkpoint is valid once it is complete. Its checksums are written last; after
a kill that prevented it, a complete checkpoint is valid if all of it can be
read. Anything else in the directory, after a crash, a full disk or a bad copy,
is not used and not deleted.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marlin_jax.checkpoints import checksums
from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

# Item of a checkpoint with name, mode and value of a metric.
_METRICS = "metrics"
# Directory beside the checkpoints, for damaged ones.
DAMAGED = "damaged"
_COMMITTED, _META = "commit_success.txt", "meta/metadata"
# Files of a complete checkpoint.
_MARKS = (_COMMITTED, "state/_METADATA", _META)


class ResumeError(UserError):
  """Checkpoint that does not fit the run that resumes from it."""


def steps(directory: epath.PathLike) -> list[int]:
  """Returns the steps of all checkpoints, intact or not, the newest first."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  names = [p.name for p in directory.iterdir() if p.is_dir()]
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def best_step(directory: epath.PathLike) -> int | None:
  """Returns the step of the best checkpoint; None if no metric is recorded.

  The metric is that of the newest checkpoint that has one.

  Args:
    directory: directory of the checkpoints.
  """
  found = {}
  for step in steps(directory):
    path = epath.Path(directory) / str(step) / _METRICS / _METRICS
    if path.exists():
      found[step] = json.loads(path.read_text())
  if not found:
    return None
  newest = next(iter(found.values()))
  values = {
    step: metric["value"]
    for step, metric in found.items()
    if metric["name"] == newest["name"]
  }
  return (min if newest["mode"] == "min" else max)(values, key=values.get)


def set_damaged_aside(directory: epath.PathLike) -> list[str]:
  """Moves all checkpoints newer than the last intact one to `damaged/`.

  Also deletes the partial checkpoint of a killed run, which has a temporary
  name. Call it in one process, before a `Checkpoints` is opened.

  Args:
    directory: directory of the checkpoints; need not exist.

  Returns:
    A line for each moved checkpoint: its problem and its new place; and a line
    if the last one had no checksums and now has them.

  Raises:
    ResumeError: there are checkpoints, and none of them is intact.
  """
  directory = epath.Path(directory)
  for unfinished in directory.glob("*.orbax-checkpoint-tmp"):
    unfinished.rmtree()
  notes, problems = [], {}
  for step in steps(directory):
    path = directory / str(step)
    problem = checksums.problem(path)
    if problem and _is_committed(path) and not checksums.exist(path):
      unreadable = _read_problem(path)
      if unreadable is None:
        checksums.write(path)
        notes.append(
          f"checkpoint {step} had no checksums, the run was ended before it "
          "wrote them; all of it can be read, so it is used"
        )
        break
      problem = f"{problem}, and it cannot be read: {unreadable}"
    if problem is None:
      break
    problems[step] = problem
  else:
    _check_unfinished(directory, problems)
  for step, problem in problems.items():
    target = _free_name(directory.parent / DAMAGED / str(step))
    target.parent.mkdir(parents=True, exist_ok=True)
    (directory / str(step)).rename(target)
    notes.append(f"checkpoint {step} is damaged: {problem}; moved to {target}")
  return notes


def _is_committed(path: epath.Path) -> bool:
  """Returns True if orbax has marked a checkpoint as complete."""
  return all((path / mark).exists() for mark in _MARKS)


def _read_problem(path: epath.Path) -> str | None:
  """Reads all arrays of a checkpoint; returns None or what prevents it."""
  handler = ocp.PyTreeCheckpointHandler()
  try:
    tree = handler.metadata(path / "state").tree
    # Part by part, for less memory.
    for key in tree:
      part = {key: tree[key]}
      restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part
      )
      handler.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
          item=part, restore_args=restore_args, partial_restore=True
        ),
      )
    json.loads((path / _META).read_text())
  # Orbax and tensorstore raise many kinds of errors.
  except Exception as e:
    return f"{e}"[:500]
  finally:
    handler.close()
  return None


def _check_unfinished(directory: epath.Path, problems: dict[int, str]) -> None:
  """Raises ResumeError if a complete checkpoint is among the unusable ones."""
  damaged = [
    f"  {step}: {problem}"
    for step, problem in problems.items()
    # In a bucket, which cannot rename, an unfinished save has its final name.
    if not folders.is_remote(directory)
    or checksums.exist(directory / str(step))
    or (directory / str(step) / _COMMITTED).exists()
  ]
  if damaged:
    raise ResumeError(
      f"no checkpoint in {directory} is intact:\n"
      + "\n".join(damaged)
      + "\nCopy the checkpoints again from their source, or start afresh in "
      "another --workdir."
    )


def _free_name(path: epath.Path) -> epath.Path:
  """Returns `path`, or the first of path.2, path.3, ... that does not exist."""
  free, number = path, 1
  while free.exists():
    number += 1
    free = path.with_name(f"{path.name}.{number}")
  return free
