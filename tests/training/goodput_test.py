"""Goodput: every second of a run is counted once."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from marlin_jax.training import goodput

ROOT = Path(__file__).parents[2]


class Clock:
  """Time that passes when told to."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def sleep(self, secs):
    self.now += secs


class Step:
  """A step on a device, done at a given time; a future of that time."""

  def __init__(self, clock, done):
    self._clock, self._done = clock, done

  def done(self):
    return self._done <= self._clock.now

  def result(self):
    self._clock.now = max(self._clock.now, self._done)
    return self._done


class Loop:
  """A training loop on a clock of its own, with a device that is one too."""

  def __init__(self, **settings):
    self.clock = Clock()
    self.timer = goodput.Timer(
      clips_per_step=4,
      age_secs=7.0,
      clock=self.clock,
      watch=lambda step: step,
      **settings,
    )
    self._device_free = 0.0

  def spend(self, kind, secs):
    with self.timer.on(kind):
      self.clock.sleep(secs)

  def step(self, *, fetch, device):
    """One round: seconds to fetch a batch, seconds that the step takes."""
    self.spend("data", fetch)
    self._device_free = max(self.clock.now, self._device_free) + device
    self.timer.step_started(Step(self.clock, self._device_free))

  def spent(self):
    """Seconds up to now of each kind that has any."""
    secs = sums(self.timer.totals())
    return {kind: value for kind, value in secs.items() if value}


def sums(row):
  """Seconds by kind, of a line of metrics.jsonl; they must add up."""
  kinds = {kind: row[f"goodput/{kind}_secs"] for kind in goodput.KINDS}
  assert math.fsum(kinds.values()) == row["goodput/total_secs"]
  assert row["goodput/ratio"] == kinds["step"] / row["goodput/total_secs"]
  return kinds


def test_every_second_since_the_process_started_is_of_one_kind():
  loop = Loop()
  loop.clock.sleep(3)
  loop.spend("compile", 40)
  loop.clock.sleep(1)
  loop.timer.enter("step")
  loop.step(fetch=2, device=10)
  loop.timer.wait()
  loop.spend("checkpoint", 5)
  loop.spend("eval", 6)
  loop.spend("profile", 0.5)
  loop.timer.enter("checkpoint")
  loop.clock.sleep(4)
  row = loop.timer.totals()
  assert {kind: secs for kind, secs in sums(row).items() if secs} == {
    "start": 7 + 3 + 1,
    "compile": 40,
    "data": 2,
    "step": 10,
    "checkpoint": 5 + 4,
    "eval": 6,
    "profile": 0.5,
  }
  assert row["goodput/total_secs"] == 7 + loop.clock.now - 1000


@pytest.mark.parametrize(
  ("fetch", "waited"),
  [(1, 0), (10, 0), (12, 2)],
  ids=["step_still_running", "just_in_time", "step_done_before"],
)
def test_waiting_for_a_batch_counts_only_while_no_step_runs(fetch, waited):
  loop = Loop()
  loop.timer.enter("step")
  loop.step(fetch=0, device=10)
  loop.step(fetch=fetch, device=10)
  loop.timer.wait()
  assert loop.spent().get("data", 0) == waited
  assert loop.spent()["step"] == 20


def test_steps_alternate_with_their_batches_where_reading_is_too_slow():
  loop = Loop()
  loop.timer.enter("step")
  for _ in range(5):
    loop.step(fetch=3, device=2)
  loop.timer.wait()
  rates = loop.timer.read()
  # 3 s for the first batch, then 2 s of the 3 are covered by a step.
  assert loop.spent() == {"start": 7, "data": 3 + 4 * 1, "step": 5 * 2}
  assert rates["time/data_wait_ratio"] == pytest.approx(7 / 17)
  assert rates["time/step_secs"] == pytest.approx(17 / 5)


def test_saving_beside_a_running_step_costs_only_what_it_outlasts():
  loop = Loop()
  loop.timer.enter("step")
  loop.step(fetch=0, device=10)
  loop.spend("checkpoint", 4)
  loop.spend("eval", 8)
  assert loop.spent() == {"start": 7, "step": 10, "eval": 2}


def test_rates_leave_out_what_is_neither_step_nor_data():
  loop = Loop()
  loop.timer.enter("step")
  loop.timer.begin_stage(20.0)
  for _ in range(2):
    loop.step(fetch=1, device=4)
    loop.timer.wait()
    loop.spend("eval", 100)
  rates = loop.timer.read()
  assert rates["time/step_secs"] == 5
  assert rates["time/clips_per_sec"] == pytest.approx(4 / 5)
  assert rates["time/data_wait_ratio"] == pytest.approx(1 / 5)
  assert rates["time/mfu"] == pytest.approx(4 / 5 / 20)
  loop.step(fetch=0, device=2)
  loop.timer.wait()
  assert loop.timer.read()["time/step_secs"] == 2


def test_a_stage_has_rates_of_its_own():
  loop = Loop()
  loop.timer.enter("step")
  for peak, num_steps, secs in ((20.0, 3, 1), (10.0, 2, 4)):
    loop.timer.begin_stage(peak)
    for _ in range(num_steps):
      loop.step(fetch=1, device=secs)
      loop.timer.wait()
      row = loop.timer.read()
    loop.spend("checkpoint", 50)
    rates = loop.timer.stage_rates()
    assert rates["time/step_secs"] == row["time/step_secs"] == 1 + secs
    assert rates["time/mfu"] == pytest.approx(4 / (1 + secs) / peak)


def test_a_thread_notes_when_a_real_step_is_done():
  timer = goodput.Timer(clips_per_step=1)
  step = jax.jit(lambda x: (x @ x).sum())
  timer.enter("step")
  for _ in range(3):
    with timer.on("data"):
      x = jnp.ones((64, 64))
    timer.step_started({"loss": step(x)})
  timer.wait()
  row = timer.read()
  assert sums(row)["step"] > 0
  assert "time/mfu" not in row


def test_the_summary_gives_shares_of_the_whole_time():
  carried = {"step": 7000.0, "lost": 80.0, "down": 720.0}
  loop = Loop(carried=carried)
  loop.spend("compile", 60)
  loop.clock.sleep(237)
  assert loop.timer.summary() == (
    "time 2:03:04: step 94.8%, compile 0.8%, start 3.3%, lost 1.1%; "
    "down 0:12:00 in between"
  )


# --- over several processes ---------------------------------------------------


def make_row(number, unix_secs, /, **secs):
  kinds = {kind: secs.get(kind, 0.0) for kind in (*goodput.KINDS, "down")}
  total = math.fsum(kinds.values()) - kinds["down"]
  return {
    "step": number,
    "train/loss_rec": 0.5,
    **{f"goodput/{kind}_secs": value for kind, value in kinds.items()},
    "goodput/total_secs": total,
    "time/unix_secs": unix_secs,
  }


def carry(path, rows, start_step, *, born=0.0):
  """Returns what a process born at `born` takes over, without zeros."""
  path = path / "metrics.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  carried = goodput.carried_over(path, start_step, now=born + 9, age_secs=9)
  return {kind: secs for kind, secs in carried.items() if secs}


def test_a_new_run_starts_from_nothing(tmp_path):
  carried = goodput.carried_over(tmp_path / "metrics.jsonl", 0)
  assert not any(carried.values())


def test_a_file_of_an_older_version_starts_from_nothing(tmp_path):
  rows = [{"step": 1, "time/step_secs": 3.0}, {"step": 2, "eval/x": 1.0}]
  assert carry(tmp_path, rows, 1, born=50) == {}


def test_steps_after_the_checkpoint_were_lost_and_starting_was_not(tmp_path):
  rows = [
    make_row(1, 100, start=5.0, compile=20.0, step=3.0),
    make_row(4, 130, start=5.0, compile=20.0, step=20.0, data=1.0),
    make_row(4, 133, start=5.0, compile=20.0, step=20.0, data=1.0, eval=3.0),
    {"step": 6, "eval/train/loss_rec": 0.1},
    make_row(7, 170, start=5.0, compile=20.0, step=51.0, data=4.0, eval=6.0),
  ]
  carried = carry(tmp_path, rows, 5, born=190)
  assert carried == {
    "start": 5,
    "compile": 20,
    "step": 20,
    "data": 1,
    "eval": 3,
    "lost": 31 + 3 + 3,
    "down": 20,
  }


def test_all_steps_were_lost_where_nothing_was_saved(tmp_path):
  rows = [make_row(1, 100, start=5.0, compile=20.0, step=30.0)]
  carried = carry(tmp_path, rows, 0, born=100)
  assert carried == {"start": 5, "compile": 20, "lost": 30}


def test_clocks_that_disagree_take_no_time_back(tmp_path):
  rows = [make_row(1, 100, step=30.0)]
  assert carry(tmp_path, rows, 1, born=40) == {"step": 30}


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
  path = tmp_path / "metrics.jsonl"
  text = json.dumps(make_row(2, 100, step=30.0))
  path.write_text(f"{text}\n{text[:40]}")
  carried = goodput.carried_over(path, 2, now=101, age_secs=1)
  assert carried["step"] == 30


def test_nothing_is_counted_twice_over_several_restarts(tmp_path):
  """Three processes: each second of each is in the last one's sums."""
  path = tmp_path / "metrics.jsonl"
  born, kept, rows = 0.0, [], []
  for start_step in (0, 2, 2):  # what is done after step 2 is always lost
    kept = [row for row in rows if row["step"] <= start_step]
    carried = goodput.carried_over(path, start_step, now=born + 7, age_secs=7)
    loop = Loop(carried=carried)
    loop.timer.enter("step")
    rows = kept
    for step in range(start_step + 1, start_step + 5):
      loop.step(fetch=1, device=10)
      loop.timer.wait()
      lived = 7 + loop.clock.now - 1000
      row = loop.timer.read() | {"time/unix_secs": born + lived}
      rows.append({"step": step, **row})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    born += lived + 100  # for a hundred seconds there is none
  last = rows[-1]
  assert sums(last) == {
    "step": 2 * 10 + 4 * 10,
    "data": 2 * 1 + 4 * 1,
    "start": 3 * 7,
    "lost": 2 * 11 + 4 * 11,
    **dict.fromkeys(("checkpoint", "eval", "compile", "profile"), 0),
  }
  assert last["goodput/total_secs"] == 3 * (7 + 4 * 11)
  assert last["goodput/down_secs"] == 2 * 100


def test_a_run_is_counted_from_its_own_beginning():
  def total():
    return goodput.Timer(clips_per_step=1).totals()["goodput/total_secs"]

  # The process of a program is the run's, so its age counts.
  with goodput.running(1e6):
    assert 1e6 <= total() < 2e6
    with goodput.running():
      assert 1e6 <= total() < 2e6
  # Of a process that has done other work before, only the run.
  with goodput.running():
    assert total() < goodput.process_age_secs()


def test_a_process_began_before_its_first_line():
  boot_secs = "time.clock_gettime(time.CLOCK_BOOTTIME)"
  code = (
    f"import time; first = {boot_secs}\n"
    "from marlin_jax.training import goodput\n"
    # In this order: a pause between the two makes the birth later, not earlier.
    "age = goodput.process_age_secs()\n"
    f"print(first, {boot_secs} - age)"
  )
  before = time.clock_gettime(time.CLOCK_BOOTTIME)
  output = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=ROOT,
  ).stdout
  first, born = map(float, output.split())
  assert before - 0.02 < born <= first  # the kernel counts in hundredths
