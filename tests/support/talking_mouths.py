"""Drawn faces that talk: the mouth opens as loud as the voice is.

What a network has to find out about lips and sound, without any footage: a
person has a face, a voice and a rhythm of syllables; sound and pictures are on
one clock, 16 kHz and 25 frames a second.

Axes: T frames, S pixels of a picture's side, N samples.
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
SAMPLES = RATE // FPS  # of a frame


@dataclasses.dataclass(frozen=True)
class Talk:
  """Somebody talking.

  Attributes:
    frames: uint8 (T, S, S, 3), RGB.
    sound: int16 (N,), 640 samples a frame.
    opening: float (T,), how far the mouth is open, in [0, 1].
  """

  frames: np.ndarray
  sound: np.ndarray
  opening: np.ndarray


def talk(person: int, num_frames: int = 64, size: int = 224) -> Talk:
  """Draws a person, by number, saying something; always the same."""
  np_rng = np.random.default_rng(person)
  loudness = _syllables(num_frames * SAMPLES, np_rng)
  opening = loudness.reshape(num_frames, SAMPLES).mean(axis=1)
  look = _Look.draw(np_rng)
  face = look.face(size)
  sway = np.cumsum(np_rng.normal(0, 0.15, (num_frames, 2)), axis=0).clip(-4, 4)
  frames = [look.talking(face, *how) for how in zip(opening, sway, strict=True)]
  return Talk(np.stack(frames), _voice(loudness, np_rng), opening)


# --- Voice --------------------------------------------------------------------


def _syllables(num_samples: int, np_rng: np.random.Generator) -> np.ndarray:
  """Returns how loud the voice is, float (N,) in [0, 1]."""
  loudness = np.zeros(num_samples)
  tempo = np_rng.uniform(0.8, 1.3)
  at = np_rng.uniform(0, 0.15)
  while at * RATE < num_samples:
    length = tempo * np_rng.uniform(0.1, 0.3)
    start, stop = int(at * RATE), int((at + length) * RATE)
    shape = np.sin(np.pi * np.linspace(0, 1, stop - start)) ** 0.7
    part = loudness[start:stop]
    part += np_rng.uniform(0.5, 1.0) * shape[: len(part)]
    # A pause between words, now and then.
    pause = np_rng.uniform(0.3, 0.6) if np_rng.random() < 0.25 else 0.06
    at += length + tempo * pause * np_rng.uniform(0.7, 1.3)
  return loudness


def _voice(loudness: np.ndarray, np_rng: np.random.Generator) -> np.ndarray:
  """Returns harmonics of a pitch below two resonances, int16 (N,)."""
  pitch = np_rng.uniform(90, 250)
  resonances = np_rng.uniform(400, 800), np_rng.uniform(1000, 2200)
  turns = 2 * np.pi * pitch * np.arange(len(loudness)) / RATE
  wave = np.zeros(len(loudness))
  for n in range(1, int(4000 / pitch)):
    gaps = (n * pitch - np.array(resonances)) / 250
    wave += np.exp(-(gaps**2)).sum() * np.sin(n * turns + np_rng.uniform(0, 6))
  wave *= loudness * 9000 / np.abs(wave).max()
  wave += np_rng.normal(0, 8, len(wave))
  return wave.clip(-32768, 32767).astype(np.int16)


# --- Face ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Look:
  """Colours, RGB, and proportions of a face."""

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
    """Returns the face with a mouth; `sway` moves it, in 224ths of a side."""
    canvas = _Canvas(face.copy())
    half, gap = 24 * self.mouth, 15 * opening
    canvas.ellipse((112, 160 + gap), (half, 5 + gap), self.lips)
    canvas.ellipse((112, 156), (half, 4.5), self.lips * 0.9)
    canvas.ellipse((112, 159 + gap), (half - 5, 1 + gap), (45, 15, 20))
    size = len(face)
    moved = np.float32([[1, 0, 0], [0, 1, 0]])
    moved[:, 2] = sway * size / 224
    return cv2.warpAffine(
      canvas.pixels, moved, (size, size), borderMode=cv2.BORDER_REPLICATE
    )


class _Canvas:
  """A picture on which places are given in 224ths of its side."""

  def __init__(self, pixels: np.ndarray):
    self.pixels = pixels
    self._scale = len(pixels) / 224

  def ellipse(self, centre, axes, colour) -> None:
    # In sixteenths of a pixel.
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
  said: Talk, video_id: str, segment_frames: int = 64
) -> list[schema.Record]:
  """Cuts a talk into records, as data_prep does with a video's only track."""
  samples, mel = said.sound, mel_spectrogram.mel_spectrogram(said.sound)
  found, start = [], 0
  for segment, length in enumerate(
    segment_lengths(len(said.frames), segment_frames)
  ):
    stop = start + length
    rows = slice(
      *(round(at / FPS * mel_spectrogram.MEL_RATE) for at in (start, stop))
    )
    found.append(
      made_dataset.a_record(
        video_id,
        segment=segment,
        num_frames=length,
        frames=[
          simplejpeg.encode_jpeg(frame, 95, colorsubsampling="420")
          for frame in said.frames[start:stop]
        ],
        subject_id=video_id,
        fps=float(FPS),
        start_secs=start / FPS,
        audio=samples[start * SAMPLES : stop * SAMPLES].tobytes(),
        mel=mel[rows],
      )
    )
    start = stop
  return found


def write_dataset(
  path: Path,
  num_train: int = 72,
  num_val: int = 8,
  num_frames: int = 64,
) -> Path:
  """Writes a prepared data set with sound; nobody is in two splits.

  Args:
    path: the folder.
    num_train: people in 'train'.
    num_val: people in 'val'.
    num_frames: of each; of more than 64 several records are made.
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
    path: its suffix decides the container.
    frames: uint8 (H, W, 3) RGB each.
    samples: int16 (N,); None: no sound track.
    rate: their sample rate; at 16 kHz the sound is stored as it is, at others
      with AAC, which 8 to 48 kHz can be.
    num_channels: copies of them, 1 or 2.
    fps: frames per second.
    num_late: the first picture is shown so many frames after the sound begins.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Bit-exact sound, which .mp4 holds as FLAC.
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
      said = av.AudioFrame.from_ndarray(
        np.repeat(samples, num_channels)[None], "s16", layout
      )
      said.sample_rate = rate
      said.time_base, said.pts = Fraction(1, rate), 0
      container.mux(track.encode(said))
      container.mux(track.encode())
  return path
