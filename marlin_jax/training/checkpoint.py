"""Saving and resuming a run.

A checkpoint counts once it is complete and has checksums, which are written
last. Of the rest of what may lie in the directory, after a crash, a full disk
or a bad copy, nothing is believed and nothing is lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from marlin_jax.models import stacking
from marlin_jax.records.cli import UserError
from marlin_jax.training import checksums, remote_files

Pytree = Any

# Beside the directory of checkpoints: what was found damaged in it.
DAMAGED = "damaged"


class ResumeError(UserError):
  """The checkpoint does not fit the run that is to be resumed from it."""


class SaveError(UserError):
  """A checkpoint could not be saved."""

  # The same command may succeed later: a bucket may answer again.
  exit_code = os.EX_TEMPFAIL


def steps(directory: epath.PathLike) -> list[int]:
  """Steps of what looks like a checkpoint, whole or not, the newest first."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  names = [p.name for p in directory.iterdir() if p.is_dir()]
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def set_damaged_aside(directory: epath.PathLike) -> list[str]:
  """Moves away what is newer than the last good checkpoint.

  What a killed run has left half written, under another name, goes.

  To be called by one process before a `Checkpoints` is opened.

  Args:
    directory: of the checkpoints; it need not exist.

  Returns:
    For each that was moved, a line that says what is wrong with it and where
    it is now.

  Raises:
    ResumeError: there are checkpoints, and none of them is good.
  """
  directory = epath.Path(directory)
  for unfinished in directory.glob("*.orbax-checkpoint-tmp"):
    unfinished.rmtree()
  problems = {}
  for step in steps(directory):
    problem = checksums.problem(directory / str(step))
    if problem is None:
      break
    problems[step] = problem
  else:
    problems = _unusable(directory, problems)
  notes = []
  for step, problem in problems.items():
    place = _free_name(directory.parent / DAMAGED / str(step))
    place.parent.mkdir(parents=True, exist_ok=True)
    (directory / str(step)).rename(place)
    notes.append(
      f"checkpoint {step} cannot be trusted, {problem}; moved to {place}"
    )
  return notes


def _unusable(directory: epath.Path, problems: dict[int, str]):
  """Of checkpoints none of which is proven good: those not to be used."""
  marks = ("commit_success.txt", "state/_METADATA", "meta/metadata")
  damaged = []
  for step, problem in problems.items():
    path = directory / str(step)
    if checksums.exist(path):
      damaged.append(f"  {step}: {problem}")
    elif all((path / mark).exists() for mark in marks):
      # Of a time before there were checksums, or the very first, of a run that
      # was killed before it could write them.
      return {s: p for s, p in problems.items() if s > step}
    elif not remote_files.is_remote(path) or (path / marks[0]).exists():
      damaged.append(f"  {step}: {problem}")
    # Else it is a save that was not finished: buckets know no renaming.
  if damaged:
    raise ResumeError(
      f"no checkpoint in {directory} is whole:\n"
      + "\n".join(damaged)
      + "\nCopy them again from where they came from, or start afresh in "
      "another --workdir."
    )
  return problems


def _free_name(path: epath.Path) -> epath.Path:
  taken, number = path, 1
  while path.exists():
    number += 1
    path = taken.with_name(f"{taken.name}.{number}")
  return path


class Checkpoints:
  """The checkpoints of one run, in `directory`/<step>/.

  Each holds the train state (generator, discriminator, both optimisers, step)
  and `meta`, a JSON dict that says what the run was about, so that nothing
  changes silently on resume.
  """

  def __init__(self, directory: str, *, keep: int):
    """Opens or creates the directory; keeps the last `keep` checkpoints."""
    path = epath.Path(directory)
    if not remote_files.is_remote(path):
      path = path.absolute()  # which would take gs:// for a folder here
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        enable_async_checkpointing=True,
      ),
    )
    self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving: futures.Future[int] | None = None
    self.last_saved: int | None = self._manager.latest_step()

  def save(self, step: int, state: Pytree, meta: dict[str, Any]) -> None:
    """Starts saving in the background, when the save before this is done.

    On CPU it waits for the arrays to be written: there the background would
    read the very memory that the next step reuses.

    Raises:
      SaveError: this save could not start, or the one before failed.
    """
    self.wait()
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    try:
      self._manager.save(step, args=args)
      if jax.default_backend() == "cpu":
        self._manager.wait_until_finished()
    except (
      Exception
    ) as e:  # whatever a disk, a bucket or orbax can come up with
      raise self._failed(step, e) from e
    self._saving = self._pool.submit(self._finish, step)

  def _finish(self, step: int) -> int:
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        checksums.write(self._manager.directory / str(step))
    except Exception as e:
      raise self._failed(step, e) from e
    return step

  def _failed(self, step: int, error: Exception) -> SaveError:
    last = f"that of step {self.last_saved}" if self.last_saved else "none"
    return SaveError(
      f"the checkpoint of step {step} could not be saved in "
      f"{self._manager.directory}: {error}\nThe last one that was is {last}. "
      "Is the disk full, or a quota reached? The same command goes on from "
      "there."
    )

  def poll(self) -> int | None:
    """The step of a save that has been completed since the last call.

    Raises:
      SaveError: it has failed.
    """
    if self._saving is None or not self._saving.done():
      return None
    saving, self._saving = self._saving, None
    self.last_saved = saving.result()
    return self.last_saved

  def wait(self) -> int | None:
    """Waits for the last save; otherwise as `poll`."""
    if self._saving is not None:
      futures.wait([self._saving])
    return self.poll()

  def restore(
    self, step: int, like: Pytree, shardings: Pytree, meta: dict, allow=()
  ) -> Pytree:
    """Restores the train state of `step`.

    Args:
      step: one of the saved steps.
      like: a state of the right structure, arrays or shapes.
      shardings: a tree like it, where each array shall live; how they were
        spread over devices when they were saved does not matter.
      meta: what this run is about; it must equal the checkpoint's.
      allow: keys of `meta` that may differ all the same.

    Raises:
      ResumeError: names what differs, old and new.
    """
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    where = self._manager.directory / str(step)
    saved = self._manager.restore(step, args=args)["meta"]
    keys = [
      key
      for key in sorted(saved.keys() | meta.keys())
      if saved.get(key) != meta.get(key) and key not in allow
    ]
    if keys:
      raise ResumeError(
        f"cannot resume from {where}, this run differs from the one saved "
        "there:\n"
        + "\n".join(
          f"  {key}: was {saved.get(key)!r}, is {meta.get(key)!r}"
          for key in keys
        )
        + "\nSet them back, or start afresh in another --workdir, with "
        f"--config.init_from={self._manager.directory.parent} for its weights. "
        "Where the change is meant: --config.allow_change="
        + ",".join(keys).replace(" ", r"\ ")
      )
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      like,
      shardings,
    )
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(where / "state").tree
    handler.close()
    change = None
    if stacking.are_joined(tree) and not stacking.are_joined(like):
      change, abstract = stacking.split, stacking.join(abstract, _joined)
    elif stacking.are_joined(like) and not stacking.are_joined(tree):
      change, abstract = stacking.join, stacking.split(abstract, _block)
    self._check_leaves(where, tree, abstract)
    state = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    )["state"]
    if change is not None:  # config.scan was the other way
      state = jax.jit(change, out_shardings=shardings)(state)
    return state

  def _check_leaves(self, where: epath.Path, tree: Pytree, like: Pytree):
    saved, wanted = _leaves(tree), _leaves(like)
    differ = [
      f"  {name}: was {saved.get(name, 'not there')}, is "
      f"{wanted.get(name, 'not there')}"
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)
    ]
    if differ:
      more = [f"  ... and {len(differ) - 20} more"] * (len(differ) > 20)
      raise ResumeError(
        f"{where} does not fit this model:\n"
        + "\n".join(differ[:20] + more)
        + "\nUse the configuration it was trained with, or start afresh in "
        "another --workdir."
      )

  def close(self) -> None:
    """Waits for the last save; raises what went wrong with it."""
    self.wait()
    self._pool.shutdown()
    self._manager.close()


def _joined(arrays: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
  """What arrays of all blocks become when they are joined."""
  first = arrays[0]
  place = first.sharding
  return jax.ShapeDtypeStruct(
    (len(arrays), *first.shape),
    first.dtype,
    sharding=NamedSharding(place.mesh, PartitionSpec(None, *place.spec)),
  )


def _block(joined: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
  """What each block's part of an array of all is."""
  place = joined.sharding
  return jax.ShapeDtypeStruct(
    joined.shape[1:],
    joined.dtype,
    sharding=NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])),
  )


def _leaves(tree: Pytree) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype} {tuple(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
