"""Statistics of a prepared data set, from its ledger and a sample of records.

Counts come from the ledger and are exact. All other numbers come from whole
videos, chosen by hashes of shards and names until enough records are read; in a
small data set these are all videos. Statistics decode no picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import storage
from data_prep.output import derived_files, folder_settings, ledger, shards
from data_prep.sources.listing import Label
from data_prep.sources.manifest import stable_hash
from marlin_jax.records import folders, schema
from marlin_jax.records.cli import UserError
from marlin_jax.records.schema import Record

# Distance between the label maps that are counted: neighbours differ little.
_AREA_STEPS = 8


class InspectionError(UserError):
  """The folder holds no complete, readable data set."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Position of a record: path of its shard and its number in the shard."""

  shard: Path
  number: int


@dataclasses.dataclass
class Track:
  """One face track.

  Attributes:
    video_id, track_id, split: identify the track.
    labels: labels of the video, float32 (K,) by name; NaN if unknown.
    fps, quality, quality_terms: values that its records share; see
      `schema.Record`.
    num_frames: number of frames of all its segments.
    side: median side of its crop in source pixels.
    places: places of its records in the shards.
  """

  video_id: str
  track_id: int
  split: str
  fps: float
  quality: float
  quality_terms: np.ndarray
  labels: Mapping[str, np.ndarray]
  num_frames: int = 0
  side: float = 0.0
  places: list[Place] = dataclasses.field(default_factory=list)

  @property
  def secs(self) -> float:
    return self.num_frames / self.fps if self.fps > 0 else 0.0

  @property
  def is_picture(self) -> bool:
    return self.num_frames == 1


@dataclasses.dataclass
class Statistics:
  """Numbers shown in the report.

  Attributes:
    labels: meaning of the tracks' labels.
    counts: per split, as in metadata.json.
    statuses: number of videos that were kept, without a face, and quarantined.
    left_out: (video_id, reason) of videos that were not kept.
    num_records: number of records in the sample.
    tracks: tracks of the sampled videos.
    num_frames: number of frames in the sample.
    present: int64 (11,), number of sampled frames that show each region.
    area: float64 (11,), mean share of the crop that each region covers.
  """

  labels: dict[str, Label]
  counts: dict[str, dict[str, int]]
  statuses: Counter[str]
  left_out: list[tuple[str, str]]
  num_records: int = 0
  tracks: list[Track] = dataclasses.field(default_factory=list)
  num_frames: int = 0
  present: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(len(schema.REGIONS), np.int64)
  )
  area: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(len(schema.REGIONS))
  )

  @property
  def num_videos(self) -> int:
    return self.statuses.total()

  @property
  def is_complete(self) -> bool:
    """True if the sample is the whole data set."""
    total = sum(count["num_records"] for count in self.counts.values())
    return self.num_records == total

  def secs(self, split: str) -> float:
    """Returns the seconds of all tracks of a split; NaN without a sample."""
    tracks = [track for track in self.tracks if track.split == split]
    num_read = sum(track.num_frames for track in tracks)
    if not num_read:
      return float("nan") if self.counts[split]["num_frames"] else 0.0
    secs = sum(track.secs for track in tracks)
    return secs / num_read * self.counts[split]["num_frames"]


@contextlib.contextmanager
def on_disk(dataset_dir: Path, max_records: int) -> Iterator[Path]:
  """Yields a folder on a disk with all that `read` needs.

  It is the data set itself, or for one in a bucket a copy of its descriptions
  and of the shards that hold the sample.

  Args:
    dataset_dir, max_records: as for `read`.

  Raises:
    InspectionError: as for `read`.
    OSError: the data set cannot be downloaded.
  """
  if not folders.is_remote(dataset_dir):
    yield dataset_dir
    return
  settings, _, entries = _read_descriptions(dataset_dir)
  first = _first_records(dataset_dir, settings, entries)
  chosen = _chosen(entries, first, max_records)
  names = {first[entry.video_id].shard.name for entry in chosen}
  names |= {folders.SETTINGS, folders.METADATA, folders.VIDEOS}
  with tempfile.TemporaryDirectory(dir=storage.scratch_folder()) as folder:
    for name in sorted(names):
      storage.fetch(dataset_dir / name, Path(folder) / name)
    yield Path(folder)


def read(
  dataset_dir: Path,
  max_records: int,
  progress: Callable[[int, int], None] = lambda num, total: None,
) -> Statistics:
  """Reads the ledger and a sample.

  Args:
    dataset_dir: a folder that data_prep.prepare wrote.
    max_records: size of the sample; whole videos are read, so that it may
      hold some more records.
    progress: called with the number of records read and to read.

  Raises:
    InspectionError: the folder holds no such data set, or it is damaged.
  """
  settings, metadata, entries = _read_descriptions(dataset_dir)
  statistics = Statistics(
    labels={
      name: Label(label["kind"], tuple(label["names"]))
      for name, label in metadata["labels"].items()
    },
    counts={
      split: derived_files.counts(e for e in entries if e.split == split)
      for split in sorted({entry.split for entry in entries})
    },
    statuses=Counter(entry.status for entry in entries),
    left_out=[
      (entry.video_id, entry.reason) for entry in entries if not entry.is_kept
    ],
  )
  first = _first_records(dataset_dir, settings, entries)
  chosen = _chosen(entries, first, max_records)
  total = sum(entry.num_records for entry in chosen)
  area = _Mean(len(schema.REGIONS))
  for entry in chosen:
    tracks: dict[int, list[tuple[Place, Record]]] = {}
    for place, record in _records(first[entry.video_id], entry):
      tracks.setdefault(record.track_id, []).append((place, record))
      _add_regions(statistics, area, record)
      statistics.num_records += 1
      progress(statistics.num_records, total)
    for parts in tracks.values():
      statistics.tracks.append(_track(parts, entry))
  statistics.area = area.value
  statistics.tracks.sort(key=lambda track: (track.video_id, track.track_id))
  return statistics


def num_records(shard: Path) -> int:
  """Returns the number of records in a shard.

  Raises:
    InspectionError: the shard is damaged.
  """
  num = shards.num_records(shard)
  if num is None:
    raise _damaged(shard, "it is not a whole ArrayRecord file")
  return num


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedFrame:
  """One frame of a record.

  Attributes:
    record: record that holds the frame.
    index: number of the frame in the record.
    pixels: uint8 (224, 224, 3), RGB.
    labels: uint8 (224, 224), LaPa codes.
  """

  record: Record
  index: int
  pixels: np.ndarray
  labels: np.ndarray


def read_frame(place: Place, share: float = 0.5) -> DecodedFrame:
  """Reads one frame of a record.

  Args:
    place: place of the record to read.
    share: position of the frame in the record, in [0, 1).

  Raises:
    InspectionError: the record, the frame or its label map is damaged.
  """
  try:
    (data,) = shards.read_records(place.shard, place.number, 1)
    record = schema.decode(data)
    index = int(share * len(record))
    pixels = schema.decode_frames(record, [index])[0]
    labels = schema.decode_parsing(record)[index]
  except (RuntimeError, ValueError, IndexError) as e:
    raise _damaged(place.shard, f"record {place.number}: {e}") from e
  return DecodedFrame(record, index, pixels, labels)


# --- Settings, metadata and ledger --------------------------------------------


def _read_descriptions(
  dataset_dir: Path,
) -> tuple[dict[str, Any], dict[str, Any], list[ledger.Entry]]:
  """Returns settings, metadata and ledger."""
  settings = ledger.read_json(dataset_dir / folders.SETTINGS)
  metadata = ledger.read_json(dataset_dir / folders.METADATA)
  if not settings or not metadata:
    raise InspectionError(
      f"{dataset_dir} is not a complete data set of data_prep.prepare: "
      "settings.json or metadata.json is missing or damaged; run "
      "data_prep.verify to see what to do"
    )
  if metadata["schema_version"] != schema.SCHEMA_VERSION:
    raise InspectionError(
      f"{dataset_dir} is of schema_version {metadata['schema_version']}, this "
      f"program reads {schema.SCHEMA_VERSION}; prepare into a new folder"
    )
  path = dataset_dir / folders.VIDEOS
  try:
    with path.open("rb") as lines:
      entries = [ledger.Entry(**ledger.parse_json(line)) for line in lines]
  except (OSError, ValueError, TypeError) as e:
    raise _damaged(path, str(e)) from e
  if not any(entry.num_records for entry in entries):
    raise InspectionError(f"{dataset_dir} holds no record")
  return settings, metadata, entries


def _damaged(path: Path, why: str) -> InspectionError:
  return InspectionError(
    f"{path} cannot be read ({why}); for all problems run python -m "
    f"data_prep.verify {path.parent}"
  )


def _first_records(
  dataset_dir: Path, settings: dict[str, Any], entries: list[ledger.Entry]
) -> dict[str, Place]:
  """Returns the place of each video's first record; a shard sorts by name."""
  places, counts = {}, Counter()
  for entry in sorted(entries, key=lambda entry: entry.video_id):
    name = folder_settings.shard_of(settings, entry.split, entry.video_id)
    places[entry.video_id] = Place(dataset_dir / name, counts[name])
    counts[name] += entry.num_records
  return places


def _chosen(
  entries: list[ledger.Entry], first: dict[str, Place], max_records: int
) -> list[ledger.Entry]:
  """Returns kept videos that hold `max_records` records or a few more.

  One video of each split comes first, then those of one shard after the other,
  by hashes: the choice depends neither on content nor on the order of the
  ledger. As a hash selects a video's shard, too, few shards are a fair sample.

  Args:
    entries: all ledger lines.
    first: the place of each video's first record.
    max_records: see above.
  """

  def order(entry: ledger.Entry) -> tuple[int, int]:
    names = first[entry.video_id].shard.name, entry.video_id
    by_shard, by_video = (stable_hash(f"report:{name}") for name in names)
    return by_shard, by_video

  with_records = sorted(
    (entry for entry in entries if entry.num_records), key=order
  )
  by_split = {entry.split: entry for entry in reversed(with_records)}
  first = list(by_split.values())
  remaining = [e for e in with_records if by_split[e.split] is not e]
  chosen, num = [], 0
  for entry in (*first, *remaining):
    if num >= max_records:
      break
    chosen.append(entry)
    num += entry.num_records
  return chosen


# --- Records ------------------------------------------------------------------


def _records(
  first: Place, entry: ledger.Entry
) -> Iterator[tuple[Place, Record]]:
  try:
    encoded = shards.read_records(first.shard, first.number, entry.num_records)
    for i, data in enumerate(encoded):
      record = schema.decode(data)
      if record.video_id != entry.video_id:
        raise ValueError(
          f"record {first.number + i} is of {record.video_id!r}, expected "
          f"{entry.video_id!r}"
        )
      yield Place(first.shard, first.number + i), record
  except (RuntimeError, ValueError, IndexError) as e:
    raise _damaged(first.shard, str(e)) from e


def _track(parts: list[tuple[Place, Record]], entry: ledger.Entry) -> Track:
  places, records = zip(*parts, strict=True)
  record = records[0]
  boxes = np.concatenate([record.boxes for record in records])
  return Track(
    video_id=record.video_id,
    track_id=record.track_id,
    split=entry.split,
    fps=record.fps,
    quality=record.quality,
    quality_terms=record.quality_terms,
    labels={
      name: np.array(values, np.float32)
      for name, values in entry.labels.items()
    },
    num_frames=len(boxes),
    side=float(np.median(boxes[:, 2] - boxes[:, 0])),
    places=list(places),
  )


class _Mean:
  """Running mean of vectors."""

  def __init__(self, size: int) -> None:
    self._sum, self._num = np.zeros(size), 0

  def add(self, total: np.ndarray, num: int) -> None:
    self._sum += total
    self._num += num

  @property
  def value(self) -> np.ndarray:
    return self._sum / max(self._num, 1)


def _add_regions(statistics: Statistics, area: _Mean, record: Record) -> None:
  codes = np.arange(len(schema.REGIONS), dtype=np.uint16)
  in_frame = np.bitwise_or.reduce(record.regions, axis=(1, 2))
  statistics.present += (in_frame[:, None] >> codes & 1).sum(
    axis=0, dtype=np.int64
  )
  statistics.num_frames += len(record)
  label_maps = schema.decode_parsing(record)[::_AREA_STEPS]
  counts = np.bincount(label_maps.reshape(-1), minlength=len(codes))
  area.add(counts[: len(codes)], label_maps.size)
