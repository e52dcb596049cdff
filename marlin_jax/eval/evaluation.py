"""Evaluation of an encoder: tasks, modes, shares of the data and seeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from marlin_jax.devices import distributed, sharding
from marlin_jax.eval import configuration, modes, report
from marlin_jax.eval.cells import (
  Cell,
  run_cells,
  versions,
)
from marlin_jax.eval.inputs import Inputs, Videos, open_inputs, open_videos
from marlin_jax.eval.results_folder import ResultsFolder
from marlin_jax.records.cli import Row, format_rows
from marlin_jax.records.folders import check_local
from marlin_jax.training.configuration import flat


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
    run_cells(inputs, videos, runner, config, folder)
    if not folder.writes:
      return {}

    # --- Results, with those of earlier calls ---------------------------------
    results = results_of(inputs, videos, config, folder)
    table = report.table(results["summary"])
    folder.write_results(results, table)
    print(f"\n{table}\n")
    if config.plots:
      _plot(inputs, videos, config, results, folder)
    print(f"{folder.path / 'results.json'} holds all scores", flush=True)
  return results


# --- Inputs -------------------------------------------------------------------


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


# --- Results ------------------------------------------------------------------


def results_of(
  inputs: Inputs,
  videos: Videos,
  config: ConfigDict,
  folder: ResultsFolder,
) -> dict[str, Any]:
  """Returns the content of results.json.

  Args:
    inputs, videos, config: inputs of this call.
    folder: workdir, with the finished cells of all calls.
  """
  cells = _sorted(folder.cells().values())
  abouts = [(cell["task"], cell.pop("about", None)) for cell in cells]
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
    "tasks": {task: about for task, about in abouts if about},
    "config": flat(config),
    "versions": versions(),
    "devices": [d.device_kind for d in inputs.mesh.devices.flat],
    "summary": report.summary(cells, folder.draws),
    "cells": cells,
  }


def _sorted(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Sorts by task, mode, ratio and seed; leaves those of folds out."""
  mode_names = (configuration.CONSTANT, *configuration.MODES)
  return sorted(
    (cell for cell in cells if not cell.get("fold")),
    key=lambda cell: (
      cell["task"],
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
  for task, mode in itertools.product(
    inputs.tasks, configuration.split_names(config.modes)
  ):
    name = Cell(task, mode, ratio, 0).name
    targets = np.concatenate(
      [fold["test"].targets for fold in videos.folds[task.name].values()]
    )
    report.plot_cell(
      plots,
      cells[name],
      task,
      task.as_labels(targets),
      folder.predicted(name),
    )
  report.plot_ratios(plots, results["summary"])
