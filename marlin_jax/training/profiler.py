"""Device profiles of a few steps of a run."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from marlin_jax.training import goodput


def accept_signals() -> None:
  """Answers SIGUSR1, which otherwise ends the process, until a `Profiler` does.

  The start of a run takes minutes on a large machine.
  """
  signal.signal(signal.SIGUSR1, _too_early)


def _too_early(signum, frame):
  print(
    "SIGUSR1: no step has run yet; send it again then to get a profile",
    file=sys.stderr,
    flush=True,
  )


class Profiler:
  """Context manager that profiles a few steps, at a given step and on SIGUSR1.

  Process 0 alone profiles: a profile shows the devices of one process, and
  those of the others do the same.
  """

  def __init__(
    self,
    folder: Path,
    displayed_folder: str,
    timer: goodput.Timer,
    say: Callable[[str], None],
    *,
    start_step: int = 0,
    num_steps: int = 3,
  ):
    """Sets what to profile.

    Args:
      folder: folder to write to; each profile gets a subfolder.
      displayed_folder: path of `folder` in messages; differs if the workdir is
        in a bucket.
      timer: the time to start and write a profile is assigned to 'profile'.
      say: prints a line.
      start_step: first step to profile; 0: on SIGUSR1 only.
      num_steps: steps in a profile.
    """
    self._folder = folder
    self._displayed_folder = displayed_folder
    self._timer = timer
    self._say = say
    self._start_step = start_step
    self._num_steps = num_steps
    self._captures = jax.process_index() == 0
    self._requested = False
    self._first: int | None = None  # first step of the profile being taken
    self._last = 0

  def __enter__(self) -> Profiler:
    self._previous = signal.signal(signal.SIGUSR1, self._request)
    return self

  def _request(self, signum, frame):
    self._requested = self._captures
    answer = (
      f"profiling the next {self._num_steps} steps"
      if self._captures
      else "only process 0 profiles; send it there"
    )
    tqdm.write(f"SIGUSR1: {answer}", file=sys.stderr)

  def __exit__(self, *error):
    if self._first is not None:
      if not any(error):
        self._timer.wait()
      self._stop()
    # A late SIGUSR1 must not end a run that is still saving.
    previous = self._previous
    if previous is _too_early or not callable(previous):
      previous = signal.SIG_IGN
    signal.signal(signal.SIGUSR1, previous)

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Surrounds the dispatch of a training step.

    On entry, the previous step has been dispatched; on exit, it is done.

    Args:
      step: number of the step.
    """
    due = self._captures and step == self._start_step
    if self._first is None and (due or self._requested):
      self._start(step)
    # XProf divides its time line into steps by these annotations.
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield
    self._last = step
    running = self._first is not None
    if running and step + 1 - self._first == self._num_steps:
      self._timer.wait()
      self._stop()

  def _start(self, step: int) -> None:
    self._requested = False
    self._path = self._folder / f"step_{step:07d}"
    options = jax.profiler.ProfileOptions()
    # Tracing Python calls slows the steps down and may exceed the buffer.
    options.python_tracer_level = 0
    self._timer.wait()  # keeps the previous step out of the profile
    with self._timer.on("profile"):
      try:
        # Created now, to fail before the steps rather than after them.
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
      f"{steps}: profile in {self._displayed_folder}/{self._path.name}; to "
      "view it: pip install xprof, then xprof "
      f"--logdir={self._displayed_folder}"
    )
