"""Which part of a spectrogram belongs to which frames.

As in github.com/Rudrabha/Wav2Lip, color_syncnet_train.py and wav2lip_train.py:
25 frames and 80 mel rows a second; the window of the frames from f on begins at
row int(80 f / 25), and that of the single frame f, in the middle of which it
is heard, with the frame before.

Wav2Lip leaves out frames whose windows reach past the sound. Here the sound's
first or last row is repeated, so that every frame has its windows.

Axes: N frames, M rows of a window, R rows of the sound, 80 mel bands.
"""

from __future__ import annotations

import math

import numpy as np

from marlin_jax.records.mel_spectrogram import MEL_RATE
from marlin_jax.records.schema import NUM_MELS

FPS = 25
# Rows of the sound around a single frame: those of five frames.
FRAME_ROWS = 16
_FRAMES_BEFORE = 1

# Times are float32 in records: a row counts as begun so shortly before it.
_TOLERANCE = 0.02


def num_rows(num_frames: int) -> int:
  """Rows of the window of some frames: 16 of 5, 52 of 16."""
  return math.ceil(num_frames / FPS * MEL_RATE)


def windows(
  mel: np.ndarray,
  frames: np.ndarray,
  num_frames: int,
  start_secs: float = 0.0,
) -> np.ndarray:
  """Cuts out the sound of windows of frames.

  Args:
    mel: float32 (R, 80), of a video or of a record, not empty.
    frames: int (N,), first frames of the windows; may be outside.
    num_frames: frames of a window.
    start_secs: time of frame 0 where the sound is a part of a longer one, cut
      by rows as data_prep does; the windows are then those of the whole.

  Returns:
    float32 (N, M, 80).

  Raises:
    ValueError: there is no sound.
  """
  return _cut(mel, frames, num_rows(num_frames), start_secs)


def frame_windows(
  mel: np.ndarray, frames: np.ndarray, start_secs: float = 0.0
) -> np.ndarray:
  """Cuts out the sound around single frames.

  Args:
    mel: as for `windows`.
    frames: int (N,).
    start_secs: as for `windows`.

  Returns:
    float32 (N, 16, 80).

  Raises:
    ValueError: there is no sound.
  """
  before = np.asarray(frames) - _FRAMES_BEFORE
  return _cut(mel, before, FRAME_ROWS, start_secs)


def _cut(
  mel: np.ndarray, frames: np.ndarray, length: int, start_secs: float
) -> np.ndarray:
  if mel.ndim != 2 or mel.shape[1] != NUM_MELS or not len(mel):
    raise ValueError(
      f"mel has shape {mel.shape}, expected (R, {NUM_MELS}) with at least one "
      "row"
    )
  # In float64: the frames' times on the clock of the whole.
  secs = start_secs + np.asarray(frames, float) / FPS
  first = np.floor(MEL_RATE * secs + _TOLERANCE).astype(int)
  first -= max(round(MEL_RATE * start_secs), 0)
  rows = first[:, None] + np.arange(length)
  return mel[np.clip(rows, 0, len(mel) - 1)]
