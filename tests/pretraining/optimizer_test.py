"""What the optimiser does beside Adam: decay, clipping, layer-wise rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from marlin_jax.pretraining import build


def experiment(**changes):
  config = quickstart.get_config()
  config.update_from_flattened_dict(changes)
  return config, build.Experiment(config, 20)


def names_of(tree):
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


@pytest.mark.parametrize(
  "changes",
  [
    {"decay_params": "kernels", "weight_decay": 0.05},
    {"clip_norm": 1.0},
    {"layer_decay": 0.5},
  ],
)
def test_a_run_may_turn_a_setting_on_when_it_resumes(changes):
  """The state has the same arrays."""
  params = {"encoder": {"norm": {"scale": jnp.ones(3)}}}
  _, plain = experiment()
  _, changed = experiment(**{f"optim.{k}": v for k, v in changes.items()})
  want, got = (
    names_of(x.trainer.optimizer.init(params)) for x in (plain, changed)
  )
  assert got == want


def one_update(optimizer, grads, params):
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  return updates


@pytest.mark.parametrize(("norm", "limited"), [(5.0, 2.0), (1.0, 1.0)])
def test_a_gradient_is_scaled_down_to_the_limit(norm, limited):
  """Adam forgets the scale of a gradient, so its memory is looked at."""
  _, made = experiment(**{"optim.clip_norm": 2.0})
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  direction = {"a": jnp.array([0.6]), "b": jnp.array([-0.8])}
  for optimizer in (made.trainer.optimizer, made.trainer.disc_optimizer):
    grads = jax.tree.map(lambda x: norm * x, direction)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    memory = optax.tree.get(state, "mu")
    for name, x in direction.items():
      np.testing.assert_allclose(
        memory[name], (1 - 0.9) * limited * x, rtol=1e-5
      )


@pytest.mark.parametrize("scan", [False, True])
def test_rates_of_the_encoder_fall_from_the_last_block_to_the_first(scan):
  _, made = experiment(
    scan=scan, **{"optim.layer_decay": 0.5, "optim.weight_decay": 0.05}
  )
  _, plain = experiment(scan=scan, **{"optim.weight_decay": 0.05})
  depth = made.architecture.depth
  for params, optimizer, reference in (
    (
      made.shapes.params,
      made.trainer.optimizer,
      plain.trainer.optimizer,
    ),
    (
      made.shapes.disc_params,
      made.trainer.disc_optimizer,
      plain.trainer.disc_optimizer,
    ),
  ):
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    got, want = (
      jax.jit(one_update, static_argnums=0)(x, ones, ones)
      for x in (optimizer, reference)
    )
    ratios = jax.tree.leaves(jax.tree.map(jnp.divide, got, want))
    for name, ratio in zip(names_of(params), ratios, strict=True):
      expected = 1.0
      if name.startswith("encoder/patch_embedding/"):
        expected = 0.5 ** (depth + 1)
      elif name.startswith("encoder/transformer/blocks/"):
        if scan:
          expected = 0.5 ** np.arange(depth, 0, -1)
          ratio = ratio.reshape(depth, -1).T
        else:
          expected = 0.5 ** (depth - int(name.split("/")[3]))
      np.testing.assert_allclose(
        ratio, np.broadcast_to(expected, ratio.shape), rtol=1e-5, err_msg=name
      )


# --- Weight decay -------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_of_a_network_kernels_alone_decay(scan):
  _, made = experiment(
    scan=scan,
    **{"optim.weight_decay": 0.05, "optim.decay_params": "kernels"},
  )
  _, all_decay = experiment(scan=scan, **{"optim.weight_decay": 0.05})
  trainer, expected = made.trainer, all_decay.trainer
  for params, optimizer, reference in (
    (made.shapes.params, trainer.optimizer, expected.optimizer),
    (made.shapes.disc_params, trainer.disc_optimizer, expected.disc_optimizer),
  ):
    states = [jax.eval_shape(x.init, params) for x in (optimizer, reference)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    zeros, opt_state = (
      jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
      for tree in (params, states[0])
    )
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    updates, _ = jax.jit(optimizer.update)(zeros, opt_state, ones)
    decayed = {
      jax.tree_util.keystr(path, simple=True, separator="/"): bool(x.any())
      for path, x in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert len(set(decayed.values())) == 2
    for name, does_decay in decayed.items():
      assert does_decay == name.endswith("/kernel"), name


def test_kernels_decay_as_in_adamw():
  changes = {"optim.weight_decay": 0.05}
  _, all_decay = experiment(**changes)
  _, made = experiment(**changes | {"optim.decay_params": "kernels"})
  params = {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}
  grads = {"kernel": jnp.array([1.0, -1.0, 0.5]), "bias": jnp.ones(3)}
  got, want = (
    x.trainer.optimizer.update(grads, x.trainer.optimizer.init(params), params)[
      0
    ]
    for x in (made, all_decay)
  )
  np.testing.assert_array_equal(got["kernel"], want["kernel"])
  assert (np.abs(got["bias"]) < np.abs(want["bias"])).all()
