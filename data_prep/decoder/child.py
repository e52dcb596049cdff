"""The child process that decodes one video, as its parent sees it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from data_prep.decoder import protocol
from data_prep.decoder.protocol import MESSAGE, WHOLE, Limits, Span
from marlin_jax import records
from marlin_jax.records.cli import UserError

# Bytes of a message that is not pixels or samples, and notes of one video.
MAX_TEXT_BYTES = 1000
MAX_NOTES = 20
# A decoder at its deadline that used the CPU for more than this share of the
# time was slowed by the video, not by the machine. It has two threads.
_BUSY_SHARE = 0.5
# CPU time of a decoder that starts.
_START_SECS = 1.0
# Seconds that a decoder gets to end.
END_SECS = 5.0

# Signals of the system and of people; others are the decoder's own crashes.
_SENT_SIGNALS = (
  *(signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
  *(signal.SIGQUIT, signal.SIGBUS),
)
# Reason of a video whose decoder was killed, for lack of memory for example.
KILLED = "decoder was killed by SIGKILL (out of memory?)"

# The child's program. -P keeps the current folder off its import path; -S runs
# nothing that other packages have put beside themselves, and starts sooner.
PROGRAM = ("-P", "-S", "-m", "data_prep.decoder.process")
# Variables that Python needs to find itself and PyAV. All others, such as keys
# of a cloud, are kept from the child.
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
# The folder from which this program and marlin_jax are imported.
_ROOT = str(Path(records.__file__).parents[2])


class DecodeError(UserError):
  """A video is refused; the message is the reason for the quarantine."""


class HostError(DecodeError):
  """The machine could not read a video; another try may succeed."""


class DamageError(DecodeError):
  """A video is damaged; the frames read before are good."""


class DecoderSetupError(UserError):
  """The decoder does not run on this machine, for any video."""


def sandbox_summary(layers: dict[str, str]) -> str:
  """Returns a line that says which layers hold, and why others do not."""
  held = [name for name, reason in layers.items() if not reason]
  line = "decoder sandbox: " + (", ".join(held) or "none")
  missing = [f"{name} ({reason})" for name, reason in layers.items() if reason]
  return line + ("; missing: " + ", ".join(missing) if missing else "")


# Error of each message that is the last one, and bad news.
_ENDS = {
  b"D": DamageError,
  b"X": DecodeError,
  b"H": HostError,
  b"N": DecoderSetupError,
}


class Decoder:
  """The child process and its pipe.

  Args:
    path: the file.
    limits: limits on the cost of the video.
    output: what the child sends, see `protocol`.
    require_sandbox: see `decode.open_video`.
    span: span of the video to send.

  Attributes:
    pid: process and process group of the decoder.
    layers: see `sandbox_layers`.
    notes: notes on the video for the user, received so far.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    limits: Limits,
    output: str,
    require_sandbox: bool = False,
    span: Span = WHOLE,
  ) -> None:
    self._limits = limits
    self._secs_left = limits.secs
    self.layers: dict[str, str] = {}
    self.notes: list[str] = []
    file = _open_file(path, output)
    try:
      self._process = _start_in_thread(file, limits, output, span)
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
      raise DecoderSetupError("decoder did not report its sandbox")
    self.layers = self.read_json(length)
    if is_required and any(self.layers.values()):
      raise DecoderSetupError(
        f"the sandbox is not whole: {sandbox_summary(self.layers)}"
      )

  def read_header(self) -> tuple[bytes, int]:
    """Returns kind and length of the next message that is not a note.

    Raises:
      DamageError: for a message D.
      DecodeError: for a message X.
      HostError: for a message H.
      DecoderSetupError: for a message N.
    """
    while True:
      kind, length = MESSAGE.unpack(self.read(MESSAGE.size))
      if kind in _ENDS:
        reason = self._read_text(min(length, MAX_TEXT_BYTES))
        raise _ENDS[kind](reason)
      # The lengths of frames and samples are checked where they are read.
      if kind not in (b"F", b"S") and length > MAX_TEXT_BYTES:
        raise DecodeError("decoder sent no header")
      if kind != b"W":
        return kind, length
      note = self._read_text(length)
      if len(self.notes) < MAX_NOTES:
        self.notes.append(note)

  def read_json(self, length: int) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      DecodeError: the message is not one.
    """
    try:
      fields = json.loads(self.read(length))
    except (ValueError, RecursionError) as e:
      raise DecodeError("decoder sent no header") from e
    if not isinstance(fields, dict):
      raise DecodeError("decoder sent no header")
    return fields

  def _read_text(self, length: int) -> str:
    """Reads text of the child; escapes what could control a terminal."""
    text = self.read(length).decode(errors="replace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

  def read(self, length: int) -> bytes:
    """Reads `length` bytes from the pipe."""
    data = bytearray(length)
    self.read_into(memoryview(data))
    return bytes(data)

  def read_into(self, view: memoryview) -> None:
    """Fills a buffer from the pipe.

    Raises:
      DecodeError: the decoder ended, or passed its deadline.
      HostError: the system ended the decoder, or kept it from working.
    """
    while len(view):
      before = time.monotonic()
      ready = self._poll.poll(max(self._secs_left, 0.0) * 1000)
      self._secs_left -= time.monotonic() - before
      if not ready:
        raise self._deadline_error()
      num_read = os.readv(self._pipe, [view])
      if num_read == 0:
        raise self._death()
      view = view[num_read:]

  def _deadline_error(self) -> DecodeError:
    """Ends the decoder; returns the video's error, or the machine's."""
    before = _cpu_secs_of_children()
    self.close()
    secs = self._limits.secs
    busy_secs = _cpu_secs_of_children() - before
    if busy_secs > _START_SECS + _BUSY_SHARE * secs:
      return DecodeError(f"decoding takes more than {secs:g} s")
    return HostError(f"decoder passed its deadline of {secs:g} s")

  def _death(self) -> UserError:
    """Returns the error of a decoder that ended without a last message."""
    try:
      code = self._process.wait(timeout=END_SECS)
    except subprocess.TimeoutExpired:
      return DecodeError("decoder closed its pipe")
    if code >= 0:
      # It reads the video after it has reported its sandbox.
      kind = DecodeError if self.layers else DecoderSetupError
      return kind(f"decoder ended with exit code {code}")
    name = signal.Signals(-code).name
    if -code == signal.SIGXCPU:
      return DecodeError("decoder used up its CPU time")
    if -code == signal.SIGKILL:
      return HostError(KILLED)
    kind = HostError if -code in _SENT_SIGNALS else DecodeError
    return kind(f"decoder died of {name}")

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


def _cpu_secs_of_children() -> float:
  """Returns the CPU time of ended child processes and their children."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def _open_file(path: str | os.PathLike, output: str) -> int:
  """Opens the file, or the folder of pictures, that the child reads.

  Raises:
    HostError: it cannot be opened.
    DecodeError: it is neither.
  """
  is_folder = output not in protocol.FILES
  try:
    # A named pipe without a writer must not block.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as e:
    raise HostError(f"cannot open: {e.strerror}") from e
  mode = os.fstat(file).st_mode
  if is_folder != stat.S_ISDIR(mode):
    os.close(file)
    kind = "folder of pictures" if is_folder else "regular file"
    raise DecodeError(f"cannot open: not a {kind}")
  if not (is_folder or stat.S_ISREG(mode) or output == protocol.PROBE):
    os.close(file)
    raise DecodeError("cannot open: not a regular file")
  return file


def _start_in_thread(
  file: int, limits: Limits, output: str, span: Span
) -> subprocess.Popen:
  """Starts the child in a thread that lives as long as this process.

  The kernel ends the child with the thread that started it.
  """
  try:
    started = _starter(os.getpid()).submit(_start, file, limits, output, span)
  except RuntimeError:  # Python is ending, and starts no thread
    return _start(file, limits, output, span)
  return started.result()


@functools.cache
def _starter(pid: int) -> concurrent.futures.ThreadPoolExecutor:
  """Returns the thread that starts the decoders of a process."""
  del pid  # a forked process has a thread of its own
  return concurrent.futures.ThreadPoolExecutor(1, "decoder starter")


def _start(
  file: int, limits: Limits, output: str, span: Span
) -> subprocess.Popen:
  """Starts the child, which inherits the file descriptor `file`."""
  return subprocess.Popen(
    [
      *(sys.executable, *PROGRAM),
      str(os.getpid()),
      json.dumps(dataclasses.asdict(limits)),
      output,
      str(file),
      *map(str, span),
    ],
    pass_fds=(file,),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env={
      "PATH": os.defpath,
      "LANG": "C.UTF-8",
      "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, *sys.path])),
      # Arenas of threads reserve address space, which is limited.
      "MALLOC_ARENA_MAX": "2",
      **{n: os.environ[n] for n in _VARIABLES if n in os.environ},
    },
    start_new_session=True,
  )
