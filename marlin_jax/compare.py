"""Compares evaluations of several checkpoints on the same videos.

  python -m marlin_jax.compare runs/far_a runs/far_b --output compare.html

Prints a table with a column for each workdir: the metric with its 95% interval,
and the difference to the first column. Differences have intervals of paired
draws of the same people, so that a small difference between two encoders is
seen although each number by itself varies more; '*' marks one whose interval
does not hold 0. --output also writes the table as a self-contained HTML page.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from marlin_jax.records import cli
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  import numpy as np


class CompareError(UserError):
  """A workdir holds no results, or results of other videos."""


class Evaluation(NamedTuple):
  """Results of a workdir.

  Attributes:
    name: name of its column.
    path: the workdir.
    results: content of results.json.
  """

  name: str
  path: Path
  results: dict[str, Any]


class Row(NamedTuple):
  """One line of a table.

  Attributes:
    task, mode, ratio: what was evaluated.
    cells: for each evaluation its number with interval and, but for the first,
      the difference to the first; '-' where it lacks this mode.
  """

  task: str
  mode: str
  ratio: float
  cells: list[str]


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 1 for an error."""
  args = _parser().parse_args(argv)
  return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
  from marlin_jax.records.folders import write_bytes

  evaluations = [_open(path) for path in args.results]
  _check_same_videos(evaluations)
  rows = _rows(evaluations, args.metric)
  if not rows:
    names = sorted(
      {
        name
        for evaluation in evaluations
        for row in evaluation.results["summary"]
        for name in row["metrics"]
      }
    )
    raise CompareError(
      f"no task has the metric '{args.metric}', expected one of "
      f"{', '.join(names)}"
    )
  print(_text(evaluations, rows, args.metric))
  if args.output:
    page = _page(evaluations, rows, args.metric)
    write_bytes(args.output, page.encode())
    print(f"\n{args.output} holds the tables as a page")


def _open(path: Path) -> Evaluation:
  if path.is_dir():
    path = path / "results.json"
  try:
    results = json.loads(path.read_text())
    results["summary"], results["tasks"]
  except OSError as e:
    raise CompareError(
      f"{path}: {e.strerror}; expected the workdir of an evaluation"
    ) from e
  except (ValueError, KeyError, TypeError) as e:
    raise CompareError(f"{path} is no results.json of an evaluation") from e
  return Evaluation(path.parent.name, path.parent, results)


def _check_same_videos(evaluations: list[Evaluation]) -> None:
  first, *others = evaluations
  for other in others:
    for task, facts in other.results["tasks"].items():
      expected = first.results["tasks"].get(task, facts)
      if facts["split_sha256"] != expected["split_sha256"]:
        raise CompareError(
          f"{first.path} and {other.path} differ in the videos or labels of "
          f"task '{task}', so their numbers do not compare"
        )


def _rows(evaluations: list[Evaluation], metric: str) -> list[Row]:
  keys = dict.fromkeys(
    (row["task"], row["mode"], row["ratio"])
    for evaluation in evaluations
    for row in evaluation.results["summary"]
    if metric in row["metrics"]
  )
  return [
    Row(
      *key,
      [
        _cell(evaluation, key, metric, None if i == 0 else evaluations[0])
        for i, evaluation in enumerate(evaluations)
      ],
    )
    for key in keys
  ]


def _cell(
  evaluation: Evaluation,
  key: tuple[str, str, float],
  metric: str,
  first: Evaluation | None,
) -> str:
  from marlin_jax.eval import report
  from marlin_jax.scores import bootstrap

  row = _row_of(evaluation, key)
  if row is None or metric not in row["metrics"]:
    return "-"
  text = report.formatted(row["metrics"][metric])
  if first is None:
    return text
  draws = [_mean_draws(e, key, metric) for e in (evaluation, first)]
  if any(values is None for values in draws):
    return text
  theirs = _row_of(first, key)["metrics"][metric]["mean"]
  difference = row["metrics"][metric]["mean"] - theirs
  low, high = bootstrap.interval(draws[0] - draws[1])
  mark = "*" if low > 0 or high < 0 else ""
  return f"{text} ({difference:+.4f} [{low:+.3f}, {high:+.3f}]{mark})"


def _row_of(
  evaluation: Evaluation, key: tuple[str, str, float]
) -> dict[str, Any] | None:
  for row in evaluation.results["summary"]:
    if (row["task"], row["mode"], row["ratio"]) == key:
      return row
  return None


def _mean_draws(
  evaluation: Evaluation, key: tuple[str, str, float], metric: str
) -> np.ndarray | None:
  """Returns the draws of the mean over seeds, (R,); None if there are none."""
  import numpy as np

  from marlin_jax.eval import results_folder

  draws = [
    results_folder.read_draws(evaluation.path, cell["name"]).get(metric)
    for cell in evaluation.results["cells"]
    if (cell["task"], cell["mode"], cell["ratio"]) == key
  ]
  if not draws or any(values is None for values in draws):
    return None
  return np.mean(draws, axis=0)


# --- Output -------------------------------------------------------------------


def _text(evaluations: list[Evaluation], rows: list[Row], metric: str) -> str:
  header = ["task", "mode", "data", *(e.name for e in evaluations)]
  table = [header] + [
    [row.task, row.mode, f"{row.ratio:.4g}", *row.cells] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = [
    "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
    for line in table
  ]
  return "\n".join([metric, *lines])


def _page(evaluations: list[Evaluation], rows: list[Row], metric: str) -> str:
  def cells(tag: str, values: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

  checkpoints = "".join(
    f"<li>{html.escape(e.name)}: "
    f"{html.escape(str(e.results['checkpoint']['source']))}, "
    f"sha256 {html.escape(e.results['checkpoint']['sha256'][:12])}</li>"
    for e in evaluations
  )
  header = cells("th", ["task", "mode", "data", *(e.name for e in evaluations)])
  body = "".join(
    "<tr>"
    + cells("td", [row.task, row.mode, f"{row.ratio:.4g}", *row.cells])
    + "</tr>"
    for row in rows
  )
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of encoders</title>
<style>
  body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem; }}
  div {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; }}
  th, td {{ padding: .3rem .8rem; text-align: left; white-space: nowrap; }}
  tr {{ border-bottom: 1px solid #ddd; }}
</style></head><body>
<h1>Comparison of encoders</h1>
<p>Metric: {html.escape(metric)}, with 95% intervals over people. In brackets
the difference to the first column, from paired draws; * where its interval does
not hold 0.</p>
<div><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>
<ul>{checkpoints}</ul>
</body></html>
"""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m marlin_jax.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,  # a misspelled flag is an error
  )
  add = parser.add_argument
  add(
    "results",
    nargs="+",
    metavar="WORKDIR",
    type=Path,
    help="workdir of an evaluation, or its results.json",
  )
  add(
    "--metric",
    default="auc",
    help="metric of results.json (default: %(default)s)",
  )
  add("--output", type=Path, help="HTML page to write")
  return parser


if __name__ == "__main__":
  sys.exit(main())
