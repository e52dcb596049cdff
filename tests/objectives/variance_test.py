"""Variance and covariance, against a PyTorch transcription of VICReg."""

import jax
import numpy as np
import pytest
import torch

from configs import pretrain_b
from marlin_jax.objectives import variance
from marlin_jax.pretraining import build
from marlin_jax.training.configuration import ConfigError
from tests.support import layouts, objectives


def vicreg(x):
  """Variance and covariance terms, as in section 4.1 of the paper."""
  std = torch.sqrt(x.var(dim=0) + 1e-4)
  x = x - x.mean(dim=0)
  cov = (x.T @ x) / (len(x) - 1)
  off = cov - torch.diag(torch.diag(cov))
  return torch.relu(1 - std).mean(), off.pow(2).sum() / x.shape[1]


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_both_terms_and_their_gradients_are_vicregs(scale):
  x = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
  x = scale * x * np.linspace(0.1, 1, 9, dtype=np.float32)
  theirs = torch.tensor(x, requires_grad=True)
  for i, want in enumerate(vicreg(theirs)):
    got, grad = jax.value_and_grad(
      lambda x, i=i: variance.variance_and_covariance(x)[i]
    )(x)
    np.testing.assert_allclose(got, want.item(), rtol=1e-4, atol=1e-7)
    (want_grad,) = torch.autograd.grad(want, theirs, retain_graph=True)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-3, atol=1e-6)


def test_collapsed_features_have_finite_gradients_away_from_it():
  x = np.ones((4, 5), np.float32)
  value, grad = jax.value_and_grad(
    lambda x: variance.variance_and_covariance(x)[0]
  )(x)
  assert value == pytest.approx(0.99, abs=1e-3)
  assert np.isfinite(grad).all()


def experiment(**overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(
    layouts.SMALL | objectives.CLIP | {"adv.weight": 0.0} | overrides
  )
  return build.Experiment(config, 10)


def test_flops_are_those_that_xla_counts():
  found, ours = [], []
  for weight in (0.0, 1.0):
    made = experiment(
      **{"model.width": 512, "model.num_heads": 2, "variance.weight": weight}
    )
    count = made.lower_step().cost_analysis()["flops"]
    found.append(count / made.batch_size)
    ours.append(made.flops_per_clip)
  # Squares of the covariances and of the spread, which are no products.
  assert found[1] - found[0] == pytest.approx(ours[1] - ours[0], rel=0.3)


def test_one_clip_is_refused():
  made = experiment(**{"variance.weight": 1.0, "clips_per_device": 1})
  with pytest.raises(ConfigError, match="microbatch: 1, expected at least 2"):
    made.lower_step()
