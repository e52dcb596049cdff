"""Compares loss curves of the quickstart under settings that are not exact.

Trains on the sample video: in float32 with two seeds, whose difference is the
noise level, and with each setting that trades precision or work for speed.
Draws the curves and prints a table and the path of a JSON file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import timing

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "curves"
REFERENCE = "float32"
LOSS = "train/loss_rec"
CASES = {
  REFERENCE: {},
  "float32, another seed": {"seed": 1},
  "bfloat16": {"dtype": "bfloat16"},
  "first moment in bfloat16": {"optim.mu_dtype": "bfloat16"},
  "decoder mask 0.5": {"mask.decoder_ratio": 0.5},
}


def train(name: str, num_steps: int) -> list[dict]:
  """Trains one case; returns the rows of metrics.jsonl that have a loss."""
  workdir = FOLDER / name.replace(" ", "_").replace(",", "")
  shutil.rmtree(workdir, ignore_errors=True)
  settings = {
    "num_steps": num_steps,
    "eval_steps": num_steps,
    "picture_steps": num_steps,
    "checkpoint_steps": num_steps,
    "log_steps": 5,
    **CASES[name],
  }
  command = [sys.executable, "-m", "marlin_jax.train"]
  command += ["--config=configs/quickstart.py", f"--workdir={workdir}"]
  command += [f"--config.{key}={value}" for key, value in settings.items()]
  subprocess.run(command, cwd=ROOT, env=os.environ, check=True)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if LOSS in row]


def draw(curves: dict[str, list[dict]], path: Path) -> None:
  """Plots loss over steps."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for name, rows in curves.items():
    axes.plot(
      [row["step"] for row in rows],
      [row[LOSS] for row in rows],
      label=name,
      linewidth=1,
    )
  axes.set(xlabel="step", ylabel="reconstruction loss (training)", yscale="log")
  axes.legend()
  figure.savefig(path, dpi=150)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num_steps", type=int, default=300)
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
  args = parser.parse_args()
  curves = {name: train(name, args.num_steps) for name in args.cases}
  ends = {}
  for name, rows in curves.items():
    last = [r[LOSS] for r in rows if r["step"] > 0.8 * args.num_steps]
    ends[name] = {
      "loss_rec": statistics.mean(last),
      "deviation": statistics.stdev(last),
      "curve": [[r["step"], r[LOSS]] for r in rows],
    }
    print(
      f"{name:26} loss over the last fifth {ends[name]['loss_rec']:.5f} "
      f"(deviation {ends[name]['deviation']:.5f})"
    )
  draw(curves, FOLDER / "curves.png")
  print(FOLDER / "curves.png")
  timing.save("bench_curves", [ends])


if __name__ == "__main__":
  main()
