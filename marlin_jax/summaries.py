"""Pictures of what the autoencoder sees and makes: numpy in, image files out.

Axes: B clips, T frames, H W pixels, t h w token grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANELS = ("original", "seen by the encoder", "reconstruction")
_HIDDEN = 128  # grey
_MARGIN = 4
_CAPTION = 22


def panels(
  video: np.ndarray, visible: np.ndarray, reconstruction: np.ndarray, grid
) -> np.ndarray:
  """The three views of each clip.

  Args:
    video: uint8 (B, T, H, W, 3).
    visible: bool (B, N), N = t * h * w.
    reconstruction: float (B, T, H, W, 3) in [0, 1].
    grid: (t, h, w).

  Returns:
    uint8 (3, B, T, H, W, 3), in the order of PANELS.
  """
  _, frames, height, width, _ = video.shape
  t, h, w = grid
  seen = visible.reshape(-1, t, h, w)
  for axis, times in ((1, frames // t), (2, height // h), (3, width // w)):
    seen = np.repeat(seen, times, axis)
  hidden = np.where(seen[..., None], video, np.uint8(_HIDDEN))
  made = (np.clip(reconstruction, 0, 1) * 255).round().astype(np.uint8)
  return np.stack([video, hidden, made])


def picture(views: np.ndarray, *, num_frames: int = 6) -> np.ndarray:
  """A still: for each clip a row per panel, frames from left to right.

  Args:
    views: uint8 (3, B, T, H, W, 3), from `panels`.
    num_frames: how many of the T frames to show at most.

  Returns:
    uint8 (rows, columns, 3).
  """
  num_frames = min(num_frames, views.shape[2])
  chosen = np.linspace(0, views.shape[2] - 1, num_frames).round().astype(int)
  rows = []
  for clip in range(views.shape[1]):
    for panel, name in enumerate(PANELS):
      frames = _beside(list(views[panel, clip, chosen]))
      rows += [_caption(name, frames.shape[1]), frames]
    rows.append(_blank(_MARGIN, rows[-1].shape[1]))
  return np.concatenate(rows)


def save_animation(views: np.ndarray, path: Path, *, fps: float) -> None:
  """Writes a looping GIF: the panels side by side, a row per clip.

  Args:
    views: uint8 (3, B, T, H, W, 3), from `panels`.
    path: where to.
    fps: frames per second.
  """
  frames = []
  for time in range(views.shape[2]):
    rows = []
    for clip in range(views.shape[1]):
      row = _beside(list(views[:, clip, time]))
      captions = [_caption(name, views.shape[4]) for name in PANELS]
      rows += [_beside(captions), row]
    frames.append(Image.fromarray(np.concatenate(rows)))
  frames[0].save(
    path,
    save_all=True,
    append_images=frames[1:],
    duration=round(1000 / fps),
    loop=0,
  )


def _blank(height: int, width: int) -> np.ndarray:
  return np.full((height, width, 3), 255, np.uint8)


def _beside(images: list[np.ndarray]) -> np.ndarray:
  gap = _blank(images[0].shape[0], _MARGIN)
  parts = [part for image in images for part in (image, gap)]
  return np.concatenate(parts[:-1], axis=1)


def _caption(text: str, width: int) -> np.ndarray:
  image = Image.fromarray(_blank(_CAPTION, width))
  ImageDraw.Draw(image).text(
    (4, 3), text, fill=(40, 40, 40), font=ImageFont.load_default(14)
  )
  return np.asarray(image)
