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


@pytest.mark.parametrize("scan", [False, True])
def test_features_of_the_middle_are_those_of_the_first_blocks(scan):
  architecture = Architecture(
    width=8, depth=3, num_heads=2, mlp_dim=16, num_frames=2, patch_size=56
  )
  encoder = architecture.make_autoencoder(rngs=nnx.Rngs(0), scan=scan)
  x = jax.random.uniform(jax.random.key(0), (2, 2, 224, 224, 3))
  encoded = encoder.embed(clip_features.to_tokens(x, architecture))
  plain = architecture.make_autoencoder(rngs=nnx.Rngs(0))
  for num_blocks, block in enumerate(plain.transformer.blocks, 1):
    encoded = block(encoded)
    found = clip_features.features(
      encoder, architecture, x, keep_seq=True, num_blocks=num_blocks
    )
    np.testing.assert_allclose(found, encoder.norm(encoded), atol=1e-5)
  whole = clip_features.features(encoder, architecture, x, keep_seq=True)
  np.testing.assert_allclose(found, whole, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_blocks_that_the_encoder_lacks_are_refused(num_blocks):
  architecture = Architecture(width=8, depth=3, num_heads=2, mlp_dim=16)
  with pytest.raises(ValueError, match="expected 1 to 3"):
    clip_features.check_num_blocks(num_blocks, architecture)


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
