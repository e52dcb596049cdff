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
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence

import grain
import jax
import numpy as np
from etils import epath

from marlin_jax import records
from marlin_jax.video import Clip


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared data set, checked but not yet read.

  Attributes:
    path: its directory.
    split: TFDS split.
    shards: paths of the split's shards, in order.
    num_records: track segments in the split.
    num_videos: source videos in the split.
    fingerprint: sha256 over the split's content; tells data sets apart.
  """

  path: str
  split: str
  shards: tuple[str, ...]
  num_records: int
  num_videos: int
  fingerprint: str


class DatasetError(ValueError):
  """The data set is missing, damaged or not what was asked for."""


def open_dataset(path: str, split: str) -> Dataset:
  """Reads what the directory says about itself and checks its shards.

  Args:
    path: directory written by data_prep.prepare, local or gs://.
    split: 'train', 'val', ...

  Raises:
    DatasetError: says what was found, what was expected, where, and what to do.
  """
  root = epath.Path(path)
  advice = "Make one with: python -m data_prep.prepare --input DIR --output DIR"
  if not (root / "dataset_info.json").exists():
    started = (root / "parts").exists()
    raise DatasetError(
      f"{path} has no dataset_info.json"
      + (
        ": its preparation has not finished; run it again to complete it."
        if started
        else f", so it is no prepared data set. {advice}"
      )
    )
  info = json.loads((root / "dataset_info.json").read_text())
  meta = json.loads((root / "metadata.json").read_text())
  version = meta["schema_version"]
  if version != records.SCHEMA_VERSION:
    raise DatasetError(
      f"{path} has record schema {version}, this code reads "
      f"{records.SCHEMA_VERSION}; prepare it again with this code's data_prep"
    )
  splits = {s["name"]: s for s in info["splits"]}
  if split not in splits:
    raise DatasetError(
      f"{path} has no split '{split}', it has {sorted(splits)}; set "
      "config.data.split, or prepare with --val_ratio"
    )
  lengths = [int(n) for n in splits[split].get("shardLengths", ())]
  shards = _shards(root, split, len(lengths))
  if not sum(lengths):
    raise DatasetError(f"split '{split}' of {path} holds no records. {advice}")
  hashes = json.loads((root / "hashes.json").read_text())
  content = [version, [hashes[epath.Path(s).name] for s in shards]]
  return Dataset(
    path=str(path),
    split=split,
    shards=shards,
    num_records=sum(lengths),
    num_videos=meta["splits"][split]["num_videos"],
    fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
  )


def _shards(root: epath.Path, split: str, expected: int) -> tuple[str, ...]:
  found = sorted(
    p.name for p in root.iterdir() if f"-{split}.array_record-" in p.name
  )
  suffixes = [f"-{i:05d}-of-{expected:05d}" for i in range(expected)]
  missing = [s for s in suffixes if not any(f.endswith(s) for f in found)]
  if missing or len(found) != expected:
    raise DatasetError(
      f"split '{split}' of {root} should have {expected} shards and has "
      f"{len(found)}"
      + (f"; missing: {', '.join(missing)}" if missing else "")
      + ". Copy the directory again, or run data_prep.prepare on it again."
    )
  return tuple(str(root / name) for name in found)


class RecordSource:
  """Random access to a split's records; grain's source protocol."""

  def __init__(self, dataset: Dataset):
    self._dataset = dataset
    try:
      self._source = grain.sources.ArrayRecordDataSource(list(dataset.shards))
    except Exception as e:  # array_record raises bare RuntimeErrors
      raise DatasetError(
        f"a shard of {dataset.path} cannot be opened ({e}); copy the directory "
        "again, or run data_prep.prepare on it again"
      ) from e
    if len(self._source) != dataset.num_records:
      raise DatasetError(
        f"the shards of {dataset.path} hold {len(self._source)} records in "
        f"split '{dataset.split}', dataset_info.json says "
        f"{dataset.num_records}; copy the directory again, or run "
        "data_prep.prepare on it again"
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, records.Record]:
    try:
      return index, records.decode(self._source[index])
    except (RuntimeError, ValueError) as e:
      raise DatasetError(
        f"record {index} of split '{self._dataset.split}' in "
        f"{self._dataset.path} is damaged: {e}"
      ) from e

  def __repr__(self) -> str:
    # Grain names the pipeline's source in its messages.
    return f"RecordSource({self._dataset.path!r}, {self._dataset.split!r})"


@dataclasses.dataclass(frozen=True)
class TakeClip(grain.transforms.RandomMap):
  """Record -> one clip of decoded frames, from a random start.

  Gives `video` uint8 (T, H, W, 3), `regions` uint16 (T / tubelet_size, h, w) of
  each tubelet's first frame, `_id` the record's number and `start`, the clip's
  first frame in it.
  """

  clip: Clip
  tubelet_size: int

  def random_map(self, element, rng: np.random.Generator):
    index, record = element
    total = len(record)
    start = self.clip.random_start(total, rng)
    frames = self.clip.indices(start, total)
    return {
      "video": self._decode(index, record, frames),
      "regions": record.regions[frames[:: self.tubelet_size]],
      "_id": np.int32(index),
      "start": np.int32(start),
    }

  def _decode(self, index, record, frames):
    try:
      return records.decode_frames(record, frames)
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


@dataclasses.dataclass(frozen=True)
class ReadClip(grain.transforms.RandomMap):
  """Number of a record -> a clip of it, or of the next that can be read.

  The clip follows from the number and the generator alone: whether a record was
  found to be bad before does not matter, so that a resumed run reads the same.
  """

  dataset: Dataset
  source: RecordSource
  take_clip: TakeClip
  bad: BadRecords | None = None

  def random_map(self, index: int, rng: np.random.Generator):
    seed = rng.integers(2**63)
    for i in range(len(self.source)):
      tried = (int(index) + i) % len(self.source)
      try:
        return self.take_clip.random_map(
          self.source[tried], np.random.default_rng((seed, i))
        )
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


class _OwnClips:
  """Every global batch's own rows, one after the other; a grain source."""

  def __init__(self, clips: grain.MapDataset, rows, batch_size: int):
    self._clips, self._rows, self._batch_size = clips, rows, batch_size

  def __len__(self) -> int:
    return len(self._clips) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int):
    step, i = divmod(index, len(self._rows))
    return self._clips[step * self._batch_size + self._rows[i]]

  def __repr__(self) -> str:
    return f"{self._clips}[{len(self._rows)} of {self._batch_size}]"


def train_batches(
  dataset: Dataset,
  transform: TakeClip,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_threads: int,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of every global batch, for ever.

  Args:
    dataset: what to read; where it is smaller than a batch, its records repeat
      within the batch, with other starts.
    transform: record -> clip.
    batch_size: clips per step over all processes.
    seed: of order and starts.
    start_step: steps already taken.
    num_threads: readers; 2 saturate a core or two, see STACK in the docs.
    rows: this process's share, from `own_rows`; None: all.
    bad: where to tell of records that cannot be read, and of which another one
      takes the place; None: the first ends the iteration with a DatasetError.

  Yields:
    Dicts of arrays, each with as many clips as there are rows.
  """
  read_clip = ReadClip(dataset, RecordSource(dataset), transform, bad)
  clips = (
    grain.MapDataset.range(dataset.num_records)
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(read_clip)
  )
  if rows is not None and len(rows) < batch_size:
    # Chosen after the random transform: a clip's start must not depend on how
    # many processes there are.
    clips = grain.MapDataset.source(_OwnClips(clips, rows, batch_size))
    batch_size = len(rows)
  batches = clips.batch(batch_size)
  # Each thread fills a whole batch; a few in store even out slow reads.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  return iter(batches[start_step:].to_iter_dataset(options))


def eval_batches(
  dataset: Dataset,
  transform: TakeClip,
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
    transform: record -> clip.
    batch_size: clips per batch over all processes.
    num_batches: how many.
    rows: this process's share, from `own_rows`; None: all.
    bad: as for `train_batches`.

  Yields:
    Dicts of arrays, each with as many clips as there are rows.
  """
  read_clip = ReadClip(dataset, RecordSource(dataset), transform, bad)
  num_clips = batch_size * num_batches
  chosen = np.arange(num_clips) * dataset.num_records // num_clips
  for first in range(0, num_clips, batch_size):
    mine = range(batch_size) if rows is None else rows
    clips = [
      read_clip.random_map(chosen[i], np.random.default_rng(i))
      for i in (first + row for row in mine)
    ]
    yield {key: np.stack([c[key] for c in clips]) for key in clips[0]}


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
