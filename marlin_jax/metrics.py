"""What a run tells: metrics.jsonl, TensorBoard, progress, timing."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
  """Writes scalars and pictures of one run.

  metrics.jsonl has one object per logged step and is the source of truth;
  TensorBoard shows the same beside it. Of several processes only the first
  writes.
  """

  def __init__(self, workdir: str | Path, *, start_step: int):
    """Opens the files; what an interrupted run wrote past start_step goes."""
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    kept = []
    if self._path.exists():
      lines = self._path.read_text().splitlines()
      kept = [line for line in lines if _step_of(line) <= start_step]
    temp = self._path.with_suffix(".tmp")
    temp.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temp, self._path)
    self._file = self._path.open("a", buffering=1)
    self._board = SummaryWriter(
      str(Path(workdir) / "tensorboard"), purge_step=start_step + 1
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds one object to metrics.jsonl, and the scalars to TensorBoard.

    What is not finite is left out: JSON has no word for it.
    """
    if not self._writes:
      return
    scalars = {k: v for k, v in scalars.items() if math.isfinite(v)}
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def event(self, name: str, step: int, **details: Any) -> None:
    """Adds an object with `event`, its name, to metrics.jsonl alone."""
    if self._writes:
      line = {"step": step, "event": name, **details}
      self._file.write(json.dumps(line) + "\n")

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds uint8 (H, W, 3) to TensorBoard."""
    if self._writes:
      self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    if self._writes:
      self._file.close()
      self._board.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # the half-written last line of a killed run


class Timer:
  """Where the time of the loop goes."""

  def __init__(self, *, clips_per_step: int):
    self._clips_per_step = clips_per_step
    self._running = collections.deque()
    self._start = time.perf_counter()
    self._steps = 0
    self._waited_secs = 0.0
    self._paused_secs = 0.0

  @contextlib.contextmanager
  def waiting_for_data(self):
    """Around the call that fetches a batch.

    A step is running meanwhile, so this counts more than the device waits.
    """
    start = time.perf_counter()
    yield
    self._waited_secs += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self):
    """Around what is neither step nor data: its time does not count."""
    start = time.perf_counter()
    yield
    self._paused_secs += time.perf_counter() - start

  def step_started(self, result: Any) -> None:
    """Waits for the step before this one: at most one runs ahead.

    Args:
      result: arrays that are ready when the step is done.
    """
    self._steps += 1
    self._running.append(result)
    if len(self._running) > 1:
      jax.block_until_ready(self._running.popleft())

  def read(self) -> dict[str, float]:
    """Rates since the last reading, and starts anew.

    Call when all steps so far are done.
    """
    now = time.perf_counter()
    secs = now - self._start - self._paused_secs
    rates = {
      "time/step_secs": secs / self._steps,
      "time/clips_per_sec": self._clips_per_step * self._steps / secs,
      "time/data_wait_ratio": self._waited_secs / secs,
    }
    self._start, self._steps = now, 0
    self._waited_secs = self._paused_secs = 0.0
    return rates


class StopSignal:
  """Notes SIGINT and SIGTERM, so that the loop can save before it ends.

  A second Ctrl-C ends at once.
  """

  def __init__(self):
    self.received: int | None = None

  def __enter__(self) -> StopSignal:
    self._previous = {
      signum: signal.signal(signum, self._note)
      for signum in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _note(self, signum, frame):
    if self.received is not None and signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = signum
    name = signal.Signals(signum).name
    tqdm.write(f"{name}: finishing this step, then saving", file=sys.stderr)

  def __exit__(self, *_):
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)


class Progress:
  """The line that tells how far a run is.

  A bar with ETA on a terminal; in a log file one plain line per report. Of
  several processes only the first speaks.
  """

  def __init__(self, total: int, *, start: int):
    self._total = total
    self._speaks = jax.process_index() == 0
    self._bar = tqdm(
      total=total,
      initial=start,
      unit="step",
      dynamic_ncols=True,
      # Steps are slow on small machines: show each.
      mininterval=0.5,
      disable=not (self._speaks and sys.stderr.isatty()),
      bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
      "[{elapsed}<{remaining}{postfix}]",
    )

  def step(self) -> None:
    self._bar.update()

  def report(self, step: int, scalars: dict[str, float]) -> None:
    """Shows the losses and rates of MetricWriter's scalars."""
    losses = [
      f"{name.removeprefix('train/')} {value:.4f}"
      for name, value in scalars.items()
      if name.startswith("train/loss_")
    ]
    text = ", ".join(
      [
        *losses,
        f"{scalars['time/clips_per_sec']:.1f} clips/s",
        f"data wait {scalars['time/data_wait_ratio']:.1%}",
      ]
    )
    if not self._bar.disable:
      self._bar.set_postfix_str(text)
      return
    remaining = (self._total - step) * scalars["time/step_secs"]
    self.say(
      f"step {step}/{self._total}: {text}, "
      f"ETA {tqdm.format_interval(remaining)}"
    )

  def say(self, line: str) -> None:
    """Prints a line that stays, above the bar where there is one."""
    if self._speaks:
      tqdm.write(line, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    self._bar.close()
