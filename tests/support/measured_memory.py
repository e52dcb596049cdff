r"""Runs a few real steps and prints their memory beside the planned memory.

  python tests/support/measured_memory.py --config=configs/pretrain_s.py \
    --config.batch_size=4

It is a program, since the memory of its process is measured; plan_test.py
starts it too.
On GPU the memory is what the device reports, on CPU the growth of the process
from before the state is created. Prints one JSON object, in bytes.
"""

import contextlib
import ctypes
import json
import os
import re
import sys
from pathlib import Path

from absl import app
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config")

# Large buffers come from the kernel and return to it. Otherwise the step would
# reuse the compiler's memory, and the process would not grow.
MALLOC = {
  "MALLOC_MMAP_THRESHOLD_": "65536",
  "MALLOC_TRIM_THRESHOLD_": "65536",
  "MALLOC_ARENA_MAX": "1",
}


def main(argv):
  del argv
  import jax
  import numpy as np

  from marlin_jax.devices import sharding
  from marlin_jax.planning import compiled_step, topology
  from marlin_jax.pretraining import build

  config = _CONFIG.value
  devices = topology.find_devices("here")
  planned = compiled_step.compile_step(
    config, devices, lambda what: contextlib.nullcontext()
  )
  mesh = sharding.make_mesh(**config.mesh)
  experiment = build.Experiment(config, 1000, mesh)
  start = (
    jax.jit(experiment.initialise, out_shardings=experiment.layout.shardings)
    .lower()
    .compile()
  )
  step = experiment.lower_step().compile()
  rng = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

  before = _settle()
  tubelets = experiment.task.tubelets
  np_rng = np.random.default_rng(0)
  frames = (config.batch_size, tubelets.num_frames, 224, 224, 3)
  batch = jax.device_put(
    {
      "video": np_rng.integers(0, 256, frames, np.uint8),
      "regions": np_rng.integers(
        0, 2048, (config.batch_size, *tubelets.grid), np.uint16
      ),
    },
    sharding.batch_sharding(mesh),
  )
  state = start()
  for _ in range(2):
    state, _ = step(state, batch, rng)
  jax.block_until_ready(state)
  measured = _peak() - before
  print(
    json.dumps(
      {
        "planned": planned.needed_bytes - planned.memory.code,
        "measured": measured // len(devices.devices),
        "device": devices.devices[0].device_kind,
      }
    )
  )


def _settle() -> int:
  """Returns the bytes in use now, from which the peak is counted."""
  import jax

  if jax.default_backend() != "cpu":
    return 0  # the peak of the device is the peak of the steps
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")  # resets the peak
  return _kilobytes("VmRSS") * 1024


def _peak() -> int:
  import jax

  if jax.default_backend() != "cpu":
    devices = jax.local_devices()
    return sum(d.memory_stats()["peak_bytes_in_use"] for d in devices)
  return _kilobytes("VmHWM") * 1024


def _kilobytes(name: str) -> int:
  status = Path("/proc/self/status").read_text()
  return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
  if MALLOC.items() <= os.environ.items():
    app.run(main)
  else:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
