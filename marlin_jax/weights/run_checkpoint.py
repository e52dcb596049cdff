"""Weights from and to the Orbax checkpoints of training runs.

The `meta` item of a checkpoint holds the configuration and with it the
architecture. Only the weights are read, not the optimiser states; their
exponential moving average if the run kept one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath

from marlin_jax.checkpoints import checksums
from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.models import vit
from marlin_jax.models.vit import NORM_EPS
from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.weights.architecture import (
  DISCRIMINATOR,
  OBJECTIVES,
  POSITIONS,
  Architecture,
  flatten,
  unflatten,
)
from marlin_jax.weights.weights import (
  SoundWeights,
  Weights,
  WeightsError,
  eps_notice,
)

_PARTS = ("params", "fixed", "disc_params")
_CONVERTED_STEP = 0
# Sizes of the encoder of sound that a checkpoint leaves out: `before` in the
# table of their keys, objectives/table.py.
_SOUND_SIZES = {"width": 384, "depth": 10, "num_heads": 6}
# Name in a workdir that stands for its best checkpoint.
_BEST = "best"


def is_run(path: Path) -> bool:
  return _checkpoints(path) is not None


def masking_of(checkpoint: str) -> tuple[str, float]:
  """Returns strategy and ratio of the masks that weights were trained with.

  Args:
    checkpoint: what `formats.resolve` takes; only a run says how it was
      trained. Others are taken to follow the paper.
  """
  settings = {}
  path = Path(checkpoint).expanduser()
  if is_run(path):
    # The weights are read elsewhere, with their checksums.
    _, settings = read_meta(path, is_checked=False)
  return (
    settings.get("mask.strategy", "fasking"),
    settings.get("mask.ratio", 0.9),
  )


def read(path: Path) -> Weights:
  """Reads the weights of a run's last checkpoint.

  Args:
    path: a workdir, a checkpoint in it, WORKDIR/checkpoints/STEP, or
      WORKDIR/best for the one with the best metric.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  where, meta = read_meta(path)
  try:
    architecture = Architecture.from_settings(meta)
  except KeyError as e:
    raise WeightsError(
      f"{where} lacks the setting {e}: was it written by marlin_jax.train?"
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


def has_sound(path: Path) -> bool:
  """Returns True for a run that trains an encoder of sound."""
  if not is_run(path):
    return False
  _, meta = read_meta(path, is_checked=False)
  return bool(meta.get("sound.weight"))


def read_sound(path: Path) -> SoundWeights:
  """Reads the encoder of sound from a run's last checkpoint.

  Args:
    path: see `read`.

  Raises:
    WeightsError: there is no checkpoint, it is damaged, or the run was trained
      without sound.
  """
  if not is_run(path):
    raise WeightsError(
      f"{path} is no workdir of a run. Features of sound need one: other "
      "formats hold the encoder of video alone"
    )
  where, meta = read_meta(path)
  if not meta.get("sound.weight"):
    raise WeightsError(
      f"{where} has no encoder of sound. A run trains one with "
      "config.sound.weight above 0, as configs/hicmae_s.py"
    )
  width, depth, num_heads = (
    meta.get(f"sound.{key}", usual) for key, usual in _SOUND_SIZES.items()
  )
  (params, fixed) = read_state(where, _sound_encoder).values()
  arrays = {}
  for tree in (params, fixed):
    arrays |= flatten(tree[OBJECTIVES]["sound"]["encoder"])
  return SoundWeights(
    SoundPatches.of(Clip(meta["data.num_frames"], meta["data.stride"])),
    vit.Size(width, depth, num_heads, 4 * width),
    arrays,
    str(where),
  )


def _sound_encoder(tree: dict) -> dict:
  """Selects the encoder of sound, its average if there is one."""
  params = "ema" if tree.get("ema") else "params"
  return {
    part: {
      OBJECTIVES: {
        "sound": {"encoder": tree[part][OBJECTIVES]["sound"]["encoder"]}
      }
    }
    for part in (params, "fixed")
  }


def _averaged(tree: dict) -> dict:
  """Selects _PARTS of a state, with 'ema' for 'params' if there is one."""
  parts = {part: tree[part] for part in _PARTS}
  if tree.get("ema"):
    parts["ema"] = tree["ema"]
    del parts["params"]
  # The networks of extra objectives are no part of the autoencoder.
  return {
    part: {name: x for name, x in tree.items() if name != OBJECTIVES}
    for part, tree in parts.items()
  }


def read_meta(path: Path, *, is_checked: bool = True) -> tuple[Path, dict]:
  """Reads the metadata of a run's last checkpoint.

  Args:
    path: see `read`.
    is_checked: read the whole checkpoint, to compare its checksums.

  Returns:
    WORKDIR/checkpoints/STEP, and its `meta` item.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  directory = _checkpoints(path)
  if directory is None:
    raise WeightsError(
      f"{path}: expected a workdir with checkpoints/, or one step in it"
    )
  ocp = _import_orbax()
  from marlin_jax.checkpoints import inventory

  with ocp.CheckpointManager(directory) as manager:
    if directory == path.parent:
      step = int(path.name)
    elif directory.parent == path.absolute():
      step = manager.latest_step()
    elif (step := inventory.best_step(directory)) is None:
      raise WeightsError(
        f"{path}: no checkpoint has a metric; train with config.best_metric, "
        f"or name a step: {directory}/STEP"
      )
    if step is None:
      raise WeightsError(f"{directory} holds no complete checkpoint")
    where = directory / str(step)
    if is_checked and checksums.exist(where):
      problem = checksums.problem(where)
      if problem:
        raise WeightsError(
          f"{where} is damaged: {problem}. Use another checkpoint, or copy it "
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
    where: a checkpoint, from `read_meta`.
    choose: tree of the checkpoint's metadata -> the part of it to read.

  Returns:
    That part, with NumPy arrays as leaves.

  Raises:
    WeightsError: the checkpoint cannot be read.
  """
  ocp = _import_orbax()
  # Not a Checkpointer, which warns about metadata that the items of a
  # CheckpointManager never have.
  handler = ocp.PyTreeCheckpointHandler()
  path = epath.Path(where) / "state"
  try:
    part = choose(handler.metadata(path).tree)
    return handler.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=part,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part
        ),
        partial_restore=True,
      ),
    )
  except (OSError, ValueError, KeyError) as e:
    raise WeightsError(f"{where} cannot be read: {e}") from e
  finally:
    handler.close()


def _import_orbax():
  """Returns orbax.checkpoint, which other formats do without.

  Raises:
    WeightsError: it is not installed.
  """
  try:
    import orbax.checkpoint
  except ImportError as e:
    raise WeightsError(
      f"checkpoints of runs need Orbax ({e}): pip install 'marlin-jax[train]'"
    ) from e
  return orbax.checkpoint


def _checkpoints(path: Path) -> Path | None:
  """Returns the checkpoints folder of a path, see `read_meta`."""
  path = path.absolute()
  if (path / "checkpoints").is_dir():
    return path / "checkpoints"
  if path.name.isdigit() and (path / "state").is_dir():
    return path.parent
  if path.name == _BEST and not path.exists():
    return _checkpoints(path.parent)
  return None


def write(weights: Weights, path: Path) -> list[str]:
  """Writes weights as a checkpoint of step 0, for `config.init_from`.

  Returns:
    Notices about what the format cannot store.

  Raises:
    WeightsError: the folder holds a run already, decoder or discriminator are
      missing, or frames are larger than those of records.
  """
  architecture = weights.architecture
  if (path / "checkpoints").exists():
    raise WeightsError(f"{path} already holds a run: choose another name")
  if architecture.image_size > FRAME_SIZE:
    raise WeightsError(
      f"{weights.source} takes frames of {architecture.image_size} pixels, a "
      f"run has at most {FRAME_SIZE}"
    )
  missing = [] if architecture.has_decoder else ["decoder"]
  if not architecture.has_discriminator:
    missing.append("discriminator")
  if missing:
    raise WeightsError(
      f"{weights.source} has no {' and no '.join(missing)}, which a run's "
      "checkpoint needs; --to=safetensors writes an encoder alone, and "
      "config.init_from reads that too"
    )
  flat = {part: {} for part in _PARTS}
  for name, array in weights.arrays.items():
    if name.startswith(DISCRIMINATOR):
      flat["disc_params"][name.removeprefix(DISCRIMINATOR)] = array
    else:
      flat["fixed" if name in POSITIONS else "params"][name] = array
  state = {part: unflatten(arrays) for part, arrays in flat.items()}
  ocp = _import_orbax()
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
