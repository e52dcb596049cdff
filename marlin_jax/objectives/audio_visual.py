"""Audio-visual pretraining: the sound of a clip beside its video.

As in HiCMAE (Sun et al. 2024, Information Fusion, arXiv 2401.05698), the sound
has a masked autoencoder beside the video's: patches of 16 x 16 of the mel
spectrogram, 80% of which are masked at random and reconstructed; and a contrast
pairs the video of each clip with its sound. Two things are simpler. The sound
is reconstructed from the visible tokens of both modalities, in one decoder, and
the video from the video alone, by MARLIN's pass; HiCMAE's encoders exchange
tokens in two blocks before both decoders. The contrast compares the encoders'
outputs through linear projections; HiCMAE compares three intermediate layers
without any, which needs encoders of one width.

Clips without sound, or with silence alone, are in neither loss. The contrast is
between people, as the batch knows them; between records where it does not.

Axes: B clips, N sound tokens, V visible, M masked, P values per token, F
features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax.data.clip_geometry import SoundPatches
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.models import vit
from marlin_jax.models.flops import StackFlops
from marlin_jax.models.mae import gather_tokens, value_stats
from marlin_jax.models.sound import SoundAutoencoder
from marlin_jax.objectives import collapse
from marlin_jax.objectives.objective import Forward, Objective
from marlin_jax.records.schema import NUM_MELS

# Logit of a pair that is not compared.
_LEFT_OUT = -1e9
# float32 arrays as wide as a token that a block keeps, its MLP's included, and
# arrays of attention weights; as in pretraining.memory, without remat.
_TOKEN_ARRAYS, _WEIGHT_ARRAYS = 20, 2


def encoder_size(settings: ConfigDict) -> vit.Size:
  """Returns the size of the sound's encoder.

  Args:
    settings: the section `sound` of a configuration.
  """
  width = settings.width
  return vit.Size(width, settings.depth, settings.num_heads, 4 * width)


class AudioVisual(Objective):
  """Reconstruction of masked sound, and contrast of sound and video."""

  name = "sound"

  @functools.cached_property
  def patches(self) -> SoundPatches:
    """Token grid of the sound."""
    return SoundPatches.of(self.run.architecture.clip)

  @property
  def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Sound of a clip, and the numbers of its person and its record."""
    rows = (self.patches.num_rows, NUM_MELS)
    return {
      "mel": jax.ShapeDtypeStruct(rows, jnp.float32),
      "has_sound": jax.ShapeDtypeStruct((), bool),
      "_subject": jax.ShapeDtypeStruct((), jnp.int32),
      "_id": jax.ShapeDtypeStruct((), jnp.int32),
    }

  def check_data(self, datasets, clips_per_epoch):
    del clips_per_epoch
    if not any(dataset.has_sound for dataset in datasets):
      raise DatasetError(
        f"config.sound.weight={self.weight} needs sound, and "
        f"{', '.join(dataset.path for dataset in datasets)} was prepared "
        "without: prepare the videos again, with data_prep.prepare --sound"
      )

  @property
  def least_clips(self) -> int:
    return 2 if self.settings.contrast_weight else 1

  @property
  def num_heads(self) -> Mapping[str, int]:
    return {
      "encoder": self._encoder.num_heads,
      "decoder": self._decoder.num_heads,
    }

  @property
  def _encoder(self) -> vit.Size:
    return encoder_size(self.settings)

  @property
  def _decoder(self) -> vit.Size:
    settings, width = self.settings, self.settings.dec_width
    return vit.Size(
      width, settings.dec_depth, settings.dec_num_heads, 4 * width
    )

  @property
  def num_visible(self) -> int:
    """V, at least 1."""
    num = (1 - self.settings.mask_ratio) * self.patches.num_tokens
    return max(math.floor(num + 1e-6), 1)

  def networks(self, rngs: nnx.Rngs) -> SoundAutoencoder:
    """Draws encoder, decoder and projections.

    A shorter clip, of a stage of a curriculum, has the first positions.
    """
    return SoundAutoencoder(
      num_tokens=self.patches.num_tokens,
      values=self.patches.values,
      encoder=self._encoder,
      decoder=self._decoder,
      video_width=self.run.architecture.width,
      execution=self.run.execution,
      rngs=rngs,
    )

  def of_whole_batch(self, batch):
    """Returns weights of the clips, 0 without sound; their mean is 1."""
    has_sound = batch["has_sound"].astype(jnp.float32)
    share = jnp.maximum(has_sound.mean(), 1 / len(has_sound))
    return {"sound_weight": has_sound / share}

  def loss(self, own: SoundAutoencoder, frozen, forward: Forward, batch):
    """Returns loss_rec + contrast_weight * loss_contrast, and metrics.

    Metrics: both losses; `accuracy`, see `contrast`; `share` of the clips that
    have sound; of the sound's features those of `collapse.spread`. Losses and
    accuracy are means over the clips with sound, of all microbatches together.
    """
    del frozen
    tokens = self.patches.patchify(batch["mel"])
    visible, masked = self._split(batch["keys"])
    sound = own.encoder(gather_tokens(tokens, visible), visible)
    predicted = own.decode(sound, visible, masked, forward.encoded)
    target = gather_tokens(tokens, masked)
    if self.run.architecture.norm_pix:
      mean, std = value_stats(target)
      target = (target - mean) / std
    errors = jnp.square(predicted - target).mean((1, 2))
    loss_rec = mean_over(errors, batch["has_sound"])
    of_sound = own.sound.pooled(sound)
    loss_contrast, accuracy = contrast(
      own.video.pooled(forward.encoded),
      of_sound,
      batch["has_sound"],
      jnp.where(batch["_subject"] < 0, batch["_id"], batch["_subject"]),
      self.settings.temperature,
    )
    # Of a microbatch: 1 if it has as many clips with sound as the others.
    weight = batch["sound_weight"].mean()
    loss_rec, loss_contrast, accuracy = (
      weight * x for x in (loss_rec, loss_contrast, accuracy)
    )
    return loss_rec + self.settings.contrast_weight * loss_contrast, {
      "loss_rec": loss_rec,
      "loss_contrast": loss_contrast,
      "accuracy": accuracy,
      "share": batch["has_sound"].astype(jnp.float32).mean(),
      **collapse.spread(of_sound),
    }

  def _split(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws the visible tokens and the masked ones, int (B, V) and (B, M)."""
    draw = functools.partial(jax.random.permutation, x=self.patches.num_tokens)
    order = jax.vmap(draw)(keys)
    visible, masked = jnp.split(order, [self.num_visible], axis=1)
    return jnp.sort(visible), jnp.sort(masked)

  @property
  def flops(self) -> float:
    """FLOPs per clip and update; see Objective."""
    visible, width = self.num_visible, self._encoder.width
    masked = self.patches.num_tokens - visible
    values, dec_width = self.patches.values, self._decoder.width
    num_video, video_width = self.run.num_visible, self.run.architecture.width
    embed = 2 * visible * values * width
    to_decoder = 2 * (visible * width + num_video * video_width) * dec_width
    context = visible + num_video
    head = 2 * masked * dec_width * values
    compared = 2 * (width + video_width + self.run.batch_size) * width
    forward = (
      embed
      + StackFlops(self._encoder, visible, visible).forward
      + to_decoder
      + StackFlops(self._decoder, context + masked, masked).forward
      + head
      + compared
    )
    # No gradient for the sound itself.
    return 3 * forward - embed

  @property
  def clip_bytes(self) -> int:
    """Bytes of a clip in both stacks; see Objective."""
    num_tokens = self.patches.num_tokens
    return sum(
      4
      * size.depth
      * tokens
      * (_TOKEN_ARRAYS * size.width + _WEIGHT_ARRAYS * size.num_heads * tokens)
      for size, tokens in (
        (self._encoder, self.num_visible),
        (self._decoder, self.run.num_visible + num_tokens),
      )
    )

  def describe(self) -> str:
    """Returns tokens and size of the encoder."""
    size = self._encoder
    return (
      f"{self.num_visible} of {self.patches.num_tokens} tokens of "
      f"{self.patches.num_rows} mel rows are visible; encoder {size.width}/"
      f"{size.depth}/{size.num_heads}"
    )


def mean_over(values: jax.Array, counts: jax.Array) -> jax.Array:
  """Returns the mean of the clips that count; 0 if none does.

  Args:
    values: float32 (B,).
    counts: bool (B,).
  """
  total = jnp.where(counts, values, 0).sum()
  return total / jnp.maximum(counts.sum(), 1)


def contrast(
  video: jax.Array,
  sound: jax.Array,
  has_sound: jax.Array,
  people: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Compares the video of each clip with the sound of every clip, and back.

  InfoNCE (van den Oord et al. 2018) in both directions, as in CLIP and HiCMAE:
  the cross-entropy of a clip's own sound among its own and those of other
  people. HiCMAE compares clips of the same person too.

  Args:
    video: float32 (B, F), unit vectors.
    sound: float32 (B, F), unit vectors.
    has_sound: bool (B,), the clips that are compared.
    people: int (B,), the person of each clip.
    temperature: divides the cosines.

  Returns:
    The loss, and the share of clips whose own sound, or video, is the most
    similar. The loss is 0 for a single clip.
  """
  is_own = jnp.eye(len(video), dtype=bool)
  is_other = people[:, None] != people[None]
  is_compared = has_sound[:, None] & has_sound[None] & (is_other | is_own)
  logits = jnp.where(is_compared, video @ sound.T / temperature, _LEFT_OUT)
  own = jnp.diagonal(logits)
  losses, hits = [], []
  for axis in (0, 1):
    losses.append(jax.nn.logsumexp(logits, axis=axis) - own)
    hits.append((own >= logits.max(axis=axis)).astype(jnp.float32))
  return (
    mean_over((losses[0] + losses[1]) / 2, has_sound),
    mean_over((hits[0] + hits[1]) / 2, has_sound),
  )
