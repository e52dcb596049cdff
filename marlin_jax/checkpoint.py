"""Saving and resuming a run."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from marlin_jax import run_files

Pytree = Any


class ResumeError(ValueError):
  """The checkpoint does not fit the run that is to be resumed from it."""


class Checkpoints:
  """The checkpoints of one run, in `directory`/<step>/.

  Each holds the train state (generator, discriminator, both optimisers, step)
  and `meta`, a JSON dict that says what the run was about, so that nothing
  changes silently on resume.
  """

  def __init__(self, directory: str, *, keep: int):
    """Opens or creates the directory; keeps the last `keep` checkpoints."""
    path = epath.Path(directory)
    if not run_files.is_remote(path):
      path = path.absolute()  # which would take gs:// for a folder here
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        enable_async_checkpointing=True,
      ),
    )

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Pytree, meta: dict[str, Any]) -> None:
    """Starts saving in the background; `close` waits for it.

    On CPU it waits itself: there the background would read the very memory
    that the next step reuses.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
      ),
    )
    if jax.default_backend() == "cpu":
      self._manager.wait_until_finished()

  def restore(
    self, step: int, like: Pytree, shardings: Pytree, meta: dict
  ) -> Pytree:
    """Restores the train state of `step`.

    Args:
      step: one of the saved steps.
      like: a state of the right structure, arrays or shapes.
      shardings: a tree like it, where each array shall live; how they were
        spread over devices when they were saved does not matter.
      meta: what this run is about; it must equal the checkpoint's.

    Raises:
      ResumeError: names what differs, old and new.
    """
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    saved = self._manager.restore(step, args=args)["meta"]
    differ = [
      f"  {key}: was {saved.get(key)!r}, is {meta.get(key)!r}"
      for key in sorted(saved.keys() | meta.keys())
      if saved.get(key) != meta.get(key)
    ]
    where = self._manager.directory / str(step)
    if differ:
      raise ResumeError(
        f"cannot resume from {where}, this run differs from the one saved "
        "there:\n"
        + "\n".join(differ)
        + "\nSet them back, or start afresh in another --workdir."
      )
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      like,
      shardings,
    )
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      )["state"]
    except (ValueError, KeyError) as e:
      raise ResumeError(
        f"{where} does not fit this model: {e}\nUse the configuration it was "
        "trained with, or start afresh in another --workdir."
      ) from e

  def close(self) -> None:
    """Waits for the last save; raises what went wrong with it."""
    self._manager.wait_until_finished()
    self._manager.close()
