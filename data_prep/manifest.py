"""Which videos to prepare: folders and manifests in, safe paths and splits out.

Paths come from others too. Every row is judged by its text and by what lies at
the path, without opening it; all bad rows come out in one error.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import re
import stat
import unicodedata
from pathlib import Path

VIDEO_SUFFIXES = (
  *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"),
  *(".mts", ".m2ts", ".flv", ".wmv", ".ogv"),
)
MANIFEST_SUFFIXES = (".csv", ".txt")
COLUMNS = ("path", "subject_id", "split")

# More would bury the message.
_MAX_PROBLEMS_SHOWN = 20
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# Shard file names are NAME-SPLIT.array_record-...
_SPLIT = re.compile(r"[a-z][a-z0-9_]*")


class ManifestError(ValueError):
  """The input names no videos, or names some that must not be read."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One video to prepare.

  Attributes:
    video_id: its path below the root, with forward slashes; unique.
    path: where it lies.
    subject_id: identity of the person where known, else ''.
    split: 'train', 'val', or whatever the manifest says.
  """

  video_id: str
  path: Path
  subject_id: str
  split: str


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row as read; its number counts from 1, 0 outside of manifests."""

  number: int
  path: str
  subject_id: str = ""
  split: str = ""


# What is wrong: row number and text.
_Problem = tuple[int, str]


def read_sources(
  source: str | os.PathLike,
  root: str | os.PathLike | None = None,
  val_ratio: float = 0.0,
) -> list[Source]:
  """Lists the videos of an input, sorted by video_id.

  Args:
    source: a folder (all video files below it that are not hidden), a manifest
      (.csv with a header of `path` and optionally `subject_id` and `split`, or
      .txt with one path a line), one video file, or 'sample' for the sample
      videos.
    root: what a manifest's paths are relative to; its own folder by default.
    val_ratio: share of the people (of the videos where people are unknown)
      that go to 'val' where the manifest does not give splits. The choice
      follows from a hash of the name, so it never changes as videos are added.

  Raises:
    ManifestError: nothing found, or bad rows, all of them listed.
    assets.AssetError: the sample videos could not be had.
  """
  if str(source) == "sample" and not Path("sample").exists():
    from data_prep import assets

    source = assets.fetch_sample_videos()
  source = Path(source)
  problems: list[_Problem] = []
  is_manifest = source.suffix.lower() in MANIFEST_SUFFIXES
  if root is not None and not (source.is_file() and is_manifest):
    raise ManifestError(f"a root is for manifests, and {source} is none")
  if source.is_dir():
    root, rows = source, _folder_rows(source)
  elif not source.is_file():
    raise ManifestError(
      f"{source}: no such file or folder; expected a folder of videos, a "
      "manifest (.csv or .txt), a video file, or the word sample"
    )
  elif is_manifest:
    root = source.parent if root is None else Path(root)
    if not root.is_dir():
      raise ManifestError(f"root {root} is no folder")
    rows, problems = _manifest_rows(source)
  else:
    source = source.resolve()
    root, rows = source.parent, [_Row(0, source.name)]

  for row in rows:
    problem = _problem(row, root)
    if problem is not None:
      problems.append((row.number, problem))
  problems += _group_problems(rows)
  if problems:
    raise ManifestError(_summary(source, problems))
  if not rows:
    raise ManifestError(f"{source} names no video")
  sources = [
    Source(
      video_id=_video_id(row.path),
      path=root / row.path,
      subject_id=row.subject_id,
      split=row.split
      or split_of(row.subject_id or _video_id(row.path), val_ratio),
    )
    for row in rows
  ]
  return sorted(sources, key=lambda source: source.video_id)


def stable_hash(text: str) -> int:
  """Returns 64 bits that are the same on every machine and in every run."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(name: str, val_ratio: float) -> str:
  """Returns 'val' for a share of `val_ratio` of all names, else 'train'."""
  return "val" if stable_hash(f"split:{name}") < val_ratio * 2**64 else "train"


# --- Reading rows -------------------------------------------------------------


def _folder_rows(folder: Path) -> list[_Row]:
  rows = []
  for parent, folder_names, names in os.walk(folder, onerror=_raise):
    inner = Path(parent)
    folder_names[:] = [n for n in folder_names if not n.startswith(".")]
    # os.walk does not enter linked folders. One that leads elsewhere below the
    # root is met there; one that leads out is reported like a file.
    linked = [
      name
      for name in folder_names
      if (inner / name).is_symlink() and not _is_below(inner / name, folder)
    ]
    videos = [
      name
      for name in names
      if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")
    ]
    for name in (*linked, *videos):
      path = (inner / name).relative_to(folder).as_posix()
      rows.append(_Row(0, path))
  if not rows:
    raise ManifestError(
      f"{folder} holds no video file (by suffix: {' '.join(VIDEO_SUFFIXES)})"
    )
  return rows


def _raise(error: OSError) -> None:
  raise ManifestError(f"cannot list {error.filename}: {error.strerror}")


def _manifest_rows(manifest: Path) -> tuple[list[_Row], list[_Problem]]:
  try:
    # utf-8-sig: spreadsheets put a byte order mark before the header.
    text = manifest.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ManifestError(f"{manifest} is not UTF-8 text: {e}") from e
  if manifest.suffix.lower() == ".csv":
    return _csv_rows(manifest, text)
  # Not splitlines, which also splits at exotic separators within a name.
  lines = text.replace("\r\n", "\n").split("\n")
  return [_Row(n, line) for n, line in enumerate(lines, 1) if line], []


def _csv_rows(manifest: Path, text: str) -> tuple[list[_Row], list[_Problem]]:
  # newline='': the csv module itself deals with CRLF, also within quotes.
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  rows, problems = [], []
  try:
    header = [name.strip() for name in next(reader, [])]
    unknown = [name for name in header if name not in COLUMNS]
    if "path" not in header or unknown or len(set(header)) < len(header):
      raise ManifestError(
        f"{manifest}: the header is {header}, expected `path` and optionally "
        "`subject_id` and `split`, separated by commas"
      )
    for values in reader:
      if len(values) == len(header):
        rows.append(
          _Row(reader.line_num, **dict(zip(header, values, strict=True)))
        )
      elif values:
        problem = (
          f"{len(values)} columns, expected {len(header)} "
          f"({', '.join(header)}); quote a path that holds a comma"
        )
        problems.append((reader.line_num, problem))
  except csv.Error as e:
    problems.append((reader.line_num, f"{e}; nothing after it was read"))
  return rows, problems


# --- Judging rows -------------------------------------------------------------


def _problem(row: _Row, root: Path) -> str | None:
  """Says what is wrong with a row; looks at the path, opens nothing."""
  problem = _text_problem(row)
  if problem is not None:
    return problem
  path, shown = root / row.path, _shown(row.path)
  try:
    if not _is_below(path, root):
      return f"{shown} is a link that leads out of the root"
    mode = path.stat().st_mode
  except OSError as e:
    # A colon alone is no crime: 'Part 1: the start.mp4' may exist.
    if _ADDRESS.match(row.path):
      return f"{shown} is an address, not a path"
    return f"{shown}: {e.strerror}"
  return None if stat.S_ISREG(mode) else f"{shown} is no regular file"


def _text_problem(row: _Row) -> str | None:
  shown = _shown(row.path)
  for name in COLUMNS:
    value = getattr(row, name)
    if not _is_plain(value):
      return f"{name} {_shown(value)} holds a control character or no UTF-8"
  if row.split and not _SPLIT.fullmatch(row.split):
    return f"split {_shown(row.split)} is not made of a-z, 0-9 and _"
  if not row.path.strip():
    return "the path is empty"
  if row.path.startswith(("/", "\\")):
    return f"{shown} is absolute, expected a path relative to the root"
  if ".." in row.path.split("/"):
    return f"{shown} leads out of the root"
  return None


def _group_problems(rows: list[_Row]) -> list[_Problem]:
  """Says what is wrong with rows taken together."""
  problems = []
  paths: dict[str, _Row] = {}
  subjects: dict[str, _Row] = {}
  with_split = next((row for row in rows if row.split), None)
  for row in rows:
    same = paths.setdefault(_video_id(row.path), row)
    if same is not row:
      problems.append(
        (row.number, f"{_shown(row.path)} as in row {same.number}")
      )
    if with_split is not None and not row.split:
      problem = f"the split is empty, but given in row {with_split.number}"
      problems.append((row.number, problem))
    other = subjects.setdefault(row.subject_id, row)
    if row.subject_id and row.split and other.split not in ("", row.split):
      problem = (
        f"subject {_shown(row.subject_id)} is in split {row.split!r}, but in "
        f"{other.split!r} in row {other.number}; a person must be in one "
        "split only"
      )
      problems.append((row.number, problem))
  return problems


def _video_id(path: str) -> str:
  """Normalises './a//b.mp4' to 'a/b.mp4'."""
  return Path(path).as_posix()


def _is_below(path: Path, root: Path) -> bool:
  # Not Path.resolve, which fails on links in a circle.
  inner = Path(os.path.realpath(path))
  return inner.is_relative_to(os.path.realpath(root))


def _is_plain(text: str) -> bool:
  """Says whether a text has no control, line break or half characters."""
  return not any(
    unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text
  )


def _shown(text: str) -> str:
  """Returns a printable form that cannot disturb a terminal."""
  return ascii(text) if not text.isprintable() else repr(text)


def _summary(source: Path, problems: list[_Problem]) -> str:
  shown = [
    f"row {number}: {problem}" if number else problem
    for number, problem in sorted(problems)[:_MAX_PROBLEMS_SHOWN]
  ]
  more = len(problems) - len(shown)
  if more:
    shown.append(f"and {more} more")
  head = f"{source}: {len(problems)} bad paths, no video was opened:"
  return "\n  ".join([head, *shown])
