"""Rows of an input before they are checked, and the meaning of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

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
class Row:
  """A video as named by an input.

  Attributes:
    number: number of the row in its table, from 1; 0 outside tables.
    path: path relative to the root, with forward slashes.
    subject_id: identity of the person if known, else ''.
    split: split given by the input, else ''.
    labels: numbers by label.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
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
