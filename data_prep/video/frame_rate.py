"""Frames of any rate, constant or not, as frames of one constant rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_prep.video.decode import DecodeError

# Times are rounded in containers, to milliseconds in some: a frame counts as
# shown from this share of a new frame's duration before its time on.
TOLERANCE = 0.25
# A longer pause between two frames is a fault of the times: to fill it would
# mean thousands of repeated frames.
MAX_PAUSE_SECS = 60.0


def resampled(
  frames: Iterable[tuple[np.ndarray, float]], rate: float
) -> Iterator[tuple[np.ndarray, float]]:
  """Yields the frame that is shown at every 1/rate seconds.

  Pictures are repeated or left out, never mixed. Frames that come at that rate
  pass as they are. The clock starts with the first frame.

  Args:
    frames: pictures and their times in seconds, in order.
    rate: frames per second that are wanted.

  Raises:
    DecodeError: a pause is longer than MAX_PAUSE_SECS.
  """
  shown: np.ndarray | None = None
  start = last = duration = 0.0
  num = 0
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
    while shown is not None and start + (num + TOLERANCE) / rate < secs:
      yield shown, start + num / rate
      num += 1
    shown, last = frame, secs
  # The last frame is shown for as long as the one before, one time at least.
  while shown is not None and (
    start + (num + TOLERANCE) / rate < last + duration or num == 0
  ):
    yield shown, start + num / rate
    num += 1
