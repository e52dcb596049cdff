"""Recordings that were joined byte by byte, and streams with gaps."""

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.video.decode import (
  DecodeError,
  open_sound,
  open_video,
  read_sound,
)
from tests.support.videos import moving_noise, write_video

RATE = 30
SOUND_RATE = 48_000
AAC_SAMPLES = 1024
OPEN = "open-gop=1:keyint=30:min-keyint=30"


def read(path: Path) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
  with open_video(path, may_change_size=True) as video:
    frames, secs = zip(*video, strict=True)
    return [*frames], np.array(secs), video.notes


def join(path: Path, *parts: Path) -> Path:
  path.write_bytes(b"".join(part.read_bytes() for part in parts))
  return path


def beeps(samples: np.ndarray, rate: int = 16_000) -> np.ndarray:
  """Returns the times in seconds at which the beeps of a sound begin."""
  loud = np.flatnonzero(np.abs(samples.astype(int)) > 3000)
  return loud[np.insert(np.diff(loud) > 0.2 * rate, 0, True)] / rate


def write_part(
  path: Path,
  spans=((0.0, 1.0),),
  secs: float = 1.0,
  sound_rate: int = SOUND_RATE,
  layout: str = "mono",
  fps: int = RATE,
) -> Path:
  """Writes a video with a beep half a second after each start of its sound.

  Args:
    path: its suffix decides the container.
    spans: first and last second of each part of the sound; none for no track.
    secs: length of the pictures.
    sound_rate: samples per second.
    layout: channels of the sound.
    fps: frames per second.
  """
  with av.open(str(path), "w") as container:
    video = container.add_stream("libx264", rate=fps)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    if spans:
      sound = container.add_stream("aac", rate=sound_rate, layout=layout)
    for pixels in moving_noise(round(secs * fps)):
      container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
    container.mux(video.encode())
    num_channels = 2 if layout == "stereo" else 1
    for start, stop in spans:
      at = np.arange(0, stop - start, 1 / sound_rate)
      wave = 16_000 * np.sin(2 * np.pi * 1000 * at)
      wave *= (at >= 0.5) & (at < 0.55)
      wave = np.pad(wave, (0, -len(wave) % AAC_SAMPLES)).astype(np.int16)
      for i in range(0, len(wave), AAC_SAMPLES):
        part = np.repeat(wave[i : i + AAC_SAMPLES], num_channels)[None]
        frame = av.AudioFrame.from_ndarray(part, "s16", layout)
        frame.sample_rate, frame.pts = sound_rate, i + round(start * sound_rate)
        frame.time_base = Fraction(1, sound_rate)
        container.mux(sound.encode(frame))
    if spans:
      container.mux(sound.encode())
  return path


# --- Sound --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.ts", "v.flv"])
def test_a_long_gap_in_the_sound_alone_is_no_restart(tmp_path, name):
  path = write_part(tmp_path / name, ((0, 1), (12, 13)), secs=13, fps=5)
  _, secs, notes = read(path)
  assert notes == []
  first, second = beeps(read_sound(path)) - secs[0]
  assert first == pytest.approx(0.5, abs=0.03)
  assert second == pytest.approx(12.5, abs=0.03)


@pytest.mark.parametrize(
  ("rate", "layout"), [(SOUND_RATE, "stereo"), (44_100, "mono")]
)
def test_sound_may_change_its_rate_and_channels(tmp_path, rate, layout):
  first = write_part(tmp_path / "1.ts")
  second = write_part(tmp_path / "2.ts", sound_rate=rate, layout=layout)
  path = join(tmp_path / "v.ts", first, second)
  _, secs, notes = read(path)
  assert notes == ["times start again: 1 times"]
  expected = np.array([0.5, 0.5]) + secs[[0, RATE]]
  np.testing.assert_allclose(beeps(read_sound(path)), expected, atol=0.01)
  with open_sound(path) as sound:
    assert (sound.rate, sound.num_channels) == (SOUND_RATE, 1)
    samples = np.concatenate([*sound])[:, 0]
  np.testing.assert_allclose(beeps(samples, SOUND_RATE), expected, atol=0.01)


def without_sound(path: Path) -> Path:
  """Returns a copy that announces a sound track but has no packet of it."""
  data = path.read_bytes()
  packets = [data[i : i + 188] for i in range(0, len(data), 188)]
  target = path.with_stem(f"{path.stem}-muted")
  is_sound = [(p[1] & 0x1F, p[2]) == (1, 1) for p in packets]
  assert any(is_sound)
  target.write_bytes(
    b"".join(p for p, out in zip(packets, is_sound, strict=True) if not out)
  )
  return target


@pytest.mark.parametrize("silent", [0, 1])
def test_sound_that_lacks_a_recording_stays_beside_its_frames(tmp_path, silent):
  part = write_part(tmp_path / "1.ts")
  muted = without_sound(write_part(tmp_path / "2.ts", secs=3.0))
  parts, starts = [part, part, part], [0, 1, 2]
  parts[silent] = muted
  starts = np.cumsum([0, *[3 if p is muted else 1 for p in parts[:2]]])
  _, secs, notes = read(join(tmp_path / "v.ts", *parts))
  assert notes == ["times start again: 2 times"]
  starts = secs[RATE * np.delete(starts, silent)]
  found = beeps(read_sound(tmp_path / "v.ts"))
  np.testing.assert_allclose(found, starts + 0.5, atol=0.01)


# --- Pictures -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("codec", "options"),
  [
    ("libx264", {"x264-params": f"{OPEN}:bframes=3:b-adapt=0"}),
    ("libx265", {"x265-params": f"{OPEN}:log-level=none"}),
    ("mpeg2video", {"g": "12", "bf": "2", "b": "4000000"}),
  ],
)
def test_recordings_that_begin_in_an_open_group_are_joined(
  tmp_path, codec, options
):
  """The cut leaves frames that refer to others, also within a joined file."""
  whole = write_video(
    tmp_path / "whole.ts", moving_noise(90), codec, "yuv420p", **options
  )
  cut = tmp_path / "cut.ts"
  with av.open(str(whole)) as source, av.open(str(cut), "w") as container:
    stream = source.streams.video[0]
    copy = container.add_stream_from_template(stream)
    num_keys = 0
    for packet in source.demux(stream):
      num_keys += packet.is_keyframe
      if packet.size and num_keys > 1:
        packet.stream = copy
        container.mux(packet)
  alone, _, notes_alone = read(cut)
  frames, secs, notes = read(join(tmp_path / "v.ts", whole, cut, cut))
  np.testing.assert_array_equal(frames, read(whole)[0] + 2 * alone)
  np.testing.assert_allclose(np.diff(secs), 1 / RATE, atol=1e-3)
  *notes, restarts = notes
  assert restarts == "times start again: 2 times"
  assert notes == [twice(note) for note in notes_alone]


def twice(note: str) -> str:
  text, _, number = note.rpartition(" ")
  assert text.startswith("cut at its beginning: ")
  return f"{text} {2 * int(number)}"


@pytest.mark.parametrize("first", ["sar=1/1", "keyint=20"])
def test_pixels_may_change_their_shape(tmp_path, first):
  parts = []
  for name, option in (("1.ts", first), ("2.ts", "sar=2/1")):
    parts.append(
      write_video(
        tmp_path / name,
        moving_noise(20),
        pix_fmt="yuv420p",
        **{"x264-params": option},
      )
    )
  frames, _, notes = read(join(tmp_path / "v.ts", *parts))
  assert [f.shape[1] for f in frames] == [64] * 20 + [128] * 20
  assert "frame size changes: from 64x48 to 128x48, where tracks end" in notes


def turned(stream: bytes, turns: int) -> bytes:
  """Writes the display orientation of an H.264 stream into its key frames.

  Args:
    stream: units that begin with start codes.
    turns: quarter turns counter-clockwise.
  """
  bits = f"000{turns << 14:016b}01001"  # ITU-T H.264, D.1.27
  payload = int(bits, 2).to_bytes(3, "big")
  unit = b"\0\0\0\1\x06" + bytes([47, len(payload)]) + payload + b"\x80"
  # After the parameters of a sequence and its pictures, before the picture.
  parameters = re.compile(rb"\0\0\x01\x68(?:(?!\0\0\x01).)*", re.DOTALL)
  return parameters.sub(lambda found: found[0] + unit, stream)


def test_frames_may_be_turned_midway(tmp_path):
  """As by a phone that is turned between two recordings."""
  path = write_video(
    tmp_path / "v.h264", moving_noise(20), pix_fmt="yuv420p", g="5", bf="0"
  )
  upright = read(path)[0]
  data = path.read_bytes()
  path.write_bytes(data + turned(data, 1) + turned(data, 3) + turned(data, 2))
  frames, _, notes = read(path)
  expected = upright + [
    np.rot90(frame, turns) for turns in (1, 3, 2) for frame in upright
  ]
  assert len(frames) == len(expected)
  assert all(map(np.array_equal, frames, expected))
  assert "frame orientation changes: by turning or mirroring, where" in notes[0]
  with (
    pytest.raises(DecodeError, match="frame orientation changes by turning"),
    open_video(path) as video,
  ):
    list(video)
