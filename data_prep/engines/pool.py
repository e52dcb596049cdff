"""Processes videos to parts on the cores of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep import storage
from data_prep.engines import workers
from data_prep.engines.progress import ProgressBar
from data_prep.output import ledger, shards
from data_prep.sources.manifest import Source
from data_prep.video import decode, video_to_records
from data_prep.video.video_to_records import FAILED, QUARANTINED, Outcome
from marlin_jax.records import cgroups

# Videos after which a worker is replaced. This bounds what native libraries
# leak; opening the models again costs a few hundredths of a second per video.
VIDEOS_PER_WORKER = 50
# Time beyond the decoder's limit after which a silent worker counts as hung.
EXTRA_STALL_SECS = 300.0
# Least number of bytes that a worker may allocate, in addition to the frames it
# keeps. It needs 0.7 GB: libraries, models, tracks.
MIN_WORKER_BYTES = 2 << 30
# Tries of a video that fails for reasons of the machine; in the last one no
# other video is processed.
NUM_TRIES = 3


def run(
  output: Path,
  todo: list[Source],
  settings: video_to_records.Settings,
  num_workers: int,
  bar: ProgressBar | None = None,
) -> Iterator[ledger.Entry]:
  """Processes videos; yields the ledger line of each as it is finished.

  A video that fails because of the machine is tried again after all others,
  NUM_TRIES times in all. If its last try fails too, the video counts as failed;
  or as quarantined, if it crashed its worker or its decoder was killed.

  Args:
    output: folder of the data set.
    todo: videos to process.
    settings: settings of the records.
    num_workers: number of videos processed at the same time.
    bar: progress bar to update; None for no bar.

  Raises:
    workers.WorkerError: this machine cannot process any video.
  """
  left = [*enumerate(todo)]
  with bar or contextlib.nullcontext():
    for tries_left in reversed(range(NUM_TRIES)):
      tasks, left = left, []
      videos = [source for _, source in tasks]
      num = num_workers if tries_left else 1
      with contextlib.closing(_start(output, videos, settings, num)) as events:
        for event in events:
          number, source = tasks[event.task]
          if event.kind == "report":
            if bar is not None:
              bar.report(number, *event.value)
            continue
          entry = event.value
          if event.kind == "died":
            outcome = Outcome(FAILED, event.value)
            entry = ledger.Entry.of(source, settings, outcome)
          if entry.is_failed and tries_left:
            left.append((number, source))
            continue
          if event.is_crash or entry.reason == decode.KILLED:
            entry = _quarantine(output, source, settings, entry.reason)
          if bar is not None:
            bar.done(number, entry)
          yield entry


def _start(
  output: Path,
  videos: list[Source],
  settings: video_to_records.Settings,
  num_workers: int,
) -> Iterator[workers.Event]:
  return workers.run_tasks(
    videos,
    open_work,
    (output, settings, _memory_of(num_workers)),
    num_workers=num_workers,
    tasks_per_worker=VIDEOS_PER_WORKER,
    stall_secs=settings.limits.secs + EXTRA_STALL_SECS,
  )


def _memory_of(num_workers: int) -> int:
  """Returns the number of bytes that each worker may allocate."""
  least = MIN_WORKER_BYTES + video_to_records.KEPT_BYTES
  return max(cgroups.usable_memory() // num_workers, least)


def _quarantine(
  output: Path,
  source: Source,
  settings: video_to_records.Settings,
  reason: str,
) -> ledger.Entry:
  """Writes the part of a video that ends its process whenever it is tried."""
  reason = f"in the last of {NUM_TRIES} tries, alone: {reason}"
  entry = ledger.Entry.of(source, settings, Outcome(QUARANTINED, reason))
  with shards.PartWriter(shards.Part(output, entry.video_id)) as part:
    part.commit(entry)
  return entry


@contextlib.contextmanager
def open_work(
  task_settings: tuple[Path, video_to_records.Settings, int],
) -> Iterator[Any]:
  """Opens the models in a worker; yields a function that processes a video.

  The function writes the part of a source, unless it failed, and returns its
  ledger line.

  Args:
    task_settings: output folder, settings of the records, and bytes that the
      worker may allocate. With more, its video fails; without a limit, the
      kernel would kill any process of the machine.
  """
  import cv2

  # There is one worker per core already.
  cv2.setNumThreads(1)
  output, settings, max_bytes = task_settings
  _, most = resource.getrlimit(resource.RLIMIT_DATA)
  if most != resource.RLIM_INFINITY:
    max_bytes = min(max_bytes, most)
  resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, most))

  def work(source: Source, report: Callable[[Any], None]) -> ledger.Entry:
    with shards.PartWriter(shards.Part(output, source.video_id)) as part:
      entry = _process(
        source,
        settings,
        models,
        emit=part.add,
        progress=lambda share, num_frames: report((share, num_frames)),
      )
      if not entry.is_failed:
        part.commit(entry)
    return entry

  with video_to_records.Models(settings.parser) as models:
    yield work


def _process(
  source: Source,
  settings: video_to_records.Settings,
  models: video_to_records.Models,
  emit: Callable[[bytes], None],
  progress: video_to_records.Progress,
) -> ledger.Entry:
  """Processes a video; copies it first if it is in a bucket."""
  with contextlib.ExitStack() as stack:
    try:
      path = stack.enter_context(storage.local(source.path))
    except OSError as e:
      outcome = Outcome(FAILED, f"cannot fetch: {e}")
      return ledger.Entry.of(source, settings, outcome)
    source = dataclasses.replace(source, path=path)
    outcome = video_to_records.process_video(
      source, settings, models, emit, progress
    )
    return ledger.Entry.of(source, settings, outcome)
