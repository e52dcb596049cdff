"""Worker processes die, hang and are replaced; every task ends once."""

import contextlib
import os
import signal
import threading
import time
from concurrent import futures

import pytest

from data_prep.engines import workers
from tests.support.processes import children


@contextlib.contextmanager
def open_double(start: int):
  """Yields work that doubles numbers; some tasks misbehave."""

  def work(task, report):
    report((start, os.getpid()))
    if task == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    if task == "crash":
      os.kill(os.getpid(), signal.SIGSEGV)
    if task == "exit":
      os._exit(7)
    if task == "hang":
      time.sleep(1000)
    if task == "raise":
      raise OSError("the disk is full")
    if task == "pid":
      return os.getpid()
    return 2 * task

  yield work


@contextlib.contextmanager
def open_nothing(_):
  raise RuntimeError("no library")
  yield


@contextlib.contextmanager
def open_and_die(_):
  os._exit(3)
  yield


class Picture:
  """Waits for a signal while it is made, or while it is destroyed."""

  def __init__(self, report, ends_at):
    self.report, self.ends_at = report, ends_at
    if ends_at == "start":
      self.wait()
    self.pixels = "pixels"

  def __del__(self):
    self.pixels, self.ends_at  # noqa: B018
    if self.ends_at == "end":
      self.wait()

  def wait(self):
    self.report(f"at its {self.ends_at}")
    time.sleep(1000)


@contextlib.contextmanager
def open_pictures(farewell):
  """Yields endless work on pictures."""

  def work(ends_at, report):
    Picture(report, ends_at)
    time.sleep(1000)

  try:
    yield work
  finally:
    farewell.touch()


def run(tasks, open_work=open_double, num_workers=2, **kwargs):
  settings = {"settings": 5, "tasks_per_worker": 100, "stall_secs": 60}
  return workers.run_tasks(
    tasks, open_work, num_workers=num_workers, **{**settings, **kwargs}
  )


def ends(events) -> dict[int, object]:
  """Returns how each task ended, by number; each must end once."""
  endings = {}
  for event in events:
    if event.kind != "report":
      assert event.task not in endings
      endings[event.task] = event.value
  return endings


def test_every_task_is_done_once_and_reports():
  events = list(run(range(20)))
  assert ends(events) == {i: 2 * i for i in range(20)}
  assert sum(e.kind == "report" and e.value[0] == 5 for e in events) == 20


def test_no_tasks_start_no_workers():
  assert list(run([], open_nothing)) == []


def test_dead_worker_costs_its_own_task_only():
  tasks = [1, "kill", 2, "crash", 3, "exit", 4, 5]
  assert ends(run(tasks)) == {
    0: 2,
    1: "the worker process was killed by SIGKILL (out of memory?)",
    2: 4,
    3: "the worker process was killed by SIGSEGV",
    4: 6,
    5: "the worker process ended with exit code 7",
    6: 8,
    7: 10,
  }


def test_only_crashes_may_be_the_fault_of_a_task():
  events = [e for e in run(["kill", "crash", "exit"]) if e.kind == "died"]
  assert {e.task: e.is_crash for e in events} == {0: False, 1: True, 2: True}


def test_hanging_worker_costs_its_own_task_only():
  endings = ends(run([1, "hang", 2, 3], stall_secs=6))
  assert endings == {
    0: 2,
    1: "the worker process said nothing for 6 s",
    2: 4,
    3: 6,
  }


def test_workers_are_replaced_after_some_tasks():
  pids = ends(run(["pid"] * 7, num_workers=1, tasks_per_worker=3))
  in_order = [pids[i] for i in range(7)]
  assert [in_order.count(pid) for pid in dict.fromkeys(in_order)] == [3, 3, 1]


def test_what_stops_every_task_ends_the_run_with_its_message():
  with pytest.raises(workers.WorkerError, match="^no library$"):
    list(run([1, 2, 3], open_nothing))
  with pytest.raises(workers.WorkerError, match="^the disk is full$"):
    list(run([1, "raise", 2]))
  with pytest.raises(workers.WorkerError, match="exit code 3 while it started"):
    list(run([1, 2, 3], open_and_die))


def test_closing_ends_all_workers():
  events = run(["hang", "hang", 1])
  pids = {next(events).value[1] for _ in range(2)}
  assert len(pids) == 2
  events.close()
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize("ends_at", ["start", "end"])
def test_worker_amid_an_object_is_stopped_in_order(ends_at, tmp_path, capfd):
  farewell = tmp_path / "farewell"
  events = run([ends_at], open_pictures, settings=farewell)
  assert next(events).value == f"at its {ends_at}"
  events.close()
  assert farewell.exists()
  assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_while_workers_start_is_left_to_the_parent(capfd):
  before = children(os.getpid())
  is_over = threading.Event()

  def interrupt():
    while not is_over.is_set():
      for pid in children(os.getpid()) - before:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGINT)

  with futures.ThreadPoolExecutor(1) as pool:
    interrupts = pool.submit(interrupt)
    try:
      endings = ends(run([1, 2], num_workers=1, tasks_per_worker=1))
    finally:
      is_over.set()
    interrupts.result()
  assert endings == {0: 2, 1: 4}
  assert "Traceback" not in capfd.readouterr().err
