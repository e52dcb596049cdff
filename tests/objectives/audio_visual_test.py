"""Sound beside video: the losses against NumPy, and clips without sound."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import pretrain_b
from marlin_jax.objectives import audio_visual, objective
from marlin_jax.objectives.objective import OBJECTIVES
from marlin_jax.pretraining import build, configuration, flops, train_step
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import run_checkpoint
from tests.support import layouts
from tests.support.training_runs import refused, train

NUM_CLIPS = 6
SOUND = {
  "sound.weight": 0.5,
  "sound.width": 32,
  "sound.depth": 2,
  "sound.num_heads": 2,
  "sound.dec_width": 16,
  "sound.dec_depth": 1,
  "sound.dec_num_heads": 2,
  "sound.contrast_weight": 0.1,
}
SMALL = (
  layouts.SMALL
  | SOUND
  | {
    "batch_size": NUM_CLIPS,
    "clips_per_device": NUM_CLIPS,
    "data.num_frames": 8,
    "data.frame_size": 32,
  }
)


def experiment(**overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  configuration.validate(config)
  return build.Experiment(config, 10)


def batch_of(made, has_sound=(True,) * 5 + (False,)):
  np_rng = np.random.default_rng(0)
  tubelets = made.task.tubelets
  video = (NUM_CLIPS, *tubelets.video_shape)
  rows = made.take_clip.sound.num_rows
  return {
    "video": np_rng.integers(0, 256, video, np.uint8),
    "regions": np_rng.integers(0, 2048, (NUM_CLIPS, *tubelets.grid), np.uint16),
    "mel": np_rng.uniform(-4, 4, (NUM_CLIPS, rows, 80)).astype(np.float32),
    "has_sound": np.array(has_sound),
    "_subject": np.array([0, 1, 2, 2, 3, 4], np.int32),
    "_id": np.arange(NUM_CLIPS, dtype=np.int32),
    "keys": jax.random.split(jax.random.key(0), NUM_CLIPS),
  }


def pass_over(made, state, batch):
  """Returns the autoencoder's pass and the arguments of the objective."""
  (sound,) = made.objectives
  batch = batch | sound.of_whole_batch(batch)
  inputs, *_ = made.trainer.prepare(batch)
  forward = made.trainer.forward(state.params, state.fixed, *inputs)
  return forward, batch | {"visible": inputs[1], "masked": inputs[2]}


def losses_of(made, state, batch):
  """Returns the metrics, the autoencoder's pass, and the gradients."""

  @jax.jit
  def run(state, batch):
    forward, seen = pass_over(made, state, batch)
    _, metrics, grads = objective.value_and_grads(
      made.objectives, state, {}, forward, seen
    )
    return metrics, (forward, seen), grads

  metrics, passed, grads = run(state, batch)
  return {k: float(v) for k, v in metrics.items()}, passed, grads


# --- Formulas -----------------------------------------------------------------


def test_the_contrast_is_a_cross_entropy_in_both_directions():
  np_rng = np.random.default_rng(0)
  video, sound = np_rng.normal(size=(2, 5, 8)).astype(np.float32)
  video /= np.linalg.norm(video, axis=-1, keepdims=True)
  sound /= np.linalg.norm(sound, axis=-1, keepdims=True)
  has_sound = np.array([True, True, False, True, True])
  people = np.array([7, 3, 5, 3, 4])
  terms, hits = [], []
  for own, other in ((video, sound), (sound, video)):
    for i in np.flatnonzero(has_sound):
      candidates = [
        j for j in np.flatnonzero(has_sound) if j == i or people[j] != people[i]
      ]
      cosines = {j: own[i] @ other[j] / 0.2 for j in candidates}
      total = sum(np.exp(c) for c in cosines.values())
      terms.append(-np.log(np.exp(cosines[i]) / total))
      hits.append(max(cosines, key=cosines.get) == i)
  loss, accuracy = audio_visual.contrast(
    *map(jnp.asarray, (video, sound, has_sound, people)), 0.2
  )
  assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
  assert float(accuracy) == pytest.approx(np.mean(hits))


def test_a_single_clip_with_sound_has_nothing_to_be_told_from():
  one = jnp.eye(3)
  for has_sound in ([False, True, False], [False] * 3):
    loss, accuracy = audio_visual.contrast(
      one, one, jnp.array(has_sound), jnp.arange(3), 0.07
    )
    assert float(loss) == 0
    assert float(accuracy) == sum(has_sound)


@pytest.fixture(scope="module")
def small():
  made = experiment(**{"target.norm_pix": True})
  return made, jax.jit(made.initialise)()


def test_the_loss_is_of_masked_sound_and_of_clips_with_sound(small):
  made, state = small
  (sound,) = made.objectives
  metrics, (forward, batch), _ = losses_of(made, state, batch_of(made))
  # Patch by patch: 16 rows of 16 bands, by time, then by frequency.
  tokens = np.array(
    [
      [
        mel[t : t + 16, f : f + 16].ravel() / 4
        for t in range(0, len(mel), 16)
        for f in range(0, 80, 16)
      ]
      for mel in np.asarray(batch["mel"])
    ]
  )
  own = state.params[OBJECTIVES]["sound"]
  visible, masked, encoded, predicted = jax.jit(network_of(sound))(
    own, state.fixed[OBJECTIVES]["sound"], forward.encoded, batch, tokens
  )
  assert visible.shape[1] == sound.num_visible
  assert len(np.unique(visible, axis=0)) > 1
  both = np.sort(np.concatenate([visible, masked], 1))
  assert (both == np.arange(sound.patches.num_tokens)).all()

  errors, vectors = [], []
  for i in range(5):
    target = tokens[i, masked[i]]
    std = target.std(-1, ddof=1, keepdims=True)
    target = (target - target.mean(-1, keepdims=True)) / std
    errors.append(np.square(predicted[i] - target).mean())
    for name, x in ("video", forward.encoded[i]), ("sound", encoded[i]):
      vector = np.asarray(x).mean(0) @ np.asarray(own[name]["head"]["kernel"])
      vectors.append(vector / np.linalg.norm(vector))
  assert metrics["sound/loss_rec"] == pytest.approx(np.mean(errors), rel=1e-4)
  contrast, _ = audio_visual.contrast(
    jnp.array(vectors[::2]),
    jnp.array(vectors[1::2]),
    jnp.ones(5, bool),
    jnp.array(batch["_subject"][:5]),
    0.07,
  )
  assert metrics["sound/loss_contrast"] == pytest.approx(
    float(contrast), rel=1e-4
  )
  assert metrics["loss_sound"] == pytest.approx(
    metrics["sound/loss_rec"] + 0.1 * metrics["sound/loss_contrast"], rel=1e-6
  )
  assert metrics["sound/share"] == pytest.approx(5 / 6)
  assert metrics["sound/features_rank"] > 1


def network_of(sound):
  """Returns a function that runs the networks of the objective step by step."""

  def run(own, fixed, video, batch, tokens):
    network = nnx.merge(sound.structure, own, fixed)
    keys = objective._fold_in(batch["keys"], objective._number(sound))
    visible, masked = sound._split(keys)
    clip = jnp.arange(len(tokens))[:, None]
    encoded = network.encoder(tokens[clip, visible], visible)
    return (
      *(visible, masked, encoded),
      network.decode(encoded, visible, masked, video),
    )

  return run


# --- What the losses depend on ------------------------------------------------


def test_clips_without_sound_have_no_part_in_the_loss(small):
  made, state = small
  batch = batch_of(made)
  metrics, _, (into, own) = losses_of(made, state, batch)
  batch["mel"][5] = -4
  other, _, (_, other_own) = losses_of(made, state, batch)
  for name in ("loss_sound", "sound/loss_rec", "sound/accuracy"):
    assert metrics[name] == other[name]
  jax.tree.map(np.testing.assert_array_equal, own, other_own)
  # Video tokens of the other clips learn from sound.
  norms = np.square(into.encoded).sum((1, 2))
  assert (norms[:5] > 0).all()
  assert norms[5] == 0

  batch["has_sound"][:] = False
  metrics, _, grads = losses_of(made, state, batch)
  assert metrics["loss_sound"] == metrics["sound/share"] == 0
  assert not any(np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.slow
def test_clips_with_sound_weigh_the_same_in_any_microbatch():
  found = []
  for at_once in (NUM_CLIPS, NUM_CLIPS // 2):
    made = experiment(
      **{"clips_per_device": at_once, "adv.weight": 0.0},
      **{"sound.contrast_weight": 0.0},
    )
    if not found:
      state = jax.jit(made.initialise)()
    # Five clips with sound: three in one microbatch, two in the other.
    batch = batch_of(made)
    del batch["keys"]
    step = jax.jit(functools.partial(train_step.train_step, made.trainer))
    _, scalars = step(state, batch, jax.random.key(0))
    found.append([scalars[k] for k in ("loss_sound", "grad_norm")])
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_sound_is_predicted_from_video_too(small):
  """Without the contrast, reconstruction alone reaches the video's encoder."""
  made, state = small
  made = experiment(**{"sound.contrast_weight": 0.0})
  _, _, (into, _) = losses_of(made, state, batch_of(made))
  assert (np.square(into.encoded).sum((1, 2))[:5] > 0).all()


def test_people_that_are_not_known_are_told_apart_by_record(small):
  made, state = small
  batch = batch_of(made)
  batch["_id"] = batch["_subject"].copy()
  metrics, *_ = losses_of(made, state, batch)
  batch["_subject"][:] = -1
  assert losses_of(made, state, batch)[0] == metrics
  batch["_id"][:] = np.arange(NUM_CLIPS)
  assert losses_of(made, state, batch)[0] != metrics


def test_flops_are_those_that_xla_counts():
  """With many tokens, beside which the optimiser counts little."""
  made = experiment(
    **{
      "adv.weight": 0.0,
      "data.stride": 8,
      "model.width": 192,
      "sound.width": 192,
      "sound.dec_width": 128,
      "sound.mask_ratio": 0.5,
    }
  )
  found = made.lower_step().cost_analysis()["flops"] / NUM_CLIPS
  count = flops.training_step(made.architecture, made.trainer, NUM_CLIPS)
  (sound,) = made.objectives
  assert sound.flops > 0.5 * count
  assert found == pytest.approx(count, rel=0.05)


# --- Runs ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"sound.width": 30}, "sound.width=30: expected a multiple of twice"),
    ({"sound.dec_num_heads": 3}, "sound.dec_width=16"),
    ({"sound.mask_ratio": 1.0}, "sound.mask_ratio"),
    ({"sound.temperature": 0.0}, "sound.temperature"),
  ],
)
def test_what_cannot_be_run_is_refused(overrides, words):
  with pytest.raises(ConfigError, match=words):
    experiment(**overrides)


def test_a_contrast_in_microbatches_of_one_clip_is_refused():
  with pytest.raises(ConfigError, match="microbatch: 1, expected at least 2"):
    experiment(clips_per_device=1).lower_step()


def test_data_without_sound_are_refused(sample_dataset, tmp_path):
  overrides = SOUND | {"data.path": sample_dataset}
  message = refused(train(tmp_path / "run", **overrides))
  assert "prepared without: prepare the videos again" in message
  assert "data_prep.prepare --sound" in message


@pytest.mark.parametrize("name", ["hicmae_s", "pretrain_b"])
def test_a_run_with_the_usual_sizes_opens(monkeypatch, tmp_path, name):
  """Its checkpoint leaves out the values that are `before` of their keys."""
  config = importlib.import_module(f"configs.{name}").get_config()
  config.sound.weight = 1.0
  meta = configuration.identity(config, "", 1)
  assert "sound.width" not in meta
  tree = {OBJECTIVES: {"sound": {"encoder": {"norm": np.ones(1)}}}}
  for function, result in (
    ("is_run", True),
    ("read_meta", (tmp_path, meta)),
    ("read_state", {"params": tree, "fixed": tree}),
  ):
    monkeypatch.setattr(
      run_checkpoint, function, lambda *_, result=result: result
    )
  weights = run_checkpoint.read_sound(tmp_path)
  assert weights.size == audio_visual.encoder_size(config.sound)
