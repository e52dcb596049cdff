"""Output that may be interrupted at any moment: a lock, and whole files."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import uuid
from pathlib import Path

from marlin_jax.records.cli import UserError


class OutputFolderError(UserError):
  """The folder cannot be written to by this run; the message says why."""


class Lock:
  """Keeps other runs out of a folder until it is closed, or the process ends.

  Args:
    path: the folder; made where it is missing.
    shared: keep out only those that want the folder for themselves.
    file_name: lock a file of this name in it, which then tells who has it, and
      which network disks can lock, too. Without, the folder itself is locked,
      and stays as it is.

  Raises:
    OutputFolderError: another run holds it, or it cannot be written to.
  """

  def __init__(
    self, path: Path, file_name: str | None = None, shared: bool = False
  ) -> None:
    try:
      path.mkdir(parents=True, exist_ok=True)
      self._descriptor = (
        os.open(path / file_name, os.O_RDWR | os.O_CREAT, 0o644)
        if file_name
        else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
      )
    except OSError as e:
      raise OutputFolderError(f"cannot use {path}: {e.strerror}") from e
    try:
      kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
      fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as e:
      holder = os.read(self._descriptor, 200).decode() if file_name else ""
      self.close()
      raise OutputFolderError(
        f"another run is writing to {path}"
        + (f" ({holder.strip()})" if holder.strip() else "")
        + "; wait for it or stop it"
      ) from e
    except OSError:
      pass  # a network disk without locks
    if file_name:
      self._sign(path)

  def _sign(self, path: Path) -> None:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    text = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
    try:
      os.ftruncate(self._descriptor, 0)
      os.pwrite(self._descriptor, text.encode(), 0)
      os.fsync(self._descriptor)
    except OSError as e:
      self.close()
      raise OutputFolderError(f"cannot write to {path}: {e.strerror}") from e

  def close(self) -> None:
    os.close(self._descriptor)


def write_bytes(path: Path, data: bytes) -> None:
  """Writes under another name and renames: never half a file.

  An object of a bucket (gs://) appears whole by itself.
  """
  if "://" in os.fspath(path):
    path.write_bytes(data)
    return
  # Of its own name: others may be writing the same file.
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
  with open(partial, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
