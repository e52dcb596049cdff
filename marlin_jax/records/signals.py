"""Signals that end a command or a worker process in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import CodeType, FrameType
from typing import Any, Self

from tqdm import tqdm

# Seconds after which a signal is sent again that had no effect.
_AGAIN_SECS = 0.05


@contextlib.contextmanager
def raised_as(error: BaseException, *numbers: signal.Signals) -> Iterator[None]:
  """Context in which signals raise an exception in the main thread.

  An exception may arise between any two lines, those of libraries included.
  Python prints and forgets one that arises in a destructor: the signal is sent
  again. An object that it left half made may fail in its destructor, which is
  not worth a traceback.

  Args:
    error: the exception.
    numbers: the signals; one that the process ignores stays ignored.
  """

  struck = numbers[0]

  def strike(number: int, frame: FrameType | None) -> None:
    nonlocal struck
    struck = number
    sys.unraisablehook = after_strike
    if _is_within(frame, after_strike.__code__):  # it would be forgotten
      _send_again(number)
    else:
      raise error.with_traceback(None)

  def after_strike(unraisable: Any) -> None:
    if unraisable.exc_value is error:
      _send_again(struck)

  hook = sys.unraisablehook
  handlers = {number: signal.getsignal(number) for number in numbers}
  try:
    for number, handler in handlers.items():
      if handler is not signal.SIG_IGN:
        signal.signal(number, strike)
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    # Destroys what the broken frames hold, while no traceback is printed.
    traceback.clear_frames(error.__traceback__)
    sys.unraisablehook = hook


def _is_within(frame: FrameType | None, code: CodeType) -> bool:
  while frame is not None and frame.f_code is not code:
    frame = frame.f_back
  return frame is not None


def _send_again(number: int) -> None:
  threading.Timer(_AGAIN_SECS, os.kill, (os.getpid(), number)).start()


@contextlib.contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
  """Context in which signals wait; processes started in it inherit that."""
  # It would unblock SIGINT and SIGTERM when it starts.
  resource_tracker.ensure_running()
  previous = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class StopSignal:
  """Records SIGINT and SIGTERM, so that a program can save before it ends.

  A second SIGINT (Ctrl-C) raises KeyboardInterrupt.

  Attributes:
    received: the signal's number, or None.
  """

  def __init__(self) -> None:
    self.received: int | None = None

  def __enter__(self) -> Self:
    self._previous = {
      signum: signal.signal(signum, self._note)
      for signum in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _note(self, signum: int, frame: FrameType | None) -> None:
    if self.received is not None and signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = signum
    name = signal.Signals(signum).name
    tqdm.write(f"{name}: finishing this step, then saving", file=sys.stderr)

  def __exit__(self, *_: object) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
