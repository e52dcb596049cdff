"""tools/slurm.sh, started as by sbatch."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.processes import ROOT
from tests.support.training_runs import TINY, metrics_of

# Stands in for srun: two tasks here, with the variables that Slurm 22.05 gave
# to two tasks on one node, and its exit code.
SRUN = f"""#!{sys.executable}
import os, pathlib, subprocess, sys
argv = sys.argv[1:]
while argv[0].startswith("--"):
  del argv[0]
tasks = [
  subprocess.Popen(argv, env=os.environ | {{
    "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "localhost",
  }}) for i in (0, 1)
]
pathlib.Path(os.environ["JOB"], "pids").write_text(
  " ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
codes = [code if code >= 0 else 128 - code for code in codes]
for i, code in enumerate(codes):
  if code:
    print(f"srun: error: node: task {{i}}: Exited with exit code {{code}}",
          file=sys.stderr)
sys.exit(max(codes))
"""
STAND_INS = {
  "srun": SRUN,
  "squeue": '#!/bin/sh\necho "${STATE-RUNNING}"\n',
  "scontrol": '#!/bin/sh\necho "$*" >> "$JOB/scontrol"\n',
}


def write_program(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


def free_job_id():
  """Returns a job number from which jax derives a free port."""
  for job in range(os.getpid(), os.getpid() + 4096):
    with socket.socket() as probe:
      try:
        probe.bind(("127.0.0.1", job % 2**12 + 65535 - 2**12 + 1))
      except OSError:
        continue
    return job
  raise AssertionError("no free port")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Returns start(*flags): the batch script as sbatch would start it."""
  for name, text in STAND_INS.items():
    write_program(tmp_path / "bin" / name, text)
  for name in [name for name in os.environ if name.startswith("SLURM_")]:
    monkeypatch.delenv(name)
  # sbatch starts a copy of the script, elsewhere.
  script = shutil.copy(ROOT / "tools" / "slurm.sh", tmp_path)

  def start(*flags, **variables):
    return subprocess.Popen(
      ["bash", script, *flags],
      cwd=tmp_path,
      env=os.environ
      | {
        "JOB": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_SUBMIT_DIR": str(ROOT),
      }
      | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  start.path = tmp_path
  start.requeued = lambda: (tmp_path / "scontrol").exists()
  return start


def finish(process, returncode, seen=()):
  """Returns the job's output beyond `seen`."""
  output = "".join(seen) + process.communicate(timeout=120)[0]
  assert process.returncode == returncode, output
  return output


@pytest.mark.slow
def test_a_slurm_job_that_is_signalled_saves_and_is_queued_again(
  slurm, sample_dataset
):
  """Two tasks train as one run; jax derives their numbers from Slurm."""
  workdir = slurm.path / "run"
  values = TINY | {
    "num_steps": 1000,
    "checkpoint_steps": 1000,
    "data.path": sample_dataset,
    "mask.strategy": "random",
  }
  flags = ["--config=configs/pretrain_b.py", f"--workdir={workdir}"]
  flags += [f"--config.{key}={value}" for key, value in values.items()]
  process = slurm(*flags)
  seen = []
  for line in process.stdout:
    seen.append(line)
    if line.startswith("step 2/"):
      for pid in (slurm.path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
      break
  output = finish(process, 128 + signal.SIGTERM, seen)
  assert "2 x cpu in 2 processes" in output
  step = max(metrics_of(workdir))
  assert 2 < step < 1000
  assert f"step {step} of 1000 is saved" in output
  assert "ended with 143: restart 1 of 20" in output
  asked = (slurm.path / "scontrol").read_text()
  assert re.fullmatch(r"requeue \d+\n", asked)


def test_a_slurm_job_that_is_refused_is_not_queued_again(slurm):
  flags = ["--config=configs/pretrain_b.py", "--config.dtype=x"]
  process = slurm(*flags, "--workdir=x")
  assert "dtype='x': expected one of" in finish(process, 1)
  assert not slurm.requeued()


@pytest.mark.parametrize(
  ("code", "variables", "requeued"),
  [
    (75, {}, True),
    (0, {}, False),
    (75, {"STATE": "COMPLETING"}, False),  # cancelled
    (75, {"STATE": ""}, False),
    (75, {"SLURM_RESTART_COUNT": "20"}, False),
    (75, {"SLURM_RESTART_COUNT": "20", "MAX_RESTARTS": "21"}, True),
  ],
)
def test_a_slurm_job_that_breaks_off_is_queued_again_within_limits(
  slurm, code, variables, requeued
):
  python = write_program(slurm.path / "python", f"#!/bin/sh\nexit {code}\n")
  finish(slurm("--workdir=x", PYTHON=str(python), **variables), code)
  assert slurm.requeued() == requeued


def test_a_slurm_job_that_one_task_refused_is_not_queued_again(slurm):
  """The others were aborted, with a higher exit code."""
  python = write_program(
    slurm.path / "python",
    '#!/bin/sh\n[ "$SLURM_PROCID" = 0 ] && exit 134\necho the reason; exit 1\n',
  )
  output = finish(slurm("--workdir=x", PYTHON=str(python)), 1)
  assert "the reason" in output
  assert not slurm.requeued()


@pytest.mark.parametrize(
  ("flags", "variables", "words"),
  [
    (["--config=configs/pretrain_b.py"], {}, "no --workdir=FOLDER"),
    (["--workdir=x"], {"SLURM_SUBMIT_DIR": "/"}, "no marlin_jax in /"),
  ],
)
def test_a_slurm_job_that_cannot_work_says_so(slurm, flags, variables, words):
  assert words in finish(slurm(*flags, **variables), 1)
