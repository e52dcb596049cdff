"""Runs tasks on worker processes that may die.

The pools of the standard library either hang or break as a whole when one of
their processes is killed. Here each worker has a pipe of its own, so that it
is known which task a dead worker was at, and only that task is lost.

A worker opens its tools once (`open_work`), serves some tasks and is replaced,
which bounds what native libraries leak.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from marlin_jax.records.cli import UserError

# (task, report) -> result; `report` sends a value to the parent.
Work = Callable[[Any, Callable[[Any], None]], Any]
OpenWork = Callable[[Any], contextlib.AbstractContextManager[Work]]

_SECS_TO_STOP = 5.0


class WorkerError(UserError):
  """No task can be done on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Event:
  """Something happened to a task.

  Attributes:
    kind: 'report', 'done' or 'died'.
    task: number of the task.
    value: what was reported, the result, or how the worker died.
  """

  kind: str
  task: int
  value: Any


def run_tasks(
  tasks: Sequence[Any],
  open_work: OpenWork,
  settings: Any,
  num_workers: int,
  tasks_per_worker: int,
  stall_secs: float,
) -> Iterator[Event]:
  """Does every task once; closing the iterator stops all workers.

  Args:
    tasks: picklable; started in this order.
    open_work: called with `settings` in each worker, importable by name.
    settings: picklable.
    num_workers: processes at a time.
    tasks_per_worker: a worker is replaced after so many.
    stall_secs: a worker that says nothing for so long is killed; its task
      counts as one whose worker died.

  Yields:
    One 'done' or 'died' per task, and 'report's before it.

  Raises:
    WorkerError: `open_work` failed, or the work raised, which is for what
      stops every other task too.
  """
  waiting = collections.deque(enumerate(tasks))
  num_left = len(tasks)
  workers: list[_Worker] = []
  leaving: list[_Worker] = []
  try:
    while num_left:
      num_starting = sum(worker.is_starting for worker in workers)
      while len(workers) < num_workers and num_starting < len(waiting):
        workers.append(_Worker(open_work, settings))
        num_starting += 1
      ready = connection.wait(
        [worker.pipe for worker in workers], timeout=min(stall_secs, 10.0)
      )
      now = time.monotonic()
      for worker in list(workers):
        events = []
        if worker.pipe in ready:
          events = worker.listen()
        elif now - worker.heard_at > stall_secs:
          events = worker.kill(f"said nothing for {stall_secs:g} s")
        for event in events:
          num_left -= event.kind != "report"
          yield event
        if worker.is_idle and waiting and worker.num_done < tasks_per_worker:
          worker.start(*waiting.popleft())
        elif worker.is_idle:
          worker.dismiss()
        if worker.has_left:
          workers.remove(worker)
          leaving.append(worker)
      leaving = [worker for worker in leaving if not worker.reap()]
  finally:
    for worker in workers:
      worker.ask_to_stop()
    deadline = time.monotonic() + _SECS_TO_STOP
    for worker in (*workers, *leaving):
      worker.stop(deadline)


class _Worker:
  """The parent's view of one worker process."""

  def __init__(self, open_work: OpenWork, settings: Any) -> None:
    # Not fork: native libraries of the parent do not survive it.
    context = multiprocessing.get_context("spawn")
    self.pipe, inner = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(inner, open_work, settings), daemon=True
    )
    self._process.start()
    inner.close()
    self._task: int | None = None
    self.num_done = 0
    self.heard_at = time.monotonic()
    self.is_starting = True
    self.is_idle = False
    self.has_left = False

  def start(self, number: int, task: Any) -> None:
    """Hands over a task."""
    self.is_idle = False
    self._task = number
    self.heard_at = time.monotonic()
    # That a worker died in between is noticed when it is listened to.
    with contextlib.suppress(BrokenPipeError):
      self.pipe.send((task,))

  def dismiss(self) -> None:
    """Lets the process end by itself."""
    self.is_idle, self.has_left = False, True
    with contextlib.suppress(BrokenPipeError):
      self.pipe.send(None)

  def listen(self) -> list[Event]:
    """Takes one message."""
    self.heard_at = time.monotonic()
    try:
      kind, value = self.pipe.recv()
    except (EOFError, ConnectionResetError):
      self._process.join(_SECS_TO_STOP)
      return self.kill(_ending(self._process.exitcode))
    if kind == "failed":
      raise WorkerError(value)
    if kind == "ready":
      self.is_starting, self.is_idle = False, True
      return []
    event = Event(kind, self._task, value)
    if kind == "done":
      self._task = None
      self.num_done += 1
      self.is_idle = True
    return [event]

  def kill(self, reason: str) -> list[Event]:
    """Ends a worker that died or hangs; returns what it was at."""
    self._process.kill()
    self.is_idle, self.has_left = False, True
    if self._task is None:
      raise WorkerError(f"a worker process {reason} while it started")
    return [Event("died", self._task, f"the worker process {reason}")]

  def reap(self) -> bool:
    """Says whether the process has ended, and tidies up after it."""
    if self._process.is_alive():
      return False
    self._process.close()
    self.pipe.close()
    return True

  def ask_to_stop(self) -> None:
    self._process.terminate()

  def stop(self, deadline: float) -> None:
    """Waits for the process to end by itself, kills it at the deadline."""
    self._process.join(max(deadline - time.monotonic(), 0.0))
    if self._process.is_alive():
      self._process.kill()
      self._process.join()
    self.reap()


def _ending(code: int | None) -> str:
  if code is None:
    return "closed its pipe"
  if code >= 0:
    return f"ended with exit code {code}"
  name = signal.Signals(-code).name
  more = " (out of memory?)" if -code == signal.SIGKILL else ""
  return f"was killed by {name}{more}"


# --- In the worker ------------------------------------------------------------


def _serve(
  pipe: connection.Connection, open_work: OpenWork, settings: Any
) -> None:
  # Ctrl-C reaches the whole process group; the parent decides what happens.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # An exception, so that children of this worker are ended on the way out.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  sys.unraisablehook = _ask_again
  threading.Thread(target=_die_with_parent, daemon=True).start()
  try:
    with open_work(settings) as work:
      pipe.send(("ready", None))
      while (message := pipe.recv()) is not None:
        pipe.send(
          (
            "done",
            work(message[0], lambda value: pipe.send(("report", value))),
          )
        )
  except (BrokenPipeError, EOFError):
    return  # the parent has gone
  except Exception as e:
    pipe.send(("failed", str(e) or type(e).__name__))


def _ask_again(unraisable: Any) -> None:
  """Sends SIGTERM anew where a destructor, MediaPipe's say, swallowed the exit.

  In a moment and not at once: inside of this hook it would be swallowed too.
  """
  if unraisable.exc_type is SystemExit:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
  else:
    sys.__unraisablehook__(unraisable)


def _die_with_parent() -> None:
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
