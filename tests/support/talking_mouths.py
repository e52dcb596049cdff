"""Synthetic talking faces, whose mouths open as far as the voice is loud.

They let a network learn the relation of lips and sound without footage. A
person has a face, a voice and a rhythm of syllables; sound and frames are on
one clock, at 16 kHz and 25 frames per second.

Axes: T frames, S side of an image, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import simplejpeg

from data_prep.video.video_to_records import segment_lengths
from marlin_jax.records import mel_spectrogram, schema
from tests.support import made_dataset

FPS = 25
RATE = schema.SAMPLE_RATE
SAMPLES = RATE // FPS  # per frame


@dataclasses.dataclass(frozen=True)
class Talk:
  """Video and sound of a talking person.

  Attributes:
    frames: uint8 (T, S, S, 3), RGB.
    sound: int16 (N,), 640 samples per frame.
    opening: float (T,), opening of the mouth, in [0, 1].
  """

  frames: np.ndarray
  sound: np.ndarray
  opening: np.ndarray


def talk(person: int, num_frames: int = 64, size: int = 224) -> Talk:
  """Returns the talk of a person, by number; deterministic."""
  np_rng = np.random.default_rng(person)
  loudness = _syllables(num_frames * SAMPLES, np_rng)
  opening = loudness.reshape(num_frames, SAMPLES).mean(axis=1)
  look = _Look.draw(np_rng)
  face = look.face(size)
  sway = np.cumsum(np_rng.normal(0, 0.15, (num_frames, 2)), axis=0).clip(-4, 4)
  frames = [
    look.talking(face, *args) for args in zip(opening, sway, strict=True)
  ]
  return Talk(np.stack(frames), _voice(loudness, np_rng), opening)


# --- Voice --------------------------------------------------------------------


def _syllables(num_samples: int, np_rng: np.random.Generator) -> np.ndarray:
  """Returns the loudness of the voice, float (N,) in [0, 1]."""
  loudness = np.zeros(num_samples)
  tempo = np_rng.uniform(0.8, 1.3)
  at = np_rng.uniform(0, 0.15)
  while at * RATE < num_samples:
    length = tempo * np_rng.uniform(0.1, 0.3)
    start, stop = int(at * RATE), int((at + length) * RATE)
    shape = np.sin(np.pi * np.linspace(0, 1, stop - start)) ** 0.7
    syllable = loudness[start:stop]
    syllable += np_rng.uniform(0.5, 1.0) * shape[: len(syllable)]
    # A quarter of the pauses are between words, the others between syllables.
    pause = np_rng.uniform(0.3, 0.6) if np_rng.random() < 0.25 else 0.06
    at += length + tempo * pause * np_rng.uniform(0.7, 1.3)
  return loudness


def _voice(loudness: np.ndarray, np_rng: np.random.Generator) -> np.ndarray:
  """Returns harmonics of a pitch, weighted by two resonances, int16 (N,)."""
  pitch = np_rng.uniform(90, 250)
  resonances = np_rng.uniform(400, 800), np_rng.uniform(1000, 2200)
  phase = 2 * np.pi * pitch * np.arange(len(loudness)) / RATE
  wave = np.zeros(len(loudness))
  for n in range(1, int(4000 / pitch)):
    detuning = (n * pitch - np.array(resonances)) / 250
    wave += np.exp(-(detuning**2)).sum() * np.sin(
      n * phase + np_rng.uniform(0, 6)
    )
  wave *= loudness * 9000 / np.abs(wave).max()
  wave += np_rng.normal(0, 8, len(wave))
  return wave.clip(-32768, 32767).astype(np.int16)


# --- Face ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Look:
  """RGB colours and proportions of a face."""

  skin: np.ndarray
  hair: np.ndarray
  wall: np.ndarray
  lips: np.ndarray
  width: float
  mouth: float

  @classmethod
  def draw(cls, np_rng: np.random.Generator) -> _Look:
    skin = np.array([225, 180, 150]) * np_rng.uniform(0.55, 1.0)
    return cls(
      skin=skin,
      hair=np.array([70, 50, 40]) * np_rng.uniform(0.3, 1.5),
      wall=np_rng.uniform(60, 190, 3),
      lips=skin * [0.8, 0.5, 0.5],
      width=np_rng.uniform(0.92, 1.08),
      mouth=np_rng.uniform(0.85, 1.15),
    )

  def face(self, size: int) -> np.ndarray:
    """Returns the face without a mouth, uint8 (S, S, 3)."""
    canvas = _Canvas(np.full((size, size, 3), self.wall, np.uint8))
    w = self.width
    canvas.ellipse((112, 100), (70 * w, 88), self.hair)
    canvas.ellipse((112, 206), (34, 44), self.skin * 0.75)
    canvas.ellipse((112, 222), (110, 32), self.wall * 0.5)
    canvas.ellipse((112, 118), (60 * w, 80), self.skin)
    canvas.blur(5)
    for side in (-1, 1):
      x = 112 + side * 26 * w
      canvas.ellipse((x, 99), (14, 8), self.skin * 0.72)
      canvas.ellipse((x, 100), (11, 5.5), (235, 235, 235))
      canvas.ellipse((x, 100), (5, 5), (60, 45, 35))
      canvas.ellipse((x, 85), (15, 3.2), self.hair * 0.8)
      canvas.ellipse((112 + side * 7, 136), (4, 2.5), self.skin * 0.5)
    canvas.ellipse((112, 124), (6, 14), self.skin * 1.08)
    canvas.ellipse((112, 133), (10, 6), self.skin * 0.9)
    canvas.blur(1.2)
    return canvas.pixels

  def talking(
    self, face: np.ndarray, opening: float, sway: np.ndarray
  ) -> np.ndarray:
    """Returns the face with a mouth, uint8 (S, S, 3).

    Args:
      face: from `face`.
      opening: of the mouth, in [0, 1].
      sway: float (2,), x and y shift, in 1/224 of a side.
    """
    canvas = _Canvas(face.copy())
    half, gap = 24 * self.mouth, 15 * opening
    canvas.ellipse((112, 160 + gap), (half, 5 + gap), self.lips)
    canvas.ellipse((112, 156), (half, 4.5), self.lips * 0.9)
    canvas.ellipse((112, 159 + gap), (half - 5, 1 + gap), (45, 15, 20))
    size = len(face)
    shift = np.float32([[1, 0, 0], [0, 1, 0]])
    shift[:, 2] = sway * size / 224
    return cv2.warpAffine(
      canvas.pixels, shift, (size, size), borderMode=cv2.BORDER_REPLICATE
    )


class _Canvas:
  """Image with coordinates in 1/224 of its side."""

  def __init__(self, pixels: np.ndarray):
    self.pixels = pixels
    self._scale = len(pixels) / 224

  def ellipse(self, centre, axes, colour) -> None:
    # OpenCV takes coordinates in 1/16 pixels: the last argument, 4 bits.
    unit = 16 * self._scale
    cv2.ellipse(
      self.pixels,
      [round(c * unit) for c in centre],
      [max(round(a * unit), 1) for a in axes],
      0,
      0,
      360,
      [min(float(c), 255.0) for c in colour],
      -1,
      cv2.LINE_AA,
      4,
    )

  def blur(self, sigma: float) -> None:
    sigma *= self._scale
    self.pixels = cv2.GaussianBlur(self.pixels, None, sigma)


# --- Files --------------------------------------------------------------------


def records_of(
  spoken: Talk, video_id: str, segment_frames: int = 64
) -> list[schema.Record]:
  """Cuts a talk into records, as data_prep does with the track of a video."""
  samples, mel = spoken.sound, mel_spectrogram.mel_spectrogram(spoken.sound)
  records, start = [], 0
  for segment, length in enumerate(
    segment_lengths(len(spoken.frames), segment_frames)
  ):
    stop = start + length
    rows = slice(
      *(round(f / FPS * mel_spectrogram.MEL_RATE) for f in (start, stop))
    )
    records.append(
      made_dataset.a_record(
        video_id,
        segment=segment,
        num_frames=length,
        frames=[
          simplejpeg.encode_jpeg(frame, 95, colorsubsampling="420")
          for frame in spoken.frames[start:stop]
        ],
        subject_id=video_id,
        fps=float(FPS),
        start_secs=start / FPS,
        audio=samples[start * SAMPLES : stop * SAMPLES].tobytes(),
        mel=mel[rows],
      )
    )
    start = stop
  return records


def write_dataset(
  path: Path,
  num_train: int = 72,
  num_val: int = 8,
  num_frames: int = 64,
) -> Path:
  """Writes a prepared data set with sound; each person is in one split.

  Args:
    path: the folder.
    num_train: number of people in 'train'.
    num_val: number of people in 'val'.
    num_frames: frames per person; more than 64 are cut into several records.
  """
  videos = {
    f"{i:03d}.mp4": records_of(talk(i, num_frames), f"{i:03d}.mp4")
    for i in range(num_train + num_val)
  }
  splits = dict.fromkeys(list(videos)[num_train:], "val")
  return made_dataset.make(path, videos, splits, has_sound=True)


def write_mp4(
  path: Path,
  frames: Sequence[np.ndarray],
  samples: np.ndarray | None,
  *,
  rate: int = RATE,
  num_channels: int = 1,
  fps: int = FPS,
  num_late: int = 0,
) -> Path:
  """Writes a video.

  Args:
    path: its suffix selects the container.
    frames: uint8 (H, W, 3) RGB each.
    samples: int16 (N,); None: no sound track.
    rate: sample rate; 16 kHz is stored losslessly as FLAC, others (8 to 48 kHz)
      as AAC.
    num_channels: 1 or 2 copies of the samples.
    fps: frames per second.
    num_late: frames between the start of the sound and the first frame.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  codec = "flac" if rate == RATE else "aac"
  with av.open(str(path), "w") as container:
    video = container.add_stream("libx264", rate=fps)
    video.height, video.width = frames[0].shape[:2]
    video.pix_fmt = "yuv420p"
    video.options = {"crf": "16", "preset": "ultrafast"}
    if samples is not None:
      layout = "mono" if num_channels == 1 else "stereo"
      track = container.add_stream(codec, rate=rate, layout=layout)
    for i, pixels in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
      frame.time_base, frame.pts = Fraction(1, fps), i + num_late
      container.mux(video.encode(frame))
    container.mux(video.encode())
    if samples is not None:
      audio = av.AudioFrame.from_ndarray(
        np.repeat(samples, num_channels)[None], "s16", layout
      )
      audio.sample_rate = rate
      audio.time_base, audio.pts = Fraction(1, rate), 0
      container.mux(track.encode(audio))
      container.mux(track.encode())
  return path
