"""Features of videos from elsewhere: of any encoder, computed by any program.

A table is one of
  a folder with a file for each video, VIDEO_ID.npz, .parquet or .npy, such as
    the output of marlin_jax.features;
  .npz with the arrays `video_id` (R,) and `features` (R, D) or
    (R, windows, D);
  .parquet with the columns `video_id` and `features`, lists of D numbers;
  .csv with a header, a column `video_id` and D columns of numbers.
Rows of one video, such as those of its windows, are pooled. Ids are those of
the data set, with or without the suffix of the video file.

Axes: R rows, V videos, D width.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from marlin_jax.downstream.splits import Split
from marlin_jax.inference import feature_folder, stream
from marlin_jax.records.cli import UserError, counted

_ID, _FEATURES = "video_id", "features"
_SUFFIXES = (".npz", ".npy", ".parquet")


class FeatureTableError(UserError):
  """Features from elsewhere cannot be read, or lack a video."""


@dataclasses.dataclass(frozen=True)
class FeatureTable:
  """Features of videos.

  Attributes:
    source: path of the table.
    rows: float32 (D,) by video id, pooled over the rows of each video.
  """

  source: str
  rows: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def width(self) -> int:
    return len(next(iter(self.rows.values())))

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of ids and features."""
    digest = hashlib.sha256()
    for video_id in sorted(self.rows):
      digest.update(json.dumps(video_id).encode())
      digest.update(self.rows[video_id].astype("<f4").tobytes())
    return digest.hexdigest()

  def of(self, split: Split) -> np.ndarray:
    """Returns the features of the videos of a split, float32 (V, D).

    Raises:
      FeatureTableError: videos are missing.
    """
    names = [self.name_of(video_id) for video_id in split.video_ids]
    missing = [
      video_id
      for video_id, name in zip(split.video_ids, names, strict=True)
      if name is None
    ]
    if missing:
      raise FeatureTableError(
        f"{self.source} has no features of {len(missing)} of "
        f"{counted(len(split), 'video')} of split '{split.name}', such as "
        f"{missing[0]!r}; it has those of {next(iter(self.rows))!r} and "
        f"{len(self) - 1} more. Scores of fewer videos would not compare: add "
        "the missing ones, under the data set's ids"
      )
    return np.stack([self.rows[name] for name in names])

  def name_of(self, video_id: str) -> str | None:
    """Returns the id in `rows` of a video; None if it has no features."""
    for name in (video_id, str(PurePosixPath(video_id).with_suffix(""))):
      if name in self.rows:
        return name
    return None


def read(path: str, pool: str) -> FeatureTable:
  """Reads a table.

  Args:
    path: see the module.
    pool: how rows of a video become one: 'mean', 'std' or 'mean_std'.

  Raises:
    FeatureTableError: there is no table, or it cannot be read.
  """
  pairs = _folder(Path(path)) if Path(path).is_dir() else _file(Path(path))
  rows = collections.defaultdict(list)
  try:
    for video_id, features in pairs:
      rows[video_id].append(np.atleast_2d(np.asarray(features, np.float32)))
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
    raise FeatureTableError(f"{path} cannot be read: {e}") from e
  if not rows:
    raise FeatureTableError(f"{path} holds no features")
  shapes = {part.shape[1:] for parts in rows.values() for part in parts}
  if len(shapes) > 1 or len(min(shapes)) != 1:
    raise FeatureTableError(
      f"{path} holds features of the shapes "
      f"{', '.join(map(str, sorted(shapes)[:3]))}; expected one vector for "
      "each video or window, all of one length"
    )
  pooled = {}
  for video_id, parts in rows.items():
    pooled[video_id] = stream.reduced(np.concatenate(parts), pool)
    if not np.isfinite(pooled[video_id]).all():
      raise FeatureTableError(
        f"{path}: features of {video_id!r} hold NaN or infinity"
      )
  return FeatureTable(path, pooled)


def _folder(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the id and the features of each file."""
  files = sorted(f for f in folder.rglob("*") if f.suffix in _SUFFIXES)
  if not files:
    raise FeatureTableError(
      f"{folder} holds no file VIDEO_ID.npz, .parquet or .npy"
    )
  for file in tqdm(files, desc="features", unit="video", delay=2.0):
    name = file.relative_to(folder).as_posix().removesuffix(file.suffix)
    try:
      features = feature_folder.read_features(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
      raise FeatureTableError(f"{file} cannot be read: {e}") from e
    yield name, features


def _file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the id and the features of each row."""
  if path.suffix == ".npz":
    with np.load(path) as arrays:
      yield from zip(map(str, arrays[_ID]), arrays[_FEATURES], strict=True)
  elif path.suffix == ".parquet":
    ids = feature_folder.read_column(path, _ID)
    features = feature_folder.read_features(path)
    yield from zip(map(str, ids), features, strict=True)
  elif path.suffix == ".csv":
    # Spreadsheets write a byte order mark before the header.
    with path.open(newline="", encoding="utf-8-sig") as lines:
      reader = csv.DictReader(lines)
      if _ID not in (reader.fieldnames or ()):
        raise FeatureTableError(f"{path} has no column '{_ID}'")
      for row in reader:
        row.pop("", None)  # the row number that pandas writes
        yield row.pop(_ID), np.array(list(row.values()), np.float32)
  else:
    raise FeatureTableError(
      f"{path} holds no features: expected a folder, or a file .npz, .parquet "
      "or .csv"
    )
