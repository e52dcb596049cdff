"""Videos that tests write, and those of third parties."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.processes import ROOT

VIDEOS = ROOT.parent / "shared" / "videos"


def write_video(
  path: Path,
  frames: Sequence[np.ndarray],
  codec: str = "libx264",
  pix_fmt: str = "yuv444p",
  rate: int = 30,
  secs: Sequence[float] | None = None,
  rotation: int = 0,
  audio_first: bool = False,
  **options: str,
) -> Path:
  """Encodes uint8 (H, W, 3) RGB frames.

  Args:
    path: its suffix decides the container.
    frames: the frames.
    codec: name of the encoder.
    pix_fmt: its pixel format.
    rate: frames per second.
    secs: times of the frames, for a variable rate.
    rotation: the player's, in degrees counter-clockwise.
    audio_first: makes stream 0 a second of silence.
    **options: the encoder's.
  """
  height, width = frames[0].shape[:2]
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w") as container:
    if audio_first:
      audio = container.add_stream("pcm_s16le", rate=8000)
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.options = options
    if rotation:
      stream.set_display_rotation(rotation)
    if secs is not None:
      stream.codec_context.time_base = Fraction(1, 1000)
    if audio_first:
      silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16))
      silence.sample_rate = 8000
      container.mux(audio.encode(silence))
    for i, pixels in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
      if secs is not None:
        frame.pts = round(1000 * secs[i])
        frame.time_base = stream.codec_context.time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def moving_noise(
  num_frames: int, width: int = 64, height: int = 48
) -> list[np.ndarray]:
  """Returns uint8 (H, W, 3) frames of noise that scrolls; shows no face."""
  noise = np.random.default_rng(0).integers(
    0, 256, (height, width, 3), np.uint8
  )
  return [np.roll(noise, 3 * i, axis=1) for i in range(num_frames)]


def shared_video(name: str) -> Path:
  """Returns a video of third parties that is not part of this repository."""
  if not (VIDEOS / name).is_file():
    pytest.skip(f"../shared/videos/{name} is not there")
  return VIDEOS / name
