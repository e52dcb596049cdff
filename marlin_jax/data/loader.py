"""Input pipeline: records on disk to batches on devices.

The clips of a step are a function of the seed and the step alone (sampling.py),
independent of the number of processes or threads and of earlier restarts. A run
therefore resumes by starting at its step, and no iterator state is saved
(grain's own is tied to the number of workers and accepts another data set
silently).

Axes: B batch, T frames, H W pixels, S pixels of a square picture.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np
from etils import epath

from marlin_jax.data import augmentation
from marlin_jax.data.augmentation import Augmentation, View
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import Dataset, DatasetError
from marlin_jax.data.sampling import Draw, Draws, SpreadDraws
from marlin_jax.records import schema

Batch = dict[str, np.ndarray]


class ClipTaker(Protocol):
  """Turns records into clips of a batch.

  A batch holds at least `_id` int32 (B,), the numbers of the records, and
  `start` int32 (B,), the first frame of each clip in its record. Reading is cut
  into phases, so that frames of all clips are decoded last.
  """

  def empty(self, num_clips: int) -> Batch:
    """Allocates a batch."""

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Draws clips of a record and fills a batch slice, except for the frames.

    Args:
      clips: slice of a batch from `empty`.
      index: number of the record.
      record: the record.
      np_rng: makes all draws.

    Returns:
      Frames of the record to decode, clip by clip.

    Raises:
      DatasetError: the record has no such clips.
    """

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Decodes the frames that `choose` returned into the batch slice.

    Raises:
      DatasetError: the record is damaged.
    """


def decode_video(
  video: np.ndarray, index: int, record: schema.Record, frames: Sequence[int]
) -> None:
  """Decodes frames of a record into an array.

  Args:
    video: uint8 (B, T, H, W, 3), filled in place.
    index: number of the record.
    record: the record.
    frames: B * T frame numbers.

  Raises:
    DatasetError: the record is damaged.
  """
  with _damage_named(index):
    schema.decode_frames(record, frames, video.reshape(-1, *video.shape[2:]))


@contextlib.contextmanager
def _damage_named(index: int) -> Iterator[None]:
  """Turns ValueErrors into DatasetErrors that name the record."""
  try:
    yield
  except ValueError as e:
    raise DatasetError(f"record {index} is damaged: {e}") from e


@dataclasses.dataclass(frozen=True)
class TakeClip:
  """Takes clips of decoded frames and their regions; a `ClipTaker`.

  A batch also holds `video` uint8 (B, T, S, S, 3), `regions` uint16
  (B, T / tubelet_size, h, w), the region bits of each tubelet's first frame,
  and `_view` int32 (B, 5), the view of each clip as a row.

  Attributes:
    clip: number of frames and stride.
    tubelet_size: frames per token.
    frame_size: S, height and width of a frame in pixels.
    patch_size: height and width of a token in pixels.
    needs_regions: if False, `regions` is 0: label maps need not be read.
    augmentation: random changes of the clips.
  """

  clip: Clip
  tubelet_size: int
  frame_size: int = schema.FRAME_SIZE
  patch_size: int = schema.PATCH_SIZE
  needs_regions: bool = True
  augmentation: Augmentation = Augmentation()

  def without_augmentation(self) -> TakeClip:
    return dataclasses.replace(self, augmentation=Augmentation())

  @property
  def longest_clip(self) -> Clip:
    """The clip of the greatest stride."""
    stride = self.clip.stride + self.augmentation.stride_jitter
    return dataclasses.replace(self.clip, stride=stride)

  @property
  def grid_size(self) -> int:
    """Patches along a side of a frame."""
    return self.frame_size // self.patch_size

  def empty(self, num_clips: int) -> Batch:
    """Returns an empty batch; see `ClipTaker.empty`."""
    num_frames, grid = self.clip.num_frames, 2 * (self.grid_size,)
    num_tubelets = num_frames // self.tubelet_size
    frame = (self.frame_size, self.frame_size, 3)
    return {
      "video": np.empty((num_clips, num_frames, *frame), np.uint8),
      "regions": np.zeros((num_clips, num_tubelets, *grid), np.uint16),
      "_id": np.empty(num_clips, np.int32),
      "start": np.empty(num_clips, np.int32),
      "_view": np.empty((num_clips, len(View().row)), np.int32),
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Draws clips from random starts; see `ClipTaker.choose`."""
    clip = self.augmentation.draw_clip(self.clip, np_rng)
    num_clips = len(clips["start"])
    starts = clip.random_starts(len(record), num_clips, np_rng)
    return self._take(clips, index, record, clip, starts, np_rng)

  def place(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    starts: np.ndarray,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Takes the clips that begin at `starts`; else as `ClipTaker.choose`."""
    clip = self.augmentation.draw_clip(self.clip, np_rng)
    return self._take(clips, index, record, clip, starts, np_rng)

  def _take(self, clips, index, record, clip, starts, np_rng) -> list[int]:
    frames = clip.indices(starts[:, None], len(record))  # (B, T)
    views = [self.augmentation.draw_view(np_rng) for _ in frames]
    if self.needs_regions:
      with _damage_named(index):
        clips["regions"][:] = augmentation.region_bits(
          record, frames[:, :: self.tubelet_size], views, self.grid_size
        )
    clips["_id"][:] = index
    clips["start"][:] = starts
    clips["_view"][:] = [view.row for view in views]
    return frames.ravel().tolist()

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Decodes `video`; see `ClipTaker.decode`."""
    video = clips["video"]
    views = [View.from_row(row) for row in clips["_view"]]
    with _damage_named(index):
      augmentation.decode(
        record, np.reshape(frames, video.shape[:2]), views, video
      )


class BadRecords:
  """List of unusable records, kept in a quarantine file.

  The file has one JSON line per record: number, data set and reason.
  """

  def __init__(self, path: epath.PathLike, limit: int):
    """Reads the records that earlier runs listed.

    Args:
      path: the quarantine file; it is created with the first record.
      limit: number of records to tolerate.
    """
    self._path, self._limit = epath.Path(path), limit
    # Reader threads share the list.
    self._lock = threading.Lock()
    lines = self._path.read_text().splitlines() if self._path.exists() else ()
    self._rows = {_key(row): row for row in map(json.loads, lines)}

  def add(self, dataset: Dataset, index: int, error: DatasetError) -> None:
    """Adds a record to the list and rewrites the file.

    Args:
      dataset: split of the record.
      index: number of the record in the split.
      error: reason why it cannot be read.

    Raises:
      DatasetError: the list is longer than the limit.
    """
    row = {
      "record": index,
      "split": dataset.split,
      "path": dataset.path,
      "data": dataset.fingerprint,
      "reason": str(error),
    }
    with self._lock:
      if _key(row) not in self._rows:
        self._rows[_key(row)] = row
        lines = (f"{json.dumps(row)}\n" for row in self._rows.values())
        # Rewrites the file, because buckets do not support appending.
        self._path.write_text("".join(lines))
      if len(self._rows) > self._limit:
        raise DatasetError(
          f"{error}\nUnusable records so far: {len(self._rows)}, and "
          f"config.data.max_bad_records is {self._limit}. They are listed in "
          f"{self._path}. Copy or prepare the data set again, or raise the "
          "limit to continue without them."
        ) from error


def _key(row: dict) -> tuple[str, int]:
  return row["data"], row["record"]


# Phases of a record: read, parse, choose, decode.
_NUM_PHASES = 4


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads a batch of clips for a list of draws.

  Records that cannot be read are replaced: the draw is repeated until its
  records can be. The clips are a function of the draw alone, whether or not a
  record is listed as unusable already, so that a resumed run reads the same
  clips.
  """

  draws: Draws
  take_clip: ClipTaker
  bad: BadRecords | None = None

  def __call__(self, positions: Sequence[int]) -> Batch:
    n = self.draws.num_clips
    batch = self.take_clip.empty(n * len(positions))
    # Phase by phase for all records: decoding a clip evicts the CPU caches, and
    # the phases after it would take up to 8 times as long.
    fillers = [
      self._fill(
        {k: x[i * n : (i + 1) * n] for k, x in batch.items()}, position
      )
      for i, position in enumerate(positions)
    ]
    for _ in range(_NUM_PHASES):
      for filler in fillers:
        next(filler, None)
    # Replacements of unusable records need more phases.
    for filler in fillers:
      collections.deque(filler, maxlen=0)
    return batch

  def _fill(self, clips: Batch, position: int) -> Iterator[None]:
    """Fills a batch slice; yields after each phase of a record but the last."""
    for attempt in range(self.draws.num_attempts):
      draw = self.draws(position, attempt)
      dataset = self.draws.datasets[draw.dataset]
      source, (number, *_) = dataset.source, draw.records
      records: list[schema.Record] = []
      try:
        data = [source.read(i) for i in draw.records]
        yield
        records += map(source.parse, draw.records, data)
        del data
        record = schema.joined(records)
        yield
        frames = self._choose(clips, number, record, draw)
        yield
        self.take_clip.decode(clips, number, record, frames)
        return
      except DatasetError as e:
        if self.bad is None:
          raise
        self.bad.add(dataset, _blamed(draw.records, records), e)
    raise DatasetError(f"{source} has no record that can be read")

  def _choose(self, clips, number, record, draw: Draw) -> list[int]:
    np_rng = np.random.default_rng(draw.seed)
    if draw.starts is not None:
      return self.take_clip.place(clips, number, record, draw.starts, np_rng)
    return self.take_clip.choose(clips, number, record, np_rng)


def _blamed(numbers: Sequence[int], records: Sequence[schema.Record]) -> int:
  """Returns the number of the record that is damaged.

  Args:
    numbers: records of a draw that cannot be used.
    records: those among them, from the first, that could be parsed.
  """
  if len(records) < len(numbers):
    return numbers[len(records)]
  for number, record in zip(numbers[1:], records[1:], strict=True):
    try:
      schema.decode_frames(record, range(len(record)))
    except ValueError:
      return number
  return numbers[0]


def own_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that this process's devices hold.

  Processes whose devices share clips, along mesh.tensor, have the same rows.
  """
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return sorted({i for (rows,) in slices for i in range(batch_size)[rows]})


class _Batches:
  """Grain source: maps a step to this process's rows of the batch."""

  def __init__(self, read: _Reader, batch_size: int, rows: Sequence[int]):
    """Determines which draws of a batch this process reads.

    Args:
      read: reads draws; each gives `draws.num_clips` consecutive rows.
      batch_size: clips per step over all processes.
      rows: this process's rows of each batch, from `own_rows`.
    """
    self._read = read
    n = read.draws.num_clips
    self._per_step = batch_size // n
    # Processes that share a draw read all of it, so that they agree on whether
    # it is readable.
    self._draw_numbers = sorted({row // n for row in rows})
    read_rows = [n * draw + i for draw in self._draw_numbers for i in range(n)]
    index_of = {row: i for i, row in enumerate(read_rows)}
    self._own = (
      None if list(rows) == read_rows else [index_of[row] for row in rows]
    )

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, step: int) -> Batch:
    first = step * self._per_step
    batch = self._read([first + i for i in self._draw_numbers])
    if self._own is None:
      return batch
    return {key: x[self._own] for key, x in batch.items()}


def train_batches(
  draws: Draws,
  take_clip: ClipTaker,
  *,
  batch_size: int,
  start_step: int,
  num_threads: int,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of every global batch, endlessly.

  Args:
    draws: the clips of the run. `draws.num_clips` consecutive clips are from
      one record (repeated sampling: Hoffer et al., CVPR 2020; MAE-ST, NeurIPS
      2022; VideoMAE, NeurIPS 2022); it divides batch_size.
    take_clip: turns records into clips.
    batch_size: clips per step over all processes.
    start_step: steps already taken.
    num_threads: reader threads; each makes whole batches.
    rows: rows of this process, from `own_rows`; None: all.
    bad: list for unreadable records, which are then replaced by other records;
      None: the first unreadable record raises.

  Yields:
    Dicts of arrays with one clip per row.

  Raises:
    DatasetError: a record is unreadable, or `bad` holds more than its limit.
  """
  batches = _Batches(
    _Reader(draws, take_clip, bad),
    batch_size,
    range(batch_size) if rows is None else rows,
  )
  # The buffer evens out slow reads.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  remaining = grain.MapDataset.source(batches)[start_step:]
  return iter(remaining.to_iter_dataset(options))


def eval_batches(
  dataset: Dataset,
  take_clip: ClipTaker,
  *,
  batch_size: int,
  num_batches: int,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[Batch]:
  """Yields the same clips on every call, from records spread over the split.

  If there are fewer records than clips, records repeat with other starts.

  Args:
    dataset: data set to read.
    take_clip: turns records into clips.
    batch_size: clips per batch over all processes.
    num_batches: number of batches.
    rows: rows of this process, from `own_rows`; None: all.
    bad: list for unreadable records; see `train_batches`.

  Yields:
    Dicts of arrays with one clip per row.

  Raises:
    DatasetError: as for `train_batches`.
  """
  num_clips = batch_size * num_batches
  read = _Reader(SpreadDraws(dataset, num_clips), take_clip, bad)
  rows = range(batch_size) if rows is None else rows
  for first in range(0, num_clips, batch_size):
    yield read([first + row for row in rows])


def to_devices(
  batches: Iterable[Batch],
  sharding: jax.sharding.Sharding,
  *,
  ahead: int = 1,
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches on devices; copies `ahead` batches in advance.

  Args:
    batches: this process's rows of each global batch.
    sharding: sharding of the global batch.
    ahead: batches to copy before they are needed.
  """
  queue = collections.deque()
  for batch in batches:
    queue.append(
      {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
      }
    )
    if len(queue) > ahead:
      yield queue.popleft()
  yield from queue
