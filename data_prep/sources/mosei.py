"""CMU-MOSEI (Zadeh et al., ACL 2018): opinions, with sentiment and emotions.

  CMU_MOSEI_Labels.csd                          HDF5: labels and times
  Raw/Transcript/Segmented/Combined/VIDEO.txt   VIDEO___N___start___end___text
  Raw/Videos/Segmented/Combined/VIDEO_N.mp4     the segments
  cmu_mosei_std_folds.py                        the official split (optional)

A table CMU_MOSEI_Labels.csv or label.csv may replace the first two. Its columns
are video_id, clip_id, label (or sentiment), and optionally mode (the split) and
happy, sad, anger, surprise, disgust, fear. The segments of MMSA, which has such
a label.csv, are Raw/VIDEO/N.mp4.

Labels: sentiment, a value from -3 to 3; emotion, six attributes, 1 for a score
above 0, as in the paper. The official split is by video. It comes with the
CMU-MultimodalSDK as a Python file of three lists, which is parsed, never run.
Without it 10% of the videos go to val and 20% to test.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.files import read_csv, read_text, video_paths
from data_prep.sources.listing import (
  BINARY,
  VALUE,
  Label,
  Listing,
  ManifestError,
  Row,
  missing_notes,
)

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
CSD = "CMU_MOSEI_Labels.csd"
TABLES = ("CMU_MOSEI_Labels.csv", "label.csv")
TRANSCRIPTS = "Raw/Transcript/Segmented/Combined"
VIDEOS = "Raw/Videos/Segmented/Combined"
FOLDS = "cmu_mosei_std_folds.py"
# Largest difference in seconds between start times of labels and transcripts.
MAX_SECS_APART = 0.1


class _Segment(NamedTuple):
  """A labelled segment.

  Attributes:
    video: id of the video.
    number: number of the segment in the video, as in its file name.
    split: split named by the table; '' if unknown.
    sentiment: in [-3, 3]; NaN if unknown.
    emotions: scores of EMOTIONS, at least 0; NaN if unknown.
  """

  video: str
  number: str
  split: str
  sentiment: float
  emotions: tuple[float, ...]


def read(root: Path, follow_links: bool = False) -> Listing:
  """Lists the available labelled segments.

  Raises:
    ManifestError: labels are missing or malformed, or there is no video.
  """
  tables = [root / name for name in TABLES if (root / name).is_file()]
  if (root / CSD).is_file():
    segments = list(_csd_segments(root))
  elif tables:
    segments = list(_table_segments(tables[0]))
  else:
    raise ManifestError(
      f"{root} has none of {', '.join((CSD, *TABLES))}, the labels of CMU-MOSEI"
    )
  folds = _folds(root / FOLDS)
  # By one listing: a request for each of the segments takes long.
  existing = {*video_paths(root, follow_links)}
  rows, num_missing = [], 0
  for segment in segments:
    paths = (
      f"{VIDEOS}/{segment.video}_{segment.number}.mp4",
      f"Raw/{segment.video}/{segment.number}.mp4",
      # Tables may pad the number, and so may the files.
      f"Raw/{segment.video}/{segment.number.zfill(4)}.mp4",
    )
    path = next((path for path in paths if path in existing), None)
    if path is None:
      num_missing += 1
      continue
    evidence = tuple(
      score if math.isnan(score) else float(score > 0)
      for score in segment.emotions
    )
    labels = {"sentiment": (segment.sentiment,), "emotion": evidence}
    split = segment.split or folds.get(segment.video, "")
    rows.append(Row(0, path, segment.video, split, labels))
  if not rows:
    raise ManifestError(
      f"none of the {len(segments)} labelled segments is in {root / VIDEOS}; "
      "expected files VIDEO_NUMBER.mp4, or Raw/VIDEO/NUMBER.mp4"
    )
  notes = missing_notes(num_missing, len(segments), "labelled segments")
  if folds:
    unlisted = [row for row in rows if not row.split]
    rows = [row for row in rows if row.split]
    if unlisted:
      notes.append(
        f"{len(unlisted)} segments are left out: {FOLDS} does not list their "
        "videos."
      )
  labels = {
    "sentiment": Label(VALUE, ("sentiment",)),
    "emotion": Label(BINARY, EMOTIONS),
  }
  return Listing(root, rows, labels, notes=notes, split_ratios=(0.1, 0.2))


# --- .csd ---------------------------------------------------------------------


def _csd_segments(root: Path) -> Iterator[_Segment]:
  """Matches labels and segments by time; only transcripts number segments."""
  try:
    import h5py
  except ImportError as e:
    raise ManifestError(
      f"{CSD} is an HDF5 file: pip install 'marlin-jax[mosei]', then run again"
    ) from e
  folder = root / TRANSCRIPTS
  if not folder.is_dir():
    raise ManifestError(
      f"{folder} is missing; copy the transcripts of CMU-MOSEI there: {CSD} "
      "holds times, and only the transcripts map a time to a segment file"
    )
  try:
    with h5py.File(root / CSD, "r") as file:
      # The name of the single group varies.
      (name,) = file
      data = _own(_own(file, name), "data")
      for video in data:
        item = _own(data, video)
        times, numbers = (
          _own(item, name)[()] for name in ("intervals", "features")
        )
        if numbers.shape != (len(times), 1 + len(EMOTIONS)):
          raise ValueError(
            f"{video} has numbers {numbers.shape}, expected {len(times)} x "
            f"{1 + len(EMOTIONS)}"
          )
        starts = dict(_starts(folder / f"{video}.txt"))
        for (start, _), row in zip(times, numbers, strict=True):
          number = _nearest(starts, float(start))
          if number is not None:
            del starts[number]
            scores = tuple(float(v) for v in row)
            yield _Segment(video, number, "", scores[0], scores[1:])
  except (OSError, KeyError, ValueError) as e:
    raise ManifestError(f"{root / CSD} is malformed: {e}") from e


def _own(group, name: str):
  """Returns a member of an HDF5 group that is in this very file."""
  import h5py

  link = group.get(name, getlink=True)
  if not isinstance(link, h5py.HardLink):
    raise KeyError(f"{name!r} is missing, or a link")
  member = group[name]
  if isinstance(member, h5py.Dataset) and member.external:
    raise ValueError(f"{name!r} is stored in another file")
  return member


def _starts(path: Path) -> list[tuple[str, float]]:
  """Returns number and start in seconds of each segment of a video."""
  if not path.is_file():
    return []
  # What is said may be in any encoding; only the fields before it count.
  text = path.read_text("utf-8", errors="replace")
  fields = (line.split("___") for line in text.split("\n"))
  return [(f[1], float(f[2])) for f in fields if len(f) >= 4]


def _nearest(starts: Mapping[str, float], start: float) -> str | None:
  """Returns the number of the segment that starts at `start` in seconds."""
  distances = {number: abs(at - start) for number, at in starts.items()}
  number = min(distances, key=distances.__getitem__, default=None)
  if not number or distances[number] > MAX_SECS_APART:
    return None
  return number


# --- .csv ---------------------------------------------------------------------


def _table_segments(path: Path) -> Iterator[_Segment]:
  """Reads segments from a table; see the module's docstring for its columns."""
  columns, rows = read_csv(path)
  sentiment = "sentiment" if "sentiment" in columns else "label"
  missing = [c for c in ("video_id", "clip_id", sentiment) if c not in columns]
  if missing:
    raise ManifestError(
      f"{path} has the columns {columns}, expected video_id, clip_id, label "
      "(or sentiment), and optionally mode and " + ", ".join(EMOTIONS)
    )
  for line, row in rows:
    try:
      scores = [
        float(row.get(name) or math.nan) for name in (sentiment, *EMOTIONS)
      ]
    except ValueError as e:
      raise ManifestError(f"{path}, line {line}: {e}") from e
    split = row.get("mode") or ""
    if split == "valid":
      split = "val"
    # Spreadsheets may pad 3 to 0003; file names have no leading zeros.
    if not (row["video_id"] and row["clip_id"]):
      raise ManifestError(f"{path}, line {line} has no video_id or clip_id")
    number = row["clip_id"].lstrip("0") or "0"
    yield _Segment(row["video_id"], number, split, scores[0], tuple(scores[1:]))


# --- The official split -------------------------------------------------------


def _folds(path: Path) -> dict[str, str]:
  """Returns the split of each video; {} if the file is missing."""
  if not path.is_file():
    return {}
  names = {
    "standard_train_fold": "train",
    "standard_valid_fold": "val",
    "standard_test_fold": "test",
  }
  folds = {}
  try:
    for node in ast.parse(read_text(path)).body:
      if isinstance(node, ast.Assign) and node.targets[0].id in names:
        for video in ast.literal_eval(node.value):
          folds[video] = names[node.targets[0].id]
  # The parser's errors for brackets within brackets are the last two.
  except (
    *(SyntaxError, ValueError, AttributeError, TypeError),
    *(RecursionError, MemoryError),
  ) as e:
    raise ManifestError(
      f"{path} does not hold three lists of video ids: {e}"
    ) from e
  if set(folds.values()) != set(names.values()):
    raise ManifestError(f"{path} lacks some of the lists {', '.join(names)}")
  return folds
