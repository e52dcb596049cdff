"""The clock of a file: times that start again become continuous."""

from __future__ import annotations

import math

# Decoding times ascend, except for rounding errors; the limit is FFmpeg's.
MAX_STEP_BACK_SECS = 0.1
# In broadcast formats, a longer leap is a restart of the clock, not a pause.
MAX_LEAP_SECS = 10.0
_TIMES_MAY_START_AGAIN = 0x0200  # AVFMT_TS_DISCONT


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
