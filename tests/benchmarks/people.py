"""Tests on people never seen whether pretraining learns, and which method.

Prepares a folder of videos of many people, splits it by person, and pretrains
encoders with fasking, tube and random masking, or with other objectives
(--methods), with several seeds and the same FLOPs. Probes are fitted on the
training people and scored on others, beside probes of untrained encoders, of
small pictures of the same frames and, as a ceiling, of face landmarks. The
questions are six regressions, also of the differences from each person's mean,
whether two videos show the same person, and the order of two windows in time.
The method `supervised` learns the labels themselves: a check of the chain.

  make bench-people FOOTAGE=DIR HOURS=6

DIR holds manifest.csv with the columns path and subject_id. Training goes on in
rounds, to 200, 500, 1000, 2000, 3000, 4000, 6000, ... steps (fewer for methods
whose steps cost more), until the next would take more than HOURS in all. After
a round each encoder is probed: scores over compute. The same command resumes
where it stopped, also with more hours or seeds. It prints tables, and
writes people.json and people.png into --output.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from configs import pretrain_ti
from data_prep import prepare
from marlin_jax import train
from marlin_jax.devices import xla_flags
from marlin_jax.downstream import clip_batches, splits
from marlin_jax.inference.marlin import Marlin
from marlin_jax.pretraining import build, configuration
from marlin_jax.records import schema
from marlin_jax.weights import formats
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, of_modules
from tests.benchmarks import (
  people_probes,
  people_report,
  people_supervised,
  people_windows,
  timing,
)
from tests.benchmarks.people_report import (
  LANDMARKS,
  METHODS,
  PIXELS,
  RANDOM,
  SUPERVISED,
  TEACHERS,
  WITH_STILLS,
  Encoder,
)
from tests.benchmarks.people_windows import FIT, UNSEEN, Windows

ROOT = Path(__file__).parents[2]
EVAL_STEPS = 500
TEACHER_STEPS = 500
# Steps after each round: 200, 500, then 1, 2, 3, 4, 6, 8, 12, ... thousand.
ROUNDS = (
  *(200, 500, 1000),
  *(1000 * n for k in range(1, 14) for n in (2**k, 3 * 2 ** (k - 1))),
)
_ENCODED_AT_ONCE = 32
_PIXELS = 16  # side of the pictures of the pixel features
# On people never seen: the loss of the network, of flat patches in their mean
# colour over the batch, and in their own; the share of the features' variance
# that tells clips apart.
_MEASURES = tuple(
  f"eval/{UNSEEN}/{name}"
  for name in (
    *("loss_pixels", "loss_batch_colour", "loss_own_colour"),
    "clip_share",
  )
)
_STEPS_PER_MEAN = 100


@dataclasses.dataclass(frozen=True)
class Study:
  """One folder of results.

  Attributes:
    folder: holds the data set, the runs and all answers.
    footage: folder with manifest.csv.
    overrides: values of the configuration by key, such as model.width.
  """

  folder: Path
  footage: Path
  overrides: dict[str, Any]

  # --- time ---

  @property
  def ledger(self) -> Path:
    """Seconds of each finished part, also of cores, a JSON object per line."""
    return self.folder / "secs.jsonl"

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Adds the time of what runs in it to the ledger, unless it fails."""
    start, cpu_start = time.monotonic(), time.process_time()
    yield
    row = {
      "what": what,
      "secs": round(time.monotonic() - start, 2),
      "cpu_secs": round(time.process_time() - cpu_start, 2),
    }
    with self.ledger.open("a") as file:
      file.write(json.dumps(row) + "\n")

  def secs(self, what: str = "") -> float:
    """Returns the seconds of all parts whose names begin with `what`."""
    if not self.ledger.exists():
      return 0.0
    rows = map(json.loads, self.ledger.read_text().splitlines())
    return sum(row["secs"] for row in rows if row["what"].startswith(what))

  # --- data ---

  @property
  def dataset(self) -> Path:
    return self.folder / "dataset"

  def windows(self) -> Windows:
    """Returns the windows; makes the data set and measures them if missing."""
    path = self.folder / "windows.npz"
    if not path.exists():
      command = [f"--input={self.footage / 'manifest.csv'}"]
      command += [f"--output={self.dataset}", "--num_shards=4", "--sound"]
      command += ["--val_ratio=0.15", "--test_ratio=0.25"]
      with self.timed("prepare"):
        if code := prepare.main(command):
          sys.exit(code)
      with self.timed("windows"):
        save(path, vars(people_windows.measure(self.dataset)))
    with np.load(path) as file:
      fields = [field.name for field in dataclasses.fields(Windows)]
      return Windows(**{name: file[name] for name in fields})

  def stills(self) -> Path:
    """Returns a data set of a picture per second of the training videos."""
    dataset, pictures = self.folder / "stills", self.folder / "pictures"
    if dataset.exists():
      return dataset
    with self.timed("stills"):
      pictures.mkdir(exist_ok=True)
      windows = self.windows()
      people = set(windows.person[windows.rows("train")])
      with (self.footage / "manifest.csv").open(newline="") as file:
        videos = {
          row["path"]
          for row in csv.DictReader(file)
          if f"subject {row['subject_id']}" in people
        }
      for video in tqdm(sorted(videos), desc="pictures", unit="video"):
        write_stills(self.footage / video, pictures)
      listed = self.folder / "pictures.txt"
      listed.write_text("".join(f"{p.name}\n" for p in pictures.iterdir()))
      command = [f"--input={listed}", f"--root={pictures}", "--num_shards=4"]
      command += [f"--output={dataset}", "--val_ratio=0", "--test_ratio=0"]
      if code := prepare.main(command):
        sys.exit(code)
    return dataset

  # --- encoders ---

  def config(self, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns configs/pretrain_ti.py, changed."""
    config = pretrain_ti.get_config()
    config.update_from_flattened_dict({**self.overrides, **settings})
    return config

  def settings(self, method: str) -> dict[str, Any]:
    """Returns the changes of a method; makes its teacher, its data if missing.

    A teacher is trained with seed 0, for all seeds of the method.
    """
    settings = dict(METHODS[method])
    if method in TEACHERS:
      teacher = TEACHERS[method]
      workdir = self.folder / "runs" / f"teacher-{teacher}"
      self._train_to(TEACHER_STEPS, workdir, METHODS[teacher])
      settings["teacher.path"] = str(workdir)
    if method in WITH_STILLS:
      settings["data.path"] = f"{self.dataset}:1,{self.stills()}:1"
    return settings

  def workdir(self, method: str, seed: int) -> Path:
    return self.folder / "runs" / f"{method}-{seed}"

  def num_steps(self, method: str, steps: int) -> int:
    """Returns the steps that take the FLOPs of `steps` steps with fasking."""
    ((_, cost),) = self._costs("fasking")
    left, num_steps = steps * cost, 0.0
    for stage_steps, cost in self._costs(method):
      here = min(stage_steps, left / cost)
      num_steps, left = num_steps + here, left - here * cost
    return max(1, round(num_steps))

  def _costs(self, method: str) -> list[tuple[float, float]]:
    """Returns steps and FLOPs per clip of each stage; the last is endless."""
    config = self.config(self.settings(method))
    if method == SUPERVISED:
      architecture = Architecture.from_config(config).without_decoder()
      return [(math.inf, people_supervised.flops_per_clip(architecture))]
    stages = build.Experiment(config, num_steps=1).by_stage
    steps = (stage.num_steps for stage in configuration.stages(config)[:-1])
    costs = (stage.flops_per_clip for stage in stages)
    return list(zip((*steps, math.inf), costs, strict=True))

  def train(self, method: str, seed: int, steps: int) -> None:
    """Trains an encoder for the FLOPs of `steps` steps, unless that is done.

    Raises:
      SystemExit: a signal ended the run, which has saved.
    """
    self._train_to(
      self.num_steps(method, steps),
      self.workdir(method, seed),
      {**self.settings(method), "seed": seed},
    )

  def _train_to(
    self, num_steps: int, workdir: Path, settings: Mapping[str, Any]
  ) -> None:
    """Trains to a step, unless that is done, with changes of the defaults."""
    if (workdir / "checkpoints" / str(num_steps)).exists():
      return
    config = self.config(
      {
        "data.path": str(self.dataset),
        "data.split": "train",
        "data.eval_split": UNSEEN,
        "seed": 0,
        "num_steps": num_steps,
        "eval_steps": EVAL_STEPS,
        "picture_steps": EVAL_STEPS,
        "checkpoint_steps": EVAL_STEPS,
        "keep_checkpoints": 1,
        "compilation_cache": str(self.folder / "compiled"),
        **settings,
      }
    )
    configuration.validate(config)
    _, signal = train.train_and_evaluate(config, str(workdir))
    if signal:
      sys.exit(128 + signal)

  def losses(self, method: str, seed: int) -> dict[str, Any]:
    """Returns the loss curves of a run.

    Returns:
      `unseen`: rows of a step and _MEASURES; `seen`: rows of a step and the
      mean of the logged training losses up to it since the row before.
    """
    lines = (self.workdir(method, seed) / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    # By step: a run that resumes may evaluate its last step again.
    unseen = {
      row["step"]: [round(row[key], 5) for key in _MEASURES]
      for row in rows
      if _MEASURES[0] in row
    }
    logged: dict[int, list[float]] = {}
    for row in rows:
      if "train/loss_rec" in row:
        end = -(-row["step"] // _STEPS_PER_MEAN) * _STEPS_PER_MEAN
        logged.setdefault(end, []).append(row["train/loss_rec"])
    seen = [[end, round(np.mean(part), 5)] for end, part in logged.items()]
    return {
      "seen": seen,
      "unseen": [[step, *measures] for step, measures in unseen.items()],
    }

  def answers_path(self, encoder: Encoder) -> Path:
    name = f"{encoder.name}-{encoder.seed}-{encoder.steps}.npz"
    return self.folder / "answers" / name

  def all_answers(self) -> dict[Encoder, dict[str, np.ndarray]]:
    """Returns the answers of all encoders so far."""
    found = {}
    for path in sorted((self.folder / "answers").glob("*-*-*.npz")):
      name, seed, steps = path.stem.split("-")
      with np.load(path) as file:
        found[Encoder(name, int(seed), int(steps))] = dict(file)
    return found

  def probe(
    self,
    encoder: Encoder,
    weights: Weights,
    windows: Windows,
    own: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Encodes all windows, fits the probes and saves their answers.

    Args:
      encoder, weights, windows: what to probe on what.
      own: answers of a head of the encoder's own, saved beside.
    """
    architecture = weights.architecture
    tokens, middle = self.encode(weights, windows)
    features = {"mean": tokens.mean(axis=1, dtype=np.float32)}
    for name, x in (("grid", tokens), ("middle", middle)):
      by_place = x.reshape(len(x), *architecture.tubelets.grid, -1)
      features[name] = np.stack(list(map(people_windows.moments, by_place)))
    save(
      self.answers_path(encoder),
      people_probes.answers(windows, features, tokens, architecture.num_heads)
      | dict(own or {}),
    )

  def untrained(self, seed: int) -> Weights:
    """Returns an encoder as a seed draws it."""
    architecture = Architecture.from_config(self.config({})).without_decoder()
    module = architecture.make_autoencoder(rngs=nnx.Rngs(seed))
    return of_modules(architecture, nnx.to_pure_dict(nnx.state(module)))

  def probe_baselines(self, windows: Windows, num_seeds: int) -> None:
    """Probes what needs no training."""
    architecture = Architecture.from_config(self.config({})).without_decoder()
    for name in (PIXELS, LANDMARKS):
      path = self.answers_path(Encoder(name, 0, 0))
      if not path.exists():
        with self.timed(f"probe {name}"):
          x = (
            self.pixels(architecture, windows)
            if name == PIXELS
            else windows.landmarks
          )
          save(path, people_probes.answers(windows, {"grid": x}))
    for seed in range(num_seeds):
      encoder = Encoder(RANDOM, seed, 0)
      if not self.answers_path(encoder).exists():
        with self.timed(f"probe {RANDOM}"):
          self.probe(encoder, self.untrained(seed), windows)

  def encode(
    self, weights: Weights, windows: Windows
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of all tokens of each window, float16 (W, N, D).

    Those of the whole encoder, and of the first half of its blocks.
    """
    marlin = Marlin(weights)
    architecture = marlin.architecture
    num_tokens = architecture.tubelets.num_tokens
    shape = len(windows.split), num_tokens, architecture.width
    last, middle = np.empty(shape, np.float16), np.empty(shape, np.float16)
    half = (architecture.depth + 1) // 2
    for rows, video in self.clips(architecture, windows):
      last[rows] = marlin.extract_features(video, keep_seq=True)
      middle[rows] = marlin.extract_features(
        video, keep_seq=True, num_blocks=half
      )
    return last, middle

  def pixels(self, architecture: Architecture, windows: Windows) -> np.ndarray:
    """Returns moments of small pictures of the frames that encoders see."""
    features: list[np.ndarray] = [np.empty(0)] * len(windows.split)
    for rows, video in self.clips(architecture, windows):
      for row, clip in zip(rows, video, strict=True):
        small = [
          schema.resized(frame, _PIXELS) / np.float32(255) for frame in clip
        ]
        features[row] = people_windows.moments(np.stack(small))
    return np.stack(features)

  def clips(
    self,
    architecture: Architecture,
    windows: Windows,
    names: Iterable[str] = (*FIT, UNSEEN),
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the numbers of some windows of splits, (B,), and their clips."""
    clip = architecture.clip
    if clip.extent != people_windows.LABELLED.extent:
      sys.exit(
        f"a clip covers {clip.extent} frames, and the labels are of "
        f"{people_windows.LABELLED.extent}: change data.num_frames or "
        "data.stride"
      )
    for name in names:
      split = splits.open_split(str(self.dataset), name, self.folder / "index")
      reader = clip_batches.ClipReader(split, clip, architecture.image_size)
      rows = windows.rows(name)
      for i in range(0, len(rows), _ENCODED_AT_ONCE):
        part = rows[i : i + _ENCODED_AT_ONCE]
        places = zip(windows.track[part], windows.start[part], strict=True)
        yield part, reader.read([splits.TrackWindow(*at) for at in places])


def write_stills(video: Path, folder: Path) -> None:
  """Writes a picture of each second of a video."""
  capture = cv2.VideoCapture(str(video))
  step = max(1, round(capture.get(cv2.CAP_PROP_FPS)))
  for number in itertools.count():
    if not capture.grab():
      return
    if number % step == 0:
      name = f"{video.stem}-{number:06}.jpg"
      cv2.imwrite(str(folder / name), capture.retrieve()[1])


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an npz file at once, so that one that is there is whole."""
  path.parent.mkdir(exist_ok=True)
  part = path.with_suffix(".part")
  with part.open("wb") as file:
    np.savez(file, **arrays)
  part.rename(path)


def report(study: Study, windows: Windows, output: Path) -> None:
  """Writes people.json, and people.png from it."""
  answers = study.all_answers()
  runs = sorted({e[:2] for e in answers if e.steps and e.name != SUPERVISED})
  results = {
    "about": timing.environment()
    | {
      "secs": round(study.secs()),
      "secs_training": round(study.secs("train")),
      "videos": len(set(windows.video)),
      "people": {
        name: len(set(windows.person[windows.rows(name)]))
        for name in (*FIT, UNSEEN)
      },
      "windows": {name: len(windows.rows(name)) for name in (*FIT, UNSEEN)},
      "overrides": study.overrides,
    },
    "runs": [
      {"strategy": method, "seed": seed} | study.losses(method, seed)
      for method, seed in runs
    ],
  } | people_report.scores(windows, answers)
  output.mkdir(parents=True, exist_ok=True)
  (output / "people.json").write_text(people_report.to_json(results))
  people_report.draw(results, output / "people.png")


def train_rounds(
  study: Study,
  windows: Windows,
  methods: list[str],
  num_seeds: int,
  hours: float,
  output: Path,
) -> None:
  """Trains and probes all encoders round by round, within `hours` in all."""
  previous = 0
  for steps in ROUNDS:
    todo = [
      encoder
      for seed in range(num_seeds)
      for method in methods
      if not study.answers_path(
        encoder := Encoder(method, seed, steps)
      ).exists()
    ]
    done = sum(e.steps for e in _last_of_each(study))
    secs_per_step = study.secs("train") / done if done else 0.0
    for i, encoder in enumerate(todo):
      left = 3600 * hours - study.secs()
      needed = (len(todo) - i) * (steps - previous) * secs_per_step
      # A round that has begun ends early only when no time is left at all.
      if left < (0 if i else needed):
        print(
          f"{left / 60:.0f} minutes are left of HOURS={hours:g}; training "
          f"{len(todo) - i} encoders to step {steps} takes about "
          f"{needed / 60:.0f}"
        )
        return
      own = None
      with study.timed(f"train {encoder}"):
        if encoder.name == SUPERVISED:
          weights, own = people_supervised.train(study, encoder, windows)
        else:
          study.train(*encoder)
          weights = formats.read(str(study.workdir(*encoder[:2])))
      with study.timed(f"probe {encoder}"):
        study.probe(encoder, weights, windows, own)
      report(study, windows, output)
    previous = steps


def _last_of_each(study: Study) -> list[Encoder]:
  """Returns the last answers of each run."""
  last = {}
  for encoder in sorted(study.all_answers()):
    if encoder.steps:
      last[encoder[:2]] = encoder
  return list(last.values())


def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  xla_flags.set_for_training()
  overrides = dict(map(_override, args.set))
  study = Study(args.folder, args.footage, overrides)
  study.folder.mkdir(parents=True, exist_ok=True)
  windows = study.windows()
  study.probe_baselines(windows, args.seeds)
  train_rounds(
    study, windows, args.methods, args.seeds, args.hours, args.output
  )
  report(study, windows, args.output)
  results = json.loads((args.output / "people.json").read_text())
  print(
    people_report.table(results),
    people_report.table(results, score="change"),
    people_report.table_of_probes(results),
    sep="\n\n",
  )
  print("\n".join(people_report.summary(results)))
  print(args.output / "people.json", args.output / "people.png", sep="\n")


def _override(text: str) -> tuple[str, Any]:
  """Splits KEY=VALUE; the value is a number, True, False or text."""
  key, _, value = text.partition("=")
  try:
    return key, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return key, value


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tests.benchmarks.people",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--footage", type=Path, required=True, help="folder with manifest.csv"
  )
  parser.add_argument(
    "--folder",
    type=Path,
    default=ROOT / "runs" / "people",
    help="data set, runs and answers (default: runs/people)",
  )
  parser.add_argument(
    "--output",
    type=Path,
    default=ROOT / "runs" / "people",
    help="folder of people.json and people.png (default: runs/people)",
  )
  parser.add_argument(
    "--hours", type=float, default=6.0, help="hours in all (default: 6)"
  )
  parser.add_argument(
    "--seeds", type=int, default=3, help="runs of each method (default: 3)"
  )
  parser.add_argument(
    "--methods",
    nargs="+",
    default=list(people_report.STRATEGIES),
    choices=METHODS,
    help="maskings and objectives (default: the maskings)",
  )
  parser.add_argument(
    "--set",
    nargs="*",
    default=[],
    metavar="KEY=VALUE",
    help="changes of configs/pretrain_ti.py, such as model.width=384",
  )
  return parser


if __name__ == "__main__":
  main()
