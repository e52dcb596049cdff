"""Plain inputs: a folder of videos, a text file of paths, one video."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.listing import CLASS, Label, Listing, ManifestError, Row
from marlin_jax.records import folders

VIDEO_SUFFIXES = (
  *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"),
  *(".mts", ".m2ts", ".flv", ".wmv", ".ogv"),
)
# Folder name -> split.
SPLIT_FOLDERS = {
  "train": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
}


def folder(root: Path) -> Listing:
  """Lists all video files below a folder, except hidden ones."""
  rows = [Row(0, path) for path in video_paths(root)]
  if not rows:
    raise ManifestError(
      f"{root} has no video file (by suffix: {' '.join(VIDEO_SUFFIXES)})"
    )
  return Listing(root, rows)


def class_folders(root: Path) -> Listing:
  """Lists [SPLIT/]CLASS/.../VIDEO; the folder is the label `class`.

  Raises:
    ManifestError: a video has no class folder, or there is only one class.
  """
  listing = folder(root)
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
  return Listing(root, rows, {"class": Label(CLASS, names)}, problems)


def text(manifest: Path, root: Path) -> Listing:
  """Lists a file with one path per line."""
  # Not splitlines, which also splits at rare separators within a name.
  lines = read_text(manifest).replace("\r\n", "\n").split("\n")
  return Listing(
    root, [Row(n, line) for n, line in enumerate(lines, 1) if line]
  )


def read_text(path: Path) -> str:
  """Returns the content; raises ManifestError if it is not UTF-8."""
  try:
    # utf-8-sig: spreadsheets write a byte order mark before the header.
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ManifestError(f"{path} is not UTF-8 text: {e}") from e


def video_paths(root: Path) -> Iterator[str]:
  """Yields the videos below a folder, and links to folders outside it."""
  if folders.is_remote(root):
    yield from _remote_paths(root, "")
    return
  real_root = os.path.realpath(root)
  for parent, folder_names, names in os.walk(root, onerror=_raise):
    inner = Path(parent)
    folder_names[:] = [n for n in folder_names if not n.startswith(".")]
    # os.walk does not enter linked folders. A target below the root is listed
    # there; a target outside is reported like a file.
    linked = [
      name
      for name in folder_names
      if (inner / name).is_symlink() and not is_below(inner / name, real_root)
    ]
    videos = [
      name
      for name in names
      if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")
    ]
    for name in (*linked, *videos):
      yield (inner / name).relative_to(root).as_posix()


def _remote_paths(folder: Path, prefix: str) -> Iterator[str]:
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      continue
    if path.name.lower().endswith(VIDEO_SUFFIXES):
      yield prefix + path.name
    elif path.is_dir():
      yield from _remote_paths(path, f"{prefix}{path.name}/")


def is_below(path: str | Path, real_root: str) -> bool:
  """Returns True if a path, links resolved, is `real_root` or below it."""
  # Not Path.resolve, which fails on circular links.
  inner = os.path.realpath(path)
  return inner == real_root or inner.startswith(os.path.join(real_root, ""))


def _raise(error: OSError) -> None:
  raise ManifestError(f"cannot list {error.filename}: {error.strerror}")
