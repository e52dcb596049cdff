"""The learning-rate schedule."""

import numpy as np

from marlin_jax.pretraining.schedules import learning_rate


def make(**changes):
  values = {
    "base_lr": 1.5e-4,
    "min_lr": 1e-5,
    "warmup_ratio": 0.02,
    "batch_size": 32,
    "num_steps": 1000,
  }
  return learning_rate(**values | changes)


def test_it_rises_to_the_scaled_rate_and_falls_to_the_scaled_minimum():
  rates = np.array([float(make()(step)) for step in range(1001)])
  np.testing.assert_allclose(rates[19:21], 1.5e-4 / 8, rtol=1e-5)
  np.testing.assert_allclose(rates[1000], 1e-5 / 8, rtol=1e-5)
  assert rates[0] > 0
  assert (np.diff(rates[:20]) > 0).all()
  assert (np.diff(rates[20:]) < 0).all()
  # Halfway the cosine is the mean of both ends.
  np.testing.assert_allclose(rates[510], (1.5e-4 + 1e-5) / 16, rtol=1e-4)


def test_without_warm_up_it_starts_at_the_top():
  np.testing.assert_allclose(make(warmup_ratio=0)(0), 1.5e-4 / 8, rtol=1e-6)
