r"""Published layouts as tables: labels in paths, and official lists.

A layout is a `Tree`:

  RAVDESS = Tree(
    "RAVDESS",
    path=r"Actor_(?P<actor>\d\d)/01-\d\d-(?P<emotion>\d\d)-.*",
    example="Actor_01/01-01-01-01-01-01-01.mp4",
    subject="{actor}",
    labels={"emotion": Classes("emotion", {"01": "neutral", "02": "calm"})},
  )
  RAVDESS.read(Path("RAVDESS"))
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from data_prep.sources import files
from data_prep.sources.listing import (
  BINARY,
  CLASS,
  Label,
  Listing,
  ManifestError,
  Row,
  missing_notes,
)
from marlin_jax.records import folders
from marlin_jax.records.cli import counted

Labels = Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Classes:
  """A label that the path names.

  Attributes:
    group: group of the pattern that holds the code.
    names: name of the class of each code; other codes are unknown.
  """

  group: str
  names: Mapping[str, str]

  def label(self, name: str) -> Label:
    del name
    return Label(CLASS, (*self.names.values(),))

  def number(self, code: str) -> float:
    """Returns the number of the class; NaN if it is unknown."""
    return float([*self.names].index(code)) if code in self.names else math.nan


@dataclasses.dataclass(frozen=True)
class Flag:
  """A label, 0 or 1, that the path names.

  Attributes:
    group: group of the pattern that holds the code.
    code: the code of 1.
  """

  group: str
  code: str

  def label(self, name: str) -> Label:
    return Label(BINARY, (name,))

  def number(self, code: str) -> float:
    return float(code == self.code)


@dataclasses.dataclass(frozen=True)
class Listed:
  """Entry of a video in an official list.

  Attributes:
    split: its split.
    labels: numbers by label.
  """

  split: str = ""
  labels: Labels = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Official:
  """Official lists of a data set.

  Attributes:
    videos: entry of each video, by the `key` of its tree.
    labels: meaning of their labels.
  """

  videos: Mapping[str, Listed]
  labels: Mapping[str, Label] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tree:
  """Layout of a data set as a pattern.

  Formats such as '{actor}' are filled with the groups of the pattern.

  Attributes:
    name: name of the data set.
    path: regular expression of a video's path, from any folder on.
    example: a path that it matches, for messages.
    key: format of the video's name in the lists. A key in two folders is an
      error.
    subject: format of the person; '' where people are unknown.
    splits: split by the group `split`.
    labels: labels that the path names.
    official: function that reads the lists, given the folder; raises
      ManifestError.
    unlisted: split of the videos that are not in the lists; '' if they are left
      out.
    frame_rate: frames per second of folders of pictures; 0 for video files.
    has_sound: True if the data set includes sound.
    split_ratios: shares of people in val and test where there are no splits.
  """

  name: str
  path: str
  example: str
  key: str = ""
  subject: str = ""
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
  labels: Mapping[str, Classes | Flag] = dataclasses.field(default_factory=dict)
  official: Callable[[Path], Official] | None = None
  unlisted: str = ""
  frame_rate: float = 0.0
  has_sound: bool = False
  split_ratios: tuple[float, float] = (0.0, 0.0)

  def read(self, root: Path, follow_links: bool = False) -> Listing:
    """Lists the videos below a folder.

    Raises:
      ManifestError: there is none, a list is missing or malformed, or two
        folders hold the same video.
    """
    official = self.official(root) if self.official else None
    matches, others = self._matches(root, follow_links)
    links = [path for path in others if not files.is_video(path)]
    num_others = len(others) - len(links)
    num_found = 0
    if official is not None:
      listed = [(p, g) for p, g in matches if self._key(g) in official.videos]
      num_found = len(listed)
      if not self.unlisted:
        num_others += len(matches) - num_found
        matches = listed
    if not matches and not links:
      raise ManifestError(
        f"{root} has no video of {self.name}; expected files such as "
        f"{self.example}"
      )
    labels = {name: of.label(name) for name, of in self.labels.items()}
    notes = []
    if num_others:
      notes.append(
        f"{counted(num_others, 'other video')} of {root.name} left out: not "
        f"of {self.name} by name"
        + (" or not in its lists." if official is not None else ".")
      )
    if official is not None:
      labels |= official.labels
      num_listed = len(official.videos)
      num_missing = num_listed - num_found
      notes += missing_notes(num_missing, num_listed, "listed videos")
    return Listing(
      root,
      [self._row(path, groups, official) for path, groups in matches],
      labels,
      [(0, files.outside(path)) for path in links],
      notes,
      has_sound=self.has_sound,
      split_ratios=self.split_ratios,
    )

  def _matches(
    self, root: Path, follow_links: bool
  ) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Returns paths with their groups, and the paths of others."""
    pattern = re.compile(f"(?:.*/)?{self.path}")
    if self.frame_rate:
      paths = files.folder_paths(root, pattern.fullmatch, follow_links)
    else:
      paths = files.video_paths(root, follow_links)
    matches, others = [], []
    for path in paths:
      match = pattern.fullmatch(path)
      if match is None:
        others.append(path)
      else:
        matches.append((path, match.groupdict("")))
    if self.key:
      only_once((self._key(groups), path) for path, groups in matches)
    return matches, others

  def _key(self, groups: Mapping[str, str]) -> str:
    return self.key.format(**groups)

  def _row(
    self, path: str, groups: Mapping[str, str], official: Official | None
  ) -> Row:
    listed = Listed()
    if official is not None:
      listed = official.videos.get(self._key(groups), Listed(self.unlisted))
    labels = {
      name: (of.number(groups[of.group]),) for name, of in self.labels.items()
    }
    return Row(
      0,
      path,
      subject_id=self.subject.format(**groups),
      split=listed.split or self.splits.get(groups.get("split", ""), ""),
      labels={**labels, **listed.labels},
      frame_rate=self.frame_rate,
    )


def only_once(videos: Iterable[tuple[str, str]]) -> dict[str, str]:
  """Returns the path of each key.

  Args:
    videos: key and path of each video.

  Raises:
    ManifestError: a key has two paths; names both folders.
  """
  paths: dict[str, str] = {}
  for key, path in videos:
    other = paths.setdefault(key, path)
    if other != path:
      both = sorted({str(PurePosixPath(p).parent) for p in (path, other)})
      raise ManifestError(
        f"{key} is in {' and in '.join(both)}: {other} and {path}. Each "
        "video counts once: give one of the folders as --input"
      )
  return paths


def above(root: Path, name: str) -> Path | None:
  """Returns the file or folder `name` in `root` or in two folders above it.

  Thus `root` may be the folder of the clips, with the lists next to it. Returns
  None if there is no such file.
  """
  root = root if folders.is_remote(root) else root.absolute()
  for folder in (root, *root.parents[:2]):
    if (folder / name).exists():
      return folder / name
  return None


def needed(root: Path, name: str, of: str) -> Path:
  """Returns `above`; raises ManifestError if there is none."""
  path = above(root, name)
  if path is None:
    raise ManifestError(
      f"{root} has no {name}, nor have the folders above it; copy that of {of} "
      "there"
    )
  return path
