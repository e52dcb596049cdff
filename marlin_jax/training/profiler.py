"""Device profiles of a few steps, while a run goes on."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from marlin_jax.training import goodput


class Profiler:
  """Captures a few steps, at a step known before and whenever SIGUSR1 comes.

  Of several processes only the first captures: a profile shows the devices of
  one process, and the others' do the same.

  Use it as a context around the loop.
  """

  def __init__(
    self,
    folder: Path,
    shown: str,
    settings: Any,
    timer: goodput.Timer,
    say: Callable[[str], None],
  ):
    """Sets it up.

    Args:
      folder: where to write; each profile gets a folder in it.
      shown: how people find that folder; it may be copied to a bucket.
      settings: config.profile, see configs/pretrain_b.py.
      timer: is told the time that starting and writing takes.
      say: prints a line.
    """
    self._folder = folder
    self._shown = shown
    self._settings = settings
    self._timer = timer
    self._say = say
    self._captures = jax.process_index() == 0
    self._requested = False
    self._first: int | None = None  # step of the capture that is running
    self._last = 0

  def __enter__(self) -> Profiler:
    self._previous = signal.signal(signal.SIGUSR1, self._request)
    return self

  def _request(self, signum, frame):
    self._requested = self._captures
    answer = (
      f"profiling the next {self._settings.num_steps} steps"
      if self._captures
      else "only process 0 profiles; send it there"
    )
    tqdm.write(f"SIGUSR1: {answer}", file=sys.stderr)

  def __exit__(self, *error):
    if self._first is not None:
      if not any(error):
        self._timer.wait()
      self._stop()
    # One that comes too late must not end a run that is still saving.
    ours = self._previous if callable(self._previous) else signal.SIG_IGN
    signal.signal(signal.SIGUSR1, ours)

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Around a training step, from its start until the one before it is done.

    Args:
      step: its number.
    """
    due = self._captures and step == self._settings.start_step
    if self._first is None and (due or self._requested):
      self._start(step)
    # XProf cuts its time line into steps by these.
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield
    self._last = step
    running = self._first is not None
    if running and step + 1 - self._first == self._settings.num_steps:
      self._timer.wait()
      self._stop()

  def _start(self, step: int) -> None:
    self._requested = False
    self._path = self._folder / f"step_{step:07d}"
    options = jax.profiler.ProfileOptions()
    # Python's calls would slow the steps down, and may be more than fits.
    options.python_tracer_level = 0
    self._timer.wait()  # or part of the step before would be in it
    with self._timer.on("profile"):
      try:
        # Better now than after the steps if it cannot be made.
        self._path.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._path, profiler_options=options)
      except (RuntimeError, OSError) as e:
        self._say(f"step {step}: no profile: {e}")
        return
    self._first = step

  def _stop(self) -> None:
    steps = f"steps {self._first} to {self._last}"
    self._first = None
    with self._timer.on("profile"):
      try:
        jax.profiler.stop_trace()
      except RuntimeError as e:
        self._say(f"{steps}: the profile could not be written: {e}")
        return
    self._say(
      f"{steps}: profile in {self._shown}/{self._path.name}; to look at it: "
      f"pip install xprof, then xprof --logdir={self._shown}"
    )
