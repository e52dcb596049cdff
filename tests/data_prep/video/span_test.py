"""A span of a video is the frames and times of the whole, and no others."""

import av
import numpy as np
import pytest

from data_prep.decoder import packets
from data_prep.decoder.clock import Clock
from data_prep.decoder.protocol import WHOLE, Span
from data_prep.video.decode import DecodeError, Limits, open_video
from tests.support.videos import moving_noise, write_video

# Name, encoder and its options; a key frame in 25 frames, or fewer.
ENCODINGS = {
  "v.mp4": ("libx264", {"g": "25", "bf": "3"}),
  "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=25:bframes=3"}),
  "open.mkv": ("libx264", {"x264-params": "open-gop=1:keyint=25:bframes=3"}),
  "refresh.mkv": ("libx264", {"x264-params": "intra-refresh=1:keyint=25"}),
  "hevc.mp4": ("libx265", {"x265-params": "keyint=25:log-level=none"}),
  "vp9.webm": ("libvpx-vp9", {"g": "25", "cpu-used": "8"}),
  "b.avi": ("mpeg4", {"g": "25", "bf": "2"}),
  "b.ts": ("libx264", {"g": "25", "bf": "3"}),
  "b.mpg": ("mpeg2video", {"g": "25", "bf": "2"}),
}


def read(path, span=WHOLE):
  with open_video(path, span=span) as video:
    return video, list(video)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_span_is_the_same_frames_as_in_the_whole(tmp_path, name):
  codec, options = ENCODINGS[name]
  path = write_video(
    tmp_path / name, moving_noise(120), codec, "yuv420p", rate=25, **options
  )
  _, whole = read(path)
  assert len(whole) == 120
  times = [secs for _, secs in whole]
  for first, last in [(24, 27), (60, 80)]:
    _, part = read(path, Span(times[first], times[last]))
    assert [secs for _, secs in part] == times[first:last]
    for (frame, _), (expected, _) in zip(part, whole[first:last], strict=True):
      np.testing.assert_array_equal(frame, expected)


def test_a_span_takes_the_frames_from_its_start_to_before_its_end(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(50), rate=25)
  # Between frames, and rounded as people write times.
  _, part = read(path, Span(0.41, 0.52))
  assert [round(25 * secs) for _, secs in part] == [11, 12]
  _, part = read(path, Span(0.4001, 0.4801))
  assert [round(25 * secs) for _, secs in part] == [10, 11]


def test_a_span_is_sought_where_there_is_an_index(tmp_path, monkeypatch):
  decode_all, counts = packets.frames, {}

  def counted_frames(*args):
    for frame in decode_all(*args):
      counts[name] = counts.get(name, 0) + 1
      yield frame

  monkeypatch.setattr(packets, "frames", counted_frames)
  for name in ("v.mp4", "v.mkv", "v.avi"):
    path = write_video(
      tmp_path / name, moving_noise(250), "mpeg4", "yuv420p", rate=25, g="10"
    )
    # In this process, without the decoder's sandbox.
    with av.open(str(path)) as container:
      stream = packets.video_stream(container)
      clock = Clock(container, stream)
      found = packets.Frames(container, stream, clock, Span(8.0, 8.4))
      assert len(list(found)) == 10
  # A second before the span, and the rest of a group of pictures.
  assert max(counts["v.mp4"], counts["v.mkv"]) <= 25 + 10 + 10 + 1
  assert counts["v.avi"] > 200


def test_a_span_beyond_the_end_is_refused_or_told(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(50), rate=25)
  with pytest.raises(DecodeError, match=r"no frame from 3 s to 4 s"):
    read(path, Span(3.0, 4.0))
  video, part = read(path, Span(1.0, 9.0))
  assert len(part) == 25
  assert video.notes == ["frames are missing: they end at 2.0 s, before 9 s"]


def test_a_span_of_a_file_without_times_is_refused(tmp_path):
  path = write_video(tmp_path / "v.h264", moving_noise(9))
  assert len(read(path)[1]) == 9
  with pytest.raises(DecodeError, match="it has no times"):
    read(path, Span(0.1, 0.2))


def test_the_limit_of_frames_is_that_of_the_span(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(50), rate=25)
  limits = Limits(frames=10)
  with pytest.raises(DecodeError, match="limit of 10"):
    open_video(path, limits)
  with open_video(path, limits, span=Span(1.0, 1.4)) as video:
    assert video.info.announced_frames == 10
    assert len(list(video)) == 10
