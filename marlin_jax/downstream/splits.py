"""Labelled videos of a split: people, labels, tracks and windows.

Axes: V videos, K labels, W windows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from marlin_jax.data import prepared_dataset, segment_indexing
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import Dataset, DatasetError
from marlin_jax.downstream.tasks import Task, TaskError
from marlin_jax.records import schema
from marlin_jax.records.cli import counted
from marlin_jax.records.folders import VIDEOS, write_bytes

# Incremented when the meaning of an index file changes.
_INDEX_VERSION = 2
_NUM_THREADS = 8
# Names in a warning.
_MAX_NAMES = 5
# What is used of a line of the ledger.
_OF_LEDGER = ("split", "subject_id", "labels", "num_records", "segments")


class TrackRecords(NamedTuple):
  """The records of a face track, in order.

  Attributes:
    video: number of the video in the split.
    records: numbers of the records in the split.
    lengths: number of frames of each record.
    side: median side of the crop in pixels of the video; 0 where unknown.
  """

  video: int
  records: tuple[int, ...]
  lengths: tuple[int, ...]
  side: float = 0.0

  @property
  def num_frames(self) -> int:
    return sum(self.lengths)

  @property
  def prominence(self) -> tuple[float, int]:
    """Sort key of the tracks of a video; the main face has the highest.

    Side times frames, as `data_prep.faces.main_face.largest`, which chooses the
    face of `Marlin.extract_video`.
    """
    return self.side * self.num_frames, self.num_frames


class TrackWindow(NamedTuple):
  """A window of a track.

  Attributes:
    track: number of the track in the split.
    start: number of its first frame in the track.
  """

  track: int
  start: int


@dataclasses.dataclass(frozen=True)
class Split:
  """The videos of a split.

  Attributes:
    dataset: data set that holds the records.
    video_ids: V ids, sorted.
    subject_ids: person in each video; '' where unknown.
    labels: float32 (V, K) by label; NaN where unknown.
    tracks: face tracks, sorted by video.
    parts: split that holds each video, where several are joined.
    num_without: videos of the split that gave no record.
  """

  dataset: Dataset
  video_ids: tuple[str, ...]
  subject_ids: tuple[str, ...]
  labels: Mapping[str, np.ndarray]
  tracks: tuple[TrackRecords, ...]
  parts: tuple[str, ...]
  num_without: int = 0

  def __len__(self) -> int:
    return len(self.video_ids)

  @property
  def name(self) -> str:
    return self.dataset.split

  @functools.cached_property
  def people(self) -> list[str]:
    """The person in each video; unknown people count as different ones."""
    return [
      f"subject {subject}" if subject else f"video {video}"
      for subject, video in zip(self.subject_ids, self.video_ids, strict=True)
    ]

  def windows(self, clip: Clip) -> list[TrackWindow]:
    """Returns the windows that cover each track; see `Clip.window_starts`."""
    return [
      TrackWindow(number, int(start))
      for number, track in enumerate(self.tracks)
      for start in clip.window_starts(track.num_frames)
    ]

  def video_of(self, windows: Iterable[TrackWindow]) -> np.ndarray:
    """Returns the number of the video of each window, int (W,)."""
    return np.array([self.tracks[w.track].video for w in windows], int)


def open_split(
  path: str, split: str, cache: Path | None, *, all_tracks: bool = False
) -> Split:
  """Opens a split of a prepared data set.

  Reads the ledger and the segment index. Data sets of earlier versions do not
  note all that is needed there: then all records are read once, and what
  describes them is kept in `cache`. Labels come from the ledger, where it is
  there, else from the records.

  Args:
    path: directory of the data set.
    split: 'train', 'val', 'test', ..., or several as 'fold1+fold2'.
    cache: folder for the index of the records; None: it is not kept.
    all_tracks: take every track; by default that of the main face, see
      `TrackRecords.prominence`.

  Raises:
    DatasetError: there is no such split, it is damaged, or the records of a
      video disagree on its subject or labels.
  """
  dataset = prepared_dataset.open_joined(path, split)
  entries = _read_ledger(path, split)
  rows = _noted_rows(path, split, entries)
  if rows is None:
    rows = _read_index(dataset, cache)
  if entries:
    rows = [
      row | {"labels": entries[row["video_id"]]["labels"]} for row in rows
    ]
  videos: dict[str, dict] = {}
  segments = collections.defaultdict(list)
  for number, row in enumerate(rows):
    first = videos.setdefault(row["video_id"], row)
    for key in ("subject_id", "labels"):
      if row[key] != first[key]:
        raise DatasetError(
          f"{path}: records of video '{row['video_id']}' differ in {key}: "
          f"{first[key]} and {row[key]}; prepare the data set again"
        )
    segments[row["video_id"], row["track_id"]].append(
      (row["segment"], number, row["num_frames"], row["side"])
    )
  video_ids = sorted(videos)
  video_numbers = {video_id: i for i, video_id in enumerate(video_ids)}
  tracks: list[TrackRecords] = []
  for (video_id, _), track_segments in sorted(segments.items()):
    _, numbers, lengths, sides = zip(*sorted(track_segments), strict=True)
    side = float(np.median(np.repeat(sides, lengths)))
    track = TrackRecords(video_numbers[video_id], numbers, lengths, side)
    if all_tracks or not tracks or tracks[-1].video != track.video:
      tracks.append(track)
    elif track.prominence > tracks[-1].prominence:
      tracks[-1] = track
  return Split(
    dataset=dataset,
    video_ids=tuple(video_ids),
    subject_ids=tuple(videos[i]["subject_id"] for i in video_ids),
    labels=_stacked([videos[i]["labels"] for i in video_ids]),
    tracks=tuple(tracks),
    parts=_parts(path, split, tracks),
    num_without=sum(not entry["num_records"] for entry in entries.values()),
  )


def _parts(
  path: str, split: str, tracks: Iterable[TrackRecords]
) -> tuple[str, ...]:
  """Returns the one of the joined splits that holds each video."""
  names = prepared_dataset.split_names(split)
  lengths = [
    prepared_dataset.open_dataset(path, name).num_records for name in names
  ]
  ends = np.cumsum(lengths)
  first = {track.video: track.records[0] for track in tracks}
  places = np.searchsorted(ends, [first[v] for v in sorted(first)], "right")
  return tuple(names[place] for place in places)


def _read_ledger(path: str, split: str) -> dict[str, dict[str, Any]]:
  """Returns the ledger's line of each video by name; {} without a ledger."""
  file = epath.Path(path) / VIDEOS
  if not file.exists():
    return {}
  names = prepared_dataset.split_names(split)
  with file.open() as lines:
    entries = map(json.loads, lines)
    return {
      e["video_id"]: {key: e.get(key) for key in _OF_LEDGER}
      for e in entries
      if e["split"] in names
    }


def _noted_rows(
  path: str, split: str, entries: dict[str, dict[str, Any]]
) -> list[dict] | None:
  """Returns the rows of `_read_records`, without labels and without reading.

  None if ledger and segment index do not note all of it, or do not agree.
  """
  rows: list[dict] = []
  for name in prepared_dataset.split_names(split):
    index = segment_indexing.find_index(
      prepared_dataset.open_dataset(path, name)
    )
    video_ids = sorted(
      video_id
      for video_id, entry in entries.items()
      if entry["split"] == name and entry["num_records"]
    )
    if index is None or index.by_name is None:
      return None
    if len(video_ids) != index.num_videos:
      return None
    # From the order of names to that of records.
    for place in np.argsort(index.by_name):
      entry = entries[video_ids[place]]
      tracks = collections.Counter()
      for segment in entry["segments"] or ((),):
        if len(segment) < 3:
          return None
        track_id, num_frames, side = segment
        rows.append(
          {
            "video_id": video_ids[place],
            "track_id": track_id,
            "segment": tracks[track_id],
            "subject_id": entry["subject_id"],
            "num_frames": num_frames,
            "side": side,
          }
        )
        tracks[track_id] += 1
    first = len(rows) - index.num_records
    noted = [(row["track_id"], row["num_frames"]) for row in rows[first:]]
    stored = zip(index.tracks.tolist(), index.frames.tolist(), strict=True)
    if noted != list(stored):
      return None
  return rows


def _stacked(rows: list[dict[str, list]]) -> dict[str, np.ndarray]:
  """Stacks the labels of each video to (V, K) by name; NaN where missing."""
  widths = {name: len(values) for row in rows for name, values in row.items()}
  return {
    name: np.array(
      [row.get(name, [None] * width) for row in rows], np.float32
    ).reshape(len(rows), width)
    for name, width in sorted(widths.items())
  }


def _read_index(dataset: Dataset, cache: Path | None) -> list[dict]:
  """Returns the fields of each record but its pixels, in order."""
  if cache is None:
    return _read_records(dataset)
  path = cache / f"index-{dataset.split}-{dataset.fingerprint[:16]}.json"
  header = {"version": _INDEX_VERSION, "fingerprint": dataset.fingerprint}
  if path.exists():
    index = json.loads(path.read_text())
    if index["header"] == header:
      return index["records"]
  rows = _read_records(dataset)
  cache.mkdir(parents=True, exist_ok=True)
  write_bytes(path, json.dumps({"header": header, "records": rows}).encode())
  return rows


def _read_records(dataset: Dataset) -> list[dict]:
  source = dataset.source
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(
      tqdm(
        pool.map(lambda i: _row(source[i][1]), range(len(source))),
        desc=f"labels of {dataset.split}",
        total=len(source),
        unit="record",
        mininterval=1.0,
      )
    )


def _row(record: schema.Record) -> dict:
  return {
    "video_id": record.video_id,
    "track_id": record.track_id,
    "segment": record.segment,
    "subject_id": record.subject_id,
    "num_frames": len(record),
    "side": schema.median_side(record),
    # None instead of NaN, which differs from itself and is not JSON.
    "labels": {
      name: [None if np.isnan(x) else float(x) for x in np.ravel(values)]
      for name, values in record.labels.items()
    },
  }


def split_warnings(splits: Iterable[Split]) -> list[str]:
  """Returns a line for each way in which splits are not independent."""
  splits = list(splits)
  lines = [
    line
    for first, second in itertools.combinations(splits, 2)
    for line in shared_warnings(first, second)
  ]
  num_unknown = sum(not who for split in splits for who in split.subject_ids)
  if num_unknown:
    lines.append(
      f"the person is unknown in {num_unknown} of {sum(map(len, splits))} "
      "videos: splits may share people, and intervals hold for new videos, not "
      "for new people"
    )
  return lines


def record_warnings(split: Split) -> Iterator[str]:
  """Yields a line if videos of a split have no record, and so no score."""
  if split.num_without:
    yield (
      f"left out: {counted(split.num_without, 'video')} of '{split.name}' "
      "without a record, such as those that show no face"
    )


def shared_warnings(first: Split, second: Split) -> Iterator[str]:
  """Yields a line for each kind of thing that two splits share."""
  datasets = first.dataset, second.dataset
  if len({(dataset.path, dataset.split) for dataset in datasets}) == 1:
    yield (
      f"split '{first.name}' is used twice: choices made on it make its own "
      "scores too high"
    )
    return
  other = ", if they are the same in both data sets"
  if datasets[0].path == datasets[1].path:
    other = ""
  for field, noun in (("subject_ids", "person"), ("video_ids", "video")):
    common = {*getattr(first, field)} & {*getattr(second, field)} - {""}
    if common:
      yield (
        f"'{first.name}' and '{second.name}' share "
        f"{counted(len(common), noun)} (e.g. {min(common)!r}): scores on "
        f"'{second.name}' are too high{other}"
      )


def labels_sha256(splits: Iterable[Split], label: str) -> str:
  """Returns a hash of the videos, people and labels of each split."""
  digest = hashlib.sha256()
  for split in splits:
    names = [split.name, split.video_ids, split.subject_ids]
    digest.update(json.dumps(names).encode())
    digest.update(split.labels[label].astype("<f4").tobytes())
  return digest.hexdigest()


# --- Videos of a task ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskSplit:
  """Videos of a split whose label a task knows.

  Attributes:
    split: all videos of the split.
    rows: int (V,), numbers of the task's videos in the split.
    targets: targets of these videos; see `Task.targets`.
  """

  split: Split
  rows: np.ndarray
  targets: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def video_ids(self) -> list[str]:
    return [self.split.video_ids[row] for row in self.rows]

  @property
  def people(self) -> list[str]:
    return [self.split.people[row] for row in self.rows]

  @property
  def positions(self) -> np.ndarray:
    """Where each video of `split` stands in `rows`, int; -1 if it does not."""
    positions = np.full(len(self.split), -1)
    positions[self.rows] = np.arange(len(self))
    return positions

  def subset(self, indices: np.ndarray) -> TaskSplit:
    """Returns some of the videos; `indices` count from 0 within the task."""
    return TaskSplit(self.split, self.rows[indices], self.targets[indices])


def task_split(task: Task, split: Split) -> TaskSplit:
  """Selects the videos of a split that a task is about.

  Raises:
    TaskError: the label is unknown for all videos.
  """
  values = split.labels.get(task.label)
  if values is None:
    values = np.full((len(split), 1), np.nan)
  rows = np.flatnonzero(task.chosen(values))
  if not len(rows):
    raise TaskError(
      f"task '{task.name}': label '{task.label}' is unknown for all "
      f"{len(split)} videos of split '{split.name}'"
    )
  return TaskSplit(split, rows, task.targets(values[rows]))


def label_warnings(task: Task, videos: TaskSplit, where: str = "") -> list[str]:
  """Returns a line if videos do not show what a task is about.

  Such are classes that none of them has, and labels that all or none have.

  Args:
    task: task of the videos.
    videos: the videos.
    where: names them in the line; '': by their split.
  """
  if task.is_value:
    return []
  labels = task.as_labels(videos.targets)
  values = (1,) if task.is_class else (0, 1)
  shown = np.all([(labels == value).any(axis=0) for value in values], axis=0)
  names = list(itertools.compress(task.names, ~shown))
  if not names:
    return []
  some = ", ".join(names[:_MAX_NAMES])
  if len(names) > _MAX_NAMES:
    some += f" and {len(names) - _MAX_NAMES} more"
  how = "in no video" if task.is_class else "alike in all videos"
  where = where or f"'{videos.split.name}'"
  return [f"task '{task.name}': {how} of {where}: {some}"]
