"""Scores of predicted numbers equal SciPy's, degenerate data included."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from marlin_jax.scores import values


def expected_ccc(x, y):
  """Lin's formula, on moments of the population."""
  covariance = np.mean((x - x.mean()) * (y - y.mean()))
  return 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def correlations(x, y):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of constants
    if len(x) < 2:
      return np.nan, np.nan
    return stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]


def draw(kind: str, num: int = 40):
  np_rng = np.random.default_rng(len(kind))
  x = np_rng.normal(0.3, 2, num)
  y = x + np_rng.normal(0.5, 1, num)
  if kind == "ties":
    x, y = x.round(), y.round()
  elif kind == "constant predictions":
    y[:] = 0.1
  elif kind == "constant targets":
    x[:] = 0.7
  elif kind == "opposite":
    y = -x
  elif kind == "one sample":
    x, y = x[:1], y[:1]
  elif kind == "two samples":
    x, y = x[:2], y[:2]
  return x, y


KINDS = (
  *("random", "ties", "constant predictions", "constant targets"),
  *("opposite", "one sample", "two samples"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_scipys(kind):
  x, y = draw(kind)
  scored = values.scores(x[:, None], y[:, None])
  pearson, spearman = correlations(x, y)
  expected = {
    "mae": metrics.mean_absolute_error(x, y),
    "rmse": metrics.root_mean_squared_error(x, y),
    "pearson": pearson,
    "spearman": spearman,
    "ccc": expected_ccc(x, y),
  }
  assert scored.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(scored[name], value, atol=1e-12, err_msg=name)


def test_constants_have_no_correlation_whatever_their_rounding():
  x = np.array([1.0, 2.0, 3.0, 4.0])
  constant = np.full(4, 0.1)
  np_rng = np.random.default_rng(0)
  # A draw of the people may leave a constant, although all together are none.
  weights = np.stack([np_rng.integers(1, 5, 4), [3, 0, 0, 0]], 1).astype(float)
  for a, b in ((x, constant), (constant, x)):
    scored = values.scores(a[:, None], b[:, None], weights)
    assert np.isnan(scored["pearson"]).all()
    assert np.isnan(scored["spearman"]).all()
    assert (scored["ccc"] == 0).all()
  same = values.scores(constant[:, None], constant[:, None])
  assert (same["mae"], same["rmse"]) == (0, 0)
  assert np.isnan(same["ccc"])


def test_unknown_targets_do_not_count():
  x, y = draw("random")
  x[::3] = np.nan
  two = np.stack([x, np.full(len(x), np.nan)], 1)
  scored = values.scores(two, np.stack([y, y], 1))
  known = ~np.isnan(x)
  alone = values.scores(x[known, None], y[known, None])
  for name, value in alone.items():
    assert scored[name] == pytest.approx(float(value)), name
  rows = values.per_value(two, np.stack([y, y], 1))
  assert rows["videos"].tolist() == [known.sum(), 0]
  nothing = values.scores(two[:, 1:], y[:, None], scale=(-3, 3))
  assert all(np.isnan(value) for value in nothing.values())
  with pytest.raises(ValueError, match="1 of 40 predictions are not finite"):
    values.scores(x[:, None], np.where(np.arange(40) == 0, np.nan, y)[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_integer_weights_equal_repeated_examples(kind):
  x, y = draw(kind)
  times = np.random.default_rng(1).integers(0, 3, (len(x), 6))
  scored = values.scores(
    x[:, None], y[:, None], times.astype(float), scale=(-3, 3)
  )
  for column, repeats in enumerate(times.T):
    chosen = np.repeat(np.arange(len(x)), repeats)
    expected = values.scores(x[chosen, None], y[chosen, None], scale=(-3, 3))
    for name, value in expected.items():
      np.testing.assert_allclose(
        scored[name][column], value, atol=1e-9, err_msg=name
      )


def published_mosei_scores(targets, predictions):
  """The row of CMU-MOSEI in NumPy and scikit-learn, as published code has it.

  Both limited to -3..3 and rounded by NumPy; negative or not over all examples;
  and positive or not over those that are not 0.
  """
  clipped = [np.clip(x, -3.0, 3.0) for x in (targets, predictions)]
  some = targets != 0

  def f1(true, predicted):
    return metrics.f1_score(true, predicted, average="weighted")

  return {
    "accuracy_7": np.mean(np.round(clipped[0]) == np.round(clipped[1])),
    "accuracy_2": np.mean((targets >= 0) == (predictions >= 0)),
    "f1_weighted_2": f1(targets >= 0, predictions >= 0),
    "accuracy_2_without_0": np.mean(
      (targets[some] > 0) == (predictions[some] > 0)
    ),
    "f1_weighted_2_without_0": f1(targets[some] > 0, predictions[some] > 0),
  }


@pytest.mark.parametrize("seed", range(3))
def test_the_row_of_mosei_is_the_published_one(seed):
  np_rng = np.random.default_rng(seed)
  targets = np_rng.integers(-9, 10, 200) / 3  # means of three annotators
  predictions = targets + np_rng.normal(0, 1.5, 200)
  predictions[:4] = [0.0, -0.5, 0.5, 4.0]
  scored = values.rating_scores(targets, predictions, -3, 3)
  expected = published_mosei_scores(targets, predictions)
  assert scored.keys() == expected.keys()
  for name, value in expected.items():
    assert scored[name] == pytest.approx(value), name
