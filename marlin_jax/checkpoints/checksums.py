"""Checksums of a folder, in a file in the folder.

Orbax restores flipped bits without noticing. The checksums are written last,
so they also mark the folder as complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent import futures

import jax
from etils import epath

from marlin_jax.devices import coordination
from marlin_jax.records import folders

NAME = "checksums.json"
# Reads overlap, and sha256 releases the interpreter lock.
_NUM_THREADS = 4
_CHUNK_BYTES = 1 << 20
# Orbax's folder for the arrays of one process.
_PROCESS_FOLDER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


def write(directory: epath.PathLike) -> None:
  """Writes size and sha256 of every file in a folder."""
  directory = epath.Path(directory)
  _write(directory, dict(_measure(directory, _names(directory))))


def write_together(directory: epath.PathLike) -> None:
  """Writes size and sha256 of every file in a complete checkpoint.

  Called by all processes of a run, on any thread: each reads the files that it
  wrote, and process 0 writes the checksums.
  """
  directory = epath.Path(directory)
  index = jax.process_index()
  key = f"marlin_jax/checksums/{directory}"
  # Process 0 lists: it has given the checkpoint its name, which another
  # process may not see yet.
  names = json.loads(
    coordination.broadcast(
      f"{key}/names", None if index else json.dumps(_names(directory))
    )
  )
  own = [name for name in names if _writer(name) == index]
  parts = coordination.gather(
    f"{key}/sums", json.dumps(dict(_measure(directory, own)))
  )
  if parts is not None:
    files = {name: x for part in parts for name, x in json.loads(part).items()}
    _write(directory, {name: files[name] for name in names})


def _writer(name: str) -> int:
  """Returns the number of the process that wrote a file of a checkpoint."""
  owner = _PROCESS_FOLDER.search(name)
  number = int(owner[1]) if owner else 0
  return number if number < jax.process_count() else 0


def _write(directory: epath.Path, files: dict[str, tuple[int, str]]) -> None:
  text = json.dumps({"sha256": files}, indent=1)
  folders.write_bytes(directory / NAME, text.encode())


def exist(directory: epath.PathLike) -> bool:
  """Returns True if a folder has checksums."""
  return (epath.Path(directory) / NAME).exists()


def problem(directory: epath.PathLike) -> str | None:
  """Reads every file in a folder and compares it with its checksum.

  Returns:
    None if all files are as written; else a line that names a file and its
    problem.
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
    actual_size = path.stat().length
    if actual_size != size:
      return f"{name} holds {actual_size} bytes, not the {size} written"
  for name, (_, digest) in _measure(directory, list(expected)):
    if digest != expected[name][1]:
      return f"{name} is not what was written: its sha256 differs"
  return None


def _names(directory: epath.Path, prefix: str = "") -> list[str]:
  """Returns all files in a folder, relative to it, but for the checksums."""
  names = []
  for path in sorted(directory.iterdir(), key=lambda path: path.name):
    name = prefix + path.name
    if path.is_dir():
      names += _names(path, f"{name}/")
    elif not path.name.startswith(NAME):  # nor a partial one, of a kill
      names.append(name)
  return names


def _measure(
  directory: epath.Path, names: list[str]
) -> Iterator[tuple[str, tuple[int, str]]]:
  """Yields name, size and sha256 of each file."""

  def measure(name):
    digest, size = hashlib.sha256(), 0
    with (directory / name).open("rb") as file:
      while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return name, (size, digest.hexdigest())

  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    yield from pool.map(measure, names)
