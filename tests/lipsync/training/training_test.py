"""Training of the sync expert and of the generator, on drawn mouths."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import cv2
import jax
import numpy as np
import optax
import pytest
import torch
from PIL import Image

from configs import eval_ls
from marlin_jax.checkpoints.inventory import ResumeError
from marlin_jax.lipsync import configuration, mel_windows, offset_chart
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import split_network
from marlin_jax.lipsync.training import (
  expert_step,
  expert_training,
  generator_step,
  generator_training,
  losses,
  pictures,
)
from marlin_jax.records import mel_spectrogram
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights.architecture import Architecture
from tests.support import talking_mouths
from tests.support.files import arrays_of, rows_of
from tests.support.processes import on_eight_devices

ROOT = Path(__file__).parents[3]

TINY = {
  "expert.num_frames": 5,
  "expert.width": 1 / 8,
  "expert.batch_size": 16,
  "expert.lr": 1e-3,
  "expert.eval_steps": 1000,
  "expert.eval_batches": 4,
  "generator.width": 1 / 16,
  "generator.batch_size": 4,
  "generator.lr": 2e-3,
  "generator.b1": 0.9,
  "generator.eval_steps": 1000,
  "generator.eval_batches": 2,
  "random.width": 32,
  "random.depth": 1,
  "random.num_heads": 2,
  "random.mlp_dim": 64,
  "random.num_frames": 5,
  "random.tubelet_size": 1,
  "random.image_size": 48,
  "log_steps": 1,
  "picture_steps": 1000,
  "checkpoint_steps": 1000,
}
NUM_EXPERT_STEPS, NUM_GENERATOR_STEPS = 200, 100
SIZE = 32


def tiny(**overrides):
  config = eval_ls.get_config()
  config.update_from_flattened_dict(
    TINY | {key.replace("__", "."): x for key, x in overrides.items()}
  )
  configuration.validate(config)
  return config


def last_of(workdir, prefix):
  """The last numbers of a kind, by name."""
  numbers = {}
  for row in rows_of(workdir):
    numbers |= {
      k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)
    }
  return numbers


def assert_same_bits(got, want):
  assert got.keys() == want.keys()
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


@pytest.fixture(scope="module")
def expert(talking_person, tmp_path_factory):
  """One of two steps."""
  workdir = tmp_path_factory.mktemp("expert")
  config = tiny(data__val="train", expert__num_steps=2, checkpoint_steps=1)
  expert_training.train_expert(config, talking_person, workdir)
  return workdir


@pytest.fixture(scope="module")
def trained_expert(talking_people, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained_expert")
  config = tiny(expert__num_steps=NUM_EXPERT_STEPS)
  expert_training.train_expert(config, talking_people, workdir)
  return workdir


def curve_of(workdir):
  """Returns the only offsets of an expert's evaluation, and the cosines."""
  (event,) = [row for row in rows_of(workdir) if row.get("event") == "offsets"]
  return event["offsets"], event["cosines"]


# --- The expert ---------------------------------------------------------------


@pytest.mark.slow
def test_of_people_never_seen_sound_in_sync_fits_better_than_shifted(
  trained_expert,
):
  scores = last_of(trained_expert, "eval/val/")
  assert scores["ranked"] > 0.65
  assert scores["margin"] > 0.15
  assert scores["loss_sync"] < math.log(2)


@pytest.mark.slow
def test_the_best_offset_of_people_never_seen_is_the_true_one(trained_expert):
  assert last_of(trained_expert, "eval/val/")["best_offset"] == 0
  offsets, cosines = curve_of(trained_expert)
  assert offsets[np.argmax(cosines)] == 0


@pytest.mark.slow
def test_the_best_offset_moves_with_the_sound(trained_expert):
  """By as many frames; negative where the sound comes earlier."""
  net = build.read_expert(trained_expert)
  talks = [talking_mouths.talk(person) for person in range(72, 80)]
  starts, offsets = np.arange(12, 48, 4), np.arange(-8, 9)
  windows = [
    (
      talk,
      start,
      mel_windows.windows(
        mel_spectrogram.mel_spectrogram(talk.sound), start + offsets, 5
      ),
    )
    for talk in talks
    for start in starts
  ]
  video = np.stack([t.frames[s : s + 5] for t, s, _ in windows]) / 255.0
  faces = jax.jit(net.faces)(video.astype(np.float32))
  mel = np.concatenate([mels for *_, mels in windows])
  heard = jax.jit(net.sound)(mel).reshape(len(windows), len(offsets), -1)
  curve = np.einsum("bd,bod->o", faces, heard)
  middle = len(offsets) // 2
  for shift in (-3, 0, 2):
    # Sound that is `shift` frames late: at offset k is heard what was at
    # k - shift.
    shifted = curve[middle - 5 - shift : middle + 6 - shift]
    assert shifted.argmax() - 5 == shift


def test_a_run_leaves_what_it_promises(expert):
  config = json.loads((expert / "config.json").read_text())
  assert config["expert"]["width"] == TINY["expert.width"]
  (picture,) = (expert / "pictures").iterdir()
  assert np.asarray(Image.open(picture)).std() > 10
  offsets, cosines = curve_of(expert)
  assert offsets == list(range(-5, 6))
  assert np.isfinite(cosines).all()


def test_scores_of_cosines_are_what_they_are_called():
  sure, unsure = [0.0, 0.2, 1.0, 0.2, 0.0], [0.9, 0.2, 0.4, 0.2, np.nan]
  scores = expert_training.offset_scores(np.float32([sure, unsure]))
  assert scores["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
  assert scores["ranked"] == pytest.approx(2 / 3)
  assert scores["cosine_in_sync"] == pytest.approx(0.7)
  assert scores["cosine_shifted"] == pytest.approx(0.3)
  assert scores["best_offset"] == 0
  assert scores["offset_accuracy"] == 0.5
  # Short records have no sound at the largest offsets.
  short = np.pad([sure, unsure], ((0, 0), (2, 2)), constant_values=np.nan)
  assert expert_training.offset_scores(np.float32(short)) == scores


SMALL = {
  "data.sample_by": "subject",
  "expert.height": 24,
  "expert.frame_size": 56,
  "expert.loss": "contrastive",
  "expert.clips_per_record": 8,
  "expert.batch_size": 32,
  "expert.flip_ratio": 0.5,
  "expert.min_crop_ratio": 0.8,
  "expert.colour_jitter": 0.1,
  "expert.gain_jitter": 0.5,
  "expert.weight_decay": 0.05,
  "expert.width": 1 / 4,
  "expert.lr": 1e-3,
}


def small(**overrides):
  return tiny(**{k.replace(".", "__"): x for k, x in SMALL.items()} | overrides)


@pytest.fixture(scope="module")
def small_expert(talking_people, tmp_path_factory):
  """Trained with every key for small data; interrupted and resumed once."""
  workdir = tmp_path_factory.mktemp("small_expert")
  for num_steps in (10, 100):
    config = small(expert__num_steps=num_steps, checkpoint_steps=10)
    expert_training.train_expert(config, talking_people, workdir)
  return workdir


@pytest.mark.slow
def test_contrastive_expert_knows_people_it_has_never_seen(small_expert):
  scores = last_of(small_expert, "eval/val/")
  assert scores["ranked"] > 0.7
  assert scores["best_offset"] == 0
  rows = [row for row in rows_of(small_expert) if "train/ranked" in row]
  assert rows[0]["step"] == 1
  assert rows[-1]["train/ranked"] > rows[0]["train/ranked"]
  assert build.read_expert(small_expert).height == 24


@pytest.mark.slow
def test_expert_starts_from_the_weights_of_another(
  small_expert, talking_people, tmp_path
):
  config = small(expert__num_steps=1)
  expert_training.train_expert(
    config, talking_people, tmp_path / "next", str(small_expert)
  )
  (first,) = [
    row for row in rows_of(tmp_path / "next") if "train/ranked" in row
  ]
  assert first["train/ranked"] > 0.7
  wide = small(expert__num_steps=1, expert__width=1 / 8)
  with pytest.raises(ConfigError, match="has other layers"):
    expert_training.train_expert(
      wide, talking_people, tmp_path / "wide", str(small_expert)
    )


def test_jitter_changes_clips_as_wholes_and_stays_in_range():
  video = np.full((6, 5, 4, 4, 3), 0.25, np.float32)
  mel = np.full((6, 16, 80), -3.5, np.float32)
  key = jax.random.key(1)
  same = expert_step.Jitter()(video, mel, key)
  np.testing.assert_array_equal(same[0], video)
  np.testing.assert_array_equal(same[1], mel)
  bright, loud = expert_step.Jitter(0.2, 1.0)(video, mel, key)
  assert np.ptp(bright, axis=(1, 2, 3)).max() < 1e-6
  assert np.std(bright[:, 0, 0, 0, 0]) > 0.05
  assert np.abs(bright - 0.25).max() <= 0.2 + 0.25 * 0.2 + 1e-6
  assert np.ptp(loud, axis=(1, 2)).max() == 0
  assert loud.min() >= -4
  assert np.abs(loud - mel).max() <= 1


# --- Losses -------------------------------------------------------------------


def test_the_sync_loss_is_the_published_cross_entropy():
  cosine = np.linspace(0.002, 0.998, 50, dtype=np.float32)
  in_sync = np.arange(50) % 3 == 0
  theirs = torch.nn.functional.binary_cross_entropy(
    torch.tensor(cosine), torch.tensor(in_sync, dtype=torch.float32)
  )
  ours = losses.sync_loss(cosine, in_sync)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_contrastive_loss_finds_each_sound_among_those_far_enough():
  np_rng = np.random.default_rng(0)
  cosine = np_rng.uniform(size=(2, 4, 4)).astype(np.float32)
  is_compared = np.ones((2, 4, 4), bool)
  is_compared[0, 0, 1] = is_compared[0, 1, 0] = False
  want = []
  for matrix, known in zip(cosine, is_compared, strict=True):
    logits = torch.tensor(np.where(known, matrix / 0.2, -np.inf))
    for way in (logits, logits.T):
      want.append(torch.nn.functional.cross_entropy(way, torch.arange(4)))
  got = losses.contrastive_loss(cosine, is_compared, 0.2)
  assert float(got) == pytest.approx(float(np.mean(want)), rel=1e-5)


def test_evaluations_report_the_cross_entropy_as_pytorch_clamps_it():
  cosine = np.float32([0, 0, 1, 1, 0.3, 1e-4])
  in_sync = np.array([True, False, True, False, True, False])
  theirs = torch.nn.functional.binary_cross_entropy(
    torch.tensor(cosine), torch.tensor(in_sync, dtype=torch.float32)
  )
  ours = losses.published_sync_loss(cosine, in_sync)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_few_hopeless_clips_keep_the_sync_weight_at_0_as_published():
  # Half a per cent of cosines at 0, which count 100 each: the mean is 1.05.
  cosine = np.float32([0.0] * 5 + [0.58] * 995)
  in_sync = np.ones(1000, bool)
  published = float(losses.published_sync_loss(cosine, in_sync))
  assert published > 1
  assert float(losses.sync_loss(cosine, in_sync)) < 0.75
  weight = generator_step.next_sync_weight(
    0.0, published, threshold=0.75, weight=0.01
  )
  assert weight == 0


@pytest.mark.parametrize(("cosine", "in_sync"), [(-0.5, True), (0.0, True)])
def test_a_cosine_that_is_no_probability_is_pulled_the_right_way(
  cosine, in_sync
):
  slope = jax.grad(lambda x: losses.sync_loss(x[None], np.array([in_sync])))(
    np.float32(cosine)
  )
  assert -1001 < slope < 0


def test_the_sync_weight_is_switched_on_by_the_evaluation_and_stays_on():
  def after(current, loss):
    return generator_step.next_sync_weight(
      current, loss, threshold=0.75, weight=0.01
    )

  assert after(0.0, 0.76) == 0
  assert after(0.0, 0.74) == 0.01
  assert after(0.01, 0.9) == 0.01


def test_every_problem_of_a_configuration_is_told_at_once():
  config = eval_ls.get_config()
  config.expert.num_frames = 7
  config.generator.kind = "gan"
  config.generator.adv_weight = 1.0
  config.data.val = ""
  config.expert.loss = "contrastive"
  with pytest.raises(ConfigError) as caught:
    configuration.validate(config)
  message = str(caught.value)
  assert "5 problems" in message
  for key in (
    "expert.num_frames=7",
    "kind='gan'",
    "1.01",
    "data.val=''",
    "expert.clips_per_record=1: expected at least 2",
  ):
    assert key in message


# --- The generator ------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(talking_person, expert, tmp_path_factory):
  """One of two steps."""
  workdir = tmp_path_factory.mktemp("generator")
  config = tiny(data__val="train", generator__num_steps=2)
  generator_training.train_generator(
    config, talking_person, workdir, expert, "random"
  )
  return workdir


@pytest.mark.slow
def test_a_mouth_learned_by_heart_follows_the_sound():
  """Closer than any mouth that stays the same, and not with other sound.

  The reference is always the same frame: only the sound tells.
  """
  talk = mouth_of(talking_mouths.talk(0))
  trainer, judge, state = generator_by_heart(talk)
  generate = jax.jit(functools.partial(generator_step.generate, trainer))

  def mouths(late):
    found = [
      generate(state, judge, windows_of(talk, starts, late))
      for starts in np.arange(0, 60, 5).reshape(3, 4)
    ]
    return [
      np.concatenate([np.asarray(one[key]) for one in found]).reshape(
        60, SIZE, SIZE, 3
      )[:, SIZE // 2 :]
      for key in ("generated", "target")
    ]

  generated, target = mouths(late=0)
  other, _ = mouths(late=6)
  constant = np.broadcast_to(target.mean(axis=0), target.shape)
  assert psnr(generated, target) > psnr(constant, target) + 2
  assert psnr(generated, target) > psnr(other, target) + 2
  # Dark where the mouth is open.
  assert np.corrcoef(darkness(generated), talk.opening[:60])[0, 1] > 0.8


def mouth_of(talk):
  """So close that the lower half is all mouth: it is soon learned."""
  frames = [
    cv2.resize(
      frame[102:198, 64:160], (SIZE, SIZE), interpolation=cv2.INTER_AREA
    )
    for frame in talk.frames
  ]
  return dataclasses.replace(talk, frames=np.stack(frames))


def generator_by_heart(talk):
  """Trainer, expert and state of a generator that has learned a clip."""
  judge, judge_arrays = split_network(
    build.make_expert(build.expert_meta(5, 1 / 32))
  )
  architecture = Architecture(
    32, 1, 2, 64, num_frames=5, tubelet_size=1, image_size=SIZE
  )
  network = build.make_generator(
    build.generator_meta("marlin", 1 / 8, architecture)
  )
  structure, arrays = split_network(network, frozen=("encoder",))
  rate = optax.cosine_decay_schedule(5e-3, NUM_GENERATOR_STEPS)
  adam = optax.adam(rate)
  trainer = generator_step.GeneratorTrainer(
    structure, SIZE, judge, None, 0.0, adam, adam
  )
  step = jax.jit(
    functools.partial(generator_step.generator_step, trainer), donate_argnums=0
  )
  state = trainer.init(arrays, None)
  np_rng = np.random.default_rng(0)
  for _ in range(NUM_GENERATOR_STEPS):
    batch = windows_of(talk, np_rng.integers(0, 60, 4))
    state, _ = step(state, judge_arrays, batch)
  return trainer, judge_arrays, state


def windows_of(talk, starts, late=0):
  """A batch of windows, with the sound of `late` frames before."""
  frames = starts[:, None] + np.arange(5)
  mel = mel_spectrogram.mel_spectrogram(talk.sound)
  mels = mel_windows.frame_windows(mel, frames.ravel() - late)
  return {
    "video": talk.frames[frames],
    "reference": np.broadcast_to(
      talk.frames[0], (*frames.shape, SIZE, SIZE, 3)
    ),
    "mel": mel_windows.windows(mel, starts - late, 5),
    "mels": mels.reshape(*frames.shape, 16, 80),
  }


def psnr(got, want):
  return -10 * np.log10(np.square(got - want).mean())


def darkness(mouths):
  return (0.3 - mouths.mean(axis=-1)).clip(0).sum(axis=(1, 2))


def test_a_run_of_the_generator_leaves_what_it_promises(generator):
  scores = last_of(generator, "eval/train/")
  assert {"loss_l1", "loss_sync_target", "psnr_reference"} <= scores.keys()
  (picture,) = (generator / "pictures").iterdir()
  # Two clips, each five rows of five frames of 48 pixels.
  height, width, _ = np.asarray(Image.open(picture)).shape
  assert width == 5 * 48 + 4 * 4
  assert height == 2 * (4 * 48 + 80 + 5 * 22 + 4)


def test_a_generator_is_read_with_the_encoder_that_was_not_trained(generator):
  network = build.read_generator(generator)
  saved = arrays_of(generator, 2)
  name = "['generator']['fixed']['encoder']['patch_embedding']['kernel']"
  kernel = network.encoder.patch_embedding.kernel[...]
  np.testing.assert_array_equal(kernel, saved[name])


# --- Resumed ------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_generator_has_the_same_bits_and_the_same_schedule(
  talking_person, expert, tmp_path
):
  """The sync weight is switched on by the evaluation of step 2."""

  def train(name, num_steps):
    config = tiny(
      data__val="train",
      generator__num_steps=num_steps,
      generator__eval_steps=2,
      generator__sync_threshold=100.0,
      generator__adv_weight=0.07,
      generator__sync_weight=0.03,
      checkpoint_steps=2,
    )
    generator_training.train_generator(
      config, talking_person, tmp_path / name, expert, "random"
    )

  train("whole", 4)
  train("halved", 2)
  train("halved", 4)
  assert_same_bits(
    arrays_of(tmp_path / "halved", 4), arrays_of(tmp_path / "whole", 4)
  )
  weights = {
    row["step"]: row["train/sync_weight"]
    for row in rows_of(tmp_path / "halved")
    if "train/sync_weight" in row
  }
  assert weights == pytest.approx({1: 0, 2: 0, 3: 0.03, 4: 0.03})


def test_another_expert_is_refused_on_resume(talking_person, expert, generator):
  config = tiny(data__val="train", generator__num_steps=3)
  other = expert / "checkpoints" / "1"
  with pytest.raises(ResumeError, match="expert_sha256"):
    generator_training.train_generator(
      config, talking_person, generator, other, "random"
    )


# --- Devices ------------------------------------------------------------------


@pytest.mark.slow
def test_steps_do_not_depend_on_the_number_of_devices():
  """Batch normalisation takes the statistics of the whole batch."""
  for case in on_eight_devices("lipsync_layouts.py").values():
    for one, eight in zip(case["1"], case["8"], strict=True):
      assert one.keys() == eight.keys()
      for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=2e-3), name


# --- Pictures -----------------------------------------------------------------


def test_a_strip_shows_low_bands_at_the_bottom():
  video = np.zeros((1, 5, 48, 48, 3), np.float32)
  mels = np.full((1, 5, 16, 80), -4.0)
  mels[..., :10] = 4.0
  strip = pictures.strip(video, video, video, video, mels)
  sound = strip[-84:-4]
  assert sound[-5:, :48].min() == 255
  assert sound[:5, :48].max() == 0


def test_the_chart_marks_the_best_offset():
  offsets = np.arange(-5, 6)
  curves = {"mean": np.exp(-((offsets - 2.0) ** 2))}
  chart = offset_chart.draw(offsets, curves, "").astype(int)
  red = (chart[..., 0] - chart[..., 1:].max(axis=-1)) > 80
  mark = np.argwhere(red)[:, 1].mean()
  assert mark == pytest.approx(56 + 7 / 10 * (480 - 56 - 16), abs=2)
