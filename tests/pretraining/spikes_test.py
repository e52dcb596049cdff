"""Spikes: against NumPy, and how a step that is one is undone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marlin_jax.data.prepared_dataset import open_dataset
from marlin_jax.pretraining import spikes, train_step
from marlin_jax.training import skipped_steps
from tests.support.trainers import BATCH_SIZE, TUBELETS, make, step_of

SIGMAS = 6.0


def test_limits_are_those_of_the_last_steps():
  np_rng = np.random.default_rng(0)
  rows = np_rng.gamma(2.0, 1.0, (300, 2)).astype(np.float32)
  follow = jax.jit(spikes.follow, static_argnums=3)
  recent = spikes.no_steps()
  for i, row in enumerate(rows):
    metrics = dict(zip(spikes.METRICS, row, strict=True))
    recent, limits = follow(recent, metrics, jnp.bool_(True), SIGMAS)
    window = rows[max(i - spikes.WINDOW, 0) : i]
    expected = np.full(2, np.inf)
    if i >= spikes.LEAST:
      expected = window.mean(0) + SIGMAS * window.std(0)
    found = [limits[name] for name in spikes.METRICS]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_that_are_not_finite_are_not_remembered():
  recent, _ = spikes.follow(
    spikes.no_steps(),
    dict.fromkeys(spikes.METRICS, jnp.float32(np.nan)),
    jnp.bool_(False),
    SIGMAS,
  )
  assert recent["num"] == 0
  assert np.isfinite(recent["values"]).all()


def test_a_level_that_stays_high_is_soon_the_normal_one():
  recent = spikes.no_steps()
  num_spikes = 0
  for value in [1.0, 1.1] * 64 + [10.0] * 20:
    metrics = dict.fromkeys(spikes.METRICS, jnp.float32(value))
    recent, limits = spikes.follow(recent, metrics, jnp.bool_(True), SIGMAS)
    num_spikes += bool(value > limits["loss_rec"])
  assert 1 <= num_spikes <= 5


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  shape = (BATCH_SIZE, TUBELETS.num_frames, 64, 64, 3)
  return {
    "video": np_rng.integers(0, 256, shape, np.uint8),
    "regions": np.ones((BATCH_SIZE, *TUBELETS.grid), np.uint16),
  }


def test_a_spike_changes_neither_player_and_is_remembered(batch):
  trainer, state = make("random")
  trainer = dataclasses.replace(
    trainer,
    optimizer=optax.adamw(1e-2),
    disc_optimizer=optax.adamw(1e-2),
    ema_decay=0.9,
    spike_sigmas=SIGMAS,
  )
  state = train_step.init_state(
    trainer, state.params, state.fixed, state.disc_params
  )
  step, rng = step_of(trainer), jax.random.key(0)
  before, metrics = step(state, batch, rng)
  assert metrics["num_skipped"] == 0
  assert before.recent["num"] == 1
  # Steps with half the gradient.
  half = jnp.array([metrics["loss_rec"], metrics["grad_norm"] / 2])
  jitter = 1 + 0.01 * jnp.cos(jnp.arange(spikes.WINDOW))[:, None]
  before = before.replace(
    recent={"values": half * jitter, "num": jnp.int32(spikes.WINDOW + 3)}
  )
  after, metrics = step(before, batch, rng)
  assert metrics["num_skipped"] == after.num_skipped == 1
  assert metrics["grad_norm"] > metrics["grad_norm_limit"]
  assert after.step == 2
  kept = after.replace(
    step=before.step, num_skipped=before.num_skipped, recent=before.recent
  )
  jax.tree.map(np.testing.assert_array_equal, kept, before)
  np.testing.assert_array_equal(
    after.recent["values"][3], [metrics["loss_rec"], metrics["grad_norm"]]
  )
  assert after.recent["num"] == spikes.WINDOW + 4
  # With as few steps behind it, it is none.
  few = before.replace(
    recent=before.recent | {"num": jnp.int32(spikes.LEAST - 1)}
  )
  _, metrics = step(few, batch, rng)
  assert metrics["num_skipped"] == 0


def test_the_report_names_value_and_limit(sample_dataset):
  dataset = open_dataset(str(sample_dataset), "train")
  skipped = skipped_steps.SkippedSteps([dataset], max_in_row=3, num_before=0)
  scalars = {
    "num_skipped": 1,
    "loss_rec": 0.5,
    "loss_rec_limit": np.inf,
    "grad_norm": 7.0,
    "grad_norm_limit": 2.5,
  }
  skipped.follow(
    9, {k: jnp.float32(v) for k, v in scalars.items()}, jnp.zeros(4, jnp.int32)
  )
  skip = skipped.check()
  assert skip.not_finite == {}
  assert skip.spikes == {"grad_norm": (7.0, 2.5)}
  assert str(skip).startswith(
    "step 9 not applied: grad_norm 7 is above 2.5; clips of "
  )
