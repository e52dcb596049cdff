"""Lip-sync networks: parity with the published ones, and MARLIN's generator.

The PyTorch networks get random weights and statistics, are saved like the
official files, and are read by the code under test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from marlin_jax.lipsync.networks import (
  convolutions,
  inputs,
  published,
  sync_expert,
)
from marlin_jax.lipsync.networks.marlin_generator import MarlinGenerator
from marlin_jax.lipsync.networks.quality_discriminator import (
  QualityDiscriminator,
)
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.networks.wav2lip import Wav2Lip
from marlin_jax.weights import name_tables
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import WeightsError
from tests.support import torch_lipsync

# Relative to the largest absolute value.
TOLERANCE = 1e-4


def random_images(*shape, seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def random_mel(*shape, seed=1):
  """Returns values in the range of mel spectrograms, [-4, 4]."""
  return random_images(*shape, seed=seed) * 8 - 4


def to_torch(x):
  return torch.from_numpy(np.ascontiguousarray(x))


def reverse_colours(x):
  """Swaps RGB and BGR, also of several images stacked as channels."""
  return x.reshape(*x.shape[:-1], -1, 3)[..., ::-1].reshape(x.shape)


def assert_agree(ours, theirs, name=""):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, name
  error = np.abs(ours - theirs).max() / np.abs(theirs).max()
  assert error < TOLERANCE, f"{name}: {error:.1e}"


def with_random_weights(make):
  """Returns a network in evaluation mode.

  Faster than nnx, which compiles the initialisation of each shape.
  """
  network = nnx.eval_shape(make)
  np_rng = np.random.default_rng(0)

  def draw(path, value):
    x = np_rng.normal(size=value.shape)
    if path[-1] == "kernel":
      x *= np.prod(value.shape[:-1]) ** -0.5
    elif path[-1] in ("scale", "var"):
      x = 0.5 + np_rng.random(value.shape)
    return jnp.asarray(x, value.dtype)

  for path, variable in nnx.to_flat_state(nnx.state(network)):
    variable.set_value(draw(path, variable))
  network.eval()
  return network


def record_activations(modules, run):
  """Returns inputs and outputs of modules, channels last, and the result."""
  recorded = {}
  hooks = [
    module.register_forward_hook(
      lambda module, args, out: recorded.update({module: (args[0], out)})
    )
    for module in modules
  ]
  with torch.no_grad():
    result = run()
  for hook in hooks:
    hook.remove()
  pairs = [
    tuple(np.moveaxis(x.numpy(), 1, -1) for x in recorded[module])
    for module in modules
  ]
  return pairs, result


@nnx.jit
def run_each(parts, inputs):
  return [
    convolutions.apply_layers(part, x)
    for part, x in zip(parts, inputs, strict=True)
  ]


def through_file(theirs, name, network, folder, prefix=""):
  """Saves a network like Wav2Lip's training, and reads the file."""
  state = {prefix + key: value for key, value in theirs.state_dict().items()}
  path = folder / name
  torch.save(
    {
      "state_dict": state,
      "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
      "global_step": 3,
      "global_epoch": 1,
    },
    path,
  )
  return published.read(network, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def expert(folder):
  theirs = torch_lipsync.with_random_weights(torch_lipsync.Expert())
  network = published.EXPERT
  return theirs, through_file(theirs, "lipsync_expert.pth", network, folder)


@pytest.fixture(scope="module")
def wav2lip(folder):
  theirs = torch_lipsync.with_random_weights(torch_lipsync.Wav2Lip())
  network = published.WAV2LIP
  return theirs, through_file(theirs, "wav2lip.pth", network, folder, "module.")


# --- Published networks -------------------------------------------------------


def test_each_layer_of_the_expert_agrees_with_the_published_one(expert):
  theirs, ours = expert
  video, mel = random_images(2, 5, 96, 96, 3), random_mel(2, 16, 80)
  # As in the published data loader: frames as channels, then the lower half.
  lips = (
    reverse_colours(video)
    .transpose(0, 1, 4, 2, 3)
    .reshape(2, 15, 96, 96)[:, :, 48:]
  )
  sound = mel.transpose(0, 2, 1)[:, None]
  pairs, (their_faces, their_sound) = record_activations(
    [*theirs.face_encoder, *theirs.audio_encoder],
    lambda: theirs(to_torch(lips), to_torch(sound)),
  )
  inputs = [x for x, _ in pairs]
  inputs[0] = reverse_colours(inputs[0])
  layers = [[layer] for layer in (*ours.face_layers, *ours.sound_layers)]
  for i, outputs in enumerate(run_each(layers, inputs)):
    assert_agree(outputs, pairs[i][1], f"layer {i}")
  faces, sounds = nnx.jit(lambda net, *x: (net.faces(x[0]), net.sound(x[1])))(
    ours, video, mel
  )
  assert_agree(faces, their_faces)
  assert_agree(sounds, their_sound)


def test_each_stage_of_wav2lip_agrees_with_the_published_one(wav2lip):
  theirs, ours = wav2lip
  masked, reference = (
    random_images(1, 2, 96, 96, 3),
    random_images(1, 2, 96, 96, 3, seed=2),
  )
  masked[:, :, 48:] = 0
  mels = random_mel(1, 2, 16, 80)
  pictures = np.concatenate(
    [reverse_colours(masked), reverse_colours(reference)], axis=-1
  )[0]
  stages = [
    *theirs.face_encoder_blocks,
    theirs.audio_encoder,
    *theirs.face_decoder_blocks,
  ]
  pairs, result = record_activations(
    stages,
    lambda: theirs(
      to_torch(mels[0].transpose(0, 2, 1)[:, None]),
      to_torch(pictures.transpose(0, 3, 1, 2)),
    ),
  )
  inputs = [x for x, _ in pairs]
  inputs[0] = reverse_colours(inputs[0])
  parts = [
    list(stage)
    for stage in (*ours.face_stages, ours.sound_layers, *ours.decoder_stages)
  ]
  for i, outputs in enumerate(run_each(parts, inputs)):
    assert_agree(outputs, pairs[i][1], f"stage {i}")
  outputs = nnx.jit(Wav2Lip.__call__)(ours, masked, reference, mels)
  assert outputs.shape == (1, 2, 96, 96, 3)
  assert_agree(
    outputs[0], reverse_colours(result.numpy().transpose(0, 2, 3, 1))
  )


def test_the_quality_discriminator_agrees_with_the_published_one(folder):
  theirs = torch_lipsync.QualityDiscriminator()
  theirs = torch_lipsync.with_random_weights(theirs)
  network = published.QUALITY_DISCRIMINATOR
  ours = through_file(theirs, "visual_quality_disc.pth", network, folder)
  video = random_images(1, 3, 96, 96, 3)
  lips = reverse_colours(video)[0, :, 48:].transpose(0, 3, 1, 2)
  with torch.no_grad():
    probabilities = theirs(to_torch(lips))[:, 0]
  logits = nnx.jit(QualityDiscriminator.__call__)(ours, video)
  assert_agree(logits, torch.logit(probabilities))


def test_the_scorers_network_agrees_with_the_published_one(folder):
  theirs = torch_lipsync.with_random_weights(torch_lipsync.syncnet())
  # A bare state dict of an old PyTorch, without num_batches_tracked.
  path = folder / "syncnet_v2.model"
  torch.save(
    {
      key: value
      for key, value in theirs.state_dict().items()
      if not key.endswith("num_batches_tracked")
    },
    path,
    _use_new_zipfile_serialization=False,
  )
  ours = published.read(published.SYNCNET, path)
  frames, mfcc = (
    random_images(1, 5, 224, 224, 3) * 255,
    random_images(2, 20, 13) * 20 - 10,
  )
  with torch.no_grad():
    faces = theirs.forward_lip(to_torch(frames.transpose(0, 4, 1, 2, 3)))
    sounds = theirs.forward_aud(to_torch(mfcc.transpose(0, 2, 1)[:, None]))
  outputs = nnx.jit(lambda net, *x: (net.faces(x[0]), net.sound(x[1])))(
    ours, frames, mfcc
  )
  assert_agree(outputs[0], faces)
  assert_agree(outputs[1], sounds)


def test_the_tables_lead_back_to_the_same_bits(wav2lip):
  theirs, ours = wav2lip
  arrays = {
    name: np.asarray(value[...])
    for name, value in published.named_variables(ours).items()
  }
  back = name_tables.write(published.WAV2LIP.rules(ours), arrays)
  state = theirs.state_dict()
  assert back.keys() == {k for k in state if "num_batches" not in k}
  for key, value in back.items():
    np.testing.assert_array_equal(value, state[key].numpy(), key)


def test_a_file_of_another_network_is_refused(expert, folder):
  path = folder / "lipsync_expert.pth"
  with pytest.raises(WeightsError) as e:
    published.read(published.WAV2LIP, path)
  assert str(path) in str(e.value)
  assert published.EXPERT.description in str(e.value)
  assert published.WAV2LIP.description in str(e.value)


def test_arrays_that_do_not_fit_are_named(expert, tmp_path):
  theirs, _ = expert
  path = tmp_path / "e.pth"
  state = theirs.state_dict()
  name = "face_encoder.0.conv_block.0.weight"
  torch.save({"state_dict": state | {name: torch.zeros(32, 48, 7, 7)}}, path)
  with pytest.raises(WeightsError) as e:
    published.read(published.EXPERT, path)
  assert f"{name}: shape (32, 48, 7, 7), expected (32, 15, 7, 7)" in str(
    e.value
  )
  del state[name]
  torch.save({"state_dict": state}, path)
  with pytest.raises(WeightsError, match=f"{name}: missing"):
    published.read(published.EXPERT, path)
  path = tmp_path / "none.pth"
  with pytest.raises(WeightsError, match=str(path)):
    published.read(published.EXPERT, path)


# --- Windows of 16 frames -----------------------------------------------------


def test_the_expert_for_16_frames_gives_unit_vectors_of_the_lower_half():
  expert = with_random_weights(
    lambda: SyncExpert(16, width=1 / 16, rngs=nnx.Rngs(0))
  )
  look = nnx.jit(SyncExpert.faces)
  video = random_images(2, 16, 64, 64, 3)
  faces = look(expert, video)
  assert faces.shape == (2, 32)
  np.testing.assert_allclose(np.linalg.norm(faces, axis=-1), 1, rtol=1e-5)
  hidden = video.copy()
  hidden[:, :, :32] = 0.5
  np.testing.assert_array_equal(look(expert, hidden), faces)
  hidden[1, 15, 40:] = 0.5
  other = look(expert, hidden)
  np.testing.assert_array_equal(other[0], faces[0])
  assert np.abs(other[1] - faces[1]).max() > 1e-6
  sound = nnx.jit(SyncExpert.sound)(expert, random_mel(2, 52, 80))
  np.testing.assert_allclose(np.linalg.norm(sound, axis=-1), 1, rtol=1e-5)
  assert sound.shape == (2, 32)


def test_the_gradient_of_a_zero_embedding_is_finite():
  gradient = jax.jit(jax.grad(lambda x: sync_expert._unit(x).sum()))(
    jnp.zeros((1, 4))
  )
  assert np.isfinite(gradient).all()


def test_the_expert_of_small_pictures_gives_unit_vectors_too():
  expert = with_random_weights(
    lambda: SyncExpert(5, width=1 / 16, height=24, rngs=nnx.Rngs(0))
  )
  look = nnx.jit(SyncExpert.faces)
  video = random_images(2, 5, 48, 48, 3)
  faces = look(expert, video)
  assert faces.shape == (2, 32)
  np.testing.assert_allclose(np.linalg.norm(faces, axis=-1), 1, rtol=1e-5)
  video[1, 4, 36:, 36:] = 0.5
  other = look(expert, video)
  np.testing.assert_array_equal(other[0], faces[0])
  assert np.abs(other[1] - faces[1]).max() > 1e-6
  with pytest.raises(ValueError, match="32 pixels high, expected 48 or 24"):
    SyncExpert(5, height=32, rngs=nnx.Rngs(0))


def test_an_expert_for_another_window_is_refused():
  with pytest.raises(ValueError, match="windows of 7 frames"):
    SyncExpert(7, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("width", "depth", "num_heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16)]
)
def test_the_generator_fits_the_published_encoders(width, depth, num_heads):
  architecture = Architecture(width, depth, num_heads, 4 * width)
  network = nnx.eval_shape(
    lambda: MarlinGenerator(
      architecture.make_autoencoder(scan=True), rngs=nnx.Rngs(0)
    )
  )
  # The first stage of the authors: for B, 774 to 378 channels.
  first = network.decoder_stages[0]
  assert first[0].convolution.in_features == width + 6
  assert first[-1].convolution.out_features == width // 2 - 6
  video = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
  mels = jax.ShapeDtypeStruct((1, 16, 16, 80), jnp.float32)
  outputs = nnx.eval_shape(
    MarlinGenerator.__call__, network, video, video, mels
  )
  assert outputs.shape == video.shape


# 16 frames of 8 x 8: tokens of 8 x 2 x 2.
TINY = Architecture(32, 1, 2, 32, image_size=8, patch_size=4)


def generator(**how):
  return with_random_weights(
    lambda: MarlinGenerator(
      TINY.make_autoencoder(),
      tubelets=TINY.tubelets,
      sound_width=1 / 16,
      rngs=nnx.Rngs(0),
      **how,
    )
  )


@pytest.fixture(scope="module")
def tiny():
  return generator()


generate = nnx.jit(MarlinGenerator.__call__)


def test_the_generators_pictures_are_in_range(tiny):
  pictures = random_images(2, 16, 8, 8, 3)
  outputs = generate(tiny, pictures, pictures, random_mel(2, 16, 16, 80))
  assert outputs.shape == pictures.shape
  assert outputs.dtype == jnp.float32
  assert 0 <= outputs.min() < outputs.max() <= 1


def test_a_frames_sound_changes_that_frame_alone(tiny):
  pictures, mels = random_images(2, 16, 8, 8, 3), random_mel(2, 16, 16, 80)
  # A copy: the first call may still be reading its arguments.
  silent = mels.copy()
  silent[1, 6] = 0
  before = generate(tiny, pictures, pictures, mels)
  changed = np.abs(generate(tiny, pictures, pictures, silent) - before)
  changed = changed.max((2, 3, 4)) > 0
  np.testing.assert_array_equal(np.argwhere(changed), [[1, 6]])


def test_the_two_frames_of_a_tubelet_have_their_own_features(tiny):
  still = np.broadcast_to(random_images(2, 1, 8, 8, 3), (2, 16, 8, 8, 3))
  mels = np.broadcast_to(random_mel(2, 1, 16, 80), (2, 16, 16, 80))
  outputs = generate(tiny, still, still, mels)
  assert np.abs(outputs[:, 0] - outputs[:, 1]).max() > 1e-4


def test_a_tokens_halves_are_its_place_in_its_two_frames(tiny):
  video = random_images(1, 16, 8, 8, 3)
  maps = nnx.jit(MarlinGenerator._face_maps)(tiny, video, video)
  tokens = nnx.jit(lambda net, x: net.norm(net.tokens(x)))(
    tiny.encoder, TINY.tubelets.patchify(video)
  )
  # Tubelet 5, lower row, left: 5 * 4 + 2.
  both = np.concatenate([maps[10, 1, 0], maps[11, 1, 0]])
  np.testing.assert_allclose(both, tokens[0, 22], rtol=1e-4, atol=1e-5)


def test_the_encoder_sees_the_targets_upper_and_the_references_lower_half(tiny):
  see = nnx.jit(MarlinGenerator._face_maps)
  masked, reference = (
    random_images(1, 16, 8, 8, 3),
    random_images(1, 16, 8, 8, 3, seed=2),
  )
  before = np.asarray(see(tiny, masked, reference))
  assert before.shape == (16, 2, 2, 16)
  masked[:, :, 4:], reference[:, :, :4] = 0, 0
  np.testing.assert_array_equal(see(tiny, masked, reference), before)
  reference[:, :, 4:] = 0
  assert np.abs(see(tiny, masked, reference) - before).max() > 1e-4


def largest_gradients(network, value):
  """Returns the largest absolute gradient of each parameter, by name."""
  gradients = nnx.jit(nnx.grad(value))(network)
  return {
    name: float(np.abs(gradient[...]).max())
    for name, gradient in published.named_variables(gradients).items()
  }


def test_gradients_reach_everything(tiny):
  pictures, mels = random_images(1, 16, 8, 8, 3), random_mel(1, 16, 16, 80)
  gradients = largest_gradients(
    tiny, lambda net: net(pictures, pictures, mels).mean()
  )
  assert all(np.isfinite(gradient) for gradient in gradients.values())
  assert [name for name, gradient in gradients.items() if not gradient] == []


def test_no_gradient_reaches_a_frozen_encoder():
  pictures = random_images(1, 16, 8, 8, 3)
  gradients = largest_gradients(
    generator(freeze_encoder=True),
    lambda net: (net._face_maps(pictures, pictures) ** 2).sum(),
  )
  assert not any(gradients.values())


def test_tubelets_of_another_encoder_are_refused():
  with pytest.raises(ValueError, match="32 tokens of 96 pixels"):
    MarlinGenerator(TINY.make_autoencoder(), rngs=nnx.Rngs(0))


# --- Training mode, sizes -----------------------------------------------------


def test_running_statistics_move_in_training_mode_only():
  layer = convolutions.Convolution(3, 4, 3, rngs=nnx.Rngs(0))
  x = random_images(2, 5, 5, 3)
  layer(x)
  mean = layer.norm.mean[...]
  assert np.abs(mean).max() > 0
  layer.eval()
  layer(x + 1)
  np.testing.assert_array_equal(layer.norm.mean[...], mean)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_quality_discriminator_takes_any_size(size):
  network = nnx.eval_shape(
    lambda: QualityDiscriminator(width=1 / 16, rngs=nnx.Rngs(0))
  )
  video = jax.ShapeDtypeStruct((2, 3, size, size, 3), jnp.float32)
  outputs = nnx.eval_shape(QualityDiscriminator.__call__, network, video)
  assert outputs.shape == (6,)


def test_bfloat16_is_of_the_convolutions_alone():
  def run(video, mels):
    network = MarlinGenerator(
      TINY.make_autoencoder(),
      tubelets=TINY.tubelets,
      rngs=nnx.Rngs(0),
      dtype=jnp.bfloat16,
    )
    between = convolutions.apply_layers(
      network.sound_layers, inputs.mel_images(mels[0])
    )
    return between, network(video, video, mels), nnx.state(network)

  video = jax.ShapeDtypeStruct((1, 16, 8, 8, 3), jnp.float32)
  mels = jax.ShapeDtypeStruct((1, 16, 16, 80), jnp.float32)
  between, *outputs = nnx.eval_shape(run, video, mels)
  assert between.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}


def test_wav2lip_refuses_pictures_of_another_size(wav2lip):
  _, network = wav2lip
  pictures = random_images(1, 1, 64, 64, 3)
  with pytest.raises(ValueError, match="64 x 64 x 3"):
    network(pictures, pictures, random_mel(1, 1, 16, 80))
