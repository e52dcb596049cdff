"""The labelled videos of a data set: who, what, and where their windows lie.

Axes: V videos, K labels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from marlin_jax.data import prepared_dataset
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import Dataset, DatasetError, RecordSource
from marlin_jax.records import schema
from marlin_jax.records.folders import write_bytes

# Raised whenever the meaning of an index file changes.
_INDEX_VERSION = 1
_NUM_THREADS = 8


class Track(NamedTuple):
  """A face track: the records it was cut into, in order.

  Attributes:
    video: number of its video.
    records: numbers of its records in the split.
    lengths: frames of each.
  """

  video: int
  records: tuple[int, ...]
  lengths: tuple[int, ...]

  @property
  def num_frames(self) -> int:
    return sum(self.lengths)


class Window(NamedTuple):
  """A clip of a track: number of the track, and its first frame there."""

  track: int
  start: int


@dataclasses.dataclass(frozen=True)
class Split:
  """One split, by video.

  Attributes:
    dataset: where the records are.
    video_ids: V of them, sorted.
    subject_ids: who is in each; '' where unknown.
    labels: float32 (V, K) by label; NaN where unknown.
    tracks: of all videos, in their order.
  """

  dataset: Dataset
  video_ids: tuple[str, ...]
  subject_ids: tuple[str, ...]
  labels: Mapping[str, np.ndarray]
  tracks: tuple[Track, ...]

  def __len__(self) -> int:
    return len(self.video_ids)

  @property
  def name(self) -> str:
    return self.dataset.split

  @functools.cached_property
  def people(self) -> list[str]:
    """Who is in each video; one whom nobody knows is taken for a new one."""
    return [
      f"subject {who}" if who else f"video {video}"
      for who, video in zip(self.subject_ids, self.video_ids, strict=True)
    ]

  def windows(self, clip: Clip) -> list[Window]:
    """The windows that cover each track, by the one rule: in video.Clip."""
    return [
      Window(number, int(start))
      for number, track in enumerate(self.tracks)
      for start in clip.window_starts(track.num_frames)
    ]

  def video_of(self, windows: Iterable[Window]) -> np.ndarray:
    """int (W,): the video of each window."""
    return np.array([self.tracks[w.track].video for w in windows], int)


def open_split(
  path: str, split: str, cache: Path | None, *, all_tracks: bool = False
) -> Split:
  """Opens a split of a prepared data set.

  All records are read once, for their labels; what was found is kept.

  Args:
    path: directory of the data set.
    split: 'train', 'val', 'test', ...
    cache: folder for what was found; None: it is not kept.
    all_tracks: take every face; else of each video the track that is longest,
      as `Marlin.extract_video` does.

  Raises:
    DatasetError: there is no such split, or it is damaged, or the records of a
      video do not agree on who is in it or what is true of it.
  """
  dataset = prepared_dataset.open_dataset(path, split)
  rows = _read_index(dataset, cache)
  videos: dict[str, dict] = {}
  tracks = collections.defaultdict(list)
  for number, row in enumerate(rows):
    first = videos.setdefault(row["video_id"], row)
    for key in ("subject_id", "labels"):
      if row[key] != first[key]:
        raise DatasetError(
          f"{path}: records of video '{row['video_id']}' differ in {key}: "
          f"{first[key]} and {row[key]}; prepare the data set again"
        )
    place = (row["video_id"], row["track_id"])
    tracks[place].append((row["segment"], number, row["num_frames"]))
  ids = sorted(videos)
  numbers = {video_id: i for i, video_id in enumerate(ids)}
  kept = []
  for (video_id, _), segments in sorted(tracks.items()):
    _, own, lengths = zip(*sorted(segments), strict=True)
    track = Track(numbers[video_id], own, lengths)
    if all_tracks or not kept or kept[-1].video != track.video:
      kept.append(track)
    elif track.num_frames > kept[-1].num_frames:
      kept[-1] = track
  return Split(
    dataset=dataset,
    video_ids=tuple(ids),
    subject_ids=tuple(videos[i]["subject_id"] for i in ids),
    labels=_stacked([videos[i]["labels"] for i in ids]),
    tracks=tuple(kept),
  )


def _stacked(rows: list[dict[str, list]]) -> dict[str, np.ndarray]:
  """Labels of each video -> (V, K) by name; NaN where a video has none."""
  widths = {name: len(values) for row in rows for name, values in row.items()}
  return {
    name: np.array(
      [row.get(name, [None] * width) for row in rows], np.float32
    ).reshape(len(rows), width)
    for name, width in sorted(widths.items())
  }


def _read_index(dataset: Dataset, cache: Path | None) -> list[dict]:
  """What each record says of itself but for pixels, in order."""
  if cache is None:
    return _read_records(dataset)
  path = cache / f"index-{dataset.split}-{dataset.fingerprint[:16]}.json"
  header = {"version": _INDEX_VERSION, "fingerprint": dataset.fingerprint}
  if path.exists():
    found = json.loads(path.read_text())
    if found["header"] == header:
      return found["records"]
  rows = _read_records(dataset)
  cache.mkdir(parents=True, exist_ok=True)
  write_bytes(path, json.dumps({"header": header, "records": rows}).encode())
  return rows


def _read_records(dataset: Dataset) -> list[dict]:
  source = RecordSource(dataset)
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
    # NaN is not equal to itself, nor is it JSON.
    "labels": {
      name: [None if np.isnan(x) else float(x) for x in np.ravel(values)]
      for name, values in record.labels.items()
    },
  }


def shared(splits: Iterable[Split]) -> list[str]:
  """What must not be in two splits and is: a line for each pair of splits."""
  splits = list(splits)
  lines = []
  for i, one in enumerate(splits):
    for other in splits[i + 1 :]:
      if one.name == other.name:
        lines.append(
          f"'{one.name}' serves two purposes: what was chosen on it looks "
          "better on it than elsewhere"
        )
        continue
      for what, name in (("subject_ids", "people"), ("video_ids", "videos")):
        both = {*getattr(one, what)} & {*getattr(other, what)} - {""}
        if both:
          lines.append(
            f"'{one.name}' and '{other.name}' share {len(both)} {name} (e.g. "
            f"{min(both)!r}): scores on '{other.name}' are too high"
          )
  unknown = sum(not who for split in splits for who in split.subject_ids)
  if unknown:
    lines.append(
      f"who is in {unknown} of {sum(map(len, splits))} videos is unknown: "
      "splits may share people all the same, and intervals are for new videos, "
      "not for new people"
    )
  return lines


def sha256_of(splits: Iterable[Split], label: str) -> str:
  """Hash of who is in which split and what is true of them."""
  digest = hashlib.sha256()
  for split in splits:
    names = [split.name, split.video_ids, split.subject_ids]
    digest.update(json.dumps(names).encode())
    digest.update(split.labels[label].astype("<f4").tobytes())
  return digest.hexdigest()
