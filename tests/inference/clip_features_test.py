"""Features of a clip that keep where things are."""

import jax
import numpy as np
import pytest
from flax import nnx

from marlin_jax.inference import clip_features
from marlin_jax.weights.architecture import Architecture


@pytest.mark.parametrize(("patch", "cells"), [(16, 4), (112, 2)])
def test_grid_features_are_means_over_the_cells(patch, cells):
  architecture = Architecture(
    width=8, depth=1, num_heads=2, mlp_dim=16, num_frames=4, patch_size=patch
  )
  encoder = architecture.make_autoencoder(rngs=nnx.Rngs(0))
  video = jax.random.uniform(jax.random.key(0), (2, 4, 224, 224, 3))
  found = clip_features.grid_features(encoder, architecture, video)
  tokens = np.asarray(
    clip_features.features(encoder, architecture, video, keep_seq=True)
  ).reshape(2, *architecture.tubelets.grid, 8)
  # 14 patches fall into cells of 4, 3, 4 and 3.
  side = architecture.tubelets.grid[1]
  bounds = np.searchsorted(
    np.arange(side) * cells // side, np.arange(cells + 1)
  )
  want = [
    tokens[:, :, top:end, left:right].mean(axis=(1, 2, 3))
    for top, end in zip(bounds, bounds[1:], strict=False)
    for left, right in zip(bounds, bounds[1:], strict=False)
  ]
  np.testing.assert_allclose(found, np.concatenate(want, axis=1), atol=1e-5)


def test_what_is_left_and_what_is_right_differ_only_on_the_grid():
  """Without positions the mean cannot tell a clip from its mirror."""
  architecture = Architecture(
    width=8, depth=0, num_heads=2, mlp_dim=16, num_frames=2, patch_size=56
  )
  encoder = architecture.make_autoencoder(rngs=nnx.Rngs(0))
  encoder.positions[...] = np.zeros_like(encoder.positions[...])
  video = np.zeros((1, 2, 224, 224, 3), np.float32)
  video[:, :, :, :112] = 1.0
  mean, other_mean = (
    clip_features.features(encoder, architecture, x)
    for x in (video, video[:, :, :, ::-1])
  )
  np.testing.assert_allclose(mean, other_mean, atol=1e-5)
  grid, other_grid = (
    clip_features.grid_features(encoder, architecture, x)
    for x in (video, video[:, :, :, ::-1])
  )
  assert np.abs(grid - other_grid).max() > 0.1
