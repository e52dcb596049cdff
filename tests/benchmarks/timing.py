"""Timing side by side: what is compared runs in turns, on the same machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path


def in_turns(
  candidates: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of each call, in turns, after a first call of each."""
  for run in candidates.values():
    run()
  secs = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, run in candidates.items():
      start = time.perf_counter()
      run()
      secs[name].append(time.perf_counter() - start)
  return secs


def table(what: str, secs: dict[str, list[float]], ours: str) -> dict:
  """Prints medians, spread and the ratio to ours; returns them."""
  base = statistics.median(secs[ours])
  rows = {}
  for name, values in secs.items():
    median = statistics.median(values)
    rows[name] = {
      "median_secs": median,
      "over_ours": median / base,
      "secs": values,
    }
    print(
      f"{what:26} {name:26} {median:8.3f} s  ({min(values):.3f} to "
      f"{max(values):.3f})  {median / base:5.2f} x ours",
      flush=True,
    )
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
