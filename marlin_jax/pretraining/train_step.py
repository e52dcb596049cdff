"""One training step: both players updated from one autoencoder forward.

The reference runs the autoencoder once for the discriminator's update and once
more for its own (METHOD: two forwards, two backwards). Nothing changes its
weights in between, so here it runs once: the discriminator learns from the
predictions with the gradient stopped, then the autoencoder's loss is taken with
the updated discriminator and pulled back through that same forward. The result
is the same to rounding at half the arithmetic.

Nor need the discriminator see predicted pixels: they are a linear map of the
decoder's features, and so is what its first layer makes of them, at a fraction
of that layer's arithmetic (models/affine.py).

Everything here is pure: no I/O, no config object.

Axes: B batch, T frames, H W pixels, N tokens, V visible, M masked, P pixels per
token.
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
from flax import nnx

from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.models import partition
from marlin_jax.models.affine import Affine
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE, gather_tokens
from marlin_jax.models.vit import Fixed
from marlin_jax.pretraining import losses, masking
from marlin_jax.pretraining.masking import Masking

Pytree = Any

# What VideoMAE checkpoints expect of their input (ImageNet, RGB in [0, 1]).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes; a plain pytree.

  Attributes:
    step: int32, steps taken.
    num_skipped: int32, how many of these changed nothing, because a loss or a
      gradient was not finite.
    params: the autoencoder's trained parameters, nested dicts by path.
    ema: their exponential moving average; {} where none is kept.
    fixed: its position tables.
    opt_state: its optimiser state.
    disc_params: the discriminator's parameters.
    disc_opt_state: its optimiser state.
  """

  step: jax.Array
  num_skipped: jax.Array
  params: Pytree
  ema: Pytree
  fixed: Pytree
  opt_state: Pytree
  disc_params: Pytree
  disc_opt_state: Pytree

  @property
  def best_params(self) -> Pytree:
    """The parameters to evaluate: the average, where one is kept."""
    return self.ema or self.params


@dataclasses.dataclass(frozen=True)
class Adversarial:
  """Settings of the adversarial game.

  Attributes:
    weight: of the adversarial term in the autoencoder's loss; 0 turns the
      discriminator off.
    gp_weight: of the gradient penalty in the discriminator's loss.
    d_steps: discriminator updates per step, all on the same predictions.
    g_steps: autoencoder updates per step; each after the first runs the
      autoencoder again.
    max_pull: limit of the adversarial term's gradient in a clip's decoded
      features, as a multiple of the reconstruction's; where the discriminator
      has grown out of bounds, the autoencoder goes on learning to reconstruct.
      0: none, as in the reference.
  """

  weight: float
  gp_weight: float
  d_steps: int
  g_steps: int
  max_pull: float = 0.0


@dataclasses.dataclass(frozen=True)
class Task:
  """What is predicted from what.

  Attributes:
    tubelets: the token grid.
    masking: which tokens are hidden.
    norm_pix: predict each token normalised by its own mean and deviation per
      colour (VideoMAE); MARLIN predicts plain pixels.
    imagenet_input: feed pixels normalised as VideoMAE checkpoints expect.
  """

  tubelets: Tubelets
  masking: Masking
  norm_pix: bool = False
  imagenet_input: bool = False

  def split(self, video, regions, keys, decoder_ratio=0.0):
    """Cuts a batch into what the encoder sees and what is to be predicted.

    Args:
      video: uint8 (B, T, H, W, 3).
      regions: uint16 (B, T / tubelet_size, h, w).
      keys: B jax keys.
      decoder_ratio: share of the hidden tokens that are not predicted either.

    Returns:
      patches float32 (B, V, P), visible int (B, V), masked int (B, M) and
      target float32 (B, M, P).
    """
    visible, masked = self.masking(regions, keys)
    if decoder_ratio:
      num_kept = masking.num_decoded(masked.shape[1], decoder_ratio)
      grid = self.tubelets.grid
      masked = masking.running_cells(masked, grid, _fold(keys, 1), num_kept)
    tokens = self.tubelets.patchify(video)
    # Gathered while still uint8, and only then converted.
    target = gather_tokens(tokens, masked).astype(jnp.float32) / 255
    if self.norm_pix:
      mean, std = self.pixel_stats(target)
      target = ((_by_colour(target) - mean) / std).reshape(target.shape)
    patches = gather_tokens(tokens, visible).astype(jnp.float32) / 255
    if self.imagenet_input:
      patches = imagenet_normalised(patches)
    return patches, visible, masked, target

  def pixel_stats(self, tokens):
    """Mean and deviation of each token, per colour.

    Args:
      tokens: float (..., P) in [0, 1].

    Returns:
      Two arrays (..., 3, 1); the deviation is unbiased, plus 1e-6 (VideoMAE's
      run_mae_pretraining), so it is finite for a token of one colour.
    """
    colours = _by_colour(tokens)
    mean = colours.mean(-1, keepdims=True)
    return mean, jnp.sqrt(colours.var(-1, ddof=1, keepdims=True)) + 1e-6


def imagenet_normalised(tokens: jax.Array) -> jax.Array:
  """Tokens (..., P) in [0, 1] as VideoMAE checkpoints expect them."""
  mean, std = (jnp.array(x)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
  return ((_by_colour(tokens) - mean) / std).reshape(tokens.shape)


def _by_colour(tokens):
  return tokens.reshape(*tokens.shape[:-1], 3, -1)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The step's static half: network structure, optimisers, settings.

  Attributes:
    task: what is predicted from what.
    adversarial: settings of the game.
    mae: structure of the autoencoder.
    discriminator: structure of the discriminator.
    optimizer: updates the autoencoder.
    disc_optimizer: updates the discriminator.
    ema_decay: of the average of the autoencoder's parameters; 0: none is kept.
    decoder_ratio: share of the hidden tokens that a step leaves to others.
    num_micro: parts in which the batch is worked through, one after the other,
      with gradients accumulated: where memory is too small for the whole.
    placement: where tokens and weights live on a mesh; None: on one device.
  """

  task: Task
  adversarial: Adversarial
  mae: nnx.GraphDef
  discriminator: nnx.GraphDef
  optimizer: optax.GradientTransformation
  disc_optimizer: optax.GradientTransformation
  ema_decay: float = 0.0
  decoder_ratio: float = 0.0
  num_micro: int = 1
  placement: partition.Placement | None = None

  def prepare(self, batch):
    """A batch of raw clips -> autoencoder inputs, target, penalty keys."""
    return _prepare(self.task, batch, self.decoder_ratio)

  def predict(self, params, fixed, patches, visible, masked) -> Affine:
    """The autoencoder's predictions: (B, M, P), not worked out."""
    with partition.use(self.placement):
      params = partition.weights(params)
      return nnx.merge(self.mae, params, fixed).predict(
        patches, visible, masked
      )

  def judging(self, disc_params):
    """The discriminator: (B, M, P) -> (B, M, 1), scores of tokens."""
    with partition.use(self.placement):
      disc_params = partition.weights(disc_params)
    return nnx.merge(self.discriminator, disc_params)

  # --- the two losses ---------------------------------------------------------

  def disc_loss(self, disc_params, pred, target, keys):
    """The discriminator's loss and metrics, for given predictions."""
    discriminator = self.judging(disc_params)
    d_fake, d_real = discriminator.judge(pred), discriminator(target)
    loss = losses.discriminator_loss(d_real, d_fake)
    metrics = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
    if self.adversarial.gp_weight:
      penalty = losses.gradient_penalty(discriminator, pred.value, target, keys)
      metrics["gradient_penalty"] = penalty
      loss += self.adversarial.gp_weight * penalty
    return loss, metrics | {"loss_disc": loss}

  def mae_slope(self, pred, target, disc_params):
    """The gradient of the autoencoder's loss in its predictions; metrics.

    Returns:
      Gradients like pred, and scalars; among them `adv_pull`, the norm of the
      adversarial term's gradient in the decoded features over the
      reconstruction's, as a mean over clips: far above 1 the discriminator
      alone says what is learned.
    """
    loss_rec, slope = jax.value_and_grad(
      lambda pred: losses.reconstruction_loss(pred.value, target)
    )(pred)
    metrics = {"loss_rec": loss_rec}
    weight = self.adversarial.weight
    if not weight:
      return slope, metrics

    scores, pull_back = jax.vjp(self.judging(disc_params).judge, pred)
    loss_adv, slope_of_scores = jax.value_and_grad(
      losses.generator_adversarial_loss
    )(scores)
    slope_of_scores *= weight
    (slope_adv,) = pull_back(slope_of_scores)
    pull = _clip_norms(slope_adv.x) / jnp.maximum(_clip_norms(slope.x), 1e-20)
    if self.adversarial.max_pull:
      slope_of_scores *= jnp.minimum(1, self.adversarial.max_pull / pull)
      (slope_adv,) = pull_back(slope_of_scores)
    slope = jax.tree.map(jnp.add, slope, slope_adv)
    metrics |= {"loss_adv": loss_adv, "loss": loss_rec + weight * loss_adv}
    return slope, metrics | {"adv_pull": pull.mean()}

  # --- updates ----------------------------------------------------------------

  def update_disc(self, state, grads):
    updates, opt_state = self.disc_optimizer.update(
      grads, state.disc_opt_state, state.disc_params
    )
    return state.replace(
      disc_params=optax.apply_updates(state.disc_params, updates),
      disc_opt_state=opt_state,
    )

  def update_mae(self, state, grads):
    updates, opt_state = self.optimizer.update(
      grads, state.opt_state, state.params
    )
    return state.replace(
      params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )

  def update_ema(self, state):
    if not self.ema_decay:
      return state
    ema = jax.tree.map(
      lambda mean, new: mean + (1 - self.ema_decay) * (new - mean),
      state.ema,
      state.params,
    )
    return state.replace(ema=ema)


def _clip_norms(slope):
  """(B, M, D) -> float32 (B, 1, 1)."""
  slope = slope.astype(jnp.float32)
  return jnp.sqrt(jnp.square(slope).sum((1, 2), keepdims=True))


def init_state(trainer: Trainer, params, fixed, disc_params) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    num_skipped=jnp.zeros((), jnp.int32),
    params=params,
    # A copy: each array of the state gives its memory to the next.
    ema=jax.tree.map(jnp.copy, params) if trainer.ema_decay else {},
    fixed=fixed,
    opt_state=trainer.optimizer.init(params),
    disc_params=disc_params,
    disc_opt_state=trainer.disc_optimizer.init(disc_params),
  )


def split_model(model: MAE | Discriminator):
  """A module as (structure, trained parameters, fixed values)."""
  graphdef, params, fixed = nnx.split(model, nnx.Param, Fixed)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(fixed)


def train_step(
  trainer: Trainer, state: TrainState, batch: dict, rng: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one step, for both players or for neither.

  Where a loss or the norm of a gradient is not finite, nothing but the counters
  changes. That keeps the whole state finite: where a norm is, so is the square
  of every gradient, which is the largest thing that Adam remembers.

  Args:
    trainer: the static half.
    state: the state.
    batch: `video` uint8 (B, T, H, W, 3) and `regions` uint16 (B, T/2, h, w);
      B is a multiple of `trainer.num_micro`.
    rng: the run's key, the same at every step.

  Returns:
    The new state, and float32 scalars: loss_rec, loss_adv, loss_disc, d_real,
    d_fake, gradient norms, `num_skipped` so far and, where they apply, the
    others named above.
  """
  step_rng = jax.random.fold_in(rng, state.step)
  # A key per clip: masks do not depend on the layout of devices or parts.
  keys = jax.random.split(step_rng, batch["video"].shape[0])
  batch = {"video": batch["video"], "regions": batch["regions"], "keys": keys}
  take = _step_at_once if trainer.num_micro == 1 else _step_in_parts
  new, metrics = take(trainer, state, batch)
  finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
  new = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), trainer.update_ema(new), state
  )
  num_skipped = state.num_skipped + ~finite
  new = new.replace(step=state.step + 1, num_skipped=num_skipped)
  return new, metrics | {"num_skipped": num_skipped.astype(jnp.float32)}


def _prepare(task: Task, batch, decoder_ratio=0.0):
  """A batch of raw clips -> autoencoder inputs, target, penalty keys."""
  keys = jax.vmap(jax.random.split)(batch["keys"])
  *inputs, target = task.split(
    batch["video"], batch["regions"], keys[:, 0], decoder_ratio
  )
  return inputs, target, keys[:, 1]


def _step_at_once(trainer: Trainer, state: TrainState, batch):
  """The fused step: the first of the g_steps shares the only forward."""
  inputs, target, keys = trainer.prepare(batch)
  metrics = {}

  def forward(params):
    return trainer.predict(params, state.fixed, *inputs)

  pred, pull_back = jax.vjp(forward, state.params)
  if trainer.adversarial.weight:
    seen = jax.lax.stop_gradient(pred)
    for i in range(trainer.adversarial.d_steps):
      grads, disc_metrics = jax.grad(trainer.disc_loss, has_aux=True)(
        state.disc_params, seen, target, _fold(keys, i)
      )
      state = trainer.update_disc(state, grads)
      metrics |= disc_metrics | {"grad_norm_disc": optax.tree.norm(grads)}
  for i in range(trainer.adversarial.g_steps):
    if i:
      pred, pull_back = jax.vjp(forward, state.params)
    slope, mae_metrics = trainer.mae_slope(pred, target, state.disc_params)
    (grads,) = pull_back(slope)
    state = trainer.update_mae(state, grads)
    metrics |= mae_metrics | {"grad_norm": optax.tree.norm(grads)}
  return state, metrics


def _step_in_parts(trainer: Trainer, state: TrainState, batch):
  """The same step with gradients accumulated over parts of the batch.

  The discriminator must see the whole batch before the autoencoder's loss can
  be taken, and no forward survives that long in little memory: each update
  runs its own, as the reference does.
  """
  parts = jax.tree.map(
    # Part-minor, so that each device cuts up the clips it already has.
    lambda x: x.reshape(-1, trainer.num_micro, *x.shape[1:]).swapaxes(0, 1),
    batch,
  )
  metrics = {}

  def disc_grads(part, i):
    inputs, target, keys = trainer.prepare(part)
    pred = trainer.predict(state.params, state.fixed, *inputs)
    return jax.grad(trainer.disc_loss, has_aux=True)(
      state.disc_params, pred, target, _fold(keys, i)
    )

  def mae_grads(part):
    inputs, target, _ = trainer.prepare(part)
    pred, pull_back = jax.vjp(
      lambda params: trainer.predict(params, state.fixed, *inputs), state.params
    )
    slope, mae_metrics = trainer.mae_slope(pred, target, state.disc_params)
    return *pull_back(slope), mae_metrics

  if trainer.adversarial.weight:
    for i in range(trainer.adversarial.d_steps):
      grads, disc_metrics = _mean_over(
        parts, functools.partial(disc_grads, i=i)
      )
      state = trainer.update_disc(state, grads)
      metrics |= disc_metrics | {"grad_norm_disc": optax.tree.norm(grads)}
  for _ in range(trainer.adversarial.g_steps):
    grads, mae_metrics = _mean_over(parts, mae_grads)
    state = trainer.update_mae(state, grads)
    metrics |= mae_metrics | {"grad_norm": optax.tree.norm(grads)}
  return state, metrics


def _mean_over(parts, function: Callable[[Pytree], Pytree]) -> Pytree:
  """The mean of `function` over parts stacked on the first axis."""
  num_parts = jax.tree.leaves(parts)[0].shape[0]
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / num_parts, total)


def _fold(keys, i):
  return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)


def reconstruct(
  trainer: Trainer, state: TrainState, batch: dict, rng: jax.Array
) -> dict[str, jax.Array]:
  """Hides and reconstructs, without learning.

  Args:
    trainer: the static half.
    state: the state.
    batch: as for `train_step`.
    rng: key of the masks.

  Returns:
    As `fill_in`.
  """
  keys = jax.random.split(rng, batch["video"].shape[0])
  return fill_in(
    trainer.task,
    lambda *inputs: trainer.predict(
      state.best_params, state.fixed, *inputs
    ).value.astype(jnp.float32),
    {"video": batch["video"], "regions": batch["regions"], "keys": keys},
  )


def fill_in(
  task: Task, predict: Callable[..., jax.Array], batch: dict
) -> dict[str, jax.Array]:
  """Hides tokens of clips and has them predicted.

  Args:
    task: what is hidden, and in what form it is predicted.
    predict: the autoencoder: patches (B, V, P), visible (B, V) and masked
      (B, M) -> predictions float32 (B, M, P); see models.mae.MAE.
    batch: as for `train_step`, and `keys`, B jax keys of the masks.

  Returns:
    `video` float32 (B, T, H, W, 3), the prediction where hidden and the
    original where visible; as the network says it, so it may leave [0, 1]
    where it is hidden, but with normalised targets undone, each token with its
    true mean and deviation; `visible` bool (B, N); and the scalars `loss_rec`,
    on the target as in training, and on plain pixels `loss_pixels` and, to
    compare it with, `loss_batch_colour` and `loss_own_colour` (see
    losses.flat_patch_losses).
  """
  (patches, visible, masked), target, _ = _prepare(task, batch)
  pred = predict(patches, visible, masked)
  loss_rec = losses.reconstruction_loss(pred, target)
  tokens = task.tubelets.patchify(batch["video"]).astype(jnp.float32) / 255
  pixels = gather_tokens(tokens, masked)
  if task.norm_pix:
    mean, std = task.pixel_stats(pixels)
    pred = (pred.reshape(*pred.shape[:-1], 3, -1) * std + mean).reshape(
      pred.shape
    )
  put = jax.vmap(lambda clip, index, new: clip.at[index].set(new))
  seen = jnp.zeros(tokens.shape[:2], bool)
  return {
    "video": task.tubelets.unpatchify(put(tokens, masked, pred)),
    "visible": put(seen, visible, jnp.ones(visible.shape, bool)),
    "loss_rec": loss_rec,
    "loss_pixels": losses.reconstruction_loss(pred, pixels),
    **{
      f"loss_{name}": loss
      for name, loss in losses.flat_patch_losses(tokens, masked).items()
    },
  }
