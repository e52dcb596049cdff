"""Pictures of the generator's results.

Axes: B clips, T frames, S pixels of the square picture, M mel rows.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from marlin_jax.inference import pictures
from marlin_jax.records.mel_spectrogram import MAX_VALUE

_MARGIN = 4
_MEL_HEIGHT = 80


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
