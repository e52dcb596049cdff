"""Summary table and plots of an evaluation."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marlin_jax.downstream.measures import finite_or_none
from marlin_jax.downstream.tasks import Task
from marlin_jax.scores import ranking
from marlin_jax.scores.bootstrap import interval

# Columns of the table, if the task has the score; and those of a rating.
_COLUMNS = (
  "accuracy",
  "auc_micro",
  "auc",
  "window_auc",
  "balanced_accuracy",
  "f1_weighted",
  "average_precision",
  "eer",
  "ccc",
  "pearson",
  "spearman",
  "mae",
  "rmse",
)
_RATING_COLUMNS = ("accuracy_", "f1_weighted_2")
_MAX_CURVES = 12


def summary(
  cells: Sequence[dict[str, Any]],
  draws_of: Callable[[str], Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
  """Summarises the seeds of each task, mode and ratio.

  Args:
    cells: scores of all cells.
    draws_of: returns the bootstrap draws of a cell by metric.

  Returns:
    Dicts of `task`, `mode`, `ratio`, `num_seeds`, `num_train` (the minimum),
    `metrics`: {name: {mean, std, low, high}}; `tests`: {name: metrics} of other
    data sets; `parts`: {name: metrics} of parts of the videos; of folds, whose
    predictions are pooled in `metrics`, the `folds`: {name: {num_train,
    metrics, parts}}, and `mean_of_folds`: metrics whose `std` is over the
    folds. `std` is that of the sample, None for one seed; `low` and
    `high` are the bootstrap interval of the mean over the seeds, which are
    tested on the same people.
  """
  rows = []
  keys = ("task", "mode", "ratio")
  for key, group in itertools.groupby(
    cells, lambda cell: tuple(cell[k] for k in keys)
  ):
    group = list(group)
    draws = [draws_of(cell["name"]) for cell in group]
    rows.append(
      dict(zip(keys, key, strict=True))
      | {
        "num_seeds": len(group),
        "num_train": min(cell["num_train"] for cell in group),
        "metrics": _metrics([cell["test"] for cell in group], draws),
        "tests": {
          test: _metrics(
            [cell["tests"][test] for cell in group], draws, f"{test} "
          )
          for test in group[0].get("tests", {})
        },
        "parts": _parts([cell["test"] for cell in group]),
      }
      | _folds([cell["folds"] for cell in group if "folds" in cell])
    )
  return rows


def _parts(scores: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Summarises the scores of each part over seeds."""
  return {
    part: _metrics([{"metrics": score["parts"][part]} for score in scores], [])
    for part in scores[0]["parts"]
    if all(part in score["parts"] for score in scores)
  }


def _folds(cells: list[list[dict[str, Any]]]) -> dict[str, Any]:
  """Summarises each fold over seeds, and the folds.

  Args:
    cells: scores of each fold, for each seed.
  """
  if not cells:
    return {}
  folds = {}
  by_name = [{cell["fold"]: cell for cell in seed} for seed in cells]
  for name in by_name[0]:
    group = [seed[name] for seed in by_name if name in seed]
    scores = [cell["test"] for cell in group]
    folds[name] = {
      "num_train": min(cell["num_train"] for cell in group),
      "metrics": _metrics(scores, []),
      "parts": _parts(scores),
    }
  metrics = [fold["metrics"] for fold in folds.values()]
  mean = {}
  for name in metrics[0]:
    # None where a fold, such as a single video, does not define the metric.
    mean[name] = _summarised(
      [{"value": m[name]["mean"], "low": None, "high": None} for m in metrics],
      [],
    )
  return {"folds": folds, "mean_of_folds": mean}


def _metrics(
  scores: list[dict[str, Any]],
  draws: list[Mapping[str, np.ndarray]],
  prefix: str = "",
) -> dict[str, dict[str, float | None]]:
  """Summarises each metric over seeds; `prefix` begins the names of draws."""
  return {
    name: _summarised(
      [score["metrics"][name] for score in scores],
      [values[prefix + name] for values in draws if prefix + name in values],
    )
    for name in scores[0]["metrics"]
    if all(name in score["metrics"] for score in scores)
  }


def _summarised(
  numbers: list[dict[str, float | None]], draws: list[np.ndarray]
) -> dict[str, float | None]:
  low, high = numbers[0]["low"], numbers[0]["high"]
  if len(numbers) != 1:
    low = high = None
    if draws and len(draws) == len(numbers):
      low, high = map(finite_or_none, interval(np.mean(draws, axis=0)))
  values = [n["value"] for n in numbers if n["value"] is not None]
  return {
    "mean": statistics.fmean(values) if values else None,
    "std": statistics.stdev(values) if len(values) > 1 else None,
    "low": low,
    "high": high,
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats a summary: mean, deviation over the seeds, and interval."""
  lines = []
  for task, group in itertools.groupby(rows, lambda row: row["task"]):
    group = list(group)
    names = [n for n in _COLUMNS if any(n in row["metrics"] for row in group)]
    names += [n for n in group[0]["metrics"] if n.startswith(_RATING_COLUMNS)]
    lines += _table(
      task,
      names,
      [(row, "", row["num_train"], row["metrics"]) for row in group],
    )
    for test in dict.fromkeys(t for row in group for t in row["tests"]):
      lines += _table(
        f"{task}, tested on {test}",
        names,
        [
          (row, "", row["num_train"], row["tests"][test])
          for row in group
          if test in row["tests"]
        ],
      )
    lines += _table(f"{task}, by fold", names, list(_fold_lines(group)))
    lines += _table_of_parts(task, group)
  return "\n".join(lines).lstrip("\n")


def _fold_lines(group: list[dict[str, Any]]) -> Iterator[tuple]:
  for row in group:
    for name, fold in row.get("folds", {}).items():
      yield row, name, fold["num_train"], fold["metrics"]
    if "folds" in row:
      yield row, "mean", row["num_train"], row["mean_of_folds"]


def _table(title: str, names: list[str], lines: list[tuple]) -> list[str]:
  """Formats lines of (row, fold, number of training videos, metrics)."""
  if not lines:
    return []
  has_folds = any(fold for _, fold, _, _ in lines)
  cells = [["mode", "data", *["fold"] * has_folds, "videos", *names]]
  for row, fold, num_train, metrics in lines:
    cells.append(
      [row["mode"], f"{row['ratio']:.4g}", *[fold] * has_folds, str(num_train)]
      + [formatted(metrics[n]) if n in metrics else "-" for n in names]
    )
  return [f"\n{title}", *_aligned(cells)]


def _table_of_parts(task: str, group: list[dict[str, Any]]) -> list[str]:
  """Formats the main metric of each part, such as each manipulation."""
  lines = []
  for row in group:
    for fold, parts in (
      ("", row["parts"]),
      *((name, fold["parts"]) for name, fold in row.get("folds", {}).items()),
    ):
      if parts:
        lines.append((row, fold, parts))
  names = list(dict.fromkeys(name for _, _, parts in lines for name in parts))
  if len(names) < 2:
    return []
  metric = main_metric(group[0]["metrics"])
  has_folds = any(fold for _, fold, _ in lines)
  cells = [["mode", "data", *["fold"] * has_folds, *names]]
  for row, fold, parts in lines:
    cells.append(
      [row["mode"], f"{row['ratio']:.4g}", *[fold] * has_folds]
      + [formatted(parts[n][metric]) if n in parts else "-" for n in names]
    )
  return [f"\n{task}, {metric} of each part", *_aligned(cells)]


def _aligned(cells: list[list[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    "  "
    + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in cells
  ]


def main_metric(metrics: Mapping[str, Any]) -> str:
  """Returns the metric by which models are selected: 'auc', or 'ccc'."""
  return "auc" if "auc" in metrics else "ccc"


def formatted(number: dict[str, float | None]) -> str:
  """Formats a metric of a summary: mean, deviation and interval."""
  if number["mean"] is None:
    return "-"
  text = f"{number['mean']:.4f}"
  if number["std"] is not None:
    text += f" +- {number['std']:.4f}"
  if number["low"] is not None:
    text += f" [{number['low']:.3f}, {number['high']:.3f}]"
  return text


# --- Plots --------------------------------------------------------------------


def has_matplotlib() -> bool:
  import importlib.util

  return importlib.util.find_spec("matplotlib") is not None


def plot_cell(
  folder: Path,
  cell: dict[str, Any],
  task: Task,
  targets: np.ndarray,
  predicted: np.ndarray,
) -> None:
  """Plots ROC curves, the AUC per class and, for classes, the confusion.

  Of numbers, plots the predicted against the true ones.

  Args:
    folder: folder for the PNG files; created if missing.
    cell: scores of the cell.
    task: task of the cell.
    targets: (V, K), one-hot for classes.
    predicted: (V, K), probabilities or numbers.
  """
  folder.mkdir(exist_ok=True)
  names = task.names
  if task.is_value:
    _scatter(folder, cell, targets, predicted)
    return
  _roc(folder, cell, names, targets, predicted)
  if len(names) > 1:
    _bars(folder, cell)
  if "confusion" in cell["test"]:
    _confusion(folder, cell, names)


def _roc(folder, cell, names, targets, probabilities):
  figure, axes = _axes(5, 5)
  axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
  micro = ranking.roc_curve(targets.ravel(), probabilities.ravel())
  if len(names) > 1:
    axes.plot(*micro, color="black", label="all pooled")
  for k, row in enumerate(cell["test"]["per_class"][:_MAX_CURVES]):
    if row["auc"] is not None:
      curve = ranking.roc_curve(targets[:, k], probabilities[:, k])
      axes.plot(*curve, linewidth=1, label=f"{row['name']} {row['auc']:.3f}")
  axes.set(xlabel="false positive rate", ylabel="true positive rate")
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize=7, loc="lower right")
  _save(figure, folder / f"{cell['name']}-roc.png", cell)


def _scatter(folder, cell, targets, predicted):
  figure, axes = _axes(5, 5)
  for k, row in enumerate(cell["test"]["per_class"][:_MAX_CURVES]):
    label = row["name"]
    if row["ccc"] is not None:
      label += f" CCC {row['ccc']:.3f}"
    axes.scatter(targets[:, k], predicted[:, k], s=4, label=label)
  low, high = np.nanmin(targets), np.nanmax(targets)
  axes.plot([low, high], [low, high], color="0.8", linewidth=1)
  axes.set(xlabel="true", ylabel="predicted")
  axes.legend(fontsize=7, loc="lower right")
  _save(figure, folder / f"{cell['name']}-scatter.png", cell)


def _bars(folder, cell):
  rows = cell["test"]["per_class"]
  figure, axes = _axes(6, 1 + 0.18 * len(rows))
  axes.barh(
    [f"{row['name']} ({row['positives']:.0f})" for row in rows],
    [row["auc"] or 0.0 for row in rows],
  )
  axes.axvline(0.5, color="0.5", linewidth=1)
  axes.invert_yaxis()
  axes.tick_params(axis="y", labelsize=7)
  axes.set(xlabel="AUC (videos with the label in brackets)", xlim=(0, 1))
  _save(figure, folder / f"{cell['name']}-classes.png", cell)


def _confusion(folder, cell, names):
  matrix = np.array(cell["test"]["confusion"])
  size = 2 + 0.5 * len(names)
  figure, axes = _axes(size, size)
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
  for (i, j), value in np.ndenumerate(matrix):
    colour = "white" if shares[i, j] > 0.5 else "black"
    axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour)
  axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel="predicted", ylabel="true")
  _save(figure, folder / f"{cell['name']}-confusion.png", cell)


def plot_ratios(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
  """Plots AUC or CCC over the share of the data, of tasks with several."""
  folder.mkdir(exist_ok=True)
  for task, group in itertools.groupby(rows, lambda row: row["task"]):
    group = list(group)
    metric = main_metric(group[0]["metrics"])
    task_rows = [
      row for row in group if row["metrics"][metric]["mean"] is not None
    ]
    if len({row["ratio"] for row in task_rows}) < 2:
      continue
    figure, axes = _axes(5, 4)
    for mode in dict.fromkeys(row["mode"] for row in task_rows):
      line = [row for row in task_rows if row["mode"] == mode]
      axes.errorbar(
        [row["ratio"] for row in line],
        [row["metrics"][metric]["mean"] for row in line],
        [row["metrics"][metric]["std"] or 0.0 for row in line],
        marker="o",
        capsize=3,
        label=mode,
      )
    axes.set(
      xscale="log", xlabel="share of the training data", ylabel=metric.upper()
    )
    axes.legend()
    _save(figure, folder / f"{task}-ratios.png", {"name": task})


def _axes(width: float, height: float):
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure, path: Path, cell: dict[str, Any]) -> None:
  from matplotlib import pyplot

  figure.suptitle(cell["name"], fontsize=8)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
