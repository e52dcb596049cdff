"""Goodput: how a run spends its time, over all of its restarts.

Every second since the process started, or since the call in a process that
trains several runs, is assigned to exactly one kind:

  start       imports, waiting for all processes, opening data, restoring a
              checkpoint
  compile     compiling the training step
  step        the devices train, or the host runs the loop
  data        waiting for a batch while no step runs
  checkpoint  saving
  eval        evaluations and pictures, their compilation included
  profile     starting or writing a profile
  lost        steps that a run repeats because it ended before they were saved,
              with their data waits, checkpoints and evaluations

A step may run on the devices while the host waits for data or saves. That time
counts as `step` until the step is done.

The sums are written with the metrics, `goodput/<kind>_secs`, and a resumed run
continues them. `goodput/ratio` is step / total. The time between the end of a
process and the next start, `goodput/down_secs`, is not part of the total. It is
measured from the last line of metrics.jsonl, so it includes up to log_steps
steps of a killed run.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

# In the order of the summary.
KINDS = (
  "step",
  "data",
  "checkpoint",
  "eval",
  "compile",
  "start",
  "profile",
  "lost",
)
_REPEATED = ("step", "data", "checkpoint", "eval", "profile")
_SUMMARY_NAMES = {"eval": "evaluation", "data": "data wait"}
_IMPORT_TIME = time.perf_counter()
# Value of time.perf_counter at which the run in progress began.
_run_began: float | None = None


class Timer:
  """Assigns every second to a kind.

  Time is of kind `start` until `enter` is called, except inside `on`.
  """

  def __init__(
    self,
    *,
    clips_per_step: int,
    carried: dict[str, float] | None = None,
    age_secs: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Any], futures.Future] | None = None,
  ):
    """Starts the timer.

    Args:
      clips_per_step: clips of the whole batch.
      carried: seconds of earlier processes, from `carried_over`.
      age_secs: time since the run began; None: from `running`.
      clock: returns seconds.
      watch: maps the result of a step to a future of the time at which it is
        ready; None: a thread waits for it, because the host may be busy.
    """
    self._clips_per_step = clips_per_step
    self._carried = carried or {}
    self._peak: float | None = None
    self._clock = clock
    if watch is None:
      thread = futures.ThreadPoolExecutor(1, "marlin_jax_step")
      watch = functools.partial(thread.submit, _ready_time, clock)
    self._watch = watch
    self._own = dict.fromkeys(KINDS, 0.0)
    self._kind = "start"
    age_secs = _run_age_secs() if age_secs is None else age_secs
    # Time up to here has been assigned.
    self._until = clock() - age_secs
    self._running: collections.deque[futures.Future] = collections.deque()
    self._num_steps = 0
    self._last_read = self._stage_begin = (0, 0.0, 0.0)

  def enter(self, kind: str) -> None:
    """Assigns the time from now on to a kind, except inside `on`."""
    self._assign(self._kind, self._clock())
    self._kind = kind

  @contextlib.contextmanager
  def on(self, kind: str) -> Iterator[None]:
    """Assigns the time of a block to a kind; does not nest.

    Time during which a step still runs is assigned to `step`.
    """
    self._assign(self._kind, self._clock())
    try:
      yield
    finally:
      end = self._clock()
      if self._running:
        last = self._running[-1]
        done = last.result() if last.done() else end
        # The step may have been done before `on` was entered.
        self._assign("step", min(max(done, self._until), end))
      self._assign(kind, end)

  def step_started(self, result: Any) -> None:
    """Registers a dispatched step and waits for the previous one.

    The host is therefore at most one step ahead of the devices.

    Args:
      result: arrays that are ready when the step is done.
    """
    self._num_steps += 1
    self._running.append(self._watch(result))
    if len(self._running) > 1:
      self._running.popleft().result()

  def wait(self) -> None:
    """Waits for the running step."""
    if self._running:
      self._running[-1].result()

  def begin_stage(self, peak_clips_per_sec: float | None) -> None:
    """Begins a stage of the run; call it when all steps are done.

    Args:
      peak_clips_per_sec: rate at a model FLOPs utilisation of 1; None: unknown.
    """
    self._assign(self._kind, self._clock())
    self._peak = peak_clips_per_sec
    self._stage_begin = self._now()

  def read(self) -> dict[str, float]:
    """Returns rates since the last call and sums over the run, as metrics.

    Call it when all steps are done.
    """
    totals = self.totals()
    rates = self._rates(self._last_read)
    self._last_read = self._now()
    return rates | totals

  def stage_rates(self) -> dict[str, float]:
    """Returns rates since `begin_stage`; call it when all steps are done."""
    self._assign(self._kind, self._clock())
    return self._rates(self._stage_begin)

  def _now(self) -> tuple[int, float, float]:
    return self._num_steps, self._own["step"], self._own["data"]

  def _rates(self, since: tuple[int, float, float]) -> dict[str, float]:
    num_steps, step, waited = map(operator.sub, self._now(), since)
    secs = step + waited
    rates = {
      "time/step_secs": secs / num_steps,
      "time/clips_per_sec": self._clips_per_step * num_steps / secs,
      "time/data_wait_ratio": waited / secs,
    }
    if self._peak:
      rates["time/mfu"] = rates["time/clips_per_sec"] / self._peak
    return rates

  def totals(self) -> dict[str, float]:
    """Returns sums over all processes of the run, as metrics."""
    secs, total = self._sums()
    return {
      **{_name(kind): value for kind, value in secs.items()},
      _name("total"): total,
      _name("down"): self._carried.get("down", 0.0),
      "goodput/ratio": secs["step"] / total,
      "time/unix_secs": time.time(),
    }

  def summary(self) -> str:
    """Returns the total time and the share of each kind in one line."""
    secs, total = self._sums()
    shares = ", ".join(
      f"{_SUMMARY_NAMES.get(kind, kind)} {value / total:.1%}"
      for kind, value in secs.items()
      if value
    )
    line = f"time {_clock_face(total)}: {shares}"
    down = self._carried.get("down", 0.0)
    return line + (f"; down {_clock_face(down)} in between" if down else "")

  def _sums(self) -> tuple[dict[str, float], float]:
    """Returns the seconds of each kind over all processes, and their sum."""
    self._assign(self._kind, self._clock())
    secs = {k: self._carried.get(k, 0.0) + own for k, own in self._own.items()}
    return secs, math.fsum(secs.values())

  def _assign(self, kind: str, now: float) -> None:
    self._own[kind] += now - self._until
    self._until = now


def _ready_time(clock: Callable[[], float], result: Any) -> float:
  jax.block_until_ready(result)
  return clock()


def carried_over(
  path: Path,
  start_step: int,
  *,
  now: float | None = None,
  age_secs: float | None = None,
) -> dict[str, float]:
  """Returns the seconds that earlier processes of a run have spent.

  The time of steps after `start_step`, which the run repeats, becomes `lost`.
  Call it before `MetricWriter` removes these steps from the file.

  Args:
    path: metrics.jsonl; may be missing, or of a version without these sums.
    start_step: step of the checkpoint that the run resumes from.
    now: Unix time; None: now.
    age_secs: time since this process began the run; None: from `running`.

  Returns:
    Seconds of each kind, and `down` between processes.
  """
  at_start = last = dict.fromkeys((*KINDS, "down"), 0.0)
  last_time = None
  for row in _rows(path):
    last = {kind: float(row.get(_name(kind), 0.0)) for kind in last}
    last_time = row.get("time/unix_secs")
    if row["step"] <= start_step:
      at_start = last
  carried = dict(last)
  for kind in _REPEATED:
    carried[kind] = at_start[kind]
    carried["lost"] += last[kind] - at_start[kind]
  if last_time is not None:
    now = time.time() if now is None else now
    age_secs = _run_age_secs() if age_secs is None else age_secs
    # Not below 0: clocks of two machines may disagree.
    carried["down"] += max(now - age_secs - last_time, 0.0)
  return carried


def _rows(path: Path) -> Iterator[dict]:
  """Yields the lines of metrics.jsonl that hold sums."""
  if not path.exists():
    return
  with path.open() as file:
    for line in file:
      try:
        row = json.loads(line)
      except ValueError:
        continue  # the half-written last line of a killed run
      if _name("total") in row:
        yield row


@contextlib.contextmanager
def running(age_secs: float = 0.0) -> Iterator[None]:
  """Defines when the run of a block began; has no effect inside another.

  Args:
    age_secs: time since the run began: `process_age_secs` for a program that
      only trains, 0 for a call in a process that does more.
  """
  global _run_began
  if _run_began is not None:
    yield
    return
  _run_began = time.perf_counter() - age_secs
  try:
    yield
  finally:
    _run_began = None


def _run_age_secs() -> float:
  return 0.0 if _run_began is None else time.perf_counter() - _run_began


def process_age_secs() -> float:
  """Returns the age of this process; without /proc, that of this import."""
  since_import = time.perf_counter() - _IMPORT_TIME
  try:
    stat = Path("/proc/self/stat").read_text()
  except OSError:
    return since_import
  # Field 22 of proc(5), in ticks since boot; field 2 may hold spaces.
  ticks = int(stat.rpartition(")")[2].split()[19])
  started = ticks / os.sysconf("SC_CLK_TCK")
  return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, since_import)


def _name(kind: str) -> str:
  return f"goodput/{kind}_secs"


def _clock_face(secs: float) -> str:
  return str(datetime.timedelta(seconds=round(secs)))
