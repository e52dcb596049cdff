"""Opens the file on standard input and decodes the packets of its streams.

The decoder process has no path: libav reads an open file through its protocol
fd. Pictures and sound share one clock.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import os
from collections.abc import Iterator

from data_prep.decoder import matroska
from data_prep.decoder.beginning import Beginning
from data_prep.decoder.clock import Clock
from data_prep.decoder.protocol import Damaged, Refused, Span

# Demuxers of self-contained video files. Playlists (hls, concat, image2, ...)
# are left out: they make the demuxer open further files.
FORMATS = (
  "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,m4v,mjpeg,h264,hevc,gif"
)
# Demuxers of pictures.
PICTURE_FORMATS = "jpeg_pipe,png_pipe,webp_pipe"
# Demuxers of audio files.
SOUND_FORMATS = "wav,mp3,flac,aac,aiff,caf,au,w64,ac3,eac3"
# Formats whose header may hold a guessed length, since it was written first.
_STREAMED_SOUND = {"wav", "aiff", "caf", "au", "w64"}

# Formats with presentation times and an index of key frames. The index holds
# decoding times, which are earlier by at most _MAX_DELAY_SECS.
_INDEXED = ("mov", "matroska")
_MAX_DELAY_SECS = 1.0
# Containers round times to milliseconds.
_ROUNDING_SECS = 1e-3


def av_open(file, **options):
  """Returns `av.open(file, **options)`, whatever the encoding of metadata."""
  import av

  # From av 19 on, no encoding is an error.
  if int(av.__version__.split(".")[0]) < 19:
    options["metadata_errors"] = "replace"
  return av.open(file, **options)


def open_input(formats: str = f"{FORMATS},{SOUND_FORMATS}"):
  """Opens the file of standard input as a container.

  Args:
    formats: names of the demuxers that may read it.

  Raises:
    Refused: it cannot be opened.
  """
  import av

  if formats == PICTURE_FORMATS and _is_animated():
    raise Refused("cannot open: an animated picture; convert it to a video")
  av.logging.set_level(None)
  options = {
    "fd": "0",
    "err_detect": "explode",
    "protocol_whitelist": "fd",
    "format_whitelist": formats,
  }
  try:
    return av_open("fd:", options=options)
  except av.FFmpegError as e:
    reason = e.strerror
    if e.errno == errno.EINVAL:
      names = formats.replace("_pipe", "").replace(",", " ")
      reason += f": damaged, or in none of the formats {names}"
    raise Refused(f"cannot open: {reason}") from e


def _is_animated() -> bool:
  """Returns True if standard input is a WebP or PNG file of several frames."""
  start = os.pread(0, 65536, 0)
  is_apng = start.startswith(b"\x89PNG") and b"acTL" in start.split(b"IDAT")[0]
  # In the header of the extended format, after the sizes of file and chunk.
  is_animated_webp = start[12:16] == b"VP8X" and start[20:21] and start[20] & 2
  return bool(is_apng or is_animated_webp)


def picture_file(container) -> bytes:
  """Returns the bytes of standard input if it is a picture, else b''."""
  if container.format.name not in PICTURE_FORMATS.split(","):
    return b""
  # The position of the file is that of libav.
  return os.pread(0, os.fstat(0).st_size, 0)


def video_stream(container):
  """Returns the stream of moving pictures that a player shows.

  Covers, thumbnails and stills are skipped. A stream of several pictures is
  preferred, then the default one, then the largest, then the first.

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
  """Returns the default sound track, or the first, or None.

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


def of_stream(container, stream, clock: Clock) -> Iterator:
  """Yields the packets of a stream, with continuous times."""
  for packet in container.demux(*clock.streams):
    clock.adjust(packet)
    if packet.stream.index == stream.index:
      yield packet


def frames(packets: Iterator, stream, beginning: Beginning | None = None):
  """Yields the decoded frames of the packets of a stream.

  Args:
    packets: see `of_stream`.
    stream: the stream.
    beginning: source of the packets, if the video may be cut.

  Raises:
    Damaged: the decoder reports damage.
  """
  import av

  name = stream.container.format.name
  counters_may_leap = name == "mpegts"
  is_streamed = name in _STREAMED_SOUND
  has_presentation_times = _has_presentation_times(stream)
  # Those that are not yet assigned to a frame.
  decoding_times: list[int] = []
  for packet in packets:
    if _is_dropped(packet):
      continue
    is_cut = packet.is_corrupt
    # The container ends, or has a gap, within this packet. In a transport
    # stream that is no proof of damage, since counters start again where
    # recordings were joined: there only the decoder's errors count.
    if is_cut and not (counters_may_leap or is_streamed):
      raise Damaged("a packet is cut off")
    is_timed = packet.dts is not None and packet.size
    if not has_presentation_times and is_timed:
      heapq.heappush(decoding_times, packet.dts)
    try:
      decoded = []
      if beginning is not None and beginning.is_joined(packet):
        decoded = stream.decode(None)
        for frame in decoded:
          frame.time_base = packet.time_base
        stream.codec_context.flush_buffers()
      decoded += packet.decode()
    except (av.FFmpegError, ValueError):
      if is_cut and is_streamed:
        return
      if name == "mp3" and not _is_mp3(bytes(packet)):
        continue  # padding, or the tags of another file joined to it
      if beginning is not None and beginning.allows_errors():
        continue
      raise
    for frame in decoded:
      if beginning is not None and not beginning.add(frame):
        continue
      if frame.is_corrupt:
        raise Damaged("a frame is incomplete")
      if decoding_times:
        # Frames come in presentation order: the next one has the earliest time.
        earliest = heapq.heappop(decoding_times)
        has_b_frames = getattr(stream.codec_context, "has_b_frames", False)
        # Without reordering, a frame has the time of its packet.
        frame.pts = earliest if has_b_frames else frame.dts
      yield frame


def _has_presentation_times(stream) -> bool:
  """Returns False for streams with decoding times only.

  Presentation times that libav guesses for them are wrong with B-frames.
  """
  name = stream.container.format.name
  if not (stream.type == "video" and name.startswith("matroska")):
    return name not in ("avi", "asf")
  try:
    # A stream of AVI within Matroska has a tag of four letters.
    return stream.codec_context.codec_tag == "\0\0\0\0"
  except ValueError:  # letters that are not of ASCII
    return False


def _is_dropped(packet) -> bool:
  """Returns True for the empty packet of a frame that was not recorded.

  Decoders refuse it. The last packet of a stream is empty too, but has no time;
  others may carry parameters.
  """
  return (
    not packet.size
    and packet.dts is not None
    and next(packet.iter_sidedata(), None) is None
  )


class Frames:
  """The decoded frames of a span of a video, with their times in seconds.

  Frames and times are the same as when the file is decoded from its beginning.
  That is done if the format has no index, or if seeking by the index does not
  lead to a decodable frame before the span.

  Args:
    container: the open file, at its beginning.
    stream: one of its streams, whose codec is open once frames are read.
    clock: clock of the file.
    span: the span.
  """

  def __init__(self, container, stream, clock: Clock, span: Span) -> None:
    self._container, self._stream, self._clock = container, stream, clock
    self._span = span
    self._is_sought = (
      span.start > 0
      and container.format.name.split(",")[0] in _INDEXED
      and _has_presentation_times(stream)
    )
    if self._is_sought:
      _seek(container, stream, span.start - _MAX_DELAY_SECS)
    queue = of_stream(container, stream, clock)
    if not self._is_sought:
      queue = matroska.before_damage(queue, container)
    self._beginning = Beginning(queue, clock)

  @property
  def may_be_open(self) -> bool:
    """True if a group of pictures may be open, see `Beginning.is_open`."""
    name = self._stream.codec_context.name
    return self._beginning.is_open or (name == "h264" and self._clock.may_leap)

  @property
  def num_left_out(self) -> int:
    """Frames at the beginning of the file that cannot be decoded."""
    return 0 if self._is_sought else self._beginning.num_left_out

  def __iter__(self) -> Iterator[tuple]:
    """Yields each frame and its time from the start of the file.

    The time is NaN if the file has no times; the span must then be the whole
    file.

    Raises:
      Damaged: the decoder reports damage.
      Refused: the file has no times, and the span is not all of it.
    """
    import av

    timed = self._timed()
    first: list[tuple] | None = []
    if self._is_sought:
      try:
        first = _first_in(timed, self._span)
      except (av.FFmpegError, ValueError, Refused) as e:
        if isinstance(e, MemoryError):
          raise
        first = None
    if first is None:
      timed = self._from_beginning()
    for frame, secs in itertools.chain(first or [], timed):
      if secs >= self._span.end - _ROUNDING_SECS:
        return
      if math.isnan(secs) and self._span != Span():
        raise Refused("it has no times, so that no span can be taken")
      if not secs < self._span.start - _ROUNDING_SECS:
        yield frame, secs

  def _from_beginning(self) -> Iterator[tuple]:
    self._is_sought = False
    _seek(self._container, self._stream, -_MAX_DELAY_SECS)
    self._clock.begin()
    queue = of_stream(self._container, self._stream, self._clock)
    queue = matroska.before_damage(queue, self._container)
    self._beginning = Beginning(queue, self._clock)
    return self._timed()

  def _timed(self) -> Iterator[tuple]:
    """Yields the decoded frames with their times, which ascend."""
    last_secs = -math.inf
    start_secs = (self._container.start_time or 0) / 1e6
    packets = self._beginning.packets()
    for frame in frames(packets, self._stream, self._beginning):
      secs = math.nan
      if frame.time is not None:
        # If the file's times go back, one millisecond after the last.
        secs = last_secs = max(frame.time - start_secs, last_secs + 1e-3)
      yield frame, secs


def _first_in(timed: Iterator[tuple], span: Span) -> list[tuple] | None:
  """Returns a list of the first frame of a span; [] if the span has no frame.

  Returns None if no frame comes before it, since others may be missing then.
  """
  is_found = False
  for frame, secs in timed:
    if not secs < span.start - _ROUNDING_SECS:
      return [(frame, secs)] if is_found else None
    is_found = True
  return []


def _seek(container, stream, secs: float) -> None:
  """Moves to the last key frame before a time, or to the first one."""
  secs += (container.start_time or 0) / 1e6
  container.seek(int(secs / stream.time_base), stream=stream)


def _is_mp3(data: bytes) -> bool:
  """Returns True if the data begins with the header of an MPEG audio frame."""
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
