"""The folder that features of videos are kept in: one file per video.

Every file appears whole, by renaming, and its bytes follow from the video, the
checkpoint, the settings and the versions of the libraries alone.

Axes: R rows, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from marlin_jax.records.folders import (
  Lock,
  OutputFolderError,
  sha256_of,
  write_bytes,
)

# Raised whenever the meaning of a file changes.
SCHEMA_VERSION = 1
FORMATS = ("npz", "parquet")

_QUARANTINE = "quarantine.jsonl"
_SETTINGS = "settings.json"
# For the reader only: what counts is the hash.
_FREE_SETTINGS = ("checkpoint",)
_METADATA = b"marlin_jax"
# What numbers depend on beside the settings.
_VERSIONED = ("marlin-jax", "jax", "numpy", "av", "mediapipe")


class Span(NamedTuple):
  """The frames that a row stands for; see `face_video.Window`."""

  first_frame: int
  num_frames: int
  start_secs: float
  end_secs: float

  def to(self, last: Span) -> Span:
    """Returns the frames from the first of this to the last of another."""
    return Span(
      self.first_frame,
      last.first_frame + last.num_frames - self.first_frame,
      self.start_secs,
      last.end_secs,
    )


@dataclasses.dataclass(frozen=True)
class Origin:
  """The video that a file is about.

  Attributes:
    source: its path below the inputs.
    sha256: hash of its bytes, '' where it cannot be read.
    num_bytes: their number.
  """

  source: str
  sha256: str
  num_bytes: int


class FeatureFolder:
  """An output folder, locked while this object is open; a context manager.

  Attributes:
    path: the folder.
    reasons: why videos were refused, by source.
  """

  def __init__(self, path: Path, settings: dict[str, Any]) -> None:
    """Reads what is there; changes nothing.

    Args:
      path: made where it is missing.
      settings: what every file depends on, with a `format` of FORMATS; must be
        what an existing folder was made with.

    Raises:
      OutputFolderError: the folder is in use, holds something else, was made
        with other settings, or pyarrow is missing.
    """
    if settings["format"] == "parquet" and not has_parquet():
      raise OutputFolderError(
        "the format parquet needs pyarrow: pip install 'marlin-jax[parquet]'"
      )
    self.path = path
    self._settings = {
      "program": "marlin_jax.features",
      "schema_version": SCHEMA_VERSION,
      **settings,
    }
    self._refused: dict[str, dict[str, str]] = {}
    self._lock = Lock(path)
    try:
      self._agree()
      self._read_quarantine()
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._lock.close()

  def _agree(self) -> None:
    """Compares the settings with those of the folder."""
    try:
      found = json.loads((self.path / _SETTINGS).read_bytes())
    except FileNotFoundError:
      if any(self.path.iterdir()):
        raise OutputFolderError(
          f"{self.path} holds files but no {_SETTINGS}, so it was not made by "
          "this program; choose an empty or new folder as --output"
        ) from None
      return
    except ValueError as e:
      raise OutputFolderError(
        f"{self.path / _SETTINGS} is damaged ({e}); choose another --output"
      ) from e
    differences = [
      f"{key} was {found.get(key)!r} and is now {self._settings.get(key)!r}"
      for key in sorted({*found, *self._settings} - {*_FREE_SETTINGS})
      if found.get(key) != self._settings.get(key)
    ]
    if differences:
      raise OutputFolderError(
        f"{self.path} was made with other settings: {'; '.join(differences)}. "
        "Use those settings again, or another --output"
      )
    self._settings = found

  def _read_quarantine(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      for line in (self.path / _QUARANTINE).read_text().splitlines():
        # The last line of a run that was killed may be half a line.
        with contextlib.suppress(ValueError):
          entry = json.loads(line)
          self._refused[entry["source"]] = entry

  # --- What is there ----------------------------------------------------------

  @property
  def reasons(self) -> dict[str, str]:
    return {name: line["reason"] for name, line in self._refused.items()}

  def file_of(self, source: str) -> Path:
    """Returns where the features of a video are, or would be."""
    return self.path / f"{source}.{self._settings['format']}"

  def holds(self, source: str, video: Path) -> bool:
    """Says whether the features of this very video are there.

    As with make, the video is read only where it is younger than they are.

    Args:
      source: its path below the inputs.
      video: where it lies.
    """
    file = self.file_of(source)
    try:
      found = video.stat()
      origin = read_metadata(file)
      return origin["num_bytes"] == found.st_size and (
        found.st_mtime <= file.stat().st_mtime
        or origin["sha256"] == sha256_of(video)
      )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
      return False

  def quarantines(self, source: str, video: Path) -> bool:
    """Says whether this very video was refused before."""
    try:
      return self._refused[source]["sha256"] == sha256_of(video)
    except (KeyError, OSError):
      return False

  # --- What a run changes -----------------------------------------------------

  def begin(self) -> None:
    """Makes the folder one of these settings, where it is not yet."""
    if not (self.path / _SETTINGS).exists():
      data = json.dumps(self._settings, indent=2) + "\n"
      write_bytes(self.path / _SETTINGS, data.encode())

  def write(
    self, origin: Origin, spans: list[Span], features: np.ndarray
  ) -> None:
    """Writes the file of one video.

    Args:
      origin: the video.
      spans: R of them.
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

  def refuse(self, origin: Origin, reason: str) -> None:
    """Notes at once that a video gives no features."""
    entry = {
      "source": origin.source,
      "reason": reason,
      "sha256": origin.sha256,
    }
    self._refused[origin.source] = entry
    self.file_of(origin.source).unlink(missing_ok=True)
    with open(self.path / _QUARANTINE, "a") as file:
      file.write(json.dumps(entry) + "\n")

  def finish(self) -> None:
    """Writes the quarantine in order, without what was mended since."""
    lines = [json.dumps(self._refused[name]) for name in sorted(self._refused)]
    data = "".join(f"{line}\n" for line in lines)
    write_bytes(self.path / _QUARANTINE, data.encode())


# --- Files --------------------------------------------------------------------


def has_parquet() -> bool:
  """Says whether pyarrow is installed."""
  return importlib.util.find_spec("pyarrow") is not None


def _version(name: str) -> str | None:
  """Returns None where a package runs without being installed, as ours may."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def read_metadata(file: Path) -> dict[str, Any]:
  """Returns what a file says about where it is from.

  Raises:
    OSError: there is no such file.
    EOFError, KeyError, ValueError, zipfile.BadZipFile: it is not whole.
  """
  if file.suffix == ".npz":
    with np.load(file) as arrays:
      return json.loads(arrays["metadata"].item())
  import pyarrow.parquet

  metadata = pyarrow.parquet.read_schema(file).metadata or {}
  return json.loads(metadata[_METADATA])


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
