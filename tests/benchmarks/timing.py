"""Timing side by side: what is compared runs in turns, on the same machine."""

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
  """Seconds of each second call in turns of two, after a first call of each.

  Each candidate has a process of its own: thread pools of two libraries in one
  process get in each other's way.

  Args:
    module: has `make(*arguments)`, which gives a function to be timed.
    candidates: arguments of `make` by name.
    repeats: turns of each.

  Returns:
    Seconds by name; and by name `first_secs`, of making it and the first call,
    compilation included, and `peak_bytes`, on a GPU of its memory and else of
    the process.
  """
  spawn = multiprocessing.get_context("spawn")
  started, about = {}, {}
  for name, arguments in candidates.items():
    ours, theirs = spawn.Pipe()
    process = spawn.Process(
      target=_serve, args=(theirs, module, arguments), daemon=True
    )
    process.start()
    theirs.close()
    started[name] = process, ours
    about[name] = {"first_secs": ours.recv()[0]}
  secs = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, (_, pipe) in started.items():
      pipe.send(None)
      taken, about[name]["peak_bytes"] = pipe.recv()
      secs[name].append(taken)
  for process, _ in started.values():
    process.kill()
  return secs, about


def _serve(pipe, module: str, arguments: tuple) -> None:
  start = time.perf_counter()
  run = importlib.import_module(module).make(*arguments)
  while True:
    run()
    pipe.send((time.perf_counter() - start, _peak_bytes()))
    pipe.recv()
    # Steps follow one another, where a turn's first finds caches full of what
    # the others did and threads asleep.
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
  what: str,
  secs: dict[str, list[float]],
  ours: str,
  about: dict[str, dict] | None = None,
) -> dict:
  """Prints medians, spread and the ratio to ours; returns them.

  Args:
    what: is timed.
    secs: by name.
    ours: the name that the others are compared with.
    about: what else is known of them, from `in_turns`.
  """
  base = statistics.median(secs[ours])
  rows = {}
  for name, values in secs.items():
    median = statistics.median(values)
    rows[name] = {
      "median_secs": median,
      "over_ours": median / base,
      "secs": values,
    }
    line = (
      f"{what:26} {name:26} {median:8.3f} s  ({min(values):.3f} to "
      f"{max(values):.3f})  {median / base:5.2f} x {ours}"
    )
    if about:
      rows[name] |= about[name]
      line += (
        f"  peak {about[name]['peak_bytes'] / 1e9:5.2f} GB, first "
        f"{about[name]['first_secs']:4.0f} s"
      )
    print(line, flush=True)
  return {"what": what, "rows": rows}


def save(name: str, results: list[dict]) -> None:
  """Writes runs/NAME.json with the machine and versions; prints its path."""
  path = Path("runs") / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  packages = ("jax", "jaxlib", "flax", "torch", "marlin-pytorch", "numpy")
  about = {
    "machine": platform.machine(),
    "cpu": _cpu(),
    "cores": os.cpu_count(),
    "load_average": os.getloadavg(),
    "versions": {name: metadata.version(name) for name in packages},
    "python": platform.python_version(),
  }
  path.write_text(json.dumps({"about": about, "results": results}, indent=2))
  print(path)


def _cpu() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line for line in lines if line.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else ""
