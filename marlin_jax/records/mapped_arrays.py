"""Files of several arrays, which readers map into memory.

The arrays follow each other as np.save writes them; each call of np.load reads
the next.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterable

import numpy as np


def pack(arrays: Iterable[np.ndarray]) -> bytes:
  """Returns the bytes of a file."""
  file = io.BytesIO()
  for values in arrays:
    np.save(file, values, allow_pickle=False)
  return file.getvalue()


def open_arrays(path: str | os.PathLike) -> list[np.ndarray]:
  """Returns the arrays of a local file, of one axis each and read-only.

  Raises:
    ValueError: the file holds something else, or was cut.
    OSError: the file cannot be read.
  """
  with open(path, "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = []
    while file.tell() < len(data):
      arrays.append(_next_array(file, data))
  return arrays


def _next_array(file: io.BufferedReader, data: mmap.mmap) -> np.ndarray:
  """Returns the array at the file's position, and moves on to the next."""
  version = np.lib.format.read_magic(file)
  if version != (1, 0):
    raise ValueError(f"it holds an array of format {version}, expected 1.0")
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  if len(shape) != 1:
    raise ValueError(f"it holds {dtype} {shape}, expected one axis")
  start = file.tell()
  file.seek(shape[0] * dtype.itemsize, os.SEEK_CUR)
  return np.frombuffer(data, dtype, shape[0], start)
