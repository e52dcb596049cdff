"""A whole evaluation, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import prepared_dataset
from marlin_jax.devices import sharding
from marlin_jax.downstream import labelled, low_data, tasks
from marlin_jax.downstream.tasks import Task
from marlin_jax.eval import (
  configuration,
  measures,
  modes,
  report,
  results_folder,
)
from marlin_jax.records.folders import write_bytes
from marlin_jax.training.configuration import flat
from marlin_jax.weights import formats
from marlin_jax.weights.weights import encoder_sha256

_ROLES = ("train", "val", "test")
# The row of the table that every other one has to beat.
CONSTANT = "constant"


class Cell(NamedTuple):
  """One training and its test."""

  task: Task
  mode: str
  ratio: float
  seed: int

  @property
  def name(self) -> str:
    return f"{self.task.name}-{self.mode}-{self.ratio:g}-{self.seed}"


def evaluate(
  config: ConfigDict, checkpoint: str, data: str, workdir: str
) -> dict[str, Any]:
  """Evaluates a checkpoint.

  Args:
    config: a valid configuration, see configs/eval_far.py.
    checkpoint: weights in any format, a published model's name, or 'random'.
    data: directory of a data set prepared with labels.
    workdir: folder for results; see results_folder.

  Returns:
    What results.json holds.

  Raises:
    UserError: it cannot be done as asked.
  """
  # --- What there is: nothing is computed, and little is read -----------------
  names = {role: config.data[role] for role in _ROLES}
  found = {
    split: prepared_dataset.open_dataset(data, split)
    for split in names.values()
  }
  wanted = tasks.make_tasks(
    configuration.split_names(config.tasks),
    tasks.known_labels(data),
    config.derive,
    data,
  )
  weights = formats.open_encoder(checkpoint, config.random)
  mesh = sharding.make_mesh(**config.mesh)
  _check_batches(config, mesh)
  settings = configuration.identity(config) | {
    "checkpoint": encoder_sha256(weights),
    **{f"data.{role}": found[name].fingerprint for role, name in names.items()},
  }
  folder = results_folder.ResultsFolder(Path(workdir), settings)
  with folder:
    # --- Who and what is in the splits ----------------------------------------
    cache = Path(config.cache or Path(workdir) / "features")
    splits = {
      split: labelled.open_split(
        data, split, cache, all_tracks=config.data.all_tracks
      )
      for split in found
    }
    by_role = {role: splits[name] for role, name in names.items()}
    warnings = labelled.shared(by_role.values())
    parts = {
      task.name: {
        role: tasks.part_of(task, split) for role, split in by_role.items()
      }
      for task in wanted
    }
    print(_plan(weights, data, by_role, wanted, parts, mesh))
    for warning in warnings:
      print(f"WARNING: {warning}", flush=True)

    # --- Train and test -------------------------------------------------------
    ready = modes.Modes(config, weights, mesh, cache)
    cells = []
    for task in wanted:
      cells.append(_constant(task, parts[task.name], config))
      for cell in _cells(config, task):
        cells.append(
          folder.cell(cell.name)
          or _run(cell, parts[task.name], ready, config, folder, settings)
        )

    # --- What came of it, with what earlier calls found -----------------------
    before = folder.results()
    cells = _in_order([*before.get("cells", []), *cells])
    rows = report.summary(cells)
    results = {
      "checkpoint": {
        "source": weights.source,
        "sha256": settings["checkpoint"],
        "architecture": dataclasses.asdict(weights.architecture),
      },
      "data": {
        "path": str(data),
        "splits": {
          role: {
            "name": split.name,
            "videos": len(split),
            "people": len(set(split.people)),
            "sha256": split.dataset.fingerprint,
          }
          for role, split in by_role.items()
        },
        "warnings": warnings,
      },
      "tasks": before.get("tasks", {})
      | {
        task.name: dataclasses.asdict(task)
        | {"split_sha256": labelled.sha256_of(by_role.values(), task.label)}
        for task in wanted
      },
      "config": flat(config),
      "versions": {
        name: importlib.metadata.version(name)
        for name in ("jax", "flax", "optax", "numpy", "scipy")
      },
      "devices": [d.device_kind for d in mesh.devices.flat],
      "summary": rows,
      "cells": cells,
    }
    write_bytes(folder.path / "results.json", results_folder.to_json(results))
    text = report.table(rows)
    write_bytes(folder.path / "results.txt", f"{text}\n".encode())
    print(f"\n{text}\n")
    if config.plots:
      _draw(config, wanted, parts, folder, cells, rows)
    print(f"{folder.path / 'results.json'} holds every number", flush=True)
  return results


# --- What there is ------------------------------------------------------------


def _check_batches(config: ConfigDict, mesh: Mesh) -> None:
  asked = configuration.split_names(config.modes)
  paper = config.protocol == "paper"
  for mode in {"attentive", "finetune"} & set(asked):
    section = "paper" if paper else mode
    sharding.check_batch(
      mesh, config[section].batch_size, f"{section}.batch_size"
    )


def _cells(config: ConfigDict, task: Task) -> list[Cell]:
  deterministic = modes.DETERMINISTIC[config.protocol]
  return [
    Cell(task, mode, ratio, seed)
    for mode in configuration.split_names(config.modes)
    for ratio in configuration.ratios(config)
    for seed in range(
      1 if ratio == 1 and mode in deterministic else config.num_seeds
    )
  ]


def _in_order(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """By task, mode, ratio and seed; of those of one name the last."""
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


# --- One cell -----------------------------------------------------------------


def _run(cell, parts, ready, config, folder, settings) -> dict[str, Any]:
  """Trains, tests and keeps a cell; returns its numbers."""
  task, started_at = cell.task, time.monotonic()
  train = parts["train"]
  kept = low_data.take(
    cell.ratio,
    low_data.strata_of(train.targets),
    [train.split.people[i] for i in train.rows],
    cell.seed,
  )
  train = tasks.Part(train.split, train.rows[kept], train.targets[kept])
  learned = ready.run(
    cell.mode,
    modes.Job(
      task,
      train,
      parts["val"],
      parts["test"],
      cell.seed,
      cell.name,
      folder.checkpoints(cell.name),
      settings | {"cell": cell.name},
    ),
  )
  val = _predictions(parts["val"], learned.val)
  test = _predictions(parts["test"], learned.test)
  cuts = measures.thresholds(task, val, config.protocol)
  result = _described(cell.mode, task, cell.ratio, cell.seed, train) | {
    "name": cell.name,
    "chosen": learned.chosen,
    "val": {
      "auc": measures.defined(
        task.auc(val.targets, val.probabilities, micro=False)
      ),
      "num_videos": len(val.video_ids),
    },
    "test": _measured(task, parts["test"], test, cuts, config),
    "secs": round(time.monotonic() - started_at, 1),
  }
  folder.finish(
    cell.name, task.names, test, _as_labels(task, test.targets), result
  )
  return result


def _constant(task, parts, config) -> dict[str, Any]:
  """What one gets without looking: the shares of the training split."""
  train, test = parts["train"], parts["test"]
  wanted, known = task.encode(train.targets)
  shares = (wanted * known).sum(0) / np.maximum(known.sum(0), 1)
  found = _predictions(test, np.tile(shares, (len(test.rows), 1)))
  cuts = np.full(task.num_outputs, 0.5)
  return _described(CONSTANT, task, 1.0, 0, train) | {
    "name": f"{task.name}-{CONSTANT}",
    "test": _measured(task, test, found, cuts, config),
  }


def _described(mode, task, ratio, seed, train) -> dict[str, Any]:
  people = {train.split.people[i] for i in train.rows}
  return {
    "task": task.name,
    "mode": mode,
    "ratio": ratio,
    "seed": seed,
    "num_train": len(train.rows),
    "num_train_people": len(people),
  }


def _measured(task, part, found, cuts, config) -> dict[str, Any]:
  values = part.split.labels[task.label][part.rows]
  return measures.measure(
    task, found, cuts, task.parts(values), config.num_resamples
  )


def _predictions(part: tasks.Part, probabilities) -> measures.Predictions:
  return measures.Predictions(
    [part.split.video_ids[i] for i in part.rows],
    [part.split.people[i] for i in part.rows],
    part.targets,
    probabilities,
  )


def _as_labels(task: Task, targets: np.ndarray) -> np.ndarray:
  wanted, known = task.encode(targets)
  return np.where(known > 0, wanted, np.nan)


# --- Words and pictures -------------------------------------------------------


def _plan(weights, data, by_role, wanted, parts, mesh) -> str:
  """Tells what is about to happen, before the first long wait."""
  architecture = weights.architecture
  lines = [
    f"encoder  {weights.source}: width {architecture.width}, depth "
    f"{architecture.depth}, {architecture.num_frames} frames",
    f"data     {data}",
  ]
  for role, split in by_role.items():
    lines.append(
      f"  {role:5}  split '{split.name}': videos: {len(split)}, people: "
      f"{len(set(split.people))}"
    )
  for task in wanted:
    sizes = ", ".join(
      f"{role} {len(part.rows)}" for role, part in parts[task.name].items()
    )
    what = "classes" if task.is_class else "labels"
    lines.append(
      f"task     {task.name}: {len(task.names)} {what}; videos: {sizes}"
    )
  kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
  lines.append(f"devices  {mesh.size} x {kinds}")
  return "\n".join(lines)


def _draw(config, wanted, parts, folder, cells, rows) -> None:
  """Pictures of the first seed of each mode on the most data."""
  if not report.has_matplotlib():
    print("no plots: pip install 'marlin-jax[plots]'")
    return
  by_name = {cell["name"]: cell for cell in cells}
  most = configuration.ratios(config)[-1]
  for task, mode in itertools.product(
    wanted, configuration.split_names(config.modes)
  ):
    name = Cell(task, mode, most, 0).name
    report.plot_cell(
      folder.path / "plots",
      by_name[name],
      task.names,
      _as_labels(task, parts[task.name]["test"].targets),
      folder.probabilities(name),
    )
  report.plot_ratios(folder.path / "plots", rows)
