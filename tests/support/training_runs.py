"""Small training runs, in this process and in processes of their own."""

import gc
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from configs import pretrain_b
from tests.support.files import rows_of
from tests.support.processes import ROOT, Finished, run_here, seeing_devices

TINY = {
  "batch_size": 4,
  "clips_per_device": 4,
  "num_epochs": 0,
  "num_steps": 6,
  "data.num_frames": 4,
  "model.width": 16,
  "model.depth": 1,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "model.dec_width": 16,
  "model.dec_depth": 1,
  "model.dec_num_heads": 2,
  "model.dec_mlp_dim": 32,
  "adv.hidden": 16,
  "ema_decay": 0.9,
  "log_steps": 1,
  "eval_steps": 1000,
  "eval_batches": 1,
  "picture_steps": 1000,
  "checkpoint_steps": 3,
}


_TRAIN = ("-m", "marlin_jax.train")


def command(
  workdir: Path, program: Sequence[str] = _TRAIN, **overrides: object
) -> list[str]:
  """Returns the command line of a tiny run, of training or a stand-in."""
  return [
    sys.executable,
    *program,
    "--config=configs/pretrain_b.py",
    f"--workdir={workdir}",
    *(f"--config.{key}={x}" for key, x in (TINY | overrides).items()),
  ]


def run(
  workdir: Path, *, devices: int = 1, **overrides: object
) -> subprocess.CompletedProcess[str]:
  """Trains in a process of its own that sees `devices` CPU devices."""
  return subprocess.run(
    command(workdir, **overrides),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=seeing_devices(devices),
    check=False,
    timeout=250,
  )


def train(workdir: Path, **overrides: object) -> Finished:
  """Trains in this process, on its one device."""
  from marlin_jax import train as trainer
  from marlin_jax.records.cli import UserError

  config = pretrain_b.get_config()
  for key, value in (TINY | overrides).items():
    *sections, name = key.split(".")
    section = config
    for part in sections:
      section = section[part]
    section[name] = type(section[name])(value)  # as the command line does

  errors = []

  def work() -> int:
    try:
      _, signum = trainer.train_and_evaluate(config, str(workdir))
    except UserError as e:
      errors.append(e)
      print(f"error: {e}", file=sys.stderr)
      return e.exit_code
    return 0 if signum is None else 128 + signum

  result = run_here(work)
  if errors:
    # A failed run keeps its open files until its process ends: the frames of
    # its traceback and reference cycles hold them.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ResourceWarning)
      errors.clear()
      gc.collect()
  return result


def refused(result: Finished | subprocess.CompletedProcess[str]) -> str:
  """Returns the message of a run that must fail without a traceback."""
  assert result.returncode == 1, result.stdout + result.stderr
  assert "Traceback" not in result.stderr
  return result.stderr


def metrics_of(workdir: Path) -> dict[int, dict[str, float]]:
  """Returns the training metrics by step, which a repeated run reproduces."""
  return {
    row["step"]: {k: v for k, v in row.items() if k.startswith("train/")}
    for row in rows_of(workdir)
    if "train/loss_rec" in row
  }


def without_step_4(workdir: Path) -> dict[int, dict[str, float]]:
  """Removes the last checkpoint; returns the metrics of the whole run."""
  metrics = metrics_of(workdir)
  assert list(metrics) == [1, 2, 3, 4]
  shutil.rmtree(workdir / "checkpoints" / "4")
  return metrics


# --- Several processes --------------------------------------------------------


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start(
  argv: list[str], num_devices: int = 1, **variables: str
) -> subprocess.Popen[str]:
  """Starts a process that sees `num_devices` CPU devices."""
  return subprocess.Popen(
    argv,
    cwd=ROOT,
    env=seeing_devices(num_devices) | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(
  process: subprocess.Popen[str], returncode: int = 0, seen: str = ""
) -> str:
  """Waits for a process and returns its output.

  Args:
    process: process to wait for.
    returncode: expected exit code.
    seen: output that was read before.
  """
  output = seen + process.communicate(timeout=250)[0]
  assert process.returncode == returncode, output
  return output


def start_two(
  workdir: Path,
  program: Sequence[str] = _TRAIN,
  num_devices: int = 4,
  **overrides: object,
) -> list[subprocess.Popen]:
  """Starts the two processes of one run, each with `num_devices` devices."""
  settings = {
    "distributed.coordinator": f"127.0.0.1:{free_port()}",
    "distributed.num_processes": 2,
    "distributed.timeout_secs": 120,
  }
  return [
    start(
      command(
        workdir,
        program,
        **overrides | settings | {"distributed.process_id": i},
      ),
      num_devices,
    )
    for i in (0, 1)
  ]
