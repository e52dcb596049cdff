"""Checksums of a finished folder, kept in it: orbax restores flipped bits.

Written last, they also tell that the folder is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent import futures

from etils import epath

from marlin_jax.records import folders

NAME = "checksums.json"
# Reading from disks and buckets overlaps, and sha256 leaves other threads run.
_NUM_THREADS = 4
_CHUNK_BYTES = 1 << 20


def write(directory: epath.PathLike) -> None:
  """Reads every file in a folder and notes its size and sha256 there."""
  directory = epath.Path(directory)
  files = dict(_measure(directory, _names(directory)))
  text = json.dumps({"sha256": files}, indent=1)
  folders.write_bytes(directory / NAME, text.encode())


def exist(directory: epath.PathLike) -> bool:
  """Whether a folder has checksums."""
  return (epath.Path(directory) / NAME).exists()


def problem(directory: epath.PathLike) -> str | None:
  """Reads every file in a folder and compares it with its checksum.

  Returns:
    None where all is as it was written; else one line that names a file and
    what is wrong with it.
  """
  directory = epath.Path(directory)
  if not exist(directory):
    return f"{NAME} is missing"
  try:
    expected = json.loads((directory / NAME).read_text())["sha256"]
    sizes = {name: size for name, (size, _) in expected.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    return f"{NAME} is damaged: {e!r}"
  for name, size in sizes.items():
    path = directory / name
    if not path.exists():
      return f"{name} is missing"
    found = path.stat().length
    if found != size:
      return f"{name} holds {found} bytes, not the {size} written"
  for name, (_, digest) in _measure(directory, list(expected)):
    if digest != expected[name][1]:
      return f"{name} is not what was written: its sha256 differs"
  return None


def _names(directory: epath.Path, prefix: str = "") -> list[str]:
  names = []
  for path in sorted(directory.iterdir(), key=lambda path: path.name):
    name = prefix + path.name
    if path.is_dir():
      names += _names(path, f"{name}/")
    elif not path.name.startswith(NAME):
      names.append(name)
  return names


def _measure(
  directory: epath.Path, names: list[str]
) -> Iterator[tuple[str, tuple[int, str]]]:
  def measure(name):
    digest, size = hashlib.sha256(), 0
    with (directory / name).open("rb") as file:
      while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return name, (size, digest.hexdigest())

  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    yield from pool.map(measure, names)
