"""Draws evenly spaced crops of a data set, with their face regions.

  python -m data_prep.contact_sheet DATASET_DIR --output sheet.png

A cell shows a crop, the same crop with its regions, and the record's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.inspection import dataset_statistics, region_pictures
from data_prep.inspection.dataset_statistics import (
  DecodedFrame,
  InspectionError,
  Place,
)
from marlin_jax.records import cli, extras
from marlin_jax.records.schema import FRAME_SIZE

CELL_WIDTH, CELL_HEIGHT = 2 * FRAME_SIZE + 8, FRAME_SIZE + 24
# Number of characters that fit below a cell.
NAME_LENGTH = 60


def contact_sheet(
  dataset_dir: Path, num_frames: int = 24, num_columns: int = 3
) -> np.ndarray:
  """Draws evenly spaced frames of a data set.

  Args:
    dataset_dir: holds `*.array_record*` shards, also in subfolders.
    num_frames: number of cells.
    num_columns: cells per row.

  Returns:
    uint8 (H, W, 3), RGB.

  Raises:
    InspectionError: no shard or no record exists, or one is damaged; names it.
  """
  cells = [cell(frame) for frame in _spread(dataset_dir, num_frames)]
  blank = np.full_like(cells[0], 255)
  cells += [blank] * (-len(cells) % num_columns)
  rows = [
    np.concatenate(cells[i : i + num_columns], axis=1)
    for i in range(0, len(cells), num_columns)
  ]
  return np.concatenate([region_pictures.legend(rows[0].shape[1]), *rows])


def cell(frame: DecodedFrame) -> np.ndarray:
  """Draws a frame, the same frame with its regions, and the record's name.

  Returns:
    uint8 (CELL_HEIGHT, CELL_WIDTH, 3), RGB.
  """
  from PIL import Image, ImageDraw

  tinted = region_pictures.overlay(frame.pixels, frame.labels)
  image = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT), "white")
  image.paste(Image.fromarray(frame.pixels), (0, 0))
  image.paste(Image.fromarray(tinted), (FRAME_SIZE, 0))
  name = f"{frame.record.name} frame {frame.index}"
  # The end of a path tells more than its beginning.
  if len(name) > NAME_LENGTH:
    name = "..." + name[-NAME_LENGTH + 3 :]
  ImageDraw.Draw(image).text(
    (2, FRAME_SIZE + 2), name, fill="black", font=region_pictures.font()
  )
  return np.asarray(image)


def _spread(dataset_dir: Path, num_frames: int) -> Iterator[DecodedFrame]:
  """Yields frames at equal distances over all records, each frame once."""
  shards = sorted(dataset_dir.rglob("*.array_record*"))
  if not shards:
    raise InspectionError(
      f"no *.array_record* file in {dataset_dir}; expected a folder written "
      "by data_prep.prepare"
    )
  counts = [dataset_statistics.num_records(shard) for shard in shards]
  total = sum(counts)
  if total == 0:
    raise InspectionError(
      f"the {len(shards)} shards in {dataset_dir} are empty; "
      "quarantine.jsonl there lists the reasons"
    )
  ends = np.cumsum(counts)
  last = None
  for position in (np.arange(num_frames) + 0.5) * total / num_frames:
    number = int(position)
    shard = int(np.searchsorted(ends, number, side="right"))
    first = int(ends[shard]) - counts[shard]
    frame = dataset_statistics.read_frame(
      Place(shards[shard], number - first), position - number
    )
    if (number, frame.index) != last:
      yield frame
    last = number, frame.index


# --- Command line -------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 after an error, 130 when interrupted."""
  args = _parser().parse_args(argv)

  def work() -> None:
    extras.require("prepare", "data_prep.contact_sheet")
    sheet = contact_sheet(args.dataset_dir, args.num_frames)
    region_pictures.save(sheet, args.output)
    print(f"{args.output}: {sheet.shape[1]}x{sheet.shape[0]} pixels")

  return cli.run_command(work, interrupted="No picture was written.")


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser(
    "data_prep.contact_sheet",
    "Draws evenly spaced crops of a prepared data set into one "
    "picture, each beside the same crop with its face regions in colour.",
  )
  parser.add_argument(
    "dataset_dir", type=Path, help="folder written by data_prep.prepare"
  )
  parser.add_argument(
    "--output",
    type=cli.output_file(".png", ".jpg", ".jpeg"),
    required=True,
    help="picture to write (.png, .jpg)",
  )
  parser.add_argument(
    "--num_frames", type=cli.at_least(1), default=24, help="number of crops"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
