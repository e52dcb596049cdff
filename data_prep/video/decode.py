"""Decodes videos in a child process that can be killed at any moment.

The child, `decoder.process`, is the only module that opens a container. It
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

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.decoder.child import KILLED as KILLED
from data_prep.decoder.child import DamageError, DecodeError, Decoder
from data_prep.decoder.child import DecoderSetupError as DecoderSetupError
from data_prep.decoder.child import HostError as HostError
from data_prep.decoder.child import sandbox_summary as sandbox_summary
from data_prep.decoder.protocol import (
  CHANGING_VIDEO,
  DEFAULT_LIMITS,
  FRAME,
  MAX_SOUND_SECS,
  ORIGINAL_SOUND,
  PICTURE,
  PICTURE_FACTOR,
  PROBE,
  SAMPLE_RATE,
  SOUND,
  VIDEO,
  WHOLE,
  Limits,
  Span,
  Tally,
  too_large,
)
from data_prep.sources.files import is_picture

if TYPE_CHECKING:
  import numpy as np


# Rows of a decoded picture are padded to the width of a vector register.
MAX_ROW_PADDING = 256
MAX_SOUND_RATE = 768_000


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
  span: Span = WHOLE,
  may_change_size: bool = False,
  keep_damaged: bool = False,
) -> Video:
  """Starts the decoder and reads the video's header.

  Args:
    path: a file; never read as an address or a pattern. A picture is a video
      of one frame, without a rate. With a frame rate, a folder whose pictures
      are the frames, ordered by the numbers in their names.
    limits: what the video may cost.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
    require_sandbox: refuse to decode where a layer of the sandbox is missing.
    span: frames to read; not for a folder of pictures.
    may_change_size: read frames of another size than the first, too.
    keep_damaged: end a damaged video before the damage, with a note.

  Returns:
    The video, a context manager: leaving it ends the decoder.

  Raises:
    DecodeError: the file is not a video that can be opened, or is over a limit.
    HostError: the machine could not read it; the video may be good.
    DecoderSetupError: PyAV does not load, or the sandbox is not whole.
  """
  return Video(
    path,
    limits,
    frame_rate,
    require_sandbox,
    span,
    may_change_size,
    keep_damaged,
  )


def read_sound(
  path: str | os.PathLike,
  limits: Limits = DEFAULT_LIMITS,
  require_sandbox: bool = False,
  end_secs: float = math.inf,
  on_damage: Callable[[str], None] | None = None,
) -> np.ndarray:
  """Decodes the sound track of a video: the default one, or the first.

  Args:
    path: a video file.
    limits: what the video may cost.
    require_sandbox: as for `open_video`.
    end_secs: end of what is needed: the sound ends there or somewhat later.
    on_damage: called with the reason where the sound is damaged; what was
      decoded before is then returned.

  Returns:
    int16 (S,), 16 kHz, all channels mixed into one. Sample 0 is at time 0 of
    the frames; where the track begins later or has gaps, samples are 0. Empty
    where there is no sound track.

  Raises:
    DecodeError: the file is not a video that can be opened, or is over a limit;
      or its sound is damaged or longer than MAX_SOUND_SECS.
    DecoderSetupError: as for `open_video`.
  """
  import numpy as np

  most_bytes = 2 * SAMPLE_RATE * MAX_SOUND_SECS
  samples = bytearray()
  span = Span(end=end_secs)
  with Decoder(path, limits, SOUND, require_sandbox, span) as child:
    while True:
      try:
        kind, length = child.read_header()
      except DamageError as e:
        if on_damage is None:
          raise
        on_damage(str(e))
        break
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


def sandbox_layers(require_sandbox: bool = False) -> dict[str, str]:
  """Starts a decoder without a file, and returns the layers of its sandbox.

  Args:
    require_sandbox: as for `open_video`.

  Returns:
    For each layer of the module `sandbox` an empty string where it holds on
    this machine, else the reason why it does not.

  Raises:
    DecoderSetupError: as for `open_video`.
  """
  with Decoder(os.devnull, DEFAULT_LIMITS, PROBE, require_sandbox) as child:
    return child.layers


class Sound(Decoder):
  """An open sound track; made by `open_sound`, iterated once.

  Attributes:
    rate: samples per second, as in the file.
    num_channels: C, 1 or 2; more channels are mixed into two.
  """

  def __init__(self, path: str | os.PathLike, limits: Limits) -> None:
    super().__init__(path, limits, ORIGINAL_SOUND)
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
    """Yields consecutive parts of the samples, int16 (S, C).

    The first sample is at the same time as that of `read_sound`.

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


class Video(Decoder):
  """An open video; made by `open_video`, iterated once.

  Attributes:
    info: the latest header; the size of the frames may change.
    notes: notes on the video for the user, received so far.
    num_frames: frames decoded so far.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    limits: Limits,
    frame_rate: float,
    require_sandbox: bool,
    span: Span,
    may_change_size: bool,
    keep_damaged: bool,
  ) -> None:
    output = CHANGING_VIDEO if may_change_size else VIDEO
    if frame_rate:
      output = str(frame_rate)
    elif is_picture(path):
      output = PICTURE
      most_pixels = PICTURE_FACTOR * limits.frame_pixels
      limits = dataclasses.replace(limits, frame_pixels=most_pixels)
    super().__init__(path, limits, output, require_sandbox, span)
    self._has_fixed_rate = frame_rate > 0
    self._may_change_size = may_change_size
    self._keep_damaged = keep_damaged
    self._tally = Tally(limits)
    self._secs: list[float] = []
    # Frames before the latest header.
    self._num_before = 0
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
    """Share of the frames decoded so far, at most 1; 0 if it is unknown."""
    announced = self.info.announced_frames
    return (
      self.num_frames / max(self.num_frames, announced) if announced else 0.0
    )

  @property
  def fps(self) -> float:
    """Average rate of the frames decoded so far, in frames per second.

    The container's rate is returned unless the times of the frames differ from
    it by more than 5% (a variable rate, a wrong or missing header); 0.0 if
    neither is known. A folder of pictures has the rate it was opened with.
    """
    rate = self.info.rate
    duration = max(self._secs, default=0.0) - min(self._secs, default=0.0)
    if duration <= 0 or self._has_fixed_rate:
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
      try:
        kind, length = self.read_header()
      except DamageError as e:
        if not (self._keep_damaged and self.num_frames):
          raise
        self.notes.append(self._salvage(e))
        return
      if kind == b"E":
        return
      is_change = self._may_change_size and self.num_frames > self._num_before
      if kind == b"I" and is_change:
        self._take_header(self.read_json(length))
        self._num_before = self.num_frames
      else:
        yield self._read_frame(kind, length)

  def _salvage(self, damage: DamageError) -> str:
    """Returns a note on what is lost of a damaged video."""
    number = str(self.num_frames)
    if self.info.announced_frames > self.num_frames:
      number += f" of {self.info.announced_frames}"
    return f"cut before damage: {number} frames are left; {damage}"

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
    if reason := self._tally.add(width, height):
      raise DecodeError(reason)
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
