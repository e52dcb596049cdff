"""Index of the quality of each record of a split.

NAME-SPLIT.quality.npy lies beside the split's shards and holds a row per
record, in the order of shards and of records in a shard. data_prep writes it;
training selects records by it without reading them.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np

from marlin_jax.records.schema import QUALITY_TERMS, Record

# `video` is the number of the record's video in the split.
DTYPE = np.dtype(
  [("video", "<i4"), *((name, "<f4") for name in ("quality", *QUALITY_TERMS))]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """Records of a minimum quality.

  Attributes:
    min_quality: minimum quality of the selected records.
    numbers: int (K,), numbers of the selected records in the split, ascending.
    num_videos: number of videos with a selected record.
    num_left_out: number of records that are not selected.
    num_videos_left_out: number of videos without a selected record.
  """

  min_quality: float
  numbers: np.ndarray
  num_videos: int
  num_left_out: int
  num_videos_left_out: int


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
  rows = (
    (number, *row) for number, video in enumerate(videos) for row in video
  )
  file = io.BytesIO()
  np.save(file, np.fromiter(rows, DTYPE), allow_pickle=False)
  return file.getvalue()


def unpack(data: bytes) -> np.ndarray:
  """Returns the rows of an index, DTYPE (N,).

  Args:
    data: bytes of the file.

  Raises:
    ValueError: the bytes are not an index.
  """
  rows = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
  if rows.dtype != DTYPE or rows.ndim != 1:
    raise ValueError(
      f"it holds {rows.dtype} {rows.shape}, expected rows of {DTYPE}"
    )
  return rows


def select(rows: np.ndarray, min_quality: float) -> Selection:
  """Selects the records of a minimum quality.

  Args:
    rows: DTYPE (N,).
    min_quality: compared as float32, as qualities are stored.
  """
  is_good = rows["quality"] >= np.float32(min_quality)
  num_videos = len(np.unique(rows["video"][is_good]))
  return Selection(
    min_quality,
    np.flatnonzero(is_good),
    num_videos,
    int((~is_good).sum()),
    len(np.unique(rows["video"])) - num_videos,
  )
