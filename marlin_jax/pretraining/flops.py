"""Floating-point operations of a step, counted from the networks' sizes.

Only matrix products count, a fused multiply-add as 2, as model FLOPs
utilisation (MFU) defines it. Everything else that a step does is about 1 %.
XLA's own count cannot replace it: it includes the recomputation of remat and
counts the body of a loop once.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from marlin_jax.devices import chips
from marlin_jax.models.flops import StackFlops
from marlin_jax.pretraining.masking import num_decoded
from marlin_jax.pretraining.train_step import Trainer
from marlin_jax.weights.architecture import Architecture


def training_step(
  architecture: Architecture,
  trainer: Trainer,
  batch_size: int,
  *,
  num_microbatches: int = 1,
) -> float:
  """Returns the FLOPs of one training step, per clip.

  Excludes recomputation by remat, see `repeated_by_remat`, and computation that
  several devices repeat.

  Args:
    architecture: sizes of both networks.
    trainer: pretext task, settings of the adversarial loss, extra objectives.
    batch_size: clips per step over all devices.
    num_microbatches: microbatches per batch; with more than one, each update of
      the discriminator runs the autoencoder forward again. The trainer's own
      number is not used, because MFU counts the step without microbatches.
  """
  parts = _ClipFlops.of_step(architecture, trainer)
  adversarial = trainer.adversarial
  # Forward, and two products backward; the input's gradient is not needed.
  mae = 3 * parts.forward - parts.embed
  if not trainer.pixel_weight:
    mae -= 2 * parts.head
  mae += sum(x.flops for x in trainer.objectives)
  if not adversarial.weight:
    return mae * adversarial.g_steps
  # The product of head and discriminator kernels, once per microbatch.
  fuse = parts.fuse * num_microbatches / batch_size
  # Discriminator update on target and prediction. The first layer needs only
  # the gradient of its weights.
  update = 2 * (parts.disc_hidden + parts.disc_hidden_fused + fuse)
  update += 2 * 3 * parts.disc_out
  if adversarial.gp_weight:
    # The slope at a point is a forward and a backward through the first layer;
    # its gradient is a product for each factor of the slope.
    update += 4 * parts.disc_hidden
  if num_microbatches > 1:
    update += parts.forward - (0 if adversarial.gp_weight else parts.head)
  # The adversarial term: forward, and backward to features and head.
  term = 3 * parts.disc_hidden_fused + 2 * (fuse + parts.disc_out)
  return adversarial.d_steps * update + adversarial.g_steps * (mae + term)


def repeated_by_remat(
  architecture: Architecture, trainer: Trainer, remat: str
) -> float:
  """Returns the FLOPs per clip and step that `remat` recomputes.

  Args:
    architecture: sizes of both networks.
    trainer: pretext task and settings of the adversarial loss.
    remat: one of vit.Execution.remat.
  """
  parts = _ClipFlops.of_step(architecture, trainer)
  stacks = (parts.encoder, parts.decoder)
  per_backward = {
    "none": 0,
    "dots": sum(stack.attention for stack in stacks),
    # No gradient depends on the output of a block's last product.
    "full": sum(stack.forward - stack.mlp / 2 for stack in stacks),
  }[remat]
  return trainer.adversarial.g_steps * per_backward


def features(architecture: Architecture) -> float:
  """Returns the FLOPs of one clip's features: the encoder on all tokens."""
  tubelets = architecture.tubelets
  tokens = tubelets.num_tokens
  embed = 2 * tokens * tubelets.pixels * architecture.width
  return embed + StackFlops(architecture.encoder, tokens, tokens).forward


def peak_clips_per_sec(
  flops_per_clip: float, mesh: Mesh, dtype: str, precision: str = "default"
) -> float | None:
  """Returns clips per second at a model FLOPs utilisation of 1.

  Args:
    flops_per_clip: from `training_step`.
    mesh: the devices.
    dtype, precision: of the matrix products; see `Chip.peak_flops`.

  Returns:
    None if the peak of the chip is unknown; see devices.chips.
  """
  chip = chips.find(mesh.devices.flat[0].device_kind)
  if chip is None:
    return None
  return chip.peak_flops(dtype, precision) * mesh.size / flops_per_clip


@dataclasses.dataclass(frozen=True)
class _ClipFlops:
  """FLOPs of each part of the networks on one clip, forward.

  Attributes:
    embed: patch embedding of the visible tokens.
    encoder: encoder blocks on the visible tokens.
    enc_to_dec: projection from the encoder's width to the decoder's.
    decoder: decoder blocks on the visible tokens and the predicted ones.
    head: output layer, pixels of the predicted tokens.
    disc_hidden: the discriminator's first layer on target pixels.
    disc_hidden_fused: the discriminator's first layer on decoder features,
      fused with the head.
    fuse: product of the kernels of head and first layer; independent of the
      number of clips.
    disc_out: the discriminator's second layer.
  """

  embed: float
  encoder: StackFlops
  enc_to_dec: float
  decoder: StackFlops
  head: float
  disc_hidden: float
  disc_hidden_fused: float
  fuse: float
  disc_out: float

  @classmethod
  def of_step(cls, architecture: Architecture, trainer: Trainer) -> _ClipFlops:
    masking = trainer.task.masking
    visible = masking.num_visible
    masked = num_decoded(masking.num_tokens - visible, trainer.decoder_ratio)
    pixels, disc_hidden = architecture.tubelets.pixels, architecture.disc_hidden
    width, dec_width = architecture.width, architecture.dec_width
    return cls(
      embed=2 * visible * pixels * width,
      encoder=StackFlops(architecture.encoder, visible, visible),
      enc_to_dec=2 * visible * width * dec_width,
      decoder=StackFlops(architecture.decoder, visible + masked, masked),
      head=2 * masked * dec_width * pixels,
      disc_hidden=2 * masked * pixels * disc_hidden,
      disc_hidden_fused=2 * masked * dec_width * disc_hidden,
      fuse=2 * dec_width * pixels * disc_hidden,
      disc_out=2 * masked * disc_hidden,
    )

  @property
  def forward(self) -> float:
    """FLOPs of the whole autoencoder."""
    stacks = self.encoder.forward + self.decoder.forward
    return self.embed + stacks + self.enc_to_dec + self.head
