"""Builds the lip-sync networks and reads them from checkpoints.

A checkpoint describes its network: its metadata contain the result of
`expert_meta` or `generator_meta`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from marlin_jax.lipsync.networks import published
from marlin_jax.lipsync.networks.functional import Variables, split_network
from marlin_jax.lipsync.networks.marlin_generator import MarlinGenerator
from marlin_jax.lipsync.networks.sync_expert import HEIGHT, SyncExpert
from marlin_jax.lipsync.networks.wav2lip import Wav2Lip
from marlin_jax.models import softmax_attention
from marlin_jax.weights import run_checkpoint
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError

Meta = Mapping[str, Any]
Generator = MarlinGenerator | Wav2Lip

# Values of 'network' in the metadata of checkpoints.
EXPERT, GENERATOR = "sync_expert", "lipsync_generator"


# --- Construction -------------------------------------------------------------


def expert_meta(
  num_frames: int, width: float, height: int = HEIGHT
) -> dict[str, Any]:
  """Returns the metadata that describe an expert; fit for JSON."""
  return {
    "network": EXPERT,
    "expert.num_frames": num_frames,
    "expert.width": width,
    "expert.height": height,
  }


def make_expert(meta: Meta, *, seed: int = 0, dtype="float32") -> SyncExpert:
  """Returns an expert with random weights."""
  return SyncExpert(
    meta["expert.num_frames"],
    width=meta["expert.width"],
    # Not in the metadata of earlier versions.
    height=meta.get("expert.height", HEIGHT),
    dtype=dtype,
    rngs=nnx.Rngs(seed),
  )


def generator_meta(
  kind: str, width: float, encoder: Architecture | None
) -> dict[str, Any]:
  """Returns the metadata that describe a generator; fit for JSON.

  Args:
    kind: kind of generator, 'marlin' or 'wav2lip'.
    width: multiplies the published numbers of channels; for 'marlin' those of
      the sound encoder.
    encoder: architecture of the encoder; None for 'wav2lip'.
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
  """Returns a generator; only the encoder can have trained weights.

  Args:
    meta: contains the result of `generator_meta`.
    weights: weights of the encoder, for unnormalised pixels; None: random.
    seed: seed of the random weights.
    freeze_encoder: whether gradients are stopped at the face tokens.
    dtype: dtype of convolutions and matmuls.
    attention, remat: implementation of the encoder; see models.mae.
  """
  rngs, width = nnx.Rngs(seed), meta["generator.width"]
  if meta["generator.kind"] == "wav2lip":
    return Wav2Lip(width=width, dtype=dtype, rngs=rngs)
  encoder_args = {
    "dtype": dtype,
    "attention": softmax_attention.choose(
      attention, jax.default_backend(), dtype
    ),
    "remat": remat,
  }
  architecture = Architecture(**meta["encoder"])
  encoder = (
    weights.autoencoder(**encoder_args)
    if weights
    else architecture.make_autoencoder(**encoder_args)
  )
  return MarlinGenerator(
    encoder,
    tubelets=architecture.tubelets,
    freeze_encoder=freeze_encoder,
    sound_width=width,
    dtype=dtype,
    rngs=rngs,
  )


# --- Reading ------------------------------------------------------------------


def read_expert(path: str | Path, *, dtype="float32") -> SyncExpert:
  """Reads an expert.

  Args:
    path: the workdir of `--mode=train_expert`, one checkpoint in it
      (WORKDIR/checkpoints/STEP), or Wav2Lip's lipsync_expert.pth.
    dtype: dtype of the convolutions; published files are always float32.

  Returns:
    The network in evaluation mode.

  Raises:
    WeightsError: there is no expert at `path`, or it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_file():
    return published.read(published.EXPERT, path)
  return _read_checkpoint(
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
    path: the workdir of `--mode=train`, one checkpoint in it, or Wav2Lip's
      wav2lip.pth or wav2lip_gan.pth.
    dtype: dtype of convolutions and matmuls; always float32 for published
      files.
    attention: attention of the encoder; see models.softmax_attention.

  Returns:
    The network in evaluation mode.

  Raises:
    WeightsError: there is no generator at `path`, or it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_file():
    return published.read(published.WAV2LIP, path)
  return _read_checkpoint(
    path,
    GENERATOR,
    "generator",
    "--mode=train",
    lambda meta: make_generator(meta, dtype=dtype, attention=attention),
  )


def _read_checkpoint(
  path: Path,
  network: str,
  field: str,
  mode: str,
  make: Callable[[Meta], nnx.Module],
) -> nnx.Module:
  """Reads the network of a training run.

  Args:
    path: the workdir or one checkpoint in it.
    network: expected value of 'network' in the metadata.
    field: field of the training state that holds the network's variables.
    mode: flag of eval.ls that trains this network, for the error message.
    make: builds the network from the metadata.
  """
  checkpoint, meta = run_checkpoint.read_meta(path)
  if meta.get("network") != network:
    raise WeightsError(
      f"{checkpoint} holds no lip-sync {field}; give the workdir of "
      f"marlin_jax.eval.ls {mode}"
    )
  state = run_checkpoint.read_state(
    checkpoint, lambda tree: {field: tree[field]}
  )
  # What training has frozen lies among its fixed arrays.
  frozen = state[field]["fixed"].keys() - state[field]["params"].keys()
  # Shapes only: random weights, replaced at once, would take 10 s.
  graph, template = split_network(
    nnx.eval_shape(lambda: make(meta)), frozen=frozen
  )
  return graph.eval_network(_restore(template, state[field], checkpoint))


def _restore(template: Variables, stored: dict, checkpoint: Path) -> Variables:
  """Fills a template with stored arrays, in which every key is text.

  Raises:
    WeightsError: names or shapes differ.
  """
  arrays = _flatten(stored)
  expected = _flatten(dataclasses.asdict(template))
  mismatched = [
    name
    for name in sorted(arrays.keys() | expected.keys())
    if np.shape(arrays.get(name)) != np.shape(expected.get(name))
  ]
  if mismatched:
    raise WeightsError(
      f"{checkpoint} does not match its own description, in "
      f"{', '.join(mismatched[:5])}: was it written by another version of "
      "marlin_jax?"
    )
  collections = jax.tree_util.tree_map_with_path(
    lambda path, _: arrays[_name(path)], dataclasses.asdict(template)
  )
  return Variables(**collections)


def sha256(variables: Variables) -> str:
  """Returns a hash of the names and values of all arrays."""
  digest = hashlib.sha256()
  for name, leaf in sorted(_flatten(dataclasses.asdict(variables)).items()):
    digest.update(name.encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _flatten(tree: dict) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
