"""Videos with a sound track, of clicks at known times."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.support.videos import moving_noise

CLICK_SECS = (0.5, 1.25, 1.75)


def clicks(rate: int, secs: float = 2.0) -> np.ndarray:
  """Returns int16 (S,) of short tones that begin at CLICK_SECS."""
  wave = np.zeros(int(secs * rate), np.int16)
  tone = 16_000 * np.sin(2 * np.pi * 500 * np.arange(rate // 50) / rate)
  for at in CLICK_SECS:
    wave[int(at * rate) :][: len(tone)] = tone
  return wave


def write_sound(
  path: Path,
  wave: np.ndarray,
  rate: int = 16_000,
  num_channels: int = 1,
  codec: str = "pcm_s16le",
  parts: tuple[tuple[float, float, float], ...] = ((0, 2, 0),),
) -> Path:
  """Writes a video of 2 s with a sound track.

  Args:
    path: its suffix decides the container.
    wave: int16 (S,).
    rate: its sample rate.
    num_channels: copies of it.
    codec: of the sound.
    parts: first and last second of the wave, and when it is played.
  """
  with av.open(str(path), "w") as container:
    video = container.add_stream("libx264", rate=25)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    layout = "mono" if num_channels == 1 else "stereo"
    sound = container.add_stream(codec, rate=rate, layout=layout)
    for pixels in moving_noise(50):
      container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
    container.mux(video.encode())
    for start, stop, at in parts:
      part = wave[int(start * rate) : int(stop * rate)]
      frame = av.AudioFrame.from_ndarray(
        np.repeat(part, num_channels)[None], "s16", layout
      )
      frame.sample_rate = rate
      frame.time_base, frame.pts = Fraction(1, rate), int(at * rate)
      container.mux(sound.encode(frame))
    container.mux(sound.encode())
  return path
