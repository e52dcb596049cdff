"""Losses against NumPy."""

import jax
import numpy as np
import pytest

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
  scores = losses.flat_patches(tokens, masked)
  own = float(scores["loss_own_colour"])
  colours = tokens.reshape(4, 7, 3, 8)
  assert own == pytest.approx(colours.var(-1).mean(), rel=1e-5)
  loss = losses.batch_colour_loss(own, scores["colour_sums"], 4)
  assert loss == pytest.approx(colours.var((0, 3)).mean(), rel=1e-5)


def test_the_batch_colour_is_of_all_clips_and_scored_where_masked():
  """In parts of any size: the sums of the parts are those of the batch."""
  np_rng = np.random.default_rng(1)
  tokens = np_rng.uniform(size=(4, 7, 3 * 8)).astype(np.float32)
  masked = np.stack([np_rng.permutation(7)[:5] for _ in range(4)])
  colours = tokens.reshape(4, 7, 3, 8)
  errors = np.square(colours - colours.mean((0, 3), keepdims=True))
  errors = errors.mean((2, 3))
  want = np.take_along_axis(errors, masked, axis=1).mean()
  for num_parts in (1, 2, 4):
    parts = [
      losses.flat_patches(*part)
      for part in zip(
        np.split(tokens, num_parts), np.split(masked, num_parts), strict=True
      )
    ]
    own = np.mean([part["loss_own_colour"] for part in parts])
    sums = sum(np.asarray(part["colour_sums"]) for part in parts)
    found = losses.batch_colour_loss(own, sums, 4)
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
  ("of_clip", "of_token", "share"), [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0)]
)
def test_features_that_name_the_clip_have_a_clip_share_of_one(
  of_clip, of_token, share
):
  np_rng = np.random.default_rng(0)
  encoded = (
    5
    + of_clip * np_rng.normal(size=(64, 1, 8))
    + of_token * np_rng.normal(size=(64, 200, 8))
  )
  means, square = encoded.mean(axis=1), np.square(encoded).mean()
  assert losses.clip_share(means, square) == pytest.approx(share, abs=0.02)
  between = encoded.mean(1).var(0).sum() / encoded.var((0, 1)).sum()
  assert losses.clip_share(means, square) == pytest.approx(between)


def test_equal_features_have_no_clip_share():
  assert losses.clip_share(np.full((2, 4), 0.5), 0.25) == 0
