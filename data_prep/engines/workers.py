"""Runs tasks on worker processes that may die.

If one process of a standard library pool is killed, the pool hangs or breaks as
a whole. Here each worker has its own pipe, which shows the task that a dead
worker was running; only that task is lost.

A worker opens its tools once (`open_work`), runs some tasks and is replaced.
This bounds what native libraries leak.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from marlin_jax.records import cli, signals
from marlin_jax.records.cli import UserError

# (task, report) -> result; `report` sends a value to the parent.
Work = Callable[[Any, Callable[[Any], None]], Any]
OpenWork = Callable[[Any], contextlib.AbstractContextManager[Work]]

_SECS_TO_STOP = 5.0
# Exit codes of processes that the system or a person ended.
_OUTSIDE_CODES = (
  *(-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGHUP),
  *(-signal.SIGINT, -signal.SIGQUIT, -signal.SIGBUS),
)


class WorkerError(UserError):
  """This machine cannot run any task; the message says why."""


@dataclasses.dataclass(frozen=True)
class Event:
  """Event of a task.

  Attributes:
    kind: 'report', 'done' or 'died'.
    task: number of the task.
    value: the reported value, the result, or how the worker died.
    is_crash: True if the worker crashed, for which the task may be to blame;
      False if it was ended from outside, or killed because it was silent.
  """

  kind: str
  task: int
  value: Any
  is_crash: bool = False


def run_tasks(
  tasks: Sequence[Any],
  open_work: OpenWork,
  settings: Any,
  num_workers: int,
  tasks_per_worker: int,
  stall_secs: float,
) -> Iterator[Event]:
  """Runs every task once; closing the iterator stops all workers.

  Args:
    tasks: the tasks, picklable; started in this order.
    open_work: called with `settings` in each worker; importable by name.
    settings: argument of `open_work`, picklable.
    num_workers: number of processes at a time.
    tasks_per_worker: number of tasks after which a worker is replaced.
    stall_secs: time in seconds after which a silent worker is killed; its task
      counts as died.

  Yields:
    Any number of 'report's and one 'done' or 'died' per task.

  Raises:
    WorkerError: `open_work` or the work raised an exception, which means that
      no other task can succeed.
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
          events = worker.kill(f"said nothing for {stall_secs:g} s", False)
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
  """A worker process, seen from the parent."""

  def __init__(self, open_work: OpenWork, settings: Any) -> None:
    # Not fork: native libraries of the parent do not survive a fork.
    context = multiprocessing.get_context("spawn")
    self.pipe, inner = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(inner, open_work, settings), daemon=True
    )
    with signals.blocked(signal.SIGINT):  # until `_serve` ignores it
      self._process.start()
    inner.close()
    self._task: int | None = None
    self.num_done = 0
    self.heard_at = time.monotonic()
    self.is_starting = True
    self.is_idle = False
    self.has_left = False

  def start(self, number: int, task: Any) -> None:
    """Sends a task to the worker."""
    self.is_idle = False
    self._task = number
    self.heard_at = time.monotonic()
    # If the worker has died meanwhile, `listen` reports it.
    with contextlib.suppress(BrokenPipeError):
      self.pipe.send((task,))

  def dismiss(self) -> None:
    """Tells the process to end by itself."""
    self.is_idle, self.has_left = False, True
    with contextlib.suppress(BrokenPipeError):
      self.pipe.send(None)

  def listen(self) -> list[Event]:
    """Receives one message; returns its event, if any."""
    self.heard_at = time.monotonic()
    try:
      kind, value = self.pipe.recv()
    except (EOFError, ConnectionResetError):
      self._process.join(_SECS_TO_STOP)
      code = self._process.exitcode
      return self.kill(cli.process_ending(code), code not in _OUTSIDE_CODES)
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

  def kill(self, reason: str, is_crash: bool) -> list[Event]:
    """Ends a dead or silent worker; returns the event of its task."""
    self._process.kill()
    self.is_idle, self.has_left = False, True
    if self._task is None:
      raise WorkerError(f"a worker process {reason} while it started")
    return [Event("died", self._task, f"the worker process {reason}", is_crash)]

  def reap(self) -> bool:
    """Releases an ended process; returns False if it is still alive."""
    if self._process.is_alive():
      return False
    self._process.close()
    self.pipe.close()
    return True

  def ask_to_stop(self) -> None:
    self._process.terminate()

  def stop(self, deadline: float) -> None:
    """Waits for the process to end; kills it at the deadline."""
    self._process.join(max(deadline - time.monotonic(), 0.0))
    if self._process.is_alive():
      self._process.kill()
      self._process.join()
    self.reap()


# --- In the worker ------------------------------------------------------------


def _serve(
  pipe: connection.Connection, open_work: OpenWork, settings: Any
) -> None:
  # Ctrl-C reaches the whole process group; the parent handles it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
  threading.Thread(target=_die_with_parent, daemon=True).start()
  # An exception, so that this worker ends its own children on exit.
  end = SystemExit(128 + signal.SIGTERM)
  try:
    with signals.raised_as(end, signal.SIGTERM), open_work(settings) as work:
      pipe.send(("ready", None))
      while (message := pipe.recv()) is not None:
        pipe.send(
          (
            "done",
            work(message[0], lambda value: pipe.send(("report", value))),
          )
        )
  except (BrokenPipeError, EOFError):
    return  # the parent has ended
  except Exception as e:
    pipe.send(("failed", str(e) or type(e).__name__))


def _die_with_parent() -> None:
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
