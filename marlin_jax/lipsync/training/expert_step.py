"""Training step of the sync expert, and its cosines at each offset.

Everything here is pure: no I/O, no config object.

Axes: B clips, T frames, S pixels of the square picture, M mel rows, O offsets.
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
from marlin_jax.lipsync.training.losses import sync_loss

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
class ExpertTrainer:
  """Static half of the training step.

  Attributes:
    expert: graph of a networks.sync_expert.SyncExpert.
    optimizer: optimiser of the expert.
  """

  expert: Graph
  optimizer: optax.GradientTransformation

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
    batch: `video` uint8 (B, T, S, S, 3), `mel` float32 (B, M, 80) and `offset`
      int32 (B,), 0 for clips in sync.

  Returns:
    The new state and float32 scalars: loss_sync, accuracy (of classifying a
    cosine above 0.5 as in sync), the mean cosines cosine_in_sync and
    cosine_shifted, grad_norm, and num_skipped so far.
  """
  in_sync = batch["offset"] == 0

  def loss(params):
    def similarity(net):
      return cosines(
        net.faces(as_floats(batch["video"])), net.sound(batch["mel"])
      )

    cosine, stats = trainer.expert.train_apply(params, state.expert, similarity)
    return sync_loss(cosine, in_sync), (cosine, stats)

  (value, (cosine, stats)), grads = jax.value_and_grad(loss, has_aux=True)(
    state.expert.params
  )
  metrics = {
    "loss_sync": value,
    "accuracy": jnp.mean((cosine > 0.5) == in_sync),
    "cosine_in_sync": _mean_where(cosine, in_sync),
    "cosine_shifted": _mean_where(cosine, ~in_sync),
    "grad_norm": optax.tree.norm(grads),
  }
  updates, opt_state = trainer.optimizer.update(
    grads, state.opt_state, state.expert.params
  )
  params = optax.apply_updates(state.expert.params, updates)
  new = state.replace(
    expert=state.expert.replace(params=params, stats=stats),
    opt_state=opt_state,
  )
  return finite_or_old(new, state, metrics)


def _mean_where(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Returns the mean of the chosen elements of (B,); 0 without any."""
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
