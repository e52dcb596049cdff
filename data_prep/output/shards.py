"""ArrayRecord files: parts of single videos, and shards for TFDS."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from data_prep import storage
from data_prep.output import ledger
from marlin_jax.records import folders, schema
from marlin_jax.records.cli import UserError

# One record per chunk: a random read then decompresses nothing else.
WRITER_OPTIONS = "group_size:1,zstd:1"

# Bytes of the video files of a shard; its records take about as much.
BYTES_PER_SHARD = 256 << 20
# Readers keep all shards open.
MAX_SHARDS = 2048
# Files, evenly spaced, from whose sizes that of all is estimated: to read a
# million sizes takes minutes on a network disk, and hours in a bucket.
MAX_SIZES = 1000
# Size that counts for folders of pictures and missing files.
USUAL_VIDEO_BYTES = 8 << 20

_READ_BATCH = 16


class ShardError(UserError):
  """A shard cannot be written, or does not read back as written."""


def default_numbers(
  files_by_split: Mapping[str, Collection[Path]],
) -> dict[str, int]:
  """Returns the number of shards of each split, by the bytes of its videos.

  Args:
    files_by_split: the video files, each at least once.
  """
  num_bytes = {
    split: _total_bytes(sorted({*files}))
    for split, files in files_by_split.items()
  }
  bytes_per_shard = max(BYTES_PER_SHARD, sum(num_bytes.values()) / MAX_SHARDS)
  return {
    split: max(int(total / bytes_per_shard), 1)
    for split, total in num_bytes.items()
  }


def _total_bytes(files: Sequence[Path]) -> float:
  """Returns the bytes of files, estimated from `MAX_SIZES` of them."""
  sampled = files[:: math.ceil(len(files) / MAX_SIZES)]
  return sum(map(_size, sampled)) * len(files) / len(sampled)


def _size(file: Path) -> int:
  with contextlib.suppress(OSError):
    is_folder, size, _ = storage.status(file)
    if not is_folder:
      return size
  return USUAL_VIDEO_BYTES


# --- ArrayRecord --------------------------------------------------------------


def holds(path: Path, expected: int) -> bool:
  """Returns True if a file exists and holds `expected` records.

  In a bucket only existence is checked: an object is whole, and counting its
  records would download it.
  """
  if folders.is_remote(path):
    return path.exists()
  return num_records(path) == expected


def num_records(path: Path) -> int | None:
  """Returns the number of records in a file, None if it is not whole."""
  if not path.exists():
    return None
  reader = _open_reader(path)
  try:
    return reader.num_records() if reader.ok() else None
  finally:
    with contextlib.suppress(RuntimeError):
      reader.close()


def read_records(path: Path, first: int, num: int) -> Iterator[bytes]:
  """Yields `num` records, starting at number `first`.

  Raises:
    RuntimeError: the file is damaged.
  """
  reader = _open_reader(path)
  for start in range(first, first + num, _READ_BATCH):
    stop = min(start + _READ_BATCH, first + num)
    yield from reader.read(list(range(start, stop)))
  reader.close()


def read_each(path: Path, num: int) -> Iterator[tuple[int, bytes | Exception]]:
  """Yields number and bytes of the first `num` records.

  A damaged record yields its exception instead; the next record follows.
  """
  reader = _open_reader(path)
  for i in range(num):
    try:
      yield i, reader.read([i])[0]
    except (RuntimeError, IndexError) as e:
      yield i, e
  with contextlib.suppress(RuntimeError):
    reader.close()


def write_shard(
  path: Path, parts: Sequence[tuple[ledger.Entry, Path, int]]
) -> None:
  """Writes a shard, reads it back, and flushes it to disk.

  Args:
    path: file to write; a temporary name that no reader looks for.
    parts: for each video its ledger line, the file with its records, and the
      number of its first record in that file.

  Raises:
    ShardError: a part is damaged, the disk is full, or the shard does not read
      back.
  """
  try:
    writer = _open_writer(path)
    with contextlib.ExitStack() as stack:
      fetch = functools.cache(
        lambda part: stack.enter_context(storage.local(part))
      )
      for entry, part, first in parts:
        if entry.num_records:
          for data in read_records(fetch(part), first, entry.num_records):
            writer.write(data)
    writer.close()
  except RuntimeError as e:
    raise ShardError(f"cannot write {path}: {e}") from e
  _verify(path, [entry for entry, _, _ in parts])
  with open(path, "rb") as file:
    os.fsync(file.fileno())


def _verify(path: Path, entries: Sequence[ledger.Entry]) -> None:
  expected = [e.video_id for e in entries for _ in range(e.num_records)]
  try:
    video_ids = [
      schema.decode(data).video_id
      for data in read_records(path, 0, num_records(path) or 0)
    ]
  except (RuntimeError, ValueError) as e:
    raise ShardError(
      f"{path} does not read back ({e}); check the disk and run again"
    ) from e
  if video_ids != expected:
    raise ShardError(
      f"{path} reads back as {len(video_ids)} records, expected "
      f"{len(expected)} of {len(entries)} videos; check the disk and run again"
    )


def _open_writer(path: Path):
  from array_record.python.array_record_module import ArrayRecordWriter

  return ArrayRecordWriter(str(path), WRITER_OPTIONS)


def _open_reader(path: Path):
  from array_record.python.array_record_module import ArrayRecordReader

  return ArrayRecordReader(
    str(path), "readahead_buffer_size:0,max_parallelism:0"
  )


# --- Parts: one processed video -----------------------------------------------


class Part:
  """Files of a processed video until its shard is written.

  Attributes:
    records: path of the ArrayRecord file; missing if the video has no records.
    line: path of the ledger line; the part exists if this file does.
  """

  def __init__(self, output: Path, video_id: str) -> None:
    name = hashlib.sha256(video_id.encode()).hexdigest()[:32]
    self.records = output / folders.PARTS / f"{name}.array_record"
    self.line = output / folders.PARTS / f"{name}.json"

  @staticmethod
  def is_line(name: str) -> bool:
    """Returns True if a file name is that of a part's ledger line."""
    return re.fullmatch(r"[0-9a-f]{32}\.json", name) is not None

  @staticmethod
  def is_orphan(name: str, names: Collection[str]) -> bool:
    """Returns True for a file of records without a ledger line in `names`."""
    found = re.fullmatch(r"([0-9a-f]{32})\.array_record", name)
    return found is not None and f"{found[1]}.json" not in names

  def entry(self) -> ledger.Entry | None:
    """Returns the ledger line, None if the part is missing or incomplete."""
    line = ledger.read_json(self.line)
    if not line:
      return None
    entry = ledger.Entry(**line)
    if entry.num_records and not holds(self.records, entry.num_records):
      return None
    return entry

  def remove(self) -> None:
    self.line.unlink(missing_ok=True)
    self.records.unlink(missing_ok=True)


class PartWriter:
  """Writes the part of one video; a context manager.

  Leaving it without `commit` writes no part.
  """

  def __init__(self, part: Part) -> None:
    self._part = part
    self._partial = storage.partial_path(part.records)
    self._writer = None

  def add(self, data: bytes) -> None:
    """Writes an encoded record; raises RuntimeError if the disk is full."""
    if self._writer is None:
      self._writer = _open_writer(self._partial)
    self._writer.write(data)

  def commit(self, entry: ledger.Entry) -> None:
    """Publishes the part: its records, then its ledger line."""
    self._close()
    if entry.num_records:
      storage.publish(self._partial, self._part.records)
    ledger.write_json(self._part.line, entry.to_fields())

  def _close(self) -> None:
    if self._writer is not None:
      writer, self._writer = self._writer, None
      writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    # `add` has already reported a full disk.
    with contextlib.suppress(*([RuntimeError] if kind else [])):
      self._close()
    self._partial.unlink(missing_ok=True)
