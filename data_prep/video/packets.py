"""Opens the file of standard input, and yields what its packets decode to.

The decoder process has no path: libav reads an open file through its protocol
fd. Streams are chosen, and times that start again made continuous, in the same
way for pictures and sound, so that both keep one clock.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import math
from collections.abc import Iterator

from data_prep.video.protocol import Refused, Span

# Demuxers of self-contained video files. Playlists (hls, concat, image2, ...)
# are left out: they make the demuxer open further files.
FORMATS = (
  "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,m4v,mjpeg,h264,hevc,gif"
)
# Demuxers of audio files.
SOUND_FORMATS = "wav,mp3,flac,aac,aiff,caf,au,w64,ac3,eac3"
# Formats of samples of one size, whose headers may say a length that was
# guessed before there was any sound.
_STREAMED_SOUND = {"wav", "aiff", "caf", "au", "w64"}

# Times of decoding ascend, but for errors of rounding. As FFmpeg's program.
MAX_STEP_BACK_SECS = 0.1
# A longer leap is none of time, in formats of broadcasts.
MAX_LEAP_SECS = 10.0
_TIMES_MAY_START_AGAIN = 0x0200  # AVFMT_TS_DISCONT

# Formats with times of presentation and an index of key frames. The times of
# decoding that it holds are at most so much earlier.
_INDEXED = ("mov", "matroska")
_MAX_DELAY_SECS = 1.0
# Containers round times to milliseconds.
_ROUNDING_SECS = 1e-3


def open_input():
  """Opens the file of standard input as a container.

  Raises:
    Refused: it cannot be opened.
  """
  import av

  av.logging.set_level(None)
  options = {
    "fd": "0",
    "err_detect": "explode",
    "protocol_whitelist": "fd",
    "format_whitelist": f"{FORMATS},{SOUND_FORMATS}",
  }
  try:
    # Metadata in another encoding is no reason to refuse a video.
    return av.open("fd:", options=options, metadata_errors="replace")
  except av.FFmpegError as e:
    reason = e.strerror
    if e.errno == errno.EINVAL:
      names = f"{FORMATS},{SOUND_FORMATS}".replace(",", " ")
      reason += f": damaged, or in none of the formats {names}"
    raise Refused(f"cannot open: {reason}") from e


def video_stream(container):
  """Returns the stream of moving pictures that a player shows.

  Covers, thumbnails and stills are skipped. Of several streams it is one of
  more than a picture, that is marked as default, and the largest; of equals
  the first.

  Raises:
    Refused: there is none.
  """
  from av.stream import Disposition

  stills = (
    Disposition.attached_pic
    | Disposition.timed_thumbnails
    | Disposition.still_image
  )
  streams = [s for s in container.streams.video if not s.disposition & stills]
  if not streams:
    raise Refused("no video stream")
  known = [s for s in streams if s.codec_context is not None]
  if not known:
    raise Refused("no decoder is known for its video stream")
  return max(
    known,
    key=lambda s: (
      s.frames != 1,
      bool(s.disposition & Disposition.default),
      s.width * s.height,
      -s.index,
    ),
  )


def sound_stream(container):
  """Returns the first sound track, the default one if one is marked; or None.

  Raises:
    Refused: its codec is not known.
  """
  from av.stream import Disposition

  streams = container.streams.audio
  if not streams:
    return None
  stream = max(
    streams, key=lambda s: (bool(s.disposition & Disposition.default), -s.index)
  )
  if stream.codec_context is None:
    raise Refused("no decoder is known for its sound")
  return stream


def frames(container, stream, clock: Clock) -> Iterator:
  """Yields the decoded frames of a stream, with continuous times.

  Raises:
    Refused: the decoder reports damage.
  """
  import av

  name = container.format.name
  counters_may_leap = name == "mpegts"
  is_streamed = name in _STREAMED_SOUND
  # Times of decoding that no frame has taken yet, where the file has no times
  # of presentation. For AVI libav guesses those, wrongly with B-frames.
  has_presentation_times = name != "avi"
  decoding_times: list[int] = []
  for packet in container.demux(*clock.streams):
    clock.adjust(packet)
    if packet.stream.index != stream.index:
      continue
    is_cut = packet.is_corrupt
    # The container ends, or has a gap, within this packet. In a transport
    # stream its counters start again where recordings were joined: there the
    # decoder has to tell.
    if is_cut and not (counters_may_leap or is_streamed):
      raise Refused("decoder reported damage: a packet is cut off")
    is_timed = packet.dts is not None and packet.size
    if not has_presentation_times and is_timed:
      heapq.heappush(decoding_times, packet.dts)
    try:
      decoded = packet.decode()
    except (av.FFmpegError, ValueError):
      if is_cut and is_streamed:
        return
      if name == "mp3" and not _is_mp3(bytes(packet)):
        continue  # padding, or the tags of another file joined to it
      raise
    for frame in decoded:
      if frame.is_corrupt:
        raise Refused("decoder reported damage: a frame is incomplete")
      if decoding_times:
        # Frames come in the order of presentation: theirs is the earliest.
        earliest = heapq.heappop(decoding_times)
        has_b_frames = getattr(stream.codec_context, "has_b_frames", False)
        # Without reordering it is that of their own packet.
        frame.pts = earliest if has_b_frames else frame.dts
      yield frame


def frames_of(container, stream, clock: Clock, span: Span) -> Iterator[tuple]:
  """Yields the decoded frames of a span with their times in seconds.

  They are the same, with the same times, as if the file were decoded from its
  beginning. That is what happens where the format has no index, and where the
  frames before the span that the index leads to are none or cannot be decoded.

  Args:
    container: the open file, at its beginning.
    stream: one of its streams.
    clock: clock of the file.
    span: the span.

  Yields:
    A frame, and its time from the start of the file; NaN where the file has no
    times, in which case the span has to be all of it.

  Raises:
    Refused: as for `frames`.
  """
  import av

  timed = _timed(container, stream, clock)
  first: list[tuple] | None = []
  if span.start and container.format.name.split(",")[0] in _INDEXED:
    try:
      _seek(container, stream, span.start - _MAX_DELAY_SECS)
      first = _first_in(timed, span)
    except (av.FFmpegError, ValueError, Refused) as e:
      if isinstance(e, MemoryError):
        raise
      first = None
    if first is None:
      _seek(container, stream, -_MAX_DELAY_SECS)
      clock.begin()
      timed = _timed(container, stream, clock)
  for frame, secs in itertools.chain(first or [], timed):
    if secs >= span.end - _ROUNDING_SECS:
      return
    if math.isnan(secs) and span != Span():
      raise Refused("it has no times, so that no span can be taken")
    if not secs < span.start - _ROUNDING_SECS:
      yield frame, secs


def _first_in(timed: Iterator[tuple], span: Span) -> list[tuple] | None:
  """Returns the first frame of a span, in a list; [] if there is none.

  None if there is no frame before it: then others may be missing, too.
  """
  is_found = False
  for frame, secs in timed:
    if not secs < span.start - _ROUNDING_SECS:
      return [(frame, secs)] if is_found else None
    is_found = True
  return []


def _seek(container, stream, secs: float) -> None:
  """Moves to the last key frame at a time, or to the first one."""
  secs += (container.start_time or 0) / 1e6
  container.seek(int(secs / stream.time_base), stream=stream)


def _timed(container, stream, clock: Clock) -> Iterator[tuple]:
  """Yields the decoded frames with their times in seconds, which ascend."""
  last_secs = -math.inf
  for frame in frames(container, stream, clock):
    secs = math.nan
    if frame.time is not None:
      secs = frame.time - (container.start_time or 0) / 1e6
      # A millisecond on where the file's times go back.
      secs = last_secs = max(secs, last_secs + 1e-3)
    yield frame, secs


def _is_mp3(data: bytes) -> bool:
  """Returns whether data begins as a frame of MPEG audio does."""
  if len(data) < 4:
    return False
  _, version, rate, _ = data[:4]
  return (
    data[0] == 0xFF
    and version & 0xE0 == 0xE0
    and version & 0x06 != 0
    and rate & 0xF0 != 0xF0
    and rate & 0x0C != 0x0C
  )


class Clock:
  """Makes the times of a file continuous where they start again.

  So they do in recordings that were joined byte by byte, and where a camera
  restarts its counter. Each time that a stream starts again begins another
  part; all streams are shifted by the same number of seconds within a part.

  Args:
    container: the open file.
    streams: those that count; the same for pictures and sound.

  Attributes:
    streams: as above.
    num_restarts: how often times have started again.
  """

  def __init__(self, container, *streams) -> None:
    self.streams = [stream for stream in streams if stream is not None]
    self._may_leap = bool(container.format.flags & _TIMES_MAY_START_AGAIN)
    self.begin()

  def begin(self) -> None:
    """Forgets all packets, for a file that is read again from its beginning."""
    # Seconds to add, for each part.
    self._shifts = [0.0]
    self._part = {stream.index: 0 for stream in self.streams}
    # When the next packet of a stream is to be decoded, and when the last was.
    self._due: dict[int, float] = {}
    self._last: dict[int, float] = {}
    # When all packets have been shown.
    self._end = 0.0

  @property
  def num_restarts(self) -> int:
    return len(self._shifts) - 1

  def adjust(self, packet) -> None:
    """Shifts the times of a packet; to be called for each one, in order."""
    index = packet.stream.index
    # Packets are in the order of decoding, whose times ascend. Where the file
    # has none for a packet, its presentation is not before its decoding.
    time = packet.dts if packet.dts is not None else packet.pts
    if time is not None:
      secs = float(time * packet.time_base)
      shown_at = time if packet.pts is None else packet.pts
      shown_secs = float(shown_at * packet.time_base)
      if index in self._due and self._starts_again(index, secs):
        self._part[index] += 1
        if self._part[index] == len(self._shifts):
          # A part begins with a key frame, which is shown first.
          self._shifts.append(self._end - shown_secs)
        del self._due[index]
      shift = self._shifts[self._part[index]]
      duration = float((packet.duration or 0) * packet.time_base)
      self._end = max(self._end, shown_secs + shift + duration)
      if packet.dts is not None:
        self._last[index] = secs + shift
        self._due[index] = secs + shift + duration
    shift = self._shifts[self._part[index]]
    if shift:
      ticks = round(shift / packet.time_base)
      if packet.pts is not None:
        packet.pts += ticks
      if packet.dts is not None:
        packet.dts += ticks

  def _starts_again(self, index: int, secs: float) -> bool:
    secs += self._shifts[self._part[index]]
    if secs < self._last[index] - MAX_STEP_BACK_SECS:
      return True
    return self._may_leap and secs > self._due[index] + MAX_LEAP_SECS
