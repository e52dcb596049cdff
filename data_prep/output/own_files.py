"""The files that data_prep.prepare writes, by the exact form of their names.

Only these are ever removed or replaced. Whatever else lies in the folder of a
data set belongs to the user.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep import storage
from marlin_jax.records import folders
from marlin_jax.records.folders import OutputFolderError

FILES = (
  *(folders.SETTINGS, folders.VIDEOS, folders.QUARANTINE, folders.HASHES),
  *(folders.METADATA, folders.FEATURES, folders.DATASET_INFO),
  folders.FORGOTTEN,
)
_SPLIT = r"[a-z_][a-z0-9_]*-[a-z][a-z0-9_]*"
_SHARD = rf"{_SPLIT}\.array_record-\d{{5,}}-of-\d{{5,}}"
_FILE = "|".join(
  [*map(re.escape, FILES), _SHARD, rf"{_SPLIT}\.(?:quality|segments)\.npy"]
)
_PART = "|".join(
  [
    r"[0-9a-f]{32}\.(?:array_record|json)",
    rf"{_SHARD}\.(?:ready|json)",
    r"jobs-\d+\.jsonl",
    r"task-\d+-of-\d+\.lock",
  ]
)
_PARTIAL = r"\.[0-9a-f]{8}\.partial"
_LEFTOVER_FILE = re.compile(rf"(?:{_FILE}){_PARTIAL}")
_LEFTOVER_PART = re.compile(rf"(?:{_PART}){_PARTIAL}")
_ANY_PART = re.compile(rf"(?:{_PART})(?:{_PARTIAL})?")
# Settings of every data set, of any version.
_SETTINGS = {"name", "schema_version", "num_shards"}


def is_job(name: str) -> bool:
  """Returns True if a file name is that of jobs of Beam."""
  return re.fullmatch(r"jobs-\d+\.jsonl", name) is not None


def leftovers(path: Path) -> list[Path]:
  """Returns the half-written files in the folder of a data set."""
  return [
    entry
    for folder, pattern in (
      (path, _LEFTOVER_FILE),
      (path / folders.PARTS, _LEFTOVER_PART),
    )
    for entry in storage.listing(folder)
    if pattern.fullmatch(entry.name)
  ]


def remove_parts(path: Path) -> None:
  """Removes the files of an unfinished run; files of the user stay."""
  parts = path / folders.PARTS
  names = storage.listing(parts)
  storage.remove([p for p in names if _ANY_PART.fullmatch(p.name)])
  if not folders.is_remote(parts):  # a bucket has no empty folders
    with contextlib.suppress(OSError):  # it holds files of the user
      parts.rmdir()


def check_folder(path: Path, settings: Any) -> None:
  """Checks that a folder is a data set, or new.

  Args:
    path: the folder; it may be missing.
    settings: content of its settings.json, None if there is none.

  Raises:
    OutputFolderError: it holds something else.
  """
  advice = "Choose an empty or new folder as --output"
  parts = path / folders.PARTS
  if not folders.is_remote(parts) and (
    parts.is_symlink() or (parts.exists() and not parts.is_dir())
  ):
    raise OutputFolderError(
      f"{parts} is not a folder of this program. {advice}"
    )
  if settings is None:
    found = [
      *(
        name
        for name in (entry.name for entry in storage.listing(path))
        if name != folders.PARTS and not _LEFTOVER_FILE.fullmatch(name)
      ),
      *(
        f"{folders.PARTS}/{entry.name}"
        for entry in storage.listing(parts)
        if not _ANY_PART.fullmatch(entry.name)
      ),
    ]
    if found:
      raise OutputFolderError(
        f"{path} holds files, such as {min(found)!r}, but no readable "
        f"{folders.SETTINGS}, so it is not a data set of this program. {advice}"
      )
  elif not (isinstance(settings, dict) and settings.keys() >= _SETTINGS):
    raise OutputFolderError(
      f"{path / folders.SETTINGS} was not written by data_prep.prepare. "
      f"{advice}"
    )


def check_apart(output: Path, source: Path, videos: Iterable[Path]) -> None:
  """Checks that output and input do not share a folder; follows links.

  Args:
    output: folder of the data set; it may be missing.
    source: folder, manifest or video that is the input.
    videos: the videos.

  Raises:
    OutputFolderError: the output is, holds or lies in an input folder, or
      holds a manifest or a video.
  """
  place, given = _real(output), _real(source)
  if source.is_dir() and _is_in(place, given):
    raise OutputFolderError(
      f"--output {output} is or lies in the input, {source}; choose a folder "
      "outside"
    )
  # Once for each folder: there may be a million videos.
  parents = {os.path.dirname(video) for video in map(os.fspath, videos)}
  inner = [given, *(folder for folder in map(_real, parents))]
  for folder in inner:
    if _is_in(folder, place):
      raise OutputFolderError(
        f"--output {output} holds files of the input, in {folder}; choose a "
        "folder without any"
      )


def _real(path: str | os.PathLike) -> str:
  """Returns the path with links resolved."""
  text = os.fspath(path)
  if folders.is_remote(text):
    scheme, _, rest = text.partition("://")
    return f"{scheme}://{os.path.normpath(rest)}"
  return os.path.realpath(text)


def _is_in(path: str, folder: str) -> bool:
  return path == folder or path.startswith(os.path.join(folder, ""))
