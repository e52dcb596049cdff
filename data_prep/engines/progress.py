"""Progress bars for many videos or files of different sizes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from data_prep import storage
from data_prep.video import video_to_records
from marlin_jax.records import folders

if TYPE_CHECKING:
  from data_prep.output.ledger import Entry
  from data_prep.sources.manifest import Source


class TaskBar:
  """Progress bar with the time left; a context manager.

  It advances by the bytes of the tasks' files, which are known in advance and
  larger for longer videos.
  """

  def __init__(self, sizes: Sequence[int], noun: str = "video") -> None:
    """Shows the bar.

    Args:
      sizes: size of each task in bytes, at least 1.
      noun: name of a task.
    """
    from tqdm import tqdm

    self._sizes = sizes
    self._noun = noun
    self._shares = [0.0] * len(sizes)
    self._num_done = 0
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      desc=self._description(),
      total=sum(sizes),
      bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
      "{postfix}",
      dynamic_ncols=terminal,
      # A log file gets a line every 30 seconds.
      mininterval=0.2 if terminal else 30.0,
      disable=not sizes,
    )

  def advance(self, number: int, share: float) -> None:
    """Sets the finished share of a task, in [0, 1]."""
    # A share may fall, if a container announces too few frames.
    gained = max(share - self._shares[number], 0.0)
    self._shares[number] += gained
    # Rounding must not move the bar beyond its end.
    left = self._bar.total - self._bar.n
    self._bar.update(min(gained * self._sizes[number], left))

  def finish(self, number: int) -> None:
    """Counts a task as finished."""
    self._num_done += 1
    self._bar.set_description_str(self._description(), refresh=False)
    self.advance(number, 1.0)

  def note(self, text: str) -> None:
    """Shows a text behind the bar."""
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(0)  # which draws at most every mininterval

  def _description(self) -> str:
    return f"{self._num_done}/{len(self._sizes)} {self._noun}s"

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      # The sum of rounded shares may stop short of the end.
      self._bar.update(self._bar.total - self._bar.n)
    self._bar.close()


class ProgressBar(TaskBar):
  """TaskBar of data_prep.prepare; counts frames and outcomes of videos."""

  def __init__(self, todo: list[Source]) -> None:
    super().__init__([_size(source) for source in todo])
    self._frames = [0.0] * len(todo)
    # A running sum: adding a million numbers at every report takes longer than
    # the work itself.
    self._num_frames = 0.0
    self._statuses: Counter[str] = Counter()
    self._started_at = time.monotonic()
    self._show()

  def report(self, task: int, share: float, num_frames: float) -> None:
    """Sets the finished share, and finished frames, of a video."""
    self._count(task, num_frames)
    self.advance(task, share)

  def done(self, task: int, entry: Entry) -> None:
    """Counts the outcome of a video."""
    self._statuses[entry.status] += 1
    self._count(task, entry.num_decoded_frames)
    self.finish(task)

  def _count(self, task: int, num_frames: float) -> None:
    self._num_frames += num_frames - self._frames[task]
    self._frames[task] = num_frames
    self._show()

  def _show(self) -> None:
    rate = self._num_frames / max(time.monotonic() - self._started_at, 1e-6)
    statuses = (
      video_to_records.KEPT,
      video_to_records.QUARANTINED,
      video_to_records.NO_FACE,
      video_to_records.FAILED,
    )
    counts = [
      f"{self._statuses[status]} {status}"
      for status in statuses
      if status != video_to_records.FAILED or self._statuses[status]
    ]
    self.note(", ".join([f"{rate:.0f} frames/s", *counts]))


def _size(source: Source) -> int:
  if folders.is_remote(source.path):
    return 1  # asking a bucket for each of a million sizes takes hours
  try:
    return max(storage.size(source.path), 1)
  except OSError:
    return 1
