"""Messages between a decoder process and its parent, and their limits.

A message is a kind (one byte), a length, and a body of that length:
  L  JSON: the layers of the sandbox, see `sandbox.enter`; once, first
  I  JSON: width, height, orientation, rate, announced_frames; before the
     frames, and again where their size changes
  F  time in seconds, bytes per row, rows of RGB; once per frame
  T  JSON: rate, num_channels; once, before original sound
  S  16-bit little-endian samples, channels interleaved; many
  W  a note on the video, for the user; at any time
  E  empty: the video has ended; last
  D  how the video is damaged; what was sent is good; last
  X  why the video is refused; last
  H  why the machine could not read it; the video may be good; last
  N  why no video can be decoded on this machine; last
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from typing import NamedTuple

# What the parent asks for: the frames of a file (whose size may change in a
# changing video; a picture is one frame), its sound, or nothing; or else the
# frame rate of a folder of pictures.
VIDEO, CHANGING_VIDEO, PROBE = "video", "changing_video", "none"
PICTURE = "picture"
SOUND, ORIGINAL_SOUND = "sound", "original_sound"
FILES = (VIDEO, CHANGING_VIDEO, PICTURE, SOUND, ORIGINAL_SOUND, PROBE)

SAMPLE_RATE = 16_000
# Two hours: 230 MB of samples in the parent.
MAX_SOUND_SECS = 7200

MESSAGE = struct.Struct("<cI")
FRAME = struct.Struct("<dI")


class Span(NamedTuple):
  """A span of a video.

  Attributes:
    start: time in seconds of its first frame.
    end: time in seconds from which on frames are no longer part of it.
  """

  start: float = 0.0
  end: float = math.inf


WHOLE = Span()


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits on what one video may cost.

  Attributes:
    frame_pixels: width x height of one frame; the default allows 4096x2304.
    frames: frames per video; the default is an hour at 60 frames per second.
    video_pixels: pixels of all frames together; the default is an hour of
      1920x1080 at 60 frames per second, which a black video of a few MB may
      have.
    secs: seconds that the caller waits for the decoder in one pass; the
      caller's own work does not count.
    memory_bytes: address space of the decoder process.
  """

  frame_pixels: int = 4096 * 2304
  frames: int = 216_000
  video_pixels: int = 1920 * 1080 * 216_000
  secs: float = 300.0
  memory_bytes: int = 2 << 30


DEFAULT_LIMITS = Limits()
# A picture may have this many times the pixels of a frame of a video: cameras
# of phones have 50 megapixels.
PICTURE_FACTOR = 8


class Refused(Exception):
  """A video is refused; the message is the reason."""


class Damaged(Refused):
  """A video is damaged; what was decoded before is good."""


class Tally:
  """Counts frames, whose size may change, against the limits."""

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    self._num_frames = self._num_pixels = 0

  def add(self, width: int, height: int) -> str:
    """Counts a frame; returns the reason for refusing it, or ''."""
    self._num_frames += 1
    self._num_pixels += width * height
    if (
      self._num_frames > self._limits.frames
      or self._num_pixels > self._limits.video_pixels
    ):
      return too_many_frames(width, height, self._limits)
    return ""


def most_frames(width: int, height: int, limits: Limits) -> int:
  """Returns the largest number of frames of this size within the limits."""
  return min(limits.frames, limits.video_pixels // (width * height))


def too_many_frames(width: int, height: int, limits: Limits) -> str:
  """Returns the reason for refusing a video of too many frames."""
  most = most_frames(width, height, limits)
  return f"more frames of {width}x{height} than the limit of {most}"


def too_large(width: int, height: int, limits: Limits) -> str:
  """Returns the reason for refusing frames of this size, or ''."""
  if width * height <= limits.frame_pixels:
    return ""
  return (
    f"frames of {width}x{height} are over the limit of "
    f"{limits.frame_pixels} pixels"
  )


def send(pipe: int, kind: bytes, *parts) -> None:
  """Writes a message."""
  length = sum(len(part) for part in parts)
  for part in (MESSAGE.pack(kind, length), *parts):
    view = memoryview(part)
    while len(view):
      view = view[os.write(pipe, view) :]
