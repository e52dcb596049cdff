"""Opens the segment index of a data set; makes it if it is missing."""

from __future__ import annotations

import itertools
from concurrent import futures

from etils import epath
from tqdm import tqdm

from marlin_jax.data.prepared_dataset import Dataset, DatasetError
from marlin_jax.records import folders, segment_index
from marlin_jax.records.segment_index import SegmentIndex, Video

_NUM_THREADS = 8


def open_index(dataset: Dataset, cache: epath.PathLike) -> SegmentIndex:
  """Opens the index of a data set, memory-mapped.

  data_prep writes the index next to the shards. For a data set of an earlier
  version it is made here by reading all records once, and saved next to the
  shards, or in `cache` if their folder is read-only. Process 0 must call this
  function before the others.

  Args:
    dataset: the data set.
    cache: folder that all processes share, local or gs://.

  Raises:
    DatasetError: the index or a record is damaged, or the index belongs to
      other records.
  """
  beside = _beside(dataset)
  cached = epath.Path(cache) / f"{_key(dataset)}-{beside.name}"
  path = next((path for path in (beside, cached) if path.exists()), None)
  return _opened(path or _make(dataset, beside, cached), dataset)


def find_index(dataset: Dataset) -> SegmentIndex | None:
  """Opens the index beside the shards; None if there is none.

  Raises:
    DatasetError: it is damaged or of other records.
  """
  path = _beside(dataset)
  return _opened(path, dataset) if path.exists() else None


def _beside(dataset: Dataset) -> epath.Path:
  shard = epath.Path(dataset.shards[0])
  return shard.with_name(segment_index.name_for(shard.name))


def _key(dataset: Dataset) -> str:
  return dataset.stored.fingerprint[:16]


def _opened(path: epath.Path, dataset: Dataset) -> SegmentIndex:
  stored, local = dataset.stored, path
  try:
    if folders.is_remote(path):
      local = folders.cached_copy(path, _key(dataset))
    index = segment_index.open_index(local)
    found = index.num_records, index.num_videos
    expected = stored.num_records, stored.num_videos
    if found != expected:
      raise ValueError(
        f"it lists {found[0]} records of {found[1]} videos, the split has "
        f"{expected[0]} of {expected[1]}"
      )
  except ValueError as e:
    raise DatasetError(
      f"{path} cannot be used: {e}. If you delete it, it is made again, which "
      "reads all records once"
    ) from e
  return index


def _make(
  dataset: Dataset, beside: epath.Path, cached: epath.Path
) -> epath.Path:
  """Writes the index next to the shards, or to a cache if that fails."""
  source = dataset.source

  def row(number: int) -> tuple[str, str, int, int]:
    record = source[number][1]
    who = record.video_id, record.subject_id
    return *who, record.track_id, len(record)

  numbers = range(len(source))
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    rows = tqdm(
      pool.map(row, numbers),
      desc=f"indexing the records of {dataset.path}, once",
      total=len(numbers),
      unit="record",
      mininterval=1.0,
    )
    data = segment_index.pack(
      Video(subject_id, [of[2:] for of in group], video_id)
      for (video_id, subject_id), group in itertools.groupby(
        rows, lambda of: of[:2]
      )
    )
  try:
    folders.write_bytes(beside, data)
    return beside
  except OSError:  # read-only
    cached.parent.mkdir(parents=True, exist_ok=True)
    folders.write_bytes(cached, data)
    return cached
