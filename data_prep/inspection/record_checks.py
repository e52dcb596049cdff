"""Checks of a shard and of each record in it, for data_prep.verify.

No file is trusted: a damaged shard gives problems, not an exception.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import storage
from data_prep.output import shards
from data_prep.sources import listing
from data_prep.sources.listing import Label
from data_prep.video.video_to_records import segment_lengths
from marlin_jax.records import (
  folders,
  mel_spectrogram,
  quality_index,
  schema,
)
from marlin_jax.records.schema import Record

# Kinds of problems, the most important first: meaning and remedy.
_AGAIN = "remove these shards and prepare again with the same input"
KINDS = {
  "unfinished": "a run has not finished; start it again to resume",
  "schema": "written by another version; prepare into a new folder",
  "missing": "prepare again with the same input to write missing files",
  "damaged": f"bytes are not those that were written; {_AGAIN}",
  "split": f"people or videos in two places; {_AGAIN}",
  "content": f"parts of records are wrong or inconsistent; {_AGAIN}",
  "counts": "ledger, metadata and shards disagree; prepare again",
  "tfds": "TFDS cannot read it; prepare again",
  "unexpected": "not a file of the data set; remove it",
}
# Problems listed of each kind, so that none hides the others; all are counted.
MAX_LISTED = 100

# Boxes are float32; this is their precision at the far side of a large frame.
_BOX_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Problem:
  """A failed check.

  Attributes:
    kind: one of KINDS.
    where: a file, or a record by shard and number.
    what: actual and expected state, as text.
  """

  kind: str
  where: str
  what: str


class Problems:
  """Problems by kind; counts all and keeps MAX_LISTED of each kind."""

  def __init__(self) -> None:
    self._listed: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
    self.counts: Counter[str] = Counter()

  def add(self, kind: str, where: str, what: str) -> None:
    self.counts[kind] += 1
    if len(self._listed[kind]) < MAX_LISTED:
      self._listed[kind].append(Problem(kind, where, what))

  def extend(self, other: Problems) -> None:
    self.counts += other.counts
    for kind, problems in self._listed.items():
      room = MAX_LISTED - len(problems)
      problems.extend(other._listed[kind][:room])

  def listed(self) -> list[Problem]:
    """Returns the kept problems, the most important kind first."""
    return [
      problem
      for problems in self._listed.values()
      for problem in sorted(problems, key=lambda p: (p.where, p.what))
    ]


@dataclasses.dataclass(frozen=True)
class Expected:
  """Expected properties of every record of a data set.

  Attributes:
    segment_frames: length of the longest record in frames.
    labels: labels by name, and their meaning.
    record_labels: number of values of each label that records hold.
    has_sound: True if records hold sound.
    frame_size: height and width of their frames in pixels.
  """

  segment_frames: int
  labels: Mapping[str, Label]
  record_labels: Mapping[str, int]
  has_sound: bool
  frame_size: int = schema.FRAME_SIZE


@dataclasses.dataclass
class VideoContent:
  """Content of a shard from one video.

  Attributes:
    labels: labels of its first record.
    subject_ids: subjects of its records; only one in a whole data set.
    quality: a row per record, see `quality_index.row_of`.
    segments: (segment, length) of the records of each track, in order.
    lengths: [track_id, length, side] of each record, in order, as the ledger
      notes them.
  """

  labels: Mapping[str, np.ndarray]
  subject_ids: set[str] = dataclasses.field(default_factory=set)
  quality: list[list[float]] = dataclasses.field(default_factory=list)
  segments: dict[int, list[tuple[int, int]]] = dataclasses.field(
    default_factory=dict
  )
  lengths: list[list[float]] = dataclasses.field(default_factory=list)

  @property
  def counts(self) -> dict[str, int]:
    """Returns the counts that a ledger line also holds."""
    lengths = [
      length for parts in self.segments.values() for _, length in parts
    ]
    return {
      "num_tracks": len(self.segments),
      "num_records": len(lengths),
      "num_frames": sum(lengths),
    }


@dataclasses.dataclass
class ShardContent:
  """Content of a shard.

  Attributes:
    name: name of the file.
    sha256, num_bytes: hash and size of the file.
    is_whole: True if the file is a complete ArrayRecord file.
    num_records: number of records in the file; 0 if it is not whole.
    videos: readable records, by video_id in the order of the file.
    problems: problems of the shard and of single records.
  """

  name: str
  sha256: str = ""
  num_bytes: int = 0
  is_whole: bool = False
  num_records: int = 0
  videos: dict[str, VideoContent] = dataclasses.field(default_factory=dict)
  problems: Problems = dataclasses.field(default_factory=Problems)

  @property
  def is_read(self) -> bool:
    """True if every record could be read."""
    num_read = sum(len(video.quality) for video in self.videos.values())
    return self.is_whole and num_read == self.num_records


@contextlib.contextmanager
def open_check(expected: Expected) -> Iterator[Any]:
  """Yields work for `workers.run_tasks`: path of a shard -> ShardContent."""

  def work(path: Path, report: Callable[[Any], None]) -> ShardContent:
    content = ShardContent(path.name)
    try:
      with storage.local(path) as file:
        check_shard(file, expected, content, report)
    except OSError as e:  # a disk error or a missing permission
      content.problems.add("damaged", path.name, f"cannot be read: {e}")
    return content

  yield work


def check_shard(
  path: Path,
  expected: Expected,
  content: ShardContent,
  report: Callable[[int], None] = lambda num_bytes: None,
) -> None:
  """Reads and decodes everything in a shard.

  Args:
    path: path of the shard.
    expected: expected properties of every record.
    content: receives the content and the problems.
    report: called with the size in bytes of each record.

  Raises:
    OSError: the file cannot be read.
  """
  content.num_bytes = path.stat().st_size
  content.sha256 = folders.sha256_of(path)
  num_records = shards.num_records(path)
  if num_records is None:
    what = f"not a whole ArrayRecord file ({content.num_bytes} bytes)"
    content.problems.add("damaged", path.name, what)
    return
  content.is_whole, content.num_records = True, num_records
  previous = ""
  for number, data in shards.read_each(path, num_records):
    where = f"{path.name} record {number}"
    if isinstance(data, Exception):
      content.problems.add("damaged", where, f"cannot be read: {data}")
      continue
    report(len(data))
    try:
      record = schema.decode(data)
    except ValueError as e:
      content.problems.add("content", where, str(e))
      continue
    for problem in record_problems(record, expected):
      content.problems.add("content", f"{where} ({record.name})", problem)
    if record.video_id < previous:
      what = (
        f"{record.video_id!r} comes after {previous!r}, expected sorted by name"
      )
      content.problems.add("content", where, what)
    previous = record.video_id
    video = content.videos.setdefault(
      record.video_id, VideoContent(record.labels)
    )
    if not same_labels(video.labels, record.labels):
      what = "labels differ from the video's first record"
      content.problems.add("content", where, what)
    video.subject_ids.add(record.subject_id)
    video.quality.append(quality_index.row_of(record))
    side = schema.median_side(record)
    video.lengths.append([record.track_id, len(record), side])
    part = record.segment, len(record)
    video.segments.setdefault(record.track_id, []).append(part)
  for video_id, video in content.videos.items():
    for problem in video_problems(video, expected.segment_frames):
      where = f"{path.name} {video_id!r}"
      content.problems.add("content", where, problem)


def same_labels(first: Mapping, second: Mapping) -> bool:
  """Returns True if labels of records are equal."""
  return first.keys() == second.keys() and all(
    np.array_equal(first[name], second[name], equal_nan=True) for name in first
  )


def record_problems(record: Record, expected: Expected) -> Iterator[str]:
  """Yields the problems of a single record; decodes all of it."""
  try:
    schema.decode_frames(record, range(len(record)))
    if (size := record.stored_size) != expected.frame_size:
      yield f"frames have {size} pixels, expected {expected.frame_size}"
  except ValueError as e:
    yield str(e)
  yield from _parsing_problems(record)
  lengths = {name: len(values) for name, values in record.labels.items()}
  if lengths != expected.record_labels:
    yield f"values of labels {lengths}, expected {dict(expected.record_labels)}"
  yield from _sound_problems(record, expected.has_sound)
  if not np.isfinite(record.boxes).all():
    yield "boxes are not finite"
  else:
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    if (sides <= 0).any():
      yield "boxes are not x0 < x1, y0 < y1"
    elif (np.abs(sides[:, 0] - sides[:, 1]) > _BOX_TOLERANCE).any():
      yield "boxes are not square"
  if not (math.isfinite(record.fps) and record.fps >= 0):
    yield f"fps is {record.fps}"
  if not math.isfinite(record.start_secs):
    yield f"start_secs is {record.start_secs}"
  if not 0 <= record.quality <= 1:
    yield f"quality is {record.quality}, expected a number in [0, 1]"
  terms = record.quality_terms
  if (
    len(terms) != len(schema.QUALITY_TERMS)
    or not ((terms >= 0) & (terms <= 1)).all()
  ):
    yield f"quality_terms are {terms}, expected 4 numbers in [0, 1]"
  for name in ("track_id", "segment"):
    if getattr(record, name) < 0:
      yield f"{name} is {getattr(record, name)}"


def _parsing_problems(record: Record) -> Iterator[str]:
  import zstandard

  try:
    label_maps = schema.decode_parsing(record)
  except (ValueError, zstandard.ZstdError) as e:
    yield f"label maps cannot be read: {e}"
    return
  most = int(label_maps.max())
  if most >= len(schema.REGIONS):
    yield f"a label map holds code {most}, expected 0 to 10"
    return
  expected = schema.region_bits(label_maps)
  # Frames without a parsed face: not even background is known.
  unparsed = ~record.regions.any(axis=(1, 2))
  labelled = label_maps.any(axis=(1, 2))
  wrong = np.where(
    unparsed, labelled, (record.regions != expected).any(axis=(1, 2))
  )
  if wrong.any():
    yield (
      f"region bits of {wrong.sum()} of {len(record)} frames differ from the "
      f"label maps, first in frame {int(wrong.argmax())}"
    )


def label_problems(
  labels: Mapping[str, list[float | None]], expected: Mapping[str, Label]
) -> Iterator[str]:
  """Yields the problems of the labels of a line of the ledger."""
  if labels.keys() != expected.keys():
    yield f"labels {sorted(labels)}, expected {sorted(expected)}"
    return
  for name, label in expected.items():
    values = np.array(labels[name], np.float64).reshape(-1)
    known = values[~np.isnan(values)]
    allowed = np.isfinite(known)
    if label.kind == listing.BINARY:
      allowed = np.isin(known, (0, 1))
    elif label.kind == listing.CLASS:
      allowed = np.isin(known, np.arange(len(label.names)))
    if len(values) != label.length or not allowed.all():
      yield (
        f"label {name} is {_shown(list(values))}, expected {label.length} "
        f"of kind {label.kind!r}"
      )


def _sound_problems(record: Record, has_sound: bool) -> Iterator[str]:
  if (record.audio is not None) != has_sound:
    yield f"sound is {'missing' if has_sound else 'not expected'}"
  if record.audio is None:
    return
  if len(record.audio) % 2:
    yield f"{len(record.audio)} bytes of sound are not 16-bit PCM"
  secs = len(record.audio) / 2 / schema.SAMPLE_RATE
  expected = secs * mel_spectrogram.MEL_RATE
  if abs(len(record.mel) - expected) > 2:
    yield (
      f"mel has {len(record.mel)} rows, expected {expected:.0f} for "
      f"{secs:.2f} s of sound"
    )
  if not np.isfinite(record.mel).all():
    yield "mel is not finite"


def video_problems(video: VideoContent, segment_frames: int) -> Iterator[str]:
  """Yields the problems of a video's records taken together."""
  if sorted(video.segments) != list(range(len(video.segments))):
    yield (
      f"tracks are numbered {_shown(sorted(video.segments))}, expected 0 to "
      f"{len(video.segments) - 1}"
    )
  for track_id, parts in sorted(video.segments.items()):
    numbers = [number for number, _ in parts]
    if numbers != list(range(len(parts))):
      yield (
        f"track {track_id} holds segments {_shown(numbers)}, expected 0 to "
        f"{len(parts) - 1} in order"
      )
      continue
    lengths = [length for _, length in parts]
    expected = segment_lengths(sum(lengths), segment_frames)
    if lengths != expected:
      yield (
        f"track {track_id} is cut into {_shown(lengths)} frames, expected "
        f"{_shown(expected)}"
      )


def _shown(values: list) -> str:
  more = ", ..." if len(values) > 10 else ""
  return ", ".join(str(value) for value in values[:10]) + more
