"""A prepared data set: what its directory says, and its records by number."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import grain
from etils import epath

from marlin_jax.records import folders, quality_index, schema
from marlin_jax.records.cli import UserError
from marlin_jax.records.quality_index import Selection


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared data set, checked but not yet read.

  Attributes:
    path: its directory.
    split: TFDS split.
    shards: paths of the split's shards, in order.
    num_records: track segments that are served.
    num_videos: source videos that they are of.
    fingerprint: sha256 over the split's content; tells data sets apart, and
      choices among the records of one.
    selection: which records are served; None: all of the split.
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
    """Records of the split, those that are left out included."""
    left_out = self.selection.num_left_out if self.selection else 0
    return self.num_records + left_out

  def number_of(self, place: int) -> int:
    """The number in the split of one of the records that are served."""
    return int(self.selection.numbers[place]) if self.selection else place


class DatasetError(UserError):
  """The data set is missing, damaged or not what was asked for."""


def open_dataset(path: str, split: str, min_quality: float = 0.0) -> Dataset:
  """Reads what the directory says about itself and checks its shards.

  Args:
    path: directory written by data_prep.prepare, local or gs://.
    split: 'train', 'val', ...
    min_quality: records of tracks below it are left out; 0: none.

  Raises:
    DatasetError: says what was found, what was expected, where, and what to do.
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
        else f", so it is no prepared data set. {advice}"
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
  """The same without what is below the quality; raises DatasetError."""
  path = epath.Path(dataset.shards[0])
  path = path.with_name(quality_index.name_for(path.name))
  wanted = f"config.data.min_quality={min_quality}"
  if not path.exists():
    raise DatasetError(
      f"{wanted} needs {path}, and there is no such file. Run the same "
      "data_prep.prepare again, which makes what is missing; a data set of an "
      "earlier version has to be prepared into a new folder"
    )
  try:
    rows = quality_index.unpack(path.read_bytes())
    if len(rows) != dataset.num_records:
      raise ValueError(
        f"it tells of {len(rows)} records, the split has {dataset.num_records}"
      )
  except ValueError as e:
    raise DatasetError(
      f"{wanted} cannot be judged by {path}: {e}; copy the directory again, or "
      "run data_prep.prepare on it again"
    ) from e
  selection = quality_index.select(rows, min_quality)
  if not len(selection.numbers):
    raise DatasetError(
      f"{wanted} leaves no record of split '{dataset.split}' of "
      f"{dataset.path}: the best of {dataset.num_records} has a quality of "
      f"{rows['quality'].max():.4f}"
    )
  # Not the threshold but what it chooses: from this file, which is not hashed.
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
  """Random access to a split's records; grain's source protocol.

  To all of them: `Dataset.number_of` tells which are served.
  """

  def __init__(self, dataset: Dataset):
    self._dataset = dataset
    try:
      self._source = grain.sources.ArrayRecordDataSource(list(dataset.shards))
    except Exception as e:  # array_record raises bare RuntimeErrors
      raise DatasetError(
        f"a shard of {dataset.path} cannot be opened ({e}); copy the directory "
        "again, or run data_prep.prepare on it again"
      ) from e
    if len(self._source) != dataset.num_stored:
      raise DatasetError(
        f"the shards of {dataset.path} hold {len(self._source)} records in "
        f"split '{dataset.split}', dataset_info.json says "
        f"{dataset.num_stored}; copy the directory again, or run "
        "data_prep.prepare on it again"
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, schema.Record]:
    return index, self.parse(index, self.read(index))

  def read(self, index: int) -> bytes:
    """What is on disk; as the others, raises DatasetError."""
    return self._named(index, self._source.__getitem__, index)

  def parse(self, index: int, data: bytes) -> schema.Record:
    """Of what `read` gave."""
    return self._named(index, schema.decode, data)

  def _named(self, index: int, work, argument):
    """Errors name the record."""
    try:
      return work(argument)
    except (RuntimeError, ValueError) as e:
      raise DatasetError(
        f"record {index} of split '{self._dataset.split}' in "
        f"{self._dataset.path} is damaged: {e}"
      ) from e

  def __repr__(self) -> str:
    # Grain names the pipeline's source in its messages.
    return f"RecordSource({self._dataset.path!r}, {self._dataset.split!r})"
