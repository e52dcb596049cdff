"""What probe.py asks of features of windows, and how answers are scored.

Axes: W windows, V windows of a test, D features, R rows of weights.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from marlin_jax.downstream import logistic, scores
from marlin_jax.downstream.tasks import Task
from tests.benchmarks import probe_data

BLINK = 0.6  # of the usual opening
MAX_ITERATIONS = 500


@dataclasses.dataclass(frozen=True)
class Windows:
  """All windows, as probe_data writes them.

  Attributes:
    video, part, block: names (W,).
    start: int (W,), first frame in the video.
    labels: float64 (W,) by name; NaN where unknown.
  """

  video: np.ndarray
  part: np.ndarray
  block: np.ndarray
  start: np.ndarray
  labels: dict[str, np.ndarray]

  @property
  def man(self) -> np.ndarray:
    """Number of the man in each window."""
    names = [probe_data.MEN[name] for name in self.video]
    return np.unique(names, return_inverse=True)[1]

  @property
  def place(self) -> np.ndarray:
    """Names (W,) of the part of the video."""
    return np.char.add(self.video, self.part)

  def above_own_median(self, label: str) -> np.ndarray:
    """1 where a label is above its median over the same part of the video.

    So neither who it is nor which part it is tells anything of it.
    """
    values, place = self.labels[label], self.place
    above = np.full(len(values), np.nan)
    for where in np.unique(place):
      rows = (place == where) & np.isfinite(values)
      above[rows] = values[rows] > np.median(values[rows])
    return above


def open_windows(split) -> Windows:
  """Names and labels of a labelled.Split."""
  names = np.array([name.split("/") for name in split.video_ids])
  return Windows(
    video=names[:, 0],
    part=names[:, 1],
    block=np.array(split.subject_ids),
    start=names[:, 2].astype(int),
    labels={k: v[:, 0].astype(float) for k, v in split.labels.items()},
  )


# --- Questions ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
  """What a probe is asked, and where.

  Attributes:
    name: of it.
    chance: what guessing gives.
    fit, test: numbers of the windows.
    targets: float64 (W,); NaN where unknown; None for the order in time.
    num_classes: 0: yes or no.
  """

  name: str
  chance: float
  fit: np.ndarray
  test: np.ndarray
  targets: np.ndarray | None
  num_classes: int = 0


def questions(windows: Windows) -> list[Question]:
  """All that this footage allows.

  Probes are fitted on the parts that pretraining has seen, and tested on later
  ones and on the man of the video that was held out.
  """
  known = np.isfinite(windows.labels["head_turn"])
  seen = windows.video != probe_data.HELD_OUT
  early = windows.part == "early"
  fit = np.flatnonzero(early & seen & known)
  tests = {
    "later": np.flatnonzero(~early & seen & known),
    "new man": np.flatnonzero(~seen & known),
  }
  eyes = windows.labels["eye_opening"]
  targets = {
    "head turn": windows.above_own_median("head_turn"),
    "mouth open": windows.above_own_median("mouth_opening"),
    "eyes closed": np.where(known, eyes < BLINK, np.nan),
    "order": None,
  }
  found = [
    Question(f"{name}, {where}", 0.5, fit, test, values)
    for name, values in targets.items()
    for where, test in tests.items()
    if len(test)
  ]
  num_men = len(set(windows.man))
  if num_men > 1:
    # cropped01 shows a man of another video: it has no part in the fit.
    own = np.flatnonzero(early & (windows.video != "cropped01"))
    late, men = np.flatnonzero(~early), windows.man.astype(float)
    which = Question("which man", 1 / num_men, own, late, men, num_men)
    found.insert(0, which)
  return found


def pairs_of(windows: Windows, rows: np.ndarray) -> np.ndarray:
  """Windows of one part of a video that share no frame, the earlier one first.

  Returns:
    int (P, 2), places in `rows`.
  """
  place, start = windows.place[rows], windows.start[rows]
  same = place[:, None] == place
  apart = start - start[:, None] >= probe_data.WINDOW
  return np.argwhere(same & apart)


# --- Answers ------------------------------------------------------------------


def answers(
  question: Question,
  windows: Windows,
  features: np.ndarray,
  penalties: Sequence[float],
) -> dict[float, np.ndarray]:
  """What the probe of each penalty says of the test windows, or of their pairs.

  Args:
    question: what to learn.
    windows: all.
    features: (W, D).
    penalties: see downstream.logistic.

  Returns:
    By penalty float64 (V, K), probabilities of the classes, or scores, (V,) or
    of `pairs_of` them, that the later one is the second.
  """
  names = tuple(str(i) for i in range(max(question.num_classes, 1)))
  task = Task(question.name, "", question.num_classes > 0, names)
  x, test = features[question.fit], features[question.test]
  if question.targets is None:
    steps = _steps(windows, question.fit, features)
    # In both orders: the answer must not depend on which comes first.
    x = np.concatenate([steps, -steps])
    targets = np.repeat([1.0, 0.0], len(steps))
    test = _steps(windows, question.test, features)
  else:
    targets = question.targets[question.fit]
  probes = {}

  def keep(probe: logistic.Probe) -> float:
    probes[probe.penalty] = probe
    return 0.0

  if not question.num_classes:
    targets = targets[:, None]
  logistic.fit(task, x, targets, penalties, keep, MAX_ITERATIONS)
  logits = {penalty: probe.logits(test) for penalty, probe in probes.items()}
  if question.num_classes:
    return {p: task.probabilities(said) for p, said in logits.items()}
  return {p: said[:, 0] for p, said in logits.items()}


def _steps(windows, rows, features) -> np.ndarray:
  """Features of the second window of each pair minus those of the first."""
  first, second = rows[pairs_of(windows, rows)].T
  return features[second] - features[first]


def score(
  question: Question, windows: Windows, said: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """The share that is right.

  Args:
    question: what was asked.
    windows: all.
    said: one of `answers`.
    weights: (V, R).

  Returns:
    float64 (R,). Of classes the balanced accuracy. Of yes and no an AUC within
    videos: of all pairs of a yes and a no of one part of a video, in how many
    the yes has the higher score. Of the order in time the pairs in which the
    later window is told. NaN where there is nothing to tell.
  """
  test = question.test
  if question.num_classes:
    targets = question.targets[test]
    return scores.class_scores(targets, said, weights)["balanced_accuracy"]
  if question.targets is None:
    first, second = pairs_of(windows, test).T
    both = weights[first] * weights[second]
    return _ratio((said > 0) @ both, both.sum(0))
  right, total = np.zeros((2, weights.shape[1]))
  place = windows.place[test]
  for where in np.unique(place):
    own = place == where
    yes, w = question.targets[test][own], weights[own]
    num_pairs = (yes @ w) * ((1 - yes) @ w)
    auc = scores.roc_auc(yes, said[own], w)
    right += np.where(num_pairs > 0, auc, 0.0) * num_pairs
    total += num_pairs
  return _ratio(right, total)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)
