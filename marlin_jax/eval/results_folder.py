"""The workdir of an evaluation: finished cells are kept and not run again.

  settings.json          values that all results share
  results.json           scores of all calls, with hashes, and the configuration
                         of the last call
  results.txt            the table
  predictions/CELL.csv   true labels and predictions of each test video; of the
                         validation split in CELL-val.csv
  models/CELL/           the trained model, for marlin_jax.predict
  plots/                 PNG files
  cells/CELL.json, .npz  scores, predictions and bootstrap draws of a finished
                         cell: a task, a mode, a share of the data and a seed
  cells/CELL/            checkpoints of an unfinished cell
  features/              see `downstream.feature_cache`

Axes: V videos, K labels, classes or numbers.
"""

from __future__ import annotations

import csv
import io
import itertools
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
    self._num_asked = itertools.count()
    if not self.writes:
      return
    self._lock = Lock(path, "lock")
    try:
      self._check_settings(settings)
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

  def results(self) -> dict[str, Any]:
    """Returns the content of results.json; {} before the first call ends."""
    file = self.path / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}

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
    for file in sorted((self.path / "cells").glob("*.json")):
      cell = json.loads(file.read_text())
      expected = definitions.get(cell["task"])
      if expected and cell.get("definition", expected) != expected:
        raise OutputFolderError(
          f"{file} was computed with another definition of its task, or with "
          "other videos or labels. Change them back, or use another --workdir"
        )

  def cell(self, name: str) -> dict[str, Any] | None:
    """Returns the scores of a cell; None if it is not finished.

    All processes call it together, since they run the unfinished cells.
    """
    text = "null"
    file = self.path / "cells" / f"{name}.json"
    if self.writes and file.exists():
      text = file.read_text()
    key = f"marlin_jax/cell/{next(self._num_asked)}"
    return json.loads(coordination.broadcast(key, text))

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

  def write_cell(
    self,
    name: str,
    task: Task,
    test: Predictions,
    val: Predictions | None,
    result: dict[str, Any],
    draws: Mapping[str, np.ndarray],
  ) -> None:
    """Writes a finished cell and removes its checkpoints.

    Args:
      name: name of the cell.
      task: task of the cell.
      test: predictions on the test split.
      val: predictions on the validation split, to calibrate or to join models
        by; None for several folds as one.
      result: scores of the cell.
      draws: bootstrap draws of each metric, (R,).
    """
    cells = self.path / "cells"
    cells.mkdir(exist_ok=True)
    data = io.BytesIO()
    np.savez(
      data,
      probabilities=test.predicted,
      **{f"{_DRAWS}{name}": values for name, values in draws.items()},
    )
    write_bytes(cells / f"{name}.npz", data.getvalue())
    self._write_csv(name, task, test)
    if val is not None:
      self._write_csv(f"{name}-val", task, val)
    write_bytes(cells / f"{name}.json", to_json(result))
    shutil.rmtree(self.checkpoints(name), ignore_errors=True)

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
