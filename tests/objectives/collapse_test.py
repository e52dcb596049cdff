"""The signs of collapse, against NumPy."""

import jax
import numpy as np
import pytest

from marlin_jax.objectives import collapse


@pytest.mark.parametrize("num_rows", [6, 40])
def test_std_and_rank_are_those_of_the_covariance(num_rows):
  np_rng = np.random.default_rng(0)
  x = np_rng.normal(size=(num_rows, 12)) * np.linspace(0.1, 3, 12) + 5
  found = collapse.spread(x.reshape(2, -1, 12).astype(np.float32))
  values = np.linalg.eigvalsh(np.cov(x.T, ddof=0))
  np.testing.assert_allclose(found["features_std"], x.std(0).mean(), rtol=1e-4)
  np.testing.assert_allclose(
    found["features_rank"],
    values.sum() ** 2 / np.square(values).sum(),
    rtol=1e-4,
  )


def test_collapsed_features_are_seen():
  np_rng = np.random.default_rng(0)
  same = np.tile(np_rng.normal(size=8).astype(np.float32), (50, 1))
  assert collapse.spread(same)["features_std"] < 1e-6
  # Features that differ along one direction alone.
  line = same + np_rng.normal(size=(50, 1)).astype(np.float32)
  assert collapse.spread(line)["features_rank"] == pytest.approx(1, abs=1e-3)
  full = np_rng.normal(size=(5000, 8)).astype(np.float32)
  assert collapse.spread(full)["features_rank"] == pytest.approx(8, rel=0.02)


def test_no_gradient_flows():
  x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  for name in ("features_std", "features_rank"):
    grad = jax.grad(lambda x, n=name: collapse.spread(x)[n])(x)
    assert not grad.any()
