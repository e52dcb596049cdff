"""Decodes videos in a child process that can be killed at any moment.

The child, `decoder_process.py`, is the only module that opens a container. It
gets the open file and no rights, see `sandbox`. The parent reads only raw
pixels and samples from a pipe:

  with open_video(path, Limits()) as video:
    for frame, secs in video:      # uint8 (H, W, 3) RGB, float seconds
      ...
  video.fps                        # average rate of what was decoded
  read_sound(path, Limits())       # int16 (S,), 16 kHz, mono
  with open_sound(path) as sound:  # its own rate and channels
    for samples in sound:          # int16 (S, C)
      ...
  sandbox_layers()                 # which layers of the sandbox hold here
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from data_prep.video.protocol import (
  DEFAULT_LIMITS,
  FRAME,
  MAX_SOUND_SECS,
  MESSAGE,
  SAMPLE_RATE,
  Limits,
  most_frames,
  too_large,
  too_many_frames,
)
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  import numpy as np


# Rows of a decoded picture are padded to the width of a vector register.
MAX_ROW_PADDING = 256
# Bytes of a message that is not pixels or samples, and notes of one video.
MAX_TEXT_BYTES = 1000
MAX_NOTES = 20
MAX_SOUND_RATE = 768_000
# Seconds in which a decoder ends that is told to.
END_SECS = 5.0

# The child's program. -P keeps the current folder off its import path.
PROGRAM = ("-P", "-m", "data_prep.video.decoder_process")
# Variables that Python needs to find itself and PyAV. All others, such as keys
# of a cloud, are kept from the child.
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
_ROOT = str(Path(__file__).parents[2])


class DecodeError(UserError):
  """A video is refused; the message is the reason for the quarantine."""


class DecoderSetupError(UserError):
  """The decoder does not run on this machine, for any video."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """Header of a video.

  Attributes:
    width: square pixels, as shown.
    height: square pixels, as shown.
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
  require_sandbox: bool = False,
) -> Video:
  """Starts the decoder and reads the video's header.

  Args:
    path: a file; never read as an address or a pattern. With a frame rate, a
      folder whose pictures are the frames, ordered by the numbers in their
      names.
    limits: what the video may cost.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
    require_sandbox: refuse to decode where a layer of the sandbox is missing.

  Returns:
    The video, a context manager: leaving it ends the decoder.

  Raises:
    DecodeError: the file is no video that can be opened, or is over a limit.
    DecoderSetupError: PyAV does not load, or the sandbox is not whole.
  """
  return Video(path, limits, frame_rate, require_sandbox)


def read_sound(
  path: str | os.PathLike,
  limits: Limits = DEFAULT_LIMITS,
  require_sandbox: bool = False,
) -> np.ndarray:
  """Decodes the sound track of a video: the default one, or the first.

  Args:
    path: a video file.
    limits: what the video may cost.
    require_sandbox: as for `open_video`.

  Returns:
    int16 (S,), 16 kHz, all channels mixed into one. Sample 0 is at time 0 of
    the frames; where the track begins later or has gaps, samples are 0. Empty
    where there is no sound track.

  Raises:
    DecodeError: the file is no video that can be opened, its sound is damaged
      or longer than MAX_SOUND_SECS, or over a limit.
    DecoderSetupError: as for `open_video`.
  """
  import numpy as np

  most_bytes = 2 * SAMPLE_RATE * MAX_SOUND_SECS
  samples = bytearray()
  with _Decoder(path, limits, "sound", require_sandbox) as child:
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
  """Starts to decode the sound track of an audio or video file.

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


def sandbox_layers() -> dict[str, str]:
  """Starts a decoder without a file, and returns the layers of its sandbox.

  Returns:
    For each layer of the module `sandbox` an empty string where it holds on
    this machine, else the reason why it does not.

  Raises:
    DecoderSetupError: PyAV does not load.
  """
  with _Decoder(os.devnull, DEFAULT_LIMITS, "none") as child:
    return child.layers


def sandbox_summary(layers: dict[str, str]) -> str:
  """Returns a line that says which layers hold, and why others do not."""
  held = [name for name, reason in layers.items() if not reason]
  line = "decoder sandbox: " + (", ".join(held) or "none")
  missing = [f"{name} ({reason})" for name, reason in layers.items() if reason]
  return line + ("; missing: " + ", ".join(missing) if missing else "")


class _Decoder:
  """The child process and its pipe.

  Args:
    path: the file.
    limits: what it may cost.
    output: what the child sends, as the argument of `decoder_process.main`.
    require_sandbox: as for `open_video`.

  Attributes:
    pid: process and process group of the decoder.
    layers: see `sandbox_layers`.
    notes: what a user should know of the video, as told so far.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    limits: Limits,
    output: str,
    require_sandbox: bool = False,
  ) -> None:
    self._limits = limits
    self._secs_left = limits.secs
    self.layers: dict[str, str] = {}
    self.notes: list[str] = []
    file = _open_file(path, output)
    try:
      # The kernel ends the child with the thread that started it.
      self._process = (
        _starter(os.getpid()).submit(_start, file, limits, output).result()
      )
    finally:
      os.close(file)
    self.pid = self._process.pid
    self._pipe = self._process.stdout.fileno()
    # A frame of 1280x720 is 2.8 MB; by default a pipe holds 64 kB. Only Linux
    # can enlarge it, and not beyond the quota of the user.
    with contextlib.suppress(OSError, AttributeError):
      fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
    self._poll = select.poll()
    self._poll.register(self._pipe, select.POLLIN)
    try:
      self._read_layers(require_sandbox)
    except BaseException:
      self.close()
      raise

  def _read_layers(self, is_required: bool) -> None:
    kind, length = self.read_header()
    if kind != b"L":
      raise DecoderSetupError("decoder did not tell its sandbox")
    self.layers = self.read_json(length)
    if is_required and any(self.layers.values()):
      raise DecoderSetupError(
        f"the sandbox is not whole: {sandbox_summary(self.layers)}"
      )

  def read_header(self) -> tuple[bytes, int]:
    """Returns kind and length of the next message that is not a note.

    Raises:
      DecodeError: for a message X.
      DecoderSetupError: for a message N.
    """
    while True:
      kind, length = MESSAGE.unpack(self.read(MESSAGE.size))
      if kind in (b"X", b"N"):
        reason = self._read_text(min(length, MAX_TEXT_BYTES))
        raise (DecodeError if kind == b"X" else DecoderSetupError)(reason)
      # The lengths of frames and samples are checked where they are read.
      if kind not in (b"F", b"S") and length > MAX_TEXT_BYTES:
        raise DecodeError("decoder sent no header")
      if kind != b"W":
        return kind, length
      note = self._read_text(length)
      if len(self.notes) < MAX_NOTES:
        self.notes.append(note)

  def read_json(self, length: int) -> dict[str, Any]:
    """Reads a message of fields.

    Raises:
      DecodeError: it is none.
    """
    try:
      fields = json.loads(self.read(length))
    except (ValueError, RecursionError) as e:
      raise DecodeError("decoder sent no header") from e
    if not isinstance(fields, dict):
      raise DecodeError("decoder sent no header")
    return fields

  def _read_text(self, length: int) -> str:
    """Reads text of the child, which may hold what controls a terminal."""
    text = self.read(length).decode(errors="replace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

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
        raise self._death()
      view = view[num_read:]

  def _death(self) -> UserError:
    """Returns how the decoder ended that closed its pipe without a message."""
    try:
      code = self._process.wait(timeout=END_SECS)
    except subprocess.TimeoutExpired:
      return DecodeError("decoder closed its pipe")
    if code >= 0:
      # It reads the video after it has told its sandbox.
      kind = DecodeError if self.layers else DecoderSetupError
      return kind(f"decoder ended with exit code {code}")
    name = signal.Signals(-code).name
    if -code == signal.SIGXCPU:
      return DecodeError("decoder used up its CPU time")
    if -code == signal.SIGKILL:
      return DecodeError(f"decoder was killed by {name} (out of memory?)")
    return DecodeError(f"decoder died of {name}")

  def close(self) -> None:
    """Kills the decoder and all processes it may have started."""
    if self._process.poll() is None:
      # It kills and awaits its child, so that no zombie is left.
      for number in (signal.SIGTERM, signal.SIGCONT):
        self._process.send_signal(number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(timeout=END_SECS)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    self._process.wait()
    self._process.stdout.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _open_file(path: str | os.PathLike, output: str) -> int:
  """Opens the file, or the folder of pictures, that the child reads.

  Raises:
    DecodeError: it cannot be opened, or is neither.
  """
  is_folder = output not in ("video", "sound", "original_sound", "none")
  try:
    # A named pipe without a writer must not block.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as e:
    raise DecodeError(f"cannot open: {e.strerror}") from e
  mode = os.fstat(file).st_mode
  if is_folder != stat.S_ISDIR(mode):
    os.close(file)
    kind = "folder of pictures" if is_folder else "regular file"
    raise DecodeError(f"cannot open: not a {kind}")
  if not (is_folder or stat.S_ISREG(mode) or output == "none"):
    os.close(file)
    raise DecodeError("cannot open: not a regular file")
  return file


@functools.cache
def _starter(pid: int) -> concurrent.futures.ThreadPoolExecutor:
  """Returns the thread that starts decoders, which lives as long as this
  process; a forked process has one of its own.
  """
  del pid
  return concurrent.futures.ThreadPoolExecutor(1, "decoder starter")


def _start(file: int, limits: Limits, output: str) -> subprocess.Popen:
  """Starts the child, which inherits `file`, a file descriptor."""
  search = [_ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
  return subprocess.Popen(
    [
      *(sys.executable, *PROGRAM),
      str(os.getpid()),
      json.dumps(dataclasses.asdict(limits)),
      output,
      str(file),
    ],
    pass_fds=(file,),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env={
      "PATH": os.defpath,
      "LANG": "C.UTF-8",
      "PYTHONPATH": os.pathsep.join(filter(None, search)),
      # Arenas of threads reserve address space, which is limited.
      "MALLOC_ARENA_MAX": "2",
      **{n: os.environ[n] for n in _VARIABLES if n in os.environ},
    },
    start_new_session=True,
  )


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
      header = self.read_json(length) if kind == b"T" else {}
      self.rate = header.get("rate")
      self.num_channels = header.get("num_channels")
      if not (
        _is_whole(self.rate, 1, MAX_SOUND_RATE)
        and _is_whole(self.num_channels, 1, 2)
      ):
        raise DecodeError("decoder sent no header")
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
    num_frames: frames decoded so far.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    limits: Limits,
    frame_rate: float,
    require_sandbox: bool = False,
  ) -> None:
    output = str(frame_rate) if frame_rate else "video"
    super().__init__(path, limits, output, require_sandbox)
    self._secs: list[float] = []
    try:
      kind, length = self.read_header()
      self._take_header(self.read_json(length) if kind == b"I" else {})
    except BaseException:
      self.close()
      raise

  def _take_header(self, header: dict[str, Any]) -> None:
    """Sets size, orientation and rate.

    Raises:
      DecodeError: the header breaks the protocol, or a limit: the child is not
        trusted, since a crafted video may control it.
    """
    width, height = header.get("width"), header.get("height")
    rate, orientation = header.get("rate"), header.get("orientation")
    num_frames = header.get("announced_frames")
    if not (
      _is_whole(width, 1, self._limits.frame_pixels)
      and _is_whole(height, 1, self._limits.frame_pixels)
      and _is_whole(num_frames, 0, 1 << 62)
      and isinstance(rate, float)
      and 0 <= rate < math.inf
      and orientation in _ORIENTATIONS
    ):
      raise DecodeError("decoder sent no header")
    if reason := too_large(width, height, self._limits):
      raise DecodeError(reason)
    self._sent_size = width, height
    self._orientation = orientation
    if not orientation[0]:
      width, height = height, width
    self.info = VideoInfo(width, height, rate, num_frames)

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

    width, height = self._sent_size
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
    if not math.isfinite(secs):
      secs = self.num_frames / (self.info.rate or 25.0)
    self._secs.append(secs)
    return np.ascontiguousarray(_oriented(frame, self._orientation)), secs


# [a, b, c, d] of `pixels.orientation`.
_ORIENTATIONS = [
  matrix
  for x in (-1, 1)
  for y in (-1, 1)
  for matrix in ([x, 0, 0, y], [0, x, y, 0])
]


def _oriented(frame: np.ndarray, orientation: list[int]) -> np.ndarray:
  """Turns and mirrors (H, W, C) as `pixels.orientation` says."""
  a, b, c, d = orientation
  if not a:
    frame = frame.swapaxes(0, 1)
  return frame[:: b + d, :: a + c]


def _is_whole(value: object, least: int, most: int) -> bool:
  """Returns whether a value of the child is such a whole number."""
  return type(value) is int and least <= value <= most
