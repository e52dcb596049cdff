"""Scores of the answers of probes, as JSON, a table and a figure.

Axes: V test windows, R draws.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from marlin_jax.downstream.measures import finite_or_none
from marlin_jax.scores import bootstrap
from marlin_jax.scores import values as number_scores
from tests.benchmarks import people_probes
from tests.benchmarks.people_windows import LABELS, UNSEEN, Windows

BASELINES = RANDOM, PIXELS, LANDMARKS = "random init", "pixels", "landmarks"
# Their one probe, `grid`, is compared with every probe of tokens.
_WITHOUT_TOKENS = PIXELS, LANDMARKS
# Trained with the labels, see `people_supervised`.
SUPERVISED = "supervised"
# Changes of configs/pretrain_ti.py by method: MARLIN's objective with three
# maskings, and objectives of docs/OBJECTIVES.md.
STRATEGIES = "fasking", "tube", "random"
METHODS: Mapping[str, Mapping[str, Any]] = {
  **{name: {"mask.strategy": name} for name in STRATEGIES},
  "motion": {"mask.strategy": "fasking", "target.motion_weight": 0.5},
  "region": {"mask.strategy": "crfr_p", "loss.region_weight": 0.007},
  "latent": {
    "mask.strategy": "fasking",
    "teacher.path": "ema",
    "teacher.weight": 1.0,
  },
  "guarded": {
    "mask.strategy": "fasking",
    "teacher.path": "ema",
    "teacher.weight": 1.0,
    "variance.weight": 1.0,
  },
  "contrast": {
    "mask.strategy": "fasking",
    "contrast.weight": 0.03,
    "data.sample_by": "subject",
    "data.draws_per_unit": 2,
  },
  "sound": {
    "mask.strategy": "fasking",
    "sound.weight": 1.0,
    "sound.width": 96,
    "sound.depth": 4,
    "sound.num_heads": 3,
    "sound.dec_width": 96,
    "sound.dec_depth": 2,
  },
  "growing": {
    "mask.strategy": "fasking",
    "curriculum": "300: data.num_frames=2",
  },
  "stills": {"mask.strategy": "fasking"},
  "frozen": {
    "mask.strategy": "fasking",
    "teacher.weight": 1.0,
    "loss.pixel_weight": 0.0,
  },
  "distilled": {
    "mask.strategy": "fasking",
    "teacher.weight": 1.0,
    "loss.pixel_weight": 0.0,
  },
  "wide": {
    "mask.strategy": "fasking",
    "model.width": 384,
    "model.num_heads": 6,
    "model.mlp_dim": 1536,
  },
  # Without what changes labels: a mirror the turn of the head, other sides the
  # openings, another stride what moves.
  SUPERVISED: {
    "augment.flip_ratio": 0.0,
    "augment.max_crop_aspect": 1.0,
    "augment.stride_jitter": 0,
    "optim.warmup_ratio": 0.1,
  },
}
# The teacher of a method, itself a method.
TEACHERS: Mapping[str, str] = {"frozen": "fasking", "distilled": "wide"}
# Methods with a picture of each second beside every clip.
WITH_STILLS = ("stills",)
HEAD = "head"  # of the encoder's own, where it has one
PROBES = "mean", "grid", "middle", "attentive", HEAD
QUESTIONS = (*LABELS, "same person", "order in time")
DIFFERENCES = (
  *itertools.product(METHODS, (RANDOM, PIXELS)),
  *itertools.combinations(STRATEGIES, 2),
  *((name, "fasking") for name in METHODS if name not in STRATEGIES),
)
_NUM_RESAMPLES = 1000


class Encoder(NamedTuple):
  """What answers are of.

  Attributes:
    name: one of METHODS or BASELINES.
    seed: of the run.
    steps: of the training with fasking that takes as many FLOPs; 0: none.
  """

  name: str
  seed: int
  steps: int


Answers = Mapping[Encoder, Mapping[str, np.ndarray]]


def scores(windows: Windows, answers: Answers) -> dict[str, Any]:
  """Scores all answers on the people never seen.

  Returns:
    `encoders`: name -> steps -> probe -> question -> {score: [value, low,
    high]}, means over the seeds; a score is `auc`, or `r2`, `rank`
    (Spearman's), `change`, R2 of the differences from each person's mean, and
    `left_out`, R2 on training people that the fit left out. `differences`:
    the same of pairs of encoders after the same number of steps. All intervals
    are of one bootstrap over people.
  """
  test = windows.rows(UNSEEN)
  groups: dict[tuple[str, int], list] = {}
  for encoder, found in sorted(answers.items()):
    groups.setdefault((encoder.name, encoder.steps), []).append(found)

  def measure(weights: np.ndarray) -> dict[tuple, np.ndarray]:
    values: dict[tuple, np.ndarray] = {}
    for (name, steps), seeds in groups.items():
      rows = [_scores(windows, test, found, weights) for found in seeds]
      for key in rows[0]:
        values[name, steps, *key] = np.mean([row[key] for row in rows], axis=0)
    return values | _differences(values)

  unweighted = measure(np.ones((len(test), 1)))
  draws = bootstrap.draws(
    measure, list(windows.person[test]), num_resamples=_NUM_RESAMPLES
  )
  result: dict[str, Any] = {"encoders": {}, "differences": {}}
  for key, value in unweighted.items():
    name, steps, probe, question, score = key
    kind = "differences" if " - " in name else "encoders"
    place = result[kind]
    for part in (name, str(steps), probe, question):
      place = place.setdefault(part, {})
    numbers = (value[0], *bootstrap.interval(draws[key]))
    place[score] = [_rounded(x) for x in numbers]
  return result


def _rounded(value: float) -> float | None:
  return None if finite_or_none(value) is None else round(float(value), 3)


def _scores(windows, test, found, weights) -> dict[tuple, np.ndarray]:
  """Returns the scores of one encoder's answers by probe, question, score."""
  labels, person = windows.labels[test], windows.person[test]
  # Each person counts the same, however many windows there are.
  _, numbers, counts = np.unique(
    person, return_inverse=True, return_counts=True
  )
  shares = weights / counts[numbers][:, None]
  values: dict[tuple, np.ndarray] = {}
  probes = [probe for probe in PROBES if f"{probe}/labels" in found]
  for probe in probes:
    inputs = labels, found[f"{probe}/labels"], shares
    r2 = people_probes.r_squared(*inputs)
    rank = number_scores.per_value(*inputs)["spearman"]
    for k, question in enumerate(LABELS):
      values[probe, question, "r2"] = r2[:, k]
      values[probe, question, "rank"] = rank[:, k]
      left_out = found[f"{probe}/r2"][k]
      values[probe, question, "left_out"] = np.full_like(r2[:, k], left_out)
    if f"{probe}/changes" in found:
      own = people_probes.changes(labels, person)
      r2 = people_probes.r_squared(own, found[f"{probe}/changes"], shares)
      for k, question in enumerate(LABELS):
        values[probe, question, "change"] = r2[:, k]
  video = windows.video[test]
  pairs, same = people_probes.video_pairs(video, person)
  # A video's weight is that of any of its windows: that of its person.
  by_video = weights[np.unique(video, return_index=True)[1]]
  (earlier, _) = people_probes.order_pairs(windows, test).T
  of_pair = shares[np.searchsorted(test, earlier)]
  for probe in probes:
    if f"{probe}/same" not in found:
      continue
    values[probe, "same person", "auc"] = people_probes.pair_auc(
      same, found[f"{probe}/same"], *pairs.T, by_video
    )
    right = (found[f"{probe}/order"] > 0) @ of_pair
    values[probe, "order in time", "auc"] = right / of_pair.sum(axis=0)
  return values


def _differences(values) -> dict[tuple, np.ndarray]:
  """Returns differences of pairs of encoders; baselines are of step 0."""
  found = {}
  for (name, steps, probe, *key), value in values.items():
    for one, other in DIFFERENCES:
      at = 0 if other in BASELINES else steps
      theirs = "grid" if other in _WITHOUT_TOKENS else probe
      subtracted = values.get((other, at, theirs, *key))
      if name == one and subtracted is not None:
        found[f"{one} - {other}", steps, probe, *key] = value - subtracted
  return found


def to_json(results: Mapping[str, Any]) -> str:
  """Returns JSON with the scores of a question in a line."""
  text = json.dumps(results, indent=1)
  for part in (r"\[[^\[\]{}]*\]", r"\{[^\[\]{}]*(\[[^\[\]{}]*\][^\[\]{}]*)*\}"):
    text = re.sub(part, lambda match: " ".join(match[0].split()), text)
  return text + "\n"


# --- Tables -------------------------------------------------------------------


def last_steps(results: Mapping[str, Any], *names: str) -> int:
  """Returns the last round that all of these encoders have finished, or 0."""
  rounds = [set(map(int, results["encoders"].get(name, {}))) for name in names]
  return max(set.intersection(*rounds), default=0)


def table(
  results: Mapping[str, Any],
  probe: str = "grid",
  score: str = "r2",
  against: Collection[str] = (*BASELINES, *METHODS),
) -> str:
  """Returns scores after the last round in Markdown, with intervals.

  A row per encoder, then a row per difference of two, with a star where the
  interval does not contain 0.

  Args:
    results: see `scores`.
    probe: one of PROBES.
    score: `r2`, or AUC where that is the score; or `change`.
    against: names of the encoders of which differences are told.
  """
  questions = LABELS if score == "change" else QUESTIONS
  title = "changes, " if score == "change" else ""
  lines = [
    f"| {title}{probe} probe | {' | '.join(questions)} |",
    f"|---{'|---' * len(questions)}|",
  ]

  def row(title, by_question, cell):
    found = {
      question: cell(_number(by_question[question], score))
      for question in questions
      if score in (by_score := by_question.get(question, {}))
      or (score == "r2" and by_score)
    }
    if found:
      lines.append(_row(title, found, questions))

  for name in (LANDMARKS, PIXELS, RANDOM, *METHODS):
    steps = last_steps(results, name)
    found = results["encoders"].get(name, {}).get(str(steps), {})
    own = "grid" if name in _WITHOUT_TOKENS else probe
    if own in found:
      title = f"{name}, {steps:,} steps" if steps else name
      row(title, found[own], _cell)
  for one, other in DIFFERENCES:
    if other not in against:
      continue
    names = [name for name in (one, other) if name not in BASELINES]
    steps = last_steps(results, *names)
    by_steps = results["differences"].get(f"{one} - {other}", {})
    found = by_steps.get(str(steps), {})
    if probe in found:
      row(f"{one} - {other}, {steps:,} steps", found[probe], _difference)
  return "\n".join(lines)


def table_of_probes(results: Mapping[str, Any]) -> str:
  """Returns R2 / rank correlation, or AUC, of each probe in Markdown."""
  lines = [
    f"| encoder, probe | {' | '.join(QUESTIONS)} |",
    f"|---{'|---' * len(QUESTIONS)}|",
  ]
  for name in (LANDMARKS, PIXELS, RANDOM, *METHODS):
    found = results["encoders"].get(name, {})
    found = found.get(str(last_steps(results, name)), {})
    for probe in (probe for probe in PROBES if probe in found):
      cells = {key: _both(value) for key, value in found[probe].items()}
      lines.append(_row(f"{name}, {probe}", cells))
  return "\n".join(lines)


def mean_losses(
  results: Mapping[str, Any],
) -> dict[str, dict[int, tuple[float, ...]]]:
  """Returns the losses of each method by step, means over its seeds.

  Steps that some seed has not reached are left out.

  Returns:
    method -> step -> loss on people seen; loss on people never seen, of flat
    patches in their mean colour over the batch, in their own; clip share.
  """
  rows: dict[str, dict[int, list]] = {}
  for run in results["runs"]:
    for step, *measures in run["unseen"]:
      seen = next(loss for end, loss in run["seen"] if end >= step)
      by_step = rows.setdefault(run["strategy"], {})
      by_step.setdefault(step, []).append((seen, *measures))
  return {
    method: {
      step: tuple(np.mean(found, axis=0).tolist())
      for step, found in sorted(by_step.items())
      if len(found) == max(map(len, by_step.values()))
    }
    for method, by_step in rows.items()
  }


def table_of_losses(results: Mapping[str, Any]) -> str:
  """Returns the losses after each round in Markdown, means over seeds."""
  lines = [
    "| masking | steps | people seen | never seen | mean colours | own colours "
    "| never seen / mean colours | share that names the clip |",
    f"|{'---|' * 8}",
  ]
  for method, by_step in mean_losses(results).items():
    # A method whose steps cost more takes fewer than the round's number.
    rounds = {*map(int, results["encoders"].get(method, {})), max(by_step)}
    for step in sorted(rounds & by_step.keys()):
      *losses, share = by_step[step]
      cells = [method, f"{step:,}", *(f"{x:.4f}" for x in losses)]
      ratio = losses[1] / losses[2]
      lines.append(f"| {' | '.join(cells)} | {ratio:.2f} | {share:.2f} |")
  return "\n".join(lines)


def _row(name: str, by_question: Mapping[str, str], questions=QUESTIONS) -> str:
  cells = [by_question.get(question, "") for question in questions]
  return f"| {name} | {' | '.join(cells)} |"


def _number(by_score, score: str = "r2") -> list[float]:
  """Returns a score, or AUC, and its interval, NaN where undefined."""
  numbers = by_score.get(score) or by_score["auc"]
  return [np.nan if x is None else x for x in numbers]


def _cell(numbers) -> str:
  value, low, high = numbers
  return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _difference(numbers) -> str:
  value, low, high = numbers
  star = " *" if low > 0 or high < 0 else ""
  return f"{value:+.2f} ({low:+.2f} to {high:+.2f}){star}"


def _both(by_score) -> str:
  value = f"{_number(by_score)[0]:.2f}"
  return f"{value} / {by_score['rank'][0]:.2f}" if "rank" in by_score else value


# --- Figure -------------------------------------------------------------------


def draw(results: Mapping[str, Any], path, probe: str = "grid") -> None:
  """Draws the scores over steps, and the losses on people never seen."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    2, 4, figsize=(13, 6), layout="constrained", sharex=True
  )
  colours = {name: f"C{i}" for i, name in enumerate(METHODS)}
  for axis, question in zip(axes.flat, QUESTIONS[:7], strict=False):
    for name, style in ((RANDOM, ":"), (PIXELS, "--")):
      numbers = results["encoders"].get(name, {}).get("0", {})
      if question in numbers.get(probe, {}):
        axis.axhline(
          _number(numbers[probe][question])[0],
          color="0.4",
          linestyle=style,
          label=name,
        )
    for name in METHODS:
      by_steps = results["encoders"].get(name, {})
      steps = sorted(map(int, by_steps))
      if not steps:
        continue
      values, low, high = zip(
        *(_number(by_steps[str(s)][probe][question]) for s in steps),
        strict=True,
      )
      axis.plot(
        steps,
        values,
        "o-",
        color=colours[name],
        label=name,
        markersize=3,
      )
      axis.fill_between(steps, low, high, color=colours[name], alpha=0.12)
    axis.set(title=question, xscale="log")
  _draw_losses(axes.flat[7], results["runs"], colours)
  for axis in axes[-1]:
    axis.set_xlabel("steps")
  axes[0, 0].legend(fontsize=8)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _draw_losses(axis, runs, colours) -> None:
  """Draws losses on people seen and never seen, and those of flat patches."""
  for run in runs:
    colour = colours[run["strategy"]]
    axis.plot(*zip(*run["seen"], strict=True), color=colour, linewidth=0.6)
    steps, pixels, batch, own, _ = zip(*run["unseen"], strict=True)
    axis.plot(steps, pixels, "o-", color=colour, markersize=3)
    axis.plot(steps, batch, ":", color=colour, linewidth=1)
    axis.plot(steps, own, "-.", color=colour, linewidth=1)
  axis.set(title="loss: thin seen, dots never seen", xscale="log")
  axis.text(
    0.03,
    0.03,
    "dotted: mean colours; dash-dotted: own colours",
    transform=axis.transAxes,
    fontsize=7,
  )


def headline(results: Mapping[str, Any]) -> str:
  """Returns a sentence about the lowest loss on people never seen."""
  ratio, step, method = min(
    (pixels / colours, step, method)
    for method, by_step in mean_losses(results).items()
    for step, (_, pixels, colours, *_) in by_step.items()
  )
  people = results["about"]["people"]
  return (
    f"After {step:,} steps of {method} masking on videos of "
    f"{people['train']} people the loss on {people['test']} others is "
    f"{ratio:.2f} of that of mean colours"
  )


def summary(results: Mapping[str, Any]) -> list[str]:
  """Returns a line per run: its loss on people never seen, last."""
  lines = []
  for run in results["runs"]:
    step, pixels, colours, own, _ = run["unseen"][-1]
    lines.append(
      f"{run['strategy']}, seed {run['seed']}: after {step} steps the pixel "
      f"loss on people never seen is {pixels:.4f}, {pixels / colours:.2f} of "
      f"that of mean colours and {pixels / own:.2f} of that of own colours"
    )
  return lines
