"""What a run tells."""

import json
import os
import signal

import numpy as np
import pytest

from marlin_jax import metrics


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_resumed_run_replaces_what_came_after_its_step(tmp_path):
  writer = metrics.MetricWriter(tmp_path, start_step=0)
  for step in (1, 2, 3):
    writer.write(step, {"train/loss_rec": step / 10})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "train/lo')  # killed while writing
  writer = metrics.MetricWriter(tmp_path, start_step=2)
  writer.write(3, {"train/loss_rec": 0.5})
  writer.write_picture(3, "picture", np.zeros((4, 6, 3), np.uint8))
  writer.close()
  assert rows(tmp_path) == [
    {"step": 1, "train/loss_rec": 0.1},
    {"step": 2, "train/loss_rec": 0.2},
    {"step": 3, "train/loss_rec": 0.5},
  ]


def test_rates_leave_out_what_is_neither_step_nor_data():
  timer = metrics.Timer(clips_per_step=4)
  with timer.waiting_for_data():
    pass
  timer.step_started(np.zeros(()))
  rates = timer.read()
  assert set(rates) == {
    "time/step_secs",
    "time/clips_per_sec",
    "time/data_wait_ratio",
  }
  np.testing.assert_allclose(
    rates["time/clips_per_sec"] * rates["time/step_secs"], 4
  )
  assert 0 <= rates["time/data_wait_ratio"] <= 1


def test_the_first_signal_is_noted_and_a_second_ctrl_c_interrupts():
  before = signal.getsignal(signal.SIGINT)
  with metrics.StopSignal() as stop:
    assert stop.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before
