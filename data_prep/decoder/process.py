"""Program that writes the raw pixels or sound of one video to a pipe.

`data_prep.video.decode` starts it and reads the pipe. A video may be hostile,
and the libraries that read it are large C programs. Here they run without
rights, see `sandbox`, and with limits on memory, CPU time and file size. The
video is opened by the parent, and becomes standard input: this process opens
nothing. The messages are those of `protocol`.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import math
import os
import re
import resource
import sys

from data_prep.decoder import (
  packets,
  picture_folder,
  pixels,
  protocol,
  sandbox,
  sound,
)
from data_prep.decoder.clock import Clock, may_be_joined
from data_prep.decoder.protocol import (
  CHANGING_VIDEO,
  ORIGINAL_SOUND,
  PICTURE,
  SOUND,
  VIDEO,
  WHOLE,
  Damaged,
  Limits,
  Refused,
  Span,
  send,
)

# Decoding is cheaper than finding faces: two threads keep a worker busy, and a
# fixed number makes the use of memory equal on all machines.
_NUM_THREADS = 2
# Pixels per second of CPU time that any codec reaches on any machine: ten
# frames of 1920x1080.
_SLOW_PIXELS = 20e6
# Errors of disks and networks, which libav returns for no content of a file.
_HOST_ERRORS = (
  *(errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT),
  *(errno.EHOSTDOWN, errno.ECONNRESET),
)


def _decode(limits: Limits, span: Span, output: str, pipe: int) -> None:
  """Writes the frames of a span of the video, or a picture, to the pipe.

  Raises:
    Refused: the video cannot be decoded, or is over a limit.
    Damaged: it cannot be decoded to its end.
  """
  import av

  is_picture = output == PICTURE
  formats = [packets.PICTURE_FORMATS] if is_picture else []
  with packets.open_input(*formats) as container:
    stream = packets.video_stream(container)
    clock = Clock(container, stream, _sound_of(container))
    _check_size(stream, limits, span)
    writer = _FrameWriter(pipe, stream, span, limits, output == CHANGING_VIDEO)
    try:
      frames = packets.Frames(container, stream, clock, span)
      _open_codec(stream, frames.may_be_open)
      # Cameras append previews and videos to pictures.
      for frame, secs in itertools.islice(frames, 1 if is_picture else None):
        writer.write(frame, secs)
    except (Damaged, av.FFmpegError) as e:
      if isinstance(e, MemoryError):
        raise
      reason = e.strerror if isinstance(e, av.FFmpegError) else e
      raise Damaged(
        f"decoder reported damage after {writer.num_frames} frames: {reason}"
      ) from e
    if not writer.num_frames and span != WHOLE:
      raise Refused(
        f"no frame from {span.start:g} s to {span.end:g} s; is it the right "
        "file?"
      )
    if not writer.num_frames:
      raise Refused("no frame could be decoded")
    if frames.num_left_out > 0:
      writer.note(
        "cut at its beginning: frames that refer to others before it are left "
        f"out, {frames.num_left_out}"
      )
    if clock.num_restarts:
      writer.note(f"times start again: {clock.num_restarts} times")
    elif note := _shortfall(stream, span, writer):
      writer.note(note)
  send(pipe, b"E")


def _open_codec(stream, is_open: bool) -> None:
  """Opens the codec of a stream, with threads."""
  # By default libav conceals damage and returns the frame as a good one.
  stream.codec_context.options = {"err_detect": "explode"}
  # An error in one of several threads would be that of all later frames.
  stream.codec_context.thread_count = 1 if is_open else _NUM_THREADS
  stream.thread_type = "AUTO"
  stream.codec_context.open(strict=False)
  sandbox.forbid_threads()


class _FrameWriter:
  """Writes frames, and notes on them, to the pipe.

  Attributes:
    num_frames: frames so far.
    last_secs: time of the last frame.
    longest_secs: longest time between two frames.
  """

  def __init__(
    self,
    pipe: int,
    stream,
    span: Span,
    limits: Limits,
    may_change_size: bool,
  ) -> None:
    self._pipe = pipe
    self._stream = stream
    self._span = span
    self._limits = limits
    self._may_change_size = may_change_size
    # Viewers of pictures show their pixels as squares.
    aspect = None if _is_picture(stream) else stream.sample_aspect_ratio
    self._converter = pixels.RgbConverter(aspect)
    self._pixel_aspect = None
    self._orientation: list[int] = []
    self._tally = protocol.Tally(limits)
    # Size, shown size and orientation of the frames.
    self._form = ((0, 0), (0, 0), self._orientation)
    self._notes: set[str] = set()
    self.num_frames = 0
    self.last_secs = math.nan
    self.longest_secs = 0.0

  def write(self, frame, secs: float) -> None:
    """Writes a frame and its time.

    Raises:
      Refused: it is over a limit, or of another size.
    """
    if frame.key_frame or not self._orientation:
      self._follow_pixel_aspect()
      file = packets.picture_file(self._stream.container)
      self._orientation = pixels.orientation(frame, file)
    size = frame.width, frame.height
    shown_size = self._converter.width(frame), frame.height
    form = size, shown_size, self._orientation
    if form != self._form:
      self._begin_form(form)
    if reason := self._tally.add(*shown_size):
      raise Refused(reason)
    if secs - self.last_secs > self.longest_secs:
      self.longest_secs = secs - self.last_secs
    self.last_secs = secs
    pixels.send_frame(self._pipe, self._converter(frame), secs)
    for text in _notes(frame, size, shown_size):
      self.note(text)
    self.num_frames += 1

  def _follow_pixel_aspect(self) -> None:
    """Takes over the shape of pixels where it changes, at a key frame.

    Only in recordings that may be joined: other containers describe all frames.
    """
    if not may_be_joined(self._stream.container):
      return
    aspect = self._stream.codec_context.sample_aspect_ratio or 1
    if self.num_frames and aspect != self._pixel_aspect:
      self._converter = pixels.RgbConverter(aspect)
    self._pixel_aspect = aspect

  def _begin_form(
    self, form: tuple[tuple[int, int], tuple[int, int], list[int]]
  ) -> None:
    if self.num_frames:
      sizes = self._form[1], form[1]
      change = " to ".join(f"{width}x{height}" for width, height in sizes)
      what, change = "size", f"from {change}"
      if sizes[0] == sizes[1]:
        what, change = "orientation", "by turning or mirroring"
      if not self._may_change_size:
        raise Refused(f"frame {what} changes {change}")
      self.note(f"frame {what} changes: {change}, where tracks end")
    self._form = form
    _, shown_size, orientation = form
    _check_pixels(*shown_size, self._limits)
    _send_info(self._pipe, self._stream, self._span, shown_size, orientation)

  def note(self, text: str) -> None:
    """Writes a note, once."""
    if text not in self._notes:
      self._notes.add(text)
      send(self._pipe, b"W", text.encode())


# Headers round, and sound may outlast the frames a little.
_MAX_MISSING_SHARE = 0.05
_MAX_MISSING_FRAMES = 2
_MAX_MISSING_SECS = 1.0


def _shortfall(stream, span: Span, writer: _FrameWriter) -> str:
  """Returns a note if frames are missing that were announced or asked for."""
  end_secs = writer.last_secs
  if span.end < math.inf and span.end - end_secs > _MAX_MISSING_SECS:
    wanted = f"before {span.end:g} s"
    return f"frames are missing: they end at {end_secs:.1f} s, {wanted}"
  if span != WHOLE:
    return ""
  announced = _shown_frames(stream)
  missing = announced - writer.num_frames
  if missing > max(_MAX_MISSING_FRAMES, _MAX_MISSING_SHARE * announced):
    return f"frames are missing: {writer.num_frames} of {announced} announced"
  if stream.frames:
    return ""
  secs, is_own = _announced_secs(stream)
  most = _MAX_MISSING_SECS
  if is_own and writer.longest_secs:
    most = min(most, _MAX_MISSING_FRAMES * writer.longest_secs)
  # The last frame is shown for as long as others.
  missing_secs = secs - end_secs - writer.longest_secs
  if missing_secs > max(most, _MAX_MISSING_SHARE * secs):
    return f"frames are missing: they end at {end_secs:.1f} s of {secs:.1f} s"
  return ""


def _announced_secs(stream) -> tuple[float, bool]:
  """Returns when the file ends by its header, and if that is of frames alone.

  Matroska announces a length only, that of frames and sound together, from time
  0 on; other times are counted from the first frame or sound. Most programs
  name the length of each track, too.
  """
  container = stream.container
  secs = (container.duration or 0) / 1e6
  if not container.format.name.startswith("matroska"):
    return secs, False
  is_own = len(container.streams) == 1
  text = stream.metadata.get("DURATION", "")
  if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", text):
    hours, minutes, seconds = map(float, text.split(":"))
    secs, is_own = 3600 * hours + 60 * minutes + seconds, True
  return secs - max(container.start_time or 0, 0) / 1e6, is_own


def _sound_of(container):
  """Returns the sound track, None where it cannot be decoded."""
  try:
    return packets.sound_stream(container)
  except Refused:
    return None


def _notes(
  frame, size: tuple[int, int], shown_size: tuple[int, int]
) -> set[str]:
  """Returns what a user should know of a frame."""
  notes = set()
  if frame.interlaced_frame:
    notes.add("interlaced: each frame shows two fields, line by line")
  if frame.color_trc in pixels.HDR_CURVES:
    curve = pixels.HDR_CURVES[frame.color_trc]
    notes.add(f"high dynamic range ({curve}), brought to standard range")
  if shown_size != size:
    notes.add(
      f"pixels are not square: {size[0]}x{size[1]} shown as "
      f"{shown_size[0]}x{shown_size[1]}"
    )
  return notes


def _check_size(stream, limits: Limits, span: Span) -> None:
  """Refuses a video that is too large, before any frame is decoded."""
  _check_pixels(stream.width, stream.height, limits)
  if span != WHOLE:
    return
  # Only what the header counts: length times rate is a guess.
  announced = _counted_frames(stream)
  if announced > protocol.most_frames(stream.width, stream.height, limits):
    reason = protocol.too_many_frames(stream.width, stream.height, limits)
    raise Refused(f"{reason}: the container announces {announced}")


def _announced_frames(stream, span: Span) -> int:
  """Returns the number of frames by the container, 0 where it is unknown."""
  rate = _rate(stream)
  if span.end < math.inf:
    return round((span.end - span.start) * rate)
  if stream.frames or not rate:
    return _shown_frames(stream)
  # Matroska has only the duration of the file, in microseconds.
  duration = (stream.container.duration or 0) / 1_000_000
  if stream.duration:
    duration = stream.duration * stream.time_base
  return max(int(duration * rate), 0)


# Bytes before each frame of an AVI file.
_AVI_HEADER = 8


def _counted_frames(stream) -> int:
  """Returns the number of frames in the header, 0 where it is unknown.

  It is a placeholder in AVI files that were written to a pipe.
  """
  container = stream.container
  is_avi = container.format.name == "avi"
  if is_avi and stream.frames * _AVI_HEADER > container.size:
    return 0
  return stream.frames


def _shown_frames(stream) -> int:
  """Returns the number of frames by the container, 0 where it is unknown.

  The count includes those that an edit list leaves out, the duration does not.
  It includes a pause before the first frame, unless that is longer.
  """
  counted = _counted_frames(stream)
  if not (counted and stream.duration and stream.average_rate):
    return counted
  ticks = stream.duration - max(stream.start_time or 0, 0)
  shown = ticks * stream.time_base * stream.average_rate
  return min(counted, max(math.ceil(shown), 0))


# Recordings of browsers name the unit of their times, 1000 a second.
_MAX_RATE = 500
_NO_TIMES = 0x0080  # AVFMT_NOTIMESTAMPS: bare streams


def _is_picture(stream) -> bool:
  return stream.container.format.name in packets.PICTURE_FORMATS.split(",")


def _rate(stream) -> float:
  """Returns frames per second by the container, 0.0 where it is unknown."""
  if _is_picture(stream):
    return 0.0
  rates = stream.average_rate, stream.guessed_rate
  if stream.container.format.flags & _NO_TIMES:
    # The former is then a default of libav's, the latter the codec's.
    rates = rates[::-1]
  rate = float(rates[0] or rates[1] or 0)
  return rate if 0 < rate <= _MAX_RATE else 0.0


def _check_pixels(width: int, height: int, limits: Limits) -> None:
  """Refuses frames of an unknown size, or with too many pixels."""
  if not width * height:
    raise Refused("cannot open: the size of its frames is unknown")
  if reason := protocol.too_large(width, height, limits):
    raise Refused(reason)


def _send_info(
  pipe: int,
  stream,
  span: Span,
  shown_size: tuple[int, int],
  orientation: list[int],
) -> None:
  info = {
    "width": shown_size[0],
    "height": shown_size[1],
    "orientation": orientation,
    "rate": _rate(stream),
    "announced_frames": _announced_frames(stream, span),
  }
  send(pipe, b"I", json.dumps(info).encode())


def _limit(limits: Limits) -> None:
  """Sets the limits of this process on memory, CPU time and file size."""
  # It also decodes while the parent does not wait for it.
  cpu_secs = math.ceil(
    limits.secs * _NUM_THREADS + limits.video_pixels / _SLOW_PIXELS + 10
  )
  for kind, soft, hard in (
    (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
    # The soft limit is lower: SIGXCPU, which names the cause, precedes SIGKILL.
    (resource.RLIMIT_CPU, cpu_secs, cpu_secs + 5),
    (resource.RLIMIT_FSIZE, 0, 0),
    (resource.RLIMIT_CORE, 0, 0),
  ):
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
      soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def _load_libraries() -> None:
  """Imports all that decoding needs: in the sandbox nothing can be opened."""
  import av
  import av.audio.resampler
  import av.filter
  import av.sidedata.sidedata
  import av.subtitles.stream
  import av.video.reformatter  # noqa: F401

  # Python loads encodings and the C library its unwinder when first needed.
  "é".encode("latin-1").decode("utf-16", "replace").encode("ascii", "replace")


def main() -> None:
  """Decodes one video for `data_prep.video.decode`."""
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.decoder.process",
    description="Decodes one video into a pipe. Started by "
    "data_prep.video.decode; not a program for the command line.",
  )
  parser.add_argument(
    "parent_pid", type=int, help="process that reads the pipe"
  )
  parser.add_argument("limits", help="the fields of Limits as JSON")
  parser.add_argument(
    "output",
    help="video, changing_video (whose frame size may change), picture, sound "
    "(16 kHz, mono), original_sound (its own rate and one or two channels), "
    "none, or the frame rate of a folder of pictures",
  )
  parser.add_argument(
    "file", type=int, help="descriptor of the open file, or folder"
  )
  parser.add_argument(
    "span", type=float, nargs=2, help="start and end in seconds"
  )
  args = parser.parse_args()
  limits = Limits(**json.loads(args.limits))
  is_folder = args.output not in protocol.FILES
  sandbox.end_with_parent()
  if os.getppid() != args.parent_pid:
    sys.exit(1)
  # Python does not start with a folder as its standard input.
  os.dup2(args.file, sys.stdin.fileno())
  os.close(args.file)
  # Text that a library prints must not come between the frames.
  pipe = os.dup(sys.stdout.fileno())
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  try:
    if is_folder:
      picture_folder.start_reader(pipe)
    _limit(limits)
    _load_libraries()
    send(pipe, b"L", json.dumps(sandbox.enter(pipe)).encode())
    if args.output in (VIDEO, CHANGING_VIDEO, PICTURE):
      _decode(limits, Span(*args.span), args.output, pipe)
    elif args.output in (SOUND, ORIGINAL_SOUND):
      sound.decode(pipe, args.output == ORIGINAL_SOUND, args.span[1])
    elif is_folder:
      picture_folder.decode(float(args.output), limits, pipe)
    else:
      send(pipe, b"E")
  except Refused as e:
    kind = b"D" if isinstance(e, Damaged) else b"X"
    if getattr(e.__cause__, "errno", None) in _HOST_ERRORS:
      kind = b"H"
    _send_text(pipe, kind, str(e))
  except BrokenPipeError:
    sys.exit(1)  # the parent has closed the pipe
  except MemoryError:
    megabytes = limits.memory_bytes >> 20
    _send_text(pipe, b"X", f"decoder ran out of memory, {megabytes} MiB")
  except ImportError as e:
    _send_text(
      pipe,
      b"N",
      f"PyAV does not load ({e}): pip install 'marlin-jax[features]', or allow "
      "more memory",
    )
  except Exception as e:  # standard error is discarded: no traceback
    _send_text(pipe, b"X", f"decoder failed: {type(e).__name__}: {e}")


def _send_text(pipe: int, kind: bytes, text: str) -> None:
  send(pipe, kind, text.encode(errors="backslashreplace"))


if __name__ == "__main__":
  main()
