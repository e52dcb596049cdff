"""A cache of compiled programs, shared by all test processes and runs."""

import os
import shutil
from importlib import metadata
from pathlib import Path

import filelock

from tests.support.processes import ROOT

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def set_up() -> None:
  """Sets the cache of JAX for this process and the processes it starts.

  Call it before JAX is imported.
  """
  default = ROOT / ".pytest_cache" / f"jaxlib-{metadata.version('jaxlib')}"
  path = Path(os.environ.setdefault(_VARIABLE, str(default)))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  # With a limit JAX locks the folder: it reads no entry that another process
  # is still writing.
  os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))
  if "PYTEST_XDIST_WORKER" not in os.environ:
    _remove_half_entries(path)


def _remove_half_entries(path: Path) -> None:
  """Removes entries that a killed test run left unfinished.

  JAX writes an entry and then the time of its last use, to a file beside it; an
  entry without that file is unfinished.
  """
  path.mkdir(parents=True, exist_ok=True)
  with _lock(path):
    for entry in path.glob("*-cache"):
      used = _last_use(entry)
      if not used.is_file() or used.stat().st_size != 8:
        entry.unlink()
        used.unlink(missing_ok=True)


def _lock(path: Path) -> filelock.FileLock:
  """Returns JAX's own lock of a cache."""
  return filelock.FileLock(path / ".lockfile", timeout=60)


def _last_use(entry: Path) -> Path:
  return entry.with_name(f"{entry.name.removesuffix('cache')}atime")


def private_copy(path: Path) -> dict[str, str]:
  """Copies the cache for a process that is going to be killed.

  An entry that the process leaves unfinished is then read by no other process.

  Args:
    path: folder of the copy; created.

  Returns:
    The environment of that process, which selects the copy.
  """
  source = Path(os.environ[_VARIABLE])
  path.mkdir()
  with _lock(source):
    for entry in source.glob("*-cache"):
      shutil.copy(entry, path / entry.name)
      used = _last_use(entry)
      shutil.copy(used, path / used.name)
  return os.environ | {_VARIABLE: str(path)}
