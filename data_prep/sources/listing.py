"""Rows of an input before they are checked, and the meaning of labels."""

from __future__ import annotations

import dataclasses
import functools
import math
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_jax.records.cli import UserError

BINARY, CLASS, VALUE = "binary", "class", "value"


class ManifestError(UserError):
  """The input names no videos, or videos that must not be read."""


@dataclasses.dataclass(frozen=True)
class Label:
  """Meaning of a label's numbers.

  Attributes:
    kind: BINARY, K attributes that are 0 or 1; CLASS, one index into the names;
      VALUE, K numbers. NaN is unknown.
    names: names of the attributes, classes or numbers.
  """

  kind: str
  names: tuple[str, ...]

  @property
  def length(self) -> int:
    """Number of values of the label in a record."""
    return 1 if self.kind == CLASS else len(self.names)


@dataclasses.dataclass(frozen=True)
class Part:
  """Part of a file that is a video of its own; by default all of it.

  Attributes:
    start_secs: time of its first frame in the file.
    end_secs: time from which on frames are no longer part of it.
    box: x0, y0, x1, y1 of the person in each frame as shown, in fractions of
      its width and height; () for the whole frame.
    face_at: some points within the person's face, each a time in seconds, x and
      y in pixels; () where they are unknown.
  """

  start_secs: float = 0.0
  end_secs: float = math.inf
  box: tuple[float, ...] = ()
  face_at: tuple[tuple[float, float, float], ...] = ()

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Part:
    """Returns the part of `dataclasses.asdict`, read from JSON."""
    return cls(
      fields["start_secs"],
      fields["end_secs"],
      tuple(fields["box"]),
      tuple(tuple(point) for point in fields["face_at"]),
    )

  @property
  def has_times(self) -> bool:
    """True if the part begins or ends within the file."""
    return self.start_secs > 0 or self.end_secs < math.inf

  @property
  def fragment(self) -> str:
    """Suffix that tells parts of a file apart: '#t=1.5,3&box=0,0,0.5,1'.

    Seconds as in a Media Fragments URI; '' for the whole file.
    """
    terms = []
    if self.has_times:
      end = f",{self.end_secs:.10g}" if self.end_secs < math.inf else ""
      terms.append(f"t={self.start_secs:.10g}{end}")
    if self.box:
      terms.append("box=" + ",".join(f"{side:.10g}" for side in self.box))
    return "#" + "&".join(terms) if terms else ""

  def problem(self) -> str | None:
    """Returns the reason why this is not a part of a video, if any."""
    if not 0 <= self.start_secs < self.end_secs:
      return (
        f"it starts at {self.start_secs:g} s and ends at {self.end_secs:g} s, "
        "expected 0 <= start_secs < end_secs"
      )
    if not self.box:
      return None
    x0, y0, x1, y1 = self.box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
      sides = ", ".join(f"{side:g}" for side in self.box)
      return (
        f"its box is {sides}, expected x0 < x1 and y0 < y1 in fractions of the "
        "frame, 0 to 1: divide x by the width and y by the height in pixels"
      )
    return None


WHOLE = Part()
_NUMBERS = r"=[\d.,e+-]+"
_FRAGMENT = re.compile(rf"#(t{_NUMBERS}(&box{_NUMBERS})?|box{_NUMBERS})$")


def fragment_of(video_id: str) -> str:
  """Returns the part of the file in a video's id; '' for all of it."""
  found = _FRAGMENT.search(video_id)
  return found[0] if found else ""


@dataclasses.dataclass(frozen=True)
class Row:
  """A video as named by an input.

  Attributes:
    number: number of the row in its table, from 1; 0 outside tables.
    path: path relative to the root, with forward slashes.
    subject_id: identity of the person if known, else ''.
    split: split given by the input, else ''.
    labels: numbers by label.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
    part: part of the file, if not all of it.
  """

  number: int
  path: str
  subject_id: str = ""
  split: str = ""
  labels: Mapping[str, tuple[float, ...]] = dataclasses.field(
    default_factory=dict
  )
  frame_rate: float = 0.0
  part: Part = WHOLE

  @functools.cached_property
  def video_id(self) -> str:
    """The path in its shortest form, 'a/b.mp4' of './a//b.mp4', and part."""
    return posixpath.normpath(self.path) + self.part.fragment


@dataclasses.dataclass(frozen=True)
class Listing:
  """Content of an input.

  Attributes:
    root: folder that the paths are relative to.
    rows: rows of the input, one per video.
    labels: meaning of the rows' labels.
    problems: row number and problem of each malformed row.
    notes: messages for the user, such as the number of missing videos.
    has_sound: True if the data set includes sound.
    split_ratios: default shares of people in val and test, if rows have no
      split.
  """

  root: Path
  rows: list[Row]
  labels: Mapping[str, Label] = dataclasses.field(default_factory=dict)
  problems: list[tuple[int, str]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  has_sound: bool = False
  split_ratios: tuple[float, float] = (0.0, 0.0)


def missing_notes(num_missing: int, num_listed: int, what: str) -> list[str]:
  """Returns a note about listed files that are missing, if any."""
  if not num_missing:
    return []
  return [f"{num_missing} of {num_listed} {what} are missing."]
