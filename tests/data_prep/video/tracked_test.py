"""Videos that are read twice: the same frames, or an error."""

import dataclasses

import numpy as np
import pytest

from data_prep.faces import boxes, meshes, tracking
from data_prep.video import tracked
from data_prep.video.decode import DecodeError, Limits
from data_prep.video.tracked import TrackedVideo, VideoFrames
from tests.support.videos import moving_noise, write_video


class Blind:
  """A face finder that finds no face."""

  def detect(self, frame):
    return []


def write_noise(path, num_frames, rate=25):
  return write_video(path, moving_noise(num_frames), "ffv1", "bgr0", rate=rate)


@pytest.mark.parametrize("fps", [0.0, 25.0, 40.0])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_the_second_pass_gives_the_frames_of_the_first(
  tmp_path, fps, keep_bytes
):
  source = VideoFrames(write_noise(tmp_path / "v.mkv", 20), fps)
  video = TrackedVideo(source, Blind(), keep_bytes=keep_bytes)
  with source.open() as (_, frames):
    expected = list(frames)
  assert video.num_decoded_frames == 20
  assert video.num_frames == len(expected) == (32 if fps == 40 else 20)
  assert video.fps == (fps or 25)
  assert video.size == expected[0][0].shape[1::-1]
  for stop in (None, 7):
    result = list(video.frames(stop))
    assert len(result) == (stop or video.num_frames)
    for (frame, secs), (first, first_secs) in zip(
      result, expected, strict=False
    ):
      assert secs == first_secs
      np.testing.assert_array_equal(frame, first)


@pytest.mark.parametrize(
  ("num_frames", "later", "stop"), [(9, 8, None), (9, 10, None), (9, 4, 5)]
)
def test_a_file_changed_between_the_passes_is_refused(
  tmp_path, num_frames, later, stop
):
  path = write_noise(tmp_path / "v.mkv", num_frames)
  video = TrackedVideo(VideoFrames(path), Blind())
  write_noise(tmp_path / "w.mkv", later).replace(path)
  with pytest.raises(DecodeError, match=rf"\b{num_frames} .*\b{later} "):
    list(video.frames(stop))


def test_frames_before_a_stop_are_enough(tmp_path):
  path = write_noise(tmp_path / "v.mkv", 9)
  video = TrackedVideo(VideoFrames(path), Blind())
  write_noise(tmp_path / "w.mkv", 6).replace(path)
  assert len(list(video.frames(5))) == 5


def test_crops_are_those_of_the_boxes_and_none_without(tmp_path):
  shares = []
  video = TrackedVideo(
    VideoFrames(write_noise(tmp_path / "v.mkv", 5)),
    Blind(),
    finding_share=0.5,
    progress=lambda share, num_frames: shares.append((share, num_frames)),
  )
  assert shares == [(i / 10, i) for i in range(1, 6)]
  where = np.full((4, 4), np.nan, np.float32)
  where[1] = [3, 2, 33, 32]
  result = list(video.crops(where))
  assert shares[5:] == [(0.5 + i / 8, i) for i in range(1, 5)]
  assert [crop is not None for _, _, crop in result] == [0, 1, 0, 0]
  frame, _, crop = result[1]
  np.testing.assert_array_equal(crop, boxes.crop_frame(frame, where[1]))


def test_a_share_is_unknown_where_no_number_of_frames_is_announced(tmp_path):
  path = write_video(tmp_path / "v.h264", moving_noise(9), bf="0")
  shares = []
  TrackedVideo(
    VideoFrames(path),
    Blind(),
    progress=lambda share, num_frames: shares.append((share, num_frames)),
  )
  assert shares == [(0.0, i) for i in range(1, 10)]


def test_a_video_too_long_is_refused_at_once(tmp_path):
  path = write_noise(tmp_path / "v.mkv", 27)
  with pytest.raises(DecodeError, match="longer than 1 s"):
    TrackedVideo(VideoFrames(path, 25.0, max_secs=1), Blind())
  path = write_noise(tmp_path / "w.mkv", 25)
  assert TrackedVideo(VideoFrames(path, 25.0, max_secs=1), Blind()).num_frames


def write_pause(path, pause_secs):
  secs = [i / 25 for i in range(20)]
  secs += [secs[-1] + pause_secs + i / 25 for i in range(20)]
  return write_video(path, moving_noise(40), secs=secs)


@pytest.mark.parametrize(
  ("pause_secs", "starts"), [(1.5, [0]), (30.0, [0, 70])]
)
def test_tracks_end_at_a_pause_that_is_not_filled(
  tmp_path, monkeypatch, pause_secs, starts
):
  whole = tracking.Track(
    track_id=0,
    first_frame=0,
    boxes=np.arange(400, dtype=np.float32).reshape(100, 4),
    meshes=meshes.Meshes(100, [], [], []),
    quality=1.0,
    quality_terms=np.ones(4, np.float32),
  )

  def find_tracks(frames, *_, **__):
    stop = len(list(frames))
    return [
      dataclasses.replace(
        whole, boxes=whole.boxes[:stop], meshes=whole.meshes.part(0, stop)
      )
    ]

  monkeypatch.setattr(tracked.tracking, "find_tracks", find_tracks)
  path = write_pause(tmp_path / "v.mkv", pause_secs)
  video = TrackedVideo(VideoFrames(path, 25.0), Blind())
  first = [track.first_frame for track in video.tracks]
  assert first == pytest.approx(starts, abs=1)
  assert [t.track_id for t in video.tracks] == list(range(len(starts)))
  together = np.concatenate([track.boxes for track in video.tracks])
  np.testing.assert_array_equal(together, whole.boxes[: len(together)])
  assert video.num_frames == len(together) < 100


def test_frames_are_counted_at_the_rate_they_are_brought_to(tmp_path):
  secs = [i * 1.9 for i in range(20)]
  path = write_video(tmp_path / "v.mkv", moving_noise(20), secs=secs)
  limits = Limits(frames=100)
  assert TrackedVideo(VideoFrames(path, 2.0, limits), Blind()).num_frames < 100
  with pytest.raises(DecodeError, match="limit of 100, at 25 frames"):
    TrackedVideo(VideoFrames(path, 25.0, limits), Blind())


@pytest.mark.parametrize("rate", [10, 30, 60])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_tracks_too_short_are_left_out_and_the_rest_are_numbered(
  tmp_path, monkeypatch, rate, more
):
  half_a_second = rate // 2
  total = half_a_second + more

  def track(number, num_frames):
    return tracking.Track(
      track_id=number,
      first_frame=0,
      boxes=np.zeros((num_frames, 4), np.float32),
      meshes=meshes.Meshes(num_frames, [], [], []),
      quality=1.0,
      quality_terms=np.ones(4, np.float32),
    )

  def find_tracks(frames, *_, **__):
    assert len(list(frames)) == total
    lengths = range(half_a_second - 2, half_a_second + 1)
    return [track(i, n) for i, n in enumerate(lengths) if n <= total]

  monkeypatch.setattr(tracked.tracking, "find_tracks", find_tracks)
  path = write_noise(tmp_path / "v.mkv", total, rate)
  video = TrackedVideo(VideoFrames(path), Blind())
  least = min(total, half_a_second)
  assert [len(t) for t in video.tracks] == [least]
  assert [t.track_id for t in video.tracks] == [0]
