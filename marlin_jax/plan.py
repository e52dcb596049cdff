r"""Estimates memory and time of a training before the devices are rented.

  python -m marlin_jax.plan --config=configs/pretrain_b.py --topology=v5e:4x4

compiles the real training step for devices that need not exist here, and prints
what it needs of each: memory, arithmetic, bytes exchanged, and the least time.
Any value of the configuration can be overridden, as in training:

  python -m marlin_jax.plan --config=configs/pretrain_l.py --topology=v5e:4x4 \
    --config.batch_size=128 --config.dtype=bfloat16 --config.mesh.fsdp=16
  python -m marlin_jax.plan --config=configs/pretrain_l.py --topology=h200:8x4 \
    --config.batch_size=1024 --config.dtype=bfloat16 --config.mesh.fsdp=8
  python -m marlin_jax.plan --config=configs/pretrain_b.py --topology=cpu:8
  python -m marlin_jax.plan --config=configs/quickstart.py --topology=here \
    --nosearch --json=plan.json

It needs no data set, and for TPU no TPU but libtpu: pip install
'marlin-jax[plan]'; for GPU no GPU but jax's CUDA plugin: pip install
'marlin-jax[plan-gpu]'. If the configuration does not fit, it prints
changes that make it fit, each compiled, and exits with status 1.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from marlin_jax.devices import xla_flags
from marlin_jax.planning import topology
from marlin_jax.pretraining.configuration import validate
from marlin_jax.records import cli, folders
from marlin_jax.training import config_flags

flags.declare_key_flag("config")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "here", f"The devices:\n{topology.FORMS}"
)
_NUM_SLICES = flags.DEFINE_integer(
  "num_slices", 1, "Number of TPU slices of that shape.", lower_bound=1
)
_SEARCH = flags.DEFINE_boolean(
  "search",
  True,
  "Compile a few more times to find the most clips that fit, or changes that "
  "make the configuration fit.",
)
_JSON = flags.DEFINE_string(
  "json", None, "Also write the numbers to this file; '-': to stdout, no text."
)


def main(argv) -> int:
  """Returns the exit code: 0, 1 if it does not fit or after an error."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  xla_flags.set_for_training()
  logging.set_verbosity(logging.WARNING)
  fits = True

  def work() -> None:
    nonlocal fits
    if _JSON.value not in (None, "-"):
      # Now, since compiling takes minutes.
      folders.check_local(_JSON.value)
      Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
      if Path(_JSON.value).is_dir():
        raise IsADirectoryError(f"--json={_JSON.value} is a folder")
    numbers, fits = plan(config_flags.CONFIG.value)
    text = json.dumps(numbers, indent=2)
    if _JSON.value == "-":
      print(text)
    elif _JSON.value:
      Path(_JSON.value).write_text(text + "\n")

  code = cli.run_command(work, "The plan is not complete.")
  return code or int(not fits)


def plan(config: ConfigDict) -> tuple[dict[str, Any], bool]:
  """Compiles the step and prints a report, except with --json=-.

  With a curriculum, that of each stage: a line for each, and the report of the
  one that needs the most memory.

  Returns:
    The numbers of the report as JSON values, and True if the configuration fits
    in memory.

  Raises:
    ConfigError: the configuration is not valid.
    TopologyError: the topology is unknown.
    MeshError: the mesh or the batch does not fit the devices.
  """
  validate(config)
  say = (lambda text: None) if _JSON.value == "-" else print

  # --- Devices ----------------------------------------------------------------
  devices = topology.find_devices(_TOPOLOGY.value, _NUM_SLICES.value)
  # Imported after jax has been told which devices to use.
  import jax

  from marlin_jax.planning import compiled_step, report, search

  if devices.devices[0] not in jax.devices():
    # A program for absent devices cannot be read from the cache again.
    jax.config.update("jax_enable_compilation_cache", False)

  # --- The step ---------------------------------------------------------------
  steps = compiled_step.compile_steps(config, devices, busy)
  step = max(steps, key=lambda step: (not step.fits, step.needed_bytes))
  if len(steps) > 1:
    say(report.stages_text(steps))
    say(f"\nstage {step.stage + 1} needs the most memory:")
  say(report.step_text(step))
  numbers = report.numbers(step)
  if len(steps) > 1:
    numbers["stages"] = [report.numbers(step) for step in steps]

  # --- Other configurations ---------------------------------------------------
  if _SEARCH.value and step.fits:
    best = search.largest(step, busy)
    say(report.largest_text(step, best))
    numbers["largest"] = report.numbers(best)
  elif _SEARCH.value:
    numbers["remedies"] = []
    for changes in search.remedies(step):
      tried = compiled_step.compile_step(
        compiled_step.with_changes(config, changes), devices, busy, step.stage
      )
      say(report.remedy_text(changes, tried))
      numbers["remedies"].append({"changes": changes} | report.numbers(tried))
      if tried.fits:
        break
    else:
      say("no change that was tried makes it fit: take more or larger chips")
  return numbers, step.fits


@contextlib.contextmanager
def busy(message: str) -> Iterator[None]:
  """Prints a message to stderr, and the time passed every 30 s."""
  start = time.perf_counter()
  done = threading.Event()

  def report_time():
    while not done.wait(30):
      secs = time.perf_counter() - start
      print(f"{message}: {secs:.0f} s so far", file=sys.stderr, flush=True)

  print(f"{message} ...", file=sys.stderr, flush=True)
  reporter = threading.Thread(target=report_time, daemon=True)
  reporter.start()
  try:
    yield
  finally:
    done.set()
    reporter.join()


if __name__ == "__main__":
  config_flags.run(main)
