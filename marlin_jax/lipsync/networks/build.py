"""The networks of lip synchronisation: made, described, and read again.

A run's checkpoint says itself what its network is: its `meta`, flat and fit for
JSON, holds what `expert_meta` or `generator_meta` say.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from marlin_jax.lipsync.networks import published
from marlin_jax.lipsync.networks.functional import Variables, split_network
from marlin_jax.lipsync.networks.marlin_generator import LipsyncGenerator
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.networks.wav2lip import Wav2Lip
from marlin_jax.models import softmax_attention
from marlin_jax.weights import run_checkpoint
from marlin_jax.weights.weights import Architecture, Weights, WeightsError

Meta = Mapping[str, Any]
Generator = LipsyncGenerator | Wav2Lip

EXPERT, GENERATOR = "sync_expert", "lipsync_generator"


# --- Made ---------------------------------------------------------------------


def expert_meta(num_frames: int, width: float) -> dict[str, Any]:
  """What must be known of an expert beside its arrays."""
  return {
    "network": EXPERT,
    "expert.num_frames": num_frames,
    "expert.width": width,
  }


def make_expert(meta: Meta, *, seed: int = 0, dtype="float32") -> SyncExpert:
  """Draws an expert."""
  return SyncExpert(
    meta["expert.num_frames"],
    width=meta["expert.width"],
    dtype=dtype,
    rngs=nnx.Rngs(seed),
  )


def generator_meta(
  kind: str, width: float, encoder: Architecture | None
) -> dict[str, Any]:
  """What must be known of a generator beside its arrays.

  Args:
    kind: 'marlin' or 'wav2lip'.
    width: factor of Wav2Lip's numbers of channels; for MARLIN's of the sound
      encoder's.
    encoder: the architecture of MARLIN's; None for wav2lip.
  """
  return {
    "network": GENERATOR,
    "generator.kind": kind,
    "generator.width": width,
    "encoder": dataclasses.asdict(encoder) if encoder else None,
  }


def make_generator(
  meta: Meta,
  weights: Weights | None = None,
  *,
  seed: int = 0,
  freeze_encoder: bool = True,
  dtype="float32",
  attention: str = "auto",
  remat: str = "none",
) -> Generator:
  """Draws a generator.

  Args:
    meta: holds what `generator_meta` says.
    weights: of MARLIN's encoder, for plain pixels; None: drawn at random.
    seed: of what is drawn.
    freeze_encoder: nothing is learned below the face tokens.
    dtype: of convolutions and matmuls.
    attention, remat: of the encoder; see models.mae.
  """
  rngs, width = nnx.Rngs(seed), meta["generator.width"]
  if meta["generator.kind"] == "wav2lip":
    return Wav2Lip(width=width, dtype=dtype, rngs=rngs)
  how = {
    "dtype": dtype,
    "attention": softmax_attention.choose(
      attention, jax.default_backend(), dtype
    ),
    "remat": remat,
  }
  architecture = Architecture(**meta["encoder"])
  encoder = (
    weights.autoencoder(**how)
    if weights
    else architecture.make_autoencoder(**how)
  )
  return LipsyncGenerator(
    encoder,
    tubelets=architecture.tubelets,
    freeze_encoder=freeze_encoder,
    sound_width=width,
    dtype=dtype,
    rngs=rngs,
  )


# --- Read ---------------------------------------------------------------------


def read_expert(path: str | Path, *, dtype="float32") -> SyncExpert:
  """Reads an expert.

  Args:
    path: the workdir of `--mode=train_expert` or one checkpoint in it,
      WORKDIR/checkpoints/STEP; or Wav2Lip's lipsync_expert.pth.
    dtype: of the convolutions; of a published file's always float32.

  Returns:
    The network in evaluation mode.

  Raises:
    WeightsError: there is none, or it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_file():
    return published.read_expert(path)
  return _read(
    path,
    EXPERT,
    "expert",
    "--mode=train_expert",
    lambda meta: make_expert(meta, dtype=dtype),
  )


def read_generator(
  path: str | Path, *, dtype="float32", attention: str = "auto"
) -> Generator:
  """Reads a generator.

  Args:
    path: the workdir of `--mode=train` or one checkpoint in it; or Wav2Lip's
      wav2lip.pth or wav2lip_gan.pth.
    dtype: of convolutions and matmuls; of a published file's always float32.
    attention: of MARLIN's encoder; see models.softmax_attention.

  Returns:
    The network in evaluation mode.

  Raises:
    WeightsError: there is none, or it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_file():
    return published.read_wav2lip(path)
  return _read(
    path,
    GENERATOR,
    "generator",
    "--mode=train",
    lambda meta: make_generator(meta, dtype=dtype, attention=attention),
  )


def _read(path: Path, network: str, part: str, mode: str, make):
  where, meta = run_checkpoint.read_meta(path)
  if meta.get("network") != network:
    raise WeightsError(
      f"{where} holds no {part} of lip synchronisation; give the workdir of "
      f"marlin_jax.eval.ls {mode}"
    )
  found = run_checkpoint.read_state(where, lambda tree: {part: tree[part]})[
    part
  ]
  # Shapes alone: to draw what is then replaced takes 10 s.
  graph, like = split_network(nnx.eval_shape(lambda: make(meta)))
  return graph.eval_network(_fitted(like, found, where))


def _fitted(like: Variables, found: dict, where: Path) -> Variables:
  """Restores variables from disk, where every name is text."""
  theirs = _flat(found)
  ours = _flat(dataclasses.asdict(like))
  wrong = [
    name
    for name in sorted(theirs.keys() | ours.keys())
    if np.shape(theirs.get(name)) != np.shape(ours.get(name))
  ]
  if wrong:
    raise WeightsError(
      f"{where} does not fit its own description, in {', '.join(wrong[:5])}: "
      "was it written by another version of marlin_jax?"
    )
  leaves = jax.tree_util.tree_map_with_path(
    lambda path, _: theirs[_name(path)], dataclasses.asdict(like)
  )
  return Variables(**leaves)


def sha256(arrays: Variables) -> str:
  """Hash of all of a network's arrays and their names."""
  digest = hashlib.sha256()
  for name, leaf in sorted(_flat(dataclasses.asdict(arrays)).items()):
    digest.update(name.encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _flat(tree: dict) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
