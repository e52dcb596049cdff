"""Ends a run that hangs: in a read, or waiting for another process."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from marlin_jax.devices.distributed import TRY_AGAIN


class Watchdog:
  """Expects signs of life; without, it tells where all threads are.

  After `dump_secs` without one it prints the stacks of all threads, after
  `exit_secs` it prints them again and ends the process with TRY_AGAIN: a
  scheduler can then start the run again, which goes on from its last
  checkpoint.
  """

  def __init__(self, dump_secs: float, exit_secs: float):
    """Starts to watch; 0 stands for never."""
    self._doing = "starting"
    self._last = time.monotonic()
    self._changed = threading.Condition()
    self._closed = False
    # (seconds, whether the process ends then), in order.
    self._limits = sorted(
      (secs, ends)
      for secs, ends in ((dump_secs, False), (exit_secs, True))
      if secs
    )
    self._thread = threading.Thread(target=self._watch, daemon=True)
    if self._limits:
      self._thread.start()

  def alive(self, doing: str) -> None:
    """A sign of life.

    Args:
      doing: what comes now, for the message: 'step 7'.
    """
    with self._changed:
      self._doing, self._last = doing, time.monotonic()
      self._changed.notify()

  def close(self) -> None:
    """Stops watching."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  def _watch(self) -> None:
    with self._changed:
      since, ahead = self._last, self._limits
      while not self._closed:
        if self._last != since:
          since, ahead = self._last, self._limits
        waited = time.monotonic() - since
        if ahead and waited >= ahead[0][0]:
          self._report(waited, ends=ahead[0][1])
          ahead = ahead[1:]
        else:
          self._changed.wait(ahead[0][0] - waited if ahead else None)

  def _report(self, waited: float, *, ends: bool) -> None:
    advice = (
      f"The process ends with exit code {TRY_AGAIN}; the same command goes on "
      "from the last checkpoint."
      if ends
      else "config.watchdog says how long to wait."
    )
    print(
      f"\n{self._doing} has not come to an end for {waited:.0f} s. Where all "
      f"threads are, the main thread last:",
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    print(advice, file=sys.stderr, flush=True)
    if ends:
      # No kinder way: the main thread is inside a call that does not return.
      os._exit(TRY_AGAIN)
