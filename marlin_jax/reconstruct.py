"""Shows the reconstruction of a video, or the encoder's attention to it.

  python -m marlin_jax.reconstruct VIDEO --checkpoint runs/b --output a.mp4
  python -m marlin_jax.reconstruct VIDEO --checkpoint runs/b --output b.png \\
    --attention

Writes the original video, the visible tokens and the reconstruction side by
side. With --attention, writes the video beside a heat map of the attention, and
prints the share of each face region.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_jax.records import cli, extras
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  import numpy as np

  from marlin_jax.inference.clips import Clips
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.inference.pictures import Views
  from marlin_jax.weights.architecture import Architecture


class ArgumentError(UserError):
  """The arguments do not fit the network or the video."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parse_args(argv)
  # Imported here, so that --help answers at once.
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # orbax logs every file
  return cli.run_command(lambda: _run(args), "No file was written.")


def _run(args: argparse.Namespace) -> None:
  try:
    _reconstruct(args)
  except ValueError as e:  # such as a strategy that leaves nothing visible
    raise ArgumentError(str(e)) from e


def _reconstruct(args: argparse.Namespace) -> None:
  extras.require("features", "marlin_jax.reconstruct")
  from marlin_jax.inference import pictures, reconstruction
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.pretraining.pretext_task import PretextTask
  from marlin_jax.records.schema import FRAME_SIZE
  from marlin_jax.weights import run_checkpoint

  if args.output.resolve() == Path(args.video).resolve():
    raise ArgumentError(f"--output={args.output} is the video itself")

  # --- Network ----------------------------------------------------------------
  marlin = Marlin.from_pretrained(
    args.checkpoint, full_model=not args.attention
  )
  architecture = marlin.architecture
  if args.attention:
    _check_head(args.head, architecture)
    needs_regions = architecture.image_size <= FRAME_SIZE
  else:
    mae = marlin.mae
    strategy, ratio = run_checkpoint.masking_of(args.checkpoint)
    task = PretextTask.from_architecture(
      architecture,
      args.strategy or strategy,
      ratio if args.ratio is None else args.ratio,
    )
    needs_regions = task.masking.needs_regions

  # --- Video ------------------------------------------------------------------
  clips = _read(args, architecture, needs_regions)
  numbers = clips.frame_numbers
  print(
    f"{args.video}: frames {numbers[0, 0]} to {numbers[-1, -1]} in "
    f"{counted(len(numbers), 'clip')} of {counted(numbers.shape[1], 'frame')}",
    flush=True,
  )
  if needs_regions and not clips.regions.any():
    print(
      "note: no face found in these clips, so there are no face regions"
      + ("" if args.crop_face else "; try --crop_face")
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
      f"pixel loss {result.loss_pixels:.4f} of masked patches; baseline, each "
      f"patch's mean colour: {result.loss_own_colour:.4f}"
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
    disable=None,  # without a terminal
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
    raise ArgumentError(
      f"--head={head[0]},{head[1]}: the encoder has layers 0 to {sizes[0] - 1} "
      f"and heads 0 to {sizes[1] - 1}"
    )


def _attention(
  marlin: Marlin, clips: Clips, head: tuple[int, int] | None
) -> Views:
  """Returns the heat map; prints the shares of the face regions."""
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
  """Formats the share of patches and of attention of each region."""
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
  from marlin_jax.inference.pictures import SUFFIXES
  from marlin_jax.pretraining.configuration import MASKING_STRATEGIES

  parser = cli.ArgumentParser("marlin_jax.reconstruct", __doc__)
  add = parser.add_argument
  add("video", metavar="VIDEO", type=Path, help="file that FFmpeg decodes")
  add(
    "--checkpoint",
    required=True,
    help="workdir of a run, weights in any format of marlin_jax.convert, or "
    "name of a published model",
  )
  add(
    "--output",
    required=True,
    type=cli.output_file(*SUFFIXES),
    help="file to write: a still of some frames (.png) or an animation (.gif, "
    ".mp4)",
  )
  add(
    "--crop_face",
    action="store_true",
    help="crop the face, following it over time; not for videos that are face "
    "crops",
  )
  add(
    "--num_clips",
    type=cli.at_least(1),
    default=4,
    help="number of clips from the start of the video; a clip of MARLIN spans "
    "32 frames",
  )
  reconstruction = parser.add_argument_group("reconstruction")
  reconstruction.add_argument(
    "--strategy",
    choices=MASKING_STRATEGIES,
    help="masking strategy (default: that of the run, or fasking)",
  )
  reconstruction.add_argument(
    "--ratio",
    type=float,
    help="share of masked tokens (default: that of the run, or 0.9)",
  )
  reconstruction.add_argument(
    "--seed",
    type=cli.at_least(0),
    default=0,
    help="seed of the masks",
  )
  attention = parser.add_argument_group("attention")
  attention.add_argument(
    "--attention",
    action="store_true",
    help="show attention instead, as rollout over all layers",
  )
  attention.add_argument(
    "--head",
    metavar="LAYER,HEAD",
    type=_head,
    help="show one head instead, both numbers counted from 0",
  )
  args = parser.parse_args(argv)
  if args.head and not args.attention:
    parser.error("--head needs --attention")
  return args


def _head(text: str) -> tuple[int, int]:
  parts = text.split(",")
  if len(parts) != 2 or not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(f"{text} is not LAYER,HEAD, such as 11,0")
  return int(parts[0]), int(parts[1])


if __name__ == "__main__":
  sys.exit(main())
