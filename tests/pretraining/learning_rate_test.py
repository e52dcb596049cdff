"""The learning-rate schedule, and the rates that both players get."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from marlin_jax.pretraining import build
from marlin_jax.pretraining.optimizer import learning_rate, make_schedule


def make(**changes):
  values = {
    "base_lr": 1.5e-4,
    "min_lr": 1e-5,
    "warmup_steps": 20,
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
  np.testing.assert_allclose(make(warmup_steps=0)(0), 1.5e-4 / 8, rtol=1e-6)


@pytest.mark.parametrize("cooldown_steps", [0, 100])
def test_a_constant_rate_falls_at_the_end_alone(cooldown_steps):
  schedule = make(cooldown_steps=cooldown_steps)
  rates = np.array([float(schedule(step)) for step in range(1000)])
  top = 1000 - cooldown_steps
  np.testing.assert_array_equal(
    rates[:20], [float(make()(step)) for step in range(20)]
  )
  np.testing.assert_allclose(rates[20:top], 1.5e-4 / 8, rtol=1e-6)
  np.testing.assert_allclose(
    rates[top:],
    np.linspace(1.5e-4, 1e-5, cooldown_steps, endpoint=False) / 8,
    rtol=1e-5,
  )
  # Before it falls, nothing depends on when it does.
  other = make(cooldown_steps=cooldown_steps, num_steps=5000)
  assert [float(other(step)) for step in (0, 10, top)] == [
    *rates[[0, 10]],
    rates[20],
  ]


def test_a_cool_down_longer_than_the_run_begins_after_the_warm_up():
  rates = [float(make(cooldown_steps=2000)(step)) for step in range(1000)]
  assert np.argmax(rates) == 20 - 1
  assert (np.diff(rates[20:]) < 0).all()


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
  schedule = make_schedule(config.optim, config.batch_size, NUM_STEPS)
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
    make_schedule(config.optim, config.batch_size, NUM_STEPS),
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
