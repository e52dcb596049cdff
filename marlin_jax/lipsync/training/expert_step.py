"""Training step of the sync expert, and its cosines at each offset.

Everything here is pure: no I/O, no config object.

Axes: B clips, T frames, S pixels of the square picture, M mel rows, O offsets,
G records, N clips of a record.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from marlin_jax.lipsync.networks.functional import Graph, Variables
from marlin_jax.lipsync.networks.inputs import as_floats
from marlin_jax.lipsync.training.clips import MIN_OFFSET
from marlin_jax.lipsync.training.losses import contrastive_loss, sync_loss
from marlin_jax.records.mel_spectrogram import MAX_VALUE

Pytree = Any


@flax.struct.dataclass
class ExpertState:
  """State of the training; a plain pytree.

  Attributes:
    step: int32, steps taken.
    num_skipped: int32, steps not applied because a loss or a gradient was not
      finite.
    expert: variables of the expert.
    opt_state: optimiser state of the expert.
  """

  step: jax.Array
  num_skipped: jax.Array
  expert: Variables
  opt_state: Pytree

  @property
  def trained(self) -> Variables:
    """Variables of the trained network."""
    return self.expert


@dataclasses.dataclass(frozen=True)
class Jitter:
  """Random changes of clips, each as a whole; none by default.

  Attributes:
    colour: greatest change of the brightness, as a ratio of white, and of the
      contrast of each colour, as a ratio of itself.
    gain: greatest change of the loudness in units of the mel spectrogram, which
      are 12.5 dB.
  """

  colour: float = 0.0
  gain: float = 0.0

  def __call__(
    self, video: jax.Array, mel: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns video float32 (B, T, S, S, 3) and mel (B, M, 80), changed."""
    of_contrast, of_brightness, of_gain = jax.random.split(key, 3)

    def draw(key, shape, limit):
      return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

    if self.colour:
      clips = (len(video), 1, 1, 1)
      contrast = 1 + draw(of_contrast, (*clips, 3), self.colour)
      brightness = draw(of_brightness, (*clips, 1), self.colour)
      video = (video - 0.5) * contrast + 0.5 + brightness
    if self.gain:
      gain = draw(of_gain, (len(mel), 1, 1), self.gain)
      mel = jnp.clip(mel + gain, -MAX_VALUE, MAX_VALUE)
    return video, mel


@dataclasses.dataclass(frozen=True)
class ExpertTrainer:
  """Static half of the training step.

  Attributes:
    expert: graph of a networks.sync_expert.SyncExpert.
    optimizer: optimiser of the expert.
    temperature: of the contrastive loss; 0: the published loss.
    clips_per_record: N, consecutive clips of one record.
    jitter: random changes of colours and loudness.
    seed: seed of `jitter`.
  """

  expert: Graph
  optimizer: optax.GradientTransformation
  temperature: float = 0.0
  clips_per_record: int = 1
  jitter: Jitter = Jitter()
  seed: int = 0

  def init(self, arrays: Variables) -> ExpertState:
    """Returns the state before the first step."""
    return ExpertState(
      step=jnp.zeros((), jnp.int32),
      num_skipped=jnp.zeros((), jnp.int32),
      expert=arrays,
      opt_state=self.optimizer.init(arrays.params),
    )


def cosines(faces: jax.Array, sound: jax.Array) -> jax.Array:
  """Returns the cosines of unit vectors: (..., D), (..., D) -> (...)."""
  return (faces * sound).sum(-1)


def expert_step(
  trainer: ExpertTrainer, state: ExpertState, batch: dict
) -> tuple[ExpertState, dict[str, jax.Array]]:
  """Takes a step; it is not applied if a loss or a gradient is not finite.

  Args:
    trainer: graph and optimiser; the static half of the step.
    state: state before the step.
    batch: `video` uint8 (B, T, S, S, 3), `mel` float32 (B, M, 80) and, for the
      published loss, `offset` int32 (B,), 0 for clips in sync; for the
      contrastive one, `start` int32 (B,).

  Returns:
    The new state and float32 scalars: loss_sync, accuracy (of classifying a
    cosine above 0.5 as in sync), the mean cosines cosine_in_sync and
    cosine_shifted, grad_norm, and num_skipped so far. For the contrastive loss,
    loss_contrastive in place of loss_sync, and ranked (share of pairs of sound
    in sync and shifted sound, in which the first has the higher cosine) in
    place of accuracy.
  """
  video, mel = as_floats(batch["video"]), batch["mel"]
  if trainer.jitter != Jitter():
    key = jax.random.fold_in(jax.random.key(trainer.seed), state.step)
    video, mel = trainer.jitter(video, mel, key)

  def loss(params):
    (faces, sound), stats = trainer.expert.train_apply(
      params, state.expert, lambda net: (net.faces(video), net.sound(mel))
    )
    if trainer.temperature:
      value, metrics = _contrastive(trainer, faces, sound, batch["start"])
    else:
      value, metrics = _published(cosines(faces, sound), batch["offset"] == 0)
    return value, (metrics, stats)

  grads, (metrics, stats) = jax.grad(loss, has_aux=True)(state.expert.params)
  metrics["grad_norm"] = optax.tree.norm(grads)
  updates, opt_state = trainer.optimizer.update(
    grads, state.opt_state, state.expert.params
  )
  params = optax.apply_updates(state.expert.params, updates)
  new = state.replace(
    expert=state.expert.replace(params=params, stats=stats),
    opt_state=opt_state,
  )
  return finite_or_old(new, state, metrics)


def _published(cosine: jax.Array, in_sync: jax.Array):
  """Returns the published loss and the metrics of clips (B,)."""
  value = sync_loss(cosine, in_sync)
  return value, {
    "loss_sync": value,
    "accuracy": jnp.mean((cosine > 0.5) == in_sync),
    "cosine_in_sync": _mean_where(cosine, in_sync),
    "cosine_shifted": _mean_where(cosine, ~in_sync),
  }


def _contrastive(
  trainer: ExpertTrainer, faces: jax.Array, sound: jax.Array, start: jax.Array
):
  """Returns the contrastive loss and the metrics.

  Args:
    trainer: see `expert_step`.
    faces, sound: (B, D), unit vectors.
    start: int (B,), first frame of each clip in its record.
  """
  of_record = (-1, trainer.clips_per_record)
  faces, sound = (x.reshape(*of_record, x.shape[-1]) for x in (faces, sound))
  cosine = jnp.einsum("gid,gjd->gij", faces, sound)  # (G, N, N)
  start = start.reshape(of_record)
  is_far = jnp.abs(start[:, :, None] - start[:, None]) >= MIN_OFFSET
  own = jnp.eye(trainer.clips_per_record, dtype=bool)
  value = contrastive_loss(cosine, is_far | own, trainer.temperature)
  in_sync = jnp.diagonal(cosine, axis1=1, axis2=2)[..., None]
  return value, {
    "loss_contrastive": value,
    "ranked": _mean_where(in_sync > cosine, is_far),
    "cosine_in_sync": in_sync.mean(),
    "cosine_shifted": _mean_where(cosine, is_far),
  }


def _mean_where(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Returns the mean of the chosen elements; 0 without any."""
  return jnp.where(chosen, x, 0).sum() / jnp.maximum(chosen.sum(), 1)


def finite_or_old(new, old, metrics: dict[str, jax.Array]):
  """Returns the new state if all metrics are finite, else the old one.

  Args:
    new, old: states with `step` and `num_skipped`.
    metrics: scalars, among them the norms of all gradients.

  Returns:
    The state with the next `step`, and the metrics with `num_skipped`.
  """
  finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
  state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  num_skipped = old.num_skipped + ~finite
  state = state.replace(step=old.step + 1, num_skipped=num_skipped)
  return state, metrics | {"num_skipped": num_skipped.astype(jnp.float32)}


def offset_cosines(expert: Graph, arrays: Variables, batch: dict) -> jax.Array:
  """Returns the cosine similarity of frames and sound at each offset.

  Args:
    expert: graph of the expert.
    arrays: variables of the expert.
    batch: `video` uint8 (B, T, S, S, 3) and `mel` float32 (B, O, M, 80).

  Returns:
    float32 (B, O) in [-1, 1].
  """
  net = expert.eval_network(arrays)
  mel = batch["mel"]
  sound = net.sound(mel.reshape(-1, *mel.shape[2:])).reshape(*mel.shape[:2], -1)
  return cosines(net.faces(as_floats(batch["video"]))[:, None], sound)
