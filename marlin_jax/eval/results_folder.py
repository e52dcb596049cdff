"""The folder of an evaluation: what is done stays, and is not done again.

  settings.json          what all results depend on
  results.json           every number of all calls, with hashes, and the
                         configuration of the last
  results.txt            the table
  predictions/CELL.csv   per video: what is true, and the probabilities
  plots/                 PNG
  cells/CELL.json, .npz  what is finished; a cell is a task, a mode, a part of
                         the data and a seed
  cells/CELL/            checkpoints of a cell that is not
  features/              see feature_cache

Axes: V videos, K labels or classes.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from marlin_jax.eval.measures import Predictions
from marlin_jax.records.folders import Lock, OutputFolderError, write_bytes

_SETTINGS = "settings.json"


class ResultsFolder:
  """A workdir, locked while this object is open; a context manager."""

  def __init__(self, path: Path, settings: dict[str, Any]):
    """Compares with what is there.

    Args:
      path: made where it is missing.
      settings: flat, of what survives JSON; those of an existing folder must
        be equal.

    Raises:
      OutputFolderError: the folder is in use, or was made with other settings.
    """
    self.path = path
    self._lock = Lock(path, "lock")
    try:
      self._agree(settings)
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._lock.close()

  def _agree(self, settings: dict[str, Any]) -> None:
    file = self.path / _SETTINGS
    if not file.exists():
      write_bytes(file, to_json(settings))
      return
    found = json.loads(file.read_text())
    differ = [
      f"  {key}: was {found.get(key)!r}, is {settings.get(key)!r}"
      for key in sorted({*found, *settings})
      if found.get(key) != settings.get(key)
    ]
    if differ:
      raise OutputFolderError(
        f"{self.path} holds results of other settings:\n"
        + "\n".join(differ)
        + "\nSet them back, or choose another --workdir"
      )

  def results(self) -> dict[str, Any]:
    """What results.json holds; {} where no call has come to its end."""
    file = self.path / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}

  # --- Cells ------------------------------------------------------------------

  def cell(self, name: str) -> dict[str, Any] | None:
    """The numbers of a cell; None where it is not finished."""
    file = self.path / "cells" / f"{name}.json"
    if not file.exists():
      return None
    return json.loads(file.read_text())

  def probabilities(self, name: str) -> np.ndarray:
    """Of a finished cell, float64 (V, K), on the test split."""
    with np.load(self.path / "cells" / f"{name}.npz") as arrays:
      return arrays["probabilities"]

  def checkpoints(self, name: str) -> Path:
    """Where a cell that takes long saves what it has."""
    return self.path / "cells" / name

  def finish(
    self,
    name: str,
    columns: Sequence[str],
    found: Predictions,
    targets: np.ndarray,
    result: dict[str, Any],
  ) -> None:
    """Keeps a cell.

    Args:
      name: of the cell.
      columns: names of the K labels or classes.
      found: on the test split.
      targets: (V, K), as one_hot where they are classes.
      result: its numbers.
    """
    cells = self.path / "cells"
    cells.mkdir(exist_ok=True)
    data = io.BytesIO()
    np.savez(data, probabilities=found.probabilities)
    write_bytes(cells / f"{name}.npz", data.getvalue())
    self._write_csv(name, columns, found, targets)
    write_bytes(cells / f"{name}.json", to_json(result))
    shutil.rmtree(self.checkpoints(name), ignore_errors=True)

  def _write_csv(self, name, columns, found, targets) -> None:
    folder = self.path / "predictions"
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [f"{kind}:{c}" for c in columns for kind in ("true", "p")]
    writer.writerow(["video_id", "person", *header])
    for video_id, person, true, p in zip(
      found.video_ids, found.people, targets, found.probabilities, strict=True
    ):
      cells = [
        text
        for t, q in zip(true, p, strict=True)
        for text in ("" if np.isnan(t) else f"{t:g}", f"{q:.6g}")
      ]
      writer.writerow([video_id, person, *cells])
    write_bytes(folder / f"{name}.csv", text.getvalue().encode())


def to_json(tree: Any) -> bytes:
  return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()
