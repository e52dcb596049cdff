"""Features, probes and finetuning of a tiny encoder on small data sets."""

import dataclasses
import itertools
import os
import signal

import jax
import numpy as np
import pytest

from configs import eval_far
from data_prep.sources.listing import BINARY, Label
from marlin_jax.data.clip_geometry import IMAGENET_MEAN
from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  feature_cache,
  learner,
  splits,
  tasks,
)
from marlin_jax.inference import clip_features, marlin
from marlin_jax.training.skipped_steps import NotFiniteError
from marlin_jax.weights import formats
from marlin_jax.weights.architecture import Architecture
from tests.support import labelled_data
from tests.support.labelled_data import (
  LABELS,
  SIZE,
  Video,
  draw_face,
  metric,
  renamed,
  run,
  tiny,
  write_random,
)

# --- Features and probes ------------------------------------------------------


def frozen(config):
  weights = formats.open_encoder("random", config.random)
  mesh = sharding.make_mesh()
  return weights, clip_features.FrozenEncoder(weights, mesh, "float32", "auto")


def on_encoder(task, weights, config, **settings):
  """Returns an encoder in float32 with a head, on all devices."""
  defaults = {
    "mesh": sharding.make_mesh(),
    "seed": 0,
    "attentive": False,
    "dtype": "float32",
    "attention": "auto",
    "remat": "none",
  }
  return learner.on_encoder(task, weights, config, **defaults | settings)


def test_features_do_not_depend_on_the_batch_size(face_data, tmp_path):
  weights, encoder = frozen(tiny(eval_far.get_config()))
  split = splits.open_split(str(face_data), "val", tmp_path)
  clip = weights.architecture.clip
  windows = split.windows(clip)
  computed = [
    feature_cache.window_features(
      encoder, split, windows, tmp_path / f"{n}", batch_size=n, num_threads=2
    )
    for n in (1, 7)
  ]
  clips = clip_batches.ClipReader(split, clip).read(windows)
  expected = marlin.Marlin(weights).extract_features(clips)
  for features in computed:
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_features_of_a_diverged_encoder_are_refused(face_data, tmp_path):
  config = tiny(eval_far.get_config())
  weights = formats.open_encoder("random", config.random)
  arrays = {name: np.full_like(x, np.nan) for name, x in weights.arrays.items()}
  weights = dataclasses.replace(weights, arrays=arrays)
  encoder = clip_features.FrozenEncoder(
    weights, sharding.make_mesh(), "float32", "auto"
  )
  split = splits.open_split(str(face_data), "val", tmp_path)
  windows = split.windows(weights.architecture.clip)[:3]
  # Computed, and kept.
  for _ in range(2):
    with pytest.raises(NotFiniteError, match="3 of 3 windows of 'val'"):
      feature_cache.window_features(
        encoder, split, windows, tmp_path, batch_size=3, num_threads=1
      )


def test_clips_have_the_encoders_size(face_data, tmp_path):
  weights, encoder = frozen(
    tiny(eval_far.get_config(), **{"random.image_size": 112})
  )
  split = splits.open_split(str(face_data), "val", tmp_path)
  windows = split.windows(weights.architecture.clip)[:3]
  computed = feature_cache.window_features(
    encoder, split, windows, tmp_path, batch_size=2, num_threads=1
  )
  full = clip_batches.ClipReader(split, weights.architecture.clip).read(windows)
  clips = full.reshape(3, -1, 112, 2, 112, 2, 3).mean((3, 5))
  expected = marlin.Marlin(weights).extract_features(clips / 255)
  np.testing.assert_allclose(computed, expected, atol=0.02)


def test_missing_and_damaged_features_are_computed_again(
  face_data, tmp_path, monkeypatch
):
  monkeypatch.setattr(feature_cache, "PART_WINDOWS", 8)
  weights, encoder = frozen(tiny(eval_far.get_config()))
  split = splits.open_split(str(face_data), "val", tmp_path)
  windows = split.windows(weights.architecture.clip)

  def features():
    return feature_cache.window_features(
      encoder, split, windows, tmp_path, batch_size=4, num_threads=2
    )

  first = features()
  parts = sorted(tmp_path.glob("features-*/*.npy"))
  assert len(parts) == 4
  before = {path: path.stat().st_mtime_ns for path in parts}
  parts[1].unlink()
  parts[2].write_bytes(parts[2].read_bytes()[:-9])
  np.testing.assert_array_equal(features(), first)
  changed = [p for p in parts if p.stat().st_mtime_ns != before[p]]
  assert changed == parts[1:3]


def test_a_probe_on_features_equals_a_probe_on_the_frozen_encoder(tmp_path):
  """Takes the same steps on features and through the frozen encoder."""

  def one_window(i, np_rng):
    video = draw_face(i, np_rng)
    return Video(video.video_id, "", video.labels, video.frames[:7])

  data = labelled_data.write(
    tmp_path / "data", {"train": labelled_data.make(8, one_window)}, LABELS
  )
  config = tiny(eval_far.get_config())
  weights, encoder = frozen(config)
  split = splits.open_split(str(data), "train", tmp_path)
  clip = weights.architecture.clip
  features = feature_cache.window_features(
    encoder,
    split,
    split.windows(clip),
    tmp_path,
    batch_size=4,
    num_threads=2,
  )
  task = tasks.make_task("mood", tasks.read_labels(str(data)), {}, "")
  labels, known = task.encode(task.targets(split.labels["mood"]))
  mesh = sharding.make_mesh()
  on_features = learner.linear_probe(task, 32, config.paper, mesh, seed=3)
  end_to_end = on_encoder(task, weights, config.paper, seed=3, tuned="nothing")
  one, other = on_features.begin(), end_to_end.begin()
  batches = clip_batches.drawn_batches(
    clip_batches.ClipReader(split, clip),
    split,
    clip,
    clip_batches.Order(np.arange(8), 0),
    batch_size=4,
    seed=0,
    start_step=0,
    num_steps=6,
    num_threads=2,
  )
  key = jax.random.key(0)
  for rows, clips in batches:
    args = (labels[rows], known[rows], key, np.float32(1e-2))
    one, loss = on_features.step(one, features[rows], *args)
    other, other_loss = end_to_end.step(other, clips, *args)
    assert float(loss) == pytest.approx(float(other_loss), abs=1e-5)
  a = jax.tree.leaves(one["trained"])
  b = jax.tree.leaves(other["trained"])
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


# --- Fine-tuning --------------------------------------------------------------


def needle(i: int, np_rng: np.random.Generator) -> Video:
  """Draws noise with a faint pattern or its negative.

  A random encoder hardly sees the pattern; a finetuned one learns it.
  """
  pattern = np.random.default_rng(7).choice([-1, 1], (7, 7, 3))
  label = int(np_rng.integers(2))
  grey = 255 * np.array(IMAGENET_MEAN)
  blocks = np_rng.normal(grey, 40, (4, SIZE // 8, SIZE // 8, 3))
  blocks += (2 * label - 1) * np.tile(pattern, (4, 4, 1))
  frames = blocks.repeat(8, axis=1).repeat(8, axis=2)
  return Video(
    f"{i:03d}.mp4",
    f"{np_rng.integers(1 << 60)}",
    {"needle": (label,)},
    frames.clip(0, 255).astype(np.uint8),
  )


def test_fine_tuning_moves_the_encoder_and_beats_the_probe(tmp_path):
  data = labelled_data.write(
    tmp_path / "data",
    {
      split: renamed(labelled_data.make(num, needle, seed), split)
      for seed, (split, num) in enumerate(
        {"train": 96, "val": 32, "test": 48}.items()
      )
    },
    {"needle": Label(BINARY, ("needle",))},
  )
  # Inputs of mean 0: otherwise all but the mean is learned slowly.
  architecture = Architecture(
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=32,
    num_frames=4,
    stride=1,
    patch_size=56,
    imagenet_input=True,
  )
  results = run(
    eval_far,
    tmp_path / "w",
    data,
    write_random(tmp_path / "encoder", architecture),
    tasks="needle",
    modes="linear,finetune",
    num_seeds=1,
    num_resamples=20,
    **{
      "finetune.min_steps": 40,
      "finetune.batch_size": 16,
      "finetune.base_lr": 0.05,
      "finetune.flip": False,
      "finetune.mixup": 0.0,
      "finetune.layer_decay": 1.0,
    },
  )
  assert metric(results, "finetune") > 0.97
  assert metric(results, "linear") < 0.9


def test_every_trained_array_changes(face_data, tmp_path):
  config = tiny(eval_far.get_config())
  weights = formats.open_encoder("random", config.random)
  task = tasks.make_task("mood", tasks.read_labels(str(face_data)), {}, "")
  np_rng = np.random.default_rng(0)
  clips = np_rng.integers(0, 256, (4, 4, SIZE, SIZE, 3), np.uint8)
  labels, known = task.encode(np.array([0.0, 1.0, 2.0, 1.0]))
  for tuned in learner.TUNED:
    section = "attentive" if tuned == "nothing" else "finetune"
    head = on_encoder(
      task,
      weights,
      config[section],
      attentive=tuned == "nothing",
      tuned=tuned,
    )
    state = head.begin()
    before = jax.tree.map(np.array, state["trained"])
    assert ("encoder" in before) == (tuned in ("norms", "all"))
    assert ("lora" in before) == (tuned == "lora")
    for step in range(2):
      key = jax.random.key(step)
      state, _ = head.step(state, clips, labels, known, key, np.float32(1e-2))
    still = [
      jax.tree_util.keystr(path)
      for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree.leaves(state["trained"]),
        strict=True,
      )
      if np.array_equal(a, b)
    ]
    assert not still


@pytest.mark.parametrize(
  ("label", "value_loss"),
  [("emotion", "mse"), ("affect", "mse"), ("affect", "ccc")],
)
def test_microbatches_give_the_step_of_the_whole_batch(
  face_data, label, value_loss
):
  config = tiny(eval_far.get_config())
  weights = formats.open_encoder("random", config.random)
  task = tasks.make_task(label, tasks.read_labels(str(face_data)), {}, "")
  np_rng = np.random.default_rng(0)
  clips = np_rng.integers(0, 256, (8, 4, SIZE, SIZE, 3), np.uint8)
  # The microbatches differ in the number of known labels; one knows none.
  known = np.float32([[1, 1], [0, 0], [1, 0], [0, 0]] * 2)
  labels = known * np_rng.integers(0, 2, (8, 2)).astype(np.float32)
  config.finetune.drop_path = 0.5
  stepped = []
  for clips_per_device in (8, 2):
    model = on_encoder(
      task,
      weights,
      config.finetune,
      tuned="all",
      clips_per_device=clips_per_device,
      value_loss=value_loss,
    )
    assert model.num_microbatches == 8 // clips_per_device
    # Not after a step: Adam's first one is the sign of the gradient.
    batch = model._augmented(clips, labels, known, jax.random.key(3))
    gradient = jax.jit(model._gradient)
    stepped.append(jax.tree.leaves(gradient(model.trained, model.fixed, batch)))
  for whole, split in zip(*stepped, strict=True):
    np.testing.assert_allclose(whole, split, atol=2e-6)


@pytest.mark.parametrize("attentive", [False, True])
def test_float32_predictions_are_exact_as_those_of_kept_models(
  face_data, attentive
):
  """GPUs and TPUs round matmuls that ask for less."""
  config = tiny(eval_far.get_config())
  model = on_encoder(
    tasks.make_task("mood", tasks.read_labels(str(face_data)), {}, ""),
    formats.open_encoder("random", config.random),
    config.attentive,
    attentive=attentive,
    tuned="nothing",
  )
  clips = np.zeros((2, 4, SIZE, SIZE, 3), np.uint8)
  lowered = model._logits.lower(model.trained, model._fixed, clips)
  products = [x for x in lowered.as_text().splitlines() if "dot_general" in x]
  assert len(products) > 3
  assert all("[HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_a_stopped_finetuning_resumes_to_the_same_bits(
  face_data, tmp_path, monkeypatch, capfd
):
  """A signal comes within a round, and while a round is scored."""
  changes = {
    "tasks": "mood",
    "modes": "finetune",
    "num_seeds": 1,
    "num_resamples": 2,
    "finetune.min_steps": 12,
  }
  run(eval_far, tmp_path / "whole", face_data, **changes)
  assert "mood-finetune-1-0: about 1 min; 6 steps of" in capfd.readouterr().out

  name = "mood-finetune-1-0"
  folder = tmp_path / "stopped" / "cells" / name
  for owner, method, number, saved in (
    (learner.Learner, "step", 8, "within/8"),
    (learner.Learner, "logits", 2, "within/12"),
  ):
    calls = itertools.count(1)
    original = getattr(owner, method)

    def call(self, *args, original=original, calls=calls, number=number):
      if next(calls) == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return original(self, *args)

    with monkeypatch.context() as patch:
      patch.setattr(owner, method, call)
      with pytest.raises(KeyboardInterrupt):
        run(eval_far, tmp_path / "stopped", face_data, **changes)
    assert (folder / saved).is_dir()
  run(eval_far, tmp_path / "stopped", face_data, **changes)
  assert not folder.exists()
  a, b = (
    np.load(tmp_path / w / "cells" / f"{name}.npz")["probabilities"]
    for w in ("whole", "stopped")
  )
  np.testing.assert_array_equal(a, b)


class Killed(Exception):
  pass


def test_a_killed_finetuning_goes_on_from_its_last_round(
  face_data, tmp_path, monkeypatch
):
  changes = {
    "tasks": "mood",
    "modes": "lora",
    "num_seeds": 1,
    "num_resamples": 2,
    "light.epochs": 0.1,
    "light.min_steps": 2,
  }
  run(eval_far, tmp_path / "whole", face_data, **changes)

  scored = []
  score = tasks.Task.score

  def die_at_the_second(self, *args, **how):
    scored.append(score(self, *args, **how))
    if len(scored) == 2:
      raise Killed
    return scored[-1]

  with monkeypatch.context() as patch:
    patch.setattr(tasks.Task, "score", die_at_the_second)
    with pytest.raises(Killed):
      run(eval_far, tmp_path / "killed", face_data, **changes)
  name = "mood-lora-1-0"
  assert (tmp_path / "killed" / "cells" / name / "1").is_dir()
  run(eval_far, tmp_path / "killed", face_data, **changes)
  a, b = (
    np.load(tmp_path / w / "cells" / f"{name}.npz")["probabilities"]
    for w in ("whole", "killed")
  )
  np.testing.assert_array_equal(a, b)


def test_the_attentive_mode_predicts_classes(face_data, tmp_path):
  results = run(
    eval_far,
    tmp_path,
    face_data,
    tasks="mood",
    modes="attentive",
    num_seeds=1,
    num_resamples=2,
    **{
      "attentive.min_steps": 20,
      "attentive.num_rounds": 1,
      "attentive.base_lr": 0.2,
    },
  )
  assert metric(results, "attentive") > 0.9


def test_pooling_is_over_the_windows_of_each_video():
  values = np.arange(12, dtype=np.float32).reshape(6, 2)
  owners = np.array([0, 0, 0, 1, 2, 2])
  both = feature_cache.pooled(values, owners, 3, "mean_std")
  np.testing.assert_allclose(both[0], [2, 3, np.sqrt(8 / 3), np.sqrt(8 / 3)])
  np.testing.assert_allclose(both[1], [6, 7, 0, 0])
