"""A CSV manifest: path, and optionally subject, split, labels and a part.

  path,subject_id,split,label_mood,label_face.glasses,label_face.beard
  a.mp4,Ann,train,happy,1,0
  b.mp4,Bob,test,sad,0,

  path,start_secs,end_secs,x0,y0,x1,y1
  c.mp4,81.62,86.17,0.2,0,0.7,0.88
  c.mp4,90,,,,,

`label_NAME` is a label of one number or class; `label_NAME.PART` is one number
of a label with several. Words are classes; 0 and 1 alone are a binary
attribute; other numbers are values. An empty cell or `nan` is unknown.

`start_secs` and `end_secs` are a span of the file, `x0 y0 x1 y1` the box of a
person, see `listing.Part`. Each row is a video of its own; an empty cell is the
file's beginning or end, or the whole frame.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.files import read_text
from data_prep.sources.listing import (
  BINARY,
  CLASS,
  VALUE,
  Label,
  Listing,
  ManifestError,
  Part,
  Row,
)

COLUMNS = ("path", "subject_id", "split")
BOX = ("x0", "y0", "x1", "y1")
PART = ("start_secs", "end_secs", *BOX)
LABEL = "label_"
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def table(manifest: Path, root: Path) -> Listing:
  """Reads a CSV manifest.

  Raises:
    ManifestError: the header is malformed. The listing holds the problems of
      single rows.
  """
  # newline='': the csv module handles CRLF itself, also within quotes.
  text = io.StringIO(read_text(manifest), newline="")
  reader = csv.reader(text, strict=True)
  cells: list[tuple[int, dict[str, str]]] = []
  problems = []
  header: list[str] = []
  try:
    header = [name.strip() for name in next(reader, [])]
    _check(manifest, header)
    for values in reader:
      if len(values) == len(header):
        cells.append((reader.line_num, dict(zip(header, values, strict=True))))
      elif values:
        problem = (
          f"{len(values)} columns, expected {len(header)} "
          f"({', '.join(header)}); quote a path that contains a comma"
        )
        problems.append((reader.line_num, problem))
  except csv.Error as e:
    problems.append((reader.line_num, f"{e}; nothing after it was read"))
  notes: list[str] = []
  labels, numbers = _labels(header, [row for _, row in cells], notes)
  rows = []
  for i, (number, row) in enumerate(cells):
    try:
      rows.append(
        Row(
          number,
          # Blanks count in paths alone: 'Ann' and 'Ann ' are one person.
          row["path"],
          **{name: row[name].strip() for name in COLUMNS[1:] if name in row},
          labels={name: numbers[name][i] for name in labels},
          part=_part(row),
        )
      )
    except ValueError as e:
      problems.append((number, str(e)))
  return Listing(root, rows, labels, problems, notes)


def _check(manifest: Path, header: list[str]) -> None:
  unknown = [
    name
    for name in header
    if name not in (*COLUMNS, *PART) and not name.startswith(LABEL)
  ]
  # label_a, label_a. and label_a.a are one column.
  columns = {
    _label_part(name) if name.startswith(LABEL) else name for name in header
  }
  num_sides = len({*BOX} & {*header})
  if (
    "path" not in header
    or unknown
    or len(columns) < len(header)
    or num_sides not in (0, len(BOX))
  ):
    raise ManifestError(
      f"{manifest}: the header is {header}, expected `path` and optionally "
      "`subject_id`, `split`, `label_NAME`, `start_secs`, `end_secs` and "
      "all of `x0`, `y0`, `x1`, `y1`, separated by commas"
    )


def _part(row: dict[str, str]) -> Part:
  """Returns the part of the file that a row names.

  Raises:
    ValueError: a cell is not a number, or only some sides of the box are given.
  """
  given = {}
  for name in PART:
    text = row.get(name, "").strip()
    if text and (not _is_number(text)):
      raise ValueError(f"{name} is {text!r}, expected a number")
    if text:
      given[name] = float(text)
  box = tuple(given.pop(name) for name in BOX if name in given)
  if len(box) not in (0, len(BOX)):
    raise ValueError("only some of x0, y0, x1, y1 are given")
  return Part(**given, box=box)


def _label_part(column: str) -> tuple[str, str]:
  """Returns label and part of a label's column."""
  name, _, part = column.removeprefix(LABEL).partition(".")
  return name, part or name


def _labels(
  header: Sequence[str], rows: Sequence[dict[str, str]], notes: list[str]
) -> tuple[dict[str, Label], dict[str, list[tuple[float, ...]]]]:
  """Returns the labels, and each label's numbers by row; adds notes."""
  columns: dict[str, dict[str, str]] = {}
  for column in header:
    if column.startswith(LABEL):
      name, part = _label_part(column)
      columns.setdefault(name, {})[part] = column
  labels, numbers = {}, {}
  for name, parts in columns.items():
    texts = [[_cell(row[column]) for column in parts.values()] for row in rows]
    words = sorted({t for cells in texts for t in cells if not _is_number(t)})
    if words and len(parts) > 1:
      raise ManifestError(
        f"label {name} has the parts {list(parts)} and words such as "
        f"{words[0]!r}; use numbers in parts, or no full stop in the name"
      )
    if words:
      classes = sorted({t for cells in texts for t in cells if t})
      if decimal := next(filter(_DECIMAL_COMMA.fullmatch, words), None):
        notes.append(
          f"label {name} has values such as {decimal!r}, which become classes: "
          "a number has a point"
        )
      if len(words) < len(classes):
        notes.append(
          f"label {name} mixes words such as {words[0]!r} with numbers; each "
          f"of its {len(classes)} values becomes a class"
        )
      labels[name] = Label(CLASS, tuple(classes))
      number_of = {text: float(i) for i, text in enumerate(classes)}
      numbers[name] = [(number_of.get(text, math.nan),) for (text,) in texts]
      continue
    values = [tuple(float(t) if t else math.nan for t in c) for c in texts]
    only_bits = {v for row in values for v in row if v == v} <= {0.0, 1.0}
    labels[name] = Label(BINARY if only_bits else VALUE, tuple(parts))
    numbers[name] = values
  return labels, numbers


def _cell(text: str) -> str:
  text = text.strip()
  return "" if text.lower() == "nan" else text


def _is_number(text: str) -> bool:
  """Returns True for an empty cell or a finite number.

  Not for '1_2', which Python alone takes for 12.
  """
  try:
    return not text or ("_" not in text and math.isfinite(float(text)))
  except ValueError:
    return False
