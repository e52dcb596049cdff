"""Makes batches ahead of their use, in threads or worker processes.

A batch is made in parts, in parallel with each other and with those of later
batches. Batches are views of a few slots of memory that are used in turn: the
kernel would clear each page of new memory, which takes a quarter of the time of
decoding. A slot is free again when no array of its last batch is left, neither
the caller's nor that of an unfinished copy to a device.

Worker processes map the same memory. Each of their threads has a pipe to a
thread of this process, which waits for it. Signals to the process group do not
reach the workers, so that a training that saves after SIGTERM or takes a
profile on SIGUSR1 still gets batches; workers end when their pipes close,
however this process ends. The memory has no name in the file system that could
be left behind.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import connection, reduction
from multiprocessing.pool import ExceptionWithTraceback
from typing import Any, Protocol

import numpy as np

from marlin_jax.records import cli, signals
from marlin_jax.records.cli import UserError

Batch = dict[str, np.ndarray]

# Batches that the caller holds, on average: one in use, one on its way to the
# devices, one just asked for.
_NUM_IN_USE = 3
# Alignment in bytes with which a CPU device uses an array without a copy.
_ALIGNMENT = 64
_SECS_TO_DIE = 5.0


class WorkerError(UserError):
  """A worker process died; a restart may help."""

  exit_code = os.EX_TEMPFAIL


class BatchSource(Protocol):
  """Makes batches in parts; picklable, for worker processes.

  Attributes:
    num_parts: parts of each batch.
  """

  num_parts: int

  def empty(self) -> Batch:
    """Allocates a batch; all have the same shapes and dtypes."""

  def fill(self, batch: Batch, step: int, part: int) -> Any:
    """Makes a part of the batch of a step, in a thread or worker process.

    Args:
      batch: arrays to write to. They hold an earlier batch, zeros at first.
      step: number of the batch.
      part: number of the part.

    Returns:
      A report for `receive`, picklable.
    """

  def receive(self, report: Any) -> None:
    """Receives the report of a part, in any thread of this process."""


class Prefetcher(Iterator[Batch]):
  """Iterator of batches; begins to make them when it is created."""

  def __init__(
    self,
    source: BatchSource,
    first_step: int,
    *,
    num_threads: int,
    num_workers: int = 0,
    num_batches: int | None = None,
  ):
    """Starts threads and worker processes.

    Args:
      source: makes the batches.
      first_step: number of the first batch.
      num_threads: threads that make parts, in this process or in each worker.
      num_workers: worker processes; 0: the threads of this process do the work.
      num_batches: batches to make; None: no end.
    """
    num_lanes = num_threads * max(num_workers, 1)
    self._num_ahead = 2 + math.ceil(num_lanes / source.num_parts)
    self._source, self._step = source, first_step
    self._stop_step = (
      math.inf if num_batches is None else first_step + num_batches
    )
    num_slots = self._num_ahead + _NUM_IN_USE
    self._slots = _Slots(source.empty(), num_slots, is_shared=num_workers > 0)
    self._free = collections.deque(range(num_slots))
    self._ahead: collections.deque = collections.deque()
    workers = None
    if not num_workers:
      _keep_freed_memory()
    else:
      workers = _Workers(source, self._slots, num_workers, num_threads)
    self._make = _maker(source, self._slots, workers)
    self._pool = futures.ThreadPoolExecutor(num_lanes, "batches")
    self._stop = weakref.finalize(self, _stop, workers, self._pool)
    # Workers are stopped before multiprocessing waits for them at exit.
    self._stop.atexit = False
    self._prepare()

  def __next__(self) -> Batch:
    """Returns the next batch.

    Raises:
      WorkerError: a worker process died.
      Exception: whatever making the batch raised.
    """
    if not self._ahead:
      raise StopIteration  # the end, `close` or an error
    slot, parts = self._ahead.popleft()
    try:
      for part in parts:
        part.result()
    except BaseException:
      self.close()
      raise
    if self._free:
      batch = self._slots.lend(slot, self._free)
    else:  # the caller holds all other slots
      batch = {key: x.copy() for key, x in self._slots.batch(slot).items()}
      self._free.append(slot)
    self._prepare()
    return batch

  def close(self) -> None:
    """Stops threads and processes; batches that were returned stay valid."""
    self._ahead.clear()
    self._stop()

  def _prepare(self) -> None:
    """Starts as many of the next batches as there is memory for."""
    while (
      self._free
      and len(self._ahead) < self._num_ahead
      and self._step < self._stop_step
    ):
      slot = self._free.popleft()
      parts = [
        self._pool.submit(self._make, slot, self._step, part)
        for part in range(self._source.num_parts)
      ]
      self._ahead.append((slot, parts))
      self._step += 1


def _maker(
  source: BatchSource, slots: _Slots, workers: _Workers | None
) -> Callable[[int, int, int], None]:
  """Returns the function that makes a part; must not refer to a Prefetcher."""

  def make(slot: int, step: int, part: int) -> None:
    if workers:
      report = workers.fill(slot, step, part)
    else:
      report = source.fill(slots.batch(slot), step, part)
    source.receive(report)

  return make


def _stop(workers: _Workers | None, pool: futures.ThreadPoolExecutor) -> None:
  pool.shutdown(wait=False, cancel_futures=True)
  if workers:
    workers.close()  # threads that wait for a worker go on
  pool.shutdown()


# --- Memory -------------------------------------------------------------------


class _Slots:
  """Memory of a few batches.

  Shared memory is picklable while worker processes are started.
  """

  def __init__(self, template: Batch, num_slots: int, *, is_shared: bool):
    self._fields = {}
    size = 0
    for key, x in template.items():
      self._fields[key] = (size, x.nbytes, x.dtype, x.shape)
      size += math.ceil(x.nbytes / _ALIGNMENT) * _ALIGNMENT
    self._slot_size, self._size = size, size * num_slots
    if is_shared:
      self._map(_nameless_file(self._size), mmap.MAP_SHARED)
    else:
      self._map(-1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

  def _map(self, file: int, flags: int) -> None:
    self._file = file
    self._memory = mmap.mmap(file, self._size, flags)
    if file >= 0:
      weakref.finalize(self, os.close, file)

  def batch(self, slot: int) -> Batch:
    """Returns a slot's arrays."""
    return self._views(slot)[1]

  def lend(self, slot: int, free: collections.deque) -> Batch:
    """Returns a slot's arrays; appends it to `free` when all are gone."""
    root, batch = self._views(slot)
    # Every array that shares the memory refers to the first one.
    weakref.finalize(root, free.append, slot).atexit = False
    return batch

  def _views(self, slot: int) -> tuple[np.ndarray, Batch]:
    root = np.frombuffer(
      self._memory, np.uint8, self._slot_size, slot * self._slot_size
    )
    return root, {
      key: root[start : start + size].view(dtype).reshape(shape)
      for key, (start, size, dtype, shape) in self._fields.items()
    }

  def __getstate__(self):
    state = self.__dict__ | {"_file": reduction.DupFd(self._file)}
    del state["_memory"]
    return state

  def __setstate__(self, state):
    file = state.pop("_file")
    self.__dict__ |= state
    # All pages are mapped at once, rather than by a page fault each.
    self._map(file.detach(), mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _nameless_file(size: int) -> int:
  """Returns the descriptor of a file of zeros without a name."""
  if hasattr(os, "memfd_create"):
    # Not in /dev/shm, which containers limit to 64 MB.
    file = os.memfd_create("marlin_jax-batches")
  else:
    with tempfile.TemporaryFile() as named:
      file = os.dup(named.fileno())
  os.truncate(file, size)
  return file


# --- Worker processes ---------------------------------------------------------


class _Workers:
  """Worker processes, seen from the parent; threads share them."""

  def __init__(
    self, source: BatchSource, slots: _Slots, num_workers: int, num_threads: int
  ):
    self._processes: list[multiprocessing.Process] = []
    self._idle: queue.SimpleQueue = queue.SimpleQueue()
    self._is_closed = False
    self._lock = threading.Lock()

    def start(number: int) -> None:
      # Not fork: threads and devices of the parent do not survive a fork.
      context = multiprocessing.get_context("spawn")
      pipes = [context.Pipe() for _ in range(num_threads)]
      ours, theirs = zip(*pipes, strict=True)
      process = context.Process(
        target=_serve,
        args=(theirs, source, slots),
        name=f"worker {number}",
        daemon=True,
      )
      process.start()
      self._processes.append(process)
      for pipe in theirs:
        pipe.close()
      for pipe in ours:
        self._idle.put((process, pipe))

    # Threads, and processes that they start, inherit the blocked signals. In
    # parallel, since a start waits until its process has read its arguments.
    with (
      signals.blocked(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
      futures.ThreadPoolExecutor(num_workers) as pool,
    ):
      list(pool.map(start, range(num_workers)))
    # Registered after multiprocessing's own function, hence called before it.
    atexit.register(self.close)

  def fill(self, slot: int, step: int, part: int) -> Any:
    """Has a worker make a part; returns its report."""
    process, pipe = self._idle.get()
    try:
      pipe.send((slot, step, part))
      is_error, value = pipe.recv()
    except (EOFError, OSError) as e:
      raise WorkerError(self._death_of(process)) from e
    finally:
      self._idle.put((process, pipe))
    if is_error:
      raise value
    return value

  def _death_of(self, process: multiprocessing.Process) -> str:
    if self._is_closed:
      return "the batches were closed"
    with self._lock:
      process.join(_SECS_TO_DIE)
    return (
      f"{process.name}, one of {len(self._processes)} worker processes that "
      f"read the data, {_ending(process.exitcode)}. To use less memory, lower "
      "config.data.num_workers; 0 reads with threads of the training process"
    )

  def close(self) -> None:
    """Kills the processes; they hold nothing that needs an orderly end."""
    self._is_closed = True
    atexit.unregister(self.close)
    for process in self._processes:
      process.kill()
    for process in self._processes:
      process.join()


def _ending(code: int | None) -> str:
  has_output = code is not None and code >= 0
  return cli.process_ending(code) + (
    ", its output says why" if has_output else ""
  )


def _serve(
  pipes: Sequence[connection.Connection], source: BatchSource, slots: _Slots
) -> None:
  """Runs a worker process."""
  _keep_freed_memory()
  threads = [
    threading.Thread(target=_answer, args=(pipe, source, slots))
    for pipe in pipes
  ]
  for thread in threads:
    thread.start()
  for thread in threads:  # no pool can start after the main thread has ended
    thread.join()


def _answer(
  pipe: connection.Connection, source: BatchSource, slots: _Slots
) -> None:
  """Makes the parts that a thread of the parent asks for."""
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
    while True:
      slot, step, part = pipe.recv()
      try:
        answer = (False, source.fill(slots.batch(slot), step, part))
      except Exception as e:
        answer = (True, _portable(e))
      pipe.send(answer)


def _portable(error: Exception) -> Any:
  """Returns an error that can be pickled, with its traceback as the cause."""
  traceback = error.__traceback__
  try:
    # The pickler of pipes.
    pickler = reduction.ForkingPickler
    pickler.loads(pickler.dumps(error))
  except Exception:
    error = RuntimeError(f"{type(error).__name__}: {error}")
  return ExceptionWithTraceback(error, traceback)


def _keep_freed_memory() -> None:
  """Lets malloc reuse the memory of records.

  By default glibc returns blocks of that size to the kernel, which clears their
  pages for the next record: 1.3 ms of 1.5 for a record of 0.9 MB. The user's
  MALLOC_* environment variables take precedence.
  """
  if any(name.startswith("MALLOC_") for name in os.environ):
    return
  with contextlib.suppress(AttributeError, OSError):  # another C library
    mallopt = ctypes.CDLL(None).mallopt
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    mallopt(mmap_threshold, 32 << 20)  # the most that glibc accepts
    mallopt(trim_threshold, 256 << 20)
    mallopt(arena_max, 1)
