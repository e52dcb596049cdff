"""Resamples frames of any rate, constant or variable, to a constant rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_prep.video.decode import DecodeError

# Containers round times, some of them to milliseconds: a frame counts as shown
# this share of a new frame's duration before its time.
TOLERANCE = 0.25
# A longer pause between two frames is an error in the times: filling it would
# repeat thousands of frames.
MAX_PAUSE_SECS = 60.0


def resampled(
  frames: Iterable[tuple[np.ndarray, float]], rate: float
) -> Iterator[tuple[np.ndarray, float]]:
  """Yields the frame that is shown at every 1/rate seconds, and that time.

  Frames are repeated or left out, never mixed. Frames of that rate are not
  changed. The clock starts with the first frame.

  Args:
    frames: frames and their times in seconds, in order.
    rate: frames per second of the result.

  Raises:
    DecodeError: a pause is longer than MAX_PAUSE_SECS.
  """
  shown: np.ndarray | None = None
  start = last = duration = 0.0
  num_frames = 0
  for frame, secs in frames:
    if shown is None:
      start = secs
    else:
      duration = secs - last
      if duration > MAX_PAUSE_SECS:
        raise DecodeError(
          f"a pause of {duration:.0f} s between two frames, at {last:.1f} s; "
          f"the most is {MAX_PAUSE_SECS:.0f} s"
        )
    while shown is not None and start + (num_frames + TOLERANCE) / rate < secs:
      yield shown, start + num_frames / rate
      num_frames += 1
    shown, last = frame, secs
  # The last frame is shown for as long as the one before, and at least once.
  while shown is not None and (
    start + (num_frames + TOLERANCE) / rate < last + duration or num_frames == 0
  ):
    yield shown, start + num_frames / rate
    num_frames += 1
