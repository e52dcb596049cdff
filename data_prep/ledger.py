"""What became of each video, and the small files that say so."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep import process
from data_prep.manifest import Source
from marlin_jax.output_folder import write_bytes


@dataclasses.dataclass(frozen=True)
class Entry:
  """What became of one video: a line of videos.jsonl.

  Attributes:
    video_id, split, subject_id: as in `manifest.Source`.
    num_bytes, sha256: of the video file; 0 and '' where it was not readable.
    status, reason, num_...: as in `process.Outcome`.
    limits: where quarantined, the limits that held then. Under others the
      video is tried again.
  """

  video_id: str
  split: str
  subject_id: str
  num_bytes: int
  sha256: str
  status: str
  reason: str
  num_decoded_frames: int
  num_tracks: int
  num_records: int
  num_frames: int
  limits: dict[str, float] | None

  @classmethod
  def of(
    cls, source: Source, settings: process.Settings, outcome: process.Outcome
  ) -> Entry:
    num_bytes, digest = 0, ""
    # Where it cannot be read, the outcome's reason says so.
    with contextlib.suppress(OSError):
      digest = sha256_of(source.path)
      num_bytes = source.path.stat().st_size
    limits = None
    if outcome.status == process.QUARANTINED:
      limits = dataclasses.asdict(settings.limits)
    return cls(
      video_id=source.video_id,
      split=source.split,
      subject_id=source.subject_id,
      num_bytes=num_bytes,
      sha256=digest,
      limits=limits,
      **dataclasses.asdict(outcome),
    )


def sha256_of(path: Path) -> str:
  """Returns the hash of a file's bytes in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def is_of(entry: Entry, source: Source, since: float) -> bool:
  """Says whether a ledger line is about this very file.

  As with make, the file is read only where it is younger than the ledger.
  """
  try:
    found = source.path.stat()
    return (
      (entry.split, entry.subject_id) == (source.split, source.subject_id)
      and entry.num_bytes == found.st_size
      and (found.st_mtime <= since or sha256_of(source.path) == entry.sha256)
    )
  except OSError:
    return False


def modified(path: Path) -> float:
  """Returns the time of the last change, 0.0 where there is no such file."""
  return path.stat().st_mtime if path.exists() else 0.0


def read_json(path: Path) -> Any:
  """Returns the content, None where the file is missing or not whole."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
  _write_text(path, json.dumps(value, indent=indent) + "\n")


def write_lines(path: Path, values: list[Any]) -> None:
  _write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def _write_text(path: Path, text: str) -> None:
  """Writes under another name and renames; leaves an equal file alone."""
  data = text.encode()
  if path.exists() and path.read_bytes() == data:
    return
  write_bytes(path, data)
