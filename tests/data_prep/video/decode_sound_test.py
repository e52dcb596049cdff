"""Sound of any format is decoded to the clock of the frames."""

import wave as wave_files
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.video.decode import DecodeError, Limits, open_sound, read_sound
from tests.support.sounds import CLICK_SECS, clicks, write_sound
from tests.support.videos import moving_noise, shared_video, write_video


def starts(sound: np.ndarray) -> list[float]:
  """Returns the times at which tones begin, in seconds."""
  loud = np.flatnonzero(np.abs(sound.astype(int)) > 1500)
  first = loud[np.insert(np.diff(loud) > 1600, 0, True)]
  return [float(at) / 16_000 for at in first]


@pytest.mark.parametrize(
  ("rate", "num_channels"), [(16_000, 1), (8000, 1), (44_100, 2), (48_000, 1)]
)
def test_sound_of_any_rate_and_channels_is_on_time(
  tmp_path, rate, num_channels
):
  path = write_sound(tmp_path / "v.mkv", clicks(rate), rate, num_channels)
  sound = read_sound(path)
  assert sound.dtype == np.int16
  assert abs(len(sound) - 32_000) <= 16
  assert starts(sound) == pytest.approx(CLICK_SECS, abs=5e-4)


@pytest.mark.parametrize("num_channels", [3, 8, 9])
def test_many_channels_are_mixed_or_refused(tmp_path, num_channels):
  path = tmp_path / "v.wav"
  with wave_files.open(str(path), "wb") as file:
    file.setparams((num_channels, 2, 16_000, 0, "NONE", ""))
    file.writeframes(np.repeat(clicks(16_000), num_channels).tobytes())
  if num_channels > 8:
    with pytest.raises(DecodeError, match="9 channels cannot be mixed"):
      read_sound(path)
    return
  assert starts(read_sound(path)) == pytest.approx(CLICK_SECS, abs=5e-4)


def test_sound_that_needs_no_conversion_is_bit_exact(tmp_path):
  wave = clicks(16_000)
  np.testing.assert_array_equal(
    read_sound(write_sound(tmp_path / "v.mkv", wave)), wave
  )


def test_compressed_sound_is_on_time(tmp_path):
  path = write_sound(tmp_path / "v.mp4", clicks(44_100), 44_100, codec="aac")
  assert starts(read_sound(path)) == pytest.approx(CLICK_SECS, abs=3e-3)


def test_late_sound_and_gaps_are_filled_with_silence(tmp_path):
  late = write_sound(
    tmp_path / "late.mkv", clicks(16_000), parts=((0, 2, 0.3),)
  )
  expected = [at + 0.3 for at in CLICK_SECS]
  assert starts(read_sound(late)) == pytest.approx(expected, abs=1e-3)
  gap = write_sound(
    tmp_path / "gap.mkv", clicks(16_000), parts=((0, 1, 0), (1, 2, 1.5))
  )
  expected = [0.5, 1.75, 2.25]
  assert starts(read_sound(gap)) == pytest.approx(expected, abs=1e-3)


def test_video_without_a_sound_track_has_no_samples(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  assert read_sound(path).shape == (0,)


def test_damaged_sound_and_no_video_are_refused(tmp_path):
  path = write_sound(tmp_path / "v.mp4", clicks(44_100), 44_100, codec="flac")
  with av.open(str(path)) as container:
    packets = [p for p in container.demux(audio=0) if p.size]
  largest = max(packets, key=lambda packet: packet.size)
  data = bytearray(path.read_bytes())
  data[largest.pos + 20 : largest.pos + largest.size] = bytes(largest.size - 20)
  path.write_bytes(data)
  with pytest.raises(DecodeError, match=r"damaged sound after \d"):
    read_sound(path)
  path.write_text("no video")
  with pytest.raises(DecodeError, match="cannot open"):
    read_sound(path)


def test_sound_decoder_keeps_the_deadline(tmp_path):
  path = write_sound(tmp_path / "v.mkv", clicks(16_000))
  with pytest.raises(DecodeError, match="deadline"):
    read_sound(path, Limits(secs=0.0))


def test_shared_footage_has_sound_as_long_as_the_picture():
  sound = read_sound(shared_video("video01.mp4"))
  assert len(sound) / 16_000 == pytest.approx(10.0, abs=0.05)
  assert sound.std() > 500


# --- Its own rate and channels ------------------------------------------------


@pytest.mark.parametrize(
  ("rate", "num_channels", "codec", "suffix"),
  [
    (8000, 1, "pcm_s16le", ".wav"),
    (44_100, 2, "pcm_s16be", ".aiff"),
    (48_000, 2, "flac", ".flac"),
    (44_100, 1, "mp3", ".mp3"),
    (48_000, 2, "libopus", ".ogg"),
  ],
)
def test_files_of_sound_alone_keep_their_rate_and_channels(
  tmp_path, rate, num_channels, codec, suffix
):
  path = tmp_path / f"v{suffix}"
  layout = "mono" if num_channels == 1 else "stereo"
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, layout=layout)
    wave = np.repeat(clicks(rate), num_channels)[None]
    frame = av.AudioFrame.from_ndarray(wave, "s16", layout)
    frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
    frame.pts = 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  assert starts(read_sound(path)) == pytest.approx(CLICK_SECS, abs=1e-3)
  with open_sound(path) as sound:
    assert (sound.rate, sound.num_channels) == (rate, num_channels)
    samples = np.concatenate(list(sound))
  assert samples.dtype == np.int16
  assert samples.shape[1] == num_channels
  assert abs(len(samples) - 2 * rate) <= rate / 1000
  if codec.startswith("pcm") or codec == "flac":
    for channel in samples.T:
      np.testing.assert_array_equal(channel, clicks(rate))


def test_sound_that_begins_late_is_late_as_it_is(tmp_path):
  parts = ((0, 1, 0.5),)
  path = write_sound(tmp_path / "v.mkv", clicks(48_000), 48_000, parts=parts)
  with open_sound(path) as sound:
    loud = np.abs(np.concatenate(list(sound))[:, 0].astype(int)) > 1500
  assert np.flatnonzero(loud)[0] / 48_000 == pytest.approx(1.0, abs=5e-4)


def test_video_without_a_sound_track_has_none_to_open(tmp_path):
  path = write_video(tmp_path / "v.mkv", moving_noise(5))
  with pytest.raises(DecodeError, match="no sound track"):
    open_sound(path)


# --- Gaps, drift and headers --------------------------------------------------


def write_chunks(
  path: Path, starts: np.ndarray, size: int, rate: int = 48_000
) -> Path:
  """Writes a sound of chunks that begin at times in seconds; click at 4 s."""
  with av.open(str(path), "w") as container:
    video = container.add_stream("libx264", rate=25)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    sound = container.add_stream("pcm_s16le", rate=rate, layout="mono")
    for pixels in moving_noise(3):
      container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
    container.mux(video.encode())
    for start in starts:
      at = start + np.arange(size) / rate
      wave = 16_000 * np.sin(2 * np.pi * 1000 * at) * (abs(at - 4.01) < 0.01)
      part = wave.astype(np.int16)[None]
      frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
      frame.sample_rate, frame.pts = rate, round(start * rate)
      frame.time_base = Fraction(1, rate)
      container.mux(sound.encode(frame))
    container.mux(sound.encode())
  return path


def click_secs(path: Path) -> float:
  samples = read_sound(path)
  return float(np.flatnonzero(np.abs(samples.astype(int)) > 3000)[0]) / 16_000


@pytest.mark.parametrize("gap_ms", [5, 15, 40, 80, 150])
def test_a_gap_is_silence_to_the_millisecond(tmp_path, gap_ms):
  starts = np.arange(0, 4.5, 0.01)
  starts[100:] += gap_ms / 1000
  starts[200:] += gap_ms / 1000
  path = write_chunks(tmp_path / "v.mkv", starts, 480)
  assert click_secs(path) == pytest.approx(4.0, abs=1.2e-3)
  samples = read_sound(path)
  assert len(samples) / 16_000 == pytest.approx(starts[-1] + 0.01, abs=2e-3)


@pytest.mark.parametrize("drift", [0.005, -0.005, 0.001, -0.0001])
def test_a_clock_that_drifts_is_followed(tmp_path, drift):
  starts = np.arange(450) * 0.01 * (1 + drift)
  path = write_chunks(tmp_path / "v.mkv", starts, 480)
  assert click_secs(path) == pytest.approx(4.0, abs=3e-3)


def test_times_rounded_to_milliseconds_are_no_gaps(tmp_path):
  size, rate = 450, 44_100
  starts = np.arange(400) * size / rate
  path = write_chunks(tmp_path / "v.mkv", starts, size, rate)
  with open_sound(path) as sound:
    samples = np.concatenate(list(sound))
  assert len(samples) == pytest.approx(400 * size, abs=2 * rate / 1000)
  wave = np.flatnonzero(np.abs(samples[:, 0].astype(int)) > 100)
  # One tone: no silence was put into it, and nothing left out.
  assert np.diff(wave).max() <= 5
  assert np.ptp(wave) / rate == pytest.approx(0.02, abs=5e-4)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 2_000_000_000, 0x7FFFFFFF, 0])
def test_wav_that_was_written_to_a_stream_is_read_to_its_end(tmp_path, size):
  path = write_sound_file(tmp_path / "v.wav", "pcm_s16le")
  data = bytearray(path.read_bytes())
  at = data.index(b"data") + 4
  data[at : at + 4] = size.to_bytes(4, "little")
  data[4:8] = min(size + 36, 0xFFFFFFFF).to_bytes(4, "little")
  # Neither a whole number of packets, nor of samples.
  path.write_bytes(data + b"x")
  np.testing.assert_array_equal(read_sound(path)[:32_000], clicks(16_000))


def write_sound_file(path: Path, codec: str) -> Path:
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=16_000, layout="mono")
    format = "s16p" if codec == "mp3" else "s16"
    frame = av.AudioFrame.from_ndarray(clicks(16_000)[None], format, "mono")
    frame.sample_rate, frame.pts = 16_000, 0
    frame.time_base = Fraction(1, 16_000)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.mark.parametrize(
  "padding",
  [
    bytes(5000),
    bytes(200_000),
    b"\xff" * 3000,
    b"TAG" + bytes(125),
    b"APETAGEX" + bytes(200),
    bytes(417) + b"TAG" + bytes(125),
  ],
)
def test_padding_after_an_mp3_is_no_damage(tmp_path, padding):
  path = write_sound_file(tmp_path / "v.mp3", "mp3")
  path.write_bytes(path.read_bytes() + padding)
  samples = read_sound(path)
  assert starts(samples) == pytest.approx(CLICK_SECS, abs=3e-3)
  assert len(samples) / 16_000 == pytest.approx(2.0, abs=0.1)


def test_padding_before_and_within_an_mp3_is_no_damage(tmp_path):
  path = write_sound_file(tmp_path / "v.mp3", "mp3")
  data = path.read_bytes()
  tag = b"ID3\x03\0\0\0\0\x40\0" + bytes(0x40 << 7)
  for padded in (tag + data, bytes(5000) + data, data + data):
    path.write_bytes(padded)
    assert len(starts(read_sound(path))) == 3 * (1 + (padded == data + data))
