"""The learning-rate schedule, and the rates that both players get."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from marlin_jax.pretraining import build
from marlin_jax.pretraining.schedules import learning_rate


def make(**changes):
  values = {
    "base_lr": 1.5e-4,
    "min_lr": 1e-5,
    "warmup_ratio": 0.02,
    "batch_size": 32,
    "num_steps": 1000,
  }
  return learning_rate(**values | changes)


def test_it_rises_to_the_scaled_rate_and_falls_to_the_scaled_minimum():
  rates = np.array([float(make()(step)) for step in range(1001)])
  np.testing.assert_allclose(rates[19:21], 1.5e-4 / 8, rtol=1e-5)
  np.testing.assert_allclose(rates[1000], 1e-5 / 8, rtol=1e-5)
  assert rates[0] > 0
  assert (np.diff(rates[:20]) > 0).all()
  assert (np.diff(rates[20:]) < 0).all()
  # Halfway the cosine is the mean of both ends.
  np.testing.assert_allclose(rates[510], (1.5e-4 + 1e-5) / 16, rtol=1e-4)


def test_without_warm_up_it_starts_at_the_top():
  np.testing.assert_allclose(make(warmup_ratio=0)(0), 1.5e-4 / 8, rtol=1e-6)


# --- both players -------------------------------------------------------------

NUM_STEPS = 20
PARAMS = {"weight": jnp.ones(()), "other": jnp.ones(3)}


def experiment(num_steps=NUM_STEPS, **changes):
  config = quickstart.get_config()
  config.optim.warmup_ratio = 0.25
  config.update_from_flattened_dict(changes)
  return config, build.Experiment(config, num_steps)


def rates_of_updates(optimizer, num_updates):
  """Returns the rate of each update, and the state after each.

  Adam's update for a gradient that is always the same is the learning rate.
  """
  update = jax.jit(optimizer.update)
  opt_state, rates, states = optimizer.init(PARAMS), [], []
  for _ in range(num_updates):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, opt_state = update(grads, opt_state, PARAMS)
    rates.append(-float(updates["weight"]))
    states.append(opt_state)
  return np.array(rates), states


@pytest.mark.parametrize(("d_steps", "g_steps"), [(1, 1), (3, 2)])
def test_every_update_of_a_step_has_the_rate_of_the_step(d_steps, g_steps):
  config, made = experiment(**{"adv.d_steps": d_steps, "adv.g_steps": g_steps})
  schedule = build.make_schedule(config.optim, config.batch_size, NUM_STEPS)
  want = np.array([float(schedule(step)) for step in range(NUM_STEPS)])
  rates, states = rates_of_updates(made.trainer.optimizer, NUM_STEPS * g_steps)
  disc_rates, disc_states = rates_of_updates(
    made.trainer.disc_optimizer, NUM_STEPS * d_steps
  )
  np.testing.assert_allclose(rates, np.repeat(want, g_steps), rtol=1e-5)
  np.testing.assert_allclose(disc_rates, np.repeat(want, d_steps), rtol=1e-5)
  logged = [
    made.learning_rates(
      types.SimpleNamespace(opt_state=state, disc_opt_state=disc_state)
    )
    for state, disc_state in zip(
      states[g_steps - 1 :: g_steps],
      disc_states[d_steps - 1 :: d_steps],
      strict=True,
    )
  ]
  for name in ("lr", "lr_disc"):
    np.testing.assert_allclose([row[name] for row in logged], want, rtol=1e-6)


def test_without_a_discriminator_one_rate_is_logged():
  _, made = experiment(**{"adv.weight": 0.0})
  opt_state = made.trainer.optimizer.init(PARAMS)
  state = types.SimpleNamespace(opt_state=opt_state, disc_opt_state=None)
  assert made.learning_rates(state).keys() == {"lr"}


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_with_one_update_a_step_all_bits_are_those_of_adamw(decay):
  """Checkpoints of runs from before resume to the same bits."""
  config, made = experiment(**{"optim.weight_decay": decay})
  optim = config.optim
  reference = optax.adamw(
    build.make_schedule(config.optim, config.batch_size, NUM_STEPS),
    b1=optim.b1,
    b2=optim.b2,
    eps=optim.eps,
    weight_decay=decay,
    mu_dtype=optim.mu_dtype,
  )
  _, (*_, want) = rates_of_updates(reference, NUM_STEPS)
  for optimizer in (made.trainer.optimizer, made.trainer.disc_optimizer):
    _, (*_, got) = rates_of_updates(optimizer, NUM_STEPS)
    # Names of the arrays in a checkpoint.
    names = [
      [jax.tree_util.keystr(path) for path, _ in leaves]
      for leaves in map(jax.tree_util.tree_leaves_with_path, (got, want))
    ]
    assert names[0] == names[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)


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
