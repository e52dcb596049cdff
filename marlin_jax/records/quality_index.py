"""Index of the quality of each record of a split.

NAME-SPLIT.quality.npy lies beside the split's shards and holds a row per
record, in the order of shards and of records in a shard. data_prep writes it;
training selects records by it without reading them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Sequence

import numpy as np

from marlin_jax.records import mapped_arrays
from marlin_jax.records.schema import QUALITY_TERMS, Record
from marlin_jax.records.subset import Subset

# Rows that are read at once; a multiple of 8.
_CHUNK = 1 << 20
# `video` is the number of the record's video in the split.
DTYPE = np.dtype(
  [("video", "<i4"), *((name, "<f4") for name in ("quality", *QUALITY_TERMS))]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """Records of a minimum quality.

  A copy in another process maps the file again, if there is one.

  Attributes:
    min_quality: minimum quality of the selected records.
    records: numbers of the selected records in the split.
    videos: numbers of the videos with a selected record.
    num_left_out: number of records that are not selected.
    num_videos_left_out: number of videos without a selected record.
    fingerprint: sha256 over the fingerprint of the split and `records`.
    path: file that it was opened from; None: it is in memory.
  """

  min_quality: float
  records: Subset
  videos: Subset
  num_left_out: int
  num_videos_left_out: int
  fingerprint: str
  path: str | None = None

  def __reduce__(self):
    if self.path:
      return open_selection, (self.path,)
    values = (getattr(self, f.name) for f in dataclasses.fields(self))
    return Selection, tuple(values)


def name_for(shard: str) -> str:
  """Returns the name of the index, given any shard of its split."""
  return f"{shard.partition('.array_record-')[0]}.quality.npy"


def row_of(record: Record) -> list[float]:
  """Returns quality and terms as numbers that survive JSON and float32.

  A new record and the same record read from disk give equal rows.
  """
  values = (record.quality, *record.quality_terms)
  # The shortest digits that identify the float32.
  return [float(str(np.float32(value))) for value in values]


def pack(videos: Iterable[Sequence[Sequence[float]]]) -> bytes:
  """Returns the bytes of the index.

  Args:
    videos: for each video the rows of its records, results of `row_of`.
  """
  videos = list(videos)
  numbers = np.repeat(np.arange(len(videos)), [*map(len, videos)])
  rows = np.array([row for video in videos for row in video], np.float64)
  return pack_rows(numbers, rows.reshape(-1, len(DTYPE) - 1))


def pack_rows(numbers: np.ndarray, rows: np.ndarray) -> bytes:
  """Returns the bytes of the index.

  Args:
    numbers: int (N,), the number of each row's video.
    rows: float64 (N, 5), results of `row_of`.
  """
  table = np.empty(len(rows), DTYPE)
  for name, column in zip(DTYPE.names, (numbers, *rows.T), strict=True):
    table[name] = column
  file = io.BytesIO()
  np.save(file, table, allow_pickle=False)
  return file.getvalue()


def open_rows(path: os.PathLike) -> np.ndarray:
  """Returns the rows of an index, DTYPE (N,), memory-mapped.

  Args:
    path: a local file.

  Raises:
    ValueError: the file is not an index.
  """
  return _checked(np.load(path, mmap_mode="r", allow_pickle=False))


def unpack(data: bytes) -> np.ndarray:
  """Returns the rows of an index, DTYPE (N,).

  Args:
    data: bytes of the file.

  Raises:
    ValueError: the bytes are not an index.
  """
  file = io.BytesIO(data)
  return _checked(np.lib.format.read_array(file, allow_pickle=False))


def _checked(rows: np.ndarray) -> np.ndarray:
  if rows.dtype != DTYPE or rows.ndim != 1:
    raise ValueError(
      f"it holds {rows.dtype} {rows.shape}, expected rows of {DTYPE}"
    )
  return rows


def select(
  rows: np.ndarray, min_quality: float, fingerprint: str = ""
) -> Selection:
  """Selects the records of a minimum quality; reads the rows once, in order.

  Args:
    rows: DTYPE (N,).
    min_quality: compared as float32, as qualities are stored.
    fingerprint: fingerprint of the split.

  Raises:
    ValueError: the videos of the rows are not in order.
  """
  least = np.float32(min_quality)
  num_videos = int(rows["video"][-1]) + 1 if len(rows) else 0
  # A video may be without records.
  is_present, is_kept = np.zeros((2, num_videos), bool)
  # Hashes the selection, not the threshold: this file is not among the hashed
  # files of a data set.
  bits, digest = [], hashlib.sha256(fingerprint.encode())
  for first in range(0, len(rows), _CHUNK):
    chunk = np.array(rows[first : first + _CHUNK])
    videos, is_good = chunk["video"], chunk["quality"] >= least
    if videos.min() < 0 or videos.max() >= num_videos:
      raise ValueError("its videos are not in order")
    bits.append(np.packbits(is_good))
    digest.update((first + np.flatnonzero(is_good)).astype("<i8").tobytes())
    is_present[videos] = True
    is_kept[videos[is_good]] = True
  records = Subset(np.concatenate([np.zeros(0, np.uint8), *bits]))
  return Selection(
    min_quality,
    records,
    Subset(np.packbits(is_kept)),
    len(rows) - len(records),
    int(is_present.sum()) - int(is_kept.sum()),
    digest.hexdigest(),
  )


def pack_selection(selection: Selection) -> bytes:
  """Returns the bytes of a file for `open_selection`."""
  counts = selection.num_left_out, selection.num_videos_left_out
  digest = np.frombuffer(bytes.fromhex(selection.fingerprint), np.uint8)
  return mapped_arrays.pack(
    [
      np.array([selection.min_quality], np.float64),
      np.array(counts, np.int64),
      digest,
      *selection.records.arrays,
      *selection.videos.arrays,
    ]
  )


def open_selection(path: str | os.PathLike) -> Selection:
  """Returns a selection, memory-mapped: nothing of it is read yet.

  Args:
    path: a local file of `pack_selection`.

  Raises:
    ValueError: the file is none.
    OSError: the file cannot be read.
  """
  arrays = mapped_arrays.open_arrays(path)
  expected = ["f8", "i8", "u1", "u1", "i8", "u1", "i8"]
  if (found := [array.dtype.str[1:] for array in arrays]) != expected:
    raise ValueError(f"it holds arrays of {found}, expected {expected}")
  (min_quality,), counts, digest, *subsets = arrays
  return Selection(
    float(min_quality),
    Subset(*subsets[:2]),
    Subset(*subsets[2:]),
    *counts.tolist(),
    digest.tobytes().hex(),
    os.fspath(path),
  )
