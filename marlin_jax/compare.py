"""Compares evaluations of several checkpoints on the same videos.

  python -m marlin_jax.compare runs/far_a runs/far_b --output compare.html

Prints a table with a column for each workdir: the metric with its 95% interval,
and the difference from the first column, on the test split and on other data
sets that were scored. Intervals of differences come from paired draws of the
same people, and are narrower than those of the metrics themselves; '*' marks a
difference whose interval does not contain 0. --output also writes the table as
a self-contained HTML page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from marlin_jax.records import cli, html_page
from marlin_jax.records.cli import UserError
from marlin_jax.records.html_page import Html, file_name, section, table, tag

if TYPE_CHECKING:
  import numpy as np


_BREAK = tag("br")


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


class Cell(NamedTuple):
  """A number of a table.

  Attributes:
    number: entry of `metrics` of a summary; see `report.summary`.
    difference: difference to the first evaluation, with its interval: mean, low
      and high; None for the first, and where draws were not kept or define no
      interval, as those of a single person.
  """

  number: dict[str, float | None]
  difference: tuple[float, float, float] | None

  @property
  def differs(self) -> bool:
    """True where the interval of the difference does not hold 0."""
    if self.difference is None:
      return False
    _, low, high = self.difference
    return low > 0 or high < 0

  @property
  def difference_text(self) -> str:
    if self.difference is None:
      return ""
    mean, low, high = self.difference
    mark = "*" if self.differs else ""
    return f"{mean:+.4f} [{low:+.3f}, {high:+.3f}]{mark}"


class Key(NamedTuple):
  """One line of a table.

  Attributes:
    task: name of the task.
    test: name of another data set that was scored; '' for the test split.
    mode: name of the mode.
    ratio: share of the training data.
    metric: name of the number.
  """

  task: str
  test: str
  mode: str
  ratio: float
  metric: str

  @property
  def title(self) -> str:
    return f"{self.task}, tested on {self.test}" if self.test else self.task


class Row(NamedTuple):
  """A line of a table, with the number of each evaluation.

  Attributes:
    key: what was evaluated.
    cells: a number for each evaluation; None where it lacks this mode.
  """

  key: Key
  cells: list[Cell | None]


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 1 for an error."""
  args = _parser().parse_args(argv)
  return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
  from marlin_jax.records.folders import write_bytes

  evaluations = _named_apart([_open(path) for path in args.results])
  _check_same_videos(evaluations)
  rows = _rows(evaluations, args.metric)
  if not rows:
    names = {
      name
      for evaluation in evaluations
      for row in evaluation.results["summary"]
      for name in row["metrics"]
    }
    raise CompareError(
      f"no task has the metric '{args.metric}', expected one of "
      f"{', '.join(sorted(names))}"
    )
  tables = itertools.groupby(rows, lambda row: row.key.metric)
  print("\n\n".join(_text(evaluations, list(group)) for _, group in tables))
  if args.output:
    page = _page(evaluations, rows)
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
  # Of the folder '.' the name is known once it is resolved.
  return Evaluation(path.resolve().parent.name, path.parent, results)


def _named_apart(evaluations: list[Evaluation]) -> list[Evaluation]:
  """Names evaluations by their paths if folders of one name are among them."""
  if len({e.name for e in evaluations}) == len(evaluations):
    return evaluations
  return [e._replace(name=str(e.path)) for e in evaluations]


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
      # Not keys that one of them was too early to know.
      for key in facts.keys() & expected.keys():
        if facts[key] != expected[key]:
          raise CompareError(
            f"{first.path} and {other.path} define task '{task}' otherwise, "
            f"by {key} {expected[key]} and {facts[key]}, so their numbers do "
            "not compare"
          )
    expected = _num_tested(first)
    for task, num in _num_tested(other).items():
      if expected.get(task, num) != num:
        raise CompareError(
          f"{first.path} and {other.path} test task '{task}' {expected[task]} "
          f"and {num} times, since folds of classes test a video several times "
          "(config.data.folds), so their numbers do not compare"
        )
    theirs = _settings(other)
    for name, value in _settings(first).items():
      if name.startswith("data.tests.") and theirs.get(name, value) != value:
        raise CompareError(
          f"{first.path} and {other.path} were tested on different data sets "
          f"of the name {name.removeprefix('data.tests.')}"
        )


def _num_tested(evaluation: Evaluation) -> dict[str, int]:
  """Returns the videos tested of each task; the same in all of its cells."""
  cells = evaluation.results["cells"]
  return {cell["task"]: cell["test"]["num_videos"] for cell in cells}


def _settings(evaluation: Evaluation) -> dict[str, Any]:
  from marlin_jax.records.folders import SETTINGS

  file = evaluation.path / SETTINGS
  try:
    return json.loads(file.read_text()) if file.exists() else {}
  except ValueError as e:
    raise CompareError(f"{file} is damaged: {e}") from e


def _rows(evaluations: list[Evaluation], metric: str) -> list[Row]:
  """Returns the lines of a metric; '': of each task's main one."""
  from marlin_jax.eval import report

  keys = dict.fromkeys(
    Key(row["task"], test, row["mode"], row["ratio"], name)
    for evaluation in evaluations
    for row in evaluation.results["summary"]
    for test, metrics in _tests(row).items()
    if (name := metric or report.main_metric(metrics)) in metrics
  )
  groups = list(dict.fromkeys((key.task, key.test) for key in keys))
  names = list(dict.fromkeys(key.metric for key in keys))
  first, *others = evaluations
  return [
    Row(
      key,
      [
        _cell(first, key, None),
        *(_cell(other, key, first) for other in others),
      ],
    )
    for key in sorted(
      keys,
      key=lambda key: (
        names.index(key.metric),
        groups.index((key.task, key.test)),
      ),
    )
  ]


def _tests(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the metrics of a summary's row by test; '' is the test split."""
  return {"": row["metrics"], **row.get("tests", {})}


def _number(evaluation: Evaluation, key: Key) -> dict | None:
  for row in evaluation.results["summary"]:
    if (row["task"], row["mode"], row["ratio"]) == (
      key.task,
      key.mode,
      key.ratio,
    ):
      return _tests(row).get(key.test, {}).get(key.metric)
  return None


def _cell(
  evaluation: Evaluation, key: Key, first: Evaluation | None
) -> Cell | None:
  from marlin_jax.scores import bootstrap

  number = _number(evaluation, key)
  if number is None:
    return None
  theirs = first and _number(first, key)
  if not theirs or None in (number["mean"], theirs["mean"]):
    return Cell(number, None)
  draws = [_mean_draws(e, key) for e in (evaluation, first)]
  if any(values is None for values in draws):
    return Cell(number, None)
  # The first draws are the same people whatever config.num_resamples.
  num = min(map(len, draws))
  low, high = bootstrap.interval(draws[0][:num] - draws[1][:num])
  if math.isnan(low):
    return Cell(number, None)
  return Cell(number, (number["mean"] - theirs["mean"], low, high))


def _mean_draws(evaluation: Evaluation, key: Key) -> np.ndarray | None:
  """Returns the draws of the mean over seeds, (R,); None if there are none."""
  import numpy as np

  from marlin_jax.eval import results_folder

  draws = [
    results_folder.read_draws(evaluation.path, cell["name"]).get(
      f"{key.test} {key.metric}".lstrip()
    )
    for cell in evaluation.results["cells"]
    if (cell["task"], cell["mode"], cell["ratio"])
    == (key.task, key.mode, key.ratio)
  ]
  if not draws or any(values is None for values in draws):
    return None
  return np.mean(draws, axis=0)


# --- Output -------------------------------------------------------------------


def _text(evaluations: list[Evaluation], rows: list[Row]) -> str:
  """Returns the table of one metric."""
  header = ["task", "mode", "data", *(e.name for e in evaluations)]
  table = [header] + [
    [
      row.key.title,
      row.key.mode,
      f"{row.key.ratio:.4g}",
      *map(_cell_text, row.cells),
    ]
    for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = [
    "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
    for line in table
  ]
  return "\n".join([rows[0].key.metric, *lines])


def _cell_text(cell: Cell | None) -> str:
  from marlin_jax.eval import report

  if cell is None:
    return "-"
  text = report.formatted(cell.number)
  return f"{text} ({cell.difference_text})" if cell.difference else text


def _page(evaluations: list[Evaluation], rows: list[Row]) -> str:
  explanation = tag(
    "p",
    "Each cell holds the metric of its table, its deviation over seeds if "
    "there are several, and its 95% interval over people. The last line is the "
    f"difference to {evaluations[0].name}, with an interval of paired draws of "
    "the same people; * marks one whose interval does not hold 0.",
  )
  tables = [
    section(
      title,
      table(
        ["", *(e.name for e in evaluations)],
        [[_row_name(row.key), *map(_cell_html, row.cells)] for row in group],
        stacked=True,
      ),
    )
    for title, group in itertools.groupby(
      rows, lambda row: f"{row.key.title}: {row.key.metric}"
    )
  ]
  encoders = [
    tag(
      "p",
      file_name(e.name),
      _BREAK,
      e.results["checkpoint"]["source"],
      _BREAK,
      f"sha256 {e.results['checkpoint']['sha256'][:12]}",
    )
    for e in evaluations
  ]
  return html_page.page(
    "Comparison of encoders",
    explanation,
    *tables,
    section("Encoders", *encoders),
  )


def _row_name(key: Key) -> Html:
  share = tag("small", f"{100 * key.ratio:.4g}% of the data")
  return tag("span", key.mode, _BREAK, share)


def _cell_html(cell: Cell | None) -> Html:
  from marlin_jax.eval import report

  if cell is None:
    return tag("span", "-")
  value, _, rest = report.formatted(cell.number).partition(" ")
  lines = [tag("b", value), _BREAK, tag("small", rest.replace("+-", "\xb1"))]
  if cell.difference:
    kind = "differs" if cell.differs else "alike"
    text = cell.difference_text.replace("-", "\u2212")
    lines += [_BREAK, tag("small", text, class_=kind)]
  return tag("span", *lines)


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser("marlin_jax.compare", __doc__)
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
    default="",
    help="metric of results.json (default: auc, and ccc of tasks of numbers)",
  )
  add(
    "--output",
    type=cli.output_file(".html", ".htm"),
    help="HTML page to write",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
