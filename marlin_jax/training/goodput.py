"""Where a run's time goes, over its whole life.

Every second since the process started belongs to exactly one kind:

  start       imports, processes meeting, data opened, a checkpoint restored
  compile     of the training step
  step        the devices train, or the loop around them takes its time
  data        a batch was not there and no step was running
  checkpoint  saving
  eval        numbers and pictures, what they compile included
  profile     a profile is started or written
  lost        steps done, saved too late and done again; with their data waits,
              checkpoints and evaluations

A step may be running on the devices while the host waits for data or saves:
until it is done that time counts as step.

The sums are written with the metrics, `goodput/<kind>_secs`, and a resumed run
goes on with them. Time between two processes is apart, `goodput/down_secs`:
neither part of `goodput/total_secs` nor of `goodput/ratio`, which is
step / total. It begins with the last sign of life in metrics.jsonl, so up to
log_steps of a killed run are in it.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import math
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
_REDONE = ("step", "data", "checkpoint", "eval", "profile")
_IMPORTED = time.perf_counter()


class Timer:
  """Gives every second to a kind.

  Until `enter` is called all time is `start`, but for what `on` encloses.
  """

  def __init__(
    self,
    *,
    clips_per_step: int,
    carried: dict[str, float] | None = None,
    peak_clips_per_sec: float | None = None,
    age_secs: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Any], futures.Future] | None = None,
  ):
    """Starts.

    Args:
      clips_per_step: of the whole batch.
      carried: seconds of earlier processes, from `carried_over`.
      peak_clips_per_sec: rate at a utilisation of 1; None: unknown.
      age_secs: how long this process has been running; None: found out.
      clock: gives seconds.
      watch: result of a step -> a future of the time on that clock at which it
        is ready; None: a thread that waits for it.
    """
    self._clips_per_step = clips_per_step
    self._carried = carried or {}
    self._peak = peak_clips_per_sec
    self._clock = clock
    self._watch = watch or _Watcher(clock)
    self._own = dict.fromkeys(KINDS, 0.0)
    self._kind = "start"
    # What came before belongs to a kind already.
    self._until = clock() - (
      process_age_secs() if age_secs is None else age_secs
    )
    self._running: collections.deque = collections.deque()
    self._steps = 0
    self._last_read = (0.0, 0.0)

  def enter(self, kind: str) -> None:
    """From now on time is of this kind, where `on` does not say otherwise."""
    self._give(self._kind, self._clock())
    self._kind = kind

  @contextlib.contextmanager
  def on(self, kind: str) -> Iterator[None]:
    """Around what is of another kind, once no step is running; not nested."""
    self._give(self._kind, self._clock())
    try:
      yield
    finally:
      end = self._clock()
      if self._running:
        last = self._running[-1]
        done = last.result() if last.done() else end
        # It may have been done before all this began.
        self._give("step", min(max(done, self._until), end))
      self._give(kind, end)

  def step_started(self, result: Any) -> None:
    """Waits for the step before this one: at most one runs ahead.

    Args:
      result: arrays that are ready when the step is done.
    """
    self._steps += 1
    self._running.append(self._watch(result))
    if len(self._running) > 1:
      self._running.popleft().result()

  def wait(self) -> None:
    """Waits for the step that is running."""
    if self._running:
      self._running[-1].result()

  def own_secs(self, kind: str) -> float:
    """Seconds of a kind in this process."""
    return self._own[kind]

  def read(self) -> dict[str, float]:
    """Rates since the last reading, and sums of the whole run.

    Call when all steps so far are done.
    """
    totals = self.totals()
    step, data = self._own["step"], self._own["data"]
    waited = data - self._last_read[1]
    secs = step - self._last_read[0] + waited
    rates = {
      "time/step_secs": secs / self._steps,
      "time/clips_per_sec": self._clips_per_step * self._steps / secs,
      "time/data_wait_ratio": waited / secs,
    }
    if self._peak:
      rates["time/mfu"] = rates["time/clips_per_sec"] / self._peak
    self._last_read, self._steps = (step, data), 0
    return rates | totals

  def totals(self) -> dict[str, float]:
    """Sums over all of the run's processes, as metrics."""
    self._give(self._kind, self._clock())
    secs = self._all()
    total = math.fsum(secs.values())
    return {
      **{_name(kind): value for kind, value in secs.items()},
      _name("total"): total,
      _name("down"): self._carried.get("down", 0.0),
      "goodput/ratio": secs["step"] / total,
      "time/unix_secs": time.time(),
    }

  def summary(self) -> str:
    """One line: the whole time and each kind's share of it."""
    self._give(self._kind, self._clock())
    secs = self._all()
    total = math.fsum(secs.values())
    names = {"eval": "evaluation", "data": "data wait"}
    shares = ", ".join(
      f"{names.get(kind, kind)} {value / total:.1%}"
      for kind, value in secs.items()
      if value
    )
    line = f"time {_clock_face(total)}: {shares}"
    down = self._carried.get("down", 0.0)
    return line + (f"; down {_clock_face(down)} in between" if down else "")

  def _all(self) -> dict[str, float]:
    return {
      kind: self._carried.get(kind, 0.0) + secs
      for kind, secs in self._own.items()
    }

  def _give(self, kind: str, now: float) -> None:
    self._own[kind] += now - self._until
    self._until = now


class _Watcher:
  """Notes when results are ready, in a thread of its own.

  The host, busy with something else, would notice too late.
  """

  def __init__(self, clock: Callable[[], float]):
    self._clock = clock
    self._thread = futures.ThreadPoolExecutor(1, "marlin_jax_step")

  def __call__(self, result: Any) -> futures.Future:
    return self._thread.submit(self._wait, result)

  def _wait(self, result: Any) -> float:
    jax.block_until_ready(result)
    return self._clock()


def carried_over(
  path: Path,
  start_step: int,
  *,
  now: float | None = None,
  age_secs: float | None = None,
) -> dict[str, float]:
  """What a run's earlier processes have spent.

  Steps after start_step will be done again, so their time was lost. To be
  called before MetricWriter removes them from the file.

  Args:
    path: metrics.jsonl; may be missing, or of a version without these sums.
    start_step: the step that is resumed from.
    now: seconds since 1970; None: now.
    age_secs: how long this process has been running; None: found out.

  Returns:
    Seconds of each kind, and `down` between processes.
  """
  kept = last = dict.fromkeys((*KINDS, "down"), 0.0)
  seen = None
  for row in _rows(path):
    last = {kind: float(row.get(_name(kind), 0.0)) for kind in last}
    seen = row.get("time/unix_secs")
    if row["step"] <= start_step:
      kept = last
  carried = dict(last)
  for kind in _REDONE:
    carried[kind] = kept[kind]
    carried["lost"] += last[kind] - kept[kind]
  if seen is not None:
    now = time.time() if now is None else now
    age_secs = process_age_secs() if age_secs is None else age_secs
    # Clocks of two machines may disagree.
    carried["down"] += max(now - age_secs - seen, 0.0)
  return carried


def _rows(path: Path) -> Iterator[dict]:
  """The lines of metrics.jsonl that hold sums."""
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


def process_age_secs() -> float:
  """How long this process has been running.

  Where the system does not tell (no /proc), since this file was imported.
  """
  since_import = time.perf_counter() - _IMPORTED
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
