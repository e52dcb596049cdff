"""Batches of clips of labelled videos, read and decoded by threads.

Axes: B clips, T frames, S pixels of the square picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jax.sharding import Mesh

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.devices import sharding
from marlin_jax.downstream.splits import (
  Split,
  TaskSplit,
  TrackRecords,
  TrackWindow,
)
from marlin_jax.records import schema


def rounded_batch_size(batch_size: int, mesh: Mesh) -> int:
  """Rounds a batch size up, so that batches divide over the devices."""
  num_shards = sharding.num_shards(mesh)
  return math.ceil(batch_size / num_shards) * num_shards


class ClipReader:
  """Reads the pixels of windows."""

  def __init__(
    self, split: Split, clip: Clip, image_size: int = schema.FRAME_SIZE
  ):
    """Opens the shards.

    Args:
      split: split of the windows.
      clip: frames of a window.
      image_size: S.

    Raises:
      DatasetError: the data set holds smaller frames.
    """
    split.dataset.check_frame_size(image_size)
    self._split, self._clip, self._image_size = split, clip, image_size
    self._source = split.dataset.source

  def read(self, windows: Sequence[TrackWindow]) -> np.ndarray:
    """Decodes the clips of B windows.

    Returns:
      uint8 (B, T, S, S, 3), RGB.

    Raises:
      DatasetError: a record is damaged.
    """
    size = self._image_size
    shape = (len(windows), self._clip.num_frames, size, size, 3)
    video = np.empty(shape, np.uint8)
    for out, window in zip(video, windows, strict=True):
      self._read(self._split.tracks[window.track], window.start, out)
    return video

  def _read(self, track: TrackRecords, start: int, out: np.ndarray) -> None:
    frames = self._clip.indices(start, track.num_frames)
    first = 0
    for number, length in zip(track.records, track.lengths, strict=True):
      # Frames ascend, so those of a record are consecutive rows.
      in_record = (frames >= first) & (frames < first + length)
      if in_record.any():
        _, record = self._source[number]
        rows = np.flatnonzero(in_record)
        part = out[rows[0] : rows[-1] + 1]
        try:
          self._split.dataset.check_record(record)
          indices = (frames[in_record] - first).tolist()
          schema.decode_frames(record, indices, part)
        except ValueError as e:
          raise DatasetError(f"record {number} is damaged: {e}") from e
      first += length


class _Groups:
  """Grain source of batches of given windows."""

  def __init__(self, reader, groups):
    self._reader, self._groups = reader, groups

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index: int) -> np.ndarray:
    return self._reader.read(self._groups[index])


class _Drawn:
  """Grain source of a random training batch per step."""

  def __init__(
    self, reader, split, clip, order, batch_size, seed, num_steps, rows
  ):
    self._reader, self._split, self._clip = reader, split, clip
    self._order, self._batch_size, self._seed = order, batch_size, seed
    self._num_steps = num_steps
    self._rows = range(batch_size) if rows is None else rows
    self._tracks: dict[int, list[int]] = {}
    for number, track in enumerate(split.tracks):
      self._tracks.setdefault(track.video, []).append(number)

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    videos = self._order.rows(step, self._batch_size)[self._rows]
    windows = []
    for place, video in zip(self._rows, videos, strict=True):
      np_rng = np.random.default_rng((self._seed, 1, step, place))
      track = int(np_rng.choice(self._tracks[int(video)]))
      total = self._split.tracks[track].num_frames
      start = self._clip.random_starts(total, 1, np_rng)[0]
      windows.append(TrackWindow(track, int(start)))
    return videos, self._reader.read(windows)


class Order:
  """Endless order of examples, shuffled anew for every pass over them."""

  def __init__(self, examples: np.ndarray, seed: int):
    """Takes the numbers of the examples, int (V,)."""
    self._examples, self._seed = examples, seed

  def rows(self, step: int, batch_size: int) -> np.ndarray:
    """Returns the examples of a step, int (B,), a function of seed and step."""
    places = step * batch_size + np.arange(batch_size)
    passes, at = np.divmod(places, len(self._examples))
    orders = {
      p: np.random.default_rng((self._seed, 0, int(p))).permutation(
        self._examples
      )
      for p in np.unique(passes)
    }
    return np.array([orders[p][i] for p, i in zip(passes, at, strict=True)])


class PairedOrder:
  """Order of pairs: a positive example, and a negative one of the same person.

  Positive examples come as in `Order`. The negative one is drawn from those of
  the person, or from all where that person has none.
  """

  def __init__(
    self,
    examples: np.ndarray,
    is_positive: np.ndarray,
    people: Sequence[str],
    seed: int,
  ):
    """Stores the examples.

    Args:
      examples: their numbers, int (V,).
      is_positive: bool (V,); some are, and some are not.
      people: the person in each.
      seed: seed of the draws.
    """
    self._positives = Order(examples[is_positive], seed)
    self._negatives, self._seed = examples[~is_positive], seed
    self._person_of = dict(zip(examples.tolist(), people, strict=True))
    self._of_person: dict[str, list[int]] = {}
    for example in self._negatives.tolist():
      person = self._person_of[example]
      self._of_person.setdefault(person, []).append(example)

  def rows(self, step: int, batch_size: int) -> np.ndarray:
    """Returns the examples of a step, int (B,): pair after pair; B is even."""
    positives = self._positives.rows(step, batch_size // 2)
    negatives = [
      np.random.default_rng((self._seed, 2, step, place)).choice(
        self._of_person.get(self._person_of[int(example)], self._negatives)
      )
      for place, example in enumerate(positives)
    ]
    return np.stack([positives, negatives], axis=1).reshape(-1)


def windows_of(
  videos: TaskSplit, clip: Clip, most: int = 0
) -> tuple[list[TrackWindow], np.ndarray]:
  """Returns windows of videos, and the video of each, int (W,), ascending.

  Args:
    videos: the videos, which the numbers count.
    clip: frames of a window.
    most: most windows of a video, see `spread_windows`; 0: all.
  """
  windows = videos.split.windows(clip)
  owners = videos.positions[videos.split.video_of(windows)]
  known = np.flatnonzero(owners >= 0)
  chosen = known[spread_windows(owners[known], most)]
  return [windows[i] for i in chosen], owners[chosen]


def spread_windows(owners: np.ndarray, most: int) -> np.ndarray:
  """Chooses windows that are spread evenly over each video.

  Args:
    owners: int (W,), the video of each window, ascending.
    most: most windows of a video; 0: all.

  Returns:
    Their numbers, int, ascending.
  """
  _, starts, sizes = np.unique(owners, return_index=True, return_counts=True)
  chosen = [np.zeros(0, int)]
  for start, size in zip(starts, sizes, strict=True):
    num = min(size, most or size)
    # The middles of `num` equal parts.
    chosen.append(start + (2 * np.arange(num) + 1) * size // (2 * num))
  return np.concatenate(chosen)


def window_batches(
  reader: ClipReader,
  windows: Sequence[TrackWindow],
  batch_size: int,
  num_threads: int,
  rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
  """Reads the clips of windows in batches, in order.

  Args:
    reader: reader of the clips.
    windows: windows to read as clips.
    batch_size: B, over all processes.
    num_threads: number of reader threads.
    rows: this process's rows of each batch, from `loader.own_rows`; None: all.

  Yields:
    uint8 (B, T, S, S, 3), or one clip per row; the last batch is filled up with
    copies of its last clip.
  """
  groups = [
    list(windows[i : i + batch_size])
    for i in range(0, len(windows), batch_size)
  ]
  if groups:
    groups[-1] += groups[-1][-1:] * (batch_size - len(groups[-1]))
  if rows is not None:
    groups = [[group[row] for row in rows] for group in groups]
  return _read_ahead(_Groups(reader, groups), 0, num_threads)


def drawn_batches(
  reader: ClipReader,
  split: Split,
  clip: Clip,
  order: Order | PairedOrder,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_steps: int,
  num_threads: int,
  rows: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the videos of each step, int (B,), and a random clip of each.

  With `rows`, as of `window_batches`, those of this process.
  """
  source = _Drawn(reader, split, clip, order, batch_size, seed, num_steps, rows)
  return _read_ahead(source, start_step, num_threads)


def _read_ahead(source, start: int, num_threads: int) -> Iterator:
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  dataset = grain.MapDataset.source(source)[start:]
  return iter(dataset.to_iter_dataset(options))
