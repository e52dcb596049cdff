"""The workdir of an evaluation: finished cells are kept and not run again.

  settings.json          values that all results share
  results.json           scores of all finished cells, with hashes, and the
                         configuration of the last call
  results.txt            the table
  predictions/CELL.csv   true labels and predictions of each test video; of the
                         validation split in CELL-val.csv
  models/CELL/           the trained model, for marlin_jax.predict
  plots/                 PNG files
  cells/CELL.json, .npz  scores, predictions and bootstrap draws of a finished
                         cell: a task, a mode, a share of the data and a seed;
                         results.json and results.txt are made of these
  cells/CELL/            checkpoints of an unfinished cell
  features/              see `downstream.feature_cache`

Axes: V videos, K labels, classes or numbers.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from marlin_jax.devices import coordination
from marlin_jax.downstream.measures import Predictions
from marlin_jax.downstream.tasks import Task
from marlin_jax.eval import configuration
from marlin_jax.records.folders import (
  SETTINGS,
  Lock,
  OutputFolderError,
  write_bytes,
)

_DRAWS = "draws:"


class ResultsFolder:
  """Workdir that is locked until the context manager exits.

  Of several processes the first one locks and writes.

  Attributes:
    path: the folder.
    writes: True on process 0.
  """

  def __init__(self, path: Path, settings: dict[str, Any]):
    """Opens the folder.

    Args:
      path: created if missing.
      settings: values by name, ready for JSON; an existing folder must have the
        same.

    Raises:
      OutputFolderError: the folder is in use, has other settings, or holds
        something else.
    """
    self.path = path
    self.writes = jax.process_index() == 0
    if not self.writes:
      return
    self._lock = Lock(path, "lock")
    try:
      self._check_settings(settings)
      (path / "cells").mkdir(exist_ok=True)
      self._keep_baselines()
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if self.writes:
      self._lock.close()

  def _check_settings(self, settings: dict[str, Any]) -> None:
    file = self.path / SETTINGS
    if not file.exists():
      names = {entry.name for entry in self.path.iterdir()}
      if foreign := sorted(
        name
        for name in names - {"lock"}
        if not name.startswith(f"{SETTINGS}.")  # half-written
      ):
        raise OutputFolderError(
          f"{self.path} holds files, such as {foreign[0]!r}, but no "
          f"{SETTINGS}, so it is not of an evaluation; choose an empty or new "
          "--workdir"
        )
      write_bytes(file, to_json(settings))
      return
    earlier = self.settings()
    # Further tasks may be derived, and others left out.
    free = _derived(earlier) ^ _derived(settings)
    differences = [
      f"  {key}: was {earlier.get(key)!r}, is {settings.get(key)!r}"
      for key in sorted({*earlier, *settings})
      if earlier.get(key) != settings.get(key) and not _derived([key]) & free
    ]
    if differences:
      raise OutputFolderError(
        f"{self.path} holds results computed with other settings:\n"
        + "\n".join(differences)
        + "\nChange them back, or use another --workdir"
      )

  def settings(self) -> dict[str, Any]:
    """Returns the settings of the first call."""
    return json.loads((self.path / SETTINGS).read_text())

  def _keep_baselines(self) -> None:
    """Writes the baselines that earlier versions had in results.json alone."""
    results = {"cells": []}
    # A damaged one is made anew, of the cells.
    with contextlib.suppress(FileNotFoundError, ValueError):
      results = json.loads((self.path / "results.json").read_text())
    for cell in results["cells"]:
      is_baseline = cell["mode"] == configuration.CONSTANT
      if is_baseline and not self._file(cell["name"]).exists():
        self.write_cell(cell | {"about": results["tasks"].get(cell["task"])})

  def write_results(self, results: dict[str, Any], table: str) -> None:
    """Writes results.json and results.txt."""
    write_bytes(self.path / "results.json", to_json(results))
    write_bytes(self.path / "results.txt", f"{table}\n".encode())

  # --- Cells ------------------------------------------------------------------

  def check_definitions(self, definitions: Mapping[str, str]) -> None:
    """Checks that all finished cells of tasks have the present definitions.

    Those of modes that are not asked for now are in the table too.

    Args:
      definitions: hash of the task, its videos and their labels, by task.

    Raises:
      OutputFolderError: they were others when a cell was computed.
    """
    if not self.writes:
      return
    for name, cell in self.cells().items():
      expected = definitions.get(cell["task"])
      if expected and cell.get("definition", expected) != expected:
        raise OutputFolderError(
          f"{self.path}/cells/{name}.json was computed with another definition "
          "of its task, or with other videos or labels. Change them back, or "
          "use another --workdir"
        )

  def finished(self) -> set[str]:
    """Returns the names of the finished cells; all processes call it."""
    names = list(self.cells()) if self.writes else []
    key = "marlin_jax/finished_cells"
    return set(json.loads(coordination.broadcast(key, json.dumps(names))))

  def cells(self) -> dict[str, dict[str, Any]]:
    """Returns the scores of the finished cells by name, those of folds too."""
    files = sorted((self.path / "cells").glob("*.json"))
    return {file.stem: self.cell(file.stem) for file in files}

  def cell(self, name: str) -> dict[str, Any] | None:
    """Returns the scores of a cell; None if it is not finished."""
    file = self._file(name)
    return json.loads(file.read_text()) if file.exists() else None

  def _file(self, name: str) -> Path:
    return self.path / "cells" / f"{name}.json"

  def predicted(self, name: str) -> np.ndarray:
    """Returns a finished cell's float64 (V, K) on the test split."""
    with np.load(self.path / "cells" / f"{name}.npz") as arrays:
      return arrays["probabilities"]

  def draws(self, name: str) -> dict[str, np.ndarray]:
    """Returns the bootstrap draws of a cell by metric; {} if it has none."""
    return read_draws(self.path, name)

  def checkpoints(self, name: str) -> Path:
    """Returns the folder for the checkpoints of an unfinished cell."""
    return self.path / "cells" / name

  def model(self, name: str) -> Path:
    """Returns the folder for the trained model of a cell."""
    return self.path / "models" / name

  def write_predictions(
    self,
    name: str,
    task: Task,
    test: Predictions,
    val: Predictions | None,
    draws: Mapping[str, np.ndarray],
  ) -> None:
    """Writes the predictions of a cell, before the cell itself.

    Args:
      name: name of the cell.
      task: task of the cell.
      test: predictions on the test split.
      val: predictions on the validation split, to calibrate or to join models
        by; None for several folds as one.
      draws: bootstrap draws of each metric, (R,).
    """
    data = io.BytesIO()
    np.savez(
      data,
      probabilities=test.predicted,
      **{f"{_DRAWS}{name}": values for name, values in draws.items()},
    )
    write_bytes(self.path / "cells" / f"{name}.npz", data.getvalue())
    self._write_csv(name, task, test)
    if val is not None:
      self._write_csv(f"{name}-val", task, val)

  def write_cell(self, result: dict[str, Any]) -> None:
    """Writes the scores of a finished cell and removes its checkpoints."""
    write_bytes(self._file(result["name"]), to_json(result))
    shutil.rmtree(self.checkpoints(result["name"]), ignore_errors=True)

  def _write_csv(self, name, task, predictions) -> None:
    folder = self.path / "predictions"
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("true", "predicted" if task.is_value else "p")
    header = [f"{kind}:{column}" for column in task.names for kind in kinds]
    writer.writerow(["video_id", "person", *header])
    for video_id, person, true, p in zip(
      predictions.video_ids,
      predictions.people,
      task.as_labels(predictions.targets),
      predictions.predicted,
      strict=True,
    ):
      values = [
        value
        for t, q in zip(true, p, strict=True)
        for value in ("" if np.isnan(t) else f"{t:g}", f"{q:.6g}")
      ]
      writer.writerow([video_id, person, *values])
    write_bytes(folder / f"{name}.csv", text.getvalue().encode())


def _derived(keys: Iterable[str]) -> set[str]:
  """Returns the tasks whose rules are among the keys of settings."""
  start = configuration.DERIVE
  return {
    key.removeprefix(start).partition(".")[0]
    for key in keys
    if key.startswith(start)
  }


def read_draws(workdir: Path, name: str) -> dict[str, np.ndarray]:
  """Returns the bootstrap draws, (R,), of a cell by metric.

  Empty for the constant baseline, and for cells of workdirs from before draws
  were kept.
  """
  file = workdir / "cells" / f"{name}.npz"
  if not file.exists():
    return {}
  with np.load(file) as arrays:
    return {
      key.removeprefix(_DRAWS): arrays[key]
      for key in arrays
      if key.startswith(_DRAWS)
    }


def to_json(tree: Any) -> bytes:
  """Encodes a tree as JSON, which has no NaN."""
  return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()
