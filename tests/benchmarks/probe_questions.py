"""Questions that probe.py asks of features, and the scores of the answers.

Axes: W windows, V test windows, K classes, P pairs of windows, D feature size,
R sets of weights.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from marlin_jax.downstream import linear_probe
from marlin_jax.downstream.tasks import Task
from marlin_jax.scores import classes, ranking
from tests.benchmarks import probe_data

BLINK = 0.6  # ratio to the usual eye opening; below, the eyes are closed
MAX_ITERATIONS = 500


@dataclasses.dataclass(frozen=True)
class Windows:
  """All windows of the data set that probe_data writes.

  Attributes:
    video, part, block: names (W,).
    start: int (W,), first frame in the video.
    labels: name -> float64 (W,), NaN where unknown.
  """

  video: np.ndarray
  part: np.ndarray
  block: np.ndarray
  start: np.ndarray
  labels: dict[str, np.ndarray]

  @property
  def man(self) -> np.ndarray:
    """Number of the man in each window, int (W,)."""
    names = [probe_data.MEN[name] for name in self.video]
    return np.unique(names, return_inverse=True)[1]

  @property
  def place(self) -> np.ndarray:
    """Name of the part of the video that each window is from, (W,)."""
    return np.char.add(self.video, self.part)

  def above_own_median(self, label: str) -> np.ndarray:
    """Returns 1.0 where a label is above its median over the part of the video.

    Neither the identity nor the part of the video is then informative.

    Returns:
      float64 (W,), NaN where unknown.
    """
    values, place = self.labels[label], self.place
    above = np.full(len(values), np.nan)
    for where in np.unique(place):
      rows = (place == where) & np.isfinite(values)
      above[rows] = values[rows] > np.median(values[rows])
    return above


def open_windows(split) -> Windows:
  """Returns the windows of a splits.Split."""
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
  """A question to probes.

  Attributes:
    name: shown in the table.
    chance: score of guessing.
    fit, test: indices of the windows for fitting and testing.
    targets: float64 (W,), NaN where unknown; None for the order in time.
    num_classes: 0 for a binary question.
  """

  name: str
  chance: float
  fit: np.ndarray
  test: np.ndarray
  targets: np.ndarray | None
  num_classes: int = 0


def questions(windows: Windows) -> list[Question]:
  """Returns all questions that the footage allows.

  Probes are fitted on the parts used in pretraining, and tested on later parts
  and on the man in the held-out video.
  """
  has_labels = np.isfinite(windows.labels["head_turn"])
  seen = windows.video != probe_data.HELD_OUT
  early = windows.part == "early"
  fit = np.flatnonzero(early & seen & has_labels)
  tests = {
    "later": np.flatnonzero(~early & seen & has_labels),
    "new man": np.flatnonzero(~seen & has_labels),
  }
  eyes = windows.labels["eye_opening"]
  targets = {
    "head turn": windows.above_own_median("head_turn"),
    "mouth open": windows.above_own_median("mouth_opening"),
    "eyes closed": np.where(has_labels, eyes < BLINK, np.nan),
    "order": None,
  }
  asked = [
    Question(f"{name}, {where}", 0.5, fit, test, values)
    for name, values in targets.items()
    for where, test in tests.items()
    if len(test)
  ]
  num_men = len(set(windows.man))
  if num_men > 1:
    # cropped01 shows the man of video01: it is not used in the fit.
    own = np.flatnonzero(early & (windows.video != "cropped01"))
    late, men = np.flatnonzero(~early), windows.man.astype(float)
    which = Question("which man", 1 / num_men, own, late, men, num_men)
    asked.insert(0, which)
  return asked


def pairs_of(windows: Windows, rows: np.ndarray) -> np.ndarray:
  """Returns pairs of windows of one part of a video without common frames.

  Args:
    windows: all windows.
    rows: int, indices of the windows to pair.

  Returns:
    int (P, 2), indices into `rows`, the earlier window first.
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
  """Fits a probe per penalty and returns its predictions on the test windows.

  Args:
    question: the question.
    windows: all windows.
    features: (W, D).
    penalties: see downstream.linear_probe.

  Returns:
    Penalty -> float64 class probabilities (V, K); scores (V,) of a binary
    question; or, for the order in time, scores (P,) that the second window of
    each pair is the later one.
  """
  names = tuple(str(i) for i in range(max(question.num_classes, 1)))
  task = Task(question.name, "", question.num_classes > 0, names)
  x, test = features[question.fit], features[question.test]
  if question.targets is None:
    steps = _steps(windows, question.fit, features)
    # In both orders, so that the probe has no preference for either.
    x = np.concatenate([steps, -steps])
    targets = np.repeat([1.0, 0.0], len(steps))
    test = _steps(windows, question.test, features)
  else:
    targets = question.targets[question.fit]
  if not question.num_classes:
    targets = targets[:, None]
  logits = {
    penalty: linear_probe.fit(
      task, x, targets, (penalty,), lambda probe: np.zeros(1), MAX_ITERATIONS
    ).logits(test)
    for penalty in penalties
  }
  if question.num_classes:
    return {p: task.predicted(x) for p, x in logits.items()}
  return {p: x[:, 0] for p, x in logits.items()}


def _steps(windows, rows, features) -> np.ndarray:
  """Returns features of the second window of each pair minus the first's."""
  first, second = rows[pairs_of(windows, rows)].T
  return features[second] - features[first]


def score(
  question: Question,
  windows: Windows,
  predictions: np.ndarray,
  weights: np.ndarray,
) -> np.ndarray:
  """Returns the fraction of correct answers.

  Args:
    question: the question.
    windows: all windows.
    predictions: for one penalty, see `answers`.
    weights: (V, R), weights of the test windows.

  Returns:
    float64 (R,), NaN where it is undefined: the balanced accuracy of a question
    with classes; the AUC within parts of videos of a binary question, over all
    pairs of a positive and a negative window of one part; for the order in
    time, the fraction of pairs in which the later window is recognised.
  """
  test = question.test
  if question.num_classes:
    targets = question.targets[test]
    return classes.scores(targets, predictions, weights)["balanced_accuracy"]
  if question.targets is None:
    first, second = pairs_of(windows, test).T
    both = weights[first] * weights[second]
    return _ratio((predictions > 0) @ both, both.sum(0))
  right, total = np.zeros((2, weights.shape[1]))
  place = windows.place[test]
  for where in np.unique(place):
    own = place == where
    yes, w = question.targets[test][own], weights[own]
    num_pairs = (yes @ w) * ((1 - yes) @ w)
    auc = ranking.roc_auc(yes, predictions[own], w)
    right += np.where(num_pairs > 0, auc, 0.0) * num_pairs
    total += num_pairs
  return _ratio(right, total)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)
