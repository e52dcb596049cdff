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
  generated: np.ndarray,
  target: np.ndarray,
  mels: np.ndarray,
  *,
  num_frames: int = 5,
) -> np.ndarray:
  """Draws input, reference, generated and target, and each frame's sound.

  Args:
    masked, reference, generated, target: float (B, T, S, S, 3) in [0, 1].
    mels: float (B, T, 16, 80), the sound around each frame.
    num_frames: number of frames to show at most, spread over the T.

  Returns:
    uint8 (rows, columns, 3): five rows per clip, the sound last, frames from
    left to right. The sound has low bands at the bottom.
  """
  total = masked.shape[1]
  chosen = np.linspace(0, total - 1, min(num_frames, total)).round().astype(int)
  views = pictures.Views(
    ("input", "reference", "generated", "target"),
    np.stack([as_bytes(x) for x in (masked, reference, generated, target)]),
  )
  side = masked.shape[2]
  parts = []
  for clip in range(len(masked)):
    frames = views.frames[:, clip : clip + 1, chosen]
    # Without the margin at the bottom: the sound belongs to the frames.
    parts.append(pictures.picture(views._replace(frames=frames))[:-_MARGIN])
    sound = [_mel_image(mels[clip, t], side) for t in chosen]
    parts += [
      pictures.caption("sound of each frame", parts[0].shape[1]),
      pictures.side_by_side(sound),
      pictures.blank(_MARGIN, parts[0].shape[1]),
    ]
  return np.concatenate(parts)


def as_bytes(video: np.ndarray) -> np.ndarray:
  """Returns frames as uint8, clipped to [0, 1] before."""
  return (np.clip(np.asarray(video, np.float32), 0, 1) * 255 + 0.5).astype(
    np.uint8
  )


def _mel_image(mel: np.ndarray, width: int) -> np.ndarray:
  """Returns mel (M, 80) as a picture, uint8 (80, width, 3): time to the right,
  bands upwards.
  """
  level = (np.asarray(mel, np.float32).T[::-1] + MAX_VALUE) / (2 * MAX_VALUE)
  image = Image.fromarray(as_bytes(level))
  image = image.resize((width, _MEL_HEIGHT), Image.Resampling.NEAREST)
  return np.asarray(image.convert("RGB"))
