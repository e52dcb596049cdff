"""Operations on paths that differ between disks and buckets (gs://).

On a disk a file appears whole by renaming; in a bucket an object appears whole
by itself, and renaming is a copy. ArrayRecord and the decoder support disks
only: their inputs are downloaded from a bucket, and their outputs uploaded.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import util
from pathlib import Path

from marlin_jax.records import folders

# Requests to a bucket at a time.
_NUM_REQUESTS = 32


def path_of(text: str | os.PathLike) -> Path:
  """Returns a path on this machine, or in a bucket if it has a scheme.

  Raises:
    OSError: the package that reads buckets is not installed.
  """
  if not folders.is_remote(text):
    return Path(text)
  from etils import epath

  path = epath.Path(text)
  try:
    path.exists()
  except ImportError as e:
    raise OSError(
      f"{text} needs a package that is missing ({e}); for gs:// it is gcsfs: "
      "pip install 'marlin-jax[gcs]'"
    ) from e
  except ValueError as e:
    raise OSError(f"{text} is not a readable path: {e}") from e
  return path


def path_argument(text: str) -> Path:
  """Returns `path_of(text)`; a type for argparse.

  Raises:
    argparse.ArgumentTypeError: the package that reads buckets is missing.
  """
  try:
    return path_of(text)
  except OSError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def status(path: Path) -> tuple[bool, int, float]:
  """Returns (is_folder, size, modified) in a single request.

  The size is in bytes, the time of the last change in seconds since 1970; a
  folder in a bucket has no such time, and 0 is returned.

  Raises:
    OSError: there is no such file.
  """
  with _bucket_errors(path):
    info = path.stat()
  if folders.is_remote(path):
    return info.is_directory, info.length or 0, float(info.mtime)
  return stat.S_ISDIR(info.st_mode), info.st_size, info.st_mtime


def size(path: Path) -> int:
  """Returns a file's size in bytes; raises OSError if it is missing."""
  return status(path)[1]


def modified(path: Path) -> float:
  """Returns the time of the last change in seconds since 1970."""
  return status(path)[2]


@contextlib.contextmanager
def local(path: Path) -> Iterator[Path]:
  """Yields a local path of a file or a folder of files; downloads it if needed.

  Raises:
    OSError: it cannot be downloaded.
  """
  if not folders.is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
    target = Path(folder) / path.name
    with _bucket_errors(path):
      if path.is_dir():
        target.mkdir()
        for file in path.iterdir():
          file.copy(target / file.name)
      else:
        path.copy(target)
    yield target


def fetch(path: Path, target: Path) -> None:
  """Copies a file, also one in a bucket, to a disk.

  Raises:
    OSError: it cannot be downloaded.
  """
  with local(path) as copy:
    shutil.copyfile(copy, target)


def partial_path(path: Path) -> Path:
  """Returns a local path to write to before `publish` moves it to `path`.

  It is unique: two machines may do the same work if one was thought dead.
  """
  name = folders.partial_name(path.name)
  if folders.is_remote(path):
    return scratch_folder() / name
  return path.with_name(name)


def publish(source: Path, target: Path) -> None:
  """Moves a finished file to `target` atomically.

  Args:
    source: a file on the target's disk; for a bucket, on any disk or in the
      bucket.
    target: replaced if it exists.
  """
  if folders.is_remote(target):
    from etils import epath

    with _bucket_errors(target):
      epath.Path(source).copy(target, overwrite=True)
    source.unlink()
  else:
    os.replace(source, target)


def remove(paths: Sequence[Path]) -> None:
  """Removes files, if they exist."""

  def unlink(path: Path) -> None:
    path.unlink(missing_ok=True)

  # In parallel: a bucket takes some hundredths of a second per request.
  with concurrent.futures.ThreadPoolExecutor(_NUM_REQUESTS) as pool:
    list(pool.map(unlink, paths))


def listing(folder: Path) -> list[Path]:
  """Returns the paths in a folder; an empty list if there is no folder."""
  # A bucket has no empty folders.
  with _bucket_errors(folder):
    return list(folder.iterdir()) if folder.exists() else []


@contextlib.contextmanager
def _bucket_errors(path: Path) -> Iterator[None]:
  """Turns errors of the package for buckets into OSErrors with the path.

  If the disk of temporary files is full, the message says so.
  """
  try:
    yield
  except OSError as e:
    if e.errno == errno.ENOSPC:
      raise no_space(e) from e
    raise
  except Exception as e:
    if not folders.is_remote(path):
      raise
    raise OSError(f"{path}: {type(e).__name__}: {e}") from e


# --- Temporary files ----------------------------------------------------------

_SCRATCH = "marlin_prepare-"
_SCRATCH_NAME = re.compile(rf"{_SCRATCH}[a-z0-9_]{{8}}")


def scratch_folder() -> Path:
  """Returns the folder for temporary files of this process, creating it.

  It is removed when the process ends, or by `remove_scratch` if it was killed.
  """
  return _scratch_folder(os.getpid())


@functools.cache
def _scratch_folder(pid: int) -> Path:
  del pid  # a forked process has a folder of its own
  new = Path(tempfile.mkdtemp(prefix=f"new_{_SCRATCH}"))
  # The lock, held until the process ends, marks the folder as in use.
  fcntl.flock(os.open(new, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)
  folder = new.rename(new.with_name(new.name.removeprefix("new_")))
  # Unlike atexit, it also runs when a worker process ends.
  util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
  return folder


def remove_scratch() -> None:
  """Removes temporary files of processes of this user that were killed."""
  for entry in os.scandir(tempfile.gettempdir()):
    if not _SCRATCH_NAME.fullmatch(entry.name):
      continue
    with contextlib.suppress(OSError):  # a link, or in use
      flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
      descriptor = os.open(entry.path, flags)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_uid == os.getuid():
          shutil.rmtree(entry.path)
      finally:
        os.close(descriptor)


def no_space(error: OSError) -> OSError:
  """Returns an error that names the full folder of temporary files."""
  folder = tempfile.gettempdir()
  return OSError(
    errno.ENOSPC,
    f"{error.strerror} in {folder}, the folder for temporary files; set TMPDIR "
    "to another one",
  )
