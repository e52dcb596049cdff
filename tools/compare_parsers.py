"""Compares face parsers with each other, or with hand-drawn masks.

  python -m tools.compare_parsers VIDEOS --parsers=mediapipe,bisenet \
    --output=sheet.png
  python -m tools.compare_parsers VIDEOS --parsers=mediapipe \
    --masks=tests/data/masks --output=sheet.png

A row of the picture shows a face: the crop, then the regions from each parser.
The tool prints the intersection over union per region, over all pixels of all
faces, and writes it beside the picture as .json. The reference is the masks if
given, else the first parser.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.inspection import region_pictures
from marlin_jax.records import cli
from marlin_jax.records.cli import UserError
from marlin_jax.records.schema import FRAME_SIZE, REGIONS

if TYPE_CHECKING:
  from data_prep.faces.face_finder import FaceFinder
  from data_prep.regions.parsers import ParserChoice
  from data_prep.sources.manifest import Source

NAME_HEIGHT = 20


@dataclasses.dataclass(frozen=True)
class Face:
  """A face on which parsers are compared.

  Attributes:
    name: caption in the picture.
    frame: uint8 (H, W, 3), RGB.
    box: float32 (4,), the crop in pixels of the frame.
    landmarks: float32 (478, 2), or None without a mesh.
    mask: uint8 (224, 224), LaPa codes drawn by hand, or None.
  """

  name: str
  frame: np.ndarray
  box: np.ndarray
  landmarks: np.ndarray | None
  mask: np.ndarray | None = None


def iou_per_region(
  predicted: np.ndarray, expected: np.ndarray
) -> dict[str, float | None]:
  """Returns intersection over union; None if neither has the region.

  Args:
    predicted: uint8 (N, 224, 224), LaPa codes.
    expected: uint8 (N, 224, 224), LaPa codes.
  """
  scores: dict[str, float | None] = {}
  for code, name in enumerate(REGIONS):
    a, b = predicted == code, expected == code
    union = int((a | b).sum())
    scores[name] = int((a & b).sum()) / union if union else None
  return scores


def drawn_faces(
  sources: Sequence[Source], folder: Path, finder: FaceFinder
) -> Iterator[Face]:
  """Yields the faces with hand-drawn masks whose videos are in `sources`.

  Raises:
    DrawingError: there is no drawing, a drawing is malformed, or its video has
      no such frame.
    decode.DecodeError: a video cannot be read.
  """
  from data_prep.regions import drawings

  by_name = {source.path.name: source for source in sources}
  all_drawings = drawings.read_folder(folder)
  for video in sorted({drawing.video for drawing in all_drawings}):
    if video not in by_name:
      print(f"note: {video} has drawings but is not in the input")
      continue
    of_video = [drawing for drawing in all_drawings if drawing.video == video]
    frames = _frames(by_name[video], {drawing.frame for drawing in of_video})
    for drawing in of_video:
      if drawing.frame not in frames:
        raise drawings.DrawingError(
          f"{drawing.name}: {video} has no frame {drawing.frame}"
        )
      frame = frames[drawing.frame]
      landmarks = finder.mesh(frame, _face_box(drawing.box))
      yield Face(drawing.name, frame, drawing.box, landmarks, drawing.labels)


def tracked_faces(
  sources: Sequence[Source], num_faces: int, finder: FaceFinder
) -> Iterator[Face]:
  """Yields faces at equal distances over the tracks of all videos.

  Raises:
    decode.DecodeError: a video cannot be read.
  """
  from data_prep.faces import tracking
  from data_prep.video import decode

  rows_of_source = []
  for source in sources:
    with _opened(source) as (_, all_frames):
      frames = (frame for frame, _ in all_frames)
      try:
        tracks = tracking.find_tracks(frames, finder, min_frames=1)
      except decode.DecodeError as e:
        raise decode.DecodeError(f"{source.path}: {e}") from e
    rows_of_source.append(
      [(track, row) for track in tracks for row in range(len(track))]
    )
  total = sum(map(len, rows_of_source))
  places = (np.arange(num_faces) + 0.5) * total / num_faces
  chosen = set(np.unique(places.astype(int)).tolist()) if total else set()
  start = 0
  for source, rows in zip(sources, rows_of_source, strict=True):
    own = [rows[i] for i in range(len(rows)) if start + i in chosen]
    start += len(rows)
    numbers = {track.first_frame + row for track, row in own}
    frames = _frames(source, numbers) if numbers else {}
    for track, row in own:
      number = track.first_frame + row
      landmarks = track.meshes[row]
      yield Face(
        f"{source.path.name} #{track.track_id} frame {number}",
        frames[number],
        track.boxes[row],
        landmarks if np.isfinite(landmarks).all() else None,
      )


def label_maps(faces: Sequence[Face], choice: ParserChoice) -> np.ndarray:
  """Returns uint8 (N, 224, 224), LaPa codes; all 0 if no face was parsed."""
  from data_prep.regions import parsers

  maps = np.zeros((len(faces), FRAME_SIZE, FRAME_SIZE), np.uint8)
  with parsers.open_parser(choice) as parser:
    for i, face in enumerate(faces):
      labels = parser.parse(face.frame, face.box, face.landmarks)
      if labels is not None:
        maps[i] = labels
  return maps


def sheet(
  faces: Sequence[Face], columns: Sequence[tuple[str, np.ndarray]]
) -> np.ndarray:
  """Draws a row per face: the crop, and the crop with each column's regions.

  Args:
    faces: N faces.
    columns: name and label maps, uint8 (N, 224, 224), of each column.

  Returns:
    uint8 (H, W, 3), RGB.
  """
  from PIL import Image, ImageDraw

  from data_prep.faces import boxes

  width = (1 + len(columns)) * FRAME_SIZE
  legend = region_pictures.legend(width)
  row_height = FRAME_SIZE + NAME_HEIGHT
  height = len(legend) + NAME_HEIGHT + len(faces) * row_height
  image = Image.new("RGB", (width, height), "white")
  image.paste(Image.fromarray(legend), (0, 0))
  draw = ImageDraw.Draw(image)
  y = len(legend)
  for i, (name, _) in enumerate(columns):
    draw.text(((1 + i) * FRAME_SIZE + 4, y), name, fill="black")
  y += NAME_HEIGHT
  for i, face in enumerate(faces):
    crop = boxes.crop_frame(face.frame, face.box)
    image.paste(Image.fromarray(crop), (0, y))
    for j, (_, maps) in enumerate(columns):
      picture = region_pictures.overlay(crop, maps[i])
      image.paste(Image.fromarray(picture), ((1 + j) * FRAME_SIZE, y))
    draw.text((4, y + FRAME_SIZE + 2), face.name, fill="black")
    y += row_height
  return np.asarray(image)


def table(reference: str, scores: dict[str, dict[str, float | None]]) -> str:
  """Returns the scores as text, one line per region."""
  lines = [
    f"IoU with {reference}",
    f"{'region':12}" + "".join(f"{name:>12}" for name in scores),
  ]
  for region in REGIONS:
    values = [by_region[region] for by_region in scores.values()]
    cells = ["-" if value is None else f"{value:.3f}" for value in values]
    lines.append(f"{region:12}" + "".join(f"{cell:>12}" for cell in cells))
  return "\n".join(lines)


# --- Reading ------------------------------------------------------------------


def _opened(source: Source):
  from data_prep.video import tracked

  frames = tracked.VideoFrames(
    source.path, frame_rate=source.frame_rate, part=source.part
  )
  return frames.open()


def _frames(source: Source, numbers: set[int]) -> dict[int, np.ndarray]:
  """Returns frames of a video by number; leaves out numbers past its end."""
  frames = {}
  with _opened(source) as (_, all_frames):
    for i, (frame, _) in enumerate(all_frames):
      if i in numbers:
        frames[i] = frame
      if i >= max(numbers):
        break
  return frames


def _face_box(box: np.ndarray) -> np.ndarray:
  """Returns the box of the face in a crop."""
  from data_prep.faces import boxes
  from data_prep.regions import lapa

  return lapa.grown(box, 1 / boxes.CROP_RATIO)


# --- Command line -------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 after an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  return cli.run_command(
    lambda: _run(args), interrupted="No picture was written."
  )


def _run(args: argparse.Namespace) -> None:
  from data_prep.faces import face_finder
  from data_prep.regions.parsers import ParserChoice
  from data_prep.sources import manifest

  # --- Faces ------------------------------------------------------------------
  sources = manifest.read_sources(args.input)
  with contextlib.closing(face_finder.FaceFinder()) as finder:
    if args.masks is not None:
      faces = list(drawn_faces(sources, args.masks, finder))
    else:
      faces = list(tracked_faces(sources, args.num_faces, finder))
  if not faces:
    raise UserError(f"no face found in {args.input}")

  # --- Label maps -------------------------------------------------------------
  files = dict(args.parser_path)
  columns = [
    (name, label_maps(faces, ParserChoice(name, files.get(name))))
    for name in args.parsers
  ]
  if args.masks is not None:
    columns.insert(0, ("drawn", np.stack([face.mask for face in faces])))

  # --- Scores and pictures ----------------------------------------------------
  reference, expected = columns[0]
  scores = {name: iou_per_region(m, expected) for name, m in columns[1:]}
  if scores:
    print(table(reference, scores))
  region_pictures.save(sheet(faces, columns), args.output)
  report = {"reference": reference, "num_faces": len(faces), "iou": scores}
  report_path = args.output.with_suffix(".json")
  report_path.write_text(json.dumps(report, indent=2) + "\n")
  num_faces = cli.counted(len(faces), "face")
  print(f"{num_faces}; pictures: {args.output}, scores: {report_path}")


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser(
    "tools.compare_parsers",
    "Compares the regions that face parsers, or hand-drawn masks, "
    "give for the same faces; prints the intersection over union per region.",
  )
  add = parser.add_argument
  add("input", help="a video, a folder of videos, a manifest, or sample")
  add(
    "--parsers",
    type=_names,
    default="mediapipe",
    help="parsers to compare, separated by commas: mediapipe, multiclass, "
    "farl, bisenet",
  )
  add(
    "--parser_path",
    type=_named_path,
    action="append",
    default=[],
    metavar="NAME=FILE",
    help="model file of a parser; repeat for several parsers",
  )
  add(
    "--masks",
    type=Path,
    help="folder of hand-drawn masks (see data_prep/regions/drawings.py): "
    "compare with these masks, on their frames",
  )
  add("--output", type=Path, required=True, help="picture to write (.png)")
  add(
    "--num_faces",
    type=cli.at_least(1),
    default=12,
    help="number of faces, without --masks",
  )
  return parser


def _names(text: str) -> list[str]:
  from data_prep.regions.parsers import PARSERS

  names = text.split(",")
  for name in names:
    if name not in PARSERS:
      raise argparse.ArgumentTypeError(
        f"no parser {name!r}; expected some of {', '.join(PARSERS)}"
      )
  return names


def _named_path(text: str) -> tuple[str, Path]:
  name, _, path = text.partition("=")
  (name,) = _names(name)
  if not path:
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
  return name, Path(path)


if __name__ == "__main__":
  sys.exit(main())
