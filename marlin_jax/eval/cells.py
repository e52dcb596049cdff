"""Cells of an evaluation: fits, their scores, and those of all folds as one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from marlin_jax.downstream import low_data, measures, splits
from marlin_jax.downstream.folds import Fold
from marlin_jax.downstream.splits import TaskSplit
from marlin_jax.downstream.tasks import Task
from marlin_jax.eval import configuration, modes
from marlin_jax.eval.inputs import Inputs, Videos
from marlin_jax.eval.results_folder import ResultsFolder
from marlin_jax.inference import classifier
from marlin_jax.records.cli import UserError, counted
from marlin_jax.weights import formats
from marlin_jax.weights.weights import encoder_sha256

_NUM_TRAINED = ("num_train", "num_train_people")
# Distance to chance that is told.
_TOLERANCE = 0.02


class DeviceMemoryError(UserError):
  """A batch does not fit into the memory of a device."""


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
    """Names its files too."""
    name = f"{self.task.name}-{self.mode}-{self.ratio:g}-{self.seed}"
    # A fold may be of a class such as 'happy/joyful'.
    fold = self.fold.replace("/", "%2F")
    return f"{name}-{fold}" if fold else name


def run_cells(
  inputs: Inputs,
  videos: Videos,
  runner: modes.ModeRunner,
  config: ConfigDict,
  folder: ResultsFolder,
) -> None:
  """Runs the cells that are not finished, and writes the baselines."""
  definitions = {task.name: _definition(task, videos) for task in inputs.tasks}
  folder.check_definitions(definitions)
  cells = {
    task.name: _cells(config, task, definitions[task.name])
    for task in inputs.tasks
  }
  finished = folder.finished()
  todo = [
    fit
    for task in inputs.tasks
    for cell in cells[task.name]
    for fold in videos.folds[task.name]
    if (fit := cell._replace(fold=fold)).name not in finished
  ]
  for task in inputs.tasks:
    folds = videos.folds[task.name]
    if folder.writes:
      about = dataclasses.asdict(task) | {
        "split_sha256": splits.labels_sha256(videos.splits.values(), task.label)
      }
      facts = {"definition": definitions[task.name], "about": about}
      constant = _constant(task, folds, config)
      folder.write_cell(constant | facts)
      if len(folds) > 1:
        _warn_of_levels(task, constant)
    for cell in cells[task.name]:
      parts = [cell._replace(fold=fold) for fold in folds]
      for part in parts:
        if part in todo:
          others = videos.others[task.name]
          _run(
            part, folds[part.fold], others, runner, config, folder, inputs, todo
          )
      if folder.writes and cell not in parts:
        _run_total(cell, parts, folds, config, folder)


def _run_total(
  cell: Cell,
  parts: list[Cell],
  folds: dict[str, Fold],
  config: ConfigDict,
  folder: ResultsFolder,
) -> None:
  """Scores the test predictions of all folds as one, and writes them.

  Does nothing if the finished scores are of these folds.

  Args:
    cell: what the folds have in common.
    parts: the cell of each fold.
    folds: videos by fold.
    config: configuration of the evaluation.
    folder: folder with their scores and predictions.
  """
  results = [folder.cell(part.name) for part in parts]
  if (folder.cell(cell.name) or {}).get("folds") == results:
    return
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
  _write(
    cell,
    pooled,
    None,
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


def _write(
  cell: Cell,
  test: measures.Predictions,
  val: measures.Predictions | None,
  result: dict[str, Any],
  draws: dict[str, np.ndarray],
  folder: ResultsFolder,
) -> None:
  """Writes predictions and scores of a cell, with what identifies it."""
  folder.write_predictions(cell.name, cell.task, test, val, draws)
  identity = {
    "task": cell.task.name,
    "mode": cell.mode,
    "ratio": cell.ratio,
    "seed": cell.seed,
    "fold": cell.fold,
    "name": cell.name,
    "definition": cell.definition,
  }
  folder.write_cell(identity | result)


def _identity(
  cell: Cell, inputs: Inputs, folder: ResultsFolder
) -> dict[str, Any]:
  """Returns the values that a resumed training of a cell must share."""
  rule = f"{configuration.DERIVE}{cell.task.name}."
  shared, own = folder.settings(), inputs.settings
  return (
    {key: value for key, value in shared.items() if not key.startswith(rule)}
    | {key: value for key, value in own.items() if key.startswith(rule)}
    | {"cell": cell.name}
  )


def _definition(task: Task, videos: Videos) -> str:
  """Returns a hash of a task, its videos and their labels."""
  others = [videos.split for videos in videos.others[task.name].values()]
  labels = splits.labels_sha256([*videos.splits.values(), *others], task.label)
  return hashlib.sha256(f"{task.sha256} {labels}".encode()).hexdigest()


def _cells(config: ConfigDict, task: Task, definition: str) -> list[Cell]:
  deterministic = modes.DETERMINISTIC[config.protocol]
  return [
    Cell(task, mode, ratio, seed, definition)
    for mode in configuration.split_names(config.modes)
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
) -> None:
  """Trains and tests a cell, and writes its results."""
  task, started_at = cell.task, time.monotonic()
  train = videos["train"]
  strata = task.strata(train.targets)
  train = train.subset(
    low_data.take(cell.ratio, strata, train.people, cell.seed)
  )
  if cell.ratio < 1 and folder.writes:
    share = f"{cell.name}, {counted(len(train), 'video')}"
    known = splits.label_warnings(task, videos["train"], share)
    for line in splits.label_warnings(task, train, share):
      if line not in known:
        print(f"WARNING: {line}", flush=True)
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
      predicted.predict(split)
      for split in (videos["val"], videos["test"], *others.values())
    )
  val = _predictions(videos["val"], val.videos)
  if not folder.writes:
    return
  for warning in predicted.warnings:
    print(f"WARNING: {cell.name}: {warning}", flush=True)
  thresholds = measures.thresholds(task, val, config.protocol)
  if config.keep_models and inputs.weights:
    _keep_model(folder, cell, inputs, predicted, val, thresholds, config)
  scores, draws = _measured(task, videos["test"], test, thresholds, config)
  test = _predictions(videos["test"], test.videos)
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
  _write(cell, test, val, result, draws, folder)


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
    "mode": configuration.CONSTANT,
    "ratio": 1.0,
    "seed": 0,
    "name": f"{task.name}-{configuration.CONSTANT}",
    **{key: min(t[key] for t in trained) for key in _NUM_TRAINED},
    "test": scores,
  }


def _warn_of_levels(task: Task, constant: dict[str, Any]) -> None:
  """Warns if a model that knows nothing scores below chance over all folds.

  A fold that tests more of a class trains on less of it, so that predictions of
  different models, pooled, rank against the labels (Forman and Scholz, SIGKDD
  Explorations 2010).

  Args:
    task: task of the folds.
    constant: result of `_constant`.
  """
  metric, chance = ("pearson", 0.0) if task.is_value else ("auc", 0.5)
  value = constant["test"]["metrics"][metric]["value"]
  if value is not None and value < chance - _TOLERANCE:
    print(
      f"WARNING: task '{task.name}': over all folds a model that knows nothing "
      f"has {metric} {value:.2f}, not {chance:g}, since a fold trains on less "
      "of what it tests: pooled scores are too low, read the mean of the folds "
      "where they define it",
      flush=True,
    )


def _num_trained(train: TaskSplit) -> dict[str, int]:
  numbers = len(train), len(set(train.people))
  return dict(zip(_NUM_TRAINED, numbers, strict=True))


def _measured(
  task: Task,
  videos: TaskSplit,
  predicted: modes.Predicted,
  thresholds: np.ndarray,
  config: ConfigDict,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  values = videos.split.labels[task.label][videos.rows]
  predictions = _predictions(videos, predicted.videos)
  scores, draws = measures.measure(
    task, predictions, thresholds, task.parts(values), config.num_resamples
  )
  if predicted.windows is not None and not task.is_value:
    windows = predictions.of_windows(predicted.windows, predicted.owners)
    name = "window_auc"
    scores["metrics"][name], draws[name] = measures.window_auc(
      task, windows, config.num_resamples
    )
  return scores, draws


def _predictions(
  videos: TaskSplit, predicted: np.ndarray
) -> measures.Predictions:
  return measures.Predictions(
    videos.video_ids, videos.people, videos.targets, predicted
  )


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that results depend on."""
  names = ("jax", "flax", "optax", "numpy", "scipy")
  return {name: importlib.metadata.version(name) for name in names}
