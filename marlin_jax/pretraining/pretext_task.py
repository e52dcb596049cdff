"""The pretext task: masks tokens of a clip to be predicted.

Pure functions on arrays. Axes: B batch, T frames, H W pixels, N tokens, V
visible, M masked, P pixels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from marlin_jax.data.clip_geometry import (
  Tubelets,
  by_colour,
  imagenet_normalised,
)
from marlin_jax.models.mae import gather_tokens, value_stats
from marlin_jax.pretraining import losses, masking
from marlin_jax.pretraining.masking import Masking
from marlin_jax.weights.architecture import Architecture

# About the mean value of a face crop's pixels, which are in [0, 1].
_GREY = 0.45


@dataclasses.dataclass(frozen=True)
class PretextTask:
  """Input of the encoder and target of the decoder.

  Attributes:
    tubelets: the token grid.
    masking: strategy and ratio of the masks.
    norm_pix: predict each token normalised by its own mean and standard
      deviation per colour (VideoMAE); MARLIN predicts plain pixels.
    imagenet_input: feed pixels normalised with ImageNet's statistics, as
      VideoMAE checkpoints expect.
    motion_weight: share of the loss on the frames of a token after its first,
      which are then predicted as differences from it (Sun et al. 2023,
      MAE-DFER, section 3.3); 0: all frames are predicted as they are.
    region_weight: weight of a second loss, on the region that crfr_p masks
      whole (Wang et al. 2025, FSFM, section 3.1).
  """

  tubelets: Tubelets
  masking: Masking
  norm_pix: bool = False
  imagenet_input: bool = False
  motion_weight: float = 0.0
  region_weight: float = 0.0

  @classmethod
  def from_architecture(
    cls,
    architecture: Architecture,
    strategy: str,
    ratio: float,
    *,
    region_weight: float = 0.0,
  ) -> PretextTask:
    """Returns the pretext task for a network.

    Args:
      architecture: sets the token grid and the conventions of input and target.
      strategy, ratio: see masking.Masking.
      region_weight: see PretextTask.

    Raises:
      ValueError: the strategy is unknown, or no token would be visible.
    """
    return cls(
      architecture.tubelets,
      Masking(strategy, ratio, architecture.tubelets.grid),
      norm_pix=architecture.norm_pix,
      imagenet_input=architecture.imagenet_input,
      motion_weight=architecture.motion_weight,
      region_weight=region_weight,
    )

  def inputs_and_target(self, video, regions, keys, decoder_ratio=0.0):
    """Splits a batch into the autoencoder's inputs and target.

    Args:
      video: uint8 (B, T, H, W, 3).
      regions: uint16 (B, T / tubelet_size, h, w), region bits per token.
      keys: B jax keys for the masks.
      decoder_ratio: share of the masked tokens that are not predicted.

    Returns:
      ((patches, visible, masked), target): patches float32 (B, V, P), visible
      int (B, V), masked int (B, M), target float32 (B, M, P).
    """
    visible, masked = self.masking(regions, keys)
    if decoder_ratio:
      masked = masking.running_cells(
        masked,
        self.tubelets.grid,
        fold_in(keys, 1),
        masking.num_decoded(masked.shape[1], decoder_ratio),
      )
    tokens = self.tubelets.patchify(video)
    # Gathered as uint8 and converted afterwards: a quarter of the memory.
    target = gather_tokens(tokens, masked).astype(jnp.float32) / 255
    target = self._to_target(target)
    patches = gather_tokens(tokens, visible).astype(jnp.float32) / 255
    if self.imagenet_input:
      patches = imagenet_normalised(patches)
    return (patches, visible, masked), target

  def weights(self, regions, keys, masked):
    """Returns the weights of the reconstruction loss, see losses.

    Args:
      regions, keys: as of `inputs_and_target`.
      masked: int (B, M), as `inputs_and_target` returns it.

    Returns:
      None if all are 1; else float32, broadcasts to (B, M, P).
    """
    weights = None
    if self.region_weight:
      hidden = jnp.take_along_axis(
        self.masking.hidden_region(regions, keys), masked, axis=1
      )
      # A clip's mean over all tokens becomes one over those of the region.
      count = hidden.sum(1, keepdims=True)
      scale = hidden.shape[1] / jnp.maximum(count, 1)
      weights = (1 + self.region_weight * scale * hidden)[..., None]
    if self.motion_weight:
      pt = self.tubelets.tubelet_size
      by_frame = jnp.full((3, pt, 1), self.motion_weight * pt / (pt - 1))
      by_frame = by_frame.at[:, 0].set((1 - self.motion_weight) * pt)
      num_pixels = self.tubelets.pixels // (3 * pt)
      by_pixel = jnp.repeat(by_frame, num_pixels, axis=2).reshape(-1)
      weights = by_pixel if weights is None else weights * by_pixel
    return weights

  @property
  def target_of_grey(self):
    """Target of a token that is grey in all frames, float32 (P,)."""
    # Not by `_to_target`, which divides by the deviation: that of a constant is
    # what rounding leaves of 0.
    grey = 0 if self.norm_pix else _GREY
    frames = self._by_frame(
      jnp.full((self.tubelets.pixels,), grey, jnp.float32)
    )
    if self.motion_weight:
      frames = frames.at[:, 1:].set(0)
    return frames.reshape(-1)

  def _to_target(self, pixels):
    """Maps pixels in [0, 1], float32 (..., P), to what the decoder predicts."""
    target = pixels
    if self.norm_pix:
      mean, std = value_stats(by_colour(pixels))
      target = ((by_colour(pixels) - mean) / std).reshape(pixels.shape)
    if self.motion_weight:
      frames = self._by_frame(target)
      first, rest = frames[..., :1, :], frames[..., 1:, :]
      target = jnp.concatenate([first, rest - first], -2).reshape(pixels.shape)
    return target

  def to_pixels(self, predicted, pixels):
    """Maps predictions of the decoder to pixels.

    Args:
      predicted: float32 (..., P).
      pixels: the true pixels in [0, 1], float32 (..., P), whose statistics
        undo the normalisation.

    Returns:
      float32 (..., P), not clipped to [0, 1].
    """
    if self.motion_weight:
      frames = self._by_frame(predicted)
      first, rest = frames[..., :1, :], frames[..., 1:, :]
      predicted = jnp.concatenate([first, rest + first], -2)
      predicted = predicted.reshape(pixels.shape)
    if self.norm_pix:
      mean, std = value_stats(by_colour(pixels))
      predicted = (by_colour(predicted) * std + mean).reshape(pixels.shape)
    return predicted

  def _by_frame(self, tokens):
    """Splits a token's pixels: (..., P) -> (..., 3, tubelet_size, pixels)."""
    shape = *tokens.shape[:-1], 3, self.tubelets.tubelet_size, -1
    return tokens.reshape(shape)


def fold_in(keys: jax.Array, i: int) -> jax.Array:
  """Derives a new key from each of B keys."""
  return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)


def split_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits each of B keys into a mask key and a gradient-penalty key."""
  pairs = jax.vmap(jax.random.split)(keys)
  return pairs[:, 0], pairs[:, 1]


def reconstruct_batch(
  task: PretextTask, predict: Callable[..., jax.Array], batch: dict
) -> dict[str, jax.Array]:
  """Masks clips, predicts the masked tokens and reassembles the clips.

  Args:
    task: masking, and the form of the target.
    predict: the autoencoder: patches (B, V, P), visible (B, V) and masked
      (B, M) -> predictions float32 (B, M, P); see models.mae.MAE.
    batch: `video` and `regions` as for `PretextTask.inputs_and_target`, and
      `keys`, B jax keys.

  Returns:
    `video`: float32 (B, T, H, W, 3), predicted where masked and original where
      visible. Predictions are not clipped to [0, 1]; normalised targets are
      undone with each token's true mean and standard deviation.
    `visible`: bool (B, N).
    `loss_rec`: scalar, the training loss on the target.
    `loss_pixels`: scalar, the same loss on plain pixels.
    `loss_own_colour`, `colour_sums`: baselines of it, see losses.flat_patches.
  """
  mask_keys, _ = split_keys(batch["keys"])
  (patches, visible, masked), target = task.inputs_and_target(
    batch["video"], batch["regions"], mask_keys
  )
  predicted = predict(patches, visible, masked)
  loss_rec = losses.reconstruction_loss(
    predicted, target, task.weights(batch["regions"], mask_keys, masked)
  )
  tokens = task.tubelets.patchify(batch["video"]).astype(jnp.float32) / 255
  pixels = gather_tokens(tokens, masked)
  predicted = task.to_pixels(predicted, pixels)
  scatter = jax.vmap(lambda clip, index, new: clip.at[index].set(new))
  is_visible = jnp.zeros(tokens.shape[:2], bool)
  return {
    "video": task.tubelets.unpatchify(scatter(tokens, masked, predicted)),
    "visible": scatter(is_visible, visible, jnp.ones(visible.shape, bool)),
    "loss_rec": loss_rec,
    "loss_pixels": losses.reconstruction_loss(predicted, pixels),
    **losses.flat_patches(tokens, masked),
  }
