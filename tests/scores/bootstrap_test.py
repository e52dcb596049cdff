"""Bootstrap intervals: coverage and groups."""

import functools

import numpy as np

from marlin_jax.scores import binary, bootstrap


def measure(values):
  return lambda weights: {"mean": values @ weights / weights.sum(0)}


def test_intervals_have_their_nominal_coverage():
  np_rng = np.random.default_rng(0)
  covered = 0
  for seed in range(200):
    values = np_rng.normal(size=60)
    draws = bootstrap.draws(
      measure(values), [str(i) for i in range(60)], num_resamples=200, seed=seed
    )
    low, high = bootstrap.interval(draws["mean"])
    covered += low < 0 < high
  assert 0.88 < covered / 200 < 0.99


def test_means_over_labels_cover_where_a_label_is_of_few_people():
  """With a fixed set of labels the same intervals cover 74 of 100 times."""
  prevalence = np.array([0.4, 0.3, 0.5, 0.035, 0.035])
  distance = np.array([2, 2, 2, 0.2, 0.2])
  auc = np.array([0.9214, 0.9214, 0.9214, 0.5562, 0.5562])
  np_rng = np.random.default_rng(0)
  people = [str(i) for i in range(60)]
  covered = 0
  for _ in range(100):
    targets = (np_rng.random((60, 5)) < prevalence).astype(float)
    outputs = np_rng.normal(size=(60, 5)) + distance * targets
    p = 1 / (1 + np.exp(-outputs))
    measure = functools.partial(binary.scores, targets, p, 0.5)
    draws = bootstrap.draws(measure, people, num_resamples=100)
    low, high = bootstrap.interval(draws["auc"])
    covered += low < auc[targets.any(axis=0)].mean() < high
  assert covered >= 80


def test_the_bootstrap_draws_people_not_videos():
  np_rng = np.random.default_rng(0)
  # Ten identical videos of each person.
  values = np.repeat(np_rng.normal(size=20), 10)
  people = np.repeat(np.arange(20), 10).astype(str)
  videos = np.arange(200).astype(str)
  by_person = bootstrap.draws(measure(values), people, num_resamples=500)
  by_video = bootstrap.draws(measure(values), videos, num_resamples=500)
  width = {
    k: np.ptp(bootstrap.interval(v["mean"]))
    for k, v in (("person", by_person), ("video", by_video))
  }
  assert 2.5 < width["person"] / width["video"] < 4  # sqrt(10)


def test_one_person_gives_no_interval():
  draws = bootstrap.draws(measure(np.ones(5)), ["a"] * 5, num_resamples=10)
  assert np.isnan(bootstrap.interval(draws["mean"])).all()


def test_draws_of_the_same_people_are_paired():
  """A constant difference between two encoders has an interval of width 0."""
  values = np.random.default_rng(0).normal(size=60)
  people = [str(i // 2) for i in range(60)]
  one, two = (
    bootstrap.draws(measure(v), people, num_resamples=50)["mean"]
    for v in (values, values + 0.1)
  )
  np.testing.assert_allclose(two - one, 0.1)
  assert np.std(one) > 0.05
