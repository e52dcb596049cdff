"""Decodes sound to the clock of the frames beside it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction

from data_prep.decoder import matroska, packets, sandbox
from data_prep.decoder.clock import Clock
from data_prep.decoder.protocol import (
  MAX_SOUND_SECS,
  SAMPLE_RATE,
  Damaged,
  Refused,
  send,
)

# Smaller gaps, overlaps and drifts are ignored: many containers round times to
# milliseconds.
MIN_GAP_SECS = 0.002


# Sound that is decoded after the end of a span: the spectrogram of its last
# samples needs it.
SECS_BEHIND = 1.0


def decode(pipe: int, is_original: bool, end_secs: float = math.inf) -> None:
  """Writes the sound track to the pipe, nothing where there is none.

  Args:
    pipe: file descriptor.
    is_original: keep its rate, and two channels where it has two or more; else
      convert to 16 kHz, mono.
    end_secs: time from which on sound may be left out, but for SECS_BEHIND.

  Raises:
    Refused: the sound cannot be decoded, or is too long.
    Damaged: it cannot be decoded to its end.
  """
  import av

  with packets.open_input() as container:
    stream = packets.sound_stream(container)
    if stream is not None:
      num_sent = 0
      rate = SAMPLE_RATE
      try:
        for samples in _samples(container, stream, is_original):
          num_channels = samples.layout.nb_channels
          if is_original and not num_sent:
            rate = samples.sample_rate
            info = {"rate": rate, "num_channels": num_channels}
            send(pipe, b"T", json.dumps(info).encode())
          num_sent += samples.samples
          if num_sent > MAX_SOUND_SECS * rate:
            raise Refused(
              f"more sound than the limit of {MAX_SOUND_SECS} seconds"
            )
          num_bytes = 2 * num_channels * samples.samples
          send(pipe, b"S", memoryview(samples.planes[0])[:num_bytes])
          if num_sent > (end_secs + SECS_BEHIND) * rate:
            break
      except (Damaged, av.FFmpegError, ValueError) as e:
        if isinstance(e, MemoryError):
          raise
        secs = num_sent / rate
        raise Damaged(
          f"decoder reported damaged sound after {secs:.1f} s: {e}"
        ) from e
  send(pipe, b"E")


def _samples(container, stream, is_original: bool) -> Iterator:
  """Yields audio frames of 16-bit samples from time 0 on."""
  stream.codec_context.options = {"err_detect": "explode"}
  stream.codec_context.thread_count = 1
  sandbox.forbid_threads()
  try:
    video = packets.video_stream(container)
  except Refused:
    video = None
  clock = Clock(container, video, stream)
  start = Fraction(container.start_time or 0, 1_000_000)
  queue = packets.of_stream(container, stream, clock)
  queue = matroska.before_damage(queue, container)
  rate, layout, num_samples = SAMPLE_RATE, "mono", 0
  # Rate and channels may change where recordings were joined.
  for _, frames in itertools.groupby(packets.frames(queue, stream), _form):
    first = next(frames)
    if is_original and not num_samples:
      rate = first.sample_rate
      layout = "stereo" if first.layout.nb_channels > 1 else "mono"
    # In samples of the input.
    first_pts = round(num_samples * first.sample_rate / rate)
    resampler = _resampler(layout, rate, first_pts)
    times = _Times(first.sample_rate, stream.time_base)
    for frame in itertools.chain([first], frames, [None]):
      if frame is not None:
        secs = None
        if frame.pts is not None:
          secs = frame.pts * frame.time_base - start
        frame.time_base = Fraction(1, frame.sample_rate)
        frame.pts = times.next(secs, frame.samples)
      for samples in _resampled(resampler, frame, first):
        num_samples += samples.samples
        yield samples


def _resampled(resampler, frame, first) -> list:
  """Returns the frames of a resampler, whose first input was `first`."""
  import av

  try:
    return resampler.resample(frame)
  except av.ArgumentError as e:
    num_channels = first.layout.nb_channels
    raise Refused(
      f"sound of {num_channels} channels cannot be mixed: nothing tells where "
      "they are"
    ) from e


def _form(frame) -> tuple[int, str, str]:
  return frame.sample_rate, frame.layout.name, frame.format.name


def _resampler(layout: str, rate: int, first_pts: int):
  """Returns a resampler whose output begins at a time, in its samples."""
  import av

  # async and first_pts insert silence where the track begins late or has a
  # gap, and cut off samples before the first frame.
  return av.AudioResampler(
    "s16",
    layout,
    rate,
    # Any size: without one, audio frames of this format pass unchanged,
    # whatever their times.
    frame_size=4096,
    options={
      "async": "1",
      "first_pts": str(first_pts),
      # `_Times` decides what a gap is.
      "min_comp": "0.0005",
      "min_hard_comp": "0.0005",
    },
  )


class _Times:
  """Times of consecutive samples, in samples.

  Samples follow each other without a break, unless their times say that there
  is a gap or an overlap, or have drifted away from the number of samples.

  Args:
    rate: samples per second.
    time_base: unit of the times of the stream, in seconds.
  """

  def __init__(self, rate: int, time_base: Fraction) -> None:
    self._rate = rate
    self._min_gap = max(MIN_GAP_SECS, 1.5 * float(time_base)) * rate
    self._due: int | None = None

  def next(self, secs: Fraction | None, num_samples: int) -> int | None:
    """Returns the time of the next samples."""
    at = self._due
    if secs is not None:
      exact = round(secs * self._rate)
      if at is None or abs(exact - at) > self._min_gap:
        at = exact
    if at is not None:
      self._due = at + num_samples
    return at
