"""Separate and stacked parameters of blocks, and checkpoints of either."""

import jax
import numpy as np
import optax
import pytest

from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.devices import sharding
from marlin_jax.models import stacking

# More than ten, because '10' sorts before '2' as text.
DEPTH = 11


def state(by_name=False):
  """Returns parameters and Adam's moments of separate blocks."""
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
  separate = state()
  stacked = stacking.stack(separate)
  kernel = stacked["params"]["encoder"]["blocks"]["out"]["kernel"]
  assert kernel.shape == (DEPTH, 8, 3)
  assert stacking.are_stacked(stacked)
  assert not stacking.are_stacked(separate)
  assert_equal(stacking.unstack(stacked), separate)
  assert_equal(stacking.stack(stacked), stacked)
  assert_equal(stacking.in_form_of(stacked, separate), stacked)
  assert_equal(stacking.in_form_of(separate, stacked), separate)


def test_the_names_of_a_file_are_numbers():
  assert not stacking.are_stacked(state(by_name=True))
  assert_equal(stacking.stack(state(by_name=True)), stacking.stack(state()))
  assert_equal(stacking.unstack(state(by_name=True)), state())


def test_a_tree_without_blocks_is_left_alone():
  tree = {"hidden": {"kernel": np.ones(3)}, "count": 1}
  assert not stacking.are_stacked(tree)
  assert_equal(stacking.stack(tree), tree)
  assert_equal(stacking.unstack(tree), tree)


@pytest.mark.parametrize("saved_stacked", [False, True])
def test_a_run_can_go_on_with_scan_the_other_way(tmp_path, saved_stacked):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  separate, stacked = state(), stacking.stack(state())
  saved, like = (stacked, separate) if saved_stacked else (separate, stacked)
  layout = sharding.lay_out(mesh, like, {"encoder": 1})
  checkpoints = Checkpoints(str(tmp_path / "checkpoints"), keep=1)
  checkpoints.save(1, saved, {})
  checkpoints.wait()
  got = checkpoints.restore(1, like, layout.shardings, {})
  checkpoints.close()
  assert_equal(got, like)
  assert jax.tree.map(lambda x: x.sharding, got) == layout.shardings
