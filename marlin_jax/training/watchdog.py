"""Ends a run that hangs, in a read or waiting for another process."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from marlin_jax.devices.distributed import TRY_AGAIN


class Watchdog:
  """Context manager that expects signs of life from the main thread.

  After `dump_secs` without one it prints the stacks of all threads. After
  `exit_secs` it prints them again and ends the process with the exit code
  TRY_AGAIN: a scheduler can then restart the run, which resumes from its last
  checkpoint.
  """

  def __init__(self, dump_secs: float, exit_secs: float):
    """Sets the limits in seconds; 0 means never."""
    self._doing = "starting"
    self._last = 0.0
    self._is_limited = True
    self._changed = threading.Condition()
    self._closed = False
    # (seconds, process ends), in ascending order.
    self._limits = sorted(
      (secs, ends)
      for secs, ends in ((dump_secs, False), (exit_secs, True))
      if secs
    )
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Watchdog:
    self.alive(self._doing)
    if self._limits:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    with self._changed:
      self._closed = True
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  def alive(self, doing: str, *, is_limited: bool = True) -> None:
    """Resets the time limits.

    Args:
      doing: operation that starts now, such as 'step 7', for the message.
      is_limited: False for an operation that may take any time; the limits hold
        again from the next call on.
    """
    with self._changed:
      self._doing, self._last = doing, time.monotonic()
      self._is_limited = is_limited
      self._changed.notify()

  def _watch(self) -> None:
    with self._changed:
      since, limits = self._last, self._limits
      while not self._closed:
        if self._last != since:
          since = self._last
          limits = self._limits if self._is_limited else []
        waited = time.monotonic() - since
        if limits and waited >= limits[0][0]:
          self._report(waited, ends=limits[0][1])
          limits = limits[1:]
        else:
          self._changed.wait(limits[0][0] - waited if limits else None)

  def _report(self, waited: float, *, ends: bool) -> None:
    advice = (
      f"The process ends with exit code {TRY_AGAIN}; run the same command "
      "again to resume from the last checkpoint."
      if ends
      else "config.watchdog sets how long to wait."
    )
    print(
      f"\n{self._doing} has not ended for {waited:.0f} s. Stacks of "
      "all threads, the main thread last:",
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    print(advice, file=sys.stderr, flush=True)
    if ends:
      # The main thread is inside a call that does not return: sys.exit would
      # not end the process.
      os._exit(TRY_AGAIN)
