"""Output that may be interrupted at any moment: a lock, and whole files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class OutputFolderError(RuntimeError):
  """The folder cannot be written to by this run; the message says why."""


class Lock:
  """Keeps other runs out of a folder until it is closed, or the process ends.

  Args:
    path: the folder; made where it is missing.

  Raises:
    OutputFolderError: another run holds it, or it cannot be made.
  """

  def __init__(self, path: Path) -> None:
    try:
      path.mkdir(parents=True, exist_ok=True)
      self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
      raise OutputFolderError(f"cannot use {path}: {e.strerror}") from e
    try:
      fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      self.close()
      raise OutputFolderError(
        f"another run is writing to {path}; wait for it or stop it"
      ) from e
    except OSError:
      pass  # a network disk without locks

  def close(self) -> None:
    os.close(self._descriptor)


def write_bytes(path: Path, data: bytes) -> None:
  """Writes under another name and renames: never half a file."""
  partial = path.with_name(f"{path.name}.partial")
  with open(partial, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
