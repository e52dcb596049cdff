"""Hostile and odd videos are read correctly or refused with a reason."""

import contextlib
import dataclasses
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.decoder import child
from data_prep.video import decode
from data_prep.video.decode import DecodeError, Limits, open_video
from tests.support.videos import moving_noise, shared_video, write_video


def read(path: Path, limits: Limits = decode.DEFAULT_LIMITS) -> list:
  with open_video(path, limits) as video:
    return [frame for frame, _ in video]


def refusal(path: Path, limits: Limits = decode.DEFAULT_LIMITS) -> str:
  with pytest.raises(DecodeError) as e:
    read(path, limits)
  assert str(path) not in str(e.value)
  return str(e.value)


def group_is_gone(pid: int) -> bool:
  try:
    os.killpg(pid, 0)
  except ProcessLookupError:
    return True
  return False


@pytest.fixture
def mp4(tmp_path) -> Path:
  return write_video(tmp_path / "good.mp4", moving_noise(30))


@pytest.fixture(scope="module")
def long_mp4(tmp_path_factory) -> Path:
  """A video that does not fit into a pipe."""
  path = tmp_path_factory.mktemp("long") / "v.mp4"
  return write_video(path, moving_noise(30, 320, 240), preset="ultrafast")


# --- Good videos --------------------------------------------------------------


def test_frames_are_rgb_in_order_with_their_times(tmp_path):
  colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
  frames = [np.full((48, 64, 3), c, np.uint8) for c in colours]
  path = write_video(tmp_path / "v.mp4", frames, crf="0", rate=25)
  with open_video(path) as video:
    assert (video.info.width, video.info.height) == (64, 48)
    decoded = list(video)
    assert video.fps == 25
    assert video.num_frames == 4
  for i, (frame, secs) in enumerate(decoded):
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    np.testing.assert_allclose(frame, frames[i], atol=4)
    assert secs == pytest.approx(i / 25)


@pytest.mark.parametrize(
  ("name", "codec", "pix_fmt"),
  [
    ("v.mp4", "libx264", "yuv420p"),
    ("v.mov", "mpeg4", "yuv420p"),
    ("v.mkv", "libx264", "yuv420p"),
    ("v.webm", "libvpx", "yuv420p"),
    ("v.avi", "mjpeg", "yuvj420p"),
    ("v.ts", "libx264", "yuv420p"),
  ],
)
def test_every_frame_of_a_container_is_read(tmp_path, name, codec, pix_fmt):
  path = write_video(tmp_path / name, moving_noise(20), codec, pix_fmt)
  with open_video(path) as video:
    secs = [secs for _, secs in video]
  assert len(secs) == 20
  assert video.fps == pytest.approx(30)
  np.testing.assert_allclose(secs, np.arange(20) / 30, atol=2e-3)


def test_stream_without_a_frame_count_is_read(tmp_path):
  path = write_video(tmp_path / "v.mkv", moving_noise(20))
  with av.open(str(path)) as container:
    assert container.streams.video[0].frames == 0
  assert len(read(path)) == 20


def test_video_is_found_behind_a_sound_stream(tmp_path):
  path = write_video(tmp_path / "v.mkv", moving_noise(20), audio_first=True)
  with av.open(str(path)) as container:
    assert container.streams[0].type == "audio"
  assert len(read(path)) == 20


def test_variable_rate_keeps_times_and_averages(tmp_path):
  secs = [0.0, 0.05, 0.1, 0.6, 1.1, 2.0]
  path = write_video(tmp_path / "v.mkv", moving_noise(6), secs=secs)
  with open_video(path) as video:
    np.testing.assert_allclose([s for _, s in video], secs, atol=2e-3)
    assert video.fps == pytest.approx(5 / 2, rel=0.01)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_flag_is_applied(tmp_path, degrees):
  upright = np.zeros((48, 64, 3), np.uint8)
  upright[:24, :32] = 255
  path = write_video(
    tmp_path / "v.mp4", [upright] * 3, rotation=degrees, crf="0"
  )
  expected = np.rot90(upright, degrees // 90)
  with open_video(path) as video:
    assert (video.info.height, video.info.width) == expected.shape[:2]
    for frame, _ in video:
      np.testing.assert_allclose(frame, expected, atol=4)


def test_odd_sizes_keep_every_pixel_in_place(tmp_path):
  frame = np.zeros((77, 101, 3), np.uint8)
  frame[:, 50:] = 255
  (decoded,) = read(write_video(tmp_path / "v.mp4", [frame], crf="0"))
  np.testing.assert_allclose(decoded, frame, atol=4)


def test_name_is_never_taken_for_a_pattern_or_address(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("concat:a|b %03d.mp4", "-i.mp4", "http:x.mp4"):
    write_video(tmp_path / "v.mp4", moving_noise(2)).rename(name)
    assert len(read(Path(name))) == 2


def test_shared_footage_is_read_whole():
  for name, num in (("cropped01.mp4", 143), ("cropped04.mp4", 15)):
    assert len(read(shared_video(name))) == num


# --- Damage -------------------------------------------------------------------


def test_empty_file_and_text_cannot_be_opened(tmp_path):
  for content in (b"", b"hello\n" * 100):
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    assert "cannot open" in refusal(path)


def test_missing_file_folder_and_pipe_cannot_be_opened(tmp_path):
  os.mkfifo(tmp_path / "pipe.mp4")
  for name in ("none.mp4", "pipe.mp4", ""):
    assert "cannot open" in refusal(tmp_path / name)


def test_mp4_cut_before_its_index_cannot_be_opened(mp4):
  data = mp4.read_bytes()
  assert data.rindex(b"moov") > len(data) // 2
  mp4.write_bytes(data[: len(data) // 2])
  assert "cannot open" in refusal(mp4)


def test_half_an_avi_is_damage(tmp_path):
  path = write_video(tmp_path / "v.avi", moving_noise(60), "mjpeg", "yuvj420p")
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  assert "decoder reported damage" in refusal(path)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("audio_first", [False, True])
def test_a_matroska_that_is_cut_gives_what_was_decoded_and_tells(
  tmp_path, audio_first, is_cut
):
  num_frames = 27
  path = write_video(
    tmp_path / "v.mkv",
    moving_noise(num_frames),
    "mjpeg",
    "yuvj420p",
    audio_first=audio_first,
  )
  data = path.read_bytes()
  if is_cut:
    path.write_bytes(data[: 2 * len(data) // 3])
  with open_video(path) as video:
    found = len(list(video))
    if not is_cut:
      assert (found, video.notes) == (num_frames, [])
      return
    assert 0 < found < num_frames
    (note,) = video.notes
    assert note.startswith("frames are missing: they end at ")


@pytest.mark.parametrize("length", [0, 0x40000000, 0xFFFFFFFF])
def test_an_avi_that_was_written_to_a_pipe_has_no_length(tmp_path, length):
  path = write_video(tmp_path / "v.avi", moving_noise(30), "mpeg4", "yuv420p")
  data = bytearray(path.read_bytes())
  struct.pack_into("<I", data, data.find(b"avih") + 8 + 16, length)
  struct.pack_into("<I", data, data.find(b"strh") + 8 + 32, length)
  path.write_bytes(data)
  with open_video(path) as video:
    assert video.info.announced_frames == 0
    assert len(list(video)) == 30
    assert video.notes == []


def test_a_matroska_that_begins_late_is_whole(tmp_path):
  secs = 7 + np.arange(60) / 30
  path = write_video(
    tmp_path / "v.webm", moving_noise(60), "libvpx", "yuv420p", secs=secs
  )
  with open_video(path) as video:
    found = [at for _, at in video]
    assert video.notes == []
  np.testing.assert_allclose(found, secs - 7, atol=2e-3)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_overwritten_middle_is_damage(tmp_path, codec):
  path = write_video(
    tmp_path / "v.mp4", moving_noise(60, 320, 240), codec, "yuv420p"
  )
  data = bytearray(path.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 2048] = bytes(2048)
  path.write_bytes(data)
  assert "decoder reported damage" in refusal(path)


@pytest.mark.parametrize("has_cover", [False, True])
def test_sound_alone_is_refused_even_with_a_cover(tmp_path, has_cover):
  path = tmp_path / "v.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    if has_cover:
      cover = container.add_stream("mjpeg", rate=1)
      cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
      cover.disposition = av.stream.Disposition.attached_pic
      container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
      container.mux(cover.encode())
    samples = np.zeros((2, 8000), np.float32)
    silence = av.AudioFrame.from_ndarray(samples, "fltp")
    silence.sample_rate = 8000
    container.mux(stream.encode(silence))
    container.mux(stream.encode())
  assert refusal(path) == "no video stream"


def test_playlist_that_names_other_files_is_not_followed(mp4):
  for content in (
    f"ffconcat version 1.0\nfile {mp4.name}\n",
    f"#EXTM3U\n#EXTINF:1,\n{mp4}\n#EXT-X-ENDLIST\n",
  ):
    path = mp4.with_name("playlist.mp4")
    path.write_text(content)
    assert "cannot open" in refusal(path)


def test_changing_frame_size_is_refused(tmp_path):
  small = write_video(tmp_path / "a.h264", moving_noise(5, 64, 48))
  large = write_video(tmp_path / "b.h264", moving_noise(5, 96, 64))
  small.write_bytes(small.read_bytes() + large.read_bytes())
  assert "frame size changes from 64x48 to 96x64" in refusal(small)


# --- Bombs --------------------------------------------------------------------


def test_huge_frames_are_refused_before_decoding(tmp_path):
  black = np.zeros((4096, 4096, 3), np.uint8)
  path = write_video(
    tmp_path / "v.mp4", [black] * 2, pix_fmt="yuv420p", preset="ultrafast"
  )
  assert path.stat().st_size < 100_000
  # The second limit ensures that the parent refuses, not the decoder.
  for limits in (Limits(), Limits(memory_bytes=200 << 20)):
    with pytest.raises(DecodeError, match="4096x4096 are over the limit"):
      open_video(path, limits)


def test_announced_frames_over_a_limit_are_refused_before_decoding(mp4):
  for limits in (Limits(frames=29), Limits(video_pixels=64 * 48 * 29)):
    with pytest.raises(DecodeError, match="limit of 29: .* announces 30"):
      open_video(mp4, limits)
  assert len(read(mp4, Limits(frames=30, video_pixels=64 * 48 * 30))) == 30


def test_frames_are_counted_where_nothing_is_announced(tmp_path):
  path = write_video(tmp_path / "v.h264", moving_noise(30))
  with open_video(path, Limits(frames=10)) as video:
    assert video.info.announced_frames == 0
    with pytest.raises(DecodeError, match="limit of 10"):
      list(video)
    assert video.num_frames == 10


def test_decoder_that_needs_too_much_memory_is_refused(tmp_path):
  black = np.zeros((6000, 6000, 3), np.uint8)
  path = write_video(tmp_path / "v.avi", [black], "mjpeg", "yuvj444p")
  limits = Limits(frame_pixels=1 << 30, memory_bytes=256 << 20)
  assert refusal(path, limits) == "decoder ran out of memory, 256 MiB"
  assert len(read(path, Limits(frame_pixels=1 << 30))) == 1


def test_decoder_that_does_not_load_is_not_blamed_on_the_video(mp4):
  with pytest.raises(decode.DecoderSetupError, match="PyAV does not load"):
    open_video(mp4, Limits(memory_bytes=64 << 20))


# --- The child process --------------------------------------------------------


def test_decoder_that_hangs_is_killed_at_the_deadline(long_mp4):
  with open_video(long_mp4, Limits(secs=3)) as video:
    os.killpg(video.pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match="passed its deadline of 3 s"):
      list(video)
  assert group_is_gone(video.pid)


def test_decoder_that_computes_until_the_deadline_is_no_fault_of_the_host(
  mp4, monkeypatch
):
  monkeypatch.setattr(child, "PROGRAM", ("-c", "while True: pass"))
  limits = Limits(secs=1.5)
  with pytest.raises(decode.HostError, match="passed its deadline"):
    open_video(mp4, Limits(secs=0.0))
  # On a busy machine it may get little of its time.
  monkeypatch.setattr(child, "_START_SECS", 0.0)
  monkeypatch.setattr(child, "_BUSY_SHARE", 0.001)
  with pytest.raises(DecodeError, match=r"takes more than 1\.5 s") as refusal:
    open_video(mp4, limits)
  assert not isinstance(refusal.value, decode.HostError)


def test_time_that_the_reader_takes_does_not_count(mp4):
  with open_video(mp4, Limits(secs=2)) as video:
    frames = iter(video)
    next(frames)
    time.sleep(2.2)
    assert sum(1 for _ in frames) == 29


@pytest.mark.parametrize(
  ("number", "reason"),
  [
    (signal.SIGSEGV, "decoder died of SIGSEGV"),
    (signal.SIGXCPU, "decoder used up its CPU time"),
    (signal.SIGKILL, r"decoder was killed by SIGKILL \(out of memory\?\)"),
  ],
)
def test_decoder_that_dies_is_a_reason(long_mp4, number, reason):
  with open_video(long_mp4) as video:
    os.killpg(video.pid, number)
    with pytest.raises(DecodeError, match=reason):
      list(video)


def test_leaving_early_ends_the_decoder(long_mp4):
  with open_video(long_mp4) as video:
    next(iter(video))
  assert group_is_gone(video.pid)


def test_decoder_ends_with_a_reader_that_was_killed(long_mp4):
  code = (
    "import sys, time\n"
    "from data_prep.video.decode import open_video\n"
    "video = open_video(sys.argv[1])\n"
    "print(video.pid, flush=True)\n"
    "time.sleep(60)\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, long_mp4],
    stdout=subprocess.PIPE,
    text=True,
    cwd=Path(__file__).parents[3],
  ) as reader:
    pid = int(reader.stdout.readline())
    assert not group_is_gone(pid)
    reader.kill()
  for _ in range(100):
    if group_is_gone(pid):
      break
    time.sleep(0.05)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGKILL)
    pytest.fail("the decoder lives on")


def test_limits_reach_the_decoder_process(long_mp4):
  # Ten minutes of 1920x1080 at 60 per second.
  pixels = 1920 * 1080 * 60 * 600
  limits = Limits(memory_bytes=777 << 20, secs=11, video_pixels=pixels)
  with open_video(long_mp4, limits) as video:
    rows = Path(f"/proc/{video.pid}/limits").read_text().splitlines()
    session = os.getsid(video.pid)
  limits_set = {row[:26].strip(): row[26:].split()[0] for row in rows}
  assert limits_set["Max address space"] == str(777 << 20)
  assert limits_set["Max cpu time"] == str(-(-pixels // 20_000_000) + 32)
  assert limits_set["Max file size"] == "0"
  assert session == video.pid
  assert dataclasses.asdict(limits)["secs"] == 11
