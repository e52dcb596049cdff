"""Times candidates in turns, on the same machine, and saves the results."""

import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path


def in_turns(
  module: str, candidates: dict[str, tuple], repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict]]:
  """Times candidates in turns, each in a process of its own.

  A turn calls a candidate twice and times the second call. One process for all
  would let the thread pools of two libraries compete.

  Args:
    module: has `make(*arguments)`, which returns the function to time.
    candidates: arguments of `make` by name.
    repeats: turns per candidate.

  Returns:
    The seconds of each turn, by name; and by name `first_secs`, for `make` and
    the first call, including compilation, and `peak_bytes`, of GPU memory or,
    without a GPU, of the process.
  """
  spawn = multiprocessing.get_context("spawn")
  started, details = {}, {}
  for name, arguments in candidates.items():
    ours, theirs = spawn.Pipe()
    process = spawn.Process(
      target=_serve, args=(theirs, module, arguments), daemon=True
    )
    process.start()
    theirs.close()
    started[name] = process, ours
    details[name] = {"first_secs": ours.recv()[0]}
  secs = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, (_, pipe) in started.items():
      pipe.send(None)
      elapsed, details[name]["peak_bytes"] = pipe.recv()
      secs[name].append(elapsed)
  for process, _ in started.values():
    process.kill()
  return secs, details


def _serve(pipe, module: str, arguments: tuple) -> None:
  start = time.perf_counter()
  run = importlib.import_module(module).make(*arguments)
  while True:
    run()
    pipe.send((time.perf_counter() - start, _peak_bytes()))
    pipe.recv()
    # The first call of a turn finds caches filled by the other candidates and
    # sleeping threads; in training, steps follow each other directly.
    run()
    start = time.perf_counter()


def _peak_bytes() -> int:
  torch = sys.modules.get("torch")
  if torch and torch.cuda.is_available():
    return torch.cuda.max_memory_allocated()
  jax = sys.modules.get("jax")
  stats = jax and jax.local_devices()[0].memory_stats()
  if stats:
    return stats["peak_bytes_in_use"]
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(
  title: str,
  secs: dict[str, list[float]],
  baseline: str,
  details: dict[str, dict] | None = None,
) -> dict:
  """Prints medians, ranges and ratios to a baseline, and returns them.

  Args:
    title: names the operation that was timed.
    secs: seconds by name.
    baseline: the name that the others are compared with.
    details: from `in_turns`; printed too.
  """
  base = statistics.median(secs[baseline])
  rows = {}
  for name, values in secs.items():
    median = statistics.median(values)
    rows[name] = {
      "median_secs": median,
      "over_ours": median / base,
      "secs": values,
    }
    line = (
      f"{title:26} {name:26} {median:8.3f} s  ({min(values):.3f} to "
      f"{max(values):.3f})  {median / base:5.2f} x {baseline}"
    )
    if details:
      rows[name] |= details[name]
      line += (
        f"  peak {details[name]['peak_bytes'] / 1e9:5.2f} GB, first "
        f"{details[name]['first_secs']:4.0f} s"
      )
    print(line, flush=True)
  return {"what": title, "rows": rows}


def save(name: str, results: list[dict]) -> None:
  """Writes results, machine and versions to runs/NAME.json."""
  path = Path("runs") / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(
    json.dumps({"about": environment(), "results": results}, indent=2)
  )
  print(path)


def environment() -> dict:
  """Returns machine and versions."""
  packages = ("jax", "jaxlib", "flax", "torch", "marlin-pytorch", "numpy")
  return {
    "machine": platform.machine(),
    "cpu": _cpu(),
    "cores": os.cpu_count(),
    "load_average": os.getloadavg(),
    "versions": {name: metadata.version(name) for name in packages},
    "python": platform.python_version(),
  }


def _cpu() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line for line in lines if line.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else ""
