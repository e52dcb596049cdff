"""Training in two processes of four devices equals one process of eight."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.checkpoints import checksums
from marlin_jax.data import loader, prepared_dataset, sampling
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.devices import distributed
from marlin_jax.records import folders
from tests.support.files import arrays_of, rows_of
from tests.support.processes import ROOT, children
from tests.support.training_runs import (
  TINY,
  command,
  finish,
  free_port,
  metrics_of,
  refused,
  start,
  start_two,
)

# Each test starts several processes that compile a step.
pytestmark = pytest.mark.slow

NUM_STEPS = 7
# fsdp spans both processes, tensor stays within each.
SPREAD = {
  "batch_size": 8,
  "clips_per_device": 2,
  "num_steps": NUM_STEPS,
  "mesh.fsdp": 4,
  "mesh.tensor": 2,
  "eval_steps": 2,
  "picture_steps": 2,
  # Compiles fastest.
  "mask.strategy": "random",
}
STEP = TINY["checkpoint_steps"]


@pytest.fixture(scope="module")
def runs(sample_dataset, face_data, tmp_path_factory):
  """Runs training in one process, and in two until one of them gets SIGTERM.

  Returns:
    Both workdirs, and the outputs of the two processes.
  """
  overrides = SPREAD | {
    "data.path": sample_dataset,
    "probe.steps": 2,
    "probe.path": face_data,
    "probe.label": "emotion",
    "probe.num_videos": 8,
    "probe.num_windows": 1,
  }
  alone = tmp_path_factory.mktemp("alone")
  ended = tmp_path_factory.mktemp("ended")
  undisturbed = start(command(alone, **overrides), 8)
  with_workers = overrides | {"data.num_workers": 1}
  first, second = start_two(ended, **with_workers)
  seen = []
  for line in first.stdout:
    seen.append(line)
    # During the evaluations of step 2, the signal would end them.
    if "step_0000002.png" in line:
      second.send_signal(signal.SIGUSR1)
      # To the workers that read, too, as a cluster that ends a job does.
      for process_id in (second.pid, *children(second.pid)):
        os.kill(process_id, signal.SIGTERM)
      break
  finish(undisturbed)
  outputs = [
    finish(first, 128 + signal.SIGTERM, "".join(seen)),
    finish(second, 128 + signal.SIGTERM),
  ]
  return alone, ended, outputs


def last_step(workdir):
  return max(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_a_signal_to_one_process_saves_and_ends_all_at_the_same_step(runs):
  _, ended, (first, second) = runs
  step = last_step(ended)
  assert 2 < step < NUM_STEPS
  assert max(metrics_of(ended)) == step
  assert f"step {step} of {NUM_STEPS} is saved" in first
  assert "SIGTERM: finishing this step" in second
  assert "SIGTERM" not in first


def test_only_the_first_process_tells_and_writes(runs):
  _, ended, (first, second) = runs
  assert "8 x cpu in 2 processes\n" in first
  assert "data 1, fsdp 4, tensor 2;" in first
  assert "loss_rec" in first
  assert "loss_rec" not in second
  steps = [row["step"] for row in rows_of(ended) if "train/lr" in row]
  assert steps == sorted(set(steps))
  assert len(list((ended / "tensorboard").glob("events.*"))) == 1
  assert (ended / "pictures" / "step_0000002.png").exists()


def test_a_profile_is_asked_of_the_first_process(runs):
  _, ended, (_, second) = runs
  assert "SIGUSR1: only process 0 profiles" in second
  assert not (ended / "profile").exists()


# A probe fitted to the features of few windows amplifies the rounding of the
# weights, 1e-5, a hundredfold. Other clips would differ by far more.
@pytest.mark.parametrize(
  ("metric", "rtol"), [("train/loss_pixels", 1e-5), ("probe/loss", 1e-2)]
)
def test_evaluation_takes_the_same_clips_in_two_processes(runs, metric, rtol):
  scores = [
    next(row for row in rows_of(workdir) if f"eval/{metric}" in row)
    for workdir in runs[:2]
  ]
  assert scores[0].keys() == scores[1].keys()
  for name, value in scores[0].items():
    np.testing.assert_allclose(scores[1][name], value, rtol=rtol, err_msg=name)


def test_one_process_goes_on_where_two_stopped_to_the_same_end(
  runs, sample_dataset
):
  """Losses before and after the stop and the last weights agree to rounding."""
  alone, ended, _ = runs
  want = metrics_of(alone)
  stopped = last_step(ended)
  output = finish(
    start(command(ended, **SPREAD | {"data.path": sample_dataset}), 8)
  )
  assert f"resumed from step {stopped}" in output
  got = metrics_of(ended)
  assert list(got) == list(want) == list(range(1, NUM_STEPS + 1))
  for step, row in want.items():
    for name, value in row.items():
      np.testing.assert_allclose(
        got[step][name], value, rtol=1e-5, err_msg=f"step {step}: {name}"
      )
  got, want = (arrays_of(workdir, NUM_STEPS) for workdir in (ended, alone))
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(
      got[name], value, rtol=1e-5, atol=1e-7, err_msg=name
    )


@pytest.fixture(scope="module")
def together(runs, tmp_path_factory):
  """Runs together.py in two processes; returns their workdir and output."""
  copy = tmp_path_factory.mktemp("copy")
  argv = [
    sys.executable,
    ROOT / "tests" / "support" / "together.py",
    runs[0],
    STEP,
    copy,
  ]
  # Not the layout of the saved run.
  argv += [8, 1, f"127.0.0.1:{free_port()}", 2]
  processes = [
    start([*map(str, argv), str(i)], 4, PYTHONPATH=str(ROOT)) for i in (0, 1)
  ]
  return copy, [finish(process) for process in processes]


def test_a_checkpoint_keeps_every_bit_on_its_way_through_two_processes(
  runs, together
):
  """Saved by one process, restored and saved by two, read by one.

  The blocks are separate in one checkpoint and stacked in the other.
  """
  want, got = arrays_of(runs[0], STEP), arrays_of(together[0], STEP)
  assert got.keys() == want.keys()
  for part in ("params", "opt_state", "disc_params", "disc_opt_state"):
    assert any(f"['{part}']" in name for name in want)
  for name, value in want.items():
    assert value.tobytes() == got[name].tobytes(), name


def test_processes_that_differ_are_told_where(together):
  for output in together[1]:
    assert "  process 1: config.seed is 1, process 0: 0\n" in output
    assert "more" not in output
    assert "scan" not in output


# --- rows of a batch ----------------------------------------------------------


@pytest.mark.parametrize("clips_per_record", [1, 2, 3])
def test_the_clips_of_a_batch_do_not_depend_on_who_reads_them(
  sample_dataset, clips_per_record
):
  dataset = prepared_dataset.open_dataset(str(sample_dataset), "train")
  transform = TakeClip(Clip(4, 2), tubelet_size=2)

  def batches(rows):
    made = loader.train_batches(
      sampling.RecordDraws(dataset, seed=0, num_clips=clips_per_record),
      transform,
      batch_size=6,
      start_step=1,
      num_threads=1,
      rows=rows,
    )
    evaluated = loader.eval_batches(
      [dataset], transform, batch_size=6, num_batches=2, rows=rows
    )
    return [next(made), next(made), *evaluated]

  whole = batches(None)
  assert batches(range(6))[0].keys() == whole[0].keys()
  for rows in ([0, 1, 2], [1, 2, 5]):
    for got, want in zip(batches(rows), whole, strict=True):
      for name, value in got.items():
        np.testing.assert_array_equal(value, want[name][rows])


# --- end of a run -------------------------------------------------------------


def test_the_others_wait_for_slow_checksums_of_the_last_step(
  sample_dataset, tmp_path
):
  """All end with 0, and each process has summed up its own files."""
  values = {
    "data.path": sample_dataset,
    "batch_size": 2,
    "mask.strategy": "random",
    "checkpoint_steps": 1000,
  }
  program = ["-m", "tests.support.slow_sums"]
  for process in start_two(tmp_path, program, num_devices=1, **values):
    finish(process)
  step = tmp_path / "checkpoints" / "6"
  assert checksums.problem(step) is None
  sums = json.loads((step / checksums.NAME).read_text())["sha256"]
  for index in (0, 1):
    assert any(f"/ocdbt.process_{index}/" in name for name in sums)

  # As if it had been killed before: process 0 reads what both have saved.
  (step / checksums.NAME).unlink()
  first, second = start_two(tmp_path, num_devices=1, **values)
  assert "checkpoint 6 had no checksums" in finish(first)
  finish(second)
  assert checksums.problem(step) is None


def test_one_process_that_is_refused_ends_all_with_its_message(
  sample_dataset, tmp_path
):
  lock = folders.Lock(tmp_path, "lock")
  values = {"data.path": sample_dataset, "batch_size": 2}
  for process in start_two(tmp_path, num_devices=1, **values):
    output = finish(process, 1)
    assert f"another run is writing to {tmp_path}" in output
    assert f"process {os.getpid()} on " in output
    assert "Fatal" not in output
    assert "Traceback" not in output
  lock.close()


def test_an_unforeseen_error_in_one_process_ends_all(sample_dataset, tmp_path):
  workdir = tmp_path / "run"
  (workdir / "quarantine.process_1.jsonl").mkdir(parents=True)
  values = {"data.path": sample_dataset, "batch_size": 2}
  for process in start_two(workdir, num_devices=1, **values):
    output = finish(process, 75)
    assert "IsADirectoryError" in output
    assert "process 1 of 2" in output
    assert "Fatal" not in output


def test_a_damaged_record_that_one_process_meets_ends_all(
  sample_dataset, tmp_path
):
  """Process 0 alone sees it in time: the other waits for it in its step."""
  data = shutil.copytree(sample_dataset, tmp_path / "data")
  (shard,) = data.glob("*.array_record-*")
  content = bytearray(shard.read_bytes())
  content[len(content) // 3] ^= 4
  shard.write_bytes(bytes(content))
  values = {"data.path": data, "batch_size": 2, "mask.strategy": "random"}
  workdir = tmp_path / "run"
  for process in start_two(workdir, num_devices=1, **values):
    output = finish(process, 1)
    assert re.search(r"record \d+ of split 'train'", output)
    assert "Traceback" not in output


# --- refusals -----------------------------------------------------------------


def test_one_of_two_that_is_alone_ends_with_the_reason(tmp_path):
  address = f"127.0.0.1:{free_port()}"
  settings = {
    "distributed.coordinator": address,
    "distributed.num_processes": 2,
    "distributed.process_id": 0,
    "distributed.timeout_secs": 1,
  }
  result = subprocess.run(
    command(tmp_path, **settings),
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=60,
  )
  message = refused(result)
  assert "missing: 1." in message
  assert address in message
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
  ("environment", "coordinator", "expected"),
  [
    ({}, "", ("", 1, 0)),
    ({}, "auto", ("auto", 0, 0)),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "", ("auto", 0, 0)),
    # srun with a single task, or a shell in an allocation.
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, "", ("", 1, 0)),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "none", ("", 1, 0)),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "", ("auto", 0, 0)),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, "", ("", 1, 0)),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "host:1",
        "JAX_NUM_PROCESSES": "3",
        "JAX_PROCESS_ID": "2",
      },
      "",
      ("host:1", 3, 2),
    ),
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "other:2", ("other:2", 0, 0)),
  ],
)
def test_who_belongs_together(monkeypatch, environment, coordinator, expected):
  for name in distributed.CLUSTER_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  settings = pretrain_b.get_config().distributed
  settings.coordinator = coordinator
  found = distributed.process_numbers(settings)
  assert found[0] == expected[0]
  if found[0] not in ("", "auto"):
    assert found == expected


def test_an_unforeseen_error_ends_with_the_code_to_try_again(capfd):
  with pytest.raises(SystemExit) as end, distributed.leaving_on_errors():
    raise KeyError("lost")
  assert end.value.code == distributed.TRY_AGAIN == 75
  assert "KeyError: 'lost'" in capfd.readouterr().err


def test_ctrl_c_in_one_process_ends_all(monkeypatch):
  """Else it would wait in jax's shutdown for the others, which wait for it."""

  def end_all(message, code):
    assert message == "process 0 of 1: interrupted"
    sys.exit(code)

  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(distributed.coordination, "end_all", end_all)
  with pytest.raises(SystemExit) as end, distributed.leaving_on_errors():
    raise KeyboardInterrupt
  assert end.value.code == 130
