"""Scores equal scikit-learn's, on data of every kind."""

import warnings

import numpy as np
import pytest
from sklearn import calibration, metrics

from marlin_jax.scores import binary, classes, ranking


def sklearn(function, *args, **options):
  """Calls a function of sklearn without its warnings of undefined scores."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return function(*args, **options)


def draw(kind: str, num: int = 60):
  """Draws labels and probabilities of label 1."""
  np_rng = np.random.default_rng(len(kind))
  labels = (np_rng.random(num) < 0.3).astype(float)
  probabilities = np.clip(0.3 * labels + np_rng.random(num) * 0.7, 0, 1)
  if kind == "ties":
    probabilities = probabilities.round(1)
  elif kind == "all 0":
    labels[:] = 0
  elif kind == "all 1":
    labels[:] = 1
  elif kind == "all the same score":
    probabilities[:] = 0.4
  elif kind == "perfect":
    probabilities = labels.copy()
  elif kind == "two examples":
    labels, probabilities = np.array([0.0, 1.0]), np.array([0.7, 0.7])
  return labels, probabilities


KINDS = (
  *("random", "ties", "all 0", "all 1"),
  *("all the same score", "perfect", "two examples"),
)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ranking_scores_equal_sklearns(kind, weighted):
  labels, p = draw(kind)
  weights = None
  if weighted:
    weights = np.random.default_rng(1).integers(1, 4, len(labels)).astype(float)
  for ours, theirs in (
    (ranking.roc_auc, metrics.roc_auc_score),
    (ranking.average_precision, metrics.average_precision_score),
  ):
    expected = sklearn(theirs, labels, p, sample_weight=weights)
    np.testing.assert_allclose(ours(labels, p, weights), expected, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_operating_points_are_those_of_sklearns_roc_curve(kind, weighted):
  labels, p = draw(kind)
  weights = np.ones(len(labels))
  if weighted:
    weights = np.random.default_rng(1).integers(0, 4, len(labels)).astype(float)
  false, true, _ = sklearn(
    metrics.roc_curve, labels, p, sample_weight=weights, drop_intermediate=False
  )
  both = np.isfinite(true).all() and np.isfinite(false).all()
  eer = ranking.equal_error_rate(labels, p, weights)
  # The curve in fine steps along it, and where it is nearest to 1 - x.
  steps = np.linspace(0, len(true) - 1, 100_000)
  x, y = (np.interp(steps, np.arange(len(true)), v) for v in (false, true))
  expected = x[np.argmin(np.abs(1 - y - x))] if both else np.nan
  np.testing.assert_allclose(eer, expected, atol=2e-3)
  for rate in (0.01, 0.2, 1.0):
    best = true[false <= rate].max() if both else np.nan
    ours = ranking.recall_at(labels, p, rate, weights)
    np.testing.assert_allclose(ours, best, atol=1e-12)
  # Many sets of weights at once are the same as one after the other.
  columns = np.stack([weights, np.ones(len(labels))], axis=1)
  for function in (
    ranking.equal_error_rate,
    lambda a, b, c: ranking.recall_at(a, b, 0.1, c),
  ):
    np.testing.assert_array_equal(
      function(labels, p, columns),
      [function(labels, p, column) for column in columns.T],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_roc_curve_equals_sklearns(kind):
  labels, p = draw(kind)
  ours = ranking.roc_curve(labels, p)
  theirs = sklearn(metrics.roc_curve, labels, p, drop_intermediate=False)[:2]
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(np.nan_to_num(a), np.nan_to_num(b))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_one_label_equal_sklearns(kind):
  labels, p = draw(kind)
  scored = binary.per_label(labels[:, None], p[:, None], 0.5)
  predicted = p > 0.5
  if len(set(labels)) == 1:
    assert np.isnan(scored["balanced_accuracy"][0])
  else:
    for name, expected in {
      "accuracy": metrics.accuracy_score(labels, predicted),
      "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
      "f1": metrics.f1_score(labels, predicted, zero_division=0),
      "f1_weighted": metrics.f1_score(
        labels, predicted, average="weighted", zero_division=0
      ),
    }.items():
      assert scored[name][0] == pytest.approx(expected), name
  assert scored["positives"][0] == labels.sum()


def test_averages_over_labels_equal_sklearns():
  np_rng = np.random.default_rng(0)
  targets = (np_rng.random((80, 5)) < 0.4).astype(float)
  p = np.clip(0.2 * targets + 0.8 * np_rng.random((80, 5)), 0, 1)
  scored = binary.scores(targets, p)
  expected = {
    "accuracy": (targets == (p > 0.5)).mean(),
    "auc_micro": metrics.roc_auc_score(targets, p, average="micro"),
    "auc": metrics.roc_auc_score(targets, p, average="macro"),
    "average_precision": metrics.average_precision_score(targets, p),
    "f1": metrics.f1_score(targets, p > 0.5, average="macro"),
  }
  for name, value in expected.items():
    assert scored[name] == pytest.approx(value), name


def test_unknown_labels_do_not_count():
  np_rng = np.random.default_rng(0)
  targets = (np_rng.random((80, 3)) < 0.4).astype(float)
  p = np_rng.random((80, 3))
  targets[np_rng.random((80, 3)) < 0.3] = np.nan
  targets[:, 2] = np.nan  # an unknown label
  known = ~np.isnan(targets)
  scored = binary.scores(targets, p)
  assert scored["auc_micro"] == pytest.approx(
    metrics.roc_auc_score(targets[known], p[known])
  )
  aucs = [
    metrics.roc_auc_score(targets[known[:, k], k], p[known[:, k], k])
    for k in (0, 1)
  ]
  assert scored["auc"] == pytest.approx(np.mean(aucs))
  nothing = binary.scores(np.full((4, 2), np.nan), p[:4, :2])
  assert all(np.isnan(value) for value in nothing.values())


@pytest.mark.parametrize("absent", [False, True])
def test_scores_of_classes_equal_sklearns(absent):
  np_rng = np.random.default_rng(0)
  targets = np_rng.integers(0, 3 if absent else 4, 90).astype(float)
  p = np_rng.dirichlet(np.ones(4), 90)
  p[range(90), targets.astype(int)] += 0.2
  p /= p.sum(axis=1, keepdims=True)
  if absent:
    p[:, 3] = 0.0  # never predicted either
  scored = classes.scores(targets, p)
  predicted = p.argmax(axis=1)
  expected = {
    "accuracy": metrics.accuracy_score(targets, predicted),
    "balanced_accuracy": metrics.balanced_accuracy_score(targets, predicted),
    "f1": metrics.f1_score(targets, predicted, average="macro"),
    "f1_weighted": metrics.f1_score(targets, predicted, average="weighted"),
  }
  if not absent:
    expected["auc"] = metrics.roc_auc_score(targets, p, multi_class="ovr")
  for name, value in expected.items():
    assert scored[name] == pytest.approx(value), name
  np.testing.assert_array_equal(
    classes.confusion(targets, predicted, 4),
    metrics.confusion_matrix(targets, predicted, labels=range(4)),
  )
  recall = metrics.recall_score(
    targets, predicted, average=None, labels=range(4), zero_division=np.nan
  )
  np.testing.assert_allclose(classes.per_class(targets, p)["recall"], recall)


@pytest.mark.parametrize("kind", ["random", "ties", "perfect"])
def test_calibration_error_equals_sklearns_curve(kind):
  labels, p = draw(kind)
  true, predicted = calibration.calibration_curve(labels, p, n_bins=15)
  edges = np.linspace(0, 1, 16)[1:-1]
  sizes = np.bincount(np.searchsorted(edges, p), minlength=15)
  share = sizes[sizes > 0] / len(p)
  expected = (share * np.abs(true - predicted)).sum()
  assert binary.calibration_error(labels, p) == pytest.approx(expected)


def test_integer_weights_equal_repeated_examples():
  np_rng = np.random.default_rng(0)
  targets = (np_rng.random((30, 2)) < 0.5).astype(float)
  numbers = np_rng.integers(0, 3, 30).astype(float)
  p, q = np_rng.random((30, 2)).round(1), np_rng.dirichlet(np.ones(3), 30)
  times = np_rng.integers(0, 3, (30, 4))
  weights = times.astype(float)
  several = binary.scores(targets, p, 0.3, weights)
  of_classes = classes.scores(numbers, q, weights)
  for column, repeats in enumerate(times.T):
    chosen = np.repeat(np.arange(30), repeats)
    for scored, expected in (
      (several, binary.scores(targets[chosen], p[chosen], 0.3)),
      (of_classes, classes.scores(numbers[chosen], q[chosen])),
    ):
      for name, value in expected.items():
        assert scored[name][column] == pytest.approx(float(value)), name


def test_the_threshold_has_the_highest_balanced_accuracy():
  labels, p = draw("ties")
  best = ranking.best_threshold(labels, p)
  every = [
    metrics.balanced_accuracy_score(labels, p > t)
    for t in np.linspace(-0.01, 1.01, 200)
  ]
  assert metrics.balanced_accuracy_score(labels, p > best) == max(every)
  assert ranking.best_threshold(np.zeros(3), np.ones(3)) == 0.5


def test_predictions_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match="1 of 2 predictions are not finite"):
    ranking.roc_auc(np.array([0.0, 1.0]), np.array([0.5, np.nan]))
  with pytest.raises(ValueError, match="expected the same"):
    ranking.roc_auc(np.zeros(2), np.zeros(3))
