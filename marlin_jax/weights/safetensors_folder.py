"""This project's own format: a folder of config.json and model.safetensors.

Plain data that contains no code and can be read without this project.
`Marlin.from_pretrained` opens it, and `convert` writes it by default.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.numpy

from marlin_jax.records import folders
from marlin_jax.weights import torch_files
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError

CONFIG = "config.json"
ARRAYS = "model.safetensors"
_FORMAT = "marlin_jax"
_VERSION = 1


def is_native(path: Path) -> bool:
  """Returns True if a folder holds this format."""
  return read_config(path).get("format") == _FORMAT


def read(path: Path) -> Weights:
  """Reads a folder.

  Raises:
    WeightsError: a file is missing, damaged or of another format.
  """
  config = read_config(path)
  if config.get("format") != _FORMAT:
    raise WeightsError(
      f"{path}: expected a folder with {CONFIG} that says format "
      f"'{_FORMAT}', and {ARRAYS}"
    )
  if config.get("version") != _VERSION:
    raise WeightsError(
      f"{path / CONFIG} has version {config.get('version')}, this code reads "
      f"{_VERSION}: use a newer marlin_jax"
    )
  try:
    architecture = Architecture(**config["architecture"])
  except (KeyError, TypeError) as e:
    raise WeightsError(f"{path / CONFIG}: {e}") from e
  return Weights(architecture, load_arrays(path / ARRAYS), str(path))


def write(weights: Weights, path: Path) -> list[str]:
  """Writes a folder; config.json, which identifies it, is written last.

  Returns:
    Notices, none: the format stores everything.
  """
  path.mkdir(parents=True, exist_ok=True)
  save_arrays(weights.arrays, path / ARRAYS)
  config = {
    "format": _FORMAT,
    "version": _VERSION,
    "architecture": dataclasses.asdict(weights.architecture),
  }
  save_config(config, path)
  return []


def load_shards(path: Path) -> dict:
  """Returns the arrays of a folder written by HuggingFace's transformers.

  In order of preference: model.safetensors, the files that
  model.safetensors.index.json lists, pytorch_model.bin.

  Raises:
    WeightsError: a file is missing or damaged.
  """
  if (path / ARRAYS).exists():
    return load_arrays(path / ARRAYS)
  file_of = read_config(path, f"{ARRAYS}.index.json").get("weight_map", {})
  if file_of:
    names = sorted(set(file_of.values()))
    if foreign := [name for name in names if Path(name).name != name]:
      raise WeightsError(f"{path}: its index names '{foreign[0]}'")
    shards = [load_arrays(path / name) for name in names]
    return {name: array for shard in shards for name, array in shard.items()}
  pickled = path / "pytorch_model.bin"
  if pickled.exists():
    return torch_files.to_numpy(torch_files.load(pickled), pickled)
  raise WeightsError(
    f"{path} has none of {ARRAYS}, {ARRAYS}.index.json and pytorch_model.bin"
  )


def load_arrays(path: Path) -> dict:
  """Returns the arrays of a .safetensors file by name.

  Raises:
    WeightsError: the file is missing or damaged.
  """
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as e:
    raise WeightsError(f"{path} cannot be read: {e}") from e


def save_arrays(arrays: dict, path: Path, **metadata: str) -> None:
  """Writes a .safetensors file atomically.

  Raises:
    WeightsError: the file cannot be written.
  """
  try:
    with folders.atomic_path(path) as partial:
      safetensors.numpy.save_file(arrays, partial, metadata=metadata)
  except (OSError, safetensors.SafetensorError) as e:
    raise WeightsError(f"{path} cannot be written: {e}") from e


def save_config(config: dict, path: Path, name: str = CONFIG) -> None:
  (path / name).write_text(json.dumps(config, indent=2) + "\n")


def read_config(path: Path, name: str = CONFIG) -> dict:
  """Returns the content of config.json, or {} if there is none.

  Raises:
    WeightsError: the file is not valid JSON.
  """
  if not (path / name).is_file():
    return {}
  try:
    config = json.loads((path / name).read_text())
  except ValueError as e:
    raise WeightsError(f"{path / name} is not valid JSON: {e}") from e
  return config if isinstance(config, dict) else {}
