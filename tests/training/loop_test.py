"""Signals that the training loop notes."""

import os
import signal

import pytest

from marlin_jax.training import loop


def test_the_first_signal_is_noted_and_a_second_ctrl_c_interrupts():
  before = signal.getsignal(signal.SIGINT)
  with loop.StopSignal() as stop:
    assert stop.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before
