"""Folder of the features of videos: one file per video.

Files are written under temporary names and renamed, so none is incomplete.
Their bytes are a function of the video, the checkpoint, the settings and the
library versions.

Axes: R rows, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from marlin_jax.records.cli import WHOLE, Task
from marlin_jax.records.folders import (
  PARTIAL_SUFFIX,
  QUARANTINE,
  SETTINGS,
  Lock,
  OutputFolderError,
  differences,
  sha256_of,
  write_bytes,
)

if TYPE_CHECKING:
  import pyarrow

# Incremented when the meaning of a file changes.
SCHEMA_VERSION = 1
FORMATS = ("npz", "parquet")

# Paths for the reader: the hash identifies the checkpoint.
_FREE_SETTINGS = ("checkpoint",)
_METADATA = b"marlin_jax"
# Packages whose versions affect the features.
_VERSIONED = ("marlin-jax", "jax", "numpy", "av", "mediapipe")


class Span(NamedTuple):
  """The frames that a row covers; see `face_windows.Window`."""

  first_frame: int
  num_frames: int
  start_secs: float
  end_secs: float

  def to(self, last: Span) -> Span:
    """Returns the span from this one's start to the end of `last`."""
    return Span(
      self.first_frame,
      last.first_frame + last.num_frames - self.first_frame,
      self.start_secs,
      last.end_secs,
    )


@dataclasses.dataclass(frozen=True)
class Origin:
  """The video of a feature file.

  Attributes:
    source: path below the inputs.
    sha256: hash of the video file; '' if it cannot be read.
    num_bytes: size of the video file.
  """

  source: str
  sha256: str
  num_bytes: int


class FeatureFolder:
  """Output folder that is locked until the context manager exits.

  Several tasks may write to it at the same time, each to its own videos. A task
  keeps its quarantine in a file of its own, which a run of all merges.

  Attributes:
    path: the folder.
    reasons: reason for each quarantined video, by source.
  """

  def __init__(
    self, path: Path, settings: dict[str, Any], task: Task = WHOLE
  ) -> None:
    """Reads settings and quarantine; changes no file.

    Args:
      path: created if missing.
      settings: that all files depend on, with a `format` of FORMATS; an
        existing folder must have the same.
      task: the part of the videos that this run writes.

    Raises:
      OutputFolderError: the folder is in use, was not made by this program or
        has other settings, or pyarrow is missing.
    """
    if settings["format"] == "parquet":
      _need_parquet()
    self.path = path
    self._settings = {
      "program": "marlin_jax.features",
      "schema_version": SCHEMA_VERSION,
      **settings,
    }
    self._refused: dict[str, dict[str, str]] = {}
    self._quarantine = path / f"{QUARANTINE}{task.suffix}"
    # The videos in it; those in other files are of other tasks.
    self._own: set[str] = set()
    self._merges = task.count == 1
    self._lock = Lock(path, shared=not self._merges)
    try:
      self._check_settings()
      self._read_quarantine()
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._lock.close()

  def _check_settings(self) -> None:
    """Compares the settings with those of the folder."""
    try:
      earlier = json.loads((self.path / SETTINGS).read_bytes())
    except FileNotFoundError:
      # Another task may be writing the settings.
      names = [entry.name for entry in self.path.iterdir()]
      if not all(name.endswith(PARTIAL_SUFFIX) for name in names):
        raise OutputFolderError(
          f"{self.path} holds files but no {SETTINGS}, so it was not made by "
          "this program; choose an empty or new folder as --output"
        ) from None
      return
    except ValueError as e:
      raise OutputFolderError(
        f"{self.path / SETTINGS} is damaged ({e}); choose another --output"
      ) from e
    program = self._settings["program"]
    if not (isinstance(earlier, dict) and earlier.get("program") == program):
      raise OutputFolderError(
        f"{self.path} was not made by {program}; choose an empty or new folder "
        "as --output"
      )
    changes = differences(earlier, self._settings, _FREE_SETTINGS)
    if changes:
      raise OutputFolderError(
        f"{self.path} was made with other settings: {'; '.join(changes)}. "
        "Use those settings again, or another --output"
      )
    self._settings = earlier

  def _read_quarantine(self) -> None:
    for file in sorted(self.path.glob(f"{QUARANTINE}*")):
      if file.name.endswith(PARTIAL_SUFFIX):
        continue
      for line in file.read_text().splitlines():
        # A killed run may leave an incomplete last line.
        with contextlib.suppress(ValueError):
          entry = json.loads(line)
          # A later run may have succeeded. A name that is too long for its
          # file raises in Path.exists.
          if not os.path.exists(self.file_of(entry["source"])):
            self._refused[entry["source"]] = entry
            if self._merges or file == self._quarantine:
              self._own.add(entry["source"])

  # --- Queries ----------------------------------------------------------------

  @property
  def reasons(self) -> dict[str, str]:
    return {name: line["reason"] for name, line in self._refused.items()}

  def file_of(self, source: str) -> Path:
    """Returns the path of the features of a video."""
    return self.path / f"{source}.{self._settings['format']}"

  def holds(self, source: str, video: Path) -> bool:
    """Returns whether the folder holds the features of this video file.

    As with make, the video is hashed only if it is newer than its features.

    Args:
      source: path of the video below the inputs.
      video: path of the video.
    """
    file = self.file_of(source)
    try:
      status = video.stat()
      origin = read_metadata(file)
      return origin["num_bytes"] == status.st_size and (
        status.st_mtime <= file.stat().st_mtime
        or origin["sha256"] == sha256_of(video)
      )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
      return False

  def quarantines(self, source: str, video: Path) -> bool:
    """Returns whether this video file is in the quarantine."""
    try:
      return self._refused[source]["sha256"] == sha256_of(video)
    except (KeyError, OSError):
      return False

  # --- Changes ----------------------------------------------------------------

  def begin(self) -> None:
    """Writes the settings unless the folder has them.

    Raises:
      OutputFolderError: another task has just begun with other settings.
    """
    if not (self.path / SETTINGS).exists():
      data = json.dumps(self._settings, indent=2) + "\n"
      write_bytes(self.path / SETTINGS, data.encode())
    if not self._merges:
      self._check_settings()

  def write(
    self, origin: Origin, spans: list[Span], features: np.ndarray
  ) -> None:
    """Writes the file of one video.

    Args:
      origin: the video.
      spans: R spans.
      features: float32 (R, D) or (R, N, D).
    """
    metadata = {
      **dataclasses.asdict(origin),
      "settings": self._settings,
      "feature_shape": features.shape[1:],
      "versions": {name: _version(name) for name in _VERSIONED},
    }
    encode = {"npz": _npz, "parquet": _parquet}[self._settings["format"]]
    columns = {
      name: np.array(values)
      for name, values in zip(
        Span._fields, zip(*spans, strict=True), strict=True
      )
    }
    file = self.file_of(origin.source)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, encode(features, columns, json.dumps(metadata)))
    self._refused.pop(origin.source, None)
    self._own.discard(origin.source)

  def refuse(self, origin: Origin, reason: str) -> None:
    """Quarantines a video and removes its features; written at once."""
    entry = {
      "source": origin.source,
      "reason": reason,
      "sha256": origin.sha256,
    }
    self._refused[origin.source] = entry
    self._own.add(origin.source)
    with contextlib.suppress(OSError):  # no such file, or the name is too long
      self.file_of(origin.source).unlink()
    with open(self._quarantine, "a") as file:
      file.write(json.dumps(entry) + "\n")

  def finish(self) -> None:
    """Writes the quarantine sorted, without videos that succeeded later.

    A run of all videos takes those of the tasks over.
    """
    lines = [json.dumps(self._refused[name]) for name in sorted(self._own)]
    data = "".join(f"{line}\n" for line in lines)
    write_bytes(self._quarantine, data.encode())
    if self._merges:
      for file in self.path.glob(f"{QUARANTINE}-*"):
        file.unlink()


# --- Files --------------------------------------------------------------------


def has_parquet() -> bool:
  """Returns whether pyarrow is installed."""
  return importlib.util.find_spec("pyarrow") is not None


def _need_parquet() -> None:
  if not has_parquet():
    raise OutputFolderError(
      "the format parquet needs pyarrow: pip install 'marlin-jax[parquet]'"
    )


def _version(name: str) -> str | None:
  """Returns the version of a package; None if it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def read_metadata(file: Path) -> dict[str, Any]:
  """Returns the metadata of a feature file: its video, settings and versions.

  Raises:
    OSError: there is no such file.
    EOFError, KeyError, ValueError, zipfile.BadZipFile: the file is incomplete.
  """
  if file.suffix == ".npz":
    with np.load(file) as arrays:
      return json.loads(arrays["metadata"].item())
  import pyarrow.parquet

  metadata = pyarrow.parquet.read_schema(file).metadata or {}
  return json.loads(metadata[_METADATA])


def read_features(file: Path) -> np.ndarray:
  """Returns the features of a file, of this program or of another.

  Args:
    file: .npz with an array `features`, .parquet with a column `features` of
      lists, or .npy.

  Returns:
    float (R, D), or of any other shape that the file has.

  Raises:
    OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile: the file is
      missing, damaged or holds something else.
    OutputFolderError: pyarrow is missing.
  """
  if file.suffix == ".npy":
    return np.load(file, allow_pickle=False)
  if file.suffix == ".npz":
    with np.load(file, allow_pickle=False) as arrays:
      return arrays["features"]
  lists = read_column(file, "features")
  lengths = {*lists.value_lengths().to_pylist()}
  if len(lengths) != 1:
    raise ValueError(f"features have {len(lengths)} lengths")
  shape = lengths
  with contextlib.suppress(KeyError):  # a file of another program
    shape = read_metadata(file)["feature_shape"]
  return lists.flatten().to_numpy().reshape(len(lists), *shape)


def read_column(file: Path, name: str) -> pyarrow.Array:
  """Returns a column of a .parquet file; raises as `read_features`."""
  _need_parquet()
  import pyarrow.parquet

  (column,) = pyarrow.parquet.read_table(file, columns=[name]).columns
  return column.combine_chunks()


def _npz(
  features: np.ndarray, columns: dict[str, np.ndarray], metadata: str
) -> bytes:
  data = io.BytesIO()
  np.savez(data, features=features, **columns, metadata=np.array(metadata))
  return data.getvalue()


def _parquet(
  features: np.ndarray, columns: dict[str, np.ndarray], metadata: str
) -> bytes:
  import pyarrow
  import pyarrow.parquet

  flat = pyarrow.FixedSizeListArray.from_arrays(
    pyarrow.array(features.reshape(-1)), int(np.prod(features.shape[1:]))
  )
  table = pyarrow.table({"features": flat, **columns})
  table = table.replace_schema_metadata({_METADATA: metadata.encode()})
  data = io.BytesIO()
  pyarrow.parquet.write_table(table, data, compression="zstd")
  return data.getvalue()
