"""Index of the tracks, videos and subjects of a split's records.

NAME-SPLIT.segments.npy lies beside the split's shards. Training draws clips of
videos and subjects by it, without reading a record and without loading the
index: it is memory-mapped. Evaluations match it with the ledger, which holds
names and labels. The file holds six int32 arrays (mapped_arrays.py), of which
the last is missing in files of earlier versions.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import io
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from marlin_jax.records import mapped_arrays

_DTYPE = np.dtype("<i4")


class Video(NamedTuple):
  """Records of a video.

  Attributes:
    subject_id: identity of the person; '' if unknown.
    segments: (track_id, number of frames) of each record, in order; other
      values that follow are left out.
    video_id: name of the video.
  """

  subject_id: str
  segments: Sequence[Sequence[float]]
  video_id: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentIndex:
  """Arrays of a split; N records of V videos of S subjects, all int32.

  A copy in another process maps the file again.

  Records are numbered in the order of shards and of records in a shard. The
  records of a video follow each other, and those of a track are in the order of
  time. A video of an unknown person counts as a subject of its own.

  Attributes:
    tracks: (N,), track of each record, numbered in its video.
    frames: (N,), frames of each record.
    first_records: (V + 1,), first record of each video, and N.
    videos: (V,), videos ordered by subject.
    first_videos: (S + 1,), first place in `videos` of each subject, and V.
    by_name: (V,), videos ordered by video_id; None in files of earlier
      versions.
    path: the file.
  """

  tracks: np.ndarray
  frames: np.ndarray
  first_records: np.ndarray
  videos: np.ndarray
  first_videos: np.ndarray
  by_name: np.ndarray | None
  path: str

  def __reduce__(self):
    return open_index, (self.path,)

  @functools.cached_property
  def subjects(self) -> np.ndarray:
    """(V,), subject of each video."""
    subjects = np.empty(self.num_videos, _DTYPE)
    num_videos = np.diff(self.first_videos)
    subjects[self.videos] = np.repeat(np.arange(len(num_videos)), num_videos)
    return subjects

  @property
  def num_records(self) -> int:
    return len(self.frames)

  @property
  def num_videos(self) -> int:
    return len(self.videos)

  @property
  def num_subjects(self) -> int:
    return len(self.first_videos) - 1


def name_for(shard: str) -> str:
  """Returns the name of the index, given any shard of its split."""
  return f"{shard.partition('.array_record-')[0]}.segments.npy"


def pack(videos: Iterable[Video]) -> bytes:
  """Returns the bytes of the index.

  Args:
    videos: videos with records, in the order of the records.
  """
  # Arrays of the standard library grow without a Python object for each number.
  tracks, frames, first_records = (array.array("i") for _ in range(3))
  subject_of, subjects, names = array.array("i"), {}, []
  for i, video in enumerate(videos):
    names.append(video.video_id)
    first_records.append(len(frames))
    for track, num_frames, *_ in video.segments:
      tracks.append(track)
      frames.append(num_frames)
    # No subject_id is an int.
    subject = subjects.setdefault(video.subject_id or i, len(subjects))
    subject_of.append(subject)
  first_records.append(len(frames))
  subject_of = np.array(subject_of, int)
  arrays = (
    tracks,
    frames,
    first_records,
    np.argsort(subject_of, kind="stable"),
    np.cumsum([0, *np.bincount(subject_of)]),
    sorted(range(len(names)), key=names.__getitem__),
  )
  return mapped_arrays.pack(np.asarray(values, _DTYPE) for values in arrays)


def without_names(data: bytes) -> bytes:
  """Returns the bytes that earlier versions wrote for the same records."""
  file = io.BytesIO(data)
  for _ in range(5):
    np.load(file, allow_pickle=False)
  return data[: file.tell()]


def open_index(path: str | os.PathLike) -> SegmentIndex:
  """Returns a memory-mapped index.

  Args:
    path: a local file.

  Raises:
    ValueError: the file is not an index, or it is damaged.
    OSError: the file cannot be read.
  """
  arrays = mapped_arrays.open_arrays(path)
  dtypes = {array.dtype for array in arrays}
  if len(arrays) not in (5, 6) or dtypes != {_DTYPE}:
    raise ValueError(
      f"it holds {len(arrays)} arrays of {dtypes}, expected 6 of {_DTYPE}"
    )
  by_name = arrays[5] if len(arrays) == 6 else None
  index = SegmentIndex(*arrays[:5], by_name, path=os.fspath(path))
  lengths = {
    "tracks": len(index.tracks) == index.num_records,
    "first_records": len(index.first_records) == index.num_videos + 1
    and index.first_records[-1] == index.num_records,
    "first_videos": len(index.first_videos) > 0
    and index.first_videos[-1] == index.num_videos,
    "by_name": by_name is None or len(by_name) == index.num_videos,
  }
  wrong = [name for name, is_right in lengths.items() if not is_right]
  if wrong:
    raise ValueError(f"its arrays do not fit each other: {', '.join(wrong)}")
  return index


def places_in_tracks(
  tracks: np.ndarray, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where each record begins in its track, and the track's length.

  Args:
    tracks: (K,), tracks of the records of a video.
    frames: (K,), frames of each.

  Returns:
    Two int arrays (K,), in frames.
  """
  order = np.argsort(tracks, kind="stable")
  ordered, ends = tracks[order], np.cumsum(frames[order])
  last = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
  num_records = np.diff(last, prepend=-1)
  track_ends = ends[last]
  lengths = np.diff(track_ends, prepend=0)
  first, total = np.empty((2, len(frames)), int)
  first[order] = (
    ends - frames[order] - np.repeat(track_ends - lengths, num_records)
  )
  total[order] = np.repeat(lengths, num_records)
  return first, total
