"""The ledger: the outcome of each video, and the small JSON files."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import storage
from data_prep.sources.manifest import Source
from data_prep.video import video_to_records
from marlin_jax.records import folders, quality_index, segment_index

# Reasons of failures that earlier versions recorded as quarantine.
_FAILED_BEFORE = (
  "cannot fetch: ",
  "decoder passed its deadline of ",
  "decoder was killed by SIGKILL",
  "the worker process was killed by SIGKILL",
  "the worker process said nothing for ",
)


class Rows(Sequence):
  """Rows of numbers as JSON text, which takes a tenth of their memory."""

  __slots__ = ("text",)

  def __init__(self, text: str) -> None:
    self.text = text

  def as_lists(self) -> list[list[float]]:
    """Returns the rows."""
    return json.loads(self.text)

  def __bool__(self) -> bool:
    return self.text != "[]"

  def __len__(self) -> int:
    return len(self.as_lists())

  def __getitem__(self, index):
    return self.as_lists()[index]

  def __eq__(self, other: object) -> bool:
    if isinstance(other, Rows):
      return self.text == other.text
    return isinstance(other, list) and self.as_lists() == other

  __hash__ = None

  def __repr__(self) -> str:
    return self.text


# Rows and labels of most lines; they share these objects.
_NONE, _NO_LABELS = Rows("[]"), {}
# The fields that are rows, and what follows each in a line. Within a string,
# JSON has no bare quotes.
_ROWS = {"quality": '"limits": ', "segments": '"notes": '}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """Outcome of one video: a line of videos.jsonl.

  Attributes:
    video_id, split, subject_id: as in `manifest.Source`.
    labels: numbers by label, as in `manifest.Source`; None for an unknown
      number. Readers take labels from here, so that one can be corrected.
    num_bytes, sha256: size and hash of the video file, or of a folder's
      pictures; 0 and '' if it failed.
    status, reason, num_..., quality: as in `video_to_records.Outcome`.
    segments: as in `video_to_records.Outcome`; in ledgers of earlier versions
      without the sides, or [].
    limits: `Settings.strictness` under which the video was quarantined, else
      None. Under another one it is tried again.
    notes: as in `video_to_records.Outcome`.
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
  quality: Sequence[Sequence[float]]
  limits: dict[str, float | str] | None
  segments: Sequence[Sequence[int]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  @classmethod
  def from_line(cls, line: str) -> Entry:
    """Parses a line of videos.jsonl.

    Raises:
      ValueError, TypeError: it is damaged.
    """
    rows = {}
    for name, following in _ROWS.items():
      before = f'"{name}": '
      start = line.rfind(before)  # a label may have the same name
      stop = line.find(following, start)
      if 0 <= start < stop:
        text = line[start + len(before) : stop - 2]
        rows[name] = Rows(text) if text != _NONE.text else _NONE
        line = line[:start] + line[stop:]
    fields = parse_json(line)
    # A million lines may have equal ones: they share one object.
    fields["labels"] = fields["labels"] or _NO_LABELS
    for name in ("split", "subject_id", "status", "reason"):
      fields[name] = sys.intern(fields[name])
    return cls(**fields, **rows)

  def to_line(self) -> str:
    """Returns the line of videos.jsonl."""
    fields = {name: getattr(self, name) for name in _FIELDS}
    packed = {n: fields[n] for n in _ROWS if isinstance(fields[n], Rows)}
    line = json.dumps(fields | dict.fromkeys(packed))
    for name, rows in packed.items():
      start, _, stop = line.rpartition(f'"{name}": null')
      line = f'{start}"{name}": {rows.text}{stop}'
    return line + "\n"

  def to_fields(self) -> dict[str, Any]:
    """Returns the fields as JSON values; `Entry(**fields)` is the inverse."""
    fields = {name: getattr(self, name) for name in _FIELDS}
    return fields | {name: lists_of(fields[name]) for name in _ROWS}

  def packed(self) -> Entry:
    """Returns an equal line that takes less memory."""
    rows = {n: Rows(json.dumps(lists_of(getattr(self, n)))) for n in _ROWS}
    return dataclasses.replace(self, **rows)

  @property
  def is_kept(self) -> bool:
    """True if the data set holds records of the video."""
    return self.status == video_to_records.KEPT

  @property
  def is_failed(self) -> bool:
    """True if the machine is to blame, so that every run tries again."""
    return self.status == video_to_records.FAILED or (
      self.status == video_to_records.QUARANTINED
      and self.reason.startswith(_FAILED_BEFORE)
    )

  @classmethod
  def of(
    cls,
    source: Source,
    settings: video_to_records.Settings,
    outcome: video_to_records.Outcome,
  ) -> Entry:
    """Returns the ledger line of a processed video; hashes the file.

    If the file cannot be read, the video counts as failed.
    """
    num_bytes, digest = 0, ""
    if outcome.status != video_to_records.FAILED:
      try:
        digest = folders.sha256_of(source.path)
        num_bytes, _ = _size_and_change(source.path)
      except OSError as e:
        outcome = video_to_records.Outcome(
          video_to_records.FAILED, f"cannot read: {e.strerror or e}"
        )
        num_bytes, digest = 0, ""
    limits = None
    if outcome.status == video_to_records.QUARANTINED:
      limits = settings.strictness()
    return cls(
      video_id=source.video_id,
      split=source.split,
      subject_id=source.subject_id,
      labels=labels_of(source),
      num_bytes=num_bytes,
      sha256=digest,
      limits=limits,
      **dataclasses.asdict(outcome),
    )


def lists_of(rows: Sequence[Sequence[float]]) -> list[list[float]]:
  """Returns the rows of an entry as lists."""
  return rows.as_lists() if isinstance(rows, Rows) else rows


_FIELDS = [field.name for field in dataclasses.fields(Entry)]


def _size_and_change(path: Path) -> tuple[int, float]:
  """Returns size in bytes and last change of a file, or a folder's files."""
  is_folder, size, change = storage.status(path)
  if not is_folder:
    return size, change
  _, sizes, changes = zip(
    (True, 0, change), *map(storage.status, folders.files_in(path)), strict=True
  )
  return sum(sizes), max(changes)


def labels_of(source: Source) -> dict[str, list[float | None]]:
  """Returns the labels with None for NaN, which JSON lacks."""
  return {
    name: [None if math.isnan(value) else value for value in values]
    for name, values in source.labels.items()
  }


def source_of(entry: Entry) -> Source:
  """Returns the video of a ledger line, without its path."""
  labels = {
    name: tuple(math.nan if value is None else value for value in values)
    for name, values in entry.labels.items()
  }
  return Source(entry.video_id, Path(), entry.subject_id, entry.split, labels)


_NO_BRACKETS = str.maketrans("", "", "[]")
_TEXTS_AT_A_TIME = 1000


def quality_rows(entries: Iterable[Entry]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the qualities of all records of many videos.

  Args:
    entries: the videos.

  Returns:
    int (N,), the number of each record's video; float64 (N, 5), its row.
  """
  counts, parts, texts = [], [np.zeros(0)], []
  for entry in entries:
    rows = entry.quality
    text = rows.text if isinstance(rows, Rows) else json.dumps(rows)
    counts.append(text.count("[") - 1)
    texts += [text] if counts[-1] else []
    if len(texts) == _TEXTS_AT_A_TIME:
      parts.append(_numbers(texts))
      texts = []
  if texts:
    parts.append(_numbers(texts))
  numbers = np.repeat(np.arange(len(counts)), counts)
  num_columns = len(quality_index.DTYPE) - 1
  return numbers, np.concatenate(parts).reshape(-1, num_columns)


def _numbers(texts: list[str]) -> np.ndarray:
  """Returns all numbers in JSON texts of rows; faster than JSON."""
  return np.fromstring(",".join(texts).translate(_NO_BRACKETS), sep=",")


def relabelled(entry: Entry, source: Source) -> Entry:
  """Returns the line with the source's labels; itself if these are equal."""
  if not (entry.labels or source.labels):
    return entry
  labels = labels_of(source)
  if entry.labels == labels:
    return entry
  return dataclasses.replace(entry, labels=labels)


def packed_segments(entries: Iterable[Entry]) -> bytes | None:
  """Returns the segment index of videos with records.

  Args:
    entries: the videos, in the order of their records.

  Returns:
    Bytes of the file; None if a ledger of an earlier version lacks the segments
    of a video.
  """
  entries = list(entries)
  if not all(entry.segments for entry in entries):
    return None
  return segment_index.pack(
    segment_index.Video(
      entry.subject_id, lists_of(entry.segments), entry.video_id
    )
    for entry in entries
  )


def is_of(entry: Entry, source: Source, since: float) -> bool:
  """Returns True if a ledger line describes the source's present file.

  Labels may differ, since no pixel depends on them. As in make, the file is
  read only if it is younger than the ledger.

  Args:
    entry: ledger line to check.
    source: video as the input lists it.
    since: time at which the ledger was written, in seconds since 1970.
  """
  if entry.split != source.split or entry.subject_id != source.subject_id:
    return False
  try:
    num_bytes, change = source.status or _size_and_change(source.path)
    return entry.num_bytes == num_bytes and (
      change <= since or folders.sha256_of(source.path) == entry.sha256
    )
  except OSError:
    return False


def modified(path: Path) -> float:
  """Returns the time of the last change, 0.0 if there is no such file."""
  return storage.modified(path) if path.exists() else 0.0


def parse_json(text: str | bytes) -> Any:
  """Returns the content of JSON; raises ValueError for other text."""
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError("brackets within brackets are too many") from e


def read_json(path: Path) -> Any:
  """Returns the content, None if the file is missing or incomplete."""
  try:
    return parse_json(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
  """Writes a JSON file atomically; an equal file is left alone."""
  write_if_new(path, (json.dumps(value, indent=indent) + "\n").encode())


def as_lines(values: Iterable[Any]) -> str:
  """Returns the text of a .jsonl file."""
  return "".join(json.dumps(value) + "\n" for value in values)


def write_lines(path: Path, lines: Iterable[str]) -> None:
  """Writes a .jsonl file atomically; an equal file is left alone."""
  if folders.is_remote(path):
    write_if_new(path, "".join(lines).encode())
    return
  partial = path.with_name(folders.partial_name(path.name))
  try:
    with open(partial, "w", encoding="utf-8") as file:
      file.writelines(lines)
      file.flush()
      os.fsync(file.fileno())
    if not (path.exists() and filecmp.cmp(partial, path, shallow=False)):
      os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def append_lines(path: Path, values: Iterable[Any]) -> None:
  """Appends to a .jsonl file, of which the last line may be half-written."""
  text = as_lines(values)
  if not text:
    return
  with open(path, "a+b") as file:
    if size := file.seek(0, os.SEEK_END):
      file.seek(size - 1)
      if file.read(1) != b"\n":
        text = "\n" + text
    file.write(text.encode())


def write_if_new(path: Path, data: bytes) -> None:
  """Writes a file atomically; an equal file is left alone."""
  if path.exists() and path.read_bytes() == data:
    return
  folders.write_bytes(path, data)
