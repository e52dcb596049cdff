"""Sound of any format is decoded to the clock of the frames."""

from fractions import Fraction

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
