"""Reads hand-drawn masks: polygons over the crop of a frame, in a JSON file.

  {"video": "a.mp4", "frame": 12, "box": [x0, y0, x1, y1],
   "polygons": [{"region": "hair", "points": [[x, y], ...]}, ...]}

`frame` is the number of the frame in the video, from 0; `box` is its square
crop in pixels of the frame as it is shown; `points` are in the 224x224 pixels
of the crop. A later polygon covers an earlier one; "background" cuts a hole.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from data_prep.regions import lapa
from marlin_jax.records.cli import UserError
from marlin_jax.records.schema import FRAME_SIZE


class DrawingError(UserError):
  """A file is not a drawing; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A hand-drawn mask.

  Attributes:
    name: name of the file without suffix.
    video: file name of the video.
    frame: number of the frame, from 0.
    box: float32 (4,), the crop in source pixels.
    labels: uint8 (224, 224), LaPa codes.
  """

  name: str
  video: str
  frame: int
  box: np.ndarray
  labels: np.ndarray


def read_folder(folder: Path) -> list[Drawing]:
  """Reads all drawings of a folder, by name.

  Raises:
    DrawingError: there is none, or one of them is malformed.
  """
  files = sorted(folder.glob("*.json"))
  if not files:
    raise DrawingError(f"no drawing (*.json) in {folder}")
  return [read(file) for file in files]


def read(file: Path) -> Drawing:
  """Reads one drawing.

  Raises:
    DrawingError: it is malformed.
  """
  try:
    data = json.loads(file.read_text())
    box = np.array(data["box"], np.float32)
    labels = np.zeros((FRAME_SIZE, FRAME_SIZE), np.uint8)
    for polygon in data["polygons"]:
      ring = np.array(polygon["points"], np.float64).reshape(-1, 2)
      lapa.fill(labels, ring, lapa.CODE[polygon["region"]])
    if box.shape != (4,) or not (box[2] > box[0] and box[3] > box[1]):
      raise ValueError(f"box {data['box']}: expected x0 < x1 and y0 < y1")
    return Drawing(
      file.stem, str(data["video"]), int(data["frame"]), box, labels
    )
  except (KeyError, TypeError, ValueError) as e:
    raise DrawingError(
      f"{file} is not a drawing: {type(e).__name__}: {e}; see "
      "data_prep.regions.drawings"
    ) from e
