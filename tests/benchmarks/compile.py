"""Times the compilation of the training step of B and L, in turns.

Each compilation is a process of its own, `marlin_jax.plan`, without a cache.
L with scan and remat should take at most 1.5 times as long as B. Prints a table
and the path of a JSON file.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import timing

ROOT = Path(__file__).parents[2]
SAVE_MEMORY = ("--config.scan=True", "--config.remat=full")
CASES = {
  "B": ("b",),
  "B, scan and remat": ("b", *SAVE_MEMORY),
  "L, scan and remat": ("l", *SAVE_MEMORY),
}


def compile_once(topology: str, size: str, *flags: str) -> dict:
  """Returns the output of marlin_jax.plan for one clip per device."""
  command = [sys.executable, "-m", "marlin_jax.plan"]
  command += [f"--config=configs/pretrain_{size}.py", f"--topology={topology}"]
  command += ["--nosearch", "--json=-", "--config.clips_per_device=1"]
  num_devices = math.prod(map(int, topology.partition(":")[2].split("x")))
  command += [f"--config.batch_size={num_devices}", *flags]
  result = subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(result.stdout)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topology", default="cpu:1", help="e.g. v5e:2x2")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  secs = {key: {c: [] for c in CASES} for key in ("compile", "trace")}
  for _ in range(args.repeats):
    for case, flags in CASES.items():
      plan = compile_once(args.topology, *flags)
      for key, values in secs.items():
        values[case].append(plan[f"{key}_secs"])
  results = [
    timing.table(f"{key}, {args.topology}", values, "B")
    for key, values in secs.items()
  ]
  timing.save("bench_compile", results)


if __name__ == "__main__":
  main()
