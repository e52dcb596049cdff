"""How far a run is: videos, frames and time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from data_prep import storage

if TYPE_CHECKING:
  from data_prep.output.ledger import Entry
  from data_prep.sources.manifest import Source


class VideoBar:
  """Shows how many videos are done and the time left; a context manager.

  The bar counts bytes of video files: unlike frames they are known at once,
  and unlike videos they tell a long one from a short one.
  """

  def __init__(self, num_bytes: Sequence[int]) -> None:
    """Starts the bar.

    Args:
      num_bytes: the size of each video, at least 1.
    """
    from tqdm import tqdm

    self._sizes = num_bytes
    self._shares = [0.0] * len(num_bytes)
    self._num_done = 0
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      desc=f"0/{len(num_bytes)} videos",
      total=sum(num_bytes),
      bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
      "{postfix}",
      dynamic_ncols=terminal,
      # A log file gets a line now and then, not ten a second.
      mininterval=0.2 if terminal else 30.0,
      disable=not num_bytes,
    )

  def advance(self, number: int, share: float) -> None:
    """Notes the share of a video that is done."""
    # A container that announced too few frames must not turn the bar back.
    gained = max(share - self._shares[number], 0.0)
    self._shares[number] += gained
    # Shares are added up in floating point: not beyond the end.
    left = self._bar.total - self._bar.n
    self._bar.update(min(gained * self._sizes[number], left))

  def finish(self, number: int) -> None:
    """Notes that a video is dealt with."""
    self._num_done += 1
    self._bar.set_description_str(
      f"{self._num_done}/{len(self._sizes)} videos", refresh=False
    )
    self.advance(number, 1.0)

  def note(self, text: str) -> None:
    """Says something more behind the bar."""
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(0)  # which draws at most every mininterval

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      # Shares were added up in floating point.
      self._bar.update(self._bar.total - self._bar.n)
    self._bar.close()


class ProgressBar(VideoBar):
  """A VideoBar that counts frames and what becomes of videos."""

  def __init__(self, todo: list[Source]) -> None:
    super().__init__([_size(source) for source in todo])
    self._frames = [0.0] * len(todo)
    # To add a million numbers at every report takes longer than the work.
    self._num_frames = 0.0
    self._statuses: Counter[str] = Counter()
    self._started_at = time.monotonic()
    self._show()

  def report(self, task: int, share: float, num_frames: float) -> None:
    """Notes the share of a video, and its frames, that are done."""
    self._count(task, num_frames)
    self.advance(task, share)

  def done(self, task: int, entry: Entry) -> None:
    """Notes what became of a video."""
    self._statuses[entry.status] += 1
    self._count(task, entry.num_decoded_frames)
    self.finish(task)

  def _count(self, task: int, num_frames: float) -> None:
    self._num_frames += num_frames - self._frames[task]
    self._frames[task] = num_frames
    self._show()

  def _show(self) -> None:
    from data_prep.video import video_to_records

    rate = self._num_frames / max(time.monotonic() - self._started_at, 1e-6)
    counts = ", ".join(
      f"{self._statuses[status]} {status}"
      for status in (
        video_to_records.KEPT,
        video_to_records.QUARANTINED,
        video_to_records.NO_FACE,
      )
    )
    self.note(f"{rate:.0f} frames/s, {counts}")


def _size(source: Source) -> int:
  if storage.is_remote(source.path):
    return 1  # asking for each of a million takes hours
  try:
    return max(storage.size(source.path), 1)
  except OSError:
    return 1
