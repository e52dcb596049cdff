"""This project's training runs: weights out of, and into, orbax checkpoints.

A run's checkpoint says itself what the network is: its `meta` holds the
configuration. Only the weights are read, not the optimisers' states; the
average of them, where the run kept one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marlin_jax.models.vit import NORM_EPS
from marlin_jax.records.schema import FRAME_SIZE, PATCH_SIZE
from marlin_jax.training import checksums
from marlin_jax.weights.architecture import (
  DISCRIMINATOR,
  Architecture,
  flatten,
  unflatten,
)
from marlin_jax.weights.weights import Weights, WeightsError, eps_notice

_PARTS = ("params", "fixed", "disc_params")
_CONVERTED_STEP = 0


def is_run(path: Path) -> bool:
  return _checkpoints(path) is not None


def read(path: Path) -> Weights:
  """Reads the weights of a run's last checkpoint.

  Args:
    path: a workdir, or one checkpoint: WORKDIR/checkpoints/STEP.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  where, meta = read_meta(path)
  try:
    architecture = Architecture.from_settings(meta)
  except KeyError as e:
    raise WeightsError(
      f"{where} does not say what {e} is: was it written by marlin_jax.train?"
    ) from e
  trees = read_state(where, _averaged)
  if "ema" in trees:
    trees["params"] = trees.pop("ema")
  prefix = {"params": "", "fixed": "", "disc_params": DISCRIMINATOR}
  arrays = {
    prefix[part] + name: array
    for part, tree in trees.items()
    for name, array in flatten(tree).items()
  }
  return Weights(architecture, arrays, str(where))


def _averaged(tree: dict) -> dict:
  """_PARTS of a state; for the parameters their average, if there is one."""
  wanted = {part: tree[part] for part in _PARTS}
  if tree.get("ema"):
    wanted["ema"] = tree["ema"]
    del wanted["params"]
  return wanted


def read_meta(path: Path) -> tuple[Path, dict]:
  """Finds a run's last checkpoint.

  Args:
    path: as for `read`.

  Returns:
    WORKDIR/checkpoints/STEP, and what it says that the run is about.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  directory = _checkpoints(path)
  if directory is None:
    raise WeightsError(
      f"{path}: expected a workdir with checkpoints/, or one step in it"
    )
  with ocp.CheckpointManager(directory) as manager:
    step = int(path.name) if directory == path.parent else manager.latest_step()
    if step is None:
      raise WeightsError(f"{directory} holds no complete checkpoint")
    where = directory / str(step)
    if checksums.exist(where):
      problem = checksums.problem(where)
      if problem:
        raise WeightsError(
          f"{where} is damaged: {problem}. Take another checkpoint, or copy it "
          "again"
        )
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    try:
      return where, manager.restore(step, args=args)["meta"]
    except (OSError, ValueError, KeyError) as e:
      raise WeightsError(f"{where} cannot be read: {e}") from e


def read_state(where: Path, choose: Callable[[dict], dict]) -> dict:
  """Reads some arrays of a checkpoint.

  Args:
    where: from `read_meta`.
    choose: of the tree of all that is there, returns the part to read.

  Returns:
    That part, with NumPy arrays.

  Raises:
    WeightsError: it cannot be read.
  """
  # The handler itself: a Checkpointer warns of metadata that an item of a
  # CheckpointManager never has.
  handler = ocp.PyTreeCheckpointHandler()
  path = epath.Path(where) / "state"
  try:
    wanted = choose(handler.metadata(path).tree)
    return handler.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
        ),
        partial_restore=True,
      ),
    )
  except (OSError, ValueError, KeyError) as e:
    raise WeightsError(f"{where} cannot be read: {e}") from e
  finally:
    handler.close()


def _checkpoints(path: Path) -> Path | None:
  """The directory of checkpoints that `path` is about, absolute."""
  path = path.absolute()
  if (path / "checkpoints").is_dir():
    return path / "checkpoints"
  if path.name.isdigit() and (path / "state").is_dir():
    return path.parent
  return None


def write(weights: Weights, path: Path) -> list[str]:
  """Writes weights as the checkpoint of step 0: for `config.init_from`.

  Raises:
    WeightsError: there is a run already; no decoder or discriminator; other
      sizes than records have.
  """
  architecture = weights.architecture
  if (path / "checkpoints").exists():
    raise WeightsError(f"{path} holds a run already: choose another name")
  sizes = (architecture.image_size, architecture.patch_size)
  if sizes != (FRAME_SIZE, PATCH_SIZE):
    raise WeightsError(
      f"{weights.source} is for images and patches of {sizes} pixels, a run's "
      f"are {(FRAME_SIZE, PATCH_SIZE)}"
    )
  lacking = [
    what
    for what, there in (
      ("decoder", architecture.has_decoder),
      ("discriminator", architecture.has_discriminator),
    )
    if not there
  ]
  if lacking:
    raise WeightsError(
      f"{weights.source} has no {' and no '.join(lacking)}, which a run's "
      "checkpoint holds; --to=safetensors takes what there is, and "
      "config.init_from reads that too"
    )
  fixed = ("encoder.positions", "dec_positions")
  flat = {part: {} for part in _PARTS}
  for name, array in weights.arrays.items():
    if name.startswith(DISCRIMINATOR):
      flat["disc_params"][name.removeprefix(DISCRIMINATOR)] = array
    else:
      flat["fixed" if name in fixed else "params"][name] = array
  state = {part: unflatten(arrays) for part, arrays in flat.items()}
  with ocp.CheckpointManager((path / "checkpoints").absolute()) as manager:
    manager.save(
      _CONVERTED_STEP,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave(architecture.settings),
      ),
    )
  checksums.write(path / "checkpoints" / str(_CONVERTED_STEP))
  return eps_notice(architecture, NORM_EPS, "a run")
