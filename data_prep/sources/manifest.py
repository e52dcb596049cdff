"""Lists the videos to prepare, with safe paths and stable splits.

A manifest is not trusted. Every row is checked by its text and by the type of
the file at its path, without opening it; one error lists all bad rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from data_prep import storage
from data_prep.sources import csv_table, files
from data_prep.sources.files import is_below
from data_prep.sources.layouts import LAYOUTS
from data_prep.sources.listing import (
  BINARY,
  WHOLE,
  Label,
  Listing,
  ManifestError,
  Part,
  Row,
  missing_notes,
)
from marlin_jax.records import cli, folders
from marlin_jax.records.cli import counted

MANIFEST_SUFFIXES = (".csv", ".txt")

# More lines would hide the message.
_MAX_PROBLEMS_SHOWN = 20
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# Shard file names are NAME-SPLIT.array_record-...
_SPLIT = re.compile(r"[a-z][a-z0-9_]*")
# Records hold labels as float32.
_MAX_LABEL = 3.4e38
# A feature's name is label_NAME.
_LABEL = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
  """A video to prepare.

  Attributes:
    video_id: path below the root, with forward slashes, and the part of the
      file; unique.
    path: path of the video file, or of a folder of pictures.
    subject_id: identity of the person if known, else ''.
    split: 'train', 'val', or another name given by the input.
    labels: numbers by label; NaN if unknown.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
    part: part of the file that is the video.
    status: size in bytes and time of the last change of the file when it was
      listed; None if it was not asked for.
  """

  video_id: str
  path: Path
  subject_id: str
  split: str
  labels: Mapping[str, tuple[float, ...]] = dataclasses.field(
    default_factory=dict
  )
  frame_rate: float = 0.0
  part: Part = WHOLE
  status: tuple[int, float] | None = dataclasses.field(
    default=None, compare=False, repr=False
  )


@dataclasses.dataclass(frozen=True)
class Input:
  """All videos of an input.

  Attributes:
    sources: sorted by video_id.
    labels: meaning of the sources' labels.
    has_sound: True if the data set includes sound.
    split_ratios: shares of people in val and test, if the input has no splits.
    notes: messages for the user.
  """

  sources: list[Source]
  labels: Mapping[str, Label]
  has_sound: bool
  split_ratios: tuple[float, float]
  notes: list[str]

  @property
  def has_main_face(self) -> bool:
    """True if videos have labels, or parts that say where their person is.

    Subjects are not enough: a person whose track was cut has several tracks,
    and they should all be kept.
    """
    return bool(self.labels) or any(s.part.face_at for s in self.sources)


def read_sources(
  source: str | os.PathLike, root: str | os.PathLike | None = None
) -> list[Source]:
  """Lists the videos of a plain input; see `read_input`."""
  return read_input(source, root).sources


@cli.without_gc
def read_input(
  source: str | os.PathLike,
  root: str | os.PathLike | None = None,
  layout: str | None = None,
  val_ratio: float | None = None,
  test_ratio: float | None = None,
  *,
  follow_links: bool = False,
  skip_missing: bool = False,
) -> Input:
  """Lists the videos of an input.

  Args:
    source: a folder (all video files below it except hidden ones, or all
      pictures if there is no video), a manifest
      (.csv as in `csv_table`, or .txt with one path per line), one video file
      or picture, or 'sample' for the sample videos. With a layout, the folder
      of the data set.
    root: folder that a manifest's paths are relative to; by default its own.
    layout: key of `layouts.LAYOUTS`, for a published data set.
    val_ratio: share of people (of videos, if people are unknown) in 'val', if
      the input has no splits. A hash of the name selects the split, so it does
      not change as videos are added. By default that of the layout, or 0.
    test_ratio: share of people in 'test', likewise.
    follow_links: read links that lead out of the folder, too; only for an input
      that is trusted.
    skip_missing: leave out rows whose file is missing, and note their number.

  Raises:
    ManifestError: no video is found, or rows are bad; lists all of them.
    assets.AssetError: the sample videos cannot be downloaded.
  """
  if str(source) == "sample" and not Path("sample").exists():
    from data_prep import assets

    source = assets.fetch_sample_videos()
  source = storage.path_of(source)
  root = None if root is None else storage.path_of(root)
  listing = _listing(source, root, layout, follow_links)
  listing, statuses = _checked(listing, source, follow_links, skip_missing)
  ratios = _ratios((val_ratio, test_ratio), listing.split_ratios)
  sources = [
    Source(
      video_id=row.video_id,
      path=listing.root / row.path,
      subject_id=row.subject_id,
      split=row.split
      # The parts of a file stay together.
      or split_of(row.subject_id or posixpath.normpath(row.path), *ratios),
      labels=row.labels,
      frame_rate=row.frame_rate,
      part=row.part,
      status=status,
    )
    for row, status in zip(listing.rows, statuses, strict=True)
  ]
  sources.sort(key=lambda source: source.video_id)
  return Input(
    sources, listing.labels, listing.has_sound, ratios, listing.notes
  )


def _listing(
  source: Path, root: Path | None, layout: str | None, follow_links: bool
) -> Listing:
  """Reads an input with the reader for its kind."""
  is_manifest = source.suffix.lower() in MANIFEST_SUFFIXES
  if root is not None and (layout or not (source.is_file() and is_manifest)):
    raise ManifestError(
      f"--root needs a manifest (.csv or .txt), and {source} is not one"
    )
  if layout is not None:
    if not source.is_dir():
      raise ManifestError(
        f"{source} is not a folder; expected the folder of "
        f"the data set {layout}"
      )
    return LAYOUTS[layout].read(source, follow_links)
  if source.is_dir():
    return files.folder(source, follow_links)
  if not source.is_file():
    raise ManifestError(
      f"{source}: no such file or folder; expected a folder of videos or "
      "pictures, a manifest (.csv or .txt), a video file, or the word sample"
    )
  if not is_manifest:
    # The target of a link is likely to have the better name.
    source = source if folders.is_remote(source) else source.resolve()
    return Listing(source.parent, [Row(0, source.name)])
  root = source.parent if root is None else root
  if not root.is_dir():
    raise ManifestError(f"--root={root} is not a folder")
  is_table = source.suffix.lower() == ".csv"
  return (csv_table.table if is_table else files.text)(source, root)


def _ratios(
  given: tuple[float | None, float | None], defaults: tuple[float, float]
) -> tuple[float, float]:
  """Returns the shares of val and test: those given, or else the defaults."""
  val, test = (
    default if ratio is None else ratio
    for ratio, default in zip(given, defaults, strict=True)
  )
  if val + test > 1:
    raise ManifestError(
      f"the ratios of val and test are {val:g} and {test:g}, expected a sum of "
      "at most 1"
    )
  return val, test


def stable_hash(text: str) -> int:
  """Returns 64 bits that are the same on every machine and in every run."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(name: str, val_ratio: float, test_ratio: float = 0.0) -> str:
  """Returns 'val' or 'test' for these shares of all names, else 'train'.

  A name in val stays in val for any share of test.
  """
  place = stable_hash(f"split:{name}") / 2**64
  if place < val_ratio:
    return "val"
  return "test" if place >= 1 - test_ratio else "train"


# --- Checking rows ------------------------------------------------------------


def _checked(
  listing: Listing, source: Path, follow_links: bool, skip_missing: bool
) -> tuple[Listing, list[tuple[int, float] | None]]:
  """Returns the listing without skipped rows, and the status of each file.

  Raises:
    ManifestError: no video is found, or rows are bad; lists all of them.
  """
  problems = list(listing.problems)
  statuses_of = _Statuses(listing.root, follow_links)
  rows, statuses, num_listed = [], [], len(listing.rows)
  for row in listing.rows:
    try:
      problem, status = _problem(row, listing.root, statuses_of)
    except FileNotFoundError as e:
      if skip_missing:
        continue
      problem, status = f"{_shown(row.path)}: {e.strerror}", None
    rows.append(row)
    statuses.append(status)
    if problem is not None:
      problems.append((row.number, problem))
  num_missing = num_listed - len(rows)
  notes = [*listing.notes, *missing_notes(num_missing, num_listed, "files")]
  if num_missing == num_listed > 0:
    raise ManifestError(
      f"{source}: none of its {num_listed} files is below {listing.root}"
    )
  if again := _listed_again(rows, listing.root, statuses_of.links):
    kept = [row.path not in again for row in rows]
    rows, statuses = (
      [*itertools.compress(of, kept)] for of in (rows, statuses)
    )
    links = counted(len(again), "link")
    notes.append(f"{links} to other files of the input left out.")
  listing = dataclasses.replace(listing, rows=rows, notes=notes)
  problems += _group_problems(rows)
  problems += _label_problems(listing)
  if problems:
    raise ManifestError(_summary(source, problems))
  if not rows:
    raise ManifestError(f"{source} lists no video")
  return listing, statuses


def _listed_again(
  rows: list[Row], root: Path, links: Mapping[str, str]
) -> set[str]:
  """Returns the paths of links to files that are listed themselves.

  A table may name a file twice; a folder, whose rows have no number, does so by
  accident, and would have one video in two splits.

  Args:
    rows: the rows.
    root: folder of their paths.
    links: file that each link leads to.
  """
  again: set[str] = set()
  if not links or any(row.number for row in rows):
    return again
  paths = {os.path.join(root, row.path): row.path for row in rows}
  known = {os.path.realpath(path) for path in paths.keys() - links.keys()}
  for path in sorted(links.keys() & paths.keys()):
    if links[path] in known:
      again.add(paths[path])
    known.add(links[path])
  return again


class _Statuses:
  """Status of files, with one request per file: network disks are slow.

  Whether a folder leads out of the root is asked once per folder.

  Attributes:
    links: file that each link leads to.
  """

  def __init__(self, root: Path, follow_links: bool) -> None:
    self.links: dict[str, str] = {}
    self._follow_links = follow_links
    self._real_root = os.path.realpath(root)
    # By folder.
    self._are_below = {str(root): True, "": False, "/": False}

  def __call__(self, path: str) -> os.stat_result | None:
    """Returns a file's status, or None if links lead out of the root.

    Raises:
      OSError: there is no such file.
    """
    may_lead_out = self._follow_links
    if not (may_lead_out or self._is_below(os.path.dirname(path))):
      return None
    status = os.lstat(path)
    if not stat.S_ISLNK(status.st_mode):
      return status
    if not (may_lead_out or is_below(path, self._real_root)):
      return None
    self.links[path] = os.path.realpath(path)
    return os.stat(path)

  def _is_below(self, folder: str) -> bool:
    """Returns `is_below` of a folder, with one request to the disk."""
    inner = []
    while (found := self._are_below.get(folder)) is None:
      inner.append(folder)
      if os.path.islink(folder):
        found = is_below(folder, self._real_root)
        break
      folder = os.path.dirname(folder)
    self._are_below.update(dict.fromkeys(inner, found))
    return found


def _problem(
  row: Row, root: Path, statuses: _Statuses
) -> tuple[str | None, tuple[int, float] | None]:
  """Returns the problem of a row, if any, and its file's size and last change.

  No file is opened.

  Raises:
    FileNotFoundError: its file is missing.
  """
  problem = _text_problem(row)
  if problem is not None:
    return problem, None
  if folders.is_remote(root):
    # Buckets have no links, and a request for each of a million rows takes
    # hours. A missing file is reported when it is downloaded.
    return None, None
  try:
    status = statuses(os.path.join(root, row.path))
  except OSError as e:
    # A colon alone is valid: 'Part 1: the start.mp4' may exist.
    shown = _shown(row.path)
    if _ADDRESS.match(row.path):
      return f"{shown} is an address, not a path", None
    if isinstance(e, FileNotFoundError):
      raise
    return f"{shown}: {e.strerror}", None
  if status is None:
    return files.outside(row.path), None
  if row.frame_rate:
    # The pictures count, not the folder.
    is_right, kind, found = stat.S_ISDIR(status.st_mode), "folder", None
  else:
    is_right, kind = stat.S_ISREG(status.st_mode), "regular file"
    found = status.st_size, status.st_mtime
  if not is_right:
    return f"{_shown(row.path)} is not a {kind}", None
  return None, found


def _text_problem(row: Row) -> str | None:
  for name in csv_table.COLUMNS:
    value = getattr(row, name)
    if not _is_plain(value):
      return (
        f"{name} {_shown(value)} contains a control character or invalid UTF-8"
      )
  if row.split and not _SPLIT.fullmatch(row.split):
    return f"split {_shown(row.split)} is not made of a-z, 0-9 and _"
  if not row.path.strip():
    return "the path is empty"
  if row.path.startswith(("/", "\\")):
    return (
      f"{_shown(row.path)} is absolute, expected a path relative to the root"
    )
  if ".." in row.path and ".." in row.path.split("/"):
    return f"{_shown(row.path)} leads out of the root"
  problem = row.part.problem()
  if row.part.has_times and files.is_picture(row.path):
    problem = "a picture has no times; leave start_secs and end_secs empty"
  return f"{_shown(row.path)}: {problem}" if problem else None


def _group_problems(rows: list[Row]) -> list[tuple[int, str]]:
  """Returns the problems of rows taken together."""
  problems = []
  videos: dict[str, Row] = {}
  people: dict[str, Row] = {}
  with_split = next((row for row in rows if row.split), None)
  for row in rows:
    same = videos.setdefault(row.video_id, row)
    if same is not row:
      problems.append(
        (
          row.number,
          f"{_shown(row.path + row.part.fragment)} is listed twice{_in(same)}",
        )
      )
    if with_split is not None and not row.split:
      problem = (
        f"{_shown(row.path)} has no split, but {_shown(with_split.path)} "
        f"has{_in(with_split)}"
      )
      problems.append((row.number, problem))
    if with_split is None:
      continue
    # The parts of a file show one person, if nobody is named.
    who = f"file {_shown(posixpath.normpath(row.path))}"
    if row.subject_id:
      who = f"subject {_shown(row.subject_id)}"
    other = people.setdefault(who, row)
    if row.split and other.split not in ("", row.split):
      problem = (
        f"{who} is in split {row.split!r}, but in {other.split!r}{_in(other)}; "
        "a person must be in one split only"
      )
      problems.append((row.number, problem))
  return problems


def _in(row: Row) -> str:
  """Returns the place of a row; rows of a folder have no number."""
  return f" (row {row.number})" if row.number else ""


def _label_problems(listing: Listing) -> list[tuple[int, str]]:
  problems = [
    (0, f"label {_shown(name)} is not made of a-z, 0-9 and _")
    for name in listing.labels
    if not _LABEL.fullmatch(name)
  ]
  for row in listing.rows:
    if row.labels.keys() != listing.labels.keys():
      problems.append(
        (row.number, f"labels {[*row.labels]}, expected {[*listing.labels]}")
      )
    for name, label in listing.labels.items():
      values = row.labels.get(name, ())
      if len(values) != label.length or any(
        abs(value) > _MAX_LABEL for value in values
      ):
        problems.append(
          (
            row.number,
            f"label {name} has {list(values)}, expected {label.length} finite "
            f"numbers of at most {_MAX_LABEL}",
          )
        )
      elif label.kind == BINARY and not {v for v in values if v == v} <= {0, 1}:
        what = f"label {name} has {list(values)}, expected 0, 1 or nan"
        problems.append((row.number, what))
  return problems


def _is_plain(text: str) -> bool:
  """Returns True without control characters, line breaks or surrogates."""
  return text.isprintable() or not any(
    unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text
  )


def _shown(text: str) -> str:
  """Returns a printable form that is safe on a terminal."""
  return ascii(text) if not text.isprintable() else repr(text)


def _summary(source: Path, problems: list[tuple[int, str]]) -> str:
  shown = [
    f"row {number}: {problem}" if number else problem
    for number, problem in sorted(problems)[:_MAX_PROBLEMS_SHOWN]
  ]
  more = len(problems) - len(shown)
  if more:
    shown.append(f"and {more} more")
  head = (
    f"{source}: {counted(len(problems), 'bad row')}, no video was opened; "
    "correct the input and run again:"
  )
  return "\n  ".join([head, *shown])
