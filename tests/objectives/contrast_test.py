"""Contrast between clips of a person, against a NumPy transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.devices import microbatches, sharding
from marlin_jax.objectives import contrast
from marlin_jax.pretraining import build, configuration, flops
from marlin_jax.training.configuration import ConfigError
from tests.support import layouts, made_dataset
from tests.support.training_runs import (
  metrics_of,
  refused,
  train,
  without_step_4,
)


def transcribed(projected, subject, num_together, temperature):
  """Returns loss and accuracy, clip by clip and pair by pair."""
  unit = projected / np.linalg.norm(projected, axis=1, keepdims=True)
  losses, found = [], []
  for i in range(len(unit)):
    first = i // num_together * num_together
    positives = [
      j
      for j in range(first, first + num_together)
      if j != i and subject[j] == subject[i]
    ]
    negatives = [j for j in range(len(unit)) if subject[j] != subject[i]]
    if not positives:
      continue
    score = {j: unit[i] @ unit[j] / temperature for j in range(len(unit))}
    total = sum(np.exp(score[j]) for j in negatives)
    losses.append(
      np.mean(
        [
          -np.log(np.exp(score[j]) / (np.exp(score[j]) + total))
          for j in positives
        ]
      )
    )
    best = max(positives + negatives, key=score.get)
    found.append(best in positives)
  return np.mean(losses), np.mean(found)


@pytest.mark.parametrize(
  ("subject", "num_together"),
  [
    ([0, 0, 1, 1, 2, 2, 3, 3], 2),
    ([0, 0, 0, 0, 1, 1, 1, 1], 4),
    # A person in two groups, and a clip that replaced an unreadable one.
    ([0, 0, 1, 1, 0, 0, 2, 5], 2),
  ],
)
def test_the_loss_is_that_of_the_formula(subject, num_together):
  np_rng = np.random.default_rng(0)
  projected = np_rng.normal(size=(8, 5))
  projected += np_rng.normal(size=(6, 5))[subject]
  found = contrast.info_nce(
    jnp.float32(projected), jnp.array(subject), num_together, 0.2
  )
  expected = transcribed(projected, subject, num_together, 0.2)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert 0 < expected[1] < 1


def test_one_pair_against_others_is_nt_xent():
  """With one positive a clip's loss is the cross-entropy of all others."""
  np_rng = np.random.default_rng(1)
  projected = jnp.float32(np_rng.normal(size=(6, 4)))
  subject = jnp.arange(6) // 2
  loss, _ = contrast.info_nce(projected, subject, 2, 0.1)
  unit = projected / jnp.linalg.norm(projected, axis=1, keepdims=True)
  logits = jnp.where(jnp.eye(6, dtype=bool), -jnp.inf, unit @ unit.T / 0.1)
  partner = jnp.arange(6) ^ 1
  expected = -jax.nn.log_softmax(logits)[jnp.arange(6), partner].mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_people_who_are_told_apart_cost_nothing():
  projected = jnp.float32(np.repeat(np.eye(4), 2, axis=0))
  loss, accuracy = contrast.info_nce(projected, jnp.arange(8) // 2, 2, 0.05)
  assert loss < 1e-6
  assert accuracy == 1
  # All alike: the partner is one of seven.
  loss, accuracy = contrast.info_nce(
    jnp.ones((8, 4)), jnp.arange(8) // 2, 2, 0.05
  )
  np.testing.assert_allclose(loss, np.log(7), rtol=1e-5)
  assert accuracy == 0


@pytest.mark.parametrize("subject", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_without_pairs_or_others_nothing_is_learned(subject):
  """Neither a loss nor a gradient that is not finite."""
  projected = jnp.float32(np.random.default_rng(0).normal(size=(4, 3)))
  loss, grad = jax.value_and_grad(
    lambda x: contrast.info_nce(x, jnp.array(subject), 2, 0.1)[0]
  )(projected)
  assert loss == 0
  assert not grad.any()


# --- in a step ----------------------------------------------------------------

NUM_CLIPS = 8
SMALL = layouts.SMALL | {
  "batch_size": NUM_CLIPS,
  "clips_per_device": NUM_CLIPS,
  "data.num_frames": 4,
  "data.frame_size": 64,
  "data.draws_per_unit": 2,
  "contrast.weight": 0.5,
}


def configured(**overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  return config


@pytest.mark.parametrize("num_together", [1, 2])
def test_microbatches_keep_clips_of_a_person_together(num_together):
  rows = {"row": np.arange(48).reshape(24, 2)}
  parts = microbatches.split(rows, 3, num_together)["row"][..., 0] // 2
  assert parts.shape == (3, 8)
  assert sorted(parts.ravel()) == list(range(24))
  for part in parts:
    assert len({row // num_together for row in part}) == 8 // num_together
    # Each of two devices, which has half of the rows, splits its own.
    assert sum(row // 12 for row in part) == 4


def test_flops_are_those_that_xla_counts():
  """By difference; XLA also counts the optimiser and the metrics."""
  sizes = {"model.width": 192, "contrast.dim": 96, "adv.weight": 0.0}
  sizes |= {"batch_size": 64, "clips_per_device": 64}
  counts = []
  for weight in (0.0, 1.0):
    config = configured(**sizes, **{"contrast.weight": weight})
    made = build.Experiment(config, 10)
    found = made.lower_step().cost_analysis()["flops"] / config.batch_size
    ours = flops.training_step(
      made.architecture, made.trainer, config.batch_size
    )
    counts.append((found, ours))
  (found_without, without), (found, ours) = counts
  assert found - found_without == pytest.approx(ours - without, rel=0.15)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"data.draws_per_unit": 1}, "data.draws_per_unit=1: expected at least 2"),
    (
      {
        "data.draws_per_unit": 1,
        "data.clips_per_record": 2,
        "data.sample_by": "record",
      },
      "data.sample_by='record': expected 'subject' or 'video'",
    ),
    (
      {"contrast.temperature": 0.0},
      "contrast.temperature=0.0: expected a value above",
    ),
    ({"contrast.dim": 0}, "contrast.dim=0: expected at least 1"),
  ],
)
def test_configurations_without_pairs_are_refused(overrides, words):
  with pytest.raises(ConfigError, match=words):
    configuration.validate(configured(**overrides))


def test_a_microbatch_of_one_person_is_refused():
  made = build.Experiment(configured(clips_per_device=2), 10)
  assert made.num_microbatches == 4
  with pytest.raises(ConfigError, match="microbatch: 2, expected at least 4"):
    made.lower_step()
  made = build.Experiment(configured(clips_per_device=5), 10)
  assert made.num_microbatches == 2


@pytest.mark.parametrize(
  ("overrides", "num_devices"),
  [
    ({"clips_per_device": 1}, 1),
    # Three clips, one and a half pairs, on each of two devices.
    ({"batch_size": 6, "clips_per_device": 2}, 2),
  ],
)
def test_fewer_clips_at_once_than_stay_together_are_refused(
  monkeypatch, overrides, num_devices
):
  monkeypatch.setattr(sharding, "num_shards", lambda mesh: num_devices)
  made = build.Experiment(configured(**overrides), 10)
  with pytest.raises(ConfigError, match="2 clips in a row stay in one"):
    _ = made.num_microbatches
  made.config.clips_per_device = 8
  assert made.num_microbatches == 1


# --- a run --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_tells_people_apart_and_resumes_exactly(tmp_path):
  """Two videos of each of four people, who are of one colour."""
  videos = {}
  for i in range(8):
    record = made_dataset.a_record(
      f"{i}.mp4", num_frames=12, subject_id=f"{i // 2}"
    )
    videos[f"{i}.mp4"] = [
      made_dataset.showing(record, [60 * (i // 2) + i] * 12)
    ]
  options = {
    "data.path": made_dataset.make(tmp_path / "data", videos),
    "data.sample_by": "subject",
    "data.draws_per_unit": 2,
    "batch_size": 8,
    "clips_per_device": 8,
    "num_steps": 4,
    "adv.weight": 0.0,
    "contrast.weight": 1.0,
    "contrast.dim": 8,
    "optim.base_lr": 0.5,
  }
  result = train(tmp_path / "run", **options)
  assert result.returncode == 0, result.stderr
  assert "contrast, weight 1:" in result.stdout
  assert "2 draws of each subject in a row" in result.stdout
  whole = without_step_4(tmp_path / "run")
  assert whole[4]["train/loss"] == pytest.approx(
    whole[4]["train/loss_rec"] + whole[4]["train/loss_contrast"], rel=1e-5
  )
  assert {"train/contrast/accuracy", "train/contrast/features_rank"} <= set(
    whole[4]
  )
  assert whole[4]["train/loss_contrast"] < whole[1]["train/loss_contrast"]
  result = train(tmp_path / "run", **options)
  assert "resumed from step 3" in result.stdout
  assert metrics_of(tmp_path / "run") == whole


def test_a_single_person_is_refused(tmp_path):
  videos = {"0.mp4": [made_dataset.a_record("0.mp4", num_frames=12)]}
  path = made_dataset.make(tmp_path / "data", videos)
  result = train(
    tmp_path / "run",
    **{"data.path": path, "data.draws_per_unit": 2, "contrast.weight": 1.0},
  )
  assert "two people" in refused(result)
