"""Small files of a run whose workdir may be in a bucket.

metrics.jsonl and TensorBoard's event files grow line by line, which a bucket
does not support. With a workdir on gs:// they are written to a local folder, as
are pictures and profiles, and the new part of each is copied whenever a
checkpoint is saved: a resumed run needs no later line. Checkpoints and
config.json go to the bucket directly.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from etils import epath

from marlin_jax.records import folders
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.training.configuration import ConfigError


def check_reachable(*paths: str) -> None:
  """Checks that paths in buckets can be opened at all.

  Raises:
    ConfigError: the scheme is not gs://, or gcsfs is not installed.
  """
  for path in filter(folders.is_remote, paths):
    scheme = path.partition("://")[0]
    if scheme != "gs":
      raise ConfigError(
        f"{path}: expected a local path or gs://BUCKET/..., but the scheme is {scheme}://"
      )
    if importlib.util.find_spec("gcsfs") is None:
      raise ConfigError(
        f"{path}: paths on gs:// need the package gcsfs, which is not "
        "installed; install it with: pip install 'marlin-jax[gcs]' (or gcsfs)"
      )


def check_room(path: Path, num_bytes: int) -> None:
  """Checks that a checkpoint of `num_bytes` fits on the disk.

  Raises:
    OutputFolderError: there is less free space.
  """
  free = shutil.disk_usage(path).free
  if free < num_bytes:
    raise OutputFolderError(
      f"{path} has {free / 1e9:.2f} GB left and a checkpoint takes "
      f"{num_bytes / 1e9:.2f} GB: make room, or choose another --workdir"
    )


class RunFiles:
  """Local folder for the small files of a run.

  Attributes:
    path: the folder; a local workdir itself.
  """

  def __init__(self, workdir: epath.Path, *, is_temporary: bool):
    """Opens the folder.

    Args:
      workdir: workdir of the run; exists.
      is_temporary: write to a temporary folder and copy it to the workdir, as
        a workdir in a bucket needs.
    """
    self._workdir = workdir
    self._copied: dict[Path, tuple[int, int]] = {}
    self._folder = None
    if not is_temporary:
      self.path = Path(workdir)
      return
    self._folder = tempfile.TemporaryDirectory(prefix="marlin_jax_")
    self.path = Path(self._folder.name)
    # The only file that a resumed run appends to; the others get new names.
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
      (self.path / metrics.name).write_bytes(metrics.read_bytes())

  def publish(self) -> None:
    """Copies files that are new or have changed since the last call.

    Of a file that has grown only the new part is copied: the files of a run
    grow by appending alone.
    """
    if self._folder is None:
      return
    for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
      stat = path.stat()
      version = stat.st_size, stat.st_mtime_ns
      before = self._copied.get(path)
      if before == version:
        continue
      target = self._workdir / str(path.relative_to(self.path))
      with path.open("rb") as file:
        if before and before[0] < version[0]:
          file.seek(before[0])
          _append(target, file.read(version[0] - before[0]))
        else:
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read(version[0]))
      self._copied[path] = version

  def close(self) -> None:
    """Publishes and removes the temporary folder."""
    self.publish()
    if self._folder is not None:
      self._folder.cleanup()


def _append(target: epath.Path, data: bytes) -> None:
  """Appends to a file, which may be in a bucket."""
  if not folders.is_remote(target):
    with Path(target).open("ab") as file:
      file.write(data)
    return
  import gcsfs

  bucket = gcsfs.GCSFileSystem()
  tail = f"{target}.tail"
  bucket.pipe_file(tail, data)
  # The bucket joins the two itself.
  bucket.merge(str(target), [str(target), tail])
  bucket.rm_file(tail)
