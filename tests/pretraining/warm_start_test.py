"""Warm starts: arrays taken from weights, and the notices about the rest."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.models import vit
from marlin_jax.pretraining import build, warm_start
from marlin_jax.weights import marlin_pytorch, videomae
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError

TINY = Architecture(
  width=16,
  depth=1,
  num_heads=2,
  mlp_dim=32,
  dec_width=16,
  dec_depth=1,
  dec_num_heads=2,
  dec_mlp_dim=32,
  disc_hidden=16,
  num_frames=4,
)


def random_weights(**changes):
  architecture = dataclasses.replace(TINY, **changes)
  np_rng = np.random.default_rng(0)
  return Weights(
    architecture,
    {
      name: np_rng.normal(size=shape).astype(np.float32)
      for name, shape in architecture.shapes().items()
    },
  )


@pytest.fixture(scope="module")
def config():
  config = pretrain_b.get_config()
  config.data.num_frames = TINY.num_frames
  config.adv.hidden = TINY.disc_hidden
  for name in config.model:
    if hasattr(TINY, name):
      config.model[name] = getattr(TINY, name)
  return config


@pytest.fixture(scope="module")
def state(config):
  return build.Experiment(config, 10).initialise()


@pytest.mark.parametrize("has_decoder", [True, False])
def test_published_weights_are_taken_by_name_with_their_decoder(
  tmp_path, monkeypatch, has_decoder
):
  pytest.importorskip("torch")
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  file = tmp_path / "models" / "marlin_vit_small_ytf.full.pt"
  # Files do not hold heads, which are known by these widths.
  small = {"width": 384, "num_heads": 6, "dec_width": 192, "dec_num_heads": 3}
  weights = random_weights(**small, disc_hidden=0)
  if not has_decoder:
    weights = weights.encoder_only()
  marlin_pytorch.write(weights, file)
  found = warm_start.read("marlin_vit_small_ytf")
  assert found.source == str(file)
  assert found.architecture == weights.architecture
  for name, array in weights.arrays.items():
    np.testing.assert_array_equal(found.arrays[name], array)


def test_weights_that_are_nowhere_are_told_where_they_could_be():
  with pytest.raises(WeightsError, match="nor one of the published models"):
    warm_start.read("marlin_vit_huge_ytf")


def start_from(weights, state, config):
  return warm_start.apply(
    weights,
    state,
    Architecture.from_config(config),
    uses_discriminator=True,
  )


def test_every_array_is_taken(config, state):
  weights = random_weights()
  got, notices = start_from(weights, state, config)
  assert not notices
  assert jax.tree.structure(got) == jax.tree.structure(state)
  blocks = got.params["decoder"]["blocks"]
  for name, array in (
    ("decoder.blocks.0.mlp_in.kernel", blocks[0]["mlp_in"]["kernel"]),
    ("encoder.positions", got.fixed["encoder"]["positions"]),
    ("discriminator.out.bias", got.disc_params["out"]["bias"]),
  ):
    np.testing.assert_array_equal(array, weights.arrays[name])


def test_what_is_not_there_stays_and_is_said(config, state):
  got, notices = start_from(random_weights().encoder_only(), state, config)
  np.testing.assert_array_equal(
    got.params["head"]["kernel"], state.params["head"]["kernel"]
  )
  assert not np.array_equal(
    got.params["encoder"]["norm"]["scale"],
    state.params["encoder"]["norm"]["scale"],
  )
  assert ["no decoder" in notices[0], "discriminator" in notices[1]] == [
    True
  ] * 2


def test_videomae_is_adapted_to_the_runs_conventions(config, state):
  theirs = random_weights(
    disc_hidden=0, imagenet_input=True, norm_pix=True, norm_eps=1e-6
  )
  got, notices = start_from(theirs, state, config)
  assert "1e-06" in notices[0]
  assert "1e-05" in notices[0]
  assert "folded" in notices[1]
  assert "normalised pixels" in notices[2]
  kernel = got.params["encoder"]["patch_embedding"]["kernel"]
  want = theirs.with_plain_input().arrays["encoder.patch_embedding.kernel"]
  np.testing.assert_array_equal(kernel, want)
  config = config.copy_and_resolve_references()
  config.input.imagenet_norm = config.target.norm_pix = True
  got, notices = start_from(theirs, state, config)
  assert len(notices) == 2  # eps and the discriminator
  np.testing.assert_array_equal(
    got.params["encoder"]["patch_embedding"]["kernel"],
    theirs.arrays["encoder.patch_embedding.kernel"],
  )


def test_a_decoder_of_frame_differences_has_to_learn_frames(config, state):
  theirs = random_weights(motion_weight=0.5)
  _, (notice,) = start_from(theirs, state, config)
  assert "predicts differences between frames of plain pixels" in notice
  assert notice.endswith("has to learn plain pixels")
  config = config.copy_and_resolve_references()
  config.target.motion_weight = 0.3  # another share of the same loss
  assert start_from(theirs, state, config)[1] == []


def test_a_videomae_file_is_a_warm_start(config, state, tmp_path):
  weights = random_weights(disc_hidden=0, imagenet_input=True, norm_pix=True)
  weights = Weights(
    weights.architecture,
    weights.arrays | videomae.position_tables(weights.architecture),
  )
  videomae.write(weights, tmp_path / "a.pth")
  read = videomae.read(
    tmp_path / "a.pth", num_heads=2, dec_num_heads=2, num_frames=4
  )
  got, _ = start_from(read, state, config)
  np.testing.assert_array_equal(
    got.params["head"]["bias"], weights.arrays["head.bias"]
  )


def test_frames_of_another_size_get_interpolated_positions(config, state):
  """Each of 7 x 7 patches lies between four of 14 x 14."""
  weights = random_weights()
  config = config.copy_and_resolve_references()
  config.data.frame_size = 112
  small = build.Experiment(config, 10).initialise()
  got, notices = start_from(weights, small, config)
  assert len(notices) == 1
  assert "224 pixels" in notices[0]
  assert "14 x 14 to 7 x 7" in notices[0]
  for name, array in (
    ("encoder.positions", got.fixed["encoder"]["positions"]),
    ("dec_positions", got.fixed["dec_positions"]),
  ):
    four = weights.arrays[name].reshape(2, 7, 2, 7, 2, 16)
    want = four.mean((2, 4)).reshape(98, 16)
    np.testing.assert_allclose(array, want, atol=1e-6)
  for part in ("params", "disc_params"):
    assert jax.tree.structure(getattr(got, part)) == jax.tree.structure(
      getattr(small, part)
    )
  np.testing.assert_array_equal(
    got.params["head"]["kernel"], weights.arrays["head.kernel"]
  )
  # The other way too, from a run at 112 pixels to one at 224.
  config.data.frame_size = 224
  weights = random_weights(image_size=112)
  back, notices = start_from(weights, state, config)
  assert "7 x 7 to 14 x 14" in notices[0]
  assert back.fixed["dec_positions"].shape == (392, 16)


@pytest.mark.parametrize("num_frames", [2, 8])
def test_clips_of_another_length_keep_the_positions_of_their_frames(
  state, config, num_frames
):
  """Shorter than those of the weights, and longer."""
  weights = random_weights(num_frames=num_frames)
  got, notices = start_from(weights, state, config)
  assert len(notices) == 1
  word = "continued" if num_frames == 2 else "cut off"
  assert f"clips of {num_frames} frames" in notices[0]
  assert f"{word} for 4" in notices[0]
  exact = vit.sincos_positions(392, 16)
  for name, array in (
    ("encoder.positions", got.fixed["encoder"]["positions"]),
    ("dec_positions", got.fixed["dec_positions"]),
  ):
    theirs = weights.arrays[name][:392]
    np.testing.assert_array_equal(array[: len(theirs)], theirs)
    np.testing.assert_array_equal(array[len(theirs) :], exact[len(theirs) :])


def test_patches_of_another_size_are_refused(config, state):
  with pytest.raises(WeightsError) as error:
    start_from(random_weights(patch_size=8), state, config)
  assert "config.model.patch_size=16, in the weights 8" in str(error.value)


def test_another_network_is_refused_with_every_difference(config, state):
  with pytest.raises(WeightsError) as error:
    start_from(random_weights(width=32, depth=2), state, config)
  assert "config.model.width=16, in the weights 32" in str(error.value)
  assert "config.model.depth=1, in the weights 2" in str(error.value)
