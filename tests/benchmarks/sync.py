"""Measures the sync expert on people it has never seen.

  make bench-sync FOOTAGE=DIR

The footage is a folder of talking people with an index.csv; see
tests/benchmarks/sync_data.py. An expert learns from drawn mouths first, then
from 6, 24 and 45 people, each equally often and at most 20 seconds of each. It
is judged on 21 others: they had no part in the choice of the settings either.

Writes runs/sync/people.json, the table of docs/LIPSYNC.md as runs/sync/table.md
and the curve as runs/sync/people.png. The same command resumes a run that was
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from marlin_jax.data import prepared_dataset
from marlin_jax.lipsync.networks import build
from marlin_jax.records import cli
from tests.benchmarks import sync_data, sync_scores
from tests.support import talking_mouths

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "sync"

MAX_SECS = 20.0
JUDGED = ("group4", "group5", "group6", "group7")
_FIRST = ("group0", "group1", "group2", "group3")
# Splits that a run trains on, from the expert of drawn mouths on.
RUNS = {
  "6 people": _FIRST[:1],
  "24 people": _FIRST,
  "45 people": (*_FIRST, sync_data.OTHERS),
}
DRAWN = "drawn mouths alone"
BASELINE = "no network: opening of the mouth, loudness"
NUM_DRAWN, NUM_DRAWN_VAL = 72, 8

# A fourth of the channels, and lips of 24 x 48 pixels.
REGIME = {
  "expert.num_frames": 5,
  "expert.width": 0.25,
  "expert.height": 24,
  "expert.frame_size": 56,
  "expert.loss": "contrastive",
  "expert.clips_per_record": 8,
  "expert.batch_size": 32,
  "expert.lr": 1e-3,
  "expert.weight_decay": 0.05,
  "expert.flip_ratio": 0.5,
  "expert.min_crop_ratio": 0.7,
  "expert.colour_jitter": 0.2,
  "expert.gain_jitter": 1.0,
  "expert.eval_batches": 4,
  "data.sample_by": "subject",
  "data.max_bad_records": 50,
  "data.num_threads": 1,
  "log_steps": 20,
  "checkpoint_steps": 100,
}


# --- Data ---------------------------------------------------------------------


def prepare(footage: Path, folder: Path) -> Path:
  """Prepares the clips, unless that is done; returns the data set."""
  data, manifest = folder / "data", folder / "manifest.csv"
  sync_data.write_manifest(manifest, sync_data.speech_of(footage, MAX_SECS))
  if not (data / "dataset_info.json").exists():
    _run(
      "data_prep.prepare",
      *(f"--input={manifest}", f"--root={footage}", f"--output={data}"),
      *("--sound", "--fps=25", "--faces=main"),
    )
  return data


def draw(folder: Path) -> Path:
  """Writes the data set of drawn mouths, unless that is done."""
  if not (folder / "dataset_info.json").exists():
    talking_mouths.write_dataset(folder, NUM_DRAWN, NUM_DRAWN_VAL)
  return folder


# --- Training -----------------------------------------------------------------


def train(
  workdir: Path,
  data: Path,
  train_on: Sequence[str],
  val: str,
  steps: int,
  start: Path | None = None,
) -> None:
  """Trains an expert, unless that is done."""
  if (workdir / "checkpoints" / str(steps)).exists():
    return
  settings = REGIME | {
    "expert.num_steps": steps,
    "expert.eval_steps": steps,
    "data.train": "+".join(train_on),
    "data.val": val,
  }
  _run(
    "marlin_jax.eval.ls",
    *("--config=configs/eval_ls.py", "--mode=train_expert"),
    *(f"--data={data}", f"--workdir={workdir}"),
    *([f"--expert={start}"] if start else []),
    *(f"--config.{key}={value}" for key, value in settings.items()),
  )


def _run(module: str, *args: str) -> None:
  command = [sys.executable, "-m", module, *args]
  subprocess.run(command, cwd=ROOT, env=os.environ, check=True)


# --- Scores -------------------------------------------------------------------


def judge(
  data: Path, cosines: Callable[[sync_scores.Talk], np.ndarray], name: str
) -> dict:
  """Returns the `sync_scores.summary` of the judged people.

  Args:
    data: the data set.
    cosines: gives the cosines of all windows of a talk.
    name: what is judged, for the progress bar.
  """
  scores = []
  for split in tqdm(JUDGED, desc=name, unit="group", disable=None):
    dataset = prepared_dataset.open_dataset(str(data), split)
    for talk in sync_scores.talks_of(dataset):
      scores.append(sync_scores.score(talk.person, cosines(talk)))
  return sync_scores.summary(scores)


def judge_expert(data: Path, workdir: Path, name: str) -> dict:
  """Judges a trained expert, unless that is done."""
  path = workdir / "people.json"
  if not path.exists():
    expert = build.read_expert(workdir)
    embedder = sync_scores.Embedder(expert, REGIME["expert.frame_size"])
    path.write_text(json.dumps(judge(data, embedder.cosines, name)))
  return json.loads(path.read_text())


def amount_of(data: Path, splits: Sequence[str]) -> tuple[int, float]:
  """Returns the number of people, and of minutes of their faces."""
  people, frames = set(), 0
  for split in splits:
    dataset = prepared_dataset.open_dataset(str(data), split)
    for talk in sync_scores.talks_of(dataset):
      people.add(talk.person)
      frames += talk.num_frames
  return len(people), frames / 25 / 60


# --- Table and curve ----------------------------------------------------------

_HEADERS = {
  "window_ranked": "0.2 s ranked",
  "clip_ranked": "2 s ranked",
  "offset_within_1": "offset within 1 frame",
}


def table(results: dict) -> str:
  """Returns the rows of docs/LIPSYNC.md, in Markdown."""
  lines = [
    "| trained on | minutes | " + " | ".join(_HEADERS.values()) + " |",
    "|---" * (2 + len(_HEADERS)) + "|",
  ]
  for run in (results["baseline"], *results["runs"]):
    cells = [
      f"{100 * m['value']:.1f}% ({100 * m['low']:.1f} to {100 * m['high']:.1f})"
      for m in (run["scores"][name] for name in _HEADERS)
    ]
    minutes = f"{run['minutes']:.1f}" if run.get("minutes") else "-"
    lines.append(f"| {run['name']} | {minutes} | " + " | ".join(cells) + " |")
  chance = results["runs"][0]["scores"]
  cells = [f"{100 * chance[name]['chance']:.1f}%" for name in _HEADERS]
  lines.append("| chance | - | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def curve(results: dict, path: Path) -> None:
  """Plots the scores over the number of people, with intervals."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  runs = results["runs"]
  figure, axes = pyplot.subplots(
    1, len(_HEADERS), figsize=(10, 3.2), layout="constrained"
  )
  people = [run["people"] for run in runs]
  for axis, (metric, title) in zip(axes, _HEADERS.items(), strict=True):
    scores = [run["scores"][metric] for run in runs]
    value, low, high = (
      100 * np.array([s[key] for s in scores])
      for key in ("value", "low", "high")
    )
    axis.errorbar(people, value, [value - low, high - value], marker="o")
    axis.axhline(100 * scores[0]["chance"], color="black", linestyle=":")
    axis.set(xlabel="people trained on", title=title, ylabel="%")
  figure.savefig(path, dpi=110)


# --- The run ------------------------------------------------------------------


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--footage", type=Path, required=True)
  parser.add_argument("--folder", type=Path, default=FOLDER)
  parser.add_argument("--steps", type=int, default=400, help="of each run")
  parser.add_argument("--drawn_steps", type=int, default=400)
  args = parser.parse_args()
  sys.exit(cli.run_command(lambda: run(args)))


def run(args: argparse.Namespace) -> None:
  """Prepares, trains and judges what is missing, and writes the results."""
  folder, footage = args.folder.absolute(), args.footage.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  # All runs take the same steps, which are compiled once.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
  data, drawn = prepare(footage, folder), draw(folder / "drawn")
  start = folder / f"drawn-{args.drawn_steps}"
  train(start, drawn, ["train"], "val", args.drawn_steps)
  experts = [(DRAWN, start, (), 0)]
  for name, splits in RUNS.items():
    workdir = folder / f"{name.replace(' ', '_')}-{args.steps}"
    train(workdir, data, splits, splits[0], args.steps, start)
    experts.append((name, workdir, splits, args.steps))
  runs = []
  for name, workdir, splits, steps in experts:
    people, minutes = amount_of(data, splits)
    scores = judge_expert(data, workdir, name)
    runs.append(
      {"name": name, "people": people, "minutes": minutes, "steps": steps}
      | {"scores": scores}
    )
  judged_people, judged_minutes = amount_of(data, JUDGED)
  results = {
    "judged_people": judged_people,
    "judged_minutes": judged_minutes,
    "drawn_steps": args.drawn_steps,
    "regime": REGIME,
    "baseline": {
      "name": BASELINE,
      "scores": judge(data, sync_scores.mouth_and_loudness, BASELINE),
    },
    "runs": runs,
  }
  (folder / "people.json").write_text(json.dumps(results, indent=1) + "\n")
  (folder / "table.md").write_text(table(results) + "\n")
  curve(results, folder / "people.png")
  print(f"\n{table(results)}\n\n{folder / 'people.json'}")


if __name__ == "__main__":
  main()
