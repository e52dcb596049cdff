"""Decodes videos in a child process that can be killed at any moment.

The child, `decoder_process.py`, is the only module that opens a container. The
parent reads only raw pixels and samples from a pipe:

  with open_video(path, Limits()) as video:
    for frame, secs in video:      # uint8 (H, W, 3) RGB, float seconds
      ...
  video.fps                        # average rate of what was decoded
  read_sound(path, Limits())       # int16 (S,), 16 kHz, mono
  with open_sound(path) as sound:  # its own rate and channels
    for samples in sound:          # int16 (S, C)
      ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from data_prep.video import decoder_process
from data_prep.video.decoder_process import (
  DEFAULT_LIMITS,
  FRAME,
  MAX_SOUND_SECS,
  MESSAGE,
  SAMPLE_RATE,
  Limits,
  most_frames,
  too_many_frames,
)
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  import numpy as np


# Rows of a decoded picture are padded to the width of a vector register.
MAX_ROW_PADDING = 256


class DecodeError(UserError):
  """A video is refused; the message is the reason for the quarantine."""


class DecoderSetupError(UserError):
  """The decoder does not run on this machine, for any video."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """Header of a video.

  Attributes:
    width: pixels, after rotation.
    height: pixels, after rotation.
    rate: frames per second by the container, 0.0 where it does not say.
    announced_frames: number of frames by the container, 0 where it does not
      say; often wrong, fit for a progress bar only.
  """

  width: int
  height: int
  rate: float
  announced_frames: int


def open_video(
  path: str | os.PathLike,
  limits: Limits = DEFAULT_LIMITS,
  frame_rate: float = 0.0,
) -> Video:
  """Starts the decoder and reads the video's header.

  Args:
    path: a file; never read as an address or a pattern. With a frame rate, a
      folder whose pictures are the frames, ordered by the numbers in their
      names.
    limits: what the video may cost.
    frame_rate: frames per second of a folder of pictures; 0 for a video.

  Returns:
    The video, a context manager: leaving it ends the decoder.

  Raises:
    DecodeError: the file is no video that can be opened, or is over a limit.
    DecoderSetupError: PyAV does not load.
  """
  try:
    mode = os.stat(path).st_mode
  except OSError as e:
    raise DecodeError(f"cannot open: {e.strerror}") from e
  if frame_rate and not stat.S_ISDIR(mode):
    raise DecodeError("cannot open: not a folder of pictures")
  if not frame_rate and not stat.S_ISREG(mode):
    raise DecodeError("cannot open: not a regular file")
  return Video(path, limits, frame_rate)


def read_sound(
  path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
  """Decodes the first sound track of a video.

  Args:
    path: a video file.
    limits: what the video may cost.

  Returns:
    int16 (S,), 16 kHz, all channels mixed into one. Sample 0 is at time 0 of
    the frames; where the track begins later or has gaps, samples are 0. Empty
    where there is no sound track.

  Raises:
    DecodeError: the file is no video that can be opened, its sound is damaged
      or longer than MAX_SOUND_SECS, or over a limit.
    DecoderSetupError: PyAV does not load.
  """
  import numpy as np

  most_bytes = 2 * SAMPLE_RATE * MAX_SOUND_SECS
  samples = bytearray()
  with _Decoder(path, limits, "sound") as child:
    while True:
      kind, length = child.read_header()
      if kind == b"E":
        break
      if kind != b"S" or length % 2 or len(samples) + length > most_bytes:
        raise DecodeError("decoder sent no sound where some was expected")
      samples += child.read(length)
  return np.frombuffer(samples, "<i2").astype(np.int16, copy=False)


def open_sound(
  path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS
) -> Sound:
  """Starts to decode the first sound track of an audio or video file.

  Args:
    path: the file.
    limits: what it may cost.

  Returns:
    The sound, a context manager: leaving it ends the decoder.

  Raises:
    DecodeError: the file cannot be opened, or has no sound.
    DecoderSetupError: PyAV does not load.
  """
  return Sound(path, limits)


class _Decoder:
  """The child process and its pipe.

  Args:
    path: the file.
    limits: what it may cost.
    output: what the child sends, as the argument of `decoder_process.main`.
  """

  def __init__(
    self, path: str | os.PathLike, limits: Limits, output: str
  ) -> None:
    self._limits = limits
    self._secs_left = limits.secs
    # -P keeps the folder of this file off the import path of the child.
    self._process = subprocess.Popen(
      [
        *(sys.executable, "-P", decoder_process.__file__),
        str(os.getpid()),
        json.dumps(dataclasses.asdict(limits)),
        output,
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
    # A frame of 1280x720 is 2.8 MB; by default a pipe holds 64 kB. Only Linux
    # can enlarge it, and not beyond the quota of the user.
    with contextlib.suppress(OSError, AttributeError):
      fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
    self._poll = select.poll()
    self._poll.register(self._pipe, select.POLLIN)

  def read_header(self) -> tuple[bytes, int]:
    """Returns kind and length of the next message.

    Raises:
      DecodeError: for a message X.
      DecoderSetupError: for a message N.
    """
    kind, length = MESSAGE.unpack(self.read(MESSAGE.size))
    if kind in (b"X", b"N"):
      reason = self.read(min(length, 1000)).decode(errors="replace")
      raise (DecodeError if kind == b"X" else DecoderSetupError)(reason)
    # The length of a frame is checked where it is read.
    if kind == b"I" and length > 1000:
      raise DecodeError("decoder sent no header")
    return kind, length

  def read(self, length: int) -> bytes:
    """Reads so many bytes of the pipe."""
    data = bytearray(length)
    self.read_into(memoryview(data))
    return bytes(data)

  def read_into(self, view: memoryview) -> None:
    """Fills a buffer from the pipe.

    Raises:
      DecodeError: the decoder ended, or passed its deadline.
    """
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
    """Returns how the decoder ended that closed its pipe without a message."""
    try:
      code = self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      return "decoder closed its pipe"
    if code >= 0:
      return f"decoder ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGXCPU:
      return "decoder used up its CPU time"
    if -code == signal.SIGKILL:
      return f"decoder was killed by {name} (out of memory?)"
    return f"decoder died of {name}"

  def close(self) -> None:
    """Kills the decoder and all processes it may have started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    self._process.wait()
    self._process.stdout.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


class Sound(_Decoder):
  """An open sound track; made by `open_sound`, iterated once.

  Attributes:
    rate: samples per second, as in the file.
    num_channels: C, 1 or 2; more channels are mixed into two.
  """

  def __init__(self, path: str | os.PathLike, limits: Limits) -> None:
    super().__init__(path, limits, "original_sound")
    try:
      kind, length = self.read_header()
      if kind == b"E":
        raise DecodeError("no sound track")
      if kind != b"T" or length > 1000:
        raise DecodeError("decoder sent no header")
      header = json.loads(self.read(length))
      self.rate = header["rate"]
      self.num_channels = header["num_channels"]
    except BaseException:
      self.close()
      raise

  def __iter__(self) -> Iterator[np.ndarray]:
    """Yields int16 (S, C), consecutive parts of the samples.

    Sample 0 of the first part is at the time of that of `read_sound`.

    Raises:
      DecodeError: as for `read_sound`.
    """
    import numpy as np

    num_left = self.rate * MAX_SOUND_SECS
    row_bytes = 2 * self.num_channels
    while True:
      kind, length = self.read_header()
      if kind == b"E":
        return
      num_left -= length // row_bytes
      if kind != b"S" or length % row_bytes or num_left < 0:
        raise DecodeError("decoder sent no sound where some was expected")
      samples = np.frombuffer(self.read(length), "<i2")
      yield samples.reshape(-1, self.num_channels)


class Video(_Decoder):
  """An open video; made by `open_video`, iterated once.

  Attributes:
    info: the header.
    pid: process and process group of the decoder.
    num_frames: frames decoded so far.
  """

  def __init__(
    self, path: str | os.PathLike, limits: Limits, frame_rate: float
  ) -> None:
    super().__init__(path, limits, str(frame_rate) if frame_rate else "video")
    self._secs: list[float] = []
    try:
      kind, length = self.read_header()
      if kind != b"I":
        raise DecodeError("decoder sent no header")
      header = json.loads(self.read(length))
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
    """Number of frames decoded so far."""
    return len(self._secs)

  @property
  def share(self) -> float:
    """Share of the frames decoded so far; 0 where their number is unknown.

    At most 1, also where the container announces too few.
    """
    announced = self.info.announced_frames
    return (
      self.num_frames / max(self.num_frames, announced) if announced else 0.0
    )

  @property
  def fps(self) -> float:
    """Average rate of the frames decoded so far, in frames per second.

    The rate of the container, unless the times of the frames differ from it by
    more than 5% (a variable rate, a wrong or missing header); 0.0 where neither
    is known.
    """
    rate = self.info.rate
    duration = max(self._secs, default=0.0) - min(self._secs, default=0.0)
    if duration <= 0:
      return rate
    measured = (len(self._secs) - 1) / duration
    return rate if abs(measured - rate) <= 0.05 * rate else measured

  def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 (H, W, 3) RGB frames and their times in seconds.

    Times count from the start of the file, as those of its sound; where the
    file has no times they follow from the rate.

    Raises:
      DecodeError: the decoder reported damage, died, or exceeded a limit.
    """
    while True:
      kind, length = self.read_header()
      if kind == b"E":
        return
      yield self._read_frame(kind, length)

  def _read_frame(self, kind: bytes, length: int) -> tuple[np.ndarray, float]:
    import numpy as np

    # The child is not trusted: a crafted video may control it.
    width, height = self._stored_size
    if kind != b"F" or length < FRAME.size:
      raise DecodeError("decoder sent no frame where one was expected")
    secs, row_bytes = FRAME.unpack(self.read(FRAME.size))
    padding = row_bytes - 3 * width
    if (
      length != FRAME.size + row_bytes * height
      or not 0 <= padding <= MAX_ROW_PADDING
    ):
      raise DecodeError(f"decoder sent a frame that is not {width}x{height}")
    if self.num_frames == most_frames(width, height, self._limits):
      raise DecodeError(too_many_frames(width, height, self._limits))
    rows = np.empty((height, row_bytes), np.uint8)
    self.read_into(memoryview(rows).cast("B"))
    frame = rows[:, : 3 * width].reshape(height, width, 3)
    if math.isnan(secs):
      secs = self.num_frames / (self.info.rate or 25.0)
    self._secs.append(secs)
    return np.ascontiguousarray(np.rot90(frame, self._quarter_turns)), secs
