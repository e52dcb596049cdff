"""Log-mel spectrograms and MFCC equal those of other libraries."""

from pathlib import Path

import numpy as np
import pytest
from transformers import audio_utils

from marlin_jax.lipsync.scoring import mfcc
from marlin_jax.records import mel_spectrogram

EXPECTED = Path(__file__).parents[1] / "data" / "sound"


def speech_like(num_samples: int) -> np.ndarray:
  """Returns a falling, fading chord with noise and silence, int16 (S,)."""
  np_rng = np.random.default_rng(0)
  t = np.arange(num_samples) / 16_000
  wave = sum(
    a * np.sin(2 * np.pi * f * t * (1 - 0.2 * t))
    for a, f in ((0.4, 150), (0.2, 900), (0.1, 3100), (0.02, 7000))
  )
  wave = wave * np.exp(-2 * t) + 0.001 * np_rng.normal(size=num_samples)
  wave[num_samples // 2 : num_samples // 2 + 2000] = 0
  return np.clip(32767 * wave, -32768, 32767).astype(np.int16)


def whole_numbers() -> np.ndarray:
  """Returns a noisy, partly silent tone in exact integers, int16 (9000,)."""
  i = np.arange(9000, dtype=np.int64)
  tone = np.abs((37 * i) % 400 - 200) + np.abs((211 * i) % 640 - 320)
  noise = (7919 * i * i + 104_729 * i) % 1009 - 504
  loud = (i // 700) % 7
  return (loud * (9 * (tone - 260) + noise // 4)).astype(np.int16)


def test_mel_equals_that_of_librosa():
  """The file holds the output of librosa 0.11.0, computed as in Wav2Lip:

  lfilter([1, -0.97], [1]) of the samples / 32768; stft(n_fft=800,
  hop_length=200, win_length=800, pad_mode="reflect"), which librosa 0.7 had by
  default; filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600).
  """
  expected = np.load(EXPECTED / "librosa_mel.npy")
  actual = mel_spectrogram.mel_spectrogram(whole_numbers())
  assert actual.shape == expected.shape == (46, 80)
  assert np.ptp(expected) > 6
  np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_mfcc_equal_those_of_python_speech_features():
  """The file holds mfcc(sound, 16000) of version 0.6."""
  expected = np.load(EXPECTED / "python_speech_features_mfcc.npy")
  actual = mfcc.mfcc(whole_numbers())
  assert actual.shape == expected.shape == (55, 13)
  np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_mfcc_of_any_length_and_of_silence_are_finite():
  for num, rows in ((1, 1), (400, 1), (401, 2), (560, 2), (561, 3)):
    actual = mfcc.mfcc(np.zeros(num, np.int16))
    assert actual.shape == (rows, 13)
    assert np.isfinite(actual).all()
  with pytest.raises(ValueError, match="not empty"):
    mfcc.mfcc(np.zeros(0, np.int16))


@pytest.mark.parametrize("num_samples", [3000, 16_000, 50_123])
def test_mel_equals_that_of_another_library(num_samples):
  """transformers tests its own filters and framing against librosa."""
  wave = speech_like(num_samples)
  filters = audio_utils.mel_filter_bank(
    num_frequency_bins=401,
    num_mel_filters=80,
    min_frequency=55,
    max_frequency=7600,
    sampling_rate=16_000,
    norm="slaney",
    mel_scale="slaney",
  )
  pre = wave / 32768
  pre = np.append(pre[0], pre[1:] - 0.97 * pre[:-1])
  magnitudes = audio_utils.spectrogram(
    pre,
    audio_utils.window_function(800, "hann"),
    frame_length=800,
    hop_length=200,
    power=1.0,
    mel_filters=filters,
    mel_floor=1e-5,
  )
  decibels = 20 * np.log10(magnitudes) - 20
  expected = np.clip(8 * (decibels + 100) / 100 - 4, -4, 4).T
  actual = mel_spectrogram.mel_spectrogram(wave)
  assert actual.shape == expected.shape == (num_samples // 200 + 1, 80)
  np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_a_long_sound_has_no_seams():
  """Long sounds are computed in blocks of thousands of rows."""
  rng = np.random.default_rng(0)
  wave = rng.integers(-9000, 9000, 200 * 9000).astype(np.int16)
  whole = mel_spectrogram.mel_spectrogram(wave)
  assert len(whole) == 9001
  for first in range(0, 9000, 450):
    part = mel_spectrogram.mel_spectrogram(
      wave[200 * first : 200 * (first + 450)]
    )
    # Except at the ends, where a part lacks its neighbours.
    np.testing.assert_allclose(part[3:-3], whole[first + 3 : first + 448])


def test_a_tone_is_in_the_band_of_its_frequency():
  t = np.arange(16_000) / 16_000
  bands = [
    int(mel_spectrogram.mel_spectrogram(wave)[40].argmax())
    for hz in (200, 1000, 4000)
    for wave in [(8000 * np.sin(2 * np.pi * hz * t)).astype(np.int16)]
  ]
  assert bands == sorted(set(bands))


def test_silence_is_the_floor_and_no_sound_has_no_rows():
  silence = mel_spectrogram.mel_spectrogram(np.zeros(1000, np.int16))
  np.testing.assert_array_equal(silence, np.full((6, 80), -4, np.float32))
  assert mel_spectrogram.mel_spectrogram(np.zeros(0, np.int16)).shape == (0, 80)
  assert mel_spectrogram.mel_spectrogram(np.ones(1, np.int16)).shape == (1, 80)


def test_sound_of_another_kind_is_refused():
  with pytest.raises(ValueError, match=r"float32 \(5,\), expected int16"):
    mel_spectrogram.mel_spectrogram(np.zeros(5, np.float32))
