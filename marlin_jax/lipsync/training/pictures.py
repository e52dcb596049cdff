"""Pictures of lip synchronisation: what is drawn, and how well sound fits.

Axes: B clips, T frames, S pixels of the square picture, M mel rows, O offsets.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marlin_jax.inference import pictures
from marlin_jax.records.mel_spectrogram import MAX_VALUE

_MARGIN = 4
_MEL_HEIGHT = 80
# Of the chart, in pixels.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 300, 56, 44, 28, 16
_INK, _GRID, _LINE, _MARK = (
  (40, 40, 40),
  (220, 220, 220),
  (31, 100, 180),
  (200, 50, 40),
)


def strip(
  masked: np.ndarray,
  reference: np.ndarray,
  drawn: np.ndarray,
  target: np.ndarray,
  mels: np.ndarray,
  *,
  num_frames: int = 5,
) -> np.ndarray:
  """Input, reference, generated and target, and each frame's sound below.

  Args:
    masked, reference, drawn, target: float (B, T, S, S, 3) in [0, 1].
    mels: float (B, T, 16, 80), the sound around each frame.
    num_frames: how many of the T frames to show at most, spread evenly.

  Returns:
    uint8 (rows, columns, 3); for each clip five rows, frames from left to
    right. The sound is shown with low bands at the bottom.
  """
  total = masked.shape[1]
  chosen = np.linspace(0, total - 1, min(num_frames, total)).round().astype(int)
  views = pictures.Views(
    ("input", "reference", "generated", "target"),
    np.stack([as_bytes(x) for x in (masked, reference, drawn, target)]),
  )
  side = masked.shape[2]
  parts = []
  for clip in range(len(masked)):
    frames = views.frames[:, clip : clip + 1, chosen]
    # Without the margin below: the sound belongs to the frames.
    parts.append(pictures.picture(views._replace(frames=frames))[:-_MARGIN])
    sound = [_mel_image(mels[clip, t], side) for t in chosen]
    parts += [
      pictures.caption("sound of each frame", parts[0].shape[1]),
      pictures.beside(sound),
      pictures.blank(_MARGIN, parts[0].shape[1]),
    ]
  return np.concatenate(parts)


def as_bytes(video: np.ndarray) -> np.ndarray:
  """Pictures in [0, 1], cut off there, as uint8."""
  return (np.clip(np.asarray(video, np.float32), 0, 1) * 255 + 0.5).astype(
    np.uint8
  )


def _mel_image(mel: np.ndarray, width: int) -> np.ndarray:
  """float (M, 80) -> uint8 (80, width, 3): time to the right, bands upwards."""
  level = (np.asarray(mel, np.float32).T[::-1] + MAX_VALUE) / (2 * MAX_VALUE)
  image = Image.fromarray(as_bytes(level))
  image = image.resize((width, _MEL_HEIGHT), Image.Resampling.NEAREST)
  return np.asarray(image.convert("RGB"))


def offset_chart(
  offsets: np.ndarray, curves: dict[str, np.ndarray], title: str
) -> np.ndarray:
  """How well sound fits at each offset.

  Args:
    offsets: int (O,), ascending, frames by which the sound is later.
    curves: name -> float (O,), NaN where nothing was measured. The first is
      drawn thick, with a mark at its highest point.
    title: above the chart.

  Returns:
    uint8 (300, 480, 3).
  """
  image = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
  pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
  known = np.concatenate(list(curves.values()))
  low, high = np.nanmin(known), np.nanmax(known)
  room = max(high - low, 0.02) * 0.08
  low, high = low - room, high + room

  def at(offset, value):
    x = (offset - offsets[0]) / max(offsets[-1] - offsets[0], 1)
    y = (value - low) / (high - low)
    return (
      _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
      _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _TOP),
    )

  pen.text((_LEFT, 6), title, fill=_INK, font=font)
  for value in np.linspace(low + room, high - room, 4):
    pen.line([at(offsets[0], value), at(offsets[-1], value)], fill=_GRID)
    place = (_LEFT - 6, at(0, value)[1])
    pen.text(place, f"{value:.3f}", fill=_INK, font=font, anchor="rm")
  for offset in offsets:
    x, y = at(offset, low)
    pen.line([(x, y), (x, y + 4)], fill=_INK)
    pen.text(
      (x, y + 6),
      f"{offset:+d}" if offset else "0",
      fill=_INK,
      font=font,
      anchor="ma",
    )
  bottom = ((_WIDTH + _LEFT) / 2, _HEIGHT - 4)
  text = "frames by which the sound is later"
  pen.text(bottom, text, fill=_INK, font=font, anchor="ms")
  # The first on top.
  for i, curve in reversed(list(enumerate(curves.values()))):
    points = [
      at(o, v) for o, v in zip(offsets, curve, strict=True) if np.isfinite(v)
    ]
    pen.line(points, fill=_GRID if i else _LINE, width=1 if i else 3)
    if not i:
      best = int(np.nanargmax(curve))
      x, y = at(offsets[best], curve[best])
      pen.ellipse([x - 5, y - 5, x + 5, y + 5], outline=_MARK, width=2)
  return np.asarray(image)
