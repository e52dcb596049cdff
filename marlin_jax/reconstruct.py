"""Shows what a network makes of a video, or what it looks at in it.

  python -m marlin_jax.reconstruct VIDEO --checkpoint runs/b --output a.mp4
  python -m marlin_jax.reconstruct VIDEO --checkpoint runs/b --output b.png \\
    --attention

Writes the video, what the encoder saw of it and the reconstruction beside each
other; with --attention the video and the encoder's attention as heat, and
prints which regions of the face it falls on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_jax.records import cli
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  import numpy as np

  from marlin_jax.inference.clips import Clips
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.inference.pictures import Views
  from marlin_jax.weights.weights import Architecture


def main(argv: list[str] | None = None) -> None:
  args = _parse_args(argv)
  # Imported here, so that --help answers at once.
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # orbax tells of every file
  try:
    _run(args)
  # RuntimeError: a model or a library is missing.
  except (UserError, ValueError, RuntimeError, OSError) as e:
    sys.exit(f"error: {e}")


def _run(args: argparse.Namespace) -> None:
  from marlin_jax.inference import pictures, reconstruction
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.pretraining.pretext_task import PretextTask
  from marlin_jax.records.schema import FRAME_SIZE, PATCH_SIZE

  # --- Network ----------------------------------------------------------------
  marlin = Marlin.from_pretrained(
    args.checkpoint, full_model=not args.attention
  )
  architecture = marlin.architecture
  if args.attention:
    _check_head(args.head, architecture)
    sizes = architecture.image_size, architecture.patch_size
    needs_regions = sizes == (FRAME_SIZE, PATCH_SIZE)
  else:
    mae = marlin.mae
    task = PretextTask.from_architecture(
      architecture, args.strategy, args.ratio
    )
    needs_regions = task.masking.needs_regions

  # --- Video ------------------------------------------------------------------
  clips = _read(args, architecture, needs_regions)
  numbers = clips.frame_numbers
  print(
    f"{args.video}: frames {numbers[0, 0]} to {numbers[-1, -1]} in "
    f"{len(numbers)} clip(s) of {numbers.shape[1]}",
    flush=True,
  )
  if needs_regions and not clips.regions.any():
    print(
      "note: no face was found in them, so nothing is known of its regions"
      + ("" if args.crop_face else "; --crop_face looks closer")
    )

  # --- Pictures ---------------------------------------------------------------
  if args.attention:
    pictures.save(
      _attention(marlin, clips, args.head),
      args.output,
      frame_numbers=numbers,
      fps=clips.fps,
    )
  else:
    result = reconstruction.reconstruct(mae, clips, task, args.seed)
    print(
      f"pixel loss {result.loss_pixels:.4f} where hidden; flat patches, each "
      f"in its own mean colour: {result.loss_own_colour:.4f}"
    )
    result.save(args.output)
  print(args.output)


def _read(
  args: argparse.Namespace, architecture: Architecture, regions: bool
) -> Clips:
  from tqdm import tqdm

  from marlin_jax.inference.clips import read_clips

  with tqdm(
    desc="reading",
    total=1.0,
    bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    leave=False,
    disable=None,  # where there is no terminal
  ) as bar:
    return read_clips(
      args.video,
      architecture,
      crop_face=args.crop_face,
      regions=regions,
      num_clips=args.num_clips,
      progress=lambda share: bar.update(share - bar.n),
    )


def _check_head(
  head: tuple[int, int] | None, architecture: Architecture
) -> None:
  sizes = architecture.depth, architecture.num_heads
  if head and not (head[0] < sizes[0] and head[1] < sizes[1]):
    raise ValueError(
      f"--head={head[0]},{head[1]}: the encoder has layers 0 to {sizes[0] - 1} "
      f"and heads 0 to {sizes[1] - 1}"
    )


def _attention(
  marlin: Marlin, clips: Clips, head: tuple[int, int] | None
) -> Views:
  """The heat map; prints the table on the way."""
  import numpy as np

  from marlin_jax.inference import pictures

  maps = marlin.attention_maps(clips.video)
  if head:
    name = f"layer {head[0]} head {head[1]}"
    attention = np.asarray(maps.heads[:, *head])
  else:
    name, attention = "rollout", np.asarray(maps.rollout)
  if clips.regions is not None:
    print(_table(attention, clips.regions, name))
  grid = marlin.architecture.tubelets.grid
  return pictures.heat_map(clips.video, attention, grid, name)


def _table(attention: np.ndarray, regions: np.ndarray, name: str) -> str:
  """Shares of each region: of the patches and of the attention."""
  from marlin_jax.inference.attention_maps import (
    SHARES,
    area_shares,
    region_shares,
  )

  areas = area_shares(regions).mean(0)
  shares = region_shares(attention, regions).mean(0)
  lines = [f"{'':12}{'patches':>9}{'attention':>11}{'ratio':>7}   ({name})"]
  for region, area, share in zip(SHARES, areas, shares, strict=True):
    if area:
      lines.append(f"{region:12}{area:>9.1%}{share:>11.1%}{share / area:>7.2f}")
  return "\n".join(lines)


# --- Command line -------------------------------------------------------------


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m marlin_jax.reconstruct",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,  # a misspelled flag is an error
  )
  add = parser.add_argument
  add("video", metavar="VIDEO", type=Path, help="anything that FFmpeg decodes")
  add(
    "--checkpoint",
    required=True,
    help="workdir of a run, weights in any format of marlin_jax.convert, or "
    "name of a published model",
  )
  add(
    "--output",
    required=True,
    type=_output,
    help="what to write; the suffix decides: a still of some frames (.png) or "
    "an animation (.gif, .mp4)",
  )
  add(
    "--crop_face",
    action="store_true",
    help="follow the face and cut it out; not for videos that are face crops",
  )
  add(
    "--num_clips",
    type=cli.at_least(1),
    default=4,
    help="how many clips to show from the beginning of the video, of 32 frames "
    "by default (default 4)",
  )
  hidden = parser.add_argument_group("reconstruction")
  hidden.add_argument(
    "--strategy",
    default="fasking",
    help="what is hidden: fasking, fasking_opp, random, tube or frame (default "
    "fasking)",
  )
  hidden.add_argument(
    "--ratio",
    type=float,
    default=0.9,
    help="share that is hidden; best as in training (default 0.9)",
  )
  hidden.add_argument(
    "--seed",
    type=cli.at_least(0),
    default=0,
    help="of what is hidden (default 0)",
  )
  looked_at = parser.add_argument_group("attention")
  looked_at.add_argument(
    "--attention",
    action="store_true",
    help="show attention instead, rolled out over all layers",
  )
  looked_at.add_argument(
    "--head",
    metavar="LAYER,HEAD",
    type=_head,
    help="of one head instead, both counted from 0",
  )
  args = parser.parse_args(argv)
  if args.head and not args.attention:
    parser.error("--head is of --attention: give both")
  return args


def _output(text: str) -> Path:
  from marlin_jax.inference.pictures import SUFFIXES

  path = Path(text)
  if path.suffix not in SUFFIXES:
    raise argparse.ArgumentTypeError(
      f"{text} ends with none of {', '.join(SUFFIXES)}"
    )
  return path


def _head(text: str) -> tuple[int, int]:
  parts = text.split(",")
  if len(parts) != 2 or not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(f"{text} is not LAYER,HEAD, such as 11,0")
  return int(parts[0]), int(parts[1])


if __name__ == "__main__":
  main()
