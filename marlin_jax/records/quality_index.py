"""The quality of each record of a split, to be known without reading them.

NAME-SPLIT.quality.npy lies beside the split's shards: a row for each record, in
the order of shards and of records in them. data_prep writes it, the trainer
chooses by it.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np

from marlin_jax.records.schema import QUALITY_TERMS, Record

# `video` is the number of the record's video among those of the split.
DTYPE = np.dtype(
  [("video", "<i4"), *((name, "<f4") for name in ("quality", *QUALITY_TERMS))]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """The records that are good enough.

  Attributes:
    min_quality: the lowest quality among them is this or more.
    numbers: int (K,), which they are in the split, in order.
    num_videos: that they are of.
    num_left_out: the other records.
    num_videos_left_out: videos none of whose records is good enough.
  """

  min_quality: float
  numbers: np.ndarray
  num_videos: int
  num_left_out: int
  num_videos_left_out: int


def name_for(shard: str) -> str:
  """Returns the file's name, by that of any shard of its split."""
  return f"{shard.partition('.array_record-')[0]}.quality.npy"


def row_of(record: Record) -> list[float]:
  """Returns quality and terms, as numbers that JSON and float32 both keep.

  The same whether the record was just made or has been read.
  """
  values = (record.quality, *record.quality_terms)
  # The shortest digits that float32 is told by.
  return [float(str(np.float32(value))) for value in values]


def pack(videos: Iterable[Sequence[Sequence[float]]]) -> bytes:
  """Returns the content of the file.

  Args:
    videos: for each the rows of its records, as from `row_of`.
  """
  rows = (
    (number, *row) for number, video in enumerate(videos) for row in video
  )
  file = io.BytesIO()
  np.save(file, np.fromiter(rows, DTYPE), allow_pickle=False)
  return file.getvalue()


def unpack(data: bytes) -> np.ndarray:
  """Returns the rows, DTYPE (N,), of a file's content.

  Raises:
    ValueError: it is no such file.
  """
  rows = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
  if rows.dtype != DTYPE or rows.ndim != 1:
    raise ValueError(
      f"it holds {rows.dtype} {rows.shape}, expected rows of {DTYPE}"
    )
  return rows


def select(rows: np.ndarray, min_quality: float) -> Selection:
  """Chooses the records of a quality, or of a higher one.

  Args:
    rows: DTYPE (N,).
    min_quality: compared as float32, in which qualities are stored.
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
