"""Reading and writing PyTorch's files, without running what is in them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from marlin_jax.records import folders
from marlin_jax.weights.weights import WeightsError

HOW_TO_GET_TORCH = (
  "pip install torch --index-url https://download.pytorch.org/whl/cpu"
)


def import_torch():
  """The torch module.

  Raises:
    WeightsError: it is not installed; the message has the pip command.
  """
  try:
    import torch
  except ImportError as e:
    raise WeightsError(
      f"PyTorch reads and writes .pt, .pth and .ckpt files: {HOW_TO_GET_TORCH}"
    ) from e
  return torch


def load(path: Path):
  """What a file holds; tensors, containers and plain values only.

  Raises:
    WeightsError: the file is no such file, or would run code when read.
  """
  torch = import_torch()
  try:
    # VideoMAE keeps its command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
      return torch.load(path, map_location="cpu", weights_only=True)
  except Exception as e:  # torch's own, pickle's, zipfile's: a dozen kinds
    reason = str(e).strip().splitlines()[0] if str(e).strip() else repr(e)
    raise WeightsError(
      f"{path} cannot be read as weights alone and is refused: {reason}"
    ) from e


def to_numpy(state_dict: object, path: Path) -> dict[str, np.ndarray]:
  """Tensors by name -> float32 arrays.

  Raises:
    WeightsError: something in it is no floating-point tensor.
  """
  torch = import_torch()
  if not isinstance(state_dict, Mapping) or not state_dict:
    raise WeightsError(
      f"{path}: expected tensors by name, found {type(state_dict).__name__}"
    )
  wrong = [
    str(key)
    for key, value in state_dict.items()
    if not (torch.is_tensor(value) and value.is_floating_point())
  ]
  if wrong:
    raise WeightsError(
      f"{path}: expected floating-point tensors only; these are not: "
      + ", ".join(wrong[:10])
    )
  return {k: v.detach().float().numpy() for k, v in state_dict.items()}


def save(content: object, path: Path) -> None:
  """Writes a file of PyTorch's atomically."""
  torch = import_torch()
  path.parent.mkdir(parents=True, exist_ok=True)
  with folders.atomic_path(path) as partial:
    torch.save(content, partial)


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict:
  torch = import_torch()
  return {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
