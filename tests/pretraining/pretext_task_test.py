"""Targets and weights of the reconstruction loss, against NumPy."""

import jax
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.pretraining import build, losses
from marlin_jax.pretraining.masking import Masking
from marlin_jax.pretraining.pretext_task import PretextTask
from tests.support import layouts

TUBELETS = Tubelets(num_frames=4, image_size=64)
NUM_CLIPS = 3


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  shape = (NUM_CLIPS, *TUBELETS.video_shape)
  return (
    np_rng.integers(0, 256, shape).astype(np.uint8),
    np_rng.integers(0, 2048, (NUM_CLIPS, *TUBELETS.grid)).astype(np.uint16),
    jax.random.split(jax.random.key(0), NUM_CLIPS),
  )


def make(strategy="crfr_p", **settings):
  masking = Masking(strategy, 0.75, TUBELETS.grid)
  return PretextTask(TUBELETS, masking, **settings)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_motion_is_the_difference_from_a_tokens_first_frame(batch, norm_pix):
  """MAE-DFER, section 3.3: the normalised pixels of both frames differ."""
  task = make(norm_pix=norm_pix, motion_weight=0.5)
  plain = make(norm_pix=norm_pix)
  (_, _, masked), target = task.inputs_and_target(*batch)
  _, pixels = plain.inputs_and_target(*batch)
  shape = (*pixels.shape[:2], 3, 2, 16 * 16)
  want = np.array(pixels).reshape(shape)
  want[..., 1, :] -= want[..., 0, :].copy()
  np.testing.assert_allclose(
    np.reshape(target, shape), want, rtol=1e-6, atol=1e-6
  )
  # A perfect prediction gives the pixels back.
  tokens = TUBELETS.patchify(batch[0]).astype(np.float32) / 255
  true = np.take_along_axis(tokens, np.asarray(masked)[..., None], axis=1)
  np.testing.assert_allclose(task.to_pixels(target, true), true, atol=1e-5)


@pytest.mark.parametrize("motion_weight", [0.0, 0.5])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_grey_start_predicts_the_target_of_grey(norm_pix, motion_weight):
  """With normalised targets that is 0, and so are all differences."""
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(
    layouts.SMALL
    | {
      "model.start_grey": True,
      "target.norm_pix": norm_pix,
      "target.motion_weight": motion_weight,
    }
  )
  experiment = build.Experiment(config, 1)
  task = experiment.task
  keys = jax.random.split(jax.random.key(0), 1)
  grey = np.full((1, *task.tubelets.video_shape), 115, np.uint8)
  regions = np.zeros((1, *task.tubelets.grid), np.uint16)
  _, target = task.inputs_and_target(grey, regions, keys)
  network, _ = experiment.draw_networks()
  np.testing.assert_allclose(network.head.bias[...], target[0, 0], atol=0.1)
  assert not network.head.kernel[...].any()


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_motion_weight_shares_the_loss_between_frames(batch, weight):
  task = make(motion_weight=weight)
  (_, _, masked), target = task.inputs_and_target(*batch)
  weights = task.weights(batch[1], batch[2], masked)
  pred = np.random.default_rng(1).normal(size=target.shape).astype(np.float32)
  errors = np.square(pred - target).reshape(*target.shape[:2], 3, 2, -1)
  want = (1 - weight) * errors[..., 0, :].mean() + weight * errors[
    ..., 1, :
  ].mean()
  np.testing.assert_allclose(
    losses.reconstruction_loss(pred, target, weights), want, rtol=1e-5
  )


def test_the_hidden_region_has_a_loss_of_its_own(batch):
  """FSFM, section 3.1: mean over masked tokens + weight * mean over region."""
  task = make(region_weight=0.3, motion_weight=0.5)
  video, regions, keys = batch
  (_, _, masked), target = task.inputs_and_target(*batch)
  weights = task.weights(regions, keys, masked)
  pred = np.random.default_rng(1).normal(size=target.shape).astype(np.float32)
  # With half of the weight on each of two frames, frames have equal weights.
  errors = np.square(pred - target).mean(-1)
  hidden = np.take_along_axis(
    np.asarray(task.masking.hidden_region(regions, keys)), masked, axis=1
  )
  assert hidden.any(axis=1).all()
  want = errors.mean() + 0.3 * np.mean(
    [e[h].mean() for e, h in zip(errors, hidden, strict=True)]
  )
  np.testing.assert_allclose(
    losses.reconstruction_loss(pred, target, weights), want, rtol=1e-5
  )


def test_the_papers_task_has_no_weights(batch):
  task = make("fasking")
  (_, _, masked), _ = task.inputs_and_target(*batch)
  assert task.weights(batch[1], batch[2], masked) is None
