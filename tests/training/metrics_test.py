"""metrics.jsonl, trackers and the progress line."""

import errno
import json
import os
import struct
import sys
import threading

import numpy as np
import pytest

from marlin_jax.records.extras import MissingLibraryError
from marlin_jax.training import configuration, metrics

PICTURE = np.zeros((4, 6, 3), np.uint8)


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def run_of(folder, start_step=0):
  return metrics.Run(folder, "run", {"seed": 0}, start_step)


def write_steps(folder, trackers, *steps):
  """Writes a loss and a picture per step; the run resumes before the first."""
  writer = metrics.MetricWriter(run_of(folder, steps[0] - 1), trackers)
  for step in steps:
    writer.write(step, {"train/loss_rec": step / 10, "bad": float("nan")})
    writer.write_picture(step, "picture", PICTURE)
  writer.close()
  writer.close()


def test_a_resumed_run_replaces_what_came_after_its_step(tmp_path):
  write_steps(tmp_path, "tensorboard", 1, 2, 3)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "train/lo')  # killed while writing
  write_steps(tmp_path, "tensorboard", 3, 4)
  assert rows(tmp_path) == [
    {"step": step, "train/loss_rec": step / 10} for step in (1, 2, 3, 4)
  ]
  assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_trackers_there_is_metrics_jsonl_alone(tmp_path):
  write_steps(tmp_path, "", 1)
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


class Recorder:
  """A sink of somebody else's."""

  def __init__(self, run):
    self.run, self.calls = run, []

  def write(self, step, scalars):
    if step == 2:
      raise ConnectionError("no route")
    self.calls.append((step, dict(scalars)))

  def write_picture(self, step, name, picture):
    self.calls.append((step, name, picture.shape))

  def close(self):
    self.calls.append("close")


def test_a_sink_needs_three_methods_and_may_fail(tmp_path, monkeypatch, capsys):
  made = []
  monkeypatch.setitem(
    metrics._TRACKERS,
    "wandb",
    lambda run: made.append(Recorder(run)) or made[-1],
  )
  write_steps(tmp_path, "wandb,tensorboard", 1)
  write_steps(tmp_path, "wandb,tensorboard", 2, 3)
  first, resumed = made
  assert first.calls == [
    (1, {"train/loss_rec": 0.1}),
    (1, "picture", PICTURE.shape),
    "close",
  ]
  # One that fails gets no more, and the others go on.
  assert resumed.calls == []
  assert "Recorder fails and gets no more metrics: no route" in (
    capsys.readouterr().err
  )
  assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]
  # The run keeps its identity in trackers, and has a name of its own.
  assert first.run.identifier == resumed.run.identifier
  assert first.run.title == f"run-{first.run.identifier}"
  (other := tmp_path / "other").mkdir()
  write_steps(other, "wandb", 1)
  assert made[-1].run.title != first.run.title


@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
def test_tensorboard_files_that_cannot_be_written_do_not_hold_up_the_run(
  tmp_path, monkeypatch, capsys
):
  """The thread that writes them ends, and its queue is soon full."""
  from tensorboardX.event_file_writer import EventsWriter

  def full(self, event):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  writer = metrics.MetricWriter(run_of(tmp_path))
  monkeypatch.setattr(EventsWriter, "write_event", full)

  def write():
    writer.write(0, {"train/loss_rec": 1.0})
    for other in threading.enumerate():
      if type(other).__name__ == "_EventLoggerThread":
        other.join()
    for step in range(1, 40):
      writer.write(step, {"train/loss_rec": 1.0})
    writer.close()

  thread = threading.Thread(target=write, daemon=True)
  thread.start()
  thread.join(60)
  assert not thread.is_alive()
  assert len(rows(tmp_path)) == 40
  told = capsys.readouterr().err
  assert told.count("TensorBoard fails and gets no more metrics") == 1


def test_a_tracker_that_does_not_start_is_refused(tmp_path, monkeypatch):
  def refuse(run):
    raise RuntimeError("not logged in")

  monkeypatch.setitem(metrics._TRACKERS, "wandb", refuse)
  with pytest.raises(metrics.TrackerError, match="wandb: not logged in"):
    metrics.MetricWriter(run_of(tmp_path), "wandb")


def test_trackers_that_are_missing_or_unknown_are_refused(monkeypatch):
  assert tuple(metrics._TRACKERS) == configuration.TRACKERS
  rule = configuration.TRAINING_KEYS["trackers"].rule
  assert rule.accepts("")
  assert rule.accepts("wandb,tensorboard")
  assert not rule.accepts("wandb,mlflow")
  assert not rule.accepts("wandb,")
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(MissingLibraryError, match=r"'marlin-jax\[wandb\]'"):
    metrics.check_trackers("tensorboard,wandb")
  metrics.check_trackers("tensorboard")


def leveldb_records(log):
  """Yields the records of a log of LevelDB, as in W&B's files of a run."""
  whole, block = b"", 1 << 15
  # W&B's own header of 7 bytes is part of the first block.
  at = 0
  while at + 7 <= len(log):
    if block - (at + 7) % block < 7:
      at += block - (at + 7) % block  # zeros up to the next block
      continue
    _, length, kind = struct.unpack_from("<IHB", log, at)
    whole += log[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # a whole record, or its last part
      yield whole
      whole = b""


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb", reason="pip install 'marlin-jax[wandb]'")
  from wandb.proto import wandb_internal_pb2

  monkeypatch.setenv("WANDB_MODE", "offline")
  write_steps(tmp_path, "wandb", 1, 2)
  write_steps(tmp_path, "wandb", 2, 3)
  # Its process may write the end of a file after `finish` has returned.
  wandb.teardown()
  identifier = rows(tmp_path)[0]["id"]
  files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
  assert [path.stem for path in files] == [f"run-{identifier}"] * 2
  found = []
  for path in files:
    found.append([])
    for data in leveldb_records(path.read_bytes()[7:]):
      record = wandb_internal_pb2.Record.FromString(data)
      found[-1].append(
        {
          "/".join(item.nested_key) or item.key: json.loads(item.value_json)
          for item in record.history.item
        }
      )
  for steps, records in zip(([1, 2], [2, 3]), found, strict=True):
    losses = [
      (record["step"], record["train/loss_rec"])
      for record in records
      if "train/loss_rec" in record
    ]
    assert losses == [(step, step / 10) for step in steps]
    widths = [
      record["picture/width"] for record in records if "picture/width" in record
    ]
    assert widths == [6, 6]


@pytest.mark.filterwarnings("default")
def test_trackio_on_this_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  trackio = pytest.importorskip(
    "trackio", reason="pip install 'marlin-jax[trackio]'"
  )
  from trackio import sqlite_storage

  write_steps(tmp_path, "trackio", 1)
  write_steps(tmp_path, "trackio", 2)
  (run,) = trackio.Api().runs("marlin_jax")
  assert run.name == f"run-{rows(tmp_path)[0]['id']}"
  assert run.config["seed"] == 0
  logs = sqlite_storage.SQLiteStorage.get_logs("marlin_jax", run.name)
  losses = [
    (log["step"], log["train/loss_rec"])
    for log in logs
    if "train/loss_rec" in log
  ]
  assert losses == [(1, 0.1), (2, 0.2)]
  assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


@pytest.mark.parametrize("known", [True, False])
def test_the_progress_line_tells_the_utilisation_where_it_is_known(
  capsys, known
):
  progress = metrics.Progress(10, start=0)
  scalars = {
    "train/loss_rec": 0.5,
    "train/loss_rec_limit": float("inf"),
    "time/step_secs": 60.0,
    "time/clips_per_sec": 12.34,
    "time/data_wait_ratio": 0.012,
  }
  progress.report(4, scalars | ({"time/mfu": 0.4128} if known else {}))
  progress.close()
  mfu = ", MFU 41.3%" if known else ""
  assert capsys.readouterr().out == (
    f"step 4/10: loss_rec 0.5000, 12.3 clips/s{mfu}, data wait 1.2%, "
    "ETA 06:00\n"
  )


def test_the_remaining_time_counts_steps_by_their_cost(capsys):
  """Of ten steps the last five cost three times as much as the others."""
  progress = metrics.Progress(
    10, start=0, work=lambda step: step + 2 * max(step - 5, 0)
  )
  scalars = {
    "time/step_secs": 60.0,
    "time/clips_per_sec": 1.0,
    "time/data_wait_ratio": 0.0,
  }
  for step in (4, 8):
    progress.report(step, scalars)
  progress.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.rpartition(" ")[2] for line in lines] == ["16:00", "02:00"]
