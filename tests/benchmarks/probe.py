"""Tests with linear probes whether pretraining learns anything.

Compares encoders that are pretrained with three masking strategies, random
encoders, and mean colours of patches. Each encoder is trained by
marlin_jax.train on the first part of a few videos, with the same seed, data and
number of steps. Linear probes are fitted on windows of these parts, and tested
on later windows and on a man who is in no training. Labels come from face
landmarks: which man, head turn, mouth and eye opening, and which of two windows
is the later one.

Prints a table and the path of a JSON file, and draws a figure. The same command
resumes a run.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from flax import nnx
from tqdm import tqdm

from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  feature_cache,
  splits,
)
from marlin_jax.eval import measures as measure_lib
from marlin_jax.records.schema import GRID_SIZE, PATCH_SIZE
from marlin_jax.weights import formats
from marlin_jax.weights.weights import of_modules
from tests.benchmarks import timing
from tests.benchmarks.probe_questions import (
  Question,
  Windows,
  answers,
  open_windows,
  questions,
  score,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "probe"

STRATEGIES = ("fasking", "tube", "random")
LOSS = "train/loss_rec"
RANDOM, COLOURS = "random init", "colours"
RANDOM_SEEDS = (0, 1, 2)
PENALTY = 0.1  # in the table; the JSON file has the others
PENALTIES = (1e-3, 1e-2, 0.1, 1.0)
NUM_RESAMPLES = 1000
DIFFERENCES = (
  *itertools.product((*STRATEGIES, COLOURS), (RANDOM,)),
  *itertools.product(STRATEGIES, (COLOURS,)),
  *itertools.combinations(STRATEGIES, 2),
)

# Short and cheap; docs/PROBE.md says how this differs from the recipe.
COMMON = {
  "num_epochs": 0.0,
  "data.num_frames": 8,
  "data.split": "pretrain",
  "data.eval_split": "windows",
  "mask.decoder_ratio": 0.5,
  "model.start_grey": True,
  "adv.weight": 0.001,
  "adv.hidden": 64,
  "optim.warmup_ratio": 0.1,
  "log_steps": 5,
  "eval_batches": 4,
}
SIZES = {
  "S": {"model.dec_depth": 2, "optim.base_lr": 0.064},
  "tiny": {
    "model.width": 48,
    "model.depth": 2,
    "model.num_heads": 3,
    "model.mlp_dim": 96,
    "model.dec_width": 48,
    "model.dec_depth": 1,
    "model.dec_mlp_dim": 96,
    "optim.base_lr": 0.064,
  },
}


# --- Training -----------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, object]:
  """Returns the overrides of configs/pretrain_s.py, except the masking."""
  return (
    COMMON
    | SIZES[args.size]
    | {
      "seed": args.seed,
      "batch_size": args.batch_size,
      "clips_per_device": args.batch_size,
      "num_steps": args.steps,
      "checkpoint_steps": args.steps,
      "picture_steps": args.steps,
      "eval_steps": args.steps,
    }
  )


def train(workdir: Path, strategy: str, args: argparse.Namespace) -> dict:
  """Trains one encoder, unless that is done; returns its losses and times."""
  if not (workdir / "checkpoints" / str(args.steps)).exists():
    command = [sys.executable, "-m", "marlin_jax.train"]
    command += ["--config=configs/pretrain_s.py", f"--workdir={workdir}"]
    command += [f"--config.data.path={FOLDER / 'dataset'}"]
    command += [f"--config.mask.strategy={strategy}"]
    command += [f"--config.{k}={v}" for k, v in settings(args).items()]
    subprocess.run(command, cwd=ROOT, env=os.environ, check=True)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  steps = [row for row in rows if LOSS in row]
  last = [row[LOSS] for row in steps if row["step"] > 0.8 * args.steps]
  return {
    "curve": [[row["step"], row[LOSS]] for row in steps],
    "last_fifth": statistics.mean(last),
    "step_secs": statistics.median(row["time/step_secs"] for row in steps),
    "secs": max(row.get("goodput/total_secs", 0.0) for row in rows),
  }


# --- Features -----------------------------------------------------------------


def features_of(weights, split) -> np.ndarray:
  """Returns the features of all windows, float32 (W, D); cached on disk."""
  encoder = feature_cache.FrozenEncoder(
    weights, sharding.make_mesh(), "float32", "auto"
  )
  return feature_cache.window_features(
    encoder,
    split,
    split.windows(weights.architecture.clip),
    FOLDER / "features",
    batch_size=8,
    num_threads=2,
  )


def random_weights(architecture, seed: int):
  """Returns an encoder with random weights."""
  bare = architecture.without_decoder()
  encoder = bare.make_autoencoder(rngs=nnx.Rngs(seed))
  return of_modules(bare, nnx.to_pure_dict(nnx.state(encoder)))


def colours_of(split, clip) -> np.ndarray:
  """Returns mean colours of patches over each window: float32 (W, 588)."""
  reader = clip_batches.ClipReader(split, clip)
  rows = []
  for window in split.windows(clip):
    (video,) = reader.read([window])
    patches = video.reshape(-1, GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE, 3)
    rows.append(patches.mean(axis=(0, 2, 4)).ravel() / 255)
  return np.stack(rows).astype(np.float32)


# --- Scores -------------------------------------------------------------------


def measure(
  question: Question, windows: Windows, features: dict[str, list[np.ndarray]]
) -> dict[str, object]:
  """Scores the probes of one question.

  Args:
    question: the question.
    windows: all windows.
    features: encoder -> features, one array per random seed; the scores of
      several arrays are averaged.

  Returns:
    `encoders` and `differences` of two of them, {value, low, high} each, with a
    95% interval over resampled blocks of footage; `by_penalty`, values only.
  """
  predictions = {
    name: [answers(question, windows, x, PENALTIES) for x in arrays]
    for name, arrays in features.items()
  }

  def all_scores(weights, penalty=PENALTY):
    by_encoder = {
      name: np.mean(
        [score(question, windows, p[penalty], weights) for p in probes],
        axis=0,
      )
      for name, probes in predictions.items()
    }
    return by_encoder | {
      f"{a} - {b}": by_encoder[a] - by_encoder[b] for a, b in DIFFERENCES
    }

  blocks = windows.block[question.test]
  unweighted = np.ones((len(blocks), 1))
  draws = measure_lib.bootstrap(all_scores, blocks, num_resamples=NUM_RESAMPLES)
  ends = {name: measure_lib.interval(values) for name, values in draws.items()}
  results = {
    name: {
      "value": measure_lib.finite_or_none(value[0]),
      "low": measure_lib.finite_or_none(ends[name][0]),
      "high": measure_lib.finite_or_none(ends[name][1]),
    }
    for name, value in all_scores(unweighted).items()
  }
  return {
    "question": question.name,
    "chance": question.chance,
    "num_fit": len(question.fit),
    "num_test": len(question.test),
    "num_blocks": len(set(blocks)),
    "encoders": {name: results[name] for name in features},
    "differences": {
      name: number for name, number in results.items() if name not in features
    },
    "by_penalty": {
      str(penalty): {
        name: measure_lib.finite_or_none(value[0])
        for name, value in all_scores(unweighted, penalty).items()
      }
      for penalty in PENALTIES
    },
  }


# --- Table and figure ---------------------------------------------------------


def table(results: list[dict]) -> str:
  """Returns a text table: a row per question, a column per encoder."""
  names = list(results[0]["encoders"])
  lines = [
    f"{'':22}{'windows':>8}{'blocks':>7}{'chance':>7}"
    + "".join(f"{name:>19}" for name in names)
  ]
  for row in results:
    line = (
      f"{row['question']:22}{row['num_test']:8d}{row['num_blocks']:7d}"
      f"{row['chance']:7.2f}"
    )
    for name in names:
      over = row["differences"].get(f"{name} - {RANDOM}", {})
      mark = "*" if (over.get("low") or 0) > 0 else " "
      line += f"{_shown(row['encoders'][name])}{mark}".rjust(19)
    lines.append(line)
  return "\n".join(lines)


def _shown(number: dict[str, float | None]) -> str:
  value, low, high = ("-" if x is None else f"{x:.2f}" for x in number.values())
  return f"{value} ({low}-{high})"


def draw(results: list[dict], trained: dict[str, dict], path: Path) -> None:
  """Plots loss curves, and scores with intervals."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(1, 2)
  )
  for name, run in trained.items():
    left.plot(*zip(*run["curve"], strict=True), label=name, linewidth=1)
  left.set(xlabel="step", ylabel="reconstruction loss (training)", yscale="log")
  left.legend()
  names = list(results[0]["encoders"])
  for i, name in enumerate(names):
    numbers = [list(row["encoders"][name].values()) for row in results]
    value, *span = np.array(numbers, float).T
    places = np.arange(len(results)) + 0.14 * (i - (len(names) - 1) / 2)
    right.errorbar(
      places, value, np.abs(span - value), fmt="o", label=name, markersize=4
    )
  for i, row in enumerate(results):
    right.plot([i - 0.4, i + 0.4], [row["chance"]] * 2, "k:", linewidth=1)
  labels = [row["question"].replace(", ", "\n") for row in results]
  right.set_xticks(range(len(results)), labels, fontsize=8)
  right.set_ylabel("fraction correct (dotted: chance)")
  figure.legend(
    *right.get_legend_handles_labels(),
    loc="outside upper center",
    ncols=len(names),
  )
  figure.savefig(path, dpi=120)


# --- The run ------------------------------------------------------------------


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", default="S", choices=SIZES)
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--batch_size", type=int, default=4)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  started_at = time.monotonic()
  if not (FOLDER / "dataset" / "dataset_info.json").exists():
    command = [sys.executable, "-m", "tests.benchmarks.probe_data", str(FOLDER)]
    subprocess.run(command, cwd=ROOT, check=True)
  print(f"{FOLDER / 'windows.png'} shows windows with their labels")

  # --- Training ---------------------------------------------------------------
  name = f"{args.size}-{args.steps}x{args.batch_size}-{args.seed}"
  trained = {}
  for strategy in STRATEGIES:
    print(f"--- {strategy}: {args.steps} steps", flush=True)
    trained[strategy] = train(FOLDER / name / strategy, strategy, args)

  # --- Features ---------------------------------------------------------------
  split = splits.open_split(
    str(FOLDER / "dataset"), "windows", FOLDER / "features"
  )
  windows = open_windows(split)
  features = {}
  for strategy in STRATEGIES:
    weights = formats.read(FOLDER / name / strategy)
    features[strategy] = [features_of(weights, split)]
  features[RANDOM] = [
    features_of(random_weights(weights.architecture, seed), split)
    for seed in RANDOM_SEEDS
  ]
  features[COLOURS] = [colours_of(split, weights.architecture.clip)]

  # --- Probes -----------------------------------------------------------------
  results = [
    measure(question, windows, features)
    for question in tqdm(questions(windows), desc="probes", unit="question")
  ]
  for strategy, run in trained.items():
    print(
      f"{strategy:8} reconstruction loss over the last fifth "
      f"{run['last_fifth']:.5f}; {run['step_secs']:.2f} s per step, "
      f"{run['secs']:.0f} s in total"
    )
  print(f"\n{table(results)}\n")
  print("* better than random init: the interval of the difference is above 0")
  draw(results, trained, FOLDER / name / "probe.png")
  print(FOLDER / name / "probe.png")
  timing.save(
    f"bench_probe-{name}",
    [
      {
        "settings": settings(args),
        "penalty": PENALTY,
        "random_seeds": RANDOM_SEEDS,
        "secs": time.monotonic() - started_at,
        "trained": trained,
        "probes": results,
      }
    ],
  )


if __name__ == "__main__":
  main()
