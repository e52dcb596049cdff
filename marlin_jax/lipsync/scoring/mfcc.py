"""The coefficients that the published SyncNet hears.

Numbers from python_speech_features 0.6, base.py and sigproc.py, with which its
authors call it: of 16-bit samples as they are, windows of 25 ms every 10 ms
without a taper, after pre-emphasis; 26 filters up to 8 kHz; the orthonormal
cosine transform's first 13, lifted by 22, the first replaced by the energy.
Nobody keeps that package up, so it is not asked for.
"""

from __future__ import annotations

import functools

import numpy as np

from marlin_jax.records.schema import SAMPLE_RATE

WINDOW, HOP, FFT_SIZE = 400, 160, 512
NUM_FILTERS, NUM_MFCC = 26, 13
_PRE_EMPHASIS, _LIFTER = 0.97, 22
_EPS = np.finfo(float).eps  # in place of nothing, below a logarithm


def mfcc(sound: np.ndarray) -> np.ndarray:
  """Returns the mel-frequency cepstral coefficients of a sound.

  Args:
    sound: int16 (S,), 16 kHz, mono; not empty.

  Returns:
    float64 (R, 13), row i of the 400 samples from 160 i on; the last ones are
    filled up with zeros.

  Raises:
    ValueError: the sound is no int16 (S,), or empty.
  """
  if sound.dtype != np.int16 or sound.ndim != 1 or not len(sound):
    raise ValueError(
      f"sound is {sound.dtype} {sound.shape}, expected int16 (S,), not empty"
    )
  wave = sound.astype(np.float64)
  wave[1:] -= _PRE_EMPHASIS * wave[:-1].copy()
  num_rows = 1 + max(-(-(len(wave) - WINDOW) // HOP), 0)
  missing = (num_rows - 1) * HOP + WINDOW - len(wave)
  padded = np.pad(wave, (0, missing))
  frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
  powers = np.abs(np.fft.rfft(frames, FFT_SIZE)) ** 2 / FFT_SIZE
  bands = np.log(_not_zero(powers @ _filters().T))
  found = bands @ _cosines().T
  found[:, 0] = np.log(_not_zero(powers.sum(axis=1)))
  return found


def _not_zero(values: np.ndarray) -> np.ndarray:
  return np.where(values == 0, _EPS, values)


@functools.cache
def _filters() -> np.ndarray:
  """float64 (26, 257): triangles between whole bins, at most 1 high."""
  top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
  hz = 700 * (10 ** (np.linspace(0, top, NUM_FILTERS + 2) / 2595) - 1)
  edges = np.floor((FFT_SIZE + 1) * hz / SAMPLE_RATE)
  bins = np.arange(FFT_SIZE // 2 + 1)
  lower, centre, upper = (edges[i : i + NUM_FILTERS, None] for i in range(3))
  up, down = (
    (bins - lower) / (centre - lower),
    (upper - bins) / (upper - centre),
  )
  return np.maximum(np.minimum(up, down), 0)


@functools.cache
def _cosines() -> np.ndarray:
  """float64 (13, 26): the transform's rows, lifted."""
  k, n = np.arange(NUM_MFCC)[:, None], np.arange(NUM_FILTERS)
  rows = np.cos(np.pi * k * (2 * n + 1) / (2 * NUM_FILTERS))
  rows *= np.sqrt(np.where(k == 0, 1, 2) / NUM_FILTERS)
  return rows * (1 + _LIFTER / 2 * np.sin(np.pi * k / _LIFTER))
