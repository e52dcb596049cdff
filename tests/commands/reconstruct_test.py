"""Masking and reconstruction of videos by `Marlin` and by the command."""

import errno
import functools
import os

import av
import jax
import numpy as np
import optax
import pytest
from PIL import Image

from marlin_jax import Marlin, reconstruct
from marlin_jax.inference import pictures
from marlin_jax.inference.attention_maps import SHARES
from marlin_jax.inference.clips import read_clips
from marlin_jax.models.vit import split_model
from marlin_jax.pretraining import train_step
from marlin_jax.pretraining.pretext_task import PretextTask, reconstruct_batch
from marlin_jax.weights import safetensors_folder
from marlin_jax.weights.weights import WeightsError
from tests.support import demo_models
from tests.support.videos import moving_noise, shared_video, write_video

make_weights = functools.partial(demo_models.make_weights, image_size=64)


@pytest.fixture(scope="module")
def weights():
  return make_weights()


@pytest.fixture(scope="module")
def marlin(weights):
  return Marlin(weights)


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  return {
    "video": np_rng.integers(0, 256, (3, 4, 64, 64, 3), np.uint8),
    "regions": np_rng.integers(0, 2048, (3, 2, 4, 4)).astype(np.uint16),
  }


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
  """A video of 13 frames, 64x64, at 30 frames per second."""
  path = tmp_path_factory.mktemp("videos") / "noise.mp4"
  return write_video(path, moving_noise(13, 64, 64), crf="0")


def tokens_of(marlin, video):
  return marlin.architecture.tubelets.patchify(np.asarray(video))


# --- Library ------------------------------------------------------------------


def test_visible_patches_equal_the_original_and_masked_ones_differ(
  marlin, batch
):
  result = marlin.reconstruct(
    batch["video"], regions=batch["regions"], ratio=0.75
  )
  assert result.visible.sum(1).tolist() == [8, 8, 8]  # of 32 tokens
  assert result.reconstruction.dtype == np.float32
  assert result.reconstruction.min() >= 0
  assert result.reconstruction.max() <= 1
  original = tokens_of(marlin, batch["video"])
  made = tokens_of(marlin, result.reconstruction)
  visible = result.visible
  pixels = (made * 255).round()
  np.testing.assert_array_equal(pixels[visible], original[visible])
  assert (pixels[~visible] != original[~visible]).mean() > 0.95
  # The same in the views.
  shown = [tokens_of(marlin, view) for view in result.views().frames]
  np.testing.assert_array_equal(shown[0], original)
  for view in shown[1:]:
    np.testing.assert_array_equal(view[visible], original[visible])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_losses_equal_those_of_the_training_evaluation(batch, norm_pix):
  marlin = Marlin(make_weights(norm_pix=norm_pix))
  result = marlin.reconstruct(
    batch["video"], regions=batch["regions"], ratio=0.75, seed=3
  )
  graph, params, fixed = split_model(marlin.mae)
  trainer = train_step.Trainer(
    task=PretextTask.from_architecture(marlin.architecture, "fasking", 0.75),
    adversarial=train_step.Adversarial(0.0, 0.0, 1, 1),
    mae=graph,
    discriminator=graph,  # not used
    optimizer=optax.sgd(0.0),
    disc_optimizer=optax.sgd(0.0),
  )
  state = train_step.init_state(trainer, params, fixed, {})
  expected = jax.jit(functools.partial(train_step.reconstruct, trainer))(
    state, batch, jax.random.split(jax.random.key(3), len(batch["video"]))
  )
  np.testing.assert_array_equal(result.visible, expected["visible"])
  np.testing.assert_allclose(
    result.reconstruction, np.clip(expected["video"], 0, 1), atol=1e-5
  )
  for name in ("loss_pixels", "loss_own_colour"):
    np.testing.assert_allclose(getattr(result, name), expected[name], rtol=1e-5)


def test_a_perfect_normalised_prediction_reconstructs_the_original(batch):
  architecture = make_weights(norm_pix=True).architecture
  task = PretextTask.from_architecture(architecture, "random", 0.75)
  keys = jax.random.split(jax.random.key(0), 3)
  mask_keys = jax.vmap(jax.random.split)(keys)[:, 0]
  _, target = jax.jit(task.inputs_and_target)(
    batch["video"], batch["regions"], mask_keys
  )
  assert np.abs(target).max() > 1.5  # not pixels
  reconstruct = functools.partial(
    reconstruct_batch, task, lambda patches, visible, masked: target
  )
  result = jax.jit(reconstruct)(batch | {"keys": keys})
  np.testing.assert_allclose(
    result["video"], batch["video"] / np.float32(255), atol=1e-6
  )
  assert result["loss_pixels"] < 1e-12


def test_imagenet_input_does_not_change_the_reconstruction(
  marlin, weights, batch
):
  options = {"regions": batch["regions"], "ratio": 0.75}
  other = Marlin(weights.with_imagenet_input())
  assert other.architecture.imagenet_input
  np.testing.assert_allclose(
    other.reconstruct(batch["video"], **options).reconstruction,
    marlin.reconstruct(batch["video"], **options).reconstruction,
    atol=1e-5,
  )


def test_a_video_is_read_window_by_window_and_joined(marlin, noise):
  result = marlin.reconstruct(noise, strategy="tube", ratio=0.5)
  # Windows of 8 frames: one from 0, one moved back to end with the 13th.
  assert result.clips.frame_numbers.tolist() == [[0, 2, 4, 6], [5, 7, 9, 11]]
  assert result.clips.fps == pytest.approx(15)
  assert result.clips.regions is None
  frames = moving_noise(13, 64, 64)
  for clip, numbers in zip(
    result.clips.video, result.clips.frame_numbers, strict=True
  ):
    for picture, number in zip(clip, numbers, strict=True):
      difference = np.abs(picture.astype(int) - frames[number])
      assert difference.mean() < 3
  assert result.visible.shape == (2, 32)


def test_a_result_can_be_saved(marlin, batch, tmp_path):
  result = marlin.reconstruct(
    batch["video"], regions=batch["regions"], ratio=0.75
  )
  result.save(tmp_path / "clips.gif")
  with Image.open(tmp_path / "clips.gif") as animation:
    assert animation.n_frames == 3 * 4
  with pytest.raises(ValueError, match="ends with none of .png, .gif, .mp4"):
    result.save(tmp_path / "clips.jpg")


def test_a_short_video_repeats_its_last_frame(marlin, tmp_path):
  path = write_video(tmp_path / "short.mp4", moving_noise(4, 64, 64))
  clips = read_clips(path, marlin.architecture)
  assert clips.frame_numbers.tolist() == [[0, 2, 3, 3]]


def test_without_a_decoder_the_error_says_so(weights, batch):
  with pytest.raises(WeightsError, match="no decoder.*use a full checkpoint"):
    Marlin(weights.encoder_only()).reconstruct(batch["video"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "fasking needs face regions.*pass `regions`"),
    (
      {"regions": np.zeros((3, 2, 14, 14), np.uint16)},
      r"regions of shape \(3, 2, 14, 14\), expected \(3, 2, 4, 4\)",
    ),
    ({"strategy": "cube"}, "strategy is 'cube', expected one of fasking"),
    ({"ratio": 1.0}, "ratio is 1.0, expected a value between 0 and 1"),
    (
      {"strategy": "tube", "ratio": 0.98},
      r"ratio is 0\.98, .*\(2, 4, 4\) with strategy tube",
    ),
  ],
  ids=["regions_missing", "regions_shape", "strategy", "ratio", "nothing_left"],
)
def test_wrong_masking_arguments_are_refused(marlin, batch, changes, message):
  with pytest.raises(ValueError, match=message):
    marlin.reconstruct(batch["video"], **changes)


def test_clips_that_are_not_uint8_are_refused(marlin, batch):
  with pytest.raises(ValueError, match="float64, expected uint8"):
    marlin.reconstruct(batch["video"] / 255, strategy="tube")


def test_attention_maps_of_clips_are_independent(marlin, batch):
  maps = marlin.attention_maps(batch["video"])
  assert maps.heads.shape == (3, 1, 2, 32)
  assert maps.rollout.shape == (3, 32)
  alone = marlin.attention_maps(batch["video"][1:2] / np.float32(255))
  np.testing.assert_allclose(alone.heads[0], maps.heads[1], rtol=1e-4)


# --- Command ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "full"
  safetensors_folder.write(weights, path)
  return path


def run(*args) -> int:
  """Runs the command in this process; returns its exit code."""
  return reconstruct.main([str(arg) for arg in args])


SIZE = (64 + 22, 3 * 64 + 2 * 4)  # with a caption and the gaps between views


def test_a_png_shows_six_frames_of_the_video(folder, noise, tmp_path):
  path = tmp_path / "new" / "picture.png"
  args = (noise, "--checkpoint", folder, "--output", path)
  assert run(*args, "--strategy=tube") == 0
  with Image.open(path) as image:
    picture = np.asarray(image)
  assert picture.shape == (3 * 86 + 4, 6 * 64 + 5 * 4, 3)
  first = picture[22:86, :64].astype(int)
  assert np.abs(first - moving_noise(1, 64, 64)[0]).mean() < 3


def test_a_gif_shows_every_second_frame_once(folder, noise, tmp_path, capsys):
  path = tmp_path / "clip.gif"
  args = (noise, "--checkpoint", folder, "--output", path)
  assert run(*args, "--strategy=tube") == 0
  with Image.open(path) as animation:
    # 0 2 4 6 and 7 9 11: the second window begins at 5.
    assert animation.n_frames == 7
    assert animation.size == SIZE[::-1]
    assert animation.info["duration"] == 70  # 1/15 s in a GIF's hundredths
  printed = capsys.readouterr().out
  assert "frames 0 to 11 in 2 clips of 4 frames" in printed
  assert "pixel loss" in printed
  assert printed.endswith(f"{path}\n")


def test_the_video_itself_is_not_overwritten(folder, noise, tmp_path, capsys):
  video = tmp_path / "clip.mp4"
  video.write_bytes(noise.read_bytes())
  (tmp_path / "link.mp4").symlink_to(video)
  args = (video, "--checkpoint", folder, "--output", tmp_path / "link.mp4")
  assert run(*args) == 1
  assert "is the video itself" in capsys.readouterr().err
  assert video.read_bytes() == noise.read_bytes()


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_no_half_file_is_left_and_an_old_one_stays(
  folder, noise, tmp_path, monkeypatch, suffix
):
  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  path = tmp_path / f"a{suffix}"
  path.write_text("of an earlier run")
  args = (noise, "--checkpoint", folder, "--output", path)
  assert run(*args, "--strategy=tube") == 1
  assert [*tmp_path.iterdir()] == [path]
  assert path.read_text() == "of an earlier run"


def test_an_mp4_has_the_speed_of_the_video(folder, noise, tmp_path):
  path = tmp_path / "clip.mp4"
  args = (noise, "--checkpoint", folder, "--output", path)
  assert run(*args, "--strategy=random", "--num_clips=1") == 0
  with av.open(str(path)) as container:
    frames = list(container.decode(video=0))
    assert container.streams.video[0].average_rate == 15
  assert len(frames) == 4
  assert (frames[0].height, frames[0].width) == SIZE


@pytest.mark.parametrize("size", [224, 112])
def test_attention_is_rendered_and_shared_among_regions(
  face_models, tmp_path, capsys, size
):
  video = shared_video("cropped04.mp4")
  path = tmp_path / "heat.gif"
  safetensors_folder.write(
    make_weights(image_size=size, depth=2), tmp_path / "model"
  )
  args = [video, "--checkpoint", tmp_path / "model", "--output", path]
  assert run(*args, "--attention", "--head=1,0", "--num_clips=1") == 0
  with Image.open(path) as animation:
    assert animation.n_frames == 4
    assert animation.size == (2 * size + 4, size + 22)
  lines = capsys.readouterr().out.splitlines()
  head = next(i for i, line in enumerate(lines) if "layer 1 head 0" in line)
  table = {line.split()[0]: line.split()[1:] for line in lines[head + 1 : -1]}
  assert set(table) <= set(SHARES)
  assert {"skin", "nose", "hair", "background"} <= set(table)
  for column in (0, 1):
    total = sum(float(row[column].rstrip("%")) for row in table.values())
    assert total == pytest.approx(100, abs=1)

  # Fasking, with the regions that are found.
  assert run(*args, "--num_clips=1") == 0
  assert "no face" not in capsys.readouterr().out


def test_attention_needs_neither_decoder_nor_regions(noise, tmp_path, capsys):
  """Faces are parsed at 224 pixels, not for larger pictures."""
  weights = make_weights(image_size=256)
  safetensors_folder.write(weights.encoder_only(), tmp_path / "encoder")
  args = [noise, "--checkpoint", tmp_path / "encoder"]
  args += ["--output", tmp_path / "heat.png"]
  assert run(*args, "--attention") == 0
  assert "patches" not in capsys.readouterr().out
  with Image.open(tmp_path / "heat.png") as picture:
    assert picture.width == 6 * 256 + 5 * 4
  assert run(*args) == 1
  assert "encoder has no decoder" in capsys.readouterr().err
  assert run(*args, "--attention", "--head=0,2") == 1
  message = capsys.readouterr().err
  assert message.startswith("error: --head=0,2: ")
  assert "heads 0 to 1" in message


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--output=a.avi"], "a.avi does not end with .png or .gif or .mp4"),
    (["--output=a.png", "--head=1"], "1 is not LAYER,HEAD"),
    (["--output=a.png", "--head=1,0"], "--head needs --attention"),
    (["--output=a.png", "--num_clips=0"], "0 is less than 1"),
  ],
  ids=["suffix", "head", "head_alone", "num_clips"],
)
def test_flags_are_checked_before_anything_is_read(capsys, flags, message):
  with pytest.raises(SystemExit):
    run("nowhere.mp4", "--checkpoint=nowhere", *flags)
  assert message in capsys.readouterr().err


def test_an_undecodable_file_is_named(folder, tmp_path, capsys):
  path = tmp_path / "text.mp4"
  path.write_text("no video")
  args = [path, "--checkpoint", folder, "--output", tmp_path / "a.png"]
  assert run(*args, "--strategy=tube") == 1
  assert "text.mp4: cannot open" in capsys.readouterr().err
  assert run(*args, "--strategy=tube", "--ratio=1") == 1
  assert "ratio is 1.0" in capsys.readouterr().err
