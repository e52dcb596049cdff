"""What an input names: rows of a table, before anything of it is believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from marlin_jax.records.cli import UserError

BINARY, CLASS, VALUE = "binary", "class", "value"


class ManifestError(UserError):
  """The input names no videos, or names some that must not be read."""


@dataclasses.dataclass(frozen=True)
class Label:
  """What the numbers of a label mean.

  Attributes:
    kind: BINARY, K attributes that are 0 or 1 each; CLASS, one index into the
      names; VALUE, K numbers. NaN is unknown.
    names: of the attributes, the classes or the numbers.
  """

  kind: str
  names: tuple[str, ...]

  @property
  def length(self) -> int:
    """How many numbers a record holds of it."""
    return 1 if self.kind == CLASS else len(self.names)


@dataclasses.dataclass(frozen=True)
class Row:
  """One video as an input names it.

  Attributes:
    number: of the row in its table, counting from 1; 0 outside of tables.
    path: relative to the root, with forward slashes.
    subject_id: identity of the person where known, else ''.
    split: where the input says so, else ''.
    labels: numbers by label.
    frame_rate: of a folder of pictures, in frames per second; 0 for a video.
  """

  number: int
  path: str
  subject_id: str = ""
  split: str = ""
  labels: Mapping[str, tuple[float, ...]] = dataclasses.field(
    default_factory=dict
  )
  frame_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Listing:
  """All that an input names.

  Attributes:
    root: folder that the paths are relative to.
    rows: the videos.
    labels: what the rows' labels mean.
    problems: rows that could not be read: number and what is wrong.
    notes: what the user should know, e.g. of videos that are listed but not
      there.
    has_sound: whether the sound is part of this data set.
    split_ratios: shares of the people that go to val and to test where rows
      give no split and the user says nothing.
  """

  root: Path
  rows: list[Row]
  labels: Mapping[str, Label] = dataclasses.field(default_factory=dict)
  problems: list[tuple[int, str]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  has_sound: bool = False
  split_ratios: tuple[float, float] = (0.0, 0.0)


def missing_notes(num_missing: int, num_listed: int, what: str) -> list[str]:
  """Says what is listed but not there; nothing where all is."""
  if not num_missing:
    return []
  return [f"{num_missing} of {num_listed} {what} are not there."]
