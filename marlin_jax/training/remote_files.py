"""The small files of a run, where the workdir may be in a bucket.

metrics.jsonl and TensorBoard's events are appended to, which a bucket cannot
do. With a workdir on gs:// they are written to a local folder, together with
pictures and config.json, and copied whole whenever a checkpoint is saved: no
later line is needed by a run that is resumed. Checkpoints go to the bucket
directly.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from etils import epath

from marlin_jax.records.folders import OutputFolderError
from marlin_jax.training.configuration import ConfigError


def is_remote(path: str | epath.Path) -> bool:
  """Whether a path names something in a bucket."""
  return "://" in str(path)


def check_reachable(*paths: str) -> None:
  """Finds out early that a path cannot be read or written at all.

  Raises:
    ConfigError: says what is missing and how to get it.
  """
  for path in filter(is_remote, paths):
    scheme = path.partition("://")[0]
    if scheme != "gs":
      raise ConfigError(
        f"{path}: expected a local path or gs://BUCKET/..., found {scheme}://"
      )
    if importlib.util.find_spec("gcsfs") is None:
      raise ConfigError(
        f"{path}: paths on gs:// need the package gcsfs, which is not "
        "installed; install it with: pip install 'marlin-jax[gcs]' (or gcsfs)"
      )


def check_room(path: Path, num_bytes: int) -> None:
  """Finds out early that a checkpoint would not fit on the disk.

  Raises:
    OutputFolderError: says how much room there is.
  """
  free = shutil.disk_usage(path).free
  if free < num_bytes:
    raise OutputFolderError(
      f"{path} has {free / 1e9:.2f} GB left and a checkpoint takes "
      f"{num_bytes / 1e9:.2f} GB: make room, or choose another --workdir"
    )


class RunFiles:
  """Local files that follow a workdir.

  Attributes:
    path: where to write them; the workdir itself where that is local.
  """

  def __init__(self, workdir: epath.Path, *, apart: bool):
    """Opens the folder.

    Args:
      workdir: of the run; it exists.
      apart: write elsewhere and copy; for a workdir that `is_remote`.
    """
    self._workdir = workdir
    self._copied: dict[Path, tuple[int, int]] = {}
    self._folder = None
    if not apart:
      self.path = Path(workdir)
      return
    self._folder = tempfile.TemporaryDirectory(prefix="marlin_jax_")
    self.path = Path(self._folder.name)
    # All that a resumed run goes on with; the rest gets new names.
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
      (self.path / metrics.name).write_bytes(metrics.read_bytes())

  def publish(self) -> None:
    """Copies what is new or has changed since the last time."""
    if self._folder is None:
      return
    for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
      stat = path.stat()
      now = stat.st_size, stat.st_mtime_ns
      if self._copied.get(path) == now:
        continue
      target = self._workdir / str(path.relative_to(self.path))
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
      self._copied[path] = now

  def close(self) -> None:
    """Copies what is left and removes the local folder."""
    self.publish()
    if self._folder is not None:
      self._folder.cleanup()
