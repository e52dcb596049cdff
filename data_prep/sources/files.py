"""Plain inputs: a folder of videos or pictures, a list of paths, one file."""

from __future__ import annotations

import collections
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from data_prep.sources.listing import CLASS, Label, Listing, ManifestError, Row
from marlin_jax.records import folders
from marlin_jax.records.cli import counted

VIDEO_SUFFIXES = (
  *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"),
  *(".mts", ".m2ts", ".ts", ".vob", ".flv", ".wmv", ".asf", ".ogv", ".3g2"),
  ".qt",
)
# A picture is a video of one frame.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Suffixes that a note names.
MAX_SUFFIXES = 6
# Folder name -> split.
SPLIT_FOLDERS = {
  "train": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
}


def folder(root: Path, follow_links: bool = False) -> Listing:
  """Lists all videos below a folder, or all pictures if there is no video.

  Hidden files are left out.

  Raises:
    ManifestError: there is neither.
  """
  rows, others = _listed(root, follow_links, is_video)
  notes = []
  num_pictures = sum(n for suffix, n in others.items() if is_picture(suffix))
  if num_pictures and not rows:
    rows, others = _listed(root, follow_links, is_picture)
    notes.append(
      f"{root.name} has no video: each of its {counted(len(rows), 'picture')} "
      "becomes a record of one frame."
    )
  if not rows:
    raise ManifestError(
      f"{root} has no video file (by suffix: {' '.join(VIDEO_SUFFIXES)}) and "
      f"no picture ({' '.join(PICTURE_SUFFIXES)})"
      + (f"; it has {_of_suffixes(others)}" if others else "")
    )
  if others:
    notes.append(
      f"{counted(others.total(), 'file')} of {root.name} left out for other "
      f"suffixes: {_of_suffixes(others)}."
    )
  if any(map(is_picture, others)):
    notes.append(
      "to prepare its pictures, list their paths in a .txt file, and prepare "
      "them into a data set of their own."
    )
  return Listing(root, rows, notes=notes)


def _listed(
  root: Path, follow_links: bool, is_kind: Callable[[str], bool]
) -> tuple[list[Row], collections.Counter[str]]:
  """Returns the files of a kind, and the number of others by suffix."""
  others: collections.Counter[str] = collections.Counter()
  paths = video_paths(root, follow_links, others, is_kind)
  return [Row(0, path) for path in paths], others


def _of_suffixes(others: collections.Counter[str]) -> str:
  """Returns '3 .txt, 1 .json': the most frequent suffixes with their counts."""
  shown = [
    f"{number} {suffix or 'without a suffix'}"
    for suffix, number in sorted(others.items(), key=lambda o: (-o[1], o[0]))
  ]
  more = len(shown) - MAX_SUFFIXES
  shown[MAX_SUFFIXES:] = [f"{more} more suffixes"] if more > 0 else []
  return ", ".join(shown)


def class_folders(root: Path, follow_links: bool = False) -> Listing:
  """Lists [SPLIT/]CLASS/.../VIDEO; the folder is the label `class`.

  Raises:
    ManifestError: a video has no class folder, or there is only one class.
  """
  listing = folder(root, follow_links)
  in_class: list[tuple[Row, str, str]] = []
  problems = []
  for row in listing.rows:
    split, _, rest = row.path.partition("/")
    if split.lower() not in SPLIT_FOLDERS:
      split, rest = "", row.path
    name, _, file = rest.partition("/")
    if file:
      in_class.append((row, SPLIT_FOLDERS.get(split.lower(), ""), name))
    else:
      problems.append(
        (0, f"{row.path!r} is not in a folder that names a class")
      )
  names = tuple(sorted({name for _, _, name in in_class}))
  if len(names) < 2 and not problems:
    raise ManifestError(
      f"{root} has the classes {list(names)}; expected two or more folders, "
      "CLASS/VIDEO or SPLIT/CLASS/VIDEO, SPLIT being train, val or test"
    )
  index_of = {name: i for i, name in enumerate(names)}
  rows = [
    Row(0, row.path, split=split, labels={"class": (float(index_of[name]),)})
    for row, split, name in in_class
  ]
  # Two classes stay classes: nothing tells which one is the positive.
  labels = {"class": Label(CLASS, names)}
  return Listing(root, rows, labels, problems, listing.notes)


def text(manifest: Path, root: Path) -> Listing:
  """Lists a file with one path per line."""
  # Not splitlines, which also splits at rare separators within a name.
  lines = read_text(manifest).replace("\r\n", "\n").split("\n")
  return Listing(
    root, [Row(n, line) for n, line in enumerate(lines, 1) if line]
  )


def read_text(path: Path) -> str:
  """Returns the content; raises ManifestError if it is not UTF-8 text."""
  try:
    # utf-8-sig: spreadsheets write a byte order mark before the header.
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ManifestError(f"{path} is not UTF-8 text: {e}") from e
  except FileNotFoundError as e:
    raise ManifestError(f"{path} is missing") from e


def read_csv(
  path: Path,
) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
  """Returns the columns of a table; number and cells of each line.

  A cell that a line lacks is None.

  Raises:
    ManifestError: the file is no table.
  """
  reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
  try:
    rows = [(reader.line_num, row) for row in reader]
  except csv.Error as e:
    raise ManifestError(f"{path}, line {reader.line_num}: {e}") from e
  return [*(reader.fieldnames or [])], rows


def read_json(path: Path) -> Any:
  """Returns the content; raises ManifestError if it is not JSON."""
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise ManifestError(f"{path} is not JSON: {e or type(e).__name__}") from e


def video_paths(
  root: Path,
  follow_links: bool = False,
  others: collections.Counter[str] | None = None,
  is_kind: Callable[[str], bool] | None = None,
) -> Iterator[str]:
  """Yields the videos below a folder, and links to folders outside it.

  Args:
    root: the folder.
    follow_links: enter linked folders, each real folder once.
    others: counts the suffixes of other files.
    is_kind: selects the files by name; `is_video` by default.
  """
  is_kind = is_kind or is_video
  if folders.is_remote(root):
    yield from _remote_paths(root, "", others, is_kind)
    return
  for prefix, folder_names, names in _walk(root, follow_links):
    for name in () if follow_links else folder_names:
      # Links that are not entered are reported like files.
      if os.path.islink(os.path.join(root, prefix, name)):
        yield prefix + name
    for name in names:
      if _counted(name, others, is_kind):
        yield prefix + name


def folder_paths(
  root: Path, is_video: Callable[[str], Any], follow_links: bool = False
) -> Iterator[str]:
  """Yields the folders of pictures below a folder.

  Args:
    root: the folder, on a disk.
    is_video: tells a folder of pictures by its path; it is not entered.
    follow_links: enter linked folders, each real folder once.
  """
  if folders.is_remote(root):
    raise ManifestError(f"{root}: folders of pictures are read from disks only")
  for prefix, folder_names, _ in _walk(root, follow_links):
    videos = [name for name in folder_names if is_video(prefix + name)]
    folder_names[:] = [n for n in folder_names if n not in {*videos}]
    for name in videos:
      yield prefix + name


def _walk(
  root: Path, follow_links: bool
) -> Iterator[tuple[str, list[str], list[str]]]:
  """Yields folders as os.walk does, without hidden names.

  A folder is given as 'a/b/', '' for the root itself. Strings, not Paths: a
  data set may have millions of files. A link to a folder below the root is left
  out: the folder is listed there. One to a folder outside is entered where
  links are followed, else only named.
  """
  real_root = os.path.realpath(root)
  entered = {real_root}
  walk = os.walk(root, onerror=_raise, followlinks=follow_links)
  for parent, folder_names, names in walk:
    kept = []
    for name in folder_names:
      if name.startswith("."):
        continue
      path = os.path.join(parent, name)
      if os.path.islink(path):
        real = os.path.realpath(path)
        if is_below(real, real_root) or real in entered:
          continue
        entered.add(real)
      kept.append(name)
    folder_names[:] = kept
    prefix = os.path.relpath(parent, root).replace(os.sep, "/") + "/"
    prefix = "" if prefix == "./" else prefix
    yield prefix, folder_names, [n for n in names if not n.startswith(".")]


def is_video(name: str) -> bool:
  """Returns True for the name of a video file, by its suffix."""
  return name.lower().endswith(VIDEO_SUFFIXES)


def is_picture(path: str | os.PathLike) -> bool:
  """Returns True for the path of a picture, by its suffix."""
  return os.fspath(path).lower().endswith(PICTURE_SUFFIXES)


def _counted(
  name: str,
  others: collections.Counter[str] | None,
  is_kind: Callable[[str], bool],
) -> bool:
  """Returns `is_kind`; counts the suffixes of others."""
  is_found = is_kind(name)
  if not is_found and others is not None:
    others[PurePath(name).suffix.lower()] += 1
  return is_found


def outside(path: str) -> str:
  """Returns the problem of a link that leads out of the root."""
  return (
    f"{path!r} is a link that leads out of the root; --follow_links reads it"
  )


def _remote_paths(
  folder: Path,
  prefix: str,
  others: collections.Counter[str] | None,
  is_kind: Callable[[str], bool],
) -> Iterator[str]:
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      continue
    if is_kind(path.name):
      yield prefix + path.name
    elif path.is_dir():
      yield from _remote_paths(path, f"{prefix}{path.name}/", others, is_kind)
    else:
      _counted(path.name, others, is_kind)


def is_below(path: str | Path, real_root: str) -> bool:
  """Returns True if a path, links resolved, is `real_root` or below it."""
  # Not Path.resolve, which fails on circular links.
  inner = os.path.realpath(path)
  return inner == real_root or inner.startswith(os.path.join(real_root, ""))


def _raise(error: OSError) -> None:
  raise ManifestError(f"cannot list {error.filename}: {error.strerror}")
