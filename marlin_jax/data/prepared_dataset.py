"""Prepared data set: its description, and random access to its records."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from marlin_jax.records import cli, folders, quality_index, schema
from marlin_jax.records.cli import UserError
from marlin_jax.records.quality_index import Selection

# In the name of each shard, between split and number.
_SHARD_MARK = ".array_record-"
# Options for random access.
_READER_OPTIONS = "readahead_buffer_size:0"
_BUFFER_BYTES = 1 << 15
# Most records whose positions readers keep in memory: 8 bytes each, 160 MB. For
# larger splits they look up each record in the file.
_MAX_INDEXED = 20_000_000
_UNINDEXED = ",index_storage_option:offloaded,footer_prefetch_bytes:0"
# Room for other open files: libraries, checkpoints, sockets.
_NUM_OTHER_FILES = 512
_ADVICE = "Make one with: python -m data_prep.prepare --input DIR --output DIR"


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Split of a prepared data set, checked but not yet read.

  Attributes:
    path: folder of the data set.
    split: TFDS split.
    shards: paths of the split's shards, in order.
    lengths: number of records in each shard.
    num_records: track segments that are served.
    num_videos: source videos of these segments.
    num_frames: frames of all stored segments.
    fingerprint: sha256 over the split's content and the selection; identifies
      the training data.
    selection: records that are served; None: all of the split.
    unfiltered: the data set without the selection; None: there is none.
    frame_size: height and width of the stored frames in pixels.
  """

  path: str
  split: str
  shards: tuple[str, ...]
  lengths: tuple[int, ...]
  num_records: int
  num_videos: int
  num_frames: int
  fingerprint: str
  selection: Selection | None = None
  unfiltered: Dataset | None = None
  frame_size: int = schema.FRAME_SIZE

  @property
  def stored(self) -> Dataset:
    """The whole split, including records that are not served."""
    return self.unfiltered or self

  @property
  def is_of_pictures(self) -> bool:
    """True if each stored record is one frame."""
    return self.num_frames == self.stored.num_records

  @functools.cached_property
  def source(self) -> RecordSource:
    """The stored records; each shard is opened once."""
    return RecordSource(self)

  @functools.cached_property
  def has_sound(self) -> bool:
    """True if it was prepared with sound, which a video may still lack.

    Reads a record.
    """
    _, record = self.source[0]
    return record.audio is not None

  def record_number(self, position: int) -> int:
    """Returns the number in the split of the served record at a position."""
    return self.selection.records[position] if self.selection else position

  def check_frame_size(self, size: int) -> None:
    """Raises DatasetError if the stored frames have fewer pixels.

    Args:
      size: height and width of the frames that are wanted.
    """
    if size > self.frame_size:
      raise DatasetError(
        f"{self.path} holds frames of {self.frame_size} pixels, and frames of "
        f"{size} are wanted. Prepare the videos with --frame_size={size} or "
        "more into a new folder, or ask for smaller frames "
        f"(config.data.frame_size={self.frame_size} in pretraining)"
      )

  def check_record(self, record: schema.Record) -> None:
    """Raises ValueError if a record's frames have not the announced size."""
    if (size := record.stored_size) != self.frame_size:
      raise ValueError(
        f"its frames have {size}x{size} pixels, those of the data set "
        f"{self.frame_size}x{self.frame_size}"
      )


class DatasetError(UserError):
  """Data set that is missing, damaged or not as requested."""


class OpenFilesError(UserError):
  """More open files are needed than a process may have; nothing is damaged."""


def has_split(path: str, split: str) -> bool:
  """Returns True if a prepared data set has a split of this name.

  Raises:
    DatasetError: the folder holds no complete data set.
  """
  return split in _splits_of(path)


def _splits_of(path: str) -> dict[str, dict[str, Any]]:
  """Returns what dataset_info.json says of each split; see `has_split`."""
  root = epath.Path(path)
  if not (root / folders.DATASET_INFO).exists():
    started = (root / folders.PARTS).exists()
    raise DatasetError(
      f"{path} has no {folders.DATASET_INFO}"
      + (
        ": its preparation has not finished; run it again to complete it."
        if started
        else f", so it is not a prepared data set. {_ADVICE}"
      )
    )
  with _descriptions(path):
    info = json.loads((root / folders.DATASET_INFO).read_text())
    return {split["name"]: split for split in info["splits"]}


@contextlib.contextmanager
def _descriptions(path: str) -> Iterator[None]:
  """Turns what is wrong with the files read within into a DatasetError."""
  try:
    yield
  except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
    raise DatasetError(
      f"{path} is damaged, or was not written by data_prep.prepare: "
      f"{type(e).__name__}: {e}. To see what is wrong: python -m "
      f"data_prep.verify {path}"
    ) from e


def open_dataset(
  path: str,
  split: str,
  min_quality: float = 0.0,
  cache: epath.PathLike | None = None,
) -> Dataset:
  """Opens a split of a data set; reads its description and checks its shards.

  Args:
    path: folder written by data_prep.prepare, local or gs://.
    split: name of a split, such as 'train' or 'val'.
    min_quality: least quality of a track, in [0, 1]; records of other tracks
      are left out. 0: all records.
    cache: folder, local or gs://, where the records of that quality are kept,
      so that the next call need not read all qualities; None: nowhere.

  Raises:
    DatasetError: the folder holds no complete data set of this schema version
      or no such split, or all records have a lower quality.
    OpenFilesError: there are more shards than files that may be open.
  """
  root = epath.Path(path)
  splits = _splits_of(path)
  with _descriptions(path):
    meta = json.loads((root / folders.METADATA).read_text())
    version = meta["schema_version"]
  if version != schema.SCHEMA_VERSION:
    raise DatasetError(
      f"{path} has record schema {version}, this code reads "
      f"{schema.SCHEMA_VERSION}; prepare it again with this code's data_prep"
    )
  if split not in splits:
    raise DatasetError(
      f"{path} has no split '{split}', it has {sorted(splits)}; name one of "
      "them in the configuration, or prepare with --val_ratio or --test_ratio"
    )
  lengths = [int(n) for n in splits[split].get("shardLengths", ())]
  if not folders.is_remote(root):
    allow_open_files(len(lengths))
  shards = _shards(root, split, len(lengths))
  if not folders.is_remote(root):
    _check_sizes(shards, splits[split].get("numBytes"), path)
  if not sum(lengths):
    raise DatasetError(f"split '{split}' of {path} holds no records. {_ADVICE}")
  with _descriptions(path):
    hashes = json.loads((root / folders.HASHES).read_text())
    content = [version, [hashes[epath.Path(s).name] for s in shards]]
    counts = meta["splits"][split]
  dataset = Dataset(
    path=str(path),
    split=split,
    shards=shards,
    lengths=tuple(lengths),
    num_records=sum(lengths),
    num_videos=counts["num_videos"],
    num_frames=counts["num_frames"],
    fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    frame_size=meta.get("frame_size", schema.FRAME_SIZE),
  )
  return _filtered(dataset, min_quality, cache) if min_quality else dataset


def split_names(splits: str) -> list[str]:
  """Returns the names in 'fold1+fold2', or the single one."""
  return [name.strip() for name in splits.split("+")]


def open_joined(path: str, splits: str) -> Dataset:
  """Opens several splits of a data set as one, such as 'fold1+fold2'.

  Args:
    path: as for `open_dataset`.
    splits: names of splits, joined by '+' as in TFDS; or a single name.

  Raises:
    DatasetError, OpenFilesError: as `open_dataset`; also if a split is named
      twice.
  """
  names = split_names(splits)
  if len(names) > len(set(names)):
    raise DatasetError(f"'{splits}' names a split twice")
  parts = [open_dataset(path, name) for name in names]
  if len(parts) == 1:
    return parts[0]
  shards = tuple(shard for part in parts for shard in part.shards)
  if not folders.is_remote(epath.Path(path)):
    allow_open_files(len(shards))
  content = json.dumps([part.fingerprint for part in parts]).encode()
  return Dataset(
    path=str(path),
    split="+".join(names),
    shards=shards,
    lengths=tuple(n for part in parts for n in part.lengths),
    num_records=sum(part.num_records for part in parts),
    num_videos=sum(part.num_videos for part in parts),
    num_frames=sum(part.num_frames for part in parts),
    fingerprint=hashlib.sha256(content).hexdigest(),
    frame_size=parts[0].frame_size,
  )


def _filtered(
  dataset: Dataset, min_quality: float, cache: epath.PathLike | None
) -> Dataset:
  """Returns the data set without records of a lower quality."""
  path = epath.Path(dataset.shards[0])
  path = path.with_name(quality_index.name_for(path.name))
  setting = f"config.data.min_quality={min_quality}"
  if not path.exists():
    raise DatasetError(
      f"{setting} needs {path}, which does not exist. Run the same "
      "data_prep.prepare again to create it; prepare a data set of an earlier "
      "version into a new folder"
    )
  made = None
  if cache:
    stat = path.stat()
    source = dataset.fingerprint, float(min_quality), stat.length, stat.mtime
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    made = epath.Path(cache) / f"{key}.selection.npy"
  try:
    if made and made.exists():
      selection = _opened_selection(made)
    else:
      selection = _selected(dataset, path, min_quality)
      if made:
        made.parent.mkdir(parents=True, exist_ok=True)
        folders.write_bytes(made, quality_index.pack_selection(selection))
        selection = _opened_selection(made)
  except (ValueError, EOFError) as e:
    raise DatasetError(
      f"{setting} cannot use {path}: {e}; copy the folder again, or run "
      "data_prep.prepare on it again"
    ) from e
  return dataclasses.replace(
    dataset,
    num_records=len(selection.records),
    num_videos=len(selection.videos),
    fingerprint=selection.fingerprint,
    selection=selection,
    unfiltered=dataset,
  )


def _opened_selection(path: epath.Path) -> Selection:
  local = path
  if folders.is_remote(path):
    local = folders.cached_copy(path, "selection")
  try:
    return quality_index.open_selection(local)
  except ValueError as e:
    raise DatasetError(
      f"{path} cannot be used: {e}. Delete it; it is made again"
    ) from e


def _selected(
  dataset: Dataset, path: epath.Path, min_quality: float
) -> Selection:
  """Selects records by the index at `path`, of which it reads all rows."""
  local = path
  if folders.is_remote(path):
    local = folders.cached_copy(path, dataset.fingerprint[:16])
  rows = quality_index.open_rows(local)
  if len(rows) != dataset.num_records:
    raise ValueError(
      f"it lists {len(rows)} records, the split has {dataset.num_records}"
    )
  selection = quality_index.select(rows, min_quality, dataset.fingerprint)
  if not len(selection.records):
    raise DatasetError(
      f"config.data.min_quality={min_quality} leaves no record of split "
      f"'{dataset.split}' of {dataset.path}: the best of {dataset.num_records} "
      f"has a quality of {rows['quality'].max():.4f}"
    )
  return selection


def _shards(root: epath.Path, split: str, expected: int) -> tuple[str, ...]:
  names = sorted(
    p.name for p in root.iterdir() if f"-{split}{_SHARD_MARK}" in p.name
  )
  present = {name.partition(_SHARD_MARK)[2] for name in names}
  suffixes = [f"{i:05d}-of-{expected:05d}" for i in range(expected)]
  missing = [f"-{s}" for s in suffixes if s not in present]
  if missing or len(names) != expected:
    raise DatasetError(
      f"split '{split}' of {root} should have {expected} shards and has "
      f"{len(names)}"
      + (f"; missing: {', '.join(missing)}" if missing else "")
      + ". Copy the folder again, or run data_prep.prepare on it again."
    )
  return tuple(str(root / name) for name in names)


def _check_sizes(
  shards: Sequence[str], expected: str | None, path: str
) -> None:
  """Compares the size of all shards with dataset_info.json.

  It finds shards that were cut or not copied without opening them. Objects in a
  bucket are whole.
  """
  num_bytes = sum(os.stat(shard).st_size for shard in shards)
  if expected and num_bytes != int(expected):
    raise DatasetError(
      f"the shards of {path} have {num_bytes} bytes, {folders.DATASET_INFO} "
      f"says {int(expected)}. Copy the folder again, or run data_prep.prepare "
      "on it again; data_prep.verify names the damaged shards."
    )


def allow_open_files(num_files: int) -> None:
  """Raises this process's limit of open files as far as it may.

  Args:
    num_files: files to be open at the same time, apart from a few others.

  Raises:
    OpenFilesError: that many are not allowed.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  if soft != hard:
    with contextlib.suppress(ValueError, OSError):  # macOS allows fewer
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
      soft = hard
  if soft != unlimited and soft < num_files + _NUM_OTHER_FILES:
    raise OpenFilesError(_open_files_message(num_files, soft))


def _open_files_message(num_files: int, limit: int) -> str:
  return (
    f"too many open files: the data set has {cli.counted(num_files, 'shard')}, "
    f"each of which is an open file, and this process may have {limit}. Raise "
    f"the limit with 'ulimit -n {2 * num_files + _NUM_OTHER_FILES}' before the "
    "start (systemd: LimitNOFILE, docker: --ulimit nofile=), or prepare fewer, "
    "larger shards"
  )


class _Shards:
  """Random access to the records of shards; threads share it.

  A shard is opened when its first record is read. A copy in another process
  opens its own.
  """

  def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
    self._paths, self._lengths = paths, lengths
    self._ends = list(itertools.accumulate(lengths))
    self._readers: list[ArrayRecordReader | None] = [None] * len(paths)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> bytes:
    i = bisect.bisect_right(self._ends, index)
    reader = self._readers[i] or self._open(i)
    return reader.read([index - (self._ends[i] - self._lengths[i])])[0]

  def _open(self, i: int) -> ArrayRecordReader:
    with self._lock:
      if (reader := self._readers[i]) is not None:
        return reader
      options = _READER_OPTIONS
      if len(self) > _MAX_INDEXED:
        options += _UNINDEXED
      reader = ArrayRecordReader(
        self._paths[i], options=options, file_reader_buffer_size=_BUFFER_BYTES
      )
      if (num_records := reader.num_records()) != self._lengths[i]:
        reader.close()
        raise ValueError(
          f"{self._paths[i]} holds {num_records} records, "
          f"{folders.DATASET_INFO} says {self._lengths[i]}; copy the folder "
          "again, or run data_prep.prepare on it again"
        )
      self._readers[i] = reader
      return reader

  def __reduce__(self):
    return _Shards, (self._paths, self._lengths)


# Shards that are in use. A training split is often an evaluation split too, and
# each open shard takes a file descriptor.
_readers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_readers_lock = threading.Lock()


def _shards_of(dataset: Dataset) -> _Shards:
  """Returns the shards, the same object for equal data sets."""
  key = dataset.shards, dataset.lengths
  with _readers_lock:
    shards = _readers.get(key)
    if shards is None:
      shards = _readers[key] = _Shards(*key)
    return shards


class RecordSource:
  """Random access to all records of a split, as grain's sources.

  `Dataset.record_number` gives the numbers of the served records.
  """

  def __init__(self, dataset: Dataset):
    """Opens nothing yet: a shard is opened when its first record is read."""
    self._dataset, self._source = dataset, _shards_of(dataset)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, schema.Record]:
    return index, self.parse(index, self.read(index))

  def read(self, index: int) -> bytes:
    """Returns a record's bytes.

    Raises:
      DatasetError: they or the shard are damaged, or the shard has another
        number of records than announced.
      OpenFilesError: no more files may be open.
    """
    return self._named(index, self._source.__getitem__, index)

  def parse(self, index: int, data: bytes) -> schema.Record:
    """Decodes the bytes that `read` returned; raises DatasetError likewise."""
    return self._named(index, schema.decode, data)

  def _named(self, index: int, function: Callable, argument: Any) -> Any:
    """Calls a function; errors name the record."""
    try:
      return function(argument)
    except (RuntimeError, ValueError) as e:
      self._check_open_files(e)
      raise DatasetError(
        f"record {index} of split '{self._dataset.split}' in "
        f"{self._dataset.path} is damaged: {e}"
      ) from e

  def _check_open_files(self, error: Exception) -> None:
    """Raises OpenFilesError if a shard could not be opened for that reason."""
    if os.strerror(errno.EMFILE) in str(error):
      limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
      num_files = len(self._dataset.shards)
      raise OpenFilesError(_open_files_message(num_files, limit)) from error

  def __repr__(self) -> str:
    # Grain's messages include it.
    return f"RecordSource({self._dataset.path!r}, {self._dataset.split!r})"
