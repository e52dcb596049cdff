"""Faults of numbers and of progress: NaN, runaway players, hanging steps."""

import dataclasses
import os
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marlin_jax.data.prepared_dataset import RecordSource, open_dataset
from marlin_jax.devices import distributed
from marlin_jax.pretraining import masking, train_step
from marlin_jax.training import skipped_steps, watchdog
from tests.support.files import arrays_of, rows_of
from tests.support.processes import ROOT
from tests.support.trainers import (
  BATCH_SIZE,
  SAME_ROUNDING,
  TUBELETS,
  make,
  step_of,
)
from tests.support.training_runs import (
  TINY,
  command,
  finish,
  refused,
  start_two,
  train,
)

ADAM = optax.adamw(1e-2)


def with_adam(num_microbatches=1, ema_decay=0.0, **settings):
  """A trainer with the optimiser of the recipe, and its first state."""
  # The masking that is the quickest to compile.
  trainer, state = make("random", num_microbatches, **settings)
  trainer = dataclasses.replace(
    trainer, optimizer=ADAM, disc_optimizer=ADAM, ema_decay=ema_decay
  )
  return trainer, train_step.init_state(
    trainer, state.params, state.fixed, state.disc_params
  )


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  return {
    # Pixels as floats, so that one can be no number.
    "video": np_rng.uniform(0, 255, (BATCH_SIZE, 4, 64, 64, 3)).astype("f4"),
    "regions": np.ones((BATCH_SIZE, *TUBELETS.grid), np.uint16),
  }


def spoiled(batch):
  video = batch["video"].copy()
  video[1] = np.nan
  return batch | {"video": video}


# --- E1: NaN ------------------------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_batch_with_nan_changes_neither_player_nor_their_memory(
  batch, num_microbatches
):
  trainer, state = with_adam(num_microbatches, ema_decay=0.9)
  step = step_of(trainer)
  rng = jax.random.key(0)
  before, _ = step(state, batch, rng)
  after, metrics = step(before, spoiled(batch), rng)
  assert not np.isfinite(metrics["loss_rec"])
  assert metrics["num_skipped"] == after.num_skipped == 1
  assert after.step == 2
  kept = after.replace(step=before.step, num_skipped=before.num_skipped)
  jax.tree.map(np.testing.assert_array_equal, kept, before)
  # And the next one counts again.
  later, metrics = step(after, batch, rng)
  assert metrics["num_skipped"] == 1
  assert np.isfinite(metrics["loss_rec"])
  for name in ("params", "ema", "disc_params"):
    pairs = zip(
      jax.tree.leaves(getattr(later, name)),
      jax.tree.leaves(getattr(after, name)),
      strict=True,
    )
    assert any((a != b).any() for a, b in pairs), name


def test_a_gradient_too_large_for_its_square_is_not_applied(batch):
  """Adam would remember it as infinite for ever."""
  trainer, state = with_adam(weight=0.0)
  huge = batch | {"video": batch["video"] * 1e18}
  step = step_of(trainer)
  after, metrics = step(state, huge, jax.random.key(0))
  assert metrics["num_skipped"] == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


@pytest.fixture(scope="module")
def diverged(sample_dataset, tmp_path_factory):
  """A run whose first step throws it out of all bounds."""
  workdir = tmp_path_factory.mktemp("diverged")
  result = train(
    workdir,
    **{
      "data.path": sample_dataset,
      "adv.weight": 0,
      "optim.base_lr": 1e32,
      "optim.warmup_ratio": 0,
      "num_steps": 50,
      "checkpoint_steps": 1,
      "max_skipped_steps": 3,
    },
  )
  return workdir, result


def test_too_many_steps_without_a_finite_loss_end_the_run(diverged):
  workdir, result = diverged
  message = refused(result)
  assert "step 4 not applied" in message
  assert "last of 3 in a row" in message
  assert "optim.base_lr" in message
  for step in (2, 3):
    assert f"step {step} not applied: " in result.stdout
  assert "carphone_pristine.mp4#0." in result.stdout


def test_skipped_steps_are_in_the_metrics_with_their_clips(diverged):
  workdir, _ = diverged
  events = [row for row in rows_of(workdir) if row.get("event") == "skipped"]
  assert [event["step"] for event in events] == [2, 3]
  for event in events:
    assert len(event["clips"]) == TINY["batch_size"]
    assert event["not_finite"]["loss_rec"] in ("inf", "nan")


@pytest.mark.parametrize(("process", "num_reads"), [(0, 16), (1, 0)])
def test_the_clips_of_a_large_skipped_batch_are_not_all_read(
  sample_dataset, monkeypatch, process, num_reads
):
  dataset = open_dataset(str(sample_dataset), "train")
  reads = []
  read = RecordSource.read
  monkeypatch.setattr(
    RecordSource, "read", lambda *args: reads.append(args) or read(*args)
  )
  skipped = skipped_steps.SkippedSteps([dataset], max_in_row=3, num_before=0)
  scalars = {"num_skipped": jnp.int32(1), "loss_rec": jnp.float32(np.nan)}
  skipped.follow(7, scalars, jnp.zeros(4096, jnp.int32))
  monkeypatch.setattr(skipped_steps.jax, "process_index", lambda: process)
  skip = skipped.check()
  assert len(reads) == num_reads
  assert len(skip.clips) == 16
  assert "and 4092 more" in str(skip)
  assert (skip.clips[0] == "record 0") == (process == 1)


def test_what_a_diverging_run_saved_is_finite(diverged):
  workdir, _ = diverged
  steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert steps
  for step in steps:
    for name, array in arrays_of(workdir, step).items():
      assert np.isfinite(array).all(), (step, name)


# --- E2: nothing to see -------------------------------------------------------


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_clips_of_one_colour_give_finite_losses_and_gradients(grey):
  trainer, state = with_adam(norm_pix=True, gp_weight=10.0)
  video = np.full((BATCH_SIZE, 4, 64, 64, 3), grey, np.uint8)
  regions = np.ones((BATCH_SIZE, *TUBELETS.grid), np.uint16)
  batch = {"video": video, "regions": regions}
  after, metrics = step_of(trainer)(state, batch, jax.random.key(0))
  assert metrics["num_skipped"] == 0
  assert all(np.isfinite(value) for value in metrics.values())
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


@pytest.mark.parametrize("ratio", [1 / 32, 31 / 32])
def test_one_hidden_token_and_one_visible_token_are_enough(ratio):
  trainer, state = with_adam()
  masks = masking.Masking("random", ratio, TUBELETS.grid)
  assert 1 in (masks.num_visible, masks.num_tokens - masks.num_visible)
  task = dataclasses.replace(trainer.task, masking=masks)
  trainer = dataclasses.replace(trainer, task=task)
  np_rng = np.random.default_rng(0)
  batch = {
    "video": np_rng.integers(0, 256, (BATCH_SIZE, 4, 64, 64, 3), np.uint8),
    "regions": np.zeros((BATCH_SIZE, *TUBELETS.grid), np.uint16),
  }
  _, metrics = step_of(trainer)(state, batch, jax.random.key(0))
  assert metrics["num_skipped"] == 0
  assert metrics["loss_rec"] > 0


# --- E3: a discriminator out of bounds ----------------------------------------


def against_a_giant(num_microbatches=1, **settings):
  """Three steps against a discriminator of a million times the scores."""
  trainer, state = with_adam(num_microbatches, **settings)
  trainer = dataclasses.replace(trainer, disc_optimizer=optax.set_to_zero())
  state = train_step.init_state(
    trainer,
    state.params,
    state.fixed,
    jax.tree.map(lambda x: x * 1e3, state.disc_params),
  )
  np_rng = np.random.default_rng(0)
  batch = {
    "video": np_rng.integers(0, 256, (BATCH_SIZE, 4, 64, 64, 3), np.uint8),
    "regions": np.ones((BATCH_SIZE, *TUBELETS.grid), np.uint16),
  }
  step, rng, rows = step_of(trainer), jax.random.key(0), []
  for _ in range(20):
    state, metrics = step(state, batch, rng)
    rows.append(metrics)
  return rows


def test_a_runaway_discriminator_shows_in_the_metrics():
  rows = against_a_giant()
  assert rows[0]["adv_pull"] > 1000
  # Nothing is learned but what pleases it.
  assert rows[-1]["loss_rec"] > rows[0]["loss_rec"]


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_with_a_limit_reconstruction_is_learned_all_the_same(num_microbatches):
  rows = against_a_giant(num_microbatches, max_pull=0.1)
  assert rows[0]["adv_pull"] > 1000
  assert rows[-1]["loss_rec"] < 0.8 * rows[0]["loss_rec"]


@pytest.mark.slow
def test_a_limit_that_is_not_reached_changes_no_bit(batch):
  states = []
  for max_pull in (0.0, 1e6):
    trainer, state = with_adam(max_pull=max_pull)
    step = step_of(trainer, SAME_ROUNDING)
    state, metrics = step(state, batch, jax.random.key(0))
    assert 0 < metrics["adv_pull"] < 1e6
    states.append(state)
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_reconstruction_goes_on_without_the_game():
  rows = against_a_giant(weight=0.0)
  assert "adv_pull" not in rows[0]
  assert rows[-1]["loss_rec"] < 0.8 * rows[0]["loss_rec"]


# --- E4: steps that do not end ------------------------------------------------


def test_a_run_that_hangs_before_its_first_step_shows_where_and_ends(
  sample_dataset, tmp_path
):
  result = subprocess.run(
    command(
      tmp_path,
      ["tests/support/hanging.py"],
      **{
        "data.path": sample_dataset,
        "watchdog.dump_secs": 1,
        "watchdog.exit_secs": 2,
      },
    ),
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert result.returncode == distributed.TRY_AGAIN, result.stderr
  assert "opening the data has not ended for 1 s" in result.stderr
  assert "opening the data has not ended for 2 s" in result.stderr
  assert result.stderr.count("read_from_a_disk_that_does_not_answer") == 2
  assert "to resume from the last checkpoint" in result.stderr


def test_work_without_a_limit_is_not_ended(capfd):
  with watchdog.Watchdog(dump_secs=0.05, exit_secs=0) as guard:
    guard.alive("reading labels", is_limited=False)
    time.sleep(0.2)
    assert not capfd.readouterr().err
    guard.alive("step 1")
    time.sleep(0.2)
  assert "step 1 has not ended" in capfd.readouterr().err


def test_a_watchdog_that_is_told_never_to_bark_does_not():
  with watchdog.Watchdog(dump_secs=0, exit_secs=0) as guard:
    guard.alive("step 1")


@pytest.mark.slow
def test_a_run_that_waits_for_a_dead_process_ends_to_be_started_again(
  sample_dataset, tmp_path
):
  """And both find together that a step was not finite, before one dies."""
  first, second = start_two(
    tmp_path,
    **{
      "data.path": sample_dataset,
      "batch_size": 8,
      "num_steps": 100_000,
      "checkpoint_steps": 100_000,
      "mask.strategy": "random",
      "adv.weight": 0,
      "optim.base_lr": 1e32,
      "optim.warmup_ratio": 0,
      "max_skipped_steps": 100_000,
      # Longer than any step, or than compiling it, on a busy machine.
      "watchdog.dump_secs": 30,
      "watchdog.exit_secs": 45,
    },
  )
  seen = []
  for line in first.stdout:
    seen.append(line)
    if line.startswith("step 3/"):
      second.send_signal(signal.SIGSTOP)
      break
  output = finish(first, distributed.TRY_AGAIN, "".join(seen))
  second.kill()
  second.communicate()
  assert "step 2 not applied" in output
  # Of eight, four of them read by the other.
  assert "and 4 more" in output
  assert "has not ended for 45 s" in output
  assert "Thread 0x" in output
