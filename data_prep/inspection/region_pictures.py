"""Pictures of face regions: colours, tinted crops and a legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from marlin_jax.records.schema import REGIONS

# A colour for each region. The background, the first, is not drawn.
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

LINE_HEIGHT, LEGEND_WIDTH = 20, 130


def overlay(
  frame: np.ndarray, labels: np.ndarray, opacity: float = 0.4
) -> np.ndarray:
  """Draws the regions over a crop, tinted and outlined.

  Args:
    frame: uint8 (H, W, 3), RGB.
    labels: uint8 (H, W), LaPa codes.
    opacity: opacity of the tint, in [0, 1]; outlines are opaque.

  Returns:
    uint8 (H, W, 3), RGB; the background is unchanged.
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
    draw.text((x + 20, y), f"{code} {name}", fill="black", font=font())
  return np.asarray(image)


def save(pixels: np.ndarray, path: Path) -> None:
  """Writes uint8 (H, W, 3), RGB, in the format named by the path's suffix."""
  from PIL import Image

  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def font():
  """Returns the font of all text in pictures."""
  from PIL import ImageFont

  return ImageFont.load_default(size=13)
