"""Draws what a prepared data set holds: crops and their face regions.

  python -m data_prep.contact_sheet DATASET_DIR --output sheet.png

Every cell shows a crop, the same crop with its regions, and the record's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marlin_jax.records import schema
from marlin_jax.records.cli import UserError
from marlin_jax.records.schema import FRAME_SIZE, REGIONS

# One per region, background first (not drawn).
COLOURS = np.array(
  [
    (0, 0, 0),
    (246, 189, 140),
    (200, 0, 0),
    (0, 40, 220),
    (255, 140, 0),
    (0, 200, 255),
    (0, 190, 60),
    (255, 60, 180),
    (255, 255, 255),
    (140, 0, 200),
    (240, 230, 0),
  ],
  np.uint8,
)

CELL_WIDTH, CELL_HEIGHT = 2 * FRAME_SIZE + 8, FRAME_SIZE + 24
# Characters that fit under a cell.
NAME_LENGTH = 60
LINE_HEIGHT, LEGEND_WIDTH = 20, 130


def overlay(
  frame: np.ndarray, labels: np.ndarray, opacity: float = 0.4
) -> np.ndarray:
  """Draws the regions over a crop, tinted and outlined.

  Args:
    frame: uint8 (H, W, 3), RGB.
    labels: uint8 (H, W), LaPa codes.
    opacity: of the tint, in [0, 1]; outlines are opaque.

  Returns:
    uint8 (H, W, 3), RGB; the background is left as it is.
  """
  colours = COLOURS[labels]
  mixed = (1 - opacity) * frame + opacity * colours
  out = np.where(labels[..., None] > 0, mixed, frame).round().astype(np.uint8)
  edge = np.zeros(labels.shape, bool)
  edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
  edge[1:] |= labels[1:] != labels[:-1]
  edge &= labels > 0
  out[edge] = colours[edge]
  return out


def legend(width: int) -> np.ndarray:
  """Returns uint8 (H, width, 3): the name and colour of each region."""
  from PIL import Image, ImageDraw

  font = _font()
  per_row = max(width // LEGEND_WIDTH, 1)
  num_rows = -(-len(REGIONS) // per_row)
  image = Image.new("RGB", (width, num_rows * LINE_HEIGHT + 8), "white")
  draw = ImageDraw.Draw(image)
  for code, name in enumerate(REGIONS):
    x = code % per_row * LEGEND_WIDTH + 4
    y = code // per_row * LINE_HEIGHT + 4
    colour = tuple(int(c) for c in COLOURS[code])
    draw.rectangle((x, y + 2, x + 14, y + 16), fill=colour, outline="grey")
    if code == 0:  # not tinted: crossed out
      draw.rectangle((x, y + 2, x + 14, y + 16), fill="white", outline="grey")
      draw.line((x, y + 16, x + 14, y + 2), fill="grey")
    draw.text((x + 20, y), f"{code} {name}", fill="black", font=font)
  return np.asarray(image)


def cell(record: schema.Record, index: int) -> np.ndarray:
  """Draws one frame of a record, plain and with its regions, and its name.

  Args:
    record: the record.
    index: frame number in [0, T).

  Returns:
    uint8 (CELL_HEIGHT, CELL_WIDTH, 3).

  Raises:
    ValueError: frame or label map is damaged.
  """
  from PIL import Image, ImageDraw

  frame = schema.decode_frames(record, [index])[0]
  labels = schema.decode_parsing(record)[index]
  image = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT), "white")
  image.paste(Image.fromarray(frame), (0, 0))
  image.paste(Image.fromarray(overlay(frame, labels)), (FRAME_SIZE, 0))
  name = f"{record.name} frame {index}"
  # A path says most at its end.
  if len(name) > NAME_LENGTH:
    name = "..." + name[-NAME_LENGTH + 3 :]
  ImageDraw.Draw(image).text(
    (2, FRAME_SIZE + 2), name, fill="black", font=_font()
  )
  return np.asarray(image)


def contact_sheet(
  dataset_dir: Path, num_frames: int = 24, num_columns: int = 3
) -> np.ndarray:
  """Draws evenly spaced frames of a data set.

  Args:
    dataset_dir: holds `*.array_record*` shards, also in subfolders.
    num_frames: how many frames.
    num_columns: cells per row.

  Returns:
    uint8 (H, W, 3), RGB.

  Raises:
    ValueError: there is no shard or no record, or one of them is damaged; says
      which.
  """
  cells = [cell(record, i) for record, i in _spread(dataset_dir, num_frames)]
  blank = np.full_like(cells[0], 255)
  cells += [blank] * (-len(cells) % num_columns)
  rows = [
    np.concatenate(cells[i : i + num_columns], axis=1)
    for i in range(0, len(cells), num_columns)
  ]
  return np.concatenate([legend(rows[0].shape[1]), *rows])


def _spread(
  dataset_dir: Path, num_frames: int
) -> list[tuple[schema.Record, int]]:
  """Returns (record, frame number) pairs, evenly spaced over the data set."""
  from array_record.python import array_record_module

  shards = sorted(Path(dataset_dir).rglob("*.array_record*"))
  if not shards:
    raise ValueError(
      f"no *.array_record* file in {dataset_dir}; expected the folder that "
      "data_prep.prepare wrote"
    )
  counts = []
  for shard in shards:
    reader = array_record_module.ArrayRecordReader(str(shard))
    # A damaged file does not raise: it is not ok and looks empty.
    if not reader.ok():
      raise ValueError(
        f"{shard} is no whole ArrayRecord file; prepare it again"
      )
    counts.append(reader.num_records())
    reader.close()
  total = sum(counts)
  if total == 0:
    raise ValueError(f"the {len(shards)} shards in {dataset_dir} are empty")

  starts = np.concatenate([[0], np.cumsum(counts)])
  chosen = []
  for place in (np.arange(num_frames) + 0.5) * total / num_frames:
    number, within = int(place), place - int(place)
    s = int(np.searchsorted(starts, number, side="right")) - 1
    reader = array_record_module.ArrayRecordReader(str(shards[s]))
    try:
      data = reader.read([number - int(starts[s])])[0]
      record = schema.decode(data)
    except (RuntimeError, ValueError, IndexError) as e:
      raise ValueError(
        f"record {number - int(starts[s])} of {shards[s]} cannot be read: {e}"
      ) from e
    finally:
      reader.close()
    chosen.append((record, int(within * len(record))))
  return chosen


def _font():
  from PIL import ImageFont

  return ImageFont.load_default(size=13)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.contact_sheet",
    description="Draws evenly spaced crops of a prepared data set, each beside "
    "itself with the face regions in colour, into one picture.",
  )
  parser.add_argument(
    "dataset_dir", type=Path, help="folder that data_prep.prepare wrote"
  )
  parser.add_argument(
    "--output", type=Path, required=True, help="picture to write (.png, .jpg)"
  )
  parser.add_argument(
    "--num_frames", type=int, default=24, help="crops to show (default 24)"
  )
  args = parser.parse_args(argv)
  if args.num_frames < 1:
    parser.error(f"--num_frames is {args.num_frames}, expected 1 or more")

  from PIL import Image

  try:
    sheet = contact_sheet(args.dataset_dir, args.num_frames)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.output)
  except (UserError, ValueError, OSError) as e:
    sys.exit(f"contact_sheet: {e}")
  print(f"{args.output}: {sheet.shape[1]}x{sheet.shape[0]} pixels")


if __name__ == "__main__":
  main()
