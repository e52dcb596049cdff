"""Which clips a step reads: a function of the seed and the step alone.

A run is a sequence of draws, of which each step takes the next few. A draw
gives one clip, or several of one record; a few draws in a row may be of one
video or subject. Draws are computed from the data set's
description: no record is read, no state is kept, and the numbers of processes
and threads do not enter.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.permutation import (
  Permutation,
  WindowedPermutation,
  mix_bits,
)
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.records import segment_index
from marlin_jax.records.segment_index import SegmentIndex

# Purposes of random numbers, so that each is used once.
_ORDER, _CLIPS, _MIX = 0, 1, 2
# Draws that hold exactly the share of each data set; weights are rounded to it.
_BLOCK = 10_000


class Draw(NamedTuple):
  """Clips to read.

  Attributes:
    records: numbers of the records that hold the clips: consecutive records of
      one track, nearly always one or two.
    seed: seed of what is drawn after reading.
    starts: int (num_clips,), first frame of each clip, counted from the first
      frame of the first record; None: drawn after reading.
    dataset: number of the data set in `Draws.datasets`.
    subject: number of the person in the data set, see `SegmentIndex`; -1 if
      records are drawn without an index.
  """

  records: tuple[int, ...]
  seed: tuple[int, ...]
  starts: np.ndarray | None = None
  dataset: int = 0
  subject: int = -1


class Draws(Protocol):
  """Endless sequence of draws; picklable.

  Attributes:
    datasets: data sets of the records.
    num_clips: clips of each draw.
    clips_per_epoch: one for each video, or for each subject.
    num_attempts: number of attempts after which nothing else can be read.
  """

  datasets: tuple[Dataset, ...]
  num_clips: int
  clips_per_epoch: int
  num_attempts: int

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns the draw at a position, from 0.

    Args:
      position: number of earlier draws of the run.
      attempt: number of draws for this position that could not be read.
    """


class HashedOrder:
  """Order of the units in each pass; takes no memory."""

  def __init__(self, size: int, seed: int, *, window: int = 0):
    """Selects the order.

    Args:
      size: number of units.
      seed: another seed gives another order.
      window: units that are mixed; the order is nearly sequential beyond, see
        `WindowedPermutation`. 0: all of a pass.
    """
    self._size, self._seed, self._window = size, seed, window

  def __call__(self, position: int) -> int:
    """Returns the unit at a position of an endless sequence of passes."""
    num_passes, place = divmod(position, self._size)
    key = self._seed, _ORDER, num_passes
    return _permutation(self._size, key, self._window)(place)


# Threads may be on both sides of the end of a pass, in several data sets.
@functools.lru_cache(maxsize=64)
def _permutation(
  size: int, key: tuple[int, ...], window: int
) -> Callable[[int], int]:
  if window:
    return WindowedPermutation(size, key, window)
  return Permutation(size, key)


class StoredOrder:
  """Order of the units in each pass, stored as a table.

  Runs that began before `HashedOrder` existed resume with it.
  """

  def __init__(self, size: int, seed: int):
    self._size, self._seed = size, seed

  def __call__(self, position: int) -> int:
    """Returns the unit at a position of an endless sequence of passes."""
    num_passes, place = divmod(position, self._size)
    return int(_table(self._size, self._seed, num_passes)[place])


def _table(size: int, seed: int, num_passes: int) -> np.ndarray:
  # lru_cache lets every thread that misses compute.
  with _table_lock:
    return _cached_table(size, seed, num_passes)


_table_lock = threading.Lock()


@functools.lru_cache(maxsize=2)
def _cached_table(size: int, seed: int, num_passes: int) -> np.ndarray:
  np_rng = np.random.default_rng((seed, _ORDER, num_passes))
  return np_rng.permutation(size)


ORDERS = {"hashed": HashedOrder, "stored": StoredOrder}


class RecordDraws:
  """Draws records: each once per pass, whatever video it is of."""

  def __init__(
    self,
    dataset: Dataset,
    seed: int,
    *,
    order: Callable[[int, int], Callable[[int], int]] = HashedOrder,
    num_clips: int = 1,
  ):
    """Shuffles the records.

    Args:
      dataset: data set of the records.
      seed: seed of the order and of the clips.
      order: HashedOrder or StoredOrder.
      num_clips: clips of each record.
    """
    self._dataset, self._seed = dataset, seed
    self._order = order(dataset.num_records, seed)
    self.datasets, self.num_clips = (dataset,), num_clips
    self.clips_per_epoch = dataset.num_videos
    self.num_attempts = dataset.num_records

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns a draw; see `Draws`."""
    place = (self._order(position) + attempt) % self._dataset.num_records
    number = self._dataset.record_number(place)
    return Draw((number,), (self._seed, _CLIPS, position, attempt))


class SpreadDraws:
  """Draws a fixed number of records, evenly spread over the data sets."""

  def __init__(self, datasets: Sequence[Dataset], num_draws: int):
    """Takes turns if there are several data sets.

    Args:
      datasets: data sets of the records.
      num_draws: number of draws, from all of them together.
    """
    self.datasets, self.num_clips = tuple(datasets), 1
    self.clips_per_epoch = num_draws
    self.num_attempts = max(dataset.num_records for dataset in datasets)

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns a draw; see `Draws`. There are no others than `num_draws`."""
    turn, i = divmod(position, len(self.datasets))
    num_turns = -(-self.clips_per_epoch // len(self.datasets))
    num_records = self.datasets[i].num_records
    place = turn * num_records // num_turns + attempt
    number = self.datasets[i].record_number(place % num_records)
    seed = int(np.random.default_rng(position).integers(2**63))
    return Draw((number,), (seed, attempt), dataset=i)


class VideoDraws:
  """Draws videos or subjects: each once per pass.

  Of a subject a video is drawn, each with equal probability. Of a video a clip
  is drawn, each start in each of its tracks with equal probability: a clip may
  begin in one record of a track and end in the next.

  With `draws_per_unit` above 1, that many draws in a row are of one video or
  subject: of different videos of the subject as long as it has some, and within
  a video of one track, so that they show the same person.
  """

  def __init__(
    self,
    dataset: Dataset,
    index: SegmentIndex,
    clip: Clip,
    seed: int,
    *,
    order: Callable[[int, int], Callable[[int], int]] = HashedOrder,
    by_subject: bool = False,
    num_clips: int = 1,
    draws_per_unit: int = 1,
  ):
    """Shuffles the videos or subjects with served records.

    Args:
      dataset: data set of the records.
      index: index of all records of the split.
      clip: number of frames and stride.
      seed: seed of the order and of the clips.
      order: HashedOrder or StoredOrder.
      by_subject: draw subjects, not videos.
      num_clips: clips of a draw. They begin in the same record.
      draws_per_unit: draws in a row of each video or subject.
    """
    self._index, self._clip, self._seed = index, clip, seed
    self._selection = dataset.selection
    self._units = _subjects(index, dataset) if by_subject else _videos(dataset)
    self._by_subject, self._draws_per_unit = by_subject, draws_per_unit
    self._order = order(len(self._units), seed)
    sequence = np.random.SeedSequence((seed, _CLIPS))
    (self._key,) = sequence.generate_state(1, np.uint64).tolist()
    self.datasets, self.num_clips = (dataset,), num_clips
    self.clips_per_epoch = len(self._units)
    # Each attempt draws at random, so that some records are drawn repeatedly
    # before all are tried.
    self.num_attempts = 8 * dataset.num_records

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns a draw; see `Draws`."""
    turn, member = divmod(position, self._draws_per_unit)
    place = (self._order(turn) + attempt) % len(self._units)
    unit = int(self._units[place])
    random = mix_bits(mix_bits(self._key ^ position) ^ attempt)
    # Equal for all draws of the unit.
    shared = None
    if self._draws_per_unit > 1:
      shared = mix_bits(self._key ^ mix_bits(turn))
    video = unit
    if self._by_subject:
      video = self._video_of(unit, random, shared, member)
    if shared is not None:
      shared = mix_bits(shared ^ video)
    records, starts = self._clips_of(video, mix_bits(random), shared)
    return Draw(
      records,
      (self._seed, _CLIPS, position, attempt),
      starts,
      subject=int(self._index.subjects[video]),
    )

  def _video_of(
    self, subject: int, random: int, shared: int | None, member: int
  ) -> int:
    first, stop = self._index.first_videos[subject : subject + 2].tolist()
    videos = self._index.videos[first:stop]
    if self._selection:
      videos = videos[self._selection.videos.mask(videos)]
    if shared is not None:
      random = Permutation(len(videos), (shared,))(member % len(videos))
    return int(videos[random % len(videos)])

  def _clips_of(
    self, video: int, random: int, shared: int | None
  ) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns records and starts of clips of a video.

    Args:
      video: the video.
      random: draws record and start.
      shared: draws the track before; None: they are of any track.
    """
    first, stop = self._index.first_records[video : video + 2].tolist()
    if self._selection:
      numbers = self._selection.records.within(first, stop)
    else:
      numbers = np.arange(first, stop)
    tracks, frames = self._index.tracks[numbers], self._index.frames[numbers]
    begins, totals = segment_index.places_in_tracks(tracks, frames)
    # Clips that begin in each record.
    num_starts = np.clip(self._clip.num_starts(totals) - begins, 0, frames)
    ends = np.cumsum(num_starts)
    if shared is not None:
      i = np.searchsorted(ends, shared % int(ends[-1]), "right")
      num_starts = np.where(tracks == tracks[i], num_starts, 0)
      ends = np.cumsum(num_starts)
    drawn = random % int(ends[-1])
    i = int(np.searchsorted(ends, drawn, "right"))
    starts = self._clip.spread_starts(
      drawn - int(ends[i] - num_starts[i]), int(num_starts[i]), self.num_clips
    )
    # Records of the track up to the last frame of the last clip.
    end = begins[i] + starts.max() + self._clip.span
    is_needed = (tracks == tracks[i]) & (begins >= begins[i]) & (begins < end)
    return tuple(numbers[is_needed].tolist()), starts


def _videos(dataset: Dataset) -> Sequence[int]:
  """Returns the videos with served records."""
  selection = dataset.selection
  return selection.videos if selection else range(dataset.num_videos)


def _subjects(index: SegmentIndex, dataset: Dataset) -> Sequence[int]:
  """Returns the subjects with served records."""
  if not dataset.selection:
    return range(index.num_subjects)
  is_served = dataset.selection.videos.mask(index.videos)
  return np.flatnonzero(
    np.logical_or.reduceat(is_served, index.first_videos[:-1])
  )


class MixedDraws:
  """Draws from several data sets, each with its share of the clips.

  Each block of 10,000 draws holds the share of each data set, in random order.
  Each data set has passes of its own.
  """

  def __init__(
    self,
    parts: Sequence[Draws],
    weights: Sequence[float],
    seed: int,
    draws_per_unit: int = 1,
  ):
    """Rounds the shares.

    Args:
      parts: draws of each data set, with the same `num_clips`.
      weights: weight of each, above 0; its share is its part of their sum.
      seed: seed of the order of the data sets.
      draws_per_unit: draws in a row that are of one data set, as those of a
        unit of each part.
    """
    self._parts, self._seed = tuple(parts), seed
    self._draws_per_unit = draws_per_unit
    # From the ends, so that they sum up to a block.
    ends = np.cumsum(weights) / np.sum(weights)
    self._counts = np.diff(np.rint(_BLOCK * ends), prepend=0).astype(int)
    self.datasets = tuple(
      dataset for part in parts for dataset in part.datasets
    )
    self.num_clips = parts[0].num_clips
    self.clips_per_epoch = sum(part.clips_per_epoch for part in parts)
    self.num_attempts = max(part.num_attempts for part in parts)

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns a draw; see `Draws`."""
    turn, member = divmod(position, self._draws_per_unit)
    number, place = divmod(turn, _BLOCK)
    chosen, ranks = _mixed_block(
      tuple(self._counts.tolist()), self._seed, number
    )
    i = int(chosen[place])
    turn = number * int(self._counts[i]) + int(ranks[place])
    position = turn * self._draws_per_unit + member
    return self._parts[i](position, attempt)._replace(dataset=i)


@functools.lru_cache(maxsize=4)
def _mixed_block(
  counts: tuple[int, ...], seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the data set of each draw of a block, and its rank in that set."""
  np_rng = np.random.default_rng((seed, _MIX, number))
  chosen = np_rng.permutation(np.repeat(np.arange(len(counts)), counts))
  ranks = np.empty(len(chosen), int)
  for i, count in enumerate(counts):
    ranks[chosen == i] = np.arange(count)
  return chosen, ranks


def part_seed(seed: int, part: int) -> int:
  """Returns the seed of one of several data sets."""
  sequence = np.random.SeedSequence((seed, _MIX, part))
  return int(sequence.generate_state(1, np.uint64)[0])


def first_ids(datasets: Sequence[Dataset]) -> list[int]:
  """Returns the number of each data set's first record in the `_id` of batches.

  There, the records of all data sets are numbered consecutively.
  """
  counts = [dataset.stored.num_records for dataset in datasets]
  return [0, *itertools.accumulate(counts[:-1])]
