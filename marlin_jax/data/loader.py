"""Records on disk to batches on devices, in an order that a step determines.

Which clips a step sees follows from the seed and the step alone: not from the
number of processes, threads or earlier restarts. A run is therefore resumed by
starting at its step, and no iterator state is saved (grain's own is tied to the
number of workers and accepts another data set silently).

Axes: B batch, T frames, H W pixels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from etils import epath

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import Dataset, DatasetError, RecordSource
from marlin_jax.records import schema


@dataclasses.dataclass(frozen=True)
class TakeClip:
  """What a batch holds of a record: clips of decoded frames.

  `video` uint8 (B, T, H, W, 3), `regions` uint16 (B, T / tubelet_size, h, w) of
  each tubelet's first frame, `_id` int32 (B,), the records' numbers, and
  `start` int32 (B,), the clips' first frames in them.
  """

  clip: Clip
  tubelet_size: int

  def empty(self, num_clips: int) -> dict[str, np.ndarray]:
    """A batch to be filled."""
    num_frames, grid = self.clip.num_frames, 2 * (schema.GRID_SIZE,)
    num_tubelets = num_frames // self.tubelet_size
    frame = (schema.FRAME_SIZE, schema.FRAME_SIZE, 3)
    return {
      "video": np.empty((num_clips, num_frames, *frame), np.uint8),
      "regions": np.empty((num_clips, num_tubelets, *grid), np.uint16),
      "_id": np.empty(num_clips, np.int32),
      "start": np.empty(num_clips, np.int32),
    }

  def choose(
    self,
    clips: dict[str, np.ndarray],
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills a part of a batch but for `video`, with clips from random starts.

    Returns:
      The frames of the record that `video` is to show, of all clips in turn.
    """
    total = len(record)
    starts = self.clip.random_starts(total, len(clips["start"]), np_rng)
    frames = self.clip.indices(starts[:, None], total)  # (B, T)
    clips["regions"][:] = record.regions[frames[:, :: self.tubelet_size]]
    clips["_id"][:] = index
    clips["start"][:] = starts
    return frames.ravel().tolist()

  def decode(
    self,
    clips: dict[str, np.ndarray],
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills `video` with what `choose` gave; raises DatasetError."""
    video = clips["video"]
    try:
      schema.decode_frames(record, frames, video.reshape(-1, *video.shape[2:]))
    except ValueError as e:
      raise DatasetError(f"record {index} is damaged: {e}") from e


class BadRecords:
  """Records that turned out to be unusable: each is told of once.

  One line for each goes to a quarantine file: record, where it lies, reason.
  """

  def __init__(self, path: epath.PathLike, limit: int):
    """Reads what earlier runs have found.

    Args:
      path: the quarantine file, JSON lines; made when there is a first one.
      limit: how many are bearable.
    """
    self._path, self._limit = epath.Path(path), limit
    self._lock = threading.Lock()  # readers are threads
    lines = self._path.read_text().splitlines() if self._path.exists() else ()
    self._found = {_place(row): row for row in map(json.loads, lines)}

  def add(self, dataset: Dataset, index: int, error: DatasetError) -> None:
    """Notes a bad record.

    Raises:
      DatasetError: there are more than are bearable.
    """
    row = {
      "record": index,
      "split": dataset.split,
      "path": dataset.path,
      "data": dataset.fingerprint,
      "reason": str(error),
    }
    with self._lock:
      if _place(row) not in self._found:
        self._found[_place(row)] = row
        rows = self._found.values()
        # The whole file: a bucket cannot append.
        self._path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
      if len(self._found) > self._limit:
        raise DatasetError(
          f"{error}\nRecords found bad so far: {len(self._found)}, and "
          f"config.data.max_bad_records is {self._limit}. They are listed in "
          f"{self._path}. Copy or prepare the data set again, or raise the "
          "limit to go on without them."
        ) from error


def _place(row: dict) -> tuple[str, int]:
  return row["data"], row["record"]


class _Draw(NamedTuple):
  """A record, by its place among those served; seed of the clips' starts."""

  record: int
  seed: tuple[int, ...]


_NUM_STEPS = 4  # read, parse, choose, decode


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Draws -> a batch, `num_clips` for each draw, one after the other.

  A record that cannot be read is replaced by the next that can. The clips
  follow from the draw alone: whether a record was found to be bad before does
  not matter, so that a resumed run reads the same.
  """

  dataset: Dataset
  source: RecordSource
  take_clip: TakeClip
  bad: BadRecords | None = None
  num_clips: int = 1

  def __call__(self, draws: Sequence[_Draw]) -> dict[str, np.ndarray]:
    n = self.num_clips
    batch = self.take_clip.empty(n * len(draws))
    # All are read, then all parsed, and so on: a clip's decoding empties the
    # caches, and what comes after it takes up to 8 times as long.
    steps = [
      self._steps({k: x[i * n : (i + 1) * n] for k, x in batch.items()}, draw)
      for i, draw in enumerate(draws)
    ]
    for _ in range(_NUM_STEPS):
      for step in steps:
        next(step, None)
    for step in steps:  # bad records take more
      collections.deque(step, maxlen=0)
    return batch

  def _steps(self, clips: dict[str, np.ndarray], draw: _Draw) -> Iterator[None]:
    """Fills a part of a batch; pauses _NUM_STEPS - 1 times for each record."""
    num_records = self.dataset.num_records
    for i in range(num_records):
      tried = self.dataset.number_of((draw.record + i) % num_records)
      try:
        data = self.source.read(tried)
        yield
        record = self.source.parse(tried, data)
        del data
        yield
        np_rng = np.random.default_rng((*draw.seed, i))
        frames = self.take_clip.choose(clips, tried, record, np_rng)
        yield
        self.take_clip.decode(clips, tried, record, frames)
        return
      except DatasetError as e:
        if self.bad is None:
          raise
        self.bad.add(self.dataset, tried, e)
    raise DatasetError(f"{self.source} has no record that can be read")


def own_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """The clips of a global batch that this process's devices need, by number.

  Processes whose devices share clips, along mesh.tensor, get the same ones.
  """
  held = sharding.addressable_devices_indices_map((batch_size,)).values()
  return sorted({i for (part,) in held for i in range(batch_size)[part]})


class _Draws:
  """Records for ever, every pass over them in an order of its own.

  Not grain's shuffle: it tries 65,536 / n places for one of n records, which
  for two takes longer than decoding a clip.
  """

  def __init__(self, num_records: int, seed: int):
    self._num_records, self._seed = num_records, seed
    # Readers may be on both sides of a pass's end.
    self._order = functools.lru_cache(maxsize=2)(self._shuffled)

  def __getitem__(self, position: int) -> _Draw:
    num_passes, place = divmod(position, self._num_records)
    record = int(self._order(num_passes)[place])
    return _Draw(record, (self._seed, 1, position))

  def _shuffled(self, num_passes: int) -> np.ndarray:
    np_rng = np.random.default_rng((self._seed, 0, num_passes))
    return np_rng.permutation(self._num_records)


class _Batches:
  """Number of a step -> this process's share of its batch; a grain source."""

  def __init__(
    self, read: _Reader, draws: _Draws, batch_size: int, rows: Sequence[int]
  ):
    self._read, self._draws = read, draws
    n = read.num_clips
    self._per_step = batch_size // n
    # A draw that processes share is read whole by each: they must agree on
    # whether it can be.
    self._places = sorted({row // n for row in rows})
    read_rows = [n * place + i for place in self._places for i in range(n)]
    at = {row: i for i, row in enumerate(read_rows)}
    self._own = None if list(rows) == read_rows else [at[row] for row in rows]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    first = step * self._per_step
    batch = self._read([self._draws[first + place] for place in self._places])
    if self._own is None:
      return batch
    return {key: x[self._own] for key, x in batch.items()}


def train_batches(
  dataset: Dataset,
  take_clip: TakeClip,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_threads: int,
  clips_per_record: int = 1,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of every global batch, for ever.

  Args:
    dataset: what to read; where it is smaller than a batch, its records repeat
      within the batch, with other starts.
    take_clip: record -> clips.
    batch_size: clips per step over all processes.
    seed: of order and starts.
    start_step: steps already taken.
    num_threads: readers; each makes whole batches.
    clips_per_record: so many clips in a row are of one record, repeated
      sampling (Hoffer et al., CVPR 2020; MAE-ST, NeurIPS 2022; VideoMAE,
      NeurIPS 2022); a divisor of batch_size.
    rows: this process's share, from `own_rows`; None: all.
    bad: where to tell of records that cannot be read, and of which another one
      takes the place; None: the first ends the iteration with a DatasetError.

  Yields:
    Dicts of arrays, each with as many clips as there are rows.
  """
  source = RecordSource(dataset)
  batches = _Batches(
    _Reader(dataset, source, take_clip, bad, clips_per_record),
    _Draws(dataset.num_records, seed),
    batch_size,
    range(batch_size) if rows is None else rows,
  )
  # A few in store even out slow reads.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  made = grain.MapDataset.source(batches)[start_step:]
  return iter(made.to_iter_dataset(options))


def eval_batches(
  dataset: Dataset,
  take_clip: TakeClip,
  *,
  batch_size: int,
  num_batches: int,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """The same clips on every call, from records spread over the split.

  Where there are fewer records than clips, records repeat with other starts.

  Args:
    dataset: what to read.
    take_clip: record -> clip.
    batch_size: clips per batch over all processes.
    num_batches: how many.
    rows: this process's share, from `own_rows`; None: all.
    bad: as for `train_batches`.

  Yields:
    Dicts of arrays, each with as many clips as there are rows.
  """
  read = _Reader(dataset, RecordSource(dataset), take_clip, bad)
  num_clips = batch_size * num_batches
  chosen = np.arange(num_clips) * dataset.num_records // num_clips
  for first in range(0, num_clips, batch_size):
    mine = range(batch_size) if rows is None else rows
    yield read(
      [
        _Draw(int(chosen[i]), (int(np.random.default_rng(i).integers(2**63)),))
        for i in (first + row for row in mine)
      ]
    )


def to_devices(
  batches: Iterable[dict[str, np.ndarray]],
  sharding: jax.sharding.Sharding,
  *,
  ahead: int = 1,
) -> Iterator[dict[str, jax.Array]]:
  """Copies batches to devices, `ahead` of the step that uses them."""
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
