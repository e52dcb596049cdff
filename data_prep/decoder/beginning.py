"""Videos that were cut without encoding begin with frames that lack others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from data_prep.decoder.clock import Clock


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
