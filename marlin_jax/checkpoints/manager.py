"""Saving and restoring the state of a run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from marlin_jax.checkpoints import checksums
from marlin_jax.checkpoints.inventory import ResumeError
from marlin_jax.models import stacking
from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

Pytree = Any

# Field of a state with statistics of recent steps. A checkpoint without them
# restores them as zeros; a state without them ignores those of a checkpoint.
_RECENT = "recent"


class SaveError(UserError):
  """Checkpoint that could not be saved."""

  # The same command may succeed later: a bucket may answer again.
  exit_code = os.EX_TEMPFAIL


class Checkpoints:
  """Checkpoints of one run, in `directory`/<step>/.

  Each holds the training state and `meta`, a JSON dict of what a resumed run
  must agree in, so that nothing changes silently on resume.

  Attributes:
    last_saved: step of the newest checkpoint, or None.
  """

  def __init__(
    self,
    directory: str,
    *,
    keep: int,
    keep_every: int = 0,
    best_metric: str = "",
    best_mode: str = "min",
  ):
    """Opens or creates the directory.

    Args:
      directory: a local path or gs://BUCKET/FOLDER.
      keep: number of the last checkpoints that are kept, at least 1.
      keep_every: checkpoints at multiples of `keep_every` steps are kept too;
        0: none.
      best_metric: name of a metric; the checkpoint with its best value is kept
        too. '': none.
      best_mode: 'min' or 'max'.
    """
    path = epath.Path(directory)
    if not folders.is_remote(path):
      path = path.absolute()  # not for gs://, which would become a local path
    self._metric, self._mode = best_metric, best_mode
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    if best_metric:
      kept.append(
        policies.BestN(
          get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
        )
      )
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # With it, metrics are saved and read again.
        best_fn=self._rank if best_metric else None,
        enable_async_checkpointing=True,
      ),
    )
    self._best = max(
      (
        self._rank(metrics)
        for step in self._manager.all_steps()
        if best_metric and (metrics := self._manager.metrics(step))
      ),
      default=-math.inf,
    )
    self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving: futures.Future[int] | None = None
    self.last_saved: int | None = self._manager.latest_step()

  def _rank(self, metrics: dict[str, Any]) -> float:
    """Returns a number that is higher for a better checkpoint."""
    if metrics["name"] != self._metric:
      return -math.inf
    value = metrics["value"]
    return -value if self._mode == "min" else value

  def is_best(self, value: float) -> bool:
    """Returns True if a value of the metric is better than all saved ones."""
    metrics = {"name": self._metric, "value": value}
    return self._rank(metrics) > self._best

  def save(
    self,
    step: int,
    state: Pytree,
    meta: dict[str, Any],
    metric: float | None = None,
  ) -> None:
    """Waits for the previous save and starts this one in the background.

    On CPU it also waits for the arrays to be written: a background save would
    read the memory that the next step reuses.

    Args:
      step: number of the step.
      state: the training state.
      meta: JSON dict that a resumed run must agree in.
      metric: value of `best_metric` at this step; None: not known.

    Raises:
      SaveError: this save could not start, or the previous one failed.
    """
    self.wait()
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    metrics = None
    if metric is not None:
      metrics = {"name": self._metric, "mode": self._mode, "value": metric}
      self._best = max(self._best, self._rank(metrics))
    try:
      self._manager.save(step, args=args, metrics=metrics)
      if jax.default_backend() == "cpu":
        self._manager.wait_until_finished()
    # Disks, buckets and Orbax raise many classes of errors.
    except Exception as e:
      raise self._failed(step, e) from e
    self._saving = self._pool.submit(self._finish, step)

  def _finish(self, step: int) -> int:
    try:
      self._manager.wait_until_finished()
      checksums.write_together(self._manager.directory / str(step))
    except Exception as e:
      raise self._failed(step, e) from e
    return step

  def _failed(self, step: int, error: Exception) -> SaveError:
    last = f"that of step {self.last_saved}" if self.last_saved else "none"
    return SaveError(
      f"the checkpoint of step {step} could not be saved in "
      f"{self._manager.directory}: {error}\nThe last saved checkpoint is "
      f"{last}. Check for a full disk or an exceeded quota, then run the same "
      "command again to resume."
    )

  def poll(self) -> int | None:
    """Returns the step of a save completed since the last call, or None.

    Raises:
      SaveError: the save failed.
    """
    if self._saving is None or not self._saving.done():
      return None
    saving, self._saving = self._saving, None
    self.last_saved = saving.result()
    return self.last_saved

  def wait(self) -> int | None:
    """Waits for the last save and returns its step, or None; see `poll`."""
    if self._saving is not None:
      futures.wait([self._saving])
    return self.poll()

  def restore(
    self, step: int, like: Pytree, shardings: Pytree, meta: dict, allow=()
  ) -> Pytree:
    """Restores the training state of a step.

    Args:
      step: a saved step.
      like: a state of the same structure, as arrays or shapes.
      shardings: a tree like the state: where each array is to live. The
        shardings at the time of the save do not matter.
      meta: dict of this run; must equal the checkpoint's.
      allow: keys of `meta` that may differ.

    Raises:
      ResumeError: names what differs, old and new value.
    """
    path = self._manager.directory / str(step)
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    saved = self._manager.restore(step, args=args)["meta"]
    _check_meta(path, saved, meta, allow)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      like,
      shardings,
    )
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
      tree = handler.metadata(path / "state").tree
      # The checkpoint may have been saved with the other value of config.scan.
      convert = None
      if stacking.are_stacked(tree) and not stacking.are_stacked(like):
        convert, abstract = stacking.unstack, stacking.stack(abstract, _joined)
      elif stacking.are_stacked(like) and not stacking.are_stacked(tree):
        convert, abstract = stacking.stack, stacking.unstack(abstract, _block)
      state = _read_state(handler, path, tree, abstract)
    if convert is None:
      return state
    return jax.jit(convert, out_shardings=shardings)(state)

  def close(self) -> None:
    """Waits for the last save.

    Raises:
      SaveError: the save failed.
    """
    self.wait()
    self._pool.shutdown()
    self._manager.close()


def _check_meta(
  path: epath.Path, saved: dict, meta: dict, allow: Collection[str]
) -> None:
  """Raises ResumeError if values of a checkpoint and of a run differ."""
  keys = [
    key
    for key in sorted(saved.keys() | meta.keys())
    if saved.get(key) != meta.get(key) and key not in allow
  ]
  if keys:
    raise ResumeError(
      f"cannot resume from {path}, this run differs from the one saved "
      "there:\n"
      + "\n".join(
        f"  {key}: was {saved.get(key)!r}, is {meta.get(key)!r}" for key in keys
      )
      + "\nSet them back, or start afresh in another --workdir, with "
      f"--config.init_from={path.parent.parent} for its weights. "
      "If the change is intended: --config.allow_change="
      + ",".join(keys).replace(" ", r"\ ")
    )


def _read_state(
  handler: ocp.PyTreeCheckpointHandler,
  path: epath.Path,
  tree: dict,
  abstract: Pytree,
) -> Pytree:
  """Reads a state; statistics of recent steps are zeros if none are saved.

  Args:
    handler: open handler of the checkpoint.
    path: the checkpoint.
    tree: metadata of its state, by field.
    abstract: the state to return, as shapes with shardings.

  Raises:
    ResumeError: other arrays are saved.
  """
  item, recent = abstract, getattr(abstract, _RECENT, None)
  if recent is not None and not (recent and tree.get(_RECENT)):
    item = {k: v for k, v in vars(abstract).items() if k != _RECENT}
    tree.pop(_RECENT, None)
  _check_leaves(path, tree, item)
  state = handler.restore(
    path / "state",
    args=ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    ),
  )
  if item is abstract:
    return state
  zeros = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), recent
  )
  return abstract.replace(**state, **{_RECENT: zeros})


def _check_leaves(path: epath.Path, tree: Pytree, like: Pytree) -> None:
  """Raises ResumeError if paths, shapes or dtypes of two trees differ."""
  saved, expected = _leaves(tree), _leaves(like)
  differ = [
    f"  {name}: was {saved.get(name, 'not there')}, is "
    f"{expected.get(name, 'not there')}"
    for name in sorted(saved.keys() | expected.keys())
    if saved.get(name) != expected.get(name)
  ]
  if differ:
    more = [f"  ... and {len(differ) - 20} more"] * (len(differ) > 20)
    raise ResumeError(
      f"{path} does not fit this model:\n"
      + "\n".join(differ[:20] + more)
      + "\nUse the configuration it was trained with, or start afresh in "
      "another --workdir."
    )


def _joined(arrays: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
  """Returns the struct of the stacked arrays of all blocks."""
  first = arrays[0]
  mesh, spec = first.sharding.mesh, first.sharding.spec
  return jax.ShapeDtypeStruct(
    (len(arrays), *first.shape),
    first.dtype,
    sharding=NamedSharding(mesh, PartitionSpec(None, *spec)),
  )


def _block(joined: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
  """Returns the struct of one block's part of a stacked array."""
  mesh, spec = joined.sharding.mesh, joined.sharding.spec
  return jax.ShapeDtypeStruct(
    joined.shape[1:],
    joined.dtype,
    sharding=NamedSharding(mesh, PartitionSpec(*spec[1:])),
  )


def _leaves(tree: Pytree) -> dict[str, str]:
  """Returns dtype and shape of each leaf by its path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype} {tuple(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
