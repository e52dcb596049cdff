"""Prepared data set: its description, and random access to its records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import grain
from etils import epath

from marlin_jax.records import folders, quality_index, schema
from marlin_jax.records.cli import UserError
from marlin_jax.records.quality_index import Selection


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Split of a prepared data set, checked but not yet read.

  Attributes:
    path: folder of the data set.
    split: TFDS split.
    shards: paths of the split's shards, in order.
    num_records: track segments that are served.
    num_videos: source videos of these segments.
    fingerprint: sha256 over the split's content and the selection; identifies
      the training data.
    selection: records that are served; None: all of the split.
  """

  path: str
  split: str
  shards: tuple[str, ...]
  num_records: int
  num_videos: int
  fingerprint: str
  selection: Selection | None = None

  @property
  def num_stored(self) -> int:
    """Records of the split, including those that are not served."""
    left_out = self.selection.num_left_out if self.selection else 0
    return self.num_records + left_out

  def record_number(self, position: int) -> int:
    """Returns the number in the split of the served record at a position."""
    return int(self.selection.numbers[position]) if self.selection else position


class DatasetError(UserError):
  """Data set that is missing, damaged or not as requested."""


def open_dataset(path: str, split: str, min_quality: float = 0.0) -> Dataset:
  """Opens a split of a data set; reads its description and checks its shards.

  Args:
    path: folder written by data_prep.prepare, local or gs://.
    split: name of a split, such as 'train' or 'val'.
    min_quality: least quality of a track, in [0, 1]; records of other tracks
      are left out. 0: all records.

  Raises:
    DatasetError: the folder holds no complete data set of this schema version
      or no such split, or all records have a lower quality.
  """
  root = epath.Path(path)
  advice = "Make one with: python -m data_prep.prepare --input DIR --output DIR"
  if not (root / folders.DATASET_INFO).exists():
    started = (root / folders.PARTS).exists()
    raise DatasetError(
      f"{path} has no {folders.DATASET_INFO}"
      + (
        ": its preparation has not finished; run it again to complete it."
        if started
        else f", so it is not a prepared data set. {advice}"
      )
    )
  info = json.loads((root / folders.DATASET_INFO).read_text())
  meta = json.loads((root / folders.METADATA).read_text())
  version = meta["schema_version"]
  if version != schema.SCHEMA_VERSION:
    raise DatasetError(
      f"{path} has record schema {version}, this code reads "
      f"{schema.SCHEMA_VERSION}; prepare it again with this code's data_prep"
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
  hashes = json.loads((root / folders.HASHES).read_text())
  content = [version, [hashes[epath.Path(s).name] for s in shards]]
  dataset = Dataset(
    path=str(path),
    split=split,
    shards=shards,
    num_records=sum(lengths),
    num_videos=meta["splits"][split]["num_videos"],
    fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
  )
  return _filtered(dataset, min_quality) if min_quality else dataset


def _filtered(dataset: Dataset, min_quality: float) -> Dataset:
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
  try:
    rows = quality_index.unpack(path.read_bytes())
    if len(rows) != dataset.num_records:
      raise ValueError(
        f"it lists {len(rows)} records, the split has {dataset.num_records}"
      )
  except ValueError as e:
    raise DatasetError(
      f"{setting} cannot use {path}: {e}; copy the folder again, or run "
      "data_prep.prepare on it again"
    ) from e
  selection = quality_index.select(rows, min_quality)
  if not len(selection.numbers):
    raise DatasetError(
      f"{setting} leaves no record of split '{dataset.split}' of "
      f"{dataset.path}: the best of {dataset.num_records} has a quality of "
      f"{rows['quality'].max():.4f}"
    )
  # Hashes the selection, not the threshold: the file of qualities is not among
  # the hashed files.
  numbers = selection.numbers.astype("<i8").tobytes()
  content = dataset.fingerprint.encode() + numbers
  return dataclasses.replace(
    dataset,
    num_records=len(selection.numbers),
    num_videos=selection.num_videos,
    fingerprint=hashlib.sha256(content).hexdigest(),
    selection=selection,
  )


def _shards(root: epath.Path, split: str, expected: int) -> tuple[str, ...]:
  names = sorted(
    p.name for p in root.iterdir() if f"-{split}.array_record-" in p.name
  )
  suffixes = [f"-{i:05d}-of-{expected:05d}" for i in range(expected)]
  missing = [s for s in suffixes if not any(n.endswith(s) for n in names)]
  if missing or len(names) != expected:
    raise DatasetError(
      f"split '{split}' of {root} should have {expected} shards and has "
      f"{len(names)}"
      + (f"; missing: {', '.join(missing)}" if missing else "")
      + ". Copy the folder again, or run data_prep.prepare on it again."
    )
  return tuple(str(root / name) for name in names)


class RecordSource:
  """Random access to all records of a split, as grain's sources.

  `Dataset.record_number` gives the numbers of the served records.
  """

  def __init__(self, dataset: Dataset):
    self._dataset = dataset
    try:
      self._source = grain.sources.ArrayRecordDataSource(list(dataset.shards))
    # array_record raises plain RuntimeErrors.
    except Exception as e:
      raise DatasetError(
        f"a shard of {dataset.path} cannot be opened ({e}); copy the folder "
        "again, or run data_prep.prepare on it again"
      ) from e
    if len(self._source) != dataset.num_stored:
      raise DatasetError(
        f"the shards of {dataset.path} hold {len(self._source)} records in "
        f"split '{dataset.split}', dataset_info.json says "
        f"{dataset.num_stored}; copy the folder again, or run "
        "data_prep.prepare on it again"
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, schema.Record]:
    return index, self.parse(index, self.read(index))

  def read(self, index: int) -> bytes:
    """Returns a record's bytes; raises DatasetError if they are damaged."""
    return self._named(index, self._source.__getitem__, index)

  def parse(self, index: int, data: bytes) -> schema.Record:
    """Decodes the bytes that `read` returned; raises DatasetError likewise."""
    return self._named(index, schema.decode, data)

  def _named(self, index: int, function: Callable, argument: Any) -> Any:
    """Calls a function; errors name the record."""
    try:
      return function(argument)
    except (RuntimeError, ValueError) as e:
      raise DatasetError(
        f"record {index} of split '{self._dataset.split}' in "
        f"{self._dataset.path} is damaged: {e}"
      ) from e

  def __repr__(self) -> str:
    # Grain's messages include it.
    return f"RecordSource({self._dataset.path!r}, {self._dataset.split!r})"
