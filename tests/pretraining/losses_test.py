"""Losses against NumPy."""

import jax
import numpy as np

from marlin_jax.pretraining import losses


def test_the_gradient_penalty_of_a_linear_judge_is_known():
  """Its gradient is the weight vector at every point."""
  np_rng = np.random.default_rng(0)
  weights = np_rng.normal(size=(6, 1)).astype(np.float32)
  pred, target = np_rng.normal(size=(2, 3, 5, 6)).astype(np.float32)
  penalty = losses.gradient_penalty(
    lambda x: x @ weights, pred, target, jax.random.split(jax.random.key(0), 3)
  )
  want = (np.linalg.norm(weights) - 1) ** 2
  np.testing.assert_allclose(penalty, want, rtol=1e-5)


def test_the_players_want_opposite_scores():
  real, fake = np.full((2, 3, 1), 2.0), np.full((2, 3, 1), -1.0)
  assert losses.discriminator_loss(real, fake) == -3
  assert losses.generator_adversarial_loss(fake) == 1


def test_flat_patches_score_the_variance_they_leave():
  np_rng = np.random.default_rng(0)
  tokens = np_rng.normal(size=(4, 7, 3 * 8)).astype(np.float32)
  masked = np.tile(np.arange(7), (4, 1))
  scores = losses.flat_patch_losses(tokens, masked)
  colours = tokens.reshape(4, 7, 3, 8)
  np.testing.assert_allclose(
    scores["own_colour"], colours.var(-1).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    scores["batch_colour"], colours.var((0, 3)).mean(), rtol=1e-5
  )
