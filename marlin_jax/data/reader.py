"""Reads the clips of draws; replaces and lists records that cannot be read.

It imports no jax, since worker processes read with it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np
from etils import epath

from marlin_jax.data.clips import ClipTaker, damage_named
from marlin_jax.data.prefetch import Batch
from marlin_jax.data.prepared_dataset import Dataset, DatasetError
from marlin_jax.data.sampling import Draw, Draws, first_ids
from marlin_jax.records import folders, schema

# A bad record as JSON values: number, split, path and fingerprint of the data
# set, reason.
Row = dict[str, str | int]

# Draws that are read before the first is decoded: code that runs right after a
# decode finds cold CPU caches and takes up to 8 times as long.
_DRAWS_PER_PART = 16
# Phases of a draw: read, parse, choose, decode.
_NUM_PHASES = 4
# Records of buckets that a process reads at the same time, at most.
_NUM_REQUESTS = 128


class BadRecords:
  """List of unusable records, kept in a quarantine file.

  The file has one JSON line per record: number, data set and reason.

  Attributes:
    limit: number of records to tolerate.
  """

  def __init__(
    self,
    path: epath.PathLike,
    limit: int,
    others: Iterable[epath.PathLike] = (),
  ):
    """Reads the records that earlier runs listed.

    Args:
      path: the quarantine file; it is created with the first record.
      limit: number of records to tolerate.
      others: quarantine files of other processes, now or in earlier runs: their
        records count too, and are not written again.
    """
    self._path, self.limit = epath.Path(path), limit
    # Reader threads share the list.
    self._lock = threading.Lock()
    self._rows = _rows_of(self._path)
    self._others = {
      key for other in others for key in _rows_of(epath.Path(other))
    }

  def add(self, rows: Iterable[Row]) -> None:
    """Adds records to the list and rewrites the file.

    Raises:
      DatasetError: the list is longer than the limit.
    """
    for row in rows:
      with self._lock:
        self._add(row)

  def _add(self, row: Row) -> None:
    if _key(row) not in self._rows.keys() | self._others:
      self._rows[_key(row)] = row
      lines = (f"{json.dumps(row)}\n" for row in self._rows.values())
      # The whole file, because buckets do not support appending.
      folders.write_bytes(self._path, "".join(lines).encode())
    num_rows = len(self._rows.keys() | self._others)
    if num_rows > self.limit:
      raise DatasetError(
        f"{row['reason']}\nUnusable records so far: {num_rows}, and "
        f"config.data.max_bad_records is {self.limit}. They are listed in "
        f"{self._path}. Copy or prepare the data set again, or raise the "
        "limit to continue without them."
      )


def _rows_of(path: epath.Path) -> dict[tuple[str, int], Row]:
  lines = path.read_text().splitlines() if path.exists() else ()
  return {_key(row): row for row in map(json.loads, lines)}


def _key(row: Row) -> tuple[str, int]:
  return row["data"], row["record"]


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads clips of draws into a batch; picklable.

  Draws whose records cannot be read are repeated until they can be. The clips
  are a function of the draw's position alone, whether or not a record is listed
  as unusable already, so that a resumed run reads the same clips.

  Attributes:
    draws: the clips to read.
    take_clip: turns records into clips.
    max_bad: bad records to replace in one call; None: the first one raises.
  """

  draws: Draws
  take_clip: ClipTaker
  max_bad: int | None = None

  def __call__(self, batch: Batch, positions: Sequence[int]) -> list[Row]:
    """Reads the clips of draws.

    Args:
      batch: `draws.num_clips` rows for each draw, filled in place.
      positions: positions of the draws.

    Returns:
      The bad records. If there are more than `max_bad`, not all clips are read.

    Raises:
      DatasetError: a record is bad and `max_bad` is None, or no record can be
        read.
    """
    n = self.draws.num_clips
    bad: list[Row] = []
    fillers = [
      self._fill(
        {k: x[i * n : (i + 1) * n] for k, x in batch.items()}, position, bad
      )
      for i, position in enumerate(positions)
    ]
    for phase in range(_NUM_PHASES):
      if phase == 0 and self._is_remote:
        list(_requests().map(_advance, fillers))
      else:
        list(map(_advance, fillers))
    # Replacements of unusable records need more phases.
    for filler in fillers:
      collections.deque(filler, maxlen=0)
    return bad

  @functools.cached_property
  def _is_remote(self) -> bool:
    return any(folders.is_remote(data.path) for data in self.draws.datasets)

  @functools.cached_property
  def _first_ids(self) -> list[int]:
    return first_ids(self.draws.datasets)

  def _fill(
    self, clips: Batch, position: int, bad: list[Row]
  ) -> Iterator[None]:
    """Fills a batch slice; yields after each phase of a draw but the last."""
    for attempt in range(self.draws.num_attempts):
      draw = self.draws(position, attempt)
      dataset = self.draws.datasets[draw.dataset]
      source, (number, *_) = dataset.source, draw.records
      data: list[bytes] = []
      records: list[schema.Record] = []
      try:
        data += map(source.read, draw.records)
        yield
        records += map(source.parse, draw.records, data)
        data.clear()
        record = schema.joined(records)
        with damage_named(number):
          dataset.check_record(record)
        yield
        frames = self._choose(clips, number, record, draw)
        first_id = self._first_ids[draw.dataset]
        clips["_id"] += first_id
        if "_subject" in clips:
          # There are no more subjects than records.
          is_known = draw.subject >= 0
          clips["_subject"][:] = first_id + draw.subject if is_known else -1
        yield
        self.take_clip.decode(clips, number, record, frames)
        return
      except DatasetError as e:
        if self.max_bad is None:
          raise
        number = _blamed(dataset, draw.records, len(data), records)
        bad.append(_row(dataset, number, e))
        if len({_key(row) for row in bad}) > self.max_bad:
          return
    raise DatasetError(f"{source} has no record that can be read")

  def _choose(self, clips, number, record, draw: Draw) -> list[int]:
    np_rng = np.random.default_rng(draw.seed)
    if draw.starts is not None:
      return self.take_clip.place(clips, number, record, draw.starts, np_rng)
    return self.take_clip.choose(clips, number, record, np_rng)


def _advance(filler: Iterator[None]) -> None:
  next(filler, None)


@functools.cache
def _requests() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_NUM_REQUESTS, "records")


def _row(dataset: Dataset, index: int, error: DatasetError) -> Row:
  return {
    "record": index,
    "split": dataset.split,
    "path": dataset.path,
    "data": dataset.fingerprint,
    "reason": str(error),
  }


def _blamed(
  dataset: Dataset,
  numbers: Sequence[int],
  num_read: int,
  records: Sequence[schema.Record],
) -> int:
  """Returns the number of the record that is damaged.

  Args:
    dataset: data set of the records.
    numbers: records of a draw that cannot be used.
    num_read: how many of them, from the first, could be read; not in use if all
      could be parsed.
    records: those among them, from the first, that could be parsed.
  """
  if len(records) < len(numbers):
    is_read = num_read == len(numbers)
    return numbers[len(records) if is_read else num_read]
  for number, record in zip(numbers[1:], records[1:], strict=True):
    try:
      dataset.check_record(record)
      schema.decode_frames(record, range(len(record)))
    except ValueError:
      return number
  return numbers[0]


class ClipBatches:
  """Batches of the clips of a run; a `prefetch.BatchSource`.

  Attributes:
    num_parts: parts of each batch.
    own: rows of a batch that are this process's; None: all of them. Others are
      of draws that it shares with another process.
  """

  def __init__(
    self,
    draws: Draws,
    take_clip: ClipTaker,
    *,
    batch_size: int,
    rows: Sequence[int],
    bad: BadRecords | None,
  ):
    """Determines which draws of a batch this process reads.

    Args:
      draws: the clips of the run.
      take_clip: turns records into clips.
      batch_size: clips per step over all processes.
      rows: this process's rows of each batch.
      bad: list for unreadable records; None: the first one raises.

    Raises:
      DatasetError: a data set holds smaller frames than the clips have.
    """
    for dataset in draws.datasets:
      dataset.check_frame_size(take_clip.frame_size)
    self._reader = Reader(draws, take_clip, bad.limit if bad else None)
    self._bad = bad
    n = draws.num_clips
    self._per_step = batch_size // n
    # Processes that share a draw read all of it, so that they agree on whether
    # it is readable.
    self._draw_numbers = sorted({row // n for row in rows})
    read_rows = [n * draw + i for draw in self._draw_numbers for i in range(n)]
    index_of = {row: i for i, row in enumerate(read_rows)}
    self.own = (
      None if list(rows) == read_rows else [index_of[row] for row in rows]
    )
    self.num_parts = -(-len(self._draw_numbers) // _DRAWS_PER_PART)
    self._bounds = np.linspace(
      0, len(self._draw_numbers), self.num_parts + 1, dtype=int
    ).tolist()

  def empty(self) -> Batch:
    """Allocates a batch; see `prefetch.BatchSource`."""
    n = self._reader.draws.num_clips
    return self._reader.take_clip.empty(n * len(self._draw_numbers))

  def fill(self, batch: Batch, step: int, part: int) -> list[Row]:
    """Reads a part of a batch; returns the bad records."""
    n = self._reader.draws.num_clips
    start, stop = self._bounds[part : part + 2]
    first = step * self._per_step
    return self._reader(
      {key: x[n * start : n * stop] for key, x in batch.items()},
      [first + i for i in self._draw_numbers[start:stop]],
    )

  def receive(self, report: list[Row]) -> None:
    """Lists bad records; raises DatasetError if there are too many."""
    if self._bad:
      self._bad.add(report)

  def __getstate__(self):
    # Only this process writes the list.
    return self.__dict__ | {"_bad": None}
