"""Tasks, subsets, probes, protocols and heads, on data with known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from sklearn import linear_model, neighbors
from sklearn.metrics import roc_auc_score

from configs import eval_far, eval_fer
from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  fit,
  learner,
  linear_probe,
  low_data,
  measures,
  protocols,
  tasks,
)
from marlin_jax.downstream.tasks import Task, TaskError
from marlin_jax.eval import configuration, modes
from marlin_jax.inference import nearest_neighbours
from marlin_jax.models import heads, vit
from marlin_jax.scores import values
from marlin_jax.training.configuration import ConfigError
from marlin_jax.training.skipped_steps import NotFiniteError

KNOWN = {
  "face": {"kind": "binary", "names": ["hat", "beard"]},
  "mood": {"kind": "class", "names": ["sad", "calm", "gay"]},
  "worth": {"kind": "value", "names": ["worth"]},
  "affect": {"kind": "value", "names": ["valence", "arousal"]},
}
BINARY = Task("face", "face", "binary", ("hat", "beard"))
CLASSES = Task("mood", "mood", "class", ("sad", "calm", "gay"))


def task_of(name, **rule):
  return tasks.make_task(name, KNOWN, rule, "DATA")


# --- Tasks --------------------------------------------------------------------


def test_labels_become_targets():
  nan = np.nan
  face = np.array([[1, 0], [nan, 1], [nan, nan]], np.float32)
  np.testing.assert_array_equal(task_of("face").targets(face), face)
  assert task_of("face").chosen(face).tolist() == [True, True, False]
  mood = np.array([[2], [nan], [0], [1]], np.float32)
  np.testing.assert_array_equal(task_of("mood").targets(mood), [2, nan, 0, 1])

  worth = np.array([[-3], [-0.5], [0], [0.5], [2.9], [nan]], np.float32)
  sign = task_of("sign", label="worth", cuts=(0.0,))
  assert (sign.is_class, sign.names) == (False, ("worth>=0",))
  np.testing.assert_array_equal(sign.targets(worth)[:, 0], [0, 0, 1, 1, 1, nan])
  seven = task_of(
    "seven", label="worth", cuts=(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
  )
  assert seven.is_class
  assert len(seven.names) == 7
  np.testing.assert_array_equal(seven.targets(worth), [0, 3, 3, 4, 6, nan])

  gay = task_of("not sad", label="mood", negative="sad")
  np.testing.assert_array_equal(gay.targets(mood)[:, 0], [1, nan, 0, 1])
  parts = {name: rows.tolist() for name, rows in gay.parts(mood).items()}
  assert parts == {
    "calm": [False, False, True, True],
    "gay": [True, False, True, False],
  }
  one = task_of("gay", label="mood", negative="sad", only="gay")
  assert one.chosen(mood).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
  ("name", "rule", "words"),
  [
    ("x", {}, r"label 'x', and DATA has affect \(value\), face \(binary\)"),
    ("w", {"label": "worth", "cut": (0.0,)}, "has 'cut', expected some of"),
    ("w", {"label": "worth", "cuts": (0.0,), "apart": 0.0}, "is one of the"),
    ("w", {"label": "worth", "cuts": (1.0,), "scale": (0, 2)}, "one of them"),
    ("w", {"label": "worth", "apart": 0.0, "scale": (0, 2)}, "one of them"),
    ("w", {"label": "worth", "cuts": (1.0,), "negative": "sad"}, "one of them"),
    ("m", {"label": "mood", "only": "gay"}, "needs the class that becomes 0"),
    ("w", {"label": "worth", "scale": (2, 2)}, "its least and largest"),
    ("face", {"scale": (0, 2)}, "scale is for kind value"),
    ("mood", {"label": "mood", "cuts": (0.0,)}, "cuts is for kind value"),
    ("m", {"label": "mood", "negative": "glad"}, "no class 'glad', it has sad"),
    ("w", {"label": "worth", "cuts": (1.0, 0.0)}, r"cuts \(1.0, 0.0\)"),
  ],
)
def test_labels_that_do_not_fit_are_refused(name, rule, words):
  with pytest.raises(TaskError, match=words):
    task_of(name, **rule)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_equal_to_a_cut_is_above_it(dtype):
  """Also where float32 rounds it down, as 0.7, or away from 0, as -0.1."""
  cuts = (-0.7, -0.1, 0.1, 0.3, 0.7)
  values = np.array(cuts, dtype)[:, None]
  task = task_of("five", label="worth", cuts=cuts)
  np.testing.assert_array_equal(task.targets(values), [1, 2, 3, 4, 5])
  apart = task_of("apart", label="worth", cuts=(-0.7, 0.7), apart=-0.1)
  values = np.array([-0.7, -0.1, 0.7], dtype)[:, None]
  np.testing.assert_array_equal(apart.targets(values), [1, 2, 3])


def test_a_value_apart_without_cuts_makes_three_classes():
  task = task_of("sign", label="worth", apart=0.0)
  assert task.names == ("<0", "=0", ">0")
  values = np.array([[-2.5], [0.0], [0.5], [np.nan]], np.float32)
  np.testing.assert_array_equal(task.targets(values), [0, 1, 2, np.nan])


def delbrouck_class(a: float) -> int:
  """The classes of MOSEI_UMONS, as its tokenize.py defines them."""
  if a == 0:
    return 3
  if a < 0:
    return 0 if a < -2 else 1 if a < -1 else 2
  return 4 if a <= 1 else 5 if a <= 2 else 6


def test_a_value_apart_is_a_class_of_its_own():
  rule = eval_fer.get_config().derive.sentiment7_delbrouck
  task = task_of("seven", **dict(rule) | {"label": "worth"})
  values = np.arange(-9, 10) / 3  # as they are rated
  values = np.append(values, [-2.0, -1.0, 1.0, 2.0, np.nan])
  found = task.targets(values[:, None])
  assert found[:-1].tolist() == [delbrouck_class(a) for a in values[:-1]]
  assert np.isnan(found[-1])
  assert task.is_class
  assert task.names == ("<-2", "-2..-1", "-1..0", "=0", "0..1", "1..2", ">2")


def test_numbers_are_targets_and_are_trained_in_units_of_their_spread():
  values = np.array([[1.0, 50], [2, np.nan], [3, 70], [np.nan, 60]], np.float32)
  task = task_of("affect")
  assert (task.is_value, task.score_name) == (True, "ccc")
  targets = task.targets(values)
  np.testing.assert_array_equal(targets, values)
  assert task.strata(targets).tolist() == [1, 3, 4, 0]
  units = tasks.Units.of(task, targets)
  labels, known = task.encode(targets)
  standard = np.where(known > 0, units.standardised(labels), np.nan)
  np.testing.assert_allclose(np.nanmean(standard, axis=0), 0, atol=1e-6)
  np.testing.assert_allclose(np.nanstd(standard, axis=0), 1, rtol=1e-6)
  # A layer that gives standardised numbers gives numbers when it is folded.
  x, kernel = np.ones((1, 3)), np.random.default_rng(0).normal(size=(3, 2))
  folded = units.folded({"kernel": kernel, "bias": np.array([0.5, -1.0])})
  np.testing.assert_allclose(
    units.standardised(x @ folded["kernel"] + folded["bias"]),
    x @ kernel + [0.5, -1.0],
  )
  losses = task.losses(targets, np.array([[1.0, 52], [2, 0], [5, 70], [0, 63]]))
  np.testing.assert_allclose(losses, [4 / 3, 13 / 3])


def test_units_of_labels_change_nothing():
  units = tasks.Units.of(BINARY, np.array([[0.0, 1.0], [1.0, 1.0]]))
  layer = {"kernel": np.float32([[0.1, 0.7]]), "bias": np.float32([0.3, -0.9])}
  for name, array in units.folded(layer).items():
    np.testing.assert_array_equal(array, layer[name])


def test_the_concordance_loss_is_lins_coefficient():
  np_rng = np.random.default_rng(0)
  labels, numbers = np_rng.normal(size=(2, 6, 2)).astype(np.float32)
  known = np.ones((6, 2), np.float32)
  known[:2, 1] = 0
  task = task_of("affect")
  loss = learner.loss_of(task, numbers, labels, known, "ccc")
  expected = [
    values.scores(labels[rows, k : k + 1], numbers[rows, k : k + 1])["ccc"]
    for k, rows in enumerate((slice(None), slice(2, None)))
  ]
  assert float(loss) == pytest.approx(1 - np.mean(expected), rel=1e-5)
  # A batch of one constant has a loss and a gradient, not NaN.
  one = np.ones((4, 2), np.float32)
  gradient = jax.grad(lambda x: learner.loss_of(task, x, one, one, "ccc"))(one)
  assert np.isfinite(gradient).all()


def test_all_problems_of_a_configuration_are_reported_together():
  config = eval_far.get_config()
  config.modes, config.pool, config.knn.k = "", "max", 0
  with pytest.raises(ConfigError, match="3 problems:") as error:
    configuration.validate(config)
  assert "knn.k=0: expected at least 1" in str(error.value)


# --- Low data -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_stratified(seed):
  np_rng = np.random.default_rng(seed)
  strata = np_rng.choice(4, 1000, p=[0.7, 0.2, 0.07, 0.03])
  people = [str(i) for i in range(1000)]
  parts = [
    low_data.take(r, strata, people, seed) for r in (0.01, 0.1, 0.5, 1.0)
  ]
  assert [len(part) for part in parts] == [10, 100, 500, 1000]
  for small, large in zip(parts, parts[1:], strict=False):
    assert set(small) <= set(large)
  for part in parts:
    expected = np.bincount(strata) * len(part) / 1000
    got = np.bincount(strata[part], minlength=4)
    assert np.abs(got - expected).max() <= 2
  other = low_data.take(0.1, strata, people, seed + 1)
  assert set(other) != set(parts[1])


def test_the_videos_of_a_person_stay_together():
  np_rng = np.random.default_rng(0)
  person = np_rng.integers(0, 50, 400)
  part = low_data.take(0.2, np.zeros(400, int), person.astype(str), 0)
  assert len(set(person[part])) == 10
  assert len(part) == np.isin(person, person[part]).sum()


def test_the_stratum_is_the_rarest_label():
  nan = np.nan
  targets = np.array(
    [[1, 0, 0], [1, 1, 0], [1, 1, nan], [0, 0, 0], [1, 0, 1]], float
  )
  assert BINARY.strata(targets).tolist() == [1, 2, 2, 0, 3]
  assert CLASSES.strata(np.array([2.0, nan, 0.0])).tolist() == [3, 0, 1]


def test_the_stratum_of_a_number_is_its_quarter():
  nan = np.nan
  affect, unknown = task_of("affect"), np.full(5, nan)
  known = np.array([0.0, 1.0, 2.0, 3.0, nan])
  assert affect.strata(np.stack([known, unknown], 1)).tolist() == [
    1,
    2,
    3,
    4,
    0,
  ]
  # Valence is known of no video, and arousal of some.
  assert affect.strata(np.stack([unknown, known], 1)).tolist() == [0] * 5


# --- The linear probe ---------------------------------------------------------


def drawn(num: int, seed: int, noise: float = 0.5):
  """Draws features of which two directions determine two labels."""
  np_rng = np.random.default_rng(seed)
  x = 3 + 2 * np_rng.normal(size=(num, 16)).astype(np.float32)
  mixing = np.random.default_rng(9).normal(size=(16, 2))
  y = ((x - 3) @ mixing + noise * np_rng.normal(size=(num, 2)) > 0).astype(
    float
  )
  return x, y


def never(probe) -> np.ndarray:
  return np.zeros(1)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_probe_equals_sklearns_logistic_regression(penalty):
  x, y = drawn(200, 0, noise=4.0)
  y[:30, 1] = np.nan
  probe = linear_probe.fit(BINARY, x, y, (penalty,), never, 500)
  assert probe.converged
  assert not probe.at_edge.any()
  for k, known in ((0, slice(None)), (1, slice(30, None))):
    z = (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
    # Our loss is the mean over known videos, sklearn's the sum.
    theirs = linear_model.LogisticRegression(
      C=1 / (penalty * len(z[known])), tol=1e-10, max_iter=5000
    ).fit(z[known], y[known, k])
    np.testing.assert_allclose(
      probe.kernel[:, k], theirs.coef_[0], atol=1e-4, rtol=1e-4
    )
    assert probe.bias[k] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_more_features_than_videos_equal_sklearns_logistic_regression():
  np_rng = np.random.default_rng(0)
  x = np_rng.normal(size=(40, 300)) + np_rng.normal(size=300)
  y = (x[:, :1] + np_rng.normal(size=(40, 1)) > 0).astype(float)
  task = dataclasses.replace(BINARY, names=("it",))
  probe = linear_probe.fit(task, x, y, (1e-2,), never, 500)
  z = (x - x.mean(0)) / x.std(0)
  theirs = linear_model.LogisticRegression(
    C=1 / (1e-2 * 40), tol=1e-10, max_iter=5000
  ).fit(z, y[:, 0])
  np.testing.assert_allclose(probe.kernel[:, 0], theirs.coef_[0], atol=1e-5)
  np.testing.assert_allclose(
    probe.logits(x)[:, 0], theirs.decision_function(z), atol=1e-3
  )


def test_classes_equal_sklearns_logistic_regression():
  np_rng = np.random.default_rng(0)
  x = np_rng.normal(size=(300, 8))
  targets = (x[:, :3] + np_rng.normal(size=(300, 3))).argmax(axis=1)
  probe = linear_probe.fit(
    CLASSES, x, targets.astype(float), (1e-3,), never, 500
  )
  theirs = linear_model.LogisticRegression(
    C=1 / (1e-3 * 300), tol=1e-10, max_iter=5000
  ).fit((x - x.mean(0)) / x.std(0), targets)
  np.testing.assert_allclose(probe.kernel, theirs.coef_.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-6])
def test_the_probe_of_numbers_equals_sklearns_ridge(penalty):
  x, _ = drawn(200, 0)
  y = x[:, :2] * [3.0, -1.0] + np.random.default_rng(1).normal(50, 4, (200, 2))
  y[:30, 1] = np.nan
  probe = linear_probe.fit(
    task_of("affect"), x, y, (penalty,), lambda probe: np.zeros(2), 1
  )
  z = (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
  for k, known in ((0, slice(None)), (1, slice(30, None))):
    theirs = linear_model.Ridge(alpha=penalty * len(z[known]), tol=1e-12).fit(
      z[known], y[known, k]
    )
    np.testing.assert_allclose(probe.kernel[:, k], theirs.coef_, atol=1e-5)
    assert probe.bias[k] == pytest.approx(theirs.intercept_, abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e3])
def test_the_grid_of_a_ridge_grows_at_both_ends(noise):
  (x, _), (val_x, _) = drawn(200, 0), drawn(400, 1)
  np_rng = np.random.default_rng(2)
  y, val_y = (
    z[:, :1] + noise * np_rng.normal(size=(len(z), 1)) for z in (x, val_x)
  )
  task = task_of("worth")

  def score(probe):
    return -task.losses(val_y, probe.logits(val_x)) / np.square(y.std())

  probe = linear_probe.fit(task, x, y, (1e-2, 1e-1), score, 1)
  assert probe.penalty[0] < 1e-2 if noise == 0 else probe.penalty[0] > 1e-1


def test_more_features_than_videos_and_constant_ones_have_a_ridge():
  x = np.random.default_rng(0).normal(size=(5, 16))
  x[:, 3] = 7.0
  y = np.arange(5.0)[:, None]
  probe = linear_probe.fit(
    task_of("worth"), x, y, (0.0,), lambda probe: np.zeros(1), 1
  )
  assert probe.kernel[3, 0] == pytest.approx(0)
  np.testing.assert_allclose(probe.logits(x), y, atol=1e-8)


def test_a_label_has_the_same_probe_alone_and_beside_others():
  (x, y), (val_x, val_y) = drawn(300, 0, noise=4.0), drawn(300, 1, noise=4.0)
  # Another label that needs the largest penalty, as it is drawn by lot.
  y[:, 1] = np.random.default_rng(2).integers(0, 2, 300)
  alone = Task("a", "a", "binary", ("one",))

  def fit(task, k):
    def score(probe):
      found = task.predicted(probe.logits(val_x))
      return -task.losses(val_y[:, :k], found)

    return linear_probe.fit(task, x, y[:, :k], (1e-3, 1e-2, 1e-1), score, 500)

  one, both = fit(alone, 1), fit(BINARY, 2)
  assert both.penalty[0] == one.penalty[0] != both.penalty[1]
  np.testing.assert_allclose(both.kernel[:, :1], one.kernel, atol=1e-4)


@pytest.mark.parametrize("noise", [0.5, 1e3])
def test_the_grid_grows_while_the_best_penalty_is_its_last(noise):
  (x, y), (val_x, val_y) = drawn(200, 0, noise), drawn(400, 1, noise)

  def score(probe):
    found = BINARY.predicted(probe.logits(val_x))
    return -BINARY.losses(val_y, found)

  narrow = linear_probe.fit(BINARY, x, y, (1e-2, 2e-2), score, 500)
  beyond = narrow.penalty < 1e-2 if noise < 1 else narrow.penalty > 2e-2
  assert beyond.all()
  wide = 1e-2 * 2.0 ** np.arange(-40, 17)
  known = linear_probe.fit(BINARY, x, y, wide, score, 500)
  np.testing.assert_allclose(score(narrow), score(known), atol=1e-3)


def test_a_penalty_at_the_end_of_the_search_is_told():
  x, y = drawn(60, 0, noise=0.0)

  def score(probe):
    return -BINARY.losses(y, BINARY.predicted(probe.logits(x)))

  probe = linear_probe.fit(BINARY, x, y, (1e-2, 1e-6), score, 1000)
  assert probe.at_edge.all()
  assert (probe.penalty <= 1e-6).all()


def test_a_label_that_is_never_known_where_choices_are_made_is_told():
  x, y = drawn(60, 0, noise=0.0)
  val = np.where([True, False], y, np.nan)

  def score(probe):
    return -BINARY.losses(val, BINARY.predicted(probe.logits(x)))

  probe = linear_probe.fit(BINARY, x, y, (1e-2, 1e-6), score, 1000)
  assert probe.penalty[1] == 1e-2
  assert probe.at_edge.tolist() == [True, False]
  (unknown, edge) = modes._probe_warnings(BINARY, probe, val)
  assert unknown.startswith("beard is unknown in all validation videos")
  assert "for hat: the features separate" in edge


@pytest.mark.parametrize("penalties", [(1.0, 1.0), (0.0, 0.1, 1.0)])
def test_equal_penalties_and_the_penalty_0_do_not_grow_the_grid(penalties):
  x, y = drawn(60, 0, noise=0.0)

  def score(probe):
    return -BINARY.losses(y, BINARY.predicted(probe.logits(x)))

  probe = linear_probe.fit(BINARY, x, y, penalties, score, 1000)
  assert (probe.penalty == min(penalties)).all()
  assert np.isfinite(probe.kernel).all()


def test_without_a_penalty_what_does_not_vary_has_no_weight():
  """Nor do copies of a feature make a difference."""
  x, y = drawn(200, 0, noise=8.0)
  more = np.concatenate([x, x[:, :3], np.full((200, 1), 7.0)], axis=1)
  for task, targets in ((BINARY, y), (task_of("affect"), x[:, :2] + y)):
    one, both = (
      linear_probe.fit(
        task, z, targets, (0.0,), lambda probe: np.zeros(2), 1000
      )
      for z in (x, more)
    )
    assert one.converged
    assert both.converged
    np.testing.assert_allclose(both.logits(more), one.logits(x), atol=1e-4)
    np.testing.assert_allclose(both.kernel[-1], 0, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_the_probe_separates_labels_at_any_feature_scale(scale):
  (x, y), (new_x, new_y) = drawn(400, 0), drawn(200, 1)
  probe = linear_probe.fit(BINARY, scale * x, y, (1e-3, 1e-2), never, 500)
  found = BINARY.predicted(probe.logits(scale * new_x))
  assert BINARY.score(new_y, found, micro=False) > 0.98


def test_shuffled_labels_give_chance():
  (x, y), (new_x, new_y) = drawn(400, 0), drawn(400, 1)
  shuffled = np.random.default_rng(0).permutation(y)
  probe = linear_probe.fit(BINARY, x, shuffled, (1e-2,), never, 500)
  found = BINARY.predicted(probe.logits(new_x))
  assert 0.4 < BINARY.score(new_y, found, micro=False) < 0.6


def test_the_penalty_is_selected_on_the_validation_split():
  x, y = drawn(30, 0, noise=8.0)
  new_x, new_y = drawn(400, 1, noise=8.0)

  def score(probe):
    found = BINARY.predicted(probe.logits(new_x))
    return -BINARY.losses(new_y, found)

  penalties = (1e-6, 1e-2, 1.0, 100.0)
  best = linear_probe.fit(BINARY, x, y, penalties, score, 500)
  each = np.array(
    [score(linear_probe.fit(BINARY, x, y, (p,), never, 500)) for p in penalties]
  )
  assert best.penalty.tolist() == [penalties[i] for i in each.argmax(axis=0)]
  assert (best.penalty > 1e-6).all()


def test_the_probe_separates_classes():
  np_rng = np.random.default_rng(0)
  centres = 4 * np_rng.normal(size=(3, 16))
  targets = np_rng.integers(0, 3, 300).astype(float)
  x = centres[targets.astype(int)] + np_rng.normal(size=(300, 16))
  targets[:20] = np.nan
  probe = linear_probe.fit(CLASSES, x, targets, (1e-2,), never, 500)
  found = CLASSES.predicted(probe.logits(x))
  known = ~np.isnan(targets)
  assert (found.argmax(1) == targets)[known].mean() > 0.98
  np.testing.assert_allclose(found.sum(axis=1), 1)


def test_the_papers_gradient_steps_separate_labels():
  (x, y), (new_x, new_y) = drawn(256, 0), drawn(200, 1)
  config = eval_far.get_config().paper
  config.max_epochs, config.lr = 60, 0.02
  mesh = sharding.make_mesh()
  probe = learner.linear_probe(BINARY, 16, config, mesh, seed=0)
  labels, known = BINARY.encode(y)
  order = clip_batches.Order(np.arange(256), 0)

  def batches(step):
    while True:
      rows = order.rows(step, config.batch_size)
      yield x[rows], labels[rows], known[rows]
      step += 1

  def predict(trained):
    return BINARY.predicted(np.asarray(probe.logits(trained, new_x)))

  fitted = fit.fit(
    probe,
    protocols.plan_training(config, 256),
    batches,
    lambda trained, pause: BINARY.score(new_y, predict(trained), micro=True),
    seed=0,
  )
  assert BINARY.score(new_y, predict(fitted.trained), micro=True) > 0.97
  again = BINARY.score(new_y, predict(fitted.trained), micro=True)
  assert fitted.score == pytest.approx(again, rel=1e-6)
  assert fitted.losses[-1] < fitted.losses[0] / 2


def test_a_loss_that_is_not_finite_ends_a_training():
  x, y = drawn(32, 0)
  config = eval_far.get_config().paper
  probe = learner.linear_probe(BINARY, 16, config, sharding.make_mesh(), 0)
  labels, known = BINARY.encode(y)
  batches = iter([(x * np.nan, labels, known)] * 9)
  with pytest.raises(NotFiniteError, match="loss of round 1 is nan"):
    fit.fit(
      probe,
      protocols.plan_training(config, 32),
      lambda _: batches,
      lambda trained, pause: 0.0,
      seed=0,
    )


# --- Neighbours ---------------------------------------------------------------


def test_neighbours_equal_sklearns():
  x, y = drawn(150, 0)
  new_x, _ = drawn(40, 1)
  found = nearest_neighbours.predict(
    new_x, x, y, np.ones_like(y), k=7, temperature=0.07
  )
  theirs = neighbors.KNeighborsRegressor(
    7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
  ).fit(x, y)
  np.testing.assert_allclose(found, theirs.predict(new_x), atol=1e-6)


def test_a_far_vote_counts_whole_where_the_near_ones_are_unknown():
  x = np.array([[1.0, 0.0], [-1.0, 0.1]])
  y, known = np.array([[0.0], [3.0]]), np.array([[0.0], [1.0]])
  found = nearest_neighbours.predict(x[:1], x, y, known, k=2, temperature=0.02)
  np.testing.assert_allclose(found, [[3.0]])


def test_centred_neighbours_do_not_see_what_all_features_share():
  (x, y), (new_x, _) = drawn(100, 0), drawn(40, 1)
  common = 50 * np.random.default_rng(3).normal(size=16)
  options = {"k": 20, "temperature": 0.07}
  known = np.ones_like(y)
  mean = x.mean(axis=0)
  expected = nearest_neighbours.predict(
    new_x - mean, x - mean, y, known, **options
  )
  for shift in (0.0, common):
    found = nearest_neighbours.predict(
      new_x + shift, x + shift, y, known, centre=mean + shift, **options
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
  # Else all cosines are near 1, and all votes weigh the same.
  shifted = nearest_neighbours.predict(
    new_x + common, x + common, y, known, **options
  )
  shares = np.round(20 * shifted)
  np.testing.assert_allclose(20 * shifted, shares, atol=0.5)
  assert np.abs(20 * shifted - shares).mean() < 0.1
  assert np.abs(20 * expected - np.round(20 * expected)).mean() > 0.2


def test_unknown_labels_have_no_vote():
  x = np.eye(3, dtype=np.float32)
  labels = np.array([[0.0], [1.0], [1.0]])
  known = np.array([[0.0], [1.0], [1.0]])
  near_the_first = np.array([[1.0, 0.01, 0.0]], np.float32)
  found = nearest_neighbours.predict(
    near_the_first, x, labels, known, k=2, temperature=1.0
  )
  assert found[0, 0] == 1.0
  found = nearest_neighbours.predict(
    near_the_first, x, labels, known, k=1, temperature=1.0
  )
  assert found[0, 0] == 1.0  # no votes: the mean of all known labels


# --- Protocols ----------------------------------------------------------------


def test_the_plateau_equals_pytorchs():
  np_rng = np.random.default_rng(0)
  losses = np.exp(-np.arange(200) / 20) + 0.02 * np_rng.random(200)
  weight = torch.nn.Parameter(torch.zeros(1))
  torch_optimiser = torch.optim.Adam([weight], lr=1e-4)
  theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
    torch_optimiser, factor=0.5, patience=7, min_lr=1e-8
  )
  ours = protocols.Plateau(np.float32(1e-4))
  rates = []
  for loss in losses:
    theirs.step(loss)
    ours.update(loss, factor=0.5, patience=7)
    rates.append(torch_optimiser.param_groups[0]["lr"])
    assert ours.lr == pytest.approx(rates[-1], rel=1e-6)
  assert rates[-1] < 1e-5


def test_the_papers_training_ends_at_the_lowest_rate():
  config = eval_far.get_config().paper
  config.lr, config.patience, config.batch_size = 2e-6, 1, 8
  x, y = drawn(8, 0)
  probe = learner.linear_probe(BINARY, 16, config, sharding.make_mesh(), 0)
  labels, known = BINARY.encode(y)
  # No label is known: the loss is 0 and never falls.
  batches = iter([(x, labels, 0 * known)] * 99)
  plan = protocols.plan_training(config, 8)
  fitted = fit.fit(
    probe,
    plan,
    lambda _: batches,
    lambda trained, pause: 0.0,
    seed=0,
  )
  # One best round, two without gain, then half the rate.
  assert fitted.num_rounds == plan.least_rounds == 3


def test_steps_equal_pytorchs_adam_with_the_papers_betas():
  x, y = drawn(32, 0)
  config = eval_far.get_config().paper
  probe = learner.linear_probe(BINARY, 16, config, sharding.make_mesh(), 0)
  state = probe.begin()
  theirs = torch.nn.Linear(16, 2)
  start = jax.tree.map(np.array, state["trained"])["linear"]
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(start["kernel"].T))
    theirs.bias.copy_(torch.tensor(start["bias"]))
  adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.5, 0.9))
  labels, known = BINARY.encode(y)
  for _ in range(5):
    state, loss = probe.step(
      state, x, labels, known, jax.random.key(0), np.float32(1e-2)
    )
    adam.zero_grad()
    their_loss = torch.nn.functional.binary_cross_entropy_with_logits(
      theirs(torch.tensor(x)), torch.tensor(labels)
    )
    their_loss.backward()
    adam.step()
    assert float(loss) == pytest.approx(float(their_loss.detach()), rel=1e-5)
  np.testing.assert_allclose(
    state["trained"]["linear"]["kernel"],
    theirs.weight.detach().numpy().T,
    atol=1e-5,
  )


def test_rates_decay_from_the_last_layer_to_the_first():
  params = {
    "encoder": {
      "patch_embedding": {"kernel": jnp.ones((4, 2))},
      "transformer": {
        "blocks": {i: {"kernel": jnp.ones((2, 2))} for i in range(3)}
      },
      "norm": {"scale": jnp.ones(2)},
    },
    "head": {"linear": {"kernel": jnp.ones((2, 1))}},
  }
  found = protocols.layer_factors(params, depth=3, decay=0.5)
  encoder = found["encoder"]
  assert encoder["patch_embedding"]["kernel"] == 0.5**4
  blocks = encoder["transformer"]["blocks"]
  assert [blocks[i]["kernel"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
  assert encoder["norm"]["scale"] == found["head"]["linear"]["kernel"] == 1


def test_an_order_visits_all_examples_before_repeating_any():
  order = clip_batches.Order(np.arange(10, 17), 0)
  rows = np.concatenate([order.rows(step, 5) for step in range(7)])
  for first in range(0, 35, 7):
    assert sorted(rows[first : first + 7]) == list(range(10, 17))
  assert rows[:7].tolist() != rows[7:14].tolist()


def test_windows_are_spread_over_each_video():
  owners = np.array([0] * 9 + [2] + [5] * 4)
  chosen = clip_batches.spread_windows(owners, 3)
  assert chosen.tolist() == [1, 4, 7, 9, 10, 12, 13]
  every = clip_batches.spread_windows(owners, 0)
  np.testing.assert_array_equal(every, np.arange(14))


def test_pairs_are_of_one_person_where_both_kinds_are_known():
  examples = np.arange(10, 22)
  # Person d has no negative example.
  people = [*"aabbccdd", *"aabb"]
  is_positive = np.array([1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0], bool)
  order = clip_batches.PairedOrder(examples, is_positive, people, 0)
  rows = np.concatenate([order.rows(step, 4) for step in range(14)])
  positives, negatives = rows[::2] - 10, rows[1::2] - 10
  assert is_positive[positives].all()
  assert not is_positive[negatives].any()
  # Each pass over the positive examples shows all of them.
  for first in range(0, 28, 7):
    seen = positives[first : first + 7]
    assert sorted(seen) == np.flatnonzero(is_positive).tolist()
  partners = {person: set() for person in "abcd"}
  for positive, negative in zip(positives, negatives, strict=True):
    partners[people[positive]].add(people[negative])
  assert [partners[person] for person in "abc"] == [{"a"}, {"b"}, {"c"}]
  assert len(partners["d"]) > 1
  # A function of the step.
  np.testing.assert_array_equal(order.rows(3, 4), rows[12:16])


# --- Networks -----------------------------------------------------------------


def test_deeper_branches_are_dropped_more_often():
  keep = vit.drop_path(jax.random.key(0), 0.5, 5, 4000)
  assert keep.shape == (5, 2, 4000)
  np.testing.assert_array_equal(keep[0], 1)
  dropped = (keep == 0).mean(axis=(1, 2))
  np.testing.assert_allclose(dropped, np.linspace(0, 0.5, 5), atol=0.02)
  np.testing.assert_allclose(keep.mean(axis=(1, 2)), 1, atol=0.05)


def test_a_dropped_branch_keeps_its_input():
  size = vit.Size(width=8, depth=2, num_heads=2, mlp_dim=16)
  stack = vit.Transformer(size, vit.Execution(), 1e-5, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (3, 4, 8))
  keep = jnp.ones((2, 2, 3)).at[:, :, 1].set(0)
  y = stack(x, keep=keep)
  np.testing.assert_array_equal(y[1], x[1])
  np.testing.assert_allclose(y[::2], stack(x)[::2], atol=1e-6)


def test_the_attentive_head_equals_pytorchs_attention_with_one_query():
  head = heads.AttentiveHead(8, 3, nnx.Rngs(0), num_heads=2)
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
  kernels = [np.eye(8), head.key.kernel[...], head.value.kernel[...]]
  with torch.no_grad():
    theirs.in_proj_weight.copy_(
      torch.tensor(np.concatenate([np.array(k).T for k in kernels]))
    )
    theirs.in_proj_bias.zero_()
    theirs.out_proj.weight.copy_(torch.tensor(np.array(head.out.kernel[...]).T))
    query = torch.tensor(np.array(head.query[...])).expand(2, 1, 8)
    seen, _ = theirs(query, torch.tensor(x), torch.tensor(x))
    y = torch.nn.functional.layer_norm(query + seen, (8,))[:, 0].numpy()
  expected = y @ np.array(head.linear.kernel[...]) + head.linear.bias[...]
  np.testing.assert_allclose(head(jnp.asarray(x)), expected, atol=1e-5)


# --- Windows and thresholds ---------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "class"])
def test_the_auc_of_windows_equals_sklearns(kind):
  np_rng = np.random.default_rng(0)
  names = ("a", "b", "c")
  task = Task("t", "t", kind, names)
  p = np_rng.dirichlet(np.ones(3), 60)
  owners = np.repeat(np.arange(20), 3)
  if kind == "class":
    targets = np.arange(20) % 3.0
    labels = targets[owners, None] == np.arange(3)
  else:
    targets = np_rng.integers(0, 2, (20, 3)).astype(np.float64)
    labels = targets[owners]
  videos = measures.Predictions(
    [f"v{i}" for i in range(20)],
    [f"p{i // 2}" for i in range(20)],
    targets,
    p[::3],
  )
  found, draws = measures.window_auc(task, videos.of_windows(p, owners), 50)
  assert found["value"] == pytest.approx(roc_auc_score(labels, p))
  assert found["low"] < found["value"] < found["high"]
  assert draws.shape == (50,)


def test_thresholds_come_from_validation_except_under_the_papers_protocol():
  targets = np.array([[0.0], [0], [0], [0], [1]])
  p = np.array([[0.1], [0.1], [0.1], [0.2], [0.3]])
  found = measures.Predictions(["v"] * 5, ["p"] * 5, targets, p)
  task = Task("hat", "hat", "binary", ("hat",))
  assert measures.thresholds(task, found, "default")[0] == pytest.approx(0.25)
  assert measures.thresholds(task, found, "paper")[0] == 0.5
