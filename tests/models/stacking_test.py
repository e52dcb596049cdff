"""Parameters block by block and joined, and checkpoints of either."""

import jax
import numpy as np
import optax
import pytest

from marlin_jax.devices import sharding
from marlin_jax.models import stacking
from marlin_jax.training import checkpoint

# More than ten: '10' comes before '2' where names are sorted as text.
DEPTH = 11


def state(by_name=False):
  """Parameters and Adam's moments, block by block."""
  kernels = np.random.default_rng(0).normal(size=(DEPTH, 8, 3))
  kernels = kernels.astype(np.float32)
  params = {
    "norm": {"scale": np.ones(3, np.float32)},
    "encoder": {
      "blocks": {
        str(i) if by_name else i: {"out": {"kernel": kernels[i]}}
        for i in range(DEPTH)
      }
    },
  }
  return {"params": params, "opt_state": optax.adam(0.1).init(params)}


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_joining_and_splitting_undo_each_other():
  apart = state()
  joined = stacking.join(apart)
  kernel = joined["params"]["encoder"]["blocks"]["out"]["kernel"]
  assert kernel.shape == (DEPTH, 8, 3)
  assert stacking.are_joined(joined)
  assert not stacking.are_joined(apart)
  assert_equal(stacking.split(joined), apart)
  assert_equal(stacking.join(joined), joined)
  assert_equal(stacking.in_form_of(joined, apart), joined)
  assert_equal(stacking.in_form_of(apart, joined), apart)


def test_the_names_of_a_file_are_numbers():
  assert not stacking.are_joined(state(by_name=True))
  assert_equal(stacking.join(state(by_name=True)), stacking.join(state()))
  assert_equal(stacking.split(state(by_name=True)), state())


def test_a_tree_without_blocks_is_left_alone():
  tree = {"hidden": {"kernel": np.ones(3)}, "count": 1}
  assert not stacking.are_joined(tree)
  assert_equal(stacking.join(tree), tree)
  assert_equal(stacking.split(tree), tree)


@pytest.mark.parametrize("saved_joined", [False, True])
def test_a_run_can_go_on_with_scan_the_other_way(tmp_path, saved_joined):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  apart, joined = state(), stacking.join(state())
  saved, like = (joined, apart) if saved_joined else (apart, joined)
  layout = sharding.lay_out(mesh, like, {"encoder": 1})
  checkpoints = checkpoint.Checkpoints(str(tmp_path / "checkpoints"), keep=1)
  checkpoints.save(1, saved, {})
  checkpoints.wait()
  got = checkpoints.restore(1, like, layout.shardings, {})
  checkpoints.close()
  assert_equal(got, like)
  assert jax.tree.map(lambda x: x.sharding, got) == layout.shardings
