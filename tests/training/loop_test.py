"""The training loop: what is done after a step, in which order, and signals."""

import dataclasses
import errno
import functools
import json
import os
import signal

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import pretrain_b
from marlin_jax.checkpoints import inventory
from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.prepared_dataset import open_dataset
from marlin_jax.data.sampling import RecordDraws
from marlin_jax.devices import sharding
from marlin_jax.pretraining import configuration
from marlin_jax.records import cli, signals
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.training import goodput, loop, remote_files, workdir
from marlin_jax.training.course import Stage
from marlin_jax.training.evaluation import Evaluation, Result
from marlin_jax.training.watchdog import Watchdog
from marlin_jax.training.workdir import SaveTimer
from tests.support import made_dataset
from tests.support.made_dataset import a_record


@flax.struct.dataclass
class Sum:
  """State of a training that adds `weight` to `total` at each step."""

  step: jax.Array
  num_skipped: jax.Array
  weight: jax.Array
  total: jax.Array


class AddingCourse:
  """The least that the loop can train."""

  take_clip = TakeClip(Clip(num_frames=2, stride=1), tubelet_size=2)
  fields = ("_id",)
  batch_size = 1
  identity = {"seed": 0}

  def __init__(self, config, dataset, num_steps, first_stage=0):
    """Adds ten times as much after the `first_stage` steps of a first stage."""
    self.config, self.dataset, self.num_steps = config, dataset, num_steps
    draws = RecordDraws(dataset, config.seed)
    self.stages = [Stage(num_steps, draws, self.take_clip, self.make_step)]
    if first_stage:
      self.stages = [
        Stage(
          last_step,
          draws,
          dataclasses.replace(self.take_clip, frame_size=size),
          functools.partial(self.make_step, factor),
          name=f"stage {factor}",
          summary=f"{size} pixels",
        )
        for last_step, size, factor in (
          (first_stage, 32, 1),
          (num_steps, 64, 10),
        )
      ]
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self.shapes = Sum(*(jnp.int32(x) for x in (0, 0, 1, 0)))
    everywhere = sharding.replicated(self.mesh)
    self.shardings = jax.tree.map(lambda _: everywhere, self.shapes)

  def describe(self):
    return [cli.Row("data", "one record", ["read again and again"])]

  def first_state(self):
    return jax.device_put(self.shapes, self.shardings)

  def make_step(self, factor=1):
    def step(state, batch):
      assert batch.keys() == {"_id"}
      state = state.replace(
        step=state.step + 1, total=state.total + factor * state.weight
      )
      scalars = {"loss_rec": state.total, "num_skipped": state.num_skipped}
      return state, scalars

    return jax.jit(step)

  def learning_rates(self, state):
    return {"lr": 0.5 / int(state.step)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  path = tmp_path_factory.mktemp("loop") / "data"
  made_dataset.make(path, {"0.mp4": [a_record("0.mp4")]})
  return open_dataset(str(path), "train")


@pytest.fixture
def events(monkeypatch):
  """Saves, evaluations and publications of the loop, in their order."""
  seen = []
  save, publish = Checkpoints.save, remote_files.RunFiles.publish

  def noted_save(self, step, state, *args):
    seen.append(f"save {step}: {state.total}")
    save(self, step, state, *args)

  def noted_publish(self):
    seen.append("publish")
    publish(self)

  monkeypatch.setattr(Checkpoints, "save", noted_save)
  monkeypatch.setattr(remote_files.RunFiles, "publish", noted_publish)
  return seen


def train(
  dataset,
  workdir,
  num_steps,
  events,
  *,
  kill_at=None,
  evaluations=None,
  first_stage=0,
  **settings,
):
  """Trains; one evaluator doubles the weight, another changes nothing."""
  config = pretrain_b.get_config()
  config.checkpoint_steps, config.log_steps = 3, 2
  config.update(settings)

  def double(state):
    events.append(f"double {state.step}")
    return Result(
      {"eval/weight": float(state.weight)},
      state=state.replace(weight=2 * state.weight),
    )

  def look(state):
    events.append(f"look {state.step}")
    return Result(sentence="it looks well")

  def kill(state):
    if state.step == kill_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return Result()

  return loop.train(
    AddingCourse(config, dataset, num_steps, first_stage),
    lambda workdir, alive: evaluations
    or [
      Evaluation(2, double, before_save=True),
      Evaluation(3, look),
      # Where nothing else is due, the next step is the last.
      Evaluation(1, kill, before_save=True),
    ],
    str(workdir),
    Watchdog(dump_secs=0, exit_secs=0),
  )


def test_the_state_is_changed_then_saved_then_evaluated_then_published(
  dataset, tmp_path, events, capfd
):
  state, signum = train(dataset, tmp_path, 7, events)
  assert signum is None
  assert events == [
    "double 2",
    *("save 3: 4", "look 3", "publish"),
    "double 4",
    *("double 6", "save 6: 14", "look 6", "publish"),
    # The last step is not a multiple of 2: it is evaluated, and not changed.
    *("double 7", "save 7: 22", "look 7", "publish"),
    "publish",
  ]
  assert state.weight == 8
  assert "step 6: it looks well\n" in capfd.readouterr().out
  rows = [
    json.loads(line)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  totals = {
    r["step"]: r["train/loss_rec"] for r in rows if "train/loss_rec" in r
  }
  assert totals == {1: 1, 2: 2, 4: 6, 6: 14, 7: 22}


def test_a_signal_saves_without_evaluation_and_the_run_resumes_to_the_same_bits(
  dataset, tmp_path, events
):
  whole, _ = train(dataset, tmp_path / "whole", 9, events)
  events.clear()
  halved = tmp_path / "halved"
  state, signum = train(dataset, halved, 9, events, kill_at=5)
  assert signum == signal.SIGTERM
  assert state.step == 6
  # The state changes as in a run without a signal; nobody looks on.
  assert events == [
    "double 2",
    *("save 3: 4", "look 3", "publish"),
    "double 4",
    *("double 6", "save 6: 14", "publish"),
    "publish",
  ]
  events.clear()
  resumed, signum = train(dataset, halved, 9, events)
  assert events[:3] == ["look 6", "publish", "double 8"]
  assert signum is None
  assert jax.tree.leaves(resumed) == jax.tree.leaves(whole)


@pytest.mark.parametrize("kill_at", [1, 2, 4])
def test_each_stage_takes_its_steps_also_after_a_signal(
  dataset, tmp_path, events, capfd, kill_at
):
  """Before the end of the first stage, with its last step, and after it."""
  options = {"first_stage": 3, "log_steps": 100}
  _, signum = train(dataset, tmp_path, 6, events, kill_at=kill_at, **options)
  assert signum == signal.SIGTERM
  state, _ = train(dataset, tmp_path, 6, events, **options)
  assert state.step == 6
  # The weight doubles after steps 2, 4 and 6.
  assert state.total == 1 + 1 + 2 + 10 * (2 + 4 + 4)
  rows = [
    json.loads(line)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  ends = [row for row in rows if row.get("event") == "stage"]
  assert [(row["step"], row["stage"], row["clips"]) for row in ends] == [
    (3, "stage 1", "32 pixels"),
    (6, "stage 10", "64 pixels"),
  ]
  stages = {r["step"]: r["train/stage"] for r in rows if "train/stage" in r}
  assert stages.items() >= {1: 1, 3: 1, 6: 2}.items()
  assert "stage 1 ends with step 3: " in capfd.readouterr().out


def test_the_first_signal_is_noted_and_a_second_ctrl_c_interrupts():
  before = signal.getsignal(signal.SIGINT)
  with signals.StopSignal() as stop:
    assert stop.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_evaluations_before_a_save_ends_them(
  dataset, tmp_path, events
):
  """With best_metric a step is evaluated before it is saved."""

  def killed(state):
    os.kill(os.getpid(), signal.SIGTERM)
    return Result({"eval/first": 1.0})

  def late(state):
    events.append("late")
    return Result({"eval/second": 1.0})

  state, signum = train(
    dataset,
    tmp_path,
    9,
    events,
    evaluations=[Evaluation(2, killed), Evaluation(2, late)],
    best_metric="eval/second",
  )
  assert signum == signal.SIGTERM
  assert state.step == 2
  assert events == ["save 2: 2", "publish", "publish"]


@pytest.mark.parametrize(
  ("num_steps", "saved_first"), [(9, True), (9, False), (2, True)]
)
def test_evaluations_that_a_signal_ended_are_done_when_the_run_resumes(
  dataset, tmp_path, events, num_steps, saved_first
):
  """After a save, before one, and at the end of the run."""
  settings = {"checkpoint_steps": 2 if saved_first else 5}

  def evaluations(killed):
    def first(state):
      events.append(f"first {state.step}")
      if killed:
        os.kill(os.getpid(), signal.SIGTERM)
      return Result({"eval/first": 1.0})

    def second(state):
      events.append(f"second {state.step}")
      return Result({"eval/second": 1.0})

    return [Evaluation(2, first), Evaluation(2, second)]

  state, signum = train(
    dataset,
    tmp_path,
    num_steps,
    events,
    evaluations=evaluations(killed=True),
    **settings,
  )
  assert (state.step, signum) == (2, signal.SIGTERM)
  save = ["save 2: 2"]
  before, after = (save, []) if saved_first else ([], save)
  assert events == [*before, "first 2", *after, "publish", "publish"]

  for seen in (["first 2", "second 2", "publish"], []):
    events.clear()
    _, signum = train(
      dataset,
      tmp_path,
      num_steps,
      events,
      evaluations=evaluations(killed=False),
      **settings,
    )
    assert signum is None
    assert [x for x in events if x.endswith(" 2")] == seen[:2]
    assert events[: len(seen)] == seen


def test_a_run_that_is_cut_short_is_evaluated_at_its_new_last_step(
  dataset, tmp_path, events
):
  """And a finished one that becomes longer is not evaluated there again."""
  state, signum = train(dataset, tmp_path, 9, events, kill_at=4)
  assert (state.step, signum) == (5, signal.SIGTERM)  # where nothing is due
  for num_steps, expected in (
    (5, ["look 5", "double 5"]),
    (5, []),
    (6, ["double 6", "look 6"]),
  ):
    events.clear()
    state, signum = train(dataset, tmp_path, num_steps, events)
    assert (state.step, signum) == (num_steps, None)
    found = [x for x in events if x.startswith(("look", "double"))]
    assert found == expected
  with pytest.raises(
    inventory.ResumeError, match="num_steps=5: expected at least 6"
  ):
    train(dataset, tmp_path, 5, events)


def test_an_evaluation_before_the_last_save_is_made_up_for_too(
  dataset, tmp_path, events
):
  state, signum = train(dataset, tmp_path, 3, events, kill_at=2)
  assert (state.step, signum) == (3, signal.SIGTERM)
  assert events == ["double 2", "save 3: 4", "publish", "publish"]
  events.clear()
  state, signum = train(dataset, tmp_path, 3, events)
  assert signum is None
  assert state.weight == 2
  assert events == ["look 3", "double 3", "publish", "publish"]


def test_a_signal_while_the_last_checkpoint_is_saved_does_not_end_the_run(
  dataset, tmp_path, events, monkeypatch
):
  close, came_through = Checkpoints.close, []

  def close_under_fire(self):
    os.kill(os.getpid(), signal.SIGTERM)
    close(self)

  monkeypatch.setattr(Checkpoints, "close", close_under_fire)
  before = signal.signal(signal.SIGTERM, lambda *_: came_through.append(1))
  try:
    state, signum = train(dataset, tmp_path, 4, events)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert state.step == 4
  assert signum is None
  assert not came_through


def test_a_full_disk_is_told_in_words(dataset, tmp_path, events, capfd):
  """Metrics and pictures are written between checkpoints."""

  def draw(state):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "pictures/1.png")

  evaluations = [Evaluation(2, draw)]
  with pytest.raises(SystemExit) as ended:
    loop.run_training(
      lambda: train(dataset, tmp_path, 3, events, evaluations=evaluations)
    )
  assert ended.value.code == os.EX_TEMPFAIL
  told = capfd.readouterr().err
  assert "error: a disk is full (pictures/1.png): No space left" in told
  assert "Traceback" not in told


def test_a_program_spends_its_imports_and_a_later_call_does_not(
  dataset, tmp_path, events
):
  def spent(name):
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["goodput/total_secs"]

  age = goodput.process_age_secs()
  loop.run_training(lambda: train(dataset, tmp_path / "program", 2, events))
  train(dataset, tmp_path / "call", 2, events)
  assert spent("call") < age < spent("program")


def test_too_little_memory_is_told_and_not_tried_again(capfd):
  def run():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9.00G of 8.00G")

  with pytest.raises(SystemExit) as ended:
    loop.run_training(run)
  assert ended.value.code == 1
  told = capfd.readouterr().err
  assert "out of memory: RESOURCE_EXHAUSTED: 9.00G of 8.00G\n" in told
  assert "config.clips_per_device" in told
  assert "Traceback" not in told


@pytest.mark.parametrize("left", ['{"data": {"sample', "", "[]"])
def test_a_config_that_a_kill_cut_off_does_not_prevent_resuming(tmp_path, left):
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  (tmp_path / "config.json").write_text(left)
  config = pretrain_b.get_config()
  saved = workdir.begun_with(tmp_path)
  begun, notes = workdir.as_begun(config, configuration.KEYS, tmp_path, saved)
  assert begun.to_dict() == config.to_dict()
  assert notes == []


@pytest.mark.parametrize("is_saved", [False, True])
def test_only_a_run_that_has_saved_keeps_the_values_that_it_began_with(
  tmp_path, is_saved
):
  """One that did not fit in memory, for example, begins with other values."""
  old, new = pretrain_b.get_config(), pretrain_b.get_config()
  old.data.sample_by = "record"
  (tmp_path / "config.json").write_text(old.to_json())
  if is_saved:
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  saved = workdir.begun_with(tmp_path)
  begun, notes = workdir.as_begun(new, configuration.KEYS, tmp_path, saved)
  assert begun.data.sample_by == ("record" if is_saved else "video")
  assert len(notes) == is_saved


# --- When it saves ------------------------------------------------------------


def steps_of(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_the_last_the_best_and_every_nth_checkpoint_are_kept(
  dataset, tmp_path, events
):
  """Metric and mode decide; a resumed run remembers the best."""
  losses = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 4.0, 12: 0.5}
  settings = {
    "best_metric": "eval/loss",
    "checkpoint_steps": 3,
    "keep_checkpoints": 1,
    "keep_every_steps": 5,
  }

  def measure(state):
    return Result({"eval/loss": losses[int(state.step)]})

  def run(num_steps):
    train(
      dataset,
      tmp_path,
      num_steps,
      events,
      evaluations=[Evaluation(2, measure)],
      **settings,
    )
    return [e.split(":")[0] for e in events if e.startswith("save")]

  # 2 and 4 are the best so far, 6 and 8 are not.
  assert run(8) == [f"save {step}" for step in (2, 3, 4, 5, 6, 8)]
  assert steps_of(tmp_path) == [4, 5, 8]
  assert inventory.best_step(tmp_path / "checkpoints") == 4
  events.clear()
  assert run(10) == ["save 9", "save 10"]
  assert steps_of(tmp_path) == [4, 5, 10]
  events.clear()
  assert run(12) == ["save 12"]
  assert steps_of(tmp_path) == [5, 10, 12]
  assert inventory.best_step(tmp_path / "checkpoints") == 12


def test_the_highest_value_may_be_the_best(dataset, tmp_path, events):
  def measure(state):
    return Result({"eval/auc": {1: 0.5, 2: 0.9}.get(int(state.step), 0.7)})

  train(
    dataset,
    tmp_path,
    4,
    events,
    evaluations=[Evaluation(1, measure)],
    best_metric="eval/auc",
    best_mode="max",
    keep_checkpoints=1,
  )
  assert steps_of(tmp_path) == [2, 4]
  assert inventory.best_step(tmp_path / "checkpoints") == 2


def test_a_metric_that_no_evaluation_has_is_told_once(
  dataset, tmp_path, events, capfd
):
  train(dataset, tmp_path, 7, events, best_metric="eval/wait")
  output = capfd.readouterr().out
  assert output.count("best_metric='eval/wait' is in no evaluation") == 1
  assert "there are: eval/weight\n" in output


def test_a_metric_that_is_not_due_yet_is_not_missed(
  dataset, tmp_path, events, capfd
):
  """In a run that a signal ends early, and in one that resumes."""
  settings = {"best_metric": "eval/weight"}
  train(dataset, tmp_path, 9, events, kill_at=1, **settings)
  evaluations = [Evaluation(2, lambda state: Result({"eval/weight": 1.0}))]
  train(dataset, tmp_path, 9, events, evaluations=evaluations, **settings)
  assert "is in no evaluation" not in capfd.readouterr().out


def test_time_alone_may_decide_when_to_save(dataset, tmp_path, events):
  train(
    dataset,
    tmp_path,
    3,
    events,
    checkpoint_steps=0,
    checkpoint_minutes=1e-9,
    keep_checkpoints=9,
  )
  assert steps_of(tmp_path) == [1, 2, 3]


def test_a_timer_asks_once_and_again_after_the_next_save():
  timer = SaveTimer(1e-9)
  assert timer.is_due()
  assert not timer.is_due()
  timer.restart()
  assert timer.is_due()
  assert not SaveTimer(0).is_due()
  assert not SaveTimer(10).is_due()


def test_the_folder_of_a_data_set_is_no_workdir(tmp_path):
  (tmp_path / "settings.json").write_text("{}")
  opened = workdir.Workdir(str(tmp_path), pretrain_b.get_config(), (), 0)
  with pytest.raises(OutputFolderError, match="no workdir of a run"), opened:
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_config_of_another_program_is_not_replaced(tmp_path):
  config = ConfigDict({"data": {"path": "D"}, "num_steps": 3, "log_steps": 1})
  file = tmp_path / "config.json"
  workdir.check_config(file, config)
  whole = config.to_json()
  for own in (whole, whole[:9], '{"data": 1, "log_steps": 2}'):
    file.write_text(own)
    workdir.check_config(file, config)
  for other in ('{"model_type": "videomae", "num_steps": 1}', "[]"):
    file.write_text(other)
    with pytest.raises(OutputFolderError, match="another --workdir"):
      workdir.check_config(file, config)
