"""Floating-point operations of the networks, counted from their sizes.

Matrix products alone, a fused multiply-add as 2: what model FLOPs utilisation
(MFU) is about. Everything else a step does is about a hundredth.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.devices import chips
from marlin_jax.pretraining.masking import Masking, num_decoded


def train_step(config: ConfigDict, num_micro: int = 1) -> float:
  """FLOPs of one training step, per clip.

  What remat computes again does not count, see `repeated_by_remat`; nor does
  what a mesh computes twice.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    num_micro: parts in which a batch is worked through; with more than one
      the discriminator's updates run the autoencoder forwards once more each.
  """
  parts, adv = _Parts.of(config), config.adv
  # Nothing upstream of the embedding has a gradient.
  mae = 3 * parts.forward - parts.embed
  if not adv.weight:
    return mae * adv.g_steps
  # What predictions take in the discriminator's first layer: a product of two
  # kernels for each part of the batch.
  compose = parts.compose * num_micro / config.batch_size
  # Target and prediction; of the first layer only the weights' gradient.
  update = 2 * (parts.judge + parts.judge_features + compose)
  update += 2 * 3 * parts.verdict
  if adv.gp_weight:
    # The slope at one point is forwards and back through the first layer; its
    # gradient, a product for each factor of the slope.
    update += 4 * parts.judge
  if num_micro > 1:
    update += parts.forward - (0 if adv.gp_weight else parts.head)
  # The autoencoder's loss: forwards, and back to features and head.
  adversarial = 3 * parts.judge_features + 2 * (compose + parts.verdict)
  return adv.d_steps * update + adv.g_steps * (mae + adversarial)


def repeated_by_remat(config: ConfigDict) -> float:
  """FLOPs per clip and step that `config.remat` spends to save memory."""
  blocks = (_Parts.of(config).encoder, _Parts.of(config).decoder)
  per_backward = {
    "none": 0,
    "dots": sum(b.attention for b in blocks),
    # No gradient asks for what a block's last product gives.
    "full": sum(b.forward - b.mlp / 2 for b in blocks),
  }[config.remat]
  return config.adv.g_steps * per_backward


def features(config: ConfigDict) -> float:
  """FLOPs of one clip's features: the encoder on all tokens."""
  parts = _Parts.of(config)
  everything = dataclasses.replace(
    parts.encoder, tokens=parts.num_tokens, wanted=parts.num_tokens
  )
  embed = parts.embed * parts.num_tokens / parts.encoder.tokens
  return embed + everything.forward


def peak_clips_per_sec(config: ConfigDict, mesh: Mesh) -> float | None:
  """Returns clips per second at a model FLOPs utilisation of 1.

  Args:
    config: a valid configuration.
    mesh: devices that train.

  Returns:
    None if the peak of the chip is unknown; see devices.chips.
  """
  chip = chips.find(mesh.devices.flat[0].device_kind)
  if chip is None:
    return None
  return chip.peak_flops(config.dtype) * mesh.size / train_step(config)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """A stack of transformer blocks on one clip's tokens.

  Attributes:
    wanted: of the tokens, those that the last block computes.
  """

  tokens: int
  wanted: int
  width: int
  depth: int
  mlp_dim: int

  def _sum(self, of_block) -> float:
    return (self.depth - 1) * of_block(self.tokens) + of_block(self.wanted)

  @property
  def attention(self) -> float:
    """Scores and weighted sums."""
    return self._sum(lambda queries: 4 * queries * self.tokens * self.width)

  @property
  def mlp(self) -> float:
    return self._sum(lambda queries: 4 * queries * self.width * self.mlp_dim)

  @property
  def forward(self) -> float:
    projections = self._sum(
      lambda queries: 4 * (queries + self.tokens) * self.width**2
    )
    return projections + self.attention + self.mlp


@dataclasses.dataclass(frozen=True)
class _Parts:
  """One clip forwards through each part.

  Attributes:
    num_tokens: of the clip.
    embed: patch embedding of the visible tokens.
    encoder: on the visible tokens.
    enc_to_dec: from the encoder's width to the decoder's.
    decoder: on the visible tokens and those to predict.
    head: pixels of the tokens to predict.
    judge: the discriminator's first layer on as many pixels.
    judge_features: the same on the features that the head reads.
    compose: head and first layer in one, whatever the number of clips.
    verdict: the discriminator's second layer.
  """

  num_tokens: int
  embed: float
  encoder: _Blocks
  enc_to_dec: float
  decoder: _Blocks
  head: float
  judge: float
  judge_features: float
  compose: float
  verdict: float

  @classmethod
  def of(cls, config: ConfigDict) -> _Parts:
    model = config.model
    tubelets = Tubelets(config.data.num_frames, tubelet_size=model.tubelet_size)
    masks = Masking(config.mask.strategy, config.mask.ratio, tubelets.grid)
    num_tokens, visible = masks.num_tokens, masks.num_visible
    masked = num_decoded(num_tokens - visible, config.mask.decoder_ratio)
    pixels = tubelets.pixels
    return cls(
      num_tokens=num_tokens,
      embed=2 * visible * pixels * model.width,
      encoder=_Blocks(
        visible, visible, model.width, model.depth, model.mlp_dim
      ),
      enc_to_dec=2 * visible * model.width * model.dec_width,
      decoder=_Blocks(
        visible + masked,
        masked,
        model.dec_width,
        model.dec_depth,
        model.dec_mlp_dim,
      ),
      head=2 * masked * model.dec_width * pixels,
      judge=2 * masked * pixels * config.adv.hidden,
      judge_features=2 * masked * model.dec_width * config.adv.hidden,
      compose=2 * model.dec_width * pixels * config.adv.hidden,
      verdict=2 * masked * config.adv.hidden,
    )

  @property
  def forward(self) -> float:
    """The autoencoder."""
    blocks = self.encoder.forward + self.decoder.forward
    return self.embed + blocks + self.enc_to_dec + self.head
