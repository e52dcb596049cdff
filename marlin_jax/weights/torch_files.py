"""Reads and writes PyTorch's files without running code from them."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from marlin_jax.records import folders
from marlin_jax.weights.weights import WeightsError

_LFS = b"version https://git-lfs"
# First bytes of a zip file and of a pickle, which torch.save writes.
_SIGNATURES = (b"PK", b"\x80")
HOW_TO_GET_TORCH = (
  "pip install torch --index-url https://download.pytorch.org/whl/cpu"
)


def import_torch():
  """Returns the torch module.

  Raises:
    WeightsError: PyTorch is not installed; the message has the pip command.
  """
  try:
    import torch
  except ImportError as e:
    raise WeightsError(
      "PyTorch is needed to read and write .pt, .pth and .ckpt files: "
      f"{HOW_TO_GET_TORCH}"
    ) from e
  return torch


def load(path: Path):
  """Returns the content of a file: tensors, containers and plain values.

  Raises:
    WeightsError: the file is damaged, or would run code when read.
  """
  torch = import_torch()
  try:
    # VideoMAE's files store the parsed command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
      return torch.load(path, map_location="cpu", weights_only=True)
  # torch, pickle and zipfile raise a dozen classes of errors.
  except Exception as e:
    raise WeightsError(f"{path} {_refusal(path, str(e) or repr(e))}") from e


def _refusal(path: Path, text: str) -> str:
  """Returns why a file is refused, from torch's text, which is an essay."""
  with contextlib.suppress(OSError), path.open("rb") as file:
    head = file.read(len(_LFS))
    if head == _LFS:
      return (
        "is a Git LFS pointer, not the file itself: fetch that with git lfs "
        "pull"
      )
    if not head.startswith(_SIGNATURES):
      return (
        f"is no file of PyTorch, it begins with {head[:16]!r}: expected "
        "weights that torch.save wrote"
      )
  text = re.sub(r"\x1b\[[0-9;]*m", "", text)
  if name := re.search(r"GLOBAL ([\w.]+)", text):
    return (
      f"is refused: it would run {name[1]} when it is read. Weights are "
      "tensors, numbers and texts; save it again with those alone"
    )
  return (
    f"cannot be read as weights only and is refused: {text.splitlines()[0]}"
  )


def to_numpy(state_dict: object, path: Path) -> dict[str, np.ndarray]:
  """Returns a state dict as float32 arrays by name.

  Args:
    state_dict: content of a file.
    path: the file, for messages.

  Raises:
    WeightsError: it is no state dict of floating-point tensors.
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
  """Writes a PyTorch file atomically."""
  torch = import_torch()
  path.parent.mkdir(parents=True, exist_ok=True)
  with folders.atomic_path(path) as partial:
    torch.save(content, partial)


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict:
  """Returns arrays as PyTorch tensors by name."""
  torch = import_torch()
  return {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
