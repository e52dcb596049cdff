"""Shows a training run on one self-contained HTML page.

  python -m marlin_jax.show runs/b

Writes WORKDIR/show.html, or --output: what the run is, its losses, probes and
rates as charts, how its time was spent, its pictures over time, and the
configuration. The page needs no network and no server; open it in a browser or
attach it to a message, but note that the pictures show faces of the data.

Works for any run of marlin_jax.train and marlin_jax.eval.ls, also while it
trains: run the command again for a newer page.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from marlin_jax.records import cli, folders, html_page
from marlin_jax.records.cli import UserError
from marlin_jax.records.html_page import (
  Curve,
  Html,
  file_name,
  section,
  table,
  tag,
)

if TYPE_CHECKING:
  from etils import epath

# Section -> charts: title, patterns of the metrics in it, logarithmic or not.
# A metric is in the first chart that has a pattern of its name.
_CHARTS = {
  "Reconstruction": (
    (
      "Training",
      ("train/loss_rec", "train/loss_rec_limit", "train/loss_rec/*"),
      True,
    ),
    (
      "Evaluation, per pixel",
      ("eval/*/loss_pixels", "eval/*/loss_*_colour"),
      True,
    ),
    ("Evaluation", ("eval/*/loss_rec",), True),
  ),
  "Probes": (
    ("Linear probe", ("eval/probe/*",), False),
    ("Nearest neighbours", ("eval/knn/*",), False),
  ),
  "Optimisation": (
    ("Total loss", ("train/loss",), True),
    ("Discriminator: scores", ("train/d_*",), False),
    ("Adversarial losses", ("train/loss_adv", "train/loss_disc"), False),
    ("Losses of other objectives", ("train/loss_*",), True),
    ("Spread of features", ("train/*/features_*",), False),
    ("Adversarial gradient over reconstruction's", ("train/adv_pull",), False),
    ("Gradient penalty", ("train/gradient_penalty",), False),
    ("Gradient norms", ("train/grad_norm*",), True),
    ("Learning rates", ("train/lr*",), False),
    ("Updates not applied", ("train/num_skipped",), False),
    ("Stage of the curriculum", ("train/stage",), False),
  ),
  "Speed": (
    ("Clips per second", ("time/clips_per_sec",), False),
    ("Model FLOPs utilisation", ("time/mfu",), False),
    ("Share of time without a batch", ("time/data_wait_ratio",), False),
  ),
}
# Events that tell people nothing; rows of metrics are none.
_NO_NEWS = (None, "tracked", "evaluated")
# What has a place of its own on the page.
_ELSEWHERE = ("step", "event", "goodput/*", "time/unix_secs", "time/step_secs")
_MOST_CURVES = 6
_MOST_EVENTS, _EVENT_LENGTH = 30, 300
_NUM_PICTURES = 9
_PICTURE_WIDTH = 900
# Keys of the first table, where the configuration has them.
_MAIN_KEYS = (
  *("data.path", "batch_size", "num_epochs", "num_steps", "curriculum"),
  *(
    "model.width",
    "model.depth",
    "mask.strategy",
    "mask.ratio",
    "optim.base_lr",
    "dtype",
  ),
)


class ShowError(UserError):
  """A folder that holds no run."""


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 after an error, 130 when interrupted."""
  args = _parser().parse_args(argv)

  def work() -> None:
    output = args.output
    if output is None:
      if folders.is_remote(args.workdir):
        raise ShowError(f"{args.workdir} is in a bucket: give --output")
      output = Path(args.workdir) / "show.html"
    text = make(args.workdir)
    output.parent.mkdir(parents=True, exist_ok=True)
    folders.write_bytes(output, text.encode())
    print(f"{output}: {len(text) / 1e6:.1f} MB; open it in a browser")

  return cli.run_command(work, interrupted="No page was written.")


def make(workdir: str) -> str:
  """Returns the page.

  Args:
    workdir: workdir of a run, local or in a bucket.

  Raises:
    ShowError: it holds no run.
  """
  from etils import epath

  from marlin_jax.training import remote_files

  remote_files.check_reachable(workdir)
  path = epath.Path(workdir).expanduser()
  rows = _read_rows(path)
  config = _read_config(path)
  return html_page.page(
    f"Run {path.absolute().name}",
    _summary(rows, config),
    *_chart_sections(rows),
    _time(rows),
    *_events(rows),
    *_pictures(path),
    *_configuration(config),
  )


# --- Files --------------------------------------------------------------------


def _read_rows(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the objects of metrics.jsonl."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    raise ShowError(
      f"{workdir} holds no metrics.jsonl: expected the workdir of a run, such "
      "as runs/b; of an evaluation, results.txt has the scores"
    )
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
      rows[-1]["step"]
    except ValueError:
      continue  # the half-written last line of a run that was killed
    except (KeyError, TypeError) as e:
      raise ShowError(
        f"{path} was not written by a run: a line is no object with 'step'"
      ) from e
  if not rows:
    raise ShowError(f"{path} is empty: no step has been logged yet")
  return rows


def _read_config(workdir: epath.Path) -> dict[str, Any]:
  """Returns the configuration by dotted key; {} if there is none.

  Nor if a kill has cut it off.
  """

  def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
      if isinstance(value, Mapping):
        yield from walk(value, f"{prefix}{name}.")
      else:
        yield prefix + name, value

  path = workdir / "config.json"
  if not path.exists():
    return {}
  with contextlib.suppress(ValueError):
    return dict(walk(json.loads(path.read_text()), ""))
  return {}


def _curve(rows: Sequence[Mapping], name: str) -> Curve:
  points = {row["step"]: row[name] for row in rows if name in row}
  return Curve(name, np.array(list(points)), np.array(list(points.values())))


# --- Sections -----------------------------------------------------------------


def _summary(rows: Sequence[Mapping], config: Mapping[str, Any]) -> Html:
  step = max(row["step"] for row in rows)
  facts = [("steps", f"{step:,}")]
  for key in _MAIN_KEYS:
    # Of two keys for the length, one is 0.
    if config.get(key, 0) not in (0, ""):
      facts.append((key, config[key]))
  last = {}
  for row in rows:
    last |= row
  for name in ("train/loss_rec", "eval/probe/auc", "time/clips_per_sec"):
    if name in last:
      facts.append((name, f"{last[name]:.4g}"))
  return tag(
    "div",
    table(("setting or metric", "value"), facts),
    tag("p", "The number beside a curve's name is its last value."),
  )


def _chart_sections(rows: Sequence[Mapping]) -> Iterator[Html]:
  """Yields a section of charts for each of _CHARTS, and one for the rest."""
  names = sorted({name for row in rows for name in row if _is_curve(row, name)})
  for title, charts in _CHARTS.items():
    drawn = []
    for heading, patterns, is_log in charts:
      chosen = [n for n in names if any(_matches(n, p) for p in patterns)]
      names = [name for name in names if name not in chosen]
      drawn += _charts(rows, heading, chosen, is_log=is_log)
    if drawn:
      yield section(title, tag("div", *drawn, class_="charts"))
  if names:
    drawn = [c for name in names for c in _charts(rows, name, [name])]
    yield section("Other metrics", tag("div", *drawn, class_="charts"))


def _is_curve(row: Mapping, name: str) -> bool:
  known = any(fnmatch.fnmatchcase(name, pattern) for pattern in _ELSEWHERE)
  return not (known or "event" in row) and isinstance(row[name], (int, float))


def _matches(name: str, pattern: str) -> bool:
  """Compares part by part: * stands for one part of a name."""
  parts, patterns = name.split("/"), pattern.split("/")
  return len(parts) == len(patterns) and all(
    map(fnmatch.fnmatchcase, parts, patterns)
  )


def _charts(
  rows: Sequence[Mapping],
  title: str,
  names: Sequence[str],
  *,
  is_log: bool = False,
) -> Iterator[Html]:
  """Yields charts of some metrics, with so many curves as can be told apart."""
  for start in range(0, len(names), _MOST_CURVES):
    curves = [
      _curve(rows, name) for name in names[start : start + _MOST_CURVES]
    ]
    yield html_page.lines(title, curves, "step", is_log=is_log)


def _time(rows: Sequence[Mapping]) -> Html:
  """Returns the shares of the kinds of time; see training.goodput."""
  sums = next((r for r in reversed(rows) if "goodput/total_secs" in r), None)
  if sums is None:
    return section("Time", tag("p", "Not recorded."))
  total = sums["goodput/total_secs"]
  kinds = {
    name.removeprefix("goodput/").removesuffix("_secs"): secs
    for name, secs in sums.items()
    if name.startswith("goodput/") and name.endswith("_secs")
  }
  down = kinds.pop("down", 0.0)
  del kinds["total"]
  shares = [
    (kind, _duration(secs), html_page.share_bar(secs / (total or 1.0)))
    for kind, secs in sorted(kinds.items(), key=lambda item: -item[1])
    if secs
  ]
  text = f"{_duration(total)} in all processes of the run, one after the other"
  if down:
    text += f"; {_duration(down)} between them"
  return section(
    "Time", tag("p", f"{text}."), table(("kind", "time", "share"), shares)
  )


def _duration(secs: float) -> str:
  for unit, length in (("h", 3600), ("min", 60)):
    if secs >= length:
      return f"{secs / length:,.1f} {unit}"
  return f"{secs:.1f} s"


def _events(rows: Sequence[Mapping]) -> Iterator[Html]:
  """Yields a list of the last events, if there are any."""
  events = [row for row in rows if row.get("event") not in _NO_NEWS]
  if not events:
    return
  items = []
  for row in events[-_MOST_EVENTS:]:
    details = {k: v for k, v in row.items() if k not in ("step", "event")}
    text = file_name(json.dumps(details)[:_EVENT_LENGTH])
    items.append(tag("li", f"step {row['step']:,}: {row['event']} ", text))
  yield section("Events", tag("ul", *items))


def _pictures(workdir: epath.Path) -> Iterator[Html]:
  """Yields evenly spaced pictures of the run, the last one first."""
  from PIL import Image

  folder = workdir / "pictures"
  paths = sorted(folder.glob("step_*.png")) if folder.exists() else []
  if not paths:
    return
  places = np.linspace(0, len(paths) - 1, min(len(paths), _NUM_PICTURES))
  figures = []
  for place in places[::-1].round().astype(int):
    path = paths[place]
    try:
      with Image.open(io.BytesIO(path.read_bytes())) as file:
        picture = file.convert("RGB")
    except (OSError, SyntaxError):
      continue  # the run is writing it, or was killed then
    if picture.width > _PICTURE_WIDTH:
      height = round(picture.height * _PICTURE_WIDTH / picture.width)
      picture = picture.resize((_PICTURE_WIDTH, height))
    step = int(path.stem.removeprefix("step_"))
    caption = tag("span", f"step {step:,}")
    figures.append(
      html_page.picture(np.asarray(picture), caption, f"Step {step}")
    )
  yield section(
    "Pictures",
    tag("p", f"{len(figures)} of {len(paths)}, the last one first."),
    tag("div", *figures, class_="crops"),
  )


def _configuration(config: Mapping[str, Any]) -> Iterator[Html]:
  if config:
    values = table(("key", "value"), sorted(config.items()))
    yield section(
      "Configuration",
      tag("details", tag("summary", f"{len(config)} keys"), values),
    )


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser(
    "marlin_jax.show",
    "Shows a training run on one HTML page: losses, probes, rates, time and "
    "pictures.",
  )
  parser.add_argument(
    "workdir",
    metavar="WORKDIR",
    help="workdir of a run, also gs://; the run may still be training",
  )
  parser.add_argument(
    "--output",
    type=cli.output_file(".html", ".htm"),
    metavar="PAGE.html",
    help="where to write the page; by default WORKDIR/show.html",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
