"""Training step of the generator and of the quality discriminator.

The generator's loss is a weighted mean of three, with weights that sum to 1:
the absolute error (L1), the expert's loss for the generated frames with their
sound, and the adversarial loss (github.com/Rudrabha/Wav2Lip,
hq_wav2lip_train.py). As there, the generator is updated first, and the
discriminator then sees the frames generated before the update.

Unlike there, the expert runs in evaluation mode: with batch statistics its
output for a clip would depend on the other clips, and differ from the output
that the schedule of the sync weight depends on.

Everything here is pure: no I/O, no config object.

Axes: B clips, T frames, S pixels of the square picture, M mel rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from marlin_jax.lipsync.networks import inputs
from marlin_jax.lipsync.networks.functional import Graph, Variables
from marlin_jax.lipsync.training.expert_step import cosines, finite_or_old
from marlin_jax.lipsync.training.losses import (
  published_sync_loss,
  sync_loss,
)

Pytree = Any


@flax.struct.dataclass
class GeneratorState:
  """State of the training; a plain pytree.

  Attributes:
    step: int32, steps taken.
    num_skipped: int32, steps not applied.
    sync_weight: float32, weight of the expert's loss; 0 until the generated
      frames are good enough, see `next_sync_weight`.
    generator: variables of the generator.
    opt_state: optimiser state of the generator.
    discriminator: variables of the discriminator; None without one.
    disc_opt_state: optimiser state of the discriminator; None without one.
  """

  step: jax.Array
  num_skipped: jax.Array
  sync_weight: jax.Array
  generator: Variables
  opt_state: Pytree
  discriminator: Variables | None
  disc_opt_state: Pytree | None

  @property
  def trained(self) -> Variables:
    """Variables of the trained network."""
    return self.generator


@dataclasses.dataclass(frozen=True)
class GeneratorTrainer:
  """Static half of the training step.

  Attributes:
    generator: graph of a generator, networks.marlin_generator or
      networks.wav2lip.
    image_size: side of its frames in pixels, S.
    expert: graph of a networks.sync_expert.SyncExpert.
    discriminator: graph of a networks.quality_discriminator
      .QualityDiscriminator; None without one.
    adv_weight: weight of the adversarial loss; 0 without a discriminator.
    optimizer: optimiser of the generator.
    disc_optimizer: optimiser of the discriminator.
  """

  generator: Graph
  image_size: int
  expert: Graph
  discriminator: Graph | None
  adv_weight: float
  optimizer: optax.GradientTransformation
  disc_optimizer: optax.GradientTransformation

  def init(self, arrays: Variables, disc: Variables | None) -> GeneratorState:
    """Returns the state before the first step."""
    return GeneratorState(
      step=jnp.zeros((), jnp.int32),
      num_skipped=jnp.zeros((), jnp.int32),
      sync_weight=jnp.zeros((), jnp.float32),
      generator=arrays,
      opt_state=self.optimizer.init(arrays.params),
      discriminator=disc,
      disc_opt_state=self.disc_optimizer.init(disc.params) if disc else None,
    )

  def pictures(self, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a batch as the generator sees it.

    Returns:
      masked, reference and target, float32 (B, T, S, S, 3) in [0, 1].
    """
    size = self.image_size
    target, reference = (
      inputs.resize(inputs.as_floats(batch[key]), size, size)
      for key in ("video", "reference")
    )
    return inputs.hide_mouth(target), reference, target

  def sync_loss(
    self,
    judge: Variables,
    video: jax.Array,
    mel: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = sync_loss,
  ) -> jax.Array:
    """Returns the expert's loss for frames and the sound they should fit."""
    expert = self.expert.eval_network(judge)
    cosine = cosines(expert.faces(video), expert.sound(mel))
    return loss(cosine, jnp.ones(cosine.shape, bool))


def next_sync_weight(
  current: float, eval_loss: float, *, threshold: float, weight: float
) -> float:
  """Returns the sync weight after an evaluation: Wav2Lip's schedule.

  The weight is switched on once the evaluation loss is below the threshold, and
  stays on.

  Args:
    current: current weight of the sync loss.
    eval_loss: mean of the expert's published loss for frames generated from
      the evaluation split.
    threshold: 0.75 in Wav2Lip.
    weight: the weight when switched on.
  """
  return weight if eval_loss < threshold else current


def generator_step(
  trainer: GeneratorTrainer,
  state: GeneratorState,
  judge: Variables,
  batch: dict,
) -> tuple[GeneratorState, dict[str, jax.Array]]:
  """Takes a step of the generator and the discriminator.

  Neither is updated if a metric is not finite.

  Args:
    trainer: graphs and optimisers; the static half of the step.
    state: state before the step.
    judge: variables of the expert.
    batch: `video` and `reference` uint8 (B, T, 224, 224, 3), `mel` float32
      (B, M, 80) of the window and `mels` float32 (B, T, 16, 80) of its frames.

  Returns:
    The new state and float32 scalars: loss, loss_l1, loss_sync, sync_weight,
    grad_norm and num_skipped so far; with a discriminator also loss_adv,
    loss_disc_real, loss_disc_fake and grad_norm_disc.
  """
  masked, reference, target = trainer.pictures(batch)

  def loss(params):
    generated, stats = trainer.generator.train_apply(
      params,
      state.generator,
      lambda net: net(masked, reference, batch["mels"]),
    )
    parts = {
      "loss_l1": jnp.abs(generated - target).mean(),
      "loss_sync": trainer.sync_loss(judge, generated, batch["mel"]),
    }
    total = (1 - state.sync_weight - trainer.adv_weight) * parts["loss_l1"]
    total += state.sync_weight * parts["loss_sync"]
    if trainer.discriminator:
      disc = trainer.discriminator.eval_network(state.discriminator)
      parts["loss_adv"] = _cross_entropy(disc(generated), real=True)
      total += trainer.adv_weight * parts["loss_adv"]
    return total, (generated, stats, parts | {"loss": total})

  grads, (generated, stats, metrics) = jax.grad(loss, has_aux=True)(
    state.generator.params
  )
  metrics["sync_weight"] = state.sync_weight
  metrics["grad_norm"] = optax.tree.norm(grads)
  updates, opt_state = trainer.optimizer.update(
    grads, state.opt_state, state.generator.params
  )
  params = optax.apply_updates(state.generator.params, updates)
  new = state.replace(
    generator=state.generator.replace(params=params, stats=stats),
    opt_state=opt_state,
  )
  if trainer.discriminator:
    new, disc_metrics = _update_discriminator(trainer, new, generated, target)
    metrics |= disc_metrics
  return finite_or_old(new, state, metrics)


def _update_discriminator(trainer, state, generated, target):
  """Updates the discriminator; its loss is the sum over real and generated."""
  generated = jax.lax.stop_gradient(generated)

  def loss(params):
    def judge(net):
      real = _cross_entropy(net(target), real=True)
      return real, _cross_entropy(net(generated), real=False)

    (real, fake), stats = trainer.discriminator.train_apply(
      params, state.discriminator, judge
    )
    return real + fake, (
      stats,
      {"loss_disc_real": real, "loss_disc_fake": fake},
    )

  grads, (stats, metrics) = jax.grad(loss, has_aux=True)(
    state.discriminator.params
  )
  updates, opt_state = trainer.disc_optimizer.update(
    grads, state.disc_opt_state, state.discriminator.params
  )
  params = optax.apply_updates(state.discriminator.params, updates)
  new = state.replace(
    discriminator=state.discriminator.replace(params=params, stats=stats),
    disc_opt_state=opt_state,
  )
  return new, metrics | {"grad_norm_disc": optax.tree.norm(grads)}


def _cross_entropy(logits: jax.Array, *, real: bool) -> jax.Array:
  labels = jnp.full(logits.shape, float(real))
  return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def generate(
  trainer: GeneratorTrainer,
  state: GeneratorState,
  judge: Variables,
  batch: dict,
) -> dict[str, jax.Array]:
  """Generates a batch in evaluation mode and measures the result.

  Args:
    trainer, state, judge, batch: see `generator_step`.

  Returns:
    `masked`, `reference`, `generated`, `target`, float32 (B, T, S, S, 3), and
    the scalars loss_l1, loss_sync, loss_sync_target (the expert's published
    loss, for the generated and for the true frames: the second is a lower bound
    in practice) and, in dB, psnr_mouth of the lower
    half and psnr_reference, of the lower half of the reference.
  """
  masked, reference, target = trainer.pictures(batch)
  net = trainer.generator.eval_network(state.generator)
  generated = net(masked, reference, batch["mels"])
  sync_of = functools.partial(
    trainer.sync_loss, judge, mel=batch["mel"], loss=published_sync_loss
  )
  return {
    "masked": masked,
    "reference": reference,
    "generated": generated,
    "target": target,
    "loss_l1": jnp.abs(generated - target).mean(),
    "loss_sync": sync_of(generated),
    "loss_sync_target": sync_of(target),
    "psnr_mouth": _mouth_psnr(generated, target),
    "psnr_reference": _mouth_psnr(reference, target),
  }


def _mouth_psnr(video: jax.Array, target: jax.Array) -> jax.Array:
  """Returns the peak signal-to-noise ratio of the lower halves in dB."""
  half = target.shape[-3] // 2
  error = jnp.square(video - target)[..., half:, :, :].mean()
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))
