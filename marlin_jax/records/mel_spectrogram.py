"""Log-mel spectrograms as in Wav2Lip.

The constants are those of github.com/Rudrabha/Wav2Lip, hparams.py and audio.py:
16 kHz, pre-emphasis, a short-time Fourier transform of 800 samples every 200,
80 mel bands from 55 to 7600 Hz, decibels relative to 20 dB, clipped at -100 dB
and scaled to [-4, 4]. Filters and framing are those of librosa 0.7, the version
it pins (Slaney's mel scale and norm, centred frames, reflected ends).
"""

from __future__ import annotations

import functools

import numpy as np

from marlin_jax.records.schema import NUM_MELS, SAMPLE_RATE

FFT_SIZE = 800
HOP = 200
MEL_RATE = SAMPLE_RATE // HOP  # rows per second
PRE_EMPHASIS = 0.97
MEL_RANGE = (55.0, 7600.0)  # in Hz
REFERENCE_DB, FLOOR_DB = 20.0, -100.0
MAX_VALUE = 4.0


def mel_spectrogram(sound: np.ndarray) -> np.ndarray:
  """Returns the log-mel spectrogram of a sound.

  Args:
    sound: int16 (S,), 16 kHz, mono.

  Returns:
    float32 (S // 200 + 1, 80) in [-4, 4]; row i is centred at sample 200 i.
    (0, 80) for an empty sound.

  Raises:
    ValueError: the sound is not int16 (S,).
  """
  if sound.dtype != np.int16 or sound.ndim != 1:
    raise ValueError(
      f"sound is {sound.dtype} {sound.shape}, expected int16 (S,)"
    )
  if not len(sound):
    return np.zeros((0, NUM_MELS), np.float32)
  rows = np.arange(len(sound) // HOP + 1)
  # In blocks: an hour in one piece takes gigabytes.
  blocks = np.array_split(rows, max(len(rows) // 4096, 1))
  return np.concatenate([_rows(sound, b[0], b[-1]) for b in blocks])


def _rows(sound: np.ndarray, first: int, last: int) -> np.ndarray:
  """Returns the spectrogram's rows from `first` to `last`, float32 (N, 80)."""
  half = FFT_SIZE // 2
  start, stop = first * HOP - half, last * HOP + half
  # One sample more: pre-emphasis uses the previous sample.
  wave = sound[max(start - 1, 0) : stop] / 32768.0
  wave[1:] -= PRE_EMPHASIS * wave[:-1].copy()
  wave = wave[int(start > 0) :]
  # np.pad repeats the reflection if the sound is shorter than half a frame.
  mode = "reflect" if len(wave) > 1 else "edge"
  padding = max(-start, 0), max(stop - len(sound), 0)
  padded = np.pad(wave, padding, mode=mode)
  frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SIZE)[::HOP]
  magnitudes = np.abs(np.fft.rfft(frames * _window())) @ _mel_filters().T
  decibels = 20 * np.log10(np.maximum(magnitudes, 10 ** (FLOOR_DB / 20)))
  scaled = (decibels - REFERENCE_DB - FLOOR_DB) / -FLOOR_DB
  scaled = 2 * MAX_VALUE * scaled - MAX_VALUE
  return np.clip(scaled, -MAX_VALUE, MAX_VALUE).astype(np.float32)


@functools.cache
def _window() -> np.ndarray:
  """Returns the periodic Hann window, float64 (800,)."""
  return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SIZE) / FFT_SIZE)


@functools.cache
def _mel_filters() -> np.ndarray:
  """Returns float64 (80, 401): triangles of equal area on the mel scale."""
  low, high = (_hz_to_mel(hz) for hz in MEL_RANGE)
  edges = _mel_to_hz(np.linspace(low, high, NUM_MELS + 2))
  bins = np.fft.rfftfreq(FFT_SIZE, 1 / SAMPLE_RATE)
  lower, centre, upper = (edges[i : i + NUM_MELS, None] for i in range(3))
  up, down = (
    (bins - lower) / (centre - lower),
    (upper - bins) / (upper - centre),
  )
  triangles = np.maximum(np.minimum(up, down), 0)
  return triangles * 2 / (upper - lower)


# Slaney's scale (Auditory Toolbox, 1998): 3 mel per 200 Hz up to 1 kHz, then 27
# mel for each factor of 6.4.
_LINEAR_HZ, _LINEAR_MEL = 1000.0, 15.0
_MEL_PER_LOG_HZ = 27.0 / np.log(6.4)


def _hz_to_mel(hz: float) -> float:
  if hz < _LINEAR_HZ:
    return hz * 3 / 200
  return _LINEAR_MEL + _MEL_PER_LOG_HZ * np.log(hz / _LINEAR_HZ)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
  above = np.maximum(mel - _LINEAR_MEL, 0) / _MEL_PER_LOG_HZ
  return np.where(mel < _LINEAR_MEL, mel * 200 / 3, _LINEAR_HZ * np.exp(above))
