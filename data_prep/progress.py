"""How far a run is: videos, frames and time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from data_prep import storage

if TYPE_CHECKING:
  from data_prep.ledger import Entry
  from data_prep.manifest import Source


class ProgressBar:
  """Shows videos, frames and time left; a context manager.

  The bar counts bytes of video files: unlike frames they are known at once,
  and unlike videos they tell a long one from a short one.
  """

  def __init__(self, todo: list[Source]) -> None:
    from tqdm import tqdm

    self._sizes = [_size(source) for source in todo]
    self._shares = [0.0] * len(todo)
    self._frames = [0.0] * len(todo)
    # To add a million numbers at every report takes longer than the work.
    self._num_frames = 0.0
    self._statuses: Counter[str] = Counter()
    self._started_at = time.monotonic()
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      desc=f"0/{len(todo)} videos",
      total=sum(self._sizes),
      bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
      "{postfix}",
      dynamic_ncols=terminal,
      # A log file gets a line now and then, not ten a second.
      mininterval=0.2 if terminal else 30.0,
      disable=not todo,
    )
    self._show()

  def report(self, task: int, share: float, num_frames: float) -> None:
    """Notes the share of a video, and its frames, that are done."""
    self._note_frames(task, num_frames)
    self._advance(task, share)

  def done(self, task: int, entry: Entry) -> None:
    self._note_frames(task, entry.num_decoded_frames)
    self._statuses[entry.status] += 1
    self._advance(task, 1.0)

  def _note_frames(self, task: int, num_frames: float) -> None:
    self._num_frames += num_frames - self._frames[task]
    self._frames[task] = num_frames

  def _advance(self, task: int, share: float) -> None:
    # A container that announced too few frames must not turn the bar back.
    gained = max(share - self._shares[task], 0.0)
    self._shares[task] += gained
    self._show()
    self._bar.update(gained * self._sizes[task])

  def _show(self) -> None:
    from data_prep import process

    num_done = self._statuses.total()
    self._bar.set_description_str(
      f"{num_done}/{len(self._sizes)} videos", refresh=False
    )
    rate = self._num_frames / max(time.monotonic() - self._started_at, 1e-6)
    counts = ", ".join(
      f"{self._statuses[status]} {status}"
      for status in (process.KEPT, process.QUARANTINED, process.NO_FACE)
    )
    self._bar.set_postfix_str(f"{rate:.0f} frames/s, {counts}", refresh=False)

  def __enter__(self) -> ProgressBar:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      # Shares were added up in floating point.
      self._bar.update(self._bar.total - self._bar.n)
    self._bar.close()


def _size(source: Source) -> int:
  if storage.is_remote(source.path):
    return 1  # asking for each of a million takes hours
  try:
    return max(storage.size(source.path), 1)
  except OSError:
    return 1
