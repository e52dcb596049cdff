"""Damaged, cut and changing videos: what is kept, and what is told."""

from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.decoder import protocol
from data_prep.faces import shots
from data_prep.sources.listing import Part
from data_prep.video import decode
from data_prep.video.decode import DecodeError, open_video
from data_prep.video.tracked import TrackedVideo, VideoFrames
from tests.support.sounds import write_sound
from tests.support.videos import moving_noise, write_video


def read(path: Path, **options) -> tuple[list[np.ndarray], list[str]]:
  """Returns frames and notes."""
  with open_video(path, **options) as video:
    return [frame for frame, _ in video], video.notes


def damage(path: Path, share: float) -> None:
  """Overwrites 2 kB in the middle of a file."""
  data = bytearray(path.read_bytes())
  at = int(share * len(data))
  data[at : at + 2048] = bytes(2048)
  path.write_bytes(data)


# --- Damage -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_frames_before_damage_are_kept_and_the_loss_is_told(tmp_path, name):
  path = write_video(
    tmp_path / name, moving_noise(60, 320, 240), "mpeg4", "yuv420p", g="5"
  )
  whole, _ = read(path)
  damage(path, 0.7)
  with pytest.raises(DecodeError, match="reported damage after"):
    read(path)
  frames, notes = read(path, keep_damaged=True)
  assert 30 < len(frames) < 50
  np.testing.assert_array_equal(frames, whole[: len(frames)])
  assert notes[-1].startswith(f"cut before damage: {len(frames)} of 60 frames")


@pytest.mark.parametrize("is_lost", [False, True])
def test_damage_between_the_frames_of_a_matroska_is_found(tmp_path, is_lost):
  """Decoders such as that of JPEG do not miss the frames that are lost."""
  path = write_video(tmp_path / "v.mkv", moving_noise(40), "mjpeg", "yuvj420p")
  whole, _ = read(path)
  data = path.read_bytes()
  middle, stop = len(data) // 2, 5 * len(data) // 8
  lost = b"" if is_lost else bytes(stop - middle)
  path.write_bytes(data[:middle] + lost + data[stop:])
  with pytest.raises(DecodeError, match="the file is damaged behind byte"):
    read(path)
  frames, _ = read(path, keep_damaged=True)
  assert 10 < len(frames) < 30
  np.testing.assert_array_equal(frames, whole[: len(frames)])


@pytest.mark.parametrize("kind", ["live", "padded", "joined", "crc"])
def test_a_matroska_without_damage_is_whole(tmp_path, kind):
  path = tmp_path / "v.mkv"
  options = {
    "live": {"live": "1", "cluster_time_limit": "300"},
    "crc": {"write_crc32": "1", "reserve_index_space": "5000"},
  }
  frames = moving_noise(30)
  with av.open(str(path), "w", options=options.get(kind, {})) as container:
    stream = container.add_stream("mjpeg", rate=30)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
    container.mux(stream.encode())
  data = path.read_bytes()
  more = {"padded": bytes(3000), "joined": data}.get(kind, b"")
  path.write_bytes(data + more)
  decoded, _ = read(path)
  assert len(decoded) == (60 if kind == "joined" else 30)


def test_a_transport_stream_cut_at_its_end_loses_its_last_frames(tmp_path):
  path = write_video(tmp_path / "v.ts", moving_noise(60, 320, 240), g="5")
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2 // 188 * 188 + 100])
  frames, notes = read(path, keep_damaged=True)
  assert 20 < len(frames) < 40
  with pytest.raises(DecodeError, match="reported damage after"):
    read(path)
  assert notes[-1].startswith(f"cut before damage: {len(frames)} ")


def test_pictures_before_a_damaged_one_are_kept(tmp_path):
  av.VideoFrame.from_ndarray(moving_noise(1)[0]).to_image().save(
    tmp_path / "0.png"
  )
  (tmp_path / "1.png").write_bytes(b"no picture")
  frames, notes = read(tmp_path, frame_rate=24.0, keep_damaged=True)
  assert len(frames) == 1
  assert notes[0].startswith("cut before damage: 1 of 2 frames are left")


def test_a_video_damaged_before_its_first_frame_is_refused(tmp_path):
  path = write_video(
    tmp_path / "v.mkv", moving_noise(1, 320, 240), "mpeg4", "yuv420p"
  )
  damage(path, 0.4)
  with pytest.raises(DecodeError):
    read(path, keep_damaged=True)


class Blind:
  """A face finder that finds no face."""

  def detect(self, frame):
    return []


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_both_passes_end_before_the_damage(tmp_path, keep_bytes):
  path = write_video(
    tmp_path / "v.mp4", moving_noise(60, 320, 240), "mpeg4", "yuv420p", g="5"
  )
  damage(path, 0.7)
  source = VideoFrames(path, 25.0, keep_damaged=True)
  video = TrackedVideo(source, Blind(), keep_bytes=keep_bytes)
  assert len(list(video.frames())) == video.num_frames
  assert 25 < video.num_frames < 45


def test_frames_from_the_stop_on_are_not_read(tmp_path):
  path = write_video(tmp_path / "v.mkv", moving_noise(60), rate=30)
  for fps, expected in ((0.0, 30), (15.0, 15)):
    source = VideoFrames(path, fps, stop_secs=1.0)
    assert TrackedVideo(source, Blind()).num_frames == expected


def test_sound_before_damage_is_returned_where_asked_for(tmp_path):
  noise = np.random.default_rng(0).integers(-9000, 9000, 32_000)
  path = write_sound(tmp_path / "v.mkv", noise.astype(np.int16), codec="flac")
  whole = decode.read_sound(path)
  damage(path, 0.6)
  with pytest.raises(DecodeError, match="damaged sound after"):
    decode.read_sound(path)
  reasons: list[str] = []
  samples = decode.read_sound(path, on_damage=reasons.append)
  assert 0.3 * len(whole) < len(samples) < 0.7 * len(whole)
  np.testing.assert_array_equal(samples, whole[: len(samples)])
  assert reasons[0].startswith("decoder reported damaged sound after")


# --- Cut without encoding -----------------------------------------------------

OPEN_GROUPS = {
  "libx264": {
    "x264-params": "open-gop=1:keyint=30:min-keyint=30:scenecut=0:b-adapt=0"
  },
  "libx265": {
    "x265-params": "open-gop=1:keyint=30:min-keyint=30:log-level=none"
  },
  "mpeg2video": {"g": "12", "bf": "2", "b": "4000000"},
}


def drop_packets(path: Path, least: int, at_key_frame: bool) -> Path:
  """Copies a video without its first packets.

  Args:
    path: the video.
    least: number of packets to drop.
    at_key_frame: drop more, up to the next key frame.
  """
  target = path.with_stem("cut")
  with av.open(str(path)) as source, av.open(str(target), "w") as container:
    stream = source.streams.video[0]
    copy = container.add_stream_from_template(stream)
    for number, packet in enumerate(source.demux(stream)):
      at_key_frame = at_key_frame and not (
        packet.is_keyframe and number >= least
      )
      if number >= least and not at_key_frame and packet.size:
        packet.stream = copy
        container.mux(packet)
  return target


def num_undecodable(path: Path) -> int:
  """Returns the number of frames that refer to others before a cut."""
  with av.open(str(path)) as container:
    packets = [p for p in container.demux(video=0) if p.size]
  keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
  times = [packet.pts for packet in packets]
  return keys[0] + sum(time < times[keys[0]] for time in times[keys[0] :])


@pytest.mark.parametrize("codec", OPEN_GROUPS)
@pytest.mark.parametrize("at_key_frame", [True, False])
def test_a_video_cut_within_a_group_of_pictures(tmp_path, codec, at_key_frame):
  path = write_video(
    tmp_path / "v.ts",
    moving_noise(90),
    codec,
    "yuv420p",
    **OPEN_GROUPS[codec],
  )
  whole, notes = read(path)
  assert (len(whole), notes) == (90, [])
  # The frames that are left: of the next key frame and what is shown later.
  cut = drop_packets(path, 5, at_key_frame)
  frames, notes = read(cut)
  (first,) = np.flatnonzero([np.array_equal(frames[0], f) for f in whole])
  assert first == (9 if codec == "mpeg2video" else 30)
  np.testing.assert_array_equal(frames, whole[first:])
  num_cut = num_undecodable(cut)
  told = "cut at its beginning: frames that refer to others before it are left"
  assert notes == ([f"{told} out, {num_cut}"] if num_cut else [])
  assert num_cut or (at_key_frame and codec == "libx265")


def test_a_span_that_begins_in_an_open_group_has_all_of_its_frames(tmp_path):
  path = write_video(
    tmp_path / "v.mp4",
    moving_noise(120),
    "libx264",
    "yuv420p",
    **OPEN_GROUPS["libx264"],
  )
  whole, _ = read(path)
  part, notes = read(path, span=protocol.Span(2.1, 3.0))
  np.testing.assert_array_equal(part, whole[63:90])
  assert notes == []


def test_a_damaged_first_group_is_still_damage(tmp_path):
  path = write_video(
    tmp_path / "v.mp4", moving_noise(60, 320, 240), "libx264", "yuv420p"
  )
  damage(path, 0.1)
  with pytest.raises(DecodeError, match="reported damage"):
    read(path)


# --- Frame size ---------------------------------------------------------------


@pytest.fixture
def two_sizes(tmp_path) -> Path:
  small = write_video(tmp_path / "a.h264", moving_noise(5, 64, 48))
  large = write_video(tmp_path / "b.h264", moving_noise(7, 96, 64))
  small.write_bytes(small.read_bytes() + large.read_bytes())
  return small


def test_frames_of_another_size_are_refused_unless_asked_for(two_sizes):
  with pytest.raises(DecodeError, match="changes from 64x48 to 96x64"):
    read(two_sizes)
  frames, notes = read(two_sizes, may_change_size=True)
  shapes = [(48, 64, 3)] * 5 + [(64, 96, 3)] * 7
  assert [frame.shape for frame in frames] == shapes
  assert notes == ["frame size changes: from 64x48 to 96x64, where tracks end"]


def test_a_box_is_of_frames_of_one_size(two_sizes):
  """Its pixels, and the place of its faces in the file, depend on the size."""
  part = Part(box=(0.0, 0.0, 0.5, 1.0))
  source = VideoFrames(two_sizes, part=part, may_change_size=True)
  with (
    pytest.raises(DecodeError, match="changes from 64x48 to 96x64"),
    source.open() as (_, frames),
  ):
    list(frames)


def test_pixels_of_all_sizes_are_counted(two_sizes):
  limits = decode.Limits(video_pixels=5 * 64 * 48 + 6 * 96 * 64)
  with pytest.raises(DecodeError, match="more frames of 96x64"):
    read(two_sizes, may_change_size=True, limits=limits)
  limits = decode.Limits(frame_pixels=64 * 48)
  with pytest.raises(DecodeError, match="frames of 96x64 are over"):
    read(two_sizes, may_change_size=True, limits=limits)


def test_a_change_of_size_begins_a_shot():
  is_cut = shots.CutTest()
  grey = np.full((48, 64, 3), 99, np.uint8)
  frames = [grey, grey, grey[:32], grey[:32], grey]
  assert [is_cut(frame) for frame in frames] == [0, 0, 1, 0, 1]
