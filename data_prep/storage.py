"""Paths of this machine and of buckets (gs://), where they differ.

On a disk a file appears whole by renaming; in a bucket an object appears whole
by itself, and renaming is a copy. ArrayRecord and the decoder know disks only,
so what lies in a bucket is fetched for them, and what they write is uploaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from marlin_jax.records import folders


def path_of(text: str | os.PathLike) -> Path:
  """Returns a path of this machine, or of a bucket where it begins so.

  Raises:
    OSError: what reads buckets is not installed.
  """
  if "://" not in os.fspath(text):
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
    raise OSError(f"{text} is no path that can be read: {e}") from e
  return path


def disk_path(text: str) -> Path:
  """An argument's type: a path of this machine.

  Raises:
    argparse.ArgumentTypeError: it is one of a bucket.
  """
  if "://" in text:
    raise argparse.ArgumentTypeError(
      f"{text} is in a bucket; copy it to a disk, or mount it"
    )
  return Path(text)


def is_remote(path: os.PathLike) -> bool:
  return "://" in os.fspath(path)


def status(path: Path) -> tuple[bool, int, float]:
  """Asks once for all: a bucket takes its time to answer.

  Returns:
    Whether it is a folder, the size in bytes, and the time of the last change
    in seconds since 1970, which a bucket's folders have not: 0.

  Raises:
    OSError: there is no such file.
  """
  found = path.stat()
  if is_remote(path):
    return found.is_directory, found.length or 0, float(found.mtime)
  is_folder = stat.S_ISDIR(found.st_mode)
  return is_folder, found.st_size, found.st_mtime


def size(path: Path) -> int:
  """Returns a file's size in bytes; raises OSError where there is none."""
  return status(path)[1]


def modified(path: Path) -> float:
  """Returns the time of the last change in seconds since 1970."""
  return status(path)[2]


@contextlib.contextmanager
def local(path: Path) -> Iterator[Path]:
  """Yields where a file, or a folder of files, can be read on this machine.

  Raises:
    OSError: it cannot be fetched.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as scratch:
    target = Path(scratch) / path.name
    if path.is_dir():
      target.mkdir()
      for file in path.iterdir():
        file.copy(target / file.name)
    else:
      path.copy(target)
    yield target


def partial_path(path: Path) -> Path:
  """Returns where to write, on this machine, what will become `path`.

  Two machines may be at the same work, where one of them was given up for
  lost: each has a name of its own.
  """
  name = folders.partial_name(path.name)
  if is_remote(path):
    return Path(tempfile.gettempdir()) / name
  return path.with_name(name)


def publish(source: Path, target: Path) -> None:
  """Makes a finished file appear at `target`, whole, and removes the source.

  Args:
    source: a file on the target's disk; for a bucket, on any disk or there.
    target: replaced, where it exists.
  """
  if is_remote(target):
    from etils import epath

    epath.Path(source).copy(target, overwrite=True)
    source.unlink()
  else:
    os.replace(source, target)


def remove_folder(path: Path) -> None:
  """Removes a folder with all in it; where there is none, nothing."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
  elif path.exists():
    path.rmtree()


def listing(folder: Path) -> list[Path]:
  """Returns what is in a folder, nothing where there is none."""
  # A bucket has no empty folders.
  return list(folder.iterdir()) if folder.exists() else []
