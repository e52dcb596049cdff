"""One pretraining step of autoencoder and discriminator.

Both networks are updated from a single forward pass of the autoencoder. The
authors' code runs it twice, once for each update. Its parameters do not change
in between, so one pass is enough: the discriminator is trained on the
predictions with the gradient stopped; then the autoencoder's loss is computed
with the updated discriminator and differentiated through the same pass. The
result is the same to rounding, at half the arithmetic (docs/METHOD.md).

All functions are pure: no I/O, no configuration object.

Axes: B batch, T frames, H W pixels, N tokens, V visible, M masked, D width, P
pixels per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from marlin_jax.devices import microbatches
from marlin_jax.models import partition
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE
from marlin_jax.models.prediction import Prediction
from marlin_jax.objectives import objective
from marlin_jax.objectives.objective import Forward, Objective
from marlin_jax.pretraining import losses, pretext_task, spikes
from marlin_jax.pretraining.pretext_task import PretextTask

Pytree = Any


@flax.struct.dataclass
class TrainState:
  """Everything that a step reads and writes; a pytree.

  Attributes:
    step: int32, steps taken.
    num_skipped: int32, steps among them that changed nothing because a loss or
      a gradient was not finite or a spike.
    params: the autoencoder's trained parameters, nested dicts by path; those of
      extra objectives' networks under 'objectives'.
    ema: exponential moving average of `params`; {} if none is kept.
    fixed: position tables, by the paths of `params`.
    opt_state: state of the autoencoder's optimiser.
    disc_params: the discriminator's parameters.
    disc_opt_state: state of the discriminator's optimiser.
    recent: loss and gradient norm of the last steps, see `spikes`; {} if spikes
      are not skipped.
  """

  step: jax.Array
  num_skipped: jax.Array
  params: Pytree
  ema: Pytree
  fixed: Pytree
  opt_state: Pytree
  disc_params: Pytree
  disc_opt_state: Pytree
  recent: Pytree = flax.struct.field(default_factory=dict)

  @property
  def best_params(self) -> Pytree:
    """The parameters to evaluate: the average if one is kept."""
    return self.ema or self.params


@dataclasses.dataclass(frozen=True)
class Adversarial:
  """Settings of the adversarial loss.

  Attributes:
    weight: factor of the adversarial term in the autoencoder's loss; 0 turns
      the discriminator off.
    gp_weight: factor of the gradient penalty in the discriminator's loss.
    d_steps: discriminator updates per step, all on the same predictions.
    g_steps: autoencoder updates per step; each after the first runs the
      autoencoder again.
    max_pull: limit of the norm of the adversarial gradient with respect to a
      clip's decoder features, as a multiple of the norm of the reconstruction
      gradient. It keeps the autoencoder learning to reconstruct if the
      discriminator's scores diverge. 0: no limit, as in the authors' code.
  """

  weight: float
  gp_weight: float
  d_steps: int
  g_steps: int
  max_pull: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Static half of a step: network structure, optimisers, settings.

  Attributes:
    task: pretext task: masking, and the form of the target.
    adversarial: settings of the adversarial loss.
    objectives: extra objectives of the autoencoder.
    pixel_weight: factor of the reconstruction loss.
    mae: structure of the autoencoder.
    discriminator: structure of the discriminator.
    optimizer: updates the autoencoder.
    disc_optimizer: updates the discriminator.
    ema_decay: decay of the average of the autoencoder's parameters; 0: no
      average is kept.
    ema_warmup: True limits the decay to (1 + t) / (10 + t) at update t, from 0,
      so that the average soon forgets the start.
    decoder_ratio: share of the masked tokens that are not predicted.
    num_microbatches: microbatches per batch, processed one after the other with
      accumulated gradients; above 1 if the batch does not fit in memory.
    placement: placement of tokens and weights on a mesh; None: on one device.
    matmul_precision: precision of float32 matmuls, as jax names it; 'default':
      that of jax's configuration.
    datasets: names of the data sets that clips are drawn from; () for one.
    first_ids: first of the record numbers of each, in the batch's `_id`.
    spike_sigmas: a step changes nothing if its loss or gradient norm is more
      than this number of standard deviations above the recent mean; 0: no
      limit.
  """

  task: PretextTask
  adversarial: Adversarial
  mae: nnx.GraphDef
  discriminator: nnx.GraphDef
  optimizer: optax.GradientTransformation
  disc_optimizer: optax.GradientTransformation
  objectives: tuple[Objective, ...] = ()
  pixel_weight: float = 1.0
  ema_decay: float = 0.0
  ema_warmup: bool = False
  decoder_ratio: float = 0.0
  num_microbatches: int = 1
  placement: partition.Placement | None = None
  matmul_precision: str = "default"
  datasets: tuple[str, ...] = ()
  first_ids: tuple[int, ...] = ()
  spike_sigmas: float = 0.0

  @property
  def fields(self) -> tuple[str, ...]:
    """Keys of a batch that a step reads."""
    extra = dict.fromkeys(key for x in self.objectives for key in x.fields)
    return ("video", "regions", *extra, *(("_id",) if self.datasets else ()))

  @contextlib.contextmanager
  def tracing(self):
    """Context to trace the networks and their gradients in."""
    precision = self.matmul_precision
    if precision == "default":
      precision = jax.config.jax_default_matmul_precision
    context = partition.use(self.placement)
    with context, jax.default_matmul_precision(precision):
      yield

  def prepare(self, batch):
    """Masks a batch.

    Args:
      batch: `video`, `regions` and `keys`; see PretextTask.inputs_and_target.

    Returns:
      The autoencoder's inputs (patches, visible, masked), its target, the
      weights of the reconstruction loss, see PretextTask.weights, and B jax
      keys for the gradient penalty.
    """
    mask_keys, penalty_keys = pretext_task.split_keys(batch["keys"])
    inputs, target = self.task.inputs_and_target(
      batch["video"], batch["regions"], mask_keys, self.decoder_ratio
    )
    weights = self.task.weights(batch["regions"], mask_keys, inputs[2])
    return inputs, target, weights, penalty_keys

  def bind(self, params, fixed) -> MAE:
    """Returns the autoencoder with these parameters of a state."""
    params, fixed = map(objective.without_own, (params, fixed))
    with partition.use(self.placement):
      return nnx.merge(self.mae, partition.weights(params), fixed)

  def forward(self, params, fixed, patches, visible, masked) -> Forward:
    """Runs the autoencoder; see MAE.predict."""
    with partition.use(self.placement):
      network = self.bind(params, fixed)
      encoded = network.encoder(patches, visible)
      prediction = network.decode(encoded, visible, masked)
    return Forward(prediction, encoded if self.objectives else None)

  def predict(self, params, fixed, patches, visible, masked) -> Prediction:
    """Runs the autoencoder; see MAE.predict."""
    return self.forward(params, fixed, patches, visible, masked).prediction

  def bind_discriminator(self, disc_params) -> Discriminator:
    """Returns the discriminator with these parameters."""
    with partition.use(self.placement):
      disc_params = partition.weights(disc_params)
    return nnx.merge(self.discriminator, disc_params)

  # --- the losses -------------------------------------------------------------

  def disc_loss(self, disc_params, prediction, target, keys):
    """Returns the discriminator's loss, and metrics.

    Args:
      disc_params: the discriminator's parameters.
      prediction: the autoencoder's Prediction, a constant here.
      target: float32 (B, M, P).
      keys: B jax keys of the gradient penalty.
    """
    discriminator = self.bind_discriminator(disc_params)
    d_fake, d_real = discriminator(prediction), discriminator(target)
    loss = losses.discriminator_loss(d_real, d_fake)
    metrics = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
    if self.adversarial.gp_weight:
      penalty = losses.gradient_penalty(
        discriminator, prediction.pixels, target, keys
      )
      metrics["gradient_penalty"] = penalty
      loss += self.adversarial.gp_weight * penalty
    return loss, metrics | {"loss_disc": loss}

  def mae_grad(self, prediction, target, weights, disc_params):
    """Returns the gradient of MARLIN's loss with respect to the prediction.

    It is pixel_weight * loss_rec + weight * loss_adv. The gradients of the two
    terms are computed separately, because their ratio is a metric and can be
    limited.

    Args:
      prediction: the autoencoder's Prediction.
      target: float32 (B, M, P).
      weights: weights of the reconstruction loss, see PretextTask.weights.
      disc_params: the discriminator's parameters, constants here.

    Returns:
      The gradient, a Prediction, and scalar metrics. Among them `adv_pull`, the
      mean over clips of the norm of the adversarial gradient over that of the
      reconstruction gradient, both in the decoder's features. Far above 1 the
      discriminator alone determines what the autoencoder learns.
    """
    weight, max_pull = self.adversarial.weight, self.adversarial.max_pull

    def reconstruction(prediction):
      return losses.reconstruction_loss(prediction.pixels, target, weights)

    if self.pixel_weight:
      loss_rec, grad_rec = jax.value_and_grad(reconstruction)(prediction)
    else:
      loss_rec = reconstruction(prediction)
      grad_rec = jax.tree.map(jnp.zeros_like, prediction)
    metrics, loss = {"loss_rec": loss_rec}, loss_rec
    if self.pixel_weight != 1:
      grad_rec = jax.tree.map(lambda x: self.pixel_weight * x, grad_rec)
      metrics["loss"] = loss = self.pixel_weight * loss_rec
    if not weight:
      return grad_rec, metrics

    discriminator = self.bind_discriminator(disc_params)
    scores, backward = jax.vjp(discriminator, prediction)
    loss_adv, grad_scores = jax.value_and_grad(
      losses.generator_adversarial_loss
    )(scores)
    (grad_adv,) = backward(weight * grad_scores)
    pull = _clip_norms(grad_adv.features) / jnp.maximum(
      _clip_norms(grad_rec.features), 1e-20
    )
    if max_pull:
      # The gradient is linear in that of the scores: scaling a clip's scores
      # scales its part of every gradient.
      limit = jnp.minimum(1, max_pull / pull).astype(scores.dtype)
      (grad_adv,) = backward(limit * (weight * grad_scores))
    metrics |= {
      "loss_adv": loss_adv,
      "loss": loss + weight * loss_adv,
      "adv_pull": pull.mean(),
    }
    return jax.tree.map(jnp.add, grad_rec, grad_adv), metrics

  def params_grad(self, state, frozen, passed, prepared, batch):
    """Returns the gradient of the whole loss for `state.params`, and metrics.

    Args:
      state: the state, with the discriminator's parameters after its update.
      frozen: see `train_step`.
      passed: the autoencoder's Forward, and its function backwards.
      prepared: see `prepare`.
      batch: the batch that was prepared.
    """
    (forward, backward), (inputs, target, weights, _) = passed, prepared
    grad, metrics = self.mae_grad(
      forward.prediction, target, weights, state.disc_params
    )
    metrics |= self.losses_by_dataset(
      forward.prediction, target, weights, batch
    )
    if not self.objectives:
      (grads,) = backward(Forward(grad, None))
      return grads, metrics
    loss, extra_metrics, (extra, own) = objective.value_and_grads(
      self.objectives,
      state,
      frozen,
      forward,
      batch | {"visible": inputs[1], "masked": inputs[2]},
    )
    both = jax.tree.map(jnp.add, grad, extra.prediction)
    (grads,) = backward(extra._replace(prediction=both))
    total = metrics.get("loss", metrics["loss_rec"]) + loss
    return grads | own, metrics | extra_metrics | {"loss": total}

  def losses_by_dataset(self, prediction, target, weights, batch):
    """Returns the parts of each data set's loss, if there are several.

    Args:
      prediction: the autoencoder's Prediction.
      target: float32 (B, M, P).
      weights: weights of the reconstruction loss.
      batch: with `_id`, int32 (B,).

    Returns:
      {} for one data set; else `by_dataset` float32 (2, K): sums of the clips'
      reconstruction losses and numbers of clips of each data set, both over B.
    """
    if not self.datasets:
      return {}
    errors = losses.squared_errors(prediction.pixels, target, weights)
    number = jnp.searchsorted(
      jnp.array(self.first_ids), batch["_id"], side="right"
    )
    is_of = jax.nn.one_hot(number - 1, len(self.datasets))  # (B, K)
    means = errors.mean((1, 2))[:, None]
    return {"by_dataset": jnp.stack([(is_of * means).mean(0), is_of.mean(0)])}

  # --- updates ----------------------------------------------------------------

  def update_disc(self, state, grads):
    """Returns the state after one step of the discriminator's optimiser."""
    updates, opt_state = self.disc_optimizer.update(
      grads, state.disc_opt_state, state.disc_params
    )
    return state.replace(
      disc_params=optax.apply_updates(state.disc_params, updates),
      disc_opt_state=opt_state,
    )

  def update_mae(self, state, grads):
    """Returns the state after one step of the autoencoder's optimiser."""
    updates, opt_state = self.optimizer.update(
      grads, state.opt_state, state.params
    )
    return state.replace(
      params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )

  def update_ema(self, state):
    """Returns the state with the average moved towards `params`."""
    if not self.ema_decay:
      return state
    weight = 1 - self.ema_decay
    if self.ema_warmup:
      num_updates = (state.step - state.num_skipped).astype(jnp.float32)
      weight = jnp.maximum(weight, 9 / (10 + num_updates))
    ema = jax.tree.map(
      lambda mean, new: mean + weight * (new - mean),
      state.ema,
      state.params,
    )
    return state.replace(ema=ema)


def _clip_norms(grad):
  """Returns the norm of each clip: (B, M, D) -> float32 (B, 1, 1)."""
  grad = grad.astype(jnp.float32)
  return jnp.sqrt(jnp.square(grad).sum((1, 2), keepdims=True))


def init_state(trainer: Trainer, params, fixed, disc_params) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    num_skipped=jnp.zeros((), jnp.int32),
    params=params,
    # A copy, since each array's memory is donated to the next state.
    ema=jax.tree.map(jnp.copy, params) if trainer.ema_decay else {},
    fixed=fixed,
    opt_state=trainer.optimizer.init(params),
    disc_params=disc_params,
    disc_opt_state=trainer.disc_optimizer.init(disc_params),
    recent=spikes.no_steps() if trainer.spike_sigmas else {},
  )


def train_step(
  trainer: Trainer,
  state: TrainState,
  batch: dict,
  rng: jax.Array,
  frozen: Mapping[str, Pytree] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Updates both networks, or neither if a value is not finite or a spike.

  If a loss or the norm of a gradient is not finite, only the counters change.
  That keeps the whole state finite: if the norm of a gradient is finite, so is
  the square of each of its elements, the largest value that Adam stores.

  Args:
    trainer: structure, optimisers and settings.
    state: the state.
    batch: `video` uint8 (B, T, H, W, 3) and `regions` uint16 (B, T/2, h, w);
      with several `trainer.datasets` also `_id` int32 (B,); and the fields of
      `trainer.objectives`. B is a multiple of `trainer.num_microbatches`.
    rng: the run's key, the same at every step.
    frozen: arrays that extra objectives read, by their names.

  Returns:
    The new state, and float32 scalars: `loss_rec`, `grad_norm`, `num_skipped`
    (so far) and, with the adversarial loss, `loss`, `loss_adv`, `loss_disc`,
    `d_real`, `d_fake`, `adv_pull`, `grad_norm_disc` and, with its penalty,
    `gradient_penalty`; with `trainer.spike_sigmas` also `loss_rec_limit` and
    `grad_norm_limit`, infinite until there are enough steps; with several
    `trainer.datasets` also `loss_rec/NAME` of each, NaN without a clip of it;
    with extra objectives `loss`, `loss_NAME` and what each of them measures.
  """
  step_rng = jax.random.fold_in(rng, state.step)
  # A key per clip, so that masks do not depend on devices or microbatches.
  keys = jax.random.split(step_rng, batch["video"].shape[0])
  batch = {name: batch[name] for name in trainer.fields} | {"keys": keys}
  for x in trainer.objectives:
    batch |= x.of_whole_batch(batch)
  with trainer.tracing():
    if trainer.num_microbatches == 1:
      new, metrics = _step_whole_batch(trainer, state, batch, frozen or {})
    else:
      new, metrics = _step_microbatches(trainer, state, batch, frozen or {})
  by_dataset = metrics.pop("by_dataset", None)
  applied = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
  recent = state.recent
  if trainer.spike_sigmas:
    recent, limits = spikes.follow(
      recent, metrics, applied, trainer.spike_sigmas
    )
    for name, limit in limits.items():
      applied &= metrics[name] <= limit
      metrics |= {f"{name}_limit": limit}
  new = jax.tree.map(
    lambda new, old: jnp.where(applied, new, old),
    trainer.update_ema(new),
    state,
  )
  num_skipped = state.num_skipped + ~applied
  new = new.replace(step=state.step + 1, num_skipped=num_skipped, recent=recent)
  for i, name in enumerate(trainer.datasets):
    total, count = by_dataset[:, i]
    metrics[f"loss_rec/{name}"] = jnp.where(count > 0, total / count, jnp.nan)
  return new, metrics | {"num_skipped": num_skipped.astype(jnp.float32)}


def _step_whole_batch(trainer: Trainer, state: TrainState, batch, frozen):
  """Updates both networks on a whole batch.

  The discriminator's updates and the first of the g_steps share one forward
  pass.
  """
  prepared = inputs, target, _, keys = trainer.prepare(batch)
  metrics = {}

  def forward(params):
    return trainer.forward(params, state.fixed, *inputs)

  passed = jax.vjp(forward, state.params)
  if trainer.adversarial.weight:
    constant = jax.lax.stop_gradient(passed[0].prediction)
    for i in range(trainer.adversarial.d_steps):
      grads, disc_metrics = jax.grad(trainer.disc_loss, has_aux=True)(
        state.disc_params, constant, target, pretext_task.fold_in(keys, i)
      )
      state = trainer.update_disc(state, grads)
      metrics |= disc_metrics | {"grad_norm_disc": optax.tree.norm(grads)}
  for i in range(trainer.adversarial.g_steps):
    if i:
      passed = jax.vjp(forward, state.params)
    grads, mae_metrics = trainer.params_grad(
      state, frozen, passed, prepared, batch
    )
    state = trainer.update_mae(state, grads)
    metrics |= mae_metrics | {"grad_norm": optax.tree.norm(grads)}
  return state, metrics


def _step_microbatches(trainer: Trainer, state: TrainState, batch, frozen):
  """Updates both networks with gradients accumulated over microbatches.

  The autoencoder's loss needs the discriminator after its update on the whole
  batch. Memory does not hold the forward passes of all microbatches until then,
  so each update runs its own forward passes, as in the authors' code.
  """
  split = microbatches.split(
    batch,
    trainer.num_microbatches,
    objective.num_together(trainer.objectives),
  )
  metrics = {}

  def disc_grads(microbatch, i):
    inputs, target, _, keys = trainer.prepare(microbatch)
    prediction = trainer.predict(state.params, state.fixed, *inputs)
    return jax.grad(trainer.disc_loss, has_aux=True)(
      state.disc_params, prediction, target, pretext_task.fold_in(keys, i)
    )

  def mae_grads(microbatch):
    prepared = trainer.prepare(microbatch)
    passed = jax.vjp(
      lambda params: trainer.forward(params, state.fixed, *prepared[0]),
      state.params,
    )
    return trainer.params_grad(state, frozen, passed, prepared, microbatch)

  if trainer.adversarial.weight:
    for i in range(trainer.adversarial.d_steps):
      grads, disc_metrics = microbatches.mean_over(
        split, functools.partial(disc_grads, i=i)
      )
      state = trainer.update_disc(state, grads)
      metrics |= disc_metrics | {"grad_norm_disc": optax.tree.norm(grads)}
  for _ in range(trainer.adversarial.g_steps):
    grads, mae_metrics = microbatches.mean_over(split, mae_grads)
    state = trainer.update_mae(state, grads)
    metrics |= mae_metrics | {"grad_norm": optax.tree.norm(grads)}
  return state, metrics


def reconstruct(
  trainer: Trainer, state: TrainState, batch: dict, keys: jax.Array
) -> dict[str, jax.Array]:
  """Masks and reconstructs clips with the state's best parameters.

  Args:
    trainer: structure, optimisers and settings.
    state: the state.
    batch: see `train_step`.
    keys: B jax keys of the masks.

  Returns:
    See pretext_task.reconstruct_batch; and of the features of visible tokens
    `clip_means`, float32 (B, D), and `mean_square`, see losses.clip_share.
  """
  features = {}  # filled by `predict`, which is called once

  def predict(patches, visible, masked):
    network = trainer.bind(state.best_params, state.fixed)
    encoded = network.encoder(patches, visible)
    features["clip_means"] = encoded.mean(axis=1)
    features["mean_square"] = jnp.square(encoded).mean()
    prediction = network.decode(encoded, visible, masked)
    return prediction.pixels.astype(jnp.float32)

  with trainer.tracing():
    result = pretext_task.reconstruct_batch(
      trainer.task,
      predict,
      {"video": batch["video"], "regions": batch["regions"], "keys": keys},
    )
  return result | features
