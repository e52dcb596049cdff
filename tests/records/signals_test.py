"""Signals raise exceptions, wherever they strike.

Outside the context, what fails in a destructor is an error in these tests.
"""

import os
import signal
import sys
import threading
import time

import pytest

from marlin_jax.records import signals


class Ending(BaseException):
  pass


def strike() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


class StruckAtItsEnd:
  def __del__(self):
    strike()


class HalfMade:
  def __init__(self):
    strike()
    self.pointer = 1

  def __del__(self):
    assert self.pointer == 1


def collected(work) -> list[str]:
  """Returns the steps that a generator yields before a signal ends it."""
  steps = []

  def collect():
    for step in work():
      steps.append(step)

  with pytest.raises(Ending), signals.raised_as(Ending(), signal.SIGTERM):
    collect()
  return steps


def steps_around_a_destructor():
  StruckAtItsEnd()
  yield "struck"
  time.sleep(30)
  yield "slept"


def test_a_signal_that_a_destructor_swallowed_is_raised_after_it():
  assert collected(steps_around_a_destructor) == ["struck"]


def test_a_signal_during_the_report_on_a_destructor_is_raised_after_it(
  monkeypatch,
):
  send = signals._send_again

  def send_at_once(number):
    monkeypatch.setattr(signals, "_send_again", send)
    os.kill(os.getpid(), number)

  monkeypatch.setattr(signals, "_send_again", send_at_once)
  assert collected(steps_around_a_destructor) == ["struck"]


def test_an_object_that_was_left_half_made_is_destroyed_in_silence():
  with pytest.raises(Ending), signals.raised_as(Ending(), signal.SIGTERM):
    HalfMade()


def test_handlers_are_as_before_after_it_and_ignored_signals_stay_so():
  before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  handlers = signal.getsignal(signal.SIGTERM), sys.unraisablehook
  try:
    with signals.raised_as(Ending(), signal.SIGTERM, signal.SIGUSR1):
      os.kill(os.getpid(), signal.SIGUSR1)
      assert signal.getsignal(signal.SIGTERM) is not handlers[0]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGUSR1, before)
  assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == handlers


def test_a_blocked_signal_waits():
  def steps():
    with signals.blocked(signal.SIGTERM):
      signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
      yield "struck"
    yield "unblocked"

  assert collected(steps) == ["struck"]
