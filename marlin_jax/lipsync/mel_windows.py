"""Windows of a mel spectrogram that belong to video frames.

As github.com/Rudrabha/Wav2Lip, color_syncnet_train.py and wav2lip_train.py: 25
frames and 80 mel rows per second. The window of the frames from f on begins at
row int(80 f / 25). The window of the single frame f begins with the frame
before it, which puts f near its middle.

Wav2Lip drops frames whose windows reach past the sound. Here the first or last
row is repeated instead, so every frame has a window.

Axes: N frames, M rows of a window, R rows of the spectrogram, 80 mel bands.
"""

from __future__ import annotations

import math

import numpy as np

from marlin_jax.records.mel_spectrogram import MEL_RATE
from marlin_jax.records.schema import NUM_MELS

FPS = 25
# Rows of the window of a single frame; they last as long as five frames.
FRAME_ROWS = 16
_FRAMES_BEFORE = 1

# Records hold times as float32: a row counts as begun this many rows early.
_TOLERANCE = 0.02


def num_rows(num_frames: int) -> int:
  """Returns the mel rows of a window: 16 for 5 frames, 52 for 16."""
  return math.ceil(num_frames / FPS * MEL_RATE)


def windows(
  mel: np.ndarray,
  frames: np.ndarray,
  num_frames: int,
  start_secs: float = 0.0,
) -> np.ndarray:
  """Cuts out the windows that begin at the given frames.

  Args:
    mel: float32 (R, 80), mel spectrogram of a video or a record; not empty.
    frames: int (N,), first frames of the windows; may be out of range.
    num_frames: frames per window.
    start_secs: time of frame 0 in the whole video, if data_prep cut `mel` out
      of the spectrogram of the whole video. The windows then equal those of the
      whole spectrogram.

  Returns:
    float32 (N, M, 80), where M is `num_rows(num_frames)`.

  Raises:
    ValueError: `mel` is empty or has another shape.
  """
  return _cut(mel, frames, num_rows(num_frames), start_secs)


def frame_windows(
  mel: np.ndarray, frames: np.ndarray, start_secs: float = 0.0
) -> np.ndarray:
  """Cuts out the windows around single frames.

  Args:
    mel: as for `windows`.
    frames: int (N,), numbers of the frames; may be out of range.
    start_secs: as for `windows`.

  Returns:
    float32 (N, 16, 80).

  Raises:
    ValueError: `mel` is empty or has another shape.
  """
  first_frames = np.asarray(frames) - _FRAMES_BEFORE
  return _cut(mel, first_frames, FRAME_ROWS, start_secs)


def inference_windows(mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
  """Cuts out the windows that Wav2Lip's inference.py gives to single frames.

  They begin with the frame itself, one frame later than in its training, and
  the last ones end with the sound.

  Args:
    mel: float32 (R, 80), mel spectrogram of a video; not empty.
    frames: int (N,), numbers of the frames, from 0.

  Returns:
    float32 (N, 16, 80).

  Raises:
    ValueError: `mel` is empty or has another shape.
  """
  # The last window that ends within the sound.
  last = max(len(mel) - FRAME_ROWS, 0) / MEL_RATE * FPS
  return _cut(mel, np.minimum(frames, last), FRAME_ROWS, 0.0)


def num_inference_windows(mel: np.ndarray) -> int:
  """Returns the frames of a sound (R, 80) whose whole window is in it.

  Wav2Lip's scripts draw so many; at least 1.
  """
  last = max(len(mel) - FRAME_ROWS, 0) / MEL_RATE * FPS
  return int(last + _TOLERANCE) + 1


def _cut(
  mel: np.ndarray, frames: np.ndarray, length: int, start_secs: float
) -> np.ndarray:
  if mel.ndim != 2 or mel.shape[1] != NUM_MELS or not len(mel):
    raise ValueError(
      f"mel has shape {mel.shape}, expected (R, {NUM_MELS}) with at least one "
      "row"
    )
  # Times in the whole video, in float64.
  secs = start_secs + np.asarray(frames, float) / FPS
  first_rows = np.floor(MEL_RATE * secs + _TOLERANCE).astype(int)
  first_rows -= max(round(MEL_RATE * start_secs), 0)
  rows = first_rows[:, None] + np.arange(length)
  return mel[np.clip(rows, 0, len(mel) - 1)]
