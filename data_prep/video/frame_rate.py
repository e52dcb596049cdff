"""Resamples frames of any rate, constant or variable, to a constant rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from data_prep.video.decode import DecodeError

# Containers round times, some of them to milliseconds: a frame counts as shown
# this share of a new frame's duration before its time.
TOLERANCE = 0.25
# Longest time for which a frame is repeated. A longer pause is a still, or a
# fault of the times, and not a video of a face.
MAX_PAUSE_SECS = 2.0
# Where every pause is filled, a longer one is an error in the times: filling it
# would repeat thousands of frames.
MAX_FILLED_SECS = 60.0


def resampled(
  frames: Iterable[tuple[np.ndarray, float]],
  rate: float,
  fill_pauses: bool = False,
) -> Iterator[tuple[np.ndarray, float]]:
  """Yields the frame that is shown at every 1/rate seconds, and that time.

  Frames are repeated or left out, never mixed. Frames of that rate are not
  changed. The clock starts with the first frame. A pause is filled for
  MAX_PAUSE_SECS; then the times skip, by a multiple of 1/rate, to its end.

  Args:
    frames: frames and their times in seconds, in order.
    rate: frames per second of the result.
    fill_pauses: fill each pause to its end.

  Raises:
    DecodeError: a pause that is to be filled is longer than MAX_FILLED_SECS.
  """
  most = MAX_FILLED_SECS if fill_pauses else MAX_PAUSE_SECS
  shown: np.ndarray | None = None
  start = last = duration = 0.0
  # Number of the next frame on the clock of the result.
  number = 0
  for frame, secs in frames:
    if shown is None:
      start = secs
    else:
      duration = min(secs - last, most)
      is_skip = secs - last > most
      if is_skip and fill_pauses:
        raise DecodeError(
          f"a pause of {secs - last:.0f} s between two frames, at "
          f"{last:.1f} s; the most is {most:.0f} s"
        )
      stop = last + most if is_skip else secs
      while start + (number + TOLERANCE) / rate < stop:
        yield shown, start + number / rate
        number += 1
      if is_skip:
        number = max(number, math.ceil((secs - start) * rate - TOLERANCE))
    shown, last = frame, secs
  # The last frame is shown for as long as the one before, and at least once.
  while shown is not None and (
    start + (number + TOLERANCE) / rate < last + duration or number == 0
  ):
    yield shown, start + number / rate
    number += 1
