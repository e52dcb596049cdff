"""Clips that `Marlin` takes, and those that it refuses with a reason."""

import numpy as np
import pytest
import torch
from flax import nnx

from marlin_jax import Marlin
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import of_modules

SIZE = 32


@pytest.fixture(scope="module")
def marlin():
  architecture = Architecture(
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=16,
    num_frames=4,
    image_size=SIZE,
    patch_size=16,
  )
  params = nnx.to_pure_dict(nnx.state(architecture.make_autoencoder()))
  return Marlin(of_modules(architecture, params))


@pytest.fixture
def clips():
  shape = (2, 4, SIZE, SIZE, 3)
  return np.random.default_rng(0).random(shape, np.float32)


@pytest.mark.parametrize("dtype", [">f4", ">f2"])
def test_the_byte_order_does_not_matter(marlin, clips, dtype):
  swapped = clips.astype(dtype)
  native = marlin.extract_features(swapped.astype(dtype.replace(">", "<")))
  for _ in range(2):  # before and after the shape was compiled
    np.testing.assert_array_equal(marlin.extract_features(swapped), native)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_clips_are_refused(marlin, clips, dtype):
  none = clips[:0].astype(dtype)
  for function in (marlin.extract_features, marlin.attention_maps):
    with pytest.raises(ValueError, match="no clips"):
      function(none)


@pytest.mark.parametrize(
  ("wrap", "words"),
  [(list, r"builtins\.list.*np\.stack"), (torch.from_numpy, r"\.numpy\(\)")],
)
def test_what_is_no_array_is_refused(marlin, clips, wrap, words):
  with pytest.raises(ValueError, match=words):
    marlin.extract_features(wrap(clips))


def test_a_batch_has_at_least_one_clip(marlin):
  with pytest.raises(ValueError, match="batch_size=-1"):
    marlin.extract_video("none.mp4", batch_size=-1)
