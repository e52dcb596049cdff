"""Chart of a value over the offset between lips and sound.

Axes: O offsets.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# All in pixels.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _BOTTOM, _TOP, _RIGHT = 56, 44, 28, 16
_MARK_RADIUS = 5
_MAX_TICK_LABELS = 11
_INK, _GRID, _LINE, _MARK = (
  (40, 40, 40),
  (220, 220, 220),
  (31, 100, 180),
  (200, 50, 40),
)


def draw(
  offsets: np.ndarray,
  curves: Mapping[str, np.ndarray],
  title: str,
  *,
  x_label: str = "frames by which the sound is later",
  mark_lowest: bool = False,
) -> np.ndarray:
  """Draws curves over offsets.

  Args:
    offsets: int (O,), ascending.
    curves: name -> float (O,), NaN where nothing was measured. The first is
      drawn thick and on top of the others, with a mark at its best offset.
    title: shown above the chart.
    x_label: meaning of the offsets.
    mark_lowest: the lowest value is the best; otherwise the highest.

  Returns:
    uint8 (300, 480, 3), RGB.
  """
  image = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
  pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
  values = np.concatenate(list(curves.values()))
  low, high = np.nanmin(values), np.nanmax(values)
  padding = max(high - low, 0.02) * 0.08
  low, high = low - padding, high + padding

  def position(offset, value):
    x = (offset - offsets[0]) / max(offsets[-1] - offsets[0], 1)
    y = (value - low) / (high - low)
    return (
      _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
      _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _TOP),
    )

  def write(xy, text, anchor="la"):
    pen.text(xy, text, fill=_INK, font=font, anchor=anchor)

  # --- Axes -------------------------------------------------------------------
  write((_LEFT, 6), title)
  for value in np.linspace(low + padding, high - padding, 4):
    line = position(offsets[0], value), position(offsets[-1], value)
    pen.line(line, fill=_GRID)
    write((_LEFT - 6, line[0][1]), f"{value:.3f}", "rm")
  label_step = -(-len(offsets) // _MAX_TICK_LABELS)
  for offset in offsets:
    x, y = position(offset, low)
    pen.line([(x, y), (x, y + 4)], fill=_INK)
    if offset % label_step == 0:
      write((x, y + 6), f"{offset:+d}" if offset else "0", "ma")
  write(((_WIDTH + _LEFT) / 2, _HEIGHT - 4), x_label, "ms")

  # --- Curves, the first one last, so that it is on top -----------------------
  for i, curve in reversed(list(enumerate(curves.values()))):
    points = [
      position(offset, value)
      for offset, value in zip(offsets, curve, strict=True)
      if np.isfinite(value)
    ]
    pen.line(points, fill=_GRID if i else _LINE, width=1 if i else 3)
  first_curve = next(iter(curves.values()))
  best = int((np.nanargmin if mark_lowest else np.nanargmax)(first_curve))
  x, y = position(offsets[best], first_curve[best])
  r = _MARK_RADIUS
  pen.ellipse([x - r, y - r, x + r, y + r], outline=_MARK, width=2)
  return np.asarray(image)
