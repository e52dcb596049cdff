"""Decodes videos: the only file that touches a video container.

A video is hostile until proven otherwise, and the libraries that read it are
large C programs. So they run in a child process of their own session, with
limits on memory, processor time and file writing, that can be killed at any
moment; the parent only ever sees raw pixels coming through a pipe:

  with open_video(path, Limits()) as video:
    for frame, secs in video:      # uint8 (H, W, 3) RGB, float seconds
      ...
  video.fps                        # average rate of what was decoded

The child is this file run as a program. Messages on its pipe are a kind (one
byte) and a length, then so many bytes:
  I  JSON: width, height (as stored), rotation, rate, ... once, first
  F  time in seconds, bytes per row, rows of RGB          once per frame
  E  nothing: the video has ended                         last
  X  why the video is refused, S  why no video could be   last
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import resource
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
  import numpy as np

# Demuxers of self-contained video files. Playlists (hls, concat, image2, ...)
# are left out: they make the reader open further files.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,m4v,mjpeg,h264,hevc"

_MESSAGE = struct.Struct("<cI")
_FRAME = struct.Struct("<dI")
# Rows of a decoded picture are padded to the width of a vector register.
_MAX_ROW_PADDING = 256
# Decoding is cheaper than finding faces: two threads keep a worker busy, and a
# fixed number makes memory use the same on every machine.
_NUM_THREADS = 2
_PR_SET_PDEATHSIG = 1


class DecodeError(Exception):
  """The video is refused; the message is the reason for the quarantine."""


class DecoderSetupError(RuntimeError):
  """The decoder does not run on this machine, whatever the video."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one video may cost.

  Attributes:
    frame_pixels: width x height of one frame; the default admits 4096x2304.
    frames: frames per video; the default is an hour at 30 a second. Face
      meshes of a whole video are held in memory, 4 kB a frame.
    video_pixels: pixels of all frames together; the default is an hour of
      1920x1080 at 30 a second, which a few MB of black may hold.
    secs: time in seconds that may be spent waiting for the decoder in one
      pass; the time the caller takes for a frame does not count.
    memory_bytes: address space of the decoder process.
  """

  frame_pixels: int = 4096 * 2304
  frames: int = 108_000
  video_pixels: int = 1920 * 1080 * 108_000
  secs: float = 300.0
  memory_bytes: int = 2 << 30


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What is known before the first frame is read.

  Attributes:
    width: pixels, after rotation.
    height: pixels, after rotation.
    rate: frames per second as the container says, 0.0 where it does not.
    announced_frames: how many frames the container claims to hold, 0 where it
      does not say; often wrong, fit for a progress bar only.
  """

  width: int
  height: int
  rate: float
  announced_frames: int


DEFAULT_LIMITS = Limits()


def open_video(
  path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS
) -> Video:
  """Starts the decoder and reads the video's header.

  Args:
    path: a file; never taken for an address or a pattern.
    limits: what the video may cost.

  Returns:
    The video, a context manager: leaving it ends the decoder.

  Raises:
    DecodeError: the file is no video that can be opened, or is over a limit.
    DecoderSetupError: PyAV does not load.
  """
  try:
    regular = stat.S_ISREG(os.stat(path).st_mode)
  except OSError as e:
    raise DecodeError(f"cannot open: {e.strerror}") from e
  if not regular:
    raise DecodeError("cannot open: not a regular file")
  return Video(path, limits)


class Video:
  """An open video; made by `open_video`, iterated once.

  Attributes:
    info: the header.
    pid: process and process group of the decoder.
    num_frames: frames decoded so far.
  """

  def __init__(self, path: str | os.PathLike, limits: Limits) -> None:
    self._limits = limits
    self._secs_left = limits.secs
    self._secs: list[float] = []
    # -P keeps this file's folder off the child's import path.
    self._process = subprocess.Popen(
      [
        *(sys.executable, "-P", __file__),
        str(os.getpid()),
        json.dumps(dataclasses.asdict(limits)),
        os.path.abspath(path),
      ],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      # Arenas of threads reserve address space, which is limited.
      env={**os.environ, "MALLOC_ARENA_MAX": "2"},
      start_new_session=True,
    )
    self.pid = self._process.pid
    self._pipe = self._process.stdout.fileno()
    self._poll = select.poll()
    self._poll.register(self._pipe, select.POLLIN)
    try:
      kind, length = self._read_header()
      if kind != b"I":
        raise DecodeError("decoder sent no header")
      header = json.loads(self._read(length))
      self._stored_size = header["width"], header["height"]
      self._quarter_turns = round(header["rotation"] / 90) % 4
    except BaseException:
      self.close()
      raise
    width, height = self._stored_size
    if self._quarter_turns % 2:
      width, height = height, width
    self.info = VideoInfo(
      width, height, header["rate"], header["announced_frames"]
    )

  @property
  def num_frames(self) -> int:
    return len(self._secs)

  @property
  def fps(self) -> float:
    """Average frames per second of what was decoded so far.

    The container's rate, unless the frames' times differ from it by more than
    5% (a variable rate, a wrong or missing header); 0.0 where neither says.
    """
    rate = self.info.rate
    duration = max(self._secs, default=0.0) - min(self._secs, default=0.0)
    if duration <= 0:
      return rate
    measured = (len(self._secs) - 1) / duration
    return rate if abs(measured - rate) <= 0.05 * rate else measured

  def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 (H, W, 3) RGB frames and their times in seconds.

    Times count from the start of the file, so that they fit its sound; where
    the file has none they follow from the rate.

    Raises:
      DecodeError: the decoder reported damage, died, or passed a limit.
    """
    while True:
      kind, length = self._read_header()
      if kind == b"E":
        return
      yield self._read_frame(kind, length)

  def _read_frame(self, kind: bytes, length: int) -> tuple[np.ndarray, float]:
    import numpy as np

    # The child is not trusted: it may have been taken over by the video.
    width, height = self._stored_size
    if kind != b"F" or length < _FRAME.size:
      raise DecodeError("decoder sent no frame where one was expected")
    secs, row_bytes = _FRAME.unpack(self._read(_FRAME.size))
    padding = row_bytes - 3 * width
    if (
      length != _FRAME.size + row_bytes * height
      or not 0 <= padding <= _MAX_ROW_PADDING
    ):
      raise DecodeError(f"decoder sent a frame that is not {width}x{height}")
    if self.num_frames == _most_frames(width, height, self._limits):
      raise DecodeError(_too_many_frames(width, height, self._limits))
    rows = np.empty((height, row_bytes), np.uint8)
    self._read_into(memoryview(rows).cast("B"))
    frame = rows[:, : 3 * width].reshape(height, width, 3)
    if math.isnan(secs):
      secs = self.num_frames / (self.info.rate or 25.0)
    self._secs.append(secs)
    return np.ascontiguousarray(np.rot90(frame, self._quarter_turns)), secs

  def _read_header(self) -> tuple[bytes, int]:
    kind, length = _MESSAGE.unpack(self._read(_MESSAGE.size))
    if kind in (b"X", b"S"):
      reason = self._read(min(length, 1000)).decode(errors="replace")
      raise (DecodeError if kind == b"X" else DecoderSetupError)(reason)
    # The largest message besides a frame, whose own length is checked, is I.
    if kind == b"I" and length > 1000:
      raise DecodeError("decoder sent no header")
    return kind, length

  def _read(self, length: int) -> bytes:
    data = bytearray(length)
    self._read_into(memoryview(data))
    return bytes(data)

  def _read_into(self, view: memoryview) -> None:
    while len(view):
      before = time.monotonic()
      ready = self._poll.poll(max(self._secs_left, 0.0) * 1000)
      self._secs_left -= time.monotonic() - before
      if not ready:
        raise DecodeError(
          f"decoder passed its deadline of {self._limits.secs:g} s"
        )
      num_read = os.readv(self._pipe, [view])
      if num_read == 0:
        raise DecodeError(self._death())
      view = view[num_read:]

  def _death(self) -> str:
    """Says how a decoder ended that closed its pipe without a last word."""
    try:
      code = self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      return "decoder closed its pipe"
    if code >= 0:
      return f"decoder ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGXCPU:
      return "decoder used up its processor time"
    if -code == signal.SIGKILL:
      return f"decoder was killed by {name} (out of memory?)"
    return f"decoder died of {name}"

  def close(self) -> None:
    """Ends the decoder and everything it may have started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    self._process.wait()
    self._process.stdout.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _most_frames(width: int, height: int, limits: Limits) -> int:
  return min(limits.frames, limits.video_pixels // (width * height))


def _too_many_frames(width: int, height: int, limits: Limits) -> str:
  most = _most_frames(width, height, limits)
  return f"more frames of {width}x{height} than the limit of {most}"


# --- The child process --------------------------------------------------------


class _Refused(Exception):
  """The message is the reason."""


def _decode(path: str, limits: Limits, pipe: int) -> None:
  """Writes the whole video to the pipe.

  Raises:
    _Refused: the video cannot be decoded to its end.
  """
  import av

  av.logging.set_level(None)
  options = {
    "err_detect": "explode",
    "protocol_whitelist": "file",
    "format_whitelist": FORMATS,
  }
  try:
    container = av.open(f"file:{path}", options=options)
  except av.FFmpegError as e:
    raise _Refused(f"cannot open: {e.strerror}") from e
  with container:
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
      raise _Refused("no video stream")
    stream = streams[0]
    _check_size(stream, limits)
    # By default libav conceals damage and passes the picture off as good.
    stream.codec_context.options = {"err_detect": "explode"}
    stream.codec_context.thread_count = _NUM_THREADS
    stream.thread_type = "AUTO"
    num_frames = 0
    try:
      for frame in _frames(container, stream):
        if num_frames == 0:
          size = frame.width, frame.height
          _check_pixels(*size, limits)
          _send_info(pipe, frame, stream)
        elif (frame.width, frame.height) != size:
          raise _Refused(
            f"frame size changes from {size[0]}x{size[1]} to "
            f"{frame.width}x{frame.height}"
          )
        if num_frames == _most_frames(*size, limits):
          raise _Refused(_too_many_frames(*size, limits))
        _send_frame(pipe, frame, container.start_time)
        num_frames += 1
    except av.FFmpegError as e:
      if isinstance(e, MemoryError):
        raise
      raise _Refused(
        f"decoder reported damage after {num_frames} frames: {e.strerror}"
      ) from e
  if num_frames == 0:
    raise _Refused("no frame could be decoded")
  _send(pipe, b"E")


def _check_size(stream, limits: Limits) -> None:
  """Refuses what is too large, before anything is decoded."""
  _check_pixels(stream.width, stream.height, limits)
  num_frames = _announced_frames(stream)
  if num_frames > _most_frames(stream.width, stream.height, limits):
    raise _Refused(
      f"{_too_many_frames(stream.width, stream.height, limits)}: the container "
      f"announces {num_frames}"
    )


def _announced_frames(stream) -> int:
  if stream.frames or not stream.average_rate:
    return stream.frames
  # Matroska knows the duration of the file only, in microseconds.
  duration = (stream.container.duration or 0) / 1_000_000
  if stream.duration:
    duration = stream.duration * stream.time_base
  return int(duration * stream.average_rate)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
  if not width * height:
    raise _Refused("cannot open: the size of its frames is unknown")
  if width * height > limits.frame_pixels:
    raise _Refused(
      f"frames of {width}x{height} are over the limit of "
      f"{limits.frame_pixels} pixels"
    )


def _frames(container, stream) -> Iterator:
  for packet in container.demux(stream):
    # The container ends, or has a gap, within this packet.
    if packet.is_corrupt:
      raise _Refused("decoder reported damage: a packet is cut off")
    for frame in packet.decode():
      if frame.is_corrupt:
        raise _Refused("decoder reported damage: a frame is incomplete")
      yield frame


def _send_info(pipe: int, frame, stream) -> None:
  rate = stream.average_rate or stream.guessed_rate or 0
  info = {
    "width": frame.width,
    "height": frame.height,
    "rotation": frame.rotation,
    "rate": float(rate),
    "announced_frames": _announced_frames(stream),
  }
  _send(pipe, b"I", json.dumps(info).encode())


def _send_frame(pipe: int, frame, start_time: int | None) -> None:
  secs = math.nan
  if frame.time is not None:
    secs = frame.time - (start_time or 0) / 1e6
  rgb = frame.reformat(format="rgb24").planes[0]
  rows = memoryview(rgb)[: rgb.line_size * frame.height]
  _send(pipe, b"F", _FRAME.pack(secs, rgb.line_size), rows)


def _send(pipe: int, kind: bytes, *parts) -> None:
  length = sum(len(part) for part in parts)
  for part in (_MESSAGE.pack(kind, length), *parts):
    view = memoryview(part)
    while len(view):
      view = view[os.write(pipe, view) :]


def _confine(limits: Limits, parent_pid: int) -> None:
  """Gives up what a decoder does not need."""
  if sys.platform == "linux":
    # Dies with its parent, even where that one was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
      sys.exit(1)
  cpu_secs = math.ceil(limits.secs) * _NUM_THREADS + 10
  for kind, soft, hard in (
    (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
    # Soft below hard: SIGXCPU, which names the cause, comes before SIGKILL.
    (resource.RLIMIT_CPU, cpu_secs, cpu_secs + 5),
    (resource.RLIMIT_FSIZE, 0, 0),
    (resource.RLIMIT_CORE, 0, 0),
  ):
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
      soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def main() -> None:
  """Decodes one video for `open_video`."""
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.decode",
    description="Decodes one video into a pipe. Started by open_video; not a "
    "program for the command line.",
  )
  parser.add_argument("parent_pid", type=int, help="process that reads")
  parser.add_argument("limits", help="the fields of Limits as JSON")
  parser.add_argument("path", help="the video", type=Path)
  args = parser.parse_args()
  limits = Limits(**json.loads(args.limits))
  # What a library prints must not get between the frames.
  pipe = os.dup(sys.stdout.fileno())
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  try:
    _confine(limits, args.parent_pid)
    _decode(str(args.path), limits, pipe)
  except _Refused as e:
    _send(pipe, b"X", str(e).encode())
  except BrokenPipeError:
    sys.exit(1)  # the reader has seen enough
  except MemoryError:
    reason = f"decoder ran out of memory, {limits.memory_bytes >> 20} MiB"
    _send(pipe, b"X", reason.encode())
  except ImportError as e:
    reason = f"PyAV does not load ({e}): pip install av, or allow more memory"
    _send(pipe, b"S", reason.encode())


if __name__ == "__main__":
  main()
