"""Evaluation of an encoder: tasks, modes, shares of the data and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from marlin_jax.devices import distributed, sharding
from marlin_jax.downstream import low_data, splits
from marlin_jax.downstream.folds import Fold
from marlin_jax.downstream.splits import TaskSplit
from marlin_jax.downstream.tasks import Task
from marlin_jax.eval import configuration, measures, modes, report
from marlin_jax.eval.inputs import Inputs, Videos, open_inputs, open_videos
from marlin_jax.eval.results_folder import ResultsFolder
from marlin_jax.inference import classifier
from marlin_jax.records.cli import Row, UserError, format_rows
from marlin_jax.records.folders import check_local
from marlin_jax.training.configuration import flat
from marlin_jax.weights import formats
from marlin_jax.weights.weights import encoder_sha256


class DeviceMemoryError(UserError):
  """A batch does not fit into the memory of a device."""


# Mode of the baseline that predicts the shares or means of the training split.
CONSTANT = "constant"
_NUM_TRAINED = ("num_train", "num_train_people")


def evaluate(
  config: ConfigDict, checkpoint: str, data: str, workdir: str
) -> dict[str, Any]:
  """Evaluates a checkpoint.

  Args:
    config: a valid configuration, see configs/eval_far.py.
    checkpoint: weights in any format, a published model's name, or 'random';
      '' with `config.features`.
    data: directory of a data set prepared with labels.
    workdir: folder for results; see `results_folder`.

  Returns:
    The content of results.json; {} on all processes but the first.

  Raises:
    UserError: the evaluation is impossible as configured.
    KeyboardInterrupt: SIGINT or SIGTERM; the same call resumes.
  """
  # --- Inputs -----------------------------------------------------------------
  check_local(config.cache)
  inputs = open_inputs(config, checkpoint, data)
  with ResultsFolder(Path(workdir), inputs.settings) as folder:
    cache = Path(config.cache or folder.path / "features")
    with distributed.process_0_first():
      videos = open_videos(inputs, config, cache)
    if folder.writes:
      print(_describe(inputs, videos))
      for warning in videos.warnings:
        print(f"WARNING: {warning}", flush=True)

    # --- Training and testing -------------------------------------------------
    runner = modes.ModeRunner(
      config, inputs.weights, inputs.mesh, cache, inputs.features
    )
    cells = run_cells(inputs, videos, runner, config, folder)
    if not folder.writes:
      return {}

    # --- Results, with those of earlier calls ---------------------------------
    results = results_of(inputs, videos, config, cells, folder)
    table = report.table(results["summary"])
    folder.write_results(results, table)
    print(f"\n{table}\n")
    if config.plots:
      _plot(inputs, videos, config, results, folder)
    print(f"{folder.path / 'results.json'} holds all scores", flush=True)
  return results


# --- Inputs -------------------------------------------------------------------


def _mode_names(config: ConfigDict) -> list[str]:
  return configuration.split_names(config.modes)


def _describe(inputs: Inputs, videos: Videos) -> str:
  """Returns the start-up text, printed before the first long wait."""
  rows = [
    _describe_encoder(inputs),
    Row(
      "data",
      str(inputs.data),
      [
        f"{role:5}  split '{split.name}': videos: {len(split)}, people: "
        f"{len(set(split.people))}"
        for role, split in videos.splits.items()
      ],
    ),
  ]
  for task in inputs.tasks:
    folds = videos.folds[task.name]
    sizes = ", ".join(
      f"{role} {len(task_videos)}"
      for role, task_videos in next(iter(folds.values())).items()
    )
    if "" not in folds:
      sizes += f" in the first of {len(folds)} folds, {', '.join(folds)}"
    noun = {"binary": "labels", "class": "classes", "value": "numbers"}
    rows.append(
      Row(
        "task",
        f"{task.name}: {len(task.names)} {noun[task.kind]}; videos: {sizes}",
      )
    )
  rows.append(Row("devices", sharding.describe(inputs.mesh)))
  return format_rows(rows)


def _describe_encoder(inputs: Inputs) -> Row:
  if features := inputs.features:
    return Row(
      "features",
      f"{features.source}: width {features.width}, of {len(features)} videos",
    )
  architecture = inputs.weights.architecture
  return Row(
    "encoder",
    f"{inputs.weights.source}: width {architecture.width}, depth "
    f"{architecture.depth}, {architecture.num_frames} frames",
  )


# --- Cells --------------------------------------------------------------------


class Cell(NamedTuple):
  """One fit of a mode and its scores on the test split.

  Attributes:
    task: task to predict.
    mode: one of configuration.MODES.
    ratio: share of the training people.
    seed: seed of the draw of the people and of the training.
    definition: hash of the task, its videos and their labels.
    fold: name of the fold; '' without folds, and for all of them together.
  """

  task: Task
  mode: str
  ratio: float
  seed: int
  definition: str = ""
  fold: str = ""

  @property
  def name(self) -> str:
    name = f"{self.task.name}-{self.mode}-{self.ratio:g}-{self.seed}"
    return f"{name}-{self.fold}" if self.fold else name


def run_cells(
  inputs: Inputs,
  videos: Videos,
  runner: modes.ModeRunner,
  config: ConfigDict,
  folder: ResultsFolder,
) -> list[dict[str, Any]]:
  """Returns the scores of all cells; runs those that are not finished."""
  cells = {
    task.name: _cells(config, task, _definition(task, videos))
    for task in inputs.tasks
  }
  fits = [
    cell._replace(fold=fold)
    for task in inputs.tasks
    for cell in cells[task.name]
    for fold in videos.folds[task.name]
  ]
  finished = {fit.name: folder.cell(fit.name, fit.definition) for fit in fits}
  todo = [fit for fit in fits if not finished[fit.name]]
  results = []
  for task in inputs.tasks:
    folds = videos.folds[task.name]
    results.append(_constant(task, folds, config))
    others = videos.others[task.name]
    for cell in cells[task.name]:
      parts = [cell._replace(fold=fold) for fold in folds]
      of_folds = [
        finished[part.name]
        or _run(
          part, folds[part.fold], others, runner, config, folder, inputs, todo
        )
        for part in parts
      ]
      if cell in parts:  # there are no folds
        results += of_folds
      elif folder.writes:
        results.append(_total(cell, parts, of_folds, folds, config, folder))
  return results


def _total(
  cell: Cell,
  parts: list[Cell],
  results: list[dict[str, Any]],
  folds: dict[str, Fold],
  config: ConfigDict,
  folder: ResultsFolder,
) -> dict[str, Any]:
  """Scores the test predictions of all folds as one, and writes them.

  Args:
    cell: what the folds have in common.
    parts: the cell of each fold.
    results: their scores.
    folds: videos by fold.
    config: configuration of the evaluation.
    folder: folder with their predictions.
  """
  tested = [folds[part.fold]["test"] for part in parts]
  pooled = measures.Predictions.joined(
    [
      _predictions(videos, folder.predicted(part.name))
      for part, videos in zip(parts, tested, strict=True)
    ]
  )
  # A video's decisions are those of its fold.
  thresholds = np.concatenate(
    [
      np.tile(result["thresholds"], (len(videos), 1))
      for result, videos in zip(results, tested, strict=True)
    ]
  )
  scores, draws = measures.measure(
    cell.task, pooled, thresholds, {}, config.num_resamples
  )
  return _written(
    cell,
    pooled,
    {key: min(r[key] for r in results) for key in _NUM_TRAINED}
    | {
      "test": scores,
      "tests": {},
      "folds": results,
      "secs": round(sum(result["secs"] for result in results), 1),
    },
    draws,
    folder,
  )


def _written(
  cell: Cell,
  test: measures.Predictions,
  result: dict[str, Any],
  draws: dict[str, np.ndarray],
  folder: ResultsFolder,
) -> dict[str, Any]:
  """Writes a cell; returns its result with what identifies it."""
  result = {
    "task": cell.task.name,
    "mode": cell.mode,
    "ratio": cell.ratio,
    "seed": cell.seed,
    "fold": cell.fold,
    "name": cell.name,
    "definition": cell.definition,
  } | result
  targets = _targets_as_labels(cell.task, test.targets)
  folder.write_cell(cell.name, cell.task, test, targets, result, draws)
  return result


def _identity(
  cell: Cell, inputs: Inputs, folder: ResultsFolder
) -> dict[str, Any]:
  """Returns the values that a resumed training of a cell must share."""
  rule = {
    key: value
    for key, value in inputs.settings.items()
    if key.startswith(f"{configuration.DERIVE}{cell.task.name}.")
  }
  return folder.settings() | rule | {"cell": cell.name}


def _definition(task: Task, videos: Videos) -> str:
  """Returns a hash of a task, its videos and their labels."""
  others = [videos.split for videos in videos.others[task.name].values()]
  labels = splits.labels_sha256([*videos.splits.values(), *others], task.label)
  return hashlib.sha256(f"{task.sha256} {labels}".encode()).hexdigest()


def _cells(config: ConfigDict, task: Task, definition: str) -> list[Cell]:
  deterministic = modes.DETERMINISTIC[config.protocol]
  return [
    Cell(task, mode, ratio, seed, definition)
    for mode in _mode_names(config)
    for ratio in configuration.ratios(config)
    for seed in range(
      1 if ratio == 1 and mode in deterministic else config.num_seeds
    )
  ]


def _run(
  cell: Cell,
  videos: dict[str, TaskSplit],
  others: dict[str, TaskSplit],
  runner: modes.ModeRunner,
  config: ConfigDict,
  folder: ResultsFolder,
  inputs: Inputs,
  todo: list[Cell],
) -> dict[str, Any]:
  """Trains and tests a cell, writes its results and returns its scores."""
  task, started_at = cell.task, time.monotonic()
  train = videos["train"]
  strata = task.strata(train.targets)
  train = train.subset(
    low_data.take(cell.ratio, strata, train.people, cell.seed)
  )
  job = modes.Job(
    task,
    train,
    videos["val"],
    cell.seed,
    cell.name,
    folder.checkpoints(cell.name),
    _identity(cell, inputs, folder),
    # Trainings are about as long as they have people.
    sum(c.ratio for c in todo[todo.index(cell) :] if c.mode == cell.mode)
    / cell.ratio,
  )
  with _advising_on_memory():
    predicted = runner.run(cell.mode, job)
    val, test, *of_others = (
      _predictions(split, predicted.predict(split))
      for split in (videos["val"], videos["test"], *others.values())
    )
  if not folder.writes:
    return {}
  for warning in predicted.warnings:
    print(f"WARNING: {cell.name}: {warning}", flush=True)
  thresholds = measures.thresholds(task, val, config.protocol)
  if config.keep_models and inputs.weights:
    _keep_model(folder, cell, inputs, predicted, val, thresholds, config)
  scores, draws = _measured(task, videos["test"], test, thresholds, config)
  other_scores = {}
  for (name, split), predictions in zip(others.items(), of_others, strict=True):
    other_scores[name], other_draws = _measured(
      inputs.task_of(name, task), split, predictions, thresholds, config
    )
    draws |= {f"{name} {key}": values for key, values in other_draws.items()}
  val_score = task.score(val.targets, val.predicted, micro=False)
  result = _num_trained(train) | {
    "chosen": predicted.chosen,
    "thresholds": thresholds.tolist(),
    "val": {
      task.score_name: measures.finite_or_none(val_score),
      "num_videos": len(val.video_ids),
    },
    "test": scores,
    "tests": other_scores,
    "secs": round(time.monotonic() - started_at, 1),
  }
  return _written(cell, test, result, draws, folder)


@contextlib.contextmanager
def _advising_on_memory() -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    first_line = str(e).splitlines()[0]
    raise DeviceMemoryError(
      f"a device has too little memory: {first_line}\nLower "
      "config.clips_per_device, the clips of a training that are processed at "
      "once, or config.batch_size where nothing is trained; or set "
      "config.remat=full, or config.dtype=bfloat16 in another --workdir"
    ) from e


def _keep_model(
  folder: ResultsFolder,
  cell: Cell,
  inputs: Inputs,
  predicted: modes.ModeResult,
  val: measures.Predictions,
  thresholds: np.ndarray,
  config: ConfigDict,
) -> None:
  """Writes the trained model of a cell, which `marlin_jax.predict` applies."""
  task, weights, head = cell.task, inputs.weights, predicted.head
  if head.encoder is None and weights.source == formats.RANDOM:
    # There is no file to open it from.
    head = dataclasses.replace(head, encoder=weights)
  source = Path(weights.source)
  description = classifier.Description(
    task=task.name,
    names=task.names,
    kind=task.kind,
    head=head.kind,
    thresholds=tuple(thresholds.tolist()),
    encoder=str(source.resolve() if source.exists() else source),
    encoder_sha256=encoder_sha256(head.encoder or weights),
    pool=config.pool if head.kind in classifier.VIDEO_HEADS else "mean",
    options=head.options,
    temperature=measures.temperature(task, val),
    origin={
      "cell": cell.name,
      "mode": cell.mode,
      "protocol": config.protocol,
      "label": task.label,
      "data": str(inputs.data),
      "settings": inputs.settings,
      "versions": versions(),
    },
  )
  classifier.write(folder.model(cell.name), description, head)


def _constant(
  task: Task, folds: dict[str, Fold], config: ConfigDict
) -> dict[str, Any]:
  """Scores the baseline that predicts the training split's shares or means."""
  parts = []
  for fold in folds.values():
    labels, known = task.encode(fold["train"].targets)
    means = (labels * known).sum(0) / np.maximum(known.sum(0), 1)
    predicted = np.tile(means, (len(fold["test"]), 1))
    parts.append(_predictions(fold["test"], predicted))
  pooled = measures.Predictions.joined(parts)
  values = np.concatenate(
    [
      fold["test"].split.labels[task.label][fold["test"].rows]
      for fold in folds.values()
    ]
  )
  thresholds = np.full(0 if task.is_value else task.num_outputs, 0.5)
  scores, _ = measures.measure(
    task, pooled, thresholds, task.parts(values), config.num_resamples
  )
  trained = [_num_trained(fold["train"]) for fold in folds.values()]
  return {
    "task": task.name,
    "mode": CONSTANT,
    "ratio": 1.0,
    "seed": 0,
    "name": f"{task.name}-{CONSTANT}",
    **{key: min(t[key] for t in trained) for key in _NUM_TRAINED},
    "test": scores,
  }


def _num_trained(train: TaskSplit) -> dict[str, int]:
  numbers = len(train), len(set(train.people))
  return dict(zip(_NUM_TRAINED, numbers, strict=True))


def _measured(
  task: Task,
  videos: TaskSplit,
  predictions: measures.Predictions,
  thresholds: np.ndarray,
  config: ConfigDict,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  values = videos.split.labels[task.label][videos.rows]
  return measures.measure(
    task, predictions, thresholds, task.parts(values), config.num_resamples
  )


def _predictions(
  videos: TaskSplit, predicted: np.ndarray
) -> measures.Predictions:
  return measures.Predictions(
    videos.video_ids, videos.people, videos.targets, predicted
  )


def _targets_as_labels(task: Task, targets: np.ndarray) -> np.ndarray:
  """Returns float32 (V, K), one-hot for classes; NaN where unknown."""
  labels, known = task.encode(targets)
  return np.where(known > 0, labels, np.nan)


# --- Results ------------------------------------------------------------------


def results_of(
  inputs: Inputs,
  videos: Videos,
  config: ConfigDict,
  cells: list[dict[str, Any]],
  folder: ResultsFolder,
) -> dict[str, Any]:
  """Returns the content of results.json.

  Args:
    inputs, videos, config: inputs of this call.
    cells: scores that this call computed.
    folder: workdir, with the results of earlier calls, whose cells and tasks
      are kept.
  """
  earlier = folder.results()
  cells = _sorted([*earlier.get("cells", []), *cells])
  return {
    "checkpoint": {
      "source": (inputs.features or inputs.weights).source,
      "sha256": inputs.settings["checkpoint"],
      "architecture": inputs.weights
      and dataclasses.asdict(inputs.weights.architecture),
    },
    "data": {
      "path": str(inputs.data),
      "splits": {
        role: {
          "name": split.name,
          "videos": len(split),
          "people": len(set(split.people)),
          "sha256": split.dataset.fingerprint,
        }
        for role, split in videos.splits.items()
      },
      "warnings": videos.warnings,
    },
    "tasks": earlier.get("tasks", {})
    | {
      task.name: dataclasses.asdict(task)
      | {
        "split_sha256": splits.labels_sha256(videos.splits.values(), task.label)
      }
      for task in inputs.tasks
    },
    "config": flat(config),
    "versions": versions(),
    "devices": [d.device_kind for d in inputs.mesh.devices.flat],
    "summary": report.summary(cells, folder.draws),
    "cells": cells,
  }


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ("jax", "flax", "optax", "numpy", "scipy")
  return {name: importlib.metadata.version(name) for name in names}


def _sorted(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Sorts by task, mode, ratio and seed; the last of equal names is kept."""
  cells = list({cell["name"]: cell for cell in cells}.values())
  task_names = list(dict.fromkeys(cell["task"] for cell in cells))
  mode_names = list(dict.fromkeys(cell["mode"] for cell in cells))
  return sorted(
    cells,
    key=lambda cell: (
      task_names.index(cell["task"]),
      mode_names.index(cell["mode"]),
      cell["ratio"],
      cell["seed"],
    ),
  )


def _plot(
  inputs: Inputs,
  videos: Videos,
  config: ConfigDict,
  results: dict[str, Any],
  folder: ResultsFolder,
) -> None:
  """Plots the first seed of each mode on the largest share of the data."""
  if not report.has_matplotlib():
    print("no plots: pip install 'marlin-jax[plots]'")
    return
  plots = folder.path / "plots"
  cells = {cell["name"]: cell for cell in results["cells"]}
  ratio = configuration.ratios(config)[-1]
  for task, mode in itertools.product(inputs.tasks, _mode_names(config)):
    name = Cell(task, mode, ratio, 0).name
    targets = np.concatenate(
      [fold["test"].targets for fold in videos.folds[task.name].values()]
    )
    report.plot_cell(
      plots,
      cells[name],
      task,
      _targets_as_labels(task, targets),
      folder.predicted(name),
    )
  report.plot_ratios(plots, results["summary"])
