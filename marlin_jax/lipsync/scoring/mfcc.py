"""Mel-frequency cepstral coefficients for the published SyncNet.

Equal to those of python_speech_features 0.6, base.py and sigproc.py, as
SyncNet's authors call it: 16-bit samples without scaling, windows of 25 ms
every 10 ms without a taper, after pre-emphasis; 26 filters up to 8 kHz; the
first 13 coefficients of the orthonormal cosine transform, liftered with 22, the
first replaced by the log energy. That package is unmaintained and therefore no
dependency.

Axes: S samples, R rows.
"""

from __future__ import annotations

import functools

import numpy as np

from marlin_jax.records.schema import SAMPLE_RATE

WINDOW, HOP, FFT_SIZE = 400, 160, 512
NUM_FILTERS, NUM_MFCC = 26, 13
_PRE_EMPHASIS, _LIFTER = 0.97, 22
_EPS = np.finfo(float).eps  # replaces 0 before the logarithm


def mfcc(sound: np.ndarray) -> np.ndarray:
  """Returns the mel-frequency cepstral coefficients of a sound.

  Args:
    sound: int16 (S,), 16 kHz, mono; not empty.

  Returns:
    float64 (R, 13). Row i is computed from the 400 samples from 160 i on; the
    last row is padded with zeros.

  Raises:
    ValueError: `sound` has another dtype or shape, or is empty.
  """
  if sound.dtype != np.int16 or sound.ndim != 1 or not len(sound):
    raise ValueError(
      f"sound is {sound.dtype} {sound.shape}, expected int16 (S,), not empty"
    )
  wave = sound.astype(np.float64)
  wave[1:] -= _PRE_EMPHASIS * wave[:-1].copy()
  num_rows = 1 + max(-(-(len(wave) - WINDOW) // HOP), 0)
  padding = (num_rows - 1) * HOP + WINDOW - len(wave)
  padded = np.pad(wave, (0, padding))
  windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
  powers = np.abs(np.fft.rfft(windows, FFT_SIZE)) ** 2 / FFT_SIZE
  bands = np.log(_without_zeros(powers @ _filters().T))
  coefficients = bands @ _cosines().T
  coefficients[:, 0] = np.log(_without_zeros(powers.sum(axis=1)))
  return coefficients


def _without_zeros(values: np.ndarray) -> np.ndarray:
  return np.where(values == 0, _EPS, values)


@functools.cache
def _filters() -> np.ndarray:
  """Returns triangles with edges at whole bins, float64 (26, 257) in [0, 1]."""
  top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
  hz = 700 * (10 ** (np.linspace(0, top, NUM_FILTERS + 2) / 2595) - 1)
  edges = np.floor((FFT_SIZE + 1) * hz / SAMPLE_RATE)
  bins = np.arange(FFT_SIZE // 2 + 1)
  lower, centre, upper = (edges[i : i + NUM_FILTERS, None] for i in range(3))
  rising = (bins - lower) / (centre - lower)
  falling = (upper - bins) / (upper - centre)
  return np.maximum(np.minimum(rising, falling), 0)


@functools.cache
def _cosines() -> np.ndarray:
  """Returns the liftered rows of the cosine transform, float64 (13, 26)."""
  k, n = np.arange(NUM_MFCC)[:, None], np.arange(NUM_FILTERS)
  rows = np.cos(np.pi * k * (2 * n + 1) / (2 * NUM_FILTERS))
  rows *= np.sqrt(np.where(k == 0, 1, 2) / NUM_FILTERS)
  return rows * (1 + _LIFTER / 2 * np.sin(np.pi * k / _LIFTER))
