"""Output folders: file names, hashes, locks, and writes that are never half."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from marlin_jax.records.cli import UserError, os_error_text

# Files of a prepared data set; data_prep.output.dataset_folder describes them.
SETTINGS = "settings.json"
VIDEOS = "videos.jsonl"
QUARANTINE = "quarantine.jsonl"
HASHES = "hashes.json"
FORGOTTEN = "forgotten.json"
METADATA = "metadata.json"
FEATURES = "features.json"
# Written last, so a data set that holds it is complete.
DATASET_INFO = "dataset_info.json"
# Folder of an unfinished run.
PARTS = "parts"

PARTIAL_SUFFIX = ".partial"
# Content of a lock file, as far as it was written.
_SIGNATURE = re.compile(rb"process \d+ on [^\n]* since [^\n]*\n?")


class OutputFolderError(UserError):
  """This run cannot write to the folder; the message says why."""


def cache_home() -> Path:
  """Returns the folder for downloads: `$MARLIN_HOME` or ~/.cache/marlin_jax.

  It need not exist.

  Raises:
    OutputFolderError: the user has no home folder.
  """
  home = os.environ.get("MARLIN_HOME") or "~/.cache/marlin_jax"
  try:
    return Path(home).expanduser()
  except RuntimeError as e:
    raise OutputFolderError(
      f"{home}, the folder for downloads, is in no home folder ({e}); set "
      "MARLIN_HOME to a folder"
    ) from e


def is_remote(path: str | os.PathLike) -> bool:
  """Returns True for a path in a bucket (gs://)."""
  return "://" in os.fspath(path)


def differences(
  earlier: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()
) -> list[str]:
  """Returns a phrase for each setting that changed, sorted by key.

  Args:
    earlier, now: settings by key; one that is missing counts as None.
    free: keys that may change.
  """
  return [
    f"{key} was {earlier.get(key)!r} and is now {now.get(key)!r}"
    for key in sorted({*earlier, *now} - {*free})
    if earlier.get(key) != now.get(key)
  ]


def check_local(path: str | os.PathLike) -> None:
  """Refuses a path in a bucket where the output has to be on a disk.

  `Path("gs://bucket/x")` is the relative folder `gs:/bucket/x`, which would be
  created silently.

  Raises:
    OutputFolderError: the path begins with a scheme such as gs:.
  """
  if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(path)):
    raise OutputFolderError(
      f"{os.fspath(path)}: this output has to be on a local or network disk; "
      "copy it to the bucket afterwards, e.g. with gcloud storage cp -r"
    )


class Lock:
  """Keeps other runs out of a folder until closed or until the process ends.

  Args:
    path: the folder; created if missing.
    file_name: file in the folder to lock. It names the process that holds the
      lock, and network disks can lock it too. By default the folder itself is
      locked and no file is added.
    shared: allow other shared locks; only exclusive ones are kept out.

  Raises:
    OutputFolderError: another run holds the lock, or the folder is not
      writable.
  """

  def __init__(
    self, path: Path, file_name: str | None = None, shared: bool = False
  ) -> None:
    check_local(path)
    try:
      path.mkdir(parents=True, exist_ok=True)
      self._descriptor = (
        os.open(path / file_name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if file_name
        else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
      )
    except OSError as e:
      raise OutputFolderError(f"cannot use {os_error_text(e)}") from e
    try:
      if file_name:
        self._check_file(path / file_name)
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

  def _check_file(self, file: Path) -> None:
    """Raises OutputFolderError for a file that is not of a lock."""
    text = os.pread(self._descriptor, 200, 0)
    if text and not _SIGNATURE.fullmatch(text):
      self.close()
      raise OutputFolderError(
        f"{file} was not written by this program; choose another folder"
      )

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


def partial_name(name: str) -> str:
  """Returns a new temporary name for a file; `final_name` is the inverse.

  The name is unique, since other processes may write the same file.
  """
  return f"{name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"


def final_name(partial: str) -> str:
  """Returns the name that `partial_name` was called with."""
  return partial.rsplit(".", 2)[0]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`; renames it when the block succeeds.

  Readers see the old file or the whole new one. The file is flushed to disk
  before it is renamed; after an error it is removed.
  """
  partial = path.with_name(partial_name(path.name))
  try:
    yield partial
    with open(partial, "rb") as file:
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file atomically.

  In a bucket (gs://) it is written in place: an object appears whole.
  """
  if is_remote(path):
    path.write_bytes(data)
    return
  with atomic_path(path) as partial:
    partial.write_bytes(data)


def cached_copy(path: os.PathLike, key: str) -> Path:
  """Copies a file from a bucket to this machine, once for all processes.

  Args:
    path: an `epath.Path`.
    key: names the content of the file.
  """
  local = cache_home() / "copies" / f"{key}-{path.name}"
  if not local.exists():
    local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(local) as partial:
      path.copy(partial, overwrite=True)
  return local


def sha256_of(path: Path) -> str:
  """Returns the SHA-256 of a file, or of a folder's files, in hexadecimal."""
  if path.is_dir():
    lines = [f"{sha256_of(file)} {file.name}\n" for file in files_in(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> list[Path]:
  """Returns the regular files in a folder, sorted.

  Links are left out, as in the decoder: one may lead to an endless file.
  """
  return sorted(
    file
    for file in folder.iterdir()
    if file.is_file() and not os.path.islink(file)
  )
