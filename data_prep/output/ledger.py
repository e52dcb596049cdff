"""What became of each video, and the small files that say so."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep import storage
from data_prep.sources.manifest import Source
from data_prep.video import video_to_records
from marlin_jax.records import folders


@dataclasses.dataclass(frozen=True)
class Entry:
  """What became of one video: a line of videos.jsonl.

  Attributes:
    video_id, split, subject_id: as in `manifest.Source`.
    labels: likewise; None where a number is not known.
    num_bytes, sha256: of the video file, or of a folder's pictures; 0 and ''
      where it was not readable.
    status, reason, num_..., quality: as in `process.Outcome`.
    limits: where quarantined, the limits that held then. Under others the
      video is tried again.
  """

  video_id: str
  split: str
  subject_id: str
  labels: dict[str, list[float | None]]
  num_bytes: int
  sha256: str
  status: str
  reason: str
  num_decoded_frames: int
  num_tracks: int
  num_records: int
  num_frames: int
  quality: list[list[float]]
  limits: dict[str, float] | None

  @classmethod
  def of(
    cls,
    source: Source,
    settings: video_to_records.Settings,
    outcome: video_to_records.Outcome,
  ) -> Entry:
    num_bytes, digest = 0, ""
    # Where it cannot be read, the outcome's reason says so.
    with contextlib.suppress(OSError):
      digest = folders.sha256_of(source.path)
      num_bytes, _ = _size_and_change(source.path)
    limits = None
    if outcome.status == video_to_records.QUARANTINED:
      limits = dataclasses.asdict(settings.limits)
    return cls(
      video_id=source.video_id,
      split=source.split,
      subject_id=source.subject_id,
      labels=_labels_of(source),
      num_bytes=num_bytes,
      sha256=digest,
      limits=limits,
      **dataclasses.asdict(outcome),
    )


def _size_and_change(path: Path) -> tuple[int, float]:
  """Returns size in bytes and time of the last change, of a folder's files."""
  is_folder, size, change = storage.status(path)
  if not is_folder:
    return size, change
  _, sizes, changes = zip(
    (True, 0, change), *map(storage.status, folders.files_in(path)), strict=True
  )
  return sum(sizes), max(changes)


def _labels_of(source: Source) -> dict[str, list[float | None]]:
  """JSON has no NaN."""
  return {
    name: [None if math.isnan(value) else value for value in values]
    for name, values in source.labels.items()
  }


def is_of(entry: Entry, source: Source, since: float) -> bool:
  """Says whether a ledger line is about this very file.

  As with make, the file is read only where it is younger than the ledger.
  """
  if (entry.split, entry.subject_id) != (source.split, source.subject_id):
    return False
  if entry.labels != _labels_of(source):
    return False
  try:
    num_bytes, change = _size_and_change(source.path)
    return entry.num_bytes == num_bytes and (
      change <= since or folders.sha256_of(source.path) == entry.sha256
    )
  except OSError:
    return False


def modified(path: Path) -> float:
  """Returns the time of the last change, 0.0 where there is no such file."""
  return storage.modified(path) if path.exists() else 0.0


def read_json(path: Path) -> Any:
  """Returns the content, None where the file is missing or not whole."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
  write_if_new(path, (json.dumps(value, indent=indent) + "\n").encode())


def as_lines(values: Iterable[Any]) -> str:
  """Returns the text of a .jsonl file."""
  return "".join(json.dumps(value) + "\n" for value in values)


def write_lines(path: Path, values: Iterable[Any]) -> None:
  write_if_new(path, as_lines(values).encode())


def write_if_new(path: Path, data: bytes) -> None:
  """Writes under another name and renames; leaves an equal file alone."""
  if path.exists() and path.read_bytes() == data:
    return
  folders.write_bytes(path, data)
