"""Opens the file on standard input and decodes the packets of its streams.

The decoder process has no path: libav reads an open file through its protocol
fd. Pictures and sound share one `Clock`, which makes times that start again
continuous.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import os
import re
from collections.abc import Iterator

from data_prep.video.protocol import Damaged, Refused, Span

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

# Decoding times ascend, except for rounding errors; the limit is FFmpeg's.
MAX_STEP_BACK_SECS = 0.1
# In broadcast formats, a longer leap is a restart of the clock, not a pause.
MAX_LEAP_SECS = 10.0
_TIMES_MAY_START_AGAIN = 0x0200  # AVFMT_TS_DISCONT

# Formats with presentation times and an index of key frames. The index holds
# decoding times, which are earlier by at most _MAX_DELAY_SECS.
_INDEXED = ("mov", "matroska")
_MAX_DELAY_SECS = 1.0
# Containers round times to milliseconds.
_ROUNDING_SECS = 1e-3


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
    # Metadata in another encoding is no reason to refuse a video.
    return av.open("fd:", options=options, metadata_errors="replace")
  except av.FFmpegError as e:
    reason = e.strerror
    if e.errno == errno.EINVAL:
      names = formats.replace("_pipe", "").replace(",", " ")
      reason += f": damaged, or in none of the formats {names}"
    raise Refused(f"cannot open: {reason}") from e


def _is_animated() -> bool:
  """Returns True if standard input is a WebP or PNG file of several frames."""
  start = os.pread(0, 65536, 0)
  is_png = start.startswith(b"\x89PNG") and b"acTL" in start.split(b"IDAT")[0]
  # In the header of the extended format, after the sizes of file and chunk.
  has_flag = start[12:16] == b"VP8X" and start[20:21] and start[20] & 2
  return bool(is_png or has_flag)


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


def before_damage(packets: Iterator, container) -> Iterator:
  """Yields the packets before damage to a Matroska file itself.

  libav skips it without a word. Decoders such as that of VP8 do not notice that
  the frames are missing to which others refer.

  Args:
    packets: the packets, read from the beginning of standard input.
    container: the file.

  Raises:
    Damaged: at the end of these packets, if the file is damaged.
  """
  end = math.inf
  if container.format.name.startswith("matroska"):
    end = _end_of_matroska(os.fstat(0).st_size)
  for packet in packets:
    if packet.pos is not None and packet.pos >= end:
      break
    yield packet
  if end < math.inf:
    raise Damaged(f"the file is damaged behind byte {end}")


# Elements that a file may be cut in: a block, a group of them, padding, and
# SeekHead, Info, Tracks, Cues, Attachments, Chapters and Tags.
_LONG = (
  *(b"\xa3", b"\xa0", b"\xec", b"\x11M\x9bt", b"\x15I\xa9f", b"\x16T\xaek"),
  *(b"\x1cS\xbbk", b"\x19A\xa4i", b"\x10C\xa7p", b"\x12T\xc3g"),
)
# Bytes of name and size.
_MAX_HEADER = 12
_EBML, _SEGMENT, _CLUSTER = b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\x1fC\xb6u"


def _end_of_matroska(size: int) -> float:
  """Returns the last element before bytes that are none of Matroska's.

  The damage may begin within that element.

  Args:
    size: bytes of the file, which is standard input.

  Returns:
    Its first byte. inf if there are no such bytes, also where the file was cut,
    or something was appended.
  """
  at = last = 0
  segment_end = cluster_end = math.inf
  while at + _MAX_HEADER < size:
    name, start, end = _element(at)
    if name == _SEGMENT:
      at, segment_end, cluster_end = start, end, start
      continue
    if name == _CLUSTER:
      at, cluster_end = start, end
      continue
    most = cluster_end if at < cluster_end else segment_end
    if name == _EBML:
      most = math.inf
    elif at >= segment_end:
      return math.inf
    if name not in _LONG:
      most = min(most, size)
    if end > most or end == math.inf:
      return last
    at, last = int(end), at
  return math.inf


def _element(at: int) -> tuple[bytes, int, float]:
  """Returns name, first byte of the content, and end of an EBML element.

  The end is inf if the size is unknown, or if there is no element.
  """
  data = os.pread(0, _MAX_HEADER, at)
  # The number of leading zeros tells the number of bytes.
  name_bytes, num_bytes = 9 - data[0].bit_length(), 0
  if name_bytes <= 4:
    num_bytes = 9 - data[name_bytes].bit_length()
  start = at + name_bytes + num_bytes
  if not 0 < num_bytes <= 8:
    return b"", at + 1, math.inf
  bits = 7 * num_bytes
  size = int.from_bytes(data[name_bytes : name_bytes + num_bytes], "big")
  size &= (1 << bits) - 1
  is_unknown = size == (1 << bits) - 1
  return data[:name_bytes], start, math.inf if is_unknown else start + size


class Beginning:
  """The first group of pictures of a video that may be cut without encoding.

  Such a cut leaves frames that refer to missing ones: those before the first
  key frame, and those after it that are shown before it. They are left out, as
  players do; also where recordings were joined, if the later one begins with a
  key frame.

  Args:
    packets: the packets of the stream.
    clock: clock of the file.

  Attributes:
    num_left_out: frames that are left out so far.
    is_open: True if H.264 frames after the first key frame may refer to frames
      before it. The decoder may then report errors with good frames.
  """

  def __init__(self, packets: Iterator, clock: Clock) -> None:
    self.num_left_out = 0
    self._packets = packets
    self._clock = clock
    self._first = None
    for packet in packets:
      self._first = packet
      if packet.is_keyframe or not packet.size:
        break
      self.num_left_out += 1
    self._key_time = self._first and self._first.pts
    self.is_open = self._first is not None and _is_open(self._first)
    # Of the latest part of the file.
    self._num_groups, self._is_open_part = 0, self.is_open
    self._is_later = False

  def packets(self) -> Iterator:
    """Yields the packets from the first key frame on."""
    first = [] if self._first is None else [self._first]
    part = first and self._clock.part_of(first[0])
    begins_at = None
    for packet in itertools.chain(first, self._packets):
      if self._clock.part_of(packet) != part:
        part, begins_at = self._clock.part_of(packet), None
        if packet.is_keyframe:
          begins_at, self._is_later = packet.pts, True
          self._num_groups, self._is_open_part = 0, _is_open(packet)
      self._num_groups += packet.is_keyframe
      if _is_before(packet.pts, begins_at):
        self.num_left_out += 1
        continue  # its time is that of a frame of the recording before it
      if self._is_leading(packet.pts) and not packet.is_discard:
        self.num_left_out += 1
      yield packet

  def allows_errors(self) -> bool:
    """Returns True if errors in the latest packet may come from a cut."""
    return self._is_open_part and self._num_groups < 2

  def is_joined(self, packet) -> bool:
    """Returns True for the first packet of a later recording.

    The decoder has to begin anew there: it may hold frames of the earlier one,
    which it would lose in an error, or order by the numbers of both.
    """
    return self._is_later and packet.is_keyframe and self._num_groups == 1

  def add(self, frame) -> bool:
    """Returns True if a frame is good; call it for each frame in order."""
    is_leading = self._is_leading(frame.pts)
    if frame.is_corrupt and self.allows_errors():
      self.num_left_out += not is_leading
      return False
    self.num_left_out -= is_leading
    return True

  def _is_leading(self, time: int | None) -> bool:
    return _is_before(time, self._key_time)


def _is_before(time: int | None, other: int | None) -> bool:
  return None not in (time, other) and time < other


_H264_SLICE, _H264_IDR_SLICE = 1, 5


def _is_open(packet) -> bool:
  """Returns True for an H.264 key frame that is not an IDR picture."""
  codec = packet.stream.codec_context
  if codec.name != "h264":
    return False
  data, header = bytes(packet), codec.extradata or b""
  starts = []
  if header[:1] == b"\1":  # units with their lengths before them, as in MP4
    num_bytes = (header[4] & 3) + 1
    at = 0
    while at + num_bytes < len(data):
      starts.append(at + num_bytes)
      at += num_bytes + int.from_bytes(data[at : at + num_bytes], "big")
  else:
    starts = [match.end() for match in re.finditer(b"\0\0\1(?=.)", data, re.S)]
  kinds = {data[start] & 31 for start in starts}
  return _H264_SLICE in kinds and _H264_IDR_SLICE not in kinds


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
      queue = before_damage(queue, container)
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
    queue = before_damage(queue, self._container)
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


# --- Times --------------------------------------------------------------------


def may_be_joined(container) -> bool:
  """Returns True for formats of recordings that are joined byte by byte."""
  return bool(container.format.flags & _TIMES_MAY_START_AGAIN)


class Clock:
  """Makes the times of a file continuous if they start again.

  They start again in recordings that were joined byte by byte, or when a camera
  restarts its counter. Each restart begins a part; within a part, all streams
  are shifted by the same number of seconds.

  Args:
    container: the open file.
    streams: streams to follow; the same ones for pictures and sound.

  Attributes:
    streams: as above.
    may_leap: see `may_be_joined`.
    num_restarts: how often times have started again.
  """

  def __init__(self, container, *streams) -> None:
    self.streams = [stream for stream in streams if stream is not None]
    self.may_leap = may_be_joined(container)
    self.begin()

  def begin(self) -> None:
    """Starts anew, for a file that is read again from its beginning."""
    # Seconds to add, for each part.
    self._shifts = [0.0]
    # Part of the latest packet of each stream.
    self._part: dict[int, int] = {}
    # When the latest packet of each stream is decoded.
    self._last: dict[int, float] = {}
    # When all packets have been shown.
    self._end = 0.0

  @property
  def num_restarts(self) -> int:
    return len(self._shifts) - 1

  def part_of(self, packet) -> int:
    """Returns the part of the latest packet of a stream, given that packet."""
    return self._part.get(packet.stream.index, 0)

  def adjust(self, packet) -> None:
    """Shifts the times of a packet; call it for each packet in order."""
    index = packet.stream.index
    # Packets are in the order of decoding, whose times ascend. Where the file
    # has none for a packet, its presentation is not before its decoding.
    time = packet.dts if packet.dts is not None else packet.pts
    # Packets that an edit list leaves out have times of before or after it.
    if time is not None and not packet.is_discard:
      secs = float(time * packet.time_base)
      shown_at = time if packet.pts is None else packet.pts
      shown_secs = float(shown_at * packet.time_base)
      if self._begins_part(index, secs):
        self._part[index] = self._next_part(index, shown_secs)
      shift = self._shifts[self._part[index]]
      duration = float((packet.duration or 0) * packet.time_base)
      self._end = max(self._end, shown_secs + shift + duration)
      if packet.dts is not None:
        self._last[index] = secs + shift
    shift = self._shifts[self.part_of(packet)]
    if shift:
      ticks = round(shift / packet.time_base)
      if packet.pts is not None:
        packet.pts += ticks
      if packet.dts is not None:
        packet.dts += ticks

  def _begins_part(self, index: int, secs: float) -> bool:
    if index not in self._part:
      return True
    secs += self._shifts[self._part[index]]
    if secs < self._last.get(index, -math.inf) - MAX_STEP_BACK_SECS:
      return True
    # In all streams: one alone may have a gap.
    return self.may_leap and secs > self._end + MAX_LEAP_SECS

  def _next_part(self, index: int, shown_secs: float) -> int:
    """Returns the part of a packet that is not of its stream's present part."""
    later = range(self._part.get(index, -1) + 1, len(self._shifts))
    if not later:
      # A part begins with a key frame, which is shown first.
      self._shifts.append(self._end - shown_secs)
      return len(self._shifts) - 1
    # The one that other streams are in: this one may lack some parts.
    gap = self._end - shown_secs
    return min(later, key=lambda part: abs(self._shifts[part] - gap))
