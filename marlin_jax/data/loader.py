"""Input pipeline: records on disk to batches on devices.

The clips of a step are a function of the seed and the step alone (sampling.py),
independent of the number of processes or threads and of earlier restarts. A run
therefore resumes by starting at its step, and no iterator state is saved
(grain's own is tied to the number of workers and accepts another data set
silently).
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from marlin_jax.data.clips import ClipTaker
from marlin_jax.data.prefetch import Batch, Prefetcher
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.reader import BadRecords, ClipBatches
from marlin_jax.data.sampling import Draws, SpreadDraws
from marlin_jax.records import cli

# The batches of an evaluation are few.
_NUM_EVAL_THREADS = 4
# With fewer, threads read as much.
_MIN_CORES_FOR_WORKERS = 4
# Most worker processes per device: they decode about 4,000 clips/s, as many as
# a step of the smallest network takes on the fastest device.
_WORKERS_PER_DEVICE = 20


class Reading(NamedTuple):
  """Threads and processes that read.

  Attributes:
    num_threads: threads, in this process or in each worker.
    num_workers: worker processes; 0: threads of this process read.
  """

  num_threads: int
  num_workers: int = 0

  def __str__(self) -> str:
    threads = cli.counted(self.num_threads, "thread")
    if not self.num_workers:
      return threads
    return f"{self.num_workers} worker processes with {threads} each"


def reading(num_workers: int, num_threads: int) -> Reading:
  """Returns the workers and threads that read for this process.

  By default there is one worker per core but one, if there are accelerators and
  at least four cores. With CPU devices this process reads: the cores compute.

  Args:
    num_workers: worker processes; -1: the default.
    num_threads: threads per worker, or of this process; 0: the default, 2.
  """
  if num_workers < 0:
    devices = jax.local_devices()
    num_cores = cli.num_cores() // _num_processes_that_share_cores()
    num_workers = 0
    if devices[0].platform != "cpu" and num_cores >= _MIN_CORES_FOR_WORKERS:
      num_workers = min(num_cores - 1, _WORKERS_PER_DEVICE * len(devices))
  return Reading(num_threads or 2, num_workers)


def _num_processes_that_share_cores() -> int:
  """Returns the number of training processes on this machine's cores."""
  if cli.num_cores() < (os.cpu_count() or 1):
    return 1  # this process has cores of its own, from Slurm for example
  # On GPU, slice_index differs between machines.
  slices = {d: getattr(d, "slice_index", None) for d in jax.devices()}
  own = slices[jax.local_devices()[0]]
  if own is None or jax.local_devices()[0].platform != "gpu":
    return 1
  return len({d.process_index for d, index in slices.items() if index == own})


def own_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that this process's devices hold.

  Processes whose devices share clips, along mesh.tensor, have the same rows.
  """
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return sorted({i for (rows,) in slices for i in range(batch_size)[rows]})


def train_batches(
  draws: Draws,
  take_clip: ClipTaker,
  *,
  batch_size: int,
  start_step: int,
  num_threads: int,
  num_workers: int = 0,
  num_batches: int | None = None,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of every global batch.

  Reading starts at once. It ends when the iterator is forgotten.

  Args:
    draws: the clips of the run. `draws.num_clips` consecutive clips are from
      one record (repeated sampling: Hoffer et al., CVPR 2020; MAE-ST, NeurIPS
      2022; VideoMAE, NeurIPS 2022); it divides batch_size.
    take_clip: turns records into clips.
    batch_size: clips per step over all processes.
    start_step: steps already taken.
    num_threads: reader threads, in this process or in each worker.
    num_workers: worker processes; 0: threads of this process read.
    num_batches: batches to yield; None: no end.
    rows: rows of this process, from `own_rows`; None: all.
    bad: list for unreadable records, which are then replaced by other records;
      None: the first unreadable record raises.

  Yields:
    Dicts of arrays with one clip per row. Their memory is used again when no
    array of a batch is left.

  Raises:
    DatasetError: a record is unreadable, or `bad` holds more than its limit.
    WorkerError: a worker process died.
  """
  source = ClipBatches(
    draws,
    take_clip,
    batch_size=batch_size,
    rows=range(batch_size) if rows is None else rows,
    bad=bad,
  )
  batches = Prefetcher(
    source,
    start_step,
    num_threads=num_threads,
    num_workers=num_workers,
    num_batches=num_batches,
  )
  if source.own is None:
    return batches
  return (_rows_of(batch, source.own) for batch in batches)


def eval_batches(
  datasets: Sequence[Dataset],
  take_clip: ClipTaker,
  *,
  batch_size: int,
  num_batches: int,
  rows: Sequence[int] | None = None,
  bad: BadRecords | None = None,
) -> Iterator[Batch]:
  """Yields the same clips on every call, from records spread over the splits.

  If there are fewer records than clips, records repeat with other starts.

  Args:
    datasets: data sets to read; each gives as many clips.
    take_clip: turns records into clips.
    batch_size: clips per batch over all processes.
    num_batches: number of batches.
    rows: rows of this process, from `own_rows`; None: all.
    bad: list for unreadable records; see `train_batches`.

  Yields:
    Dicts of arrays with one clip per row.

  Raises:
    DatasetError: as for `train_batches`.
  """
  source = ClipBatches(
    SpreadDraws(datasets, batch_size * num_batches),
    take_clip,
    batch_size=batch_size,
    rows=range(batch_size) if rows is None else rows,
    bad=bad,
  )
  return Prefetcher(
    source, 0, num_threads=_NUM_EVAL_THREADS, num_batches=num_batches
  )


def _rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
  return {key: x[rows] for key, x in batch.items()}


def to_devices(
  batches: Iterable[Batch],
  sharding: jax.sharding.Sharding,
  *,
  ahead: int = 1,
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches on devices; copies `ahead` batches in advance.

  Args:
    batches: this process's rows of each global batch.
    sharding: sharding of the global batch.
    ahead: batches to copy before they are needed.
  """
  queue = collections.deque()
  for batch in batches:
    queue.append(
      {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
      }
    )
    if len(queue) > ahead:
      yield queue.popleft()
  yield from queue
