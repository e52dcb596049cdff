"""Model to train: a head, alone or on an encoder, and its training step.

Axes: B clips, N tokens, P pixels per token, D width, K predictions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.devices import sharding
from marlin_jax.downstream import protocols
from marlin_jax.downstream.tasks import Task
from marlin_jax.inference import clip_features
from marlin_jax.models import heads, partition, softmax_attention, vit
from marlin_jax.weights.architecture import (
  Architecture,
  flatten,
  unflatten,
)
from marlin_jax.weights.weights import Weights, of_modules

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Learner:
  """Static description of a model, and the functions on its arrays.

  Attributes:
    graphdef: graph of the network: a heads.Classifier, or a head alone.
    trained, fixed: initial parameters: those that are trained, and the others.
    task: task that the model predicts.
    config: settings of the optimiser; optionally `drop_path`, `mixup`, `flip`.
    mesh: mesh of the devices.
    architecture: architecture of the encoder; None: the inputs are features.
    dtype: dtype of the encoder's matmuls.
  """

  graphdef: nnx.GraphDef
  trained: Pytree
  fixed: Pytree
  task: Task
  config: ConfigDict
  mesh: Mesh
  architecture: Architecture | None = None
  dtype: str = "float32"

  def begin(self) -> Pytree:
    """Returns the initial state, placed on the mesh."""
    opt_state = self._optimiser.init(self.trained)
    state = {"trained": self.trained, "opt": opt_state}
    return jax.device_put(state, self.shardings)

  @functools.cached_property
  def _optimiser(self) -> optax.GradientTransformation:
    return protocols.optimiser(self.config)

  @functools.cached_property
  def shardings(self) -> Pytree:
    """Returns the sharding of each array of a state."""
    shapes = jax.eval_shape(
      lambda trained: {
        "trained": trained,
        "opt": self._optimiser.init(trained),
      },
      self.trained,
    )
    return self._place(shapes)

  def _place(self, tree: Pytree) -> Pytree:
    num_heads = self.architecture.num_heads if self.architecture else 1
    return sharding.lay_out(self.mesh, tree, {"encoder": num_heads}).shardings

  @functools.cached_property
  def _fixed(self) -> Pytree:
    return jax.device_put(self.fixed, self._place(self.fixed))

  def put(self, *arrays: np.ndarray) -> list[jax.Array]:
    """Shards a batch over the devices."""
    return jax.device_put(arrays, sharding.batch_sharding(self.mesh))

  # --- Training ---------------------------------------------------------------

  def step(self, state: Pytree, x, labels, known, rng, lr):
    """Updates the trained parameters.

    Args:
      state: result of `begin` or `step`; donated.
      x: uint8 clips (B, T, H, W, 3), or features float32 (B, D).
      labels, known: float32 (B, K); see `Task.encode`.
      rng: random key of this step.
      lr: learning rate.

    Returns:
      The new state and the loss.
    """
    return self._step(state, self._fixed, *self.put(x, labels, known), rng, lr)

  @functools.cached_property
  def _step(self):
    depth = self.architecture.depth if self.architecture else 0
    decay = self.config.get("layer_decay", 1.0)

    def step(state, fixed, x, labels, known, rng, lr):
      loss, grads = jax.value_and_grad(self._loss)(
        state["trained"], fixed, x, labels, known, rng
      )
      updates, opt = self._optimiser.update(
        grads, state["opt"], state["trained"]
      )
      factors = protocols.layer_factors(state["trained"], depth, decay)
      trained = protocols.updated(state["trained"], updates, lr, factors)
      return {"trained": trained, "opt": opt}, loss

    replicated = sharding.replicated(self.mesh)
    return jax.jit(
      step, donate_argnums=0, out_shardings=(self.shardings, replicated)
    )

  def _loss(self, trained, fixed, x, labels, known, rng):
    keep = None
    if self.architecture:
      rng_flip, rng_mix, rng_drop = jax.random.split(rng, 3)
      if self.config.get("flip", False):
        x = _flipped(rng_flip, x)
      x = clip_features.to_tokens(x, self.architecture)
      if self.config.get("mixup", 0.0):
        x, labels, known = _mixed(rng_mix, self.config.mixup, x, labels, known)
      if self.config.get("drop_path", 0.0):
        keep = vit.drop_path(
          rng_drop, self.config.drop_path, self.architecture.depth, len(x)
        )
    logits = self._network(trained, fixed)(x, *([] if keep is None else [keep]))
    return loss_of(self.task, logits, labels, known)

  def _network(self, trained, fixed):
    placement = None
    if self.mesh.size > 1:
      placement = sharding.MeshPlacement(self.mesh, self.dtype)

    def call(*args):
      with partition.use(placement):
        params = partition.weights(trained), partition.weights(fixed)
        return nnx.merge(self.graphdef, *params)(*args)

    return call

  # --- Prediction -------------------------------------------------------------

  def encoder_weights(self, trained: Pytree) -> Weights:
    """Returns the weights of the encoder, trained or not."""
    params = [
      flatten(tree["encoder"])
      for tree in (self.fixed, trained)
      if "encoder" in tree
    ]
    merged = {name: array for tree in params for name, array in tree.items()}
    return of_modules(self.architecture, unflatten(merged))

  def logits(self, trained: Pytree, x) -> jax.Array:
    """Returns float32 (B, K) for a batch; `x` as for `step`."""
    return self._logits(trained, self._fixed, *self.put(x))

  @functools.cached_property
  def _logits(self):
    def logits(trained, fixed, x):
      if self.architecture:
        x = clip_features.to_tokens(x, self.architecture)
      return self._network(trained, fixed)(x)

    return jax.jit(logits, out_shardings=sharding.replicated(self.mesh))


def loss_of(task: Task, logits, labels, known) -> jax.Array:
  """Returns the mean cross-entropy over known labels.

  Args:
    task: its `is_class` selects softmax or sigmoid.
    logits: (B, K).
    labels, known: (B, K); see `Task.encode`.
  """
  if task.is_class:
    losses = optax.softmax_cross_entropy(logits, labels)
    known = known[:, 0]
  else:
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  return (losses * known).sum() / jnp.maximum(known.sum(), 1.0)


def _flipped(rng, x):
  """Mirrors each clip with probability 0.5."""
  chosen = jax.random.bernoulli(rng, 0.5, (len(x), 1, 1, 1, 1))
  return jnp.where(chosen, x[:, :, :, ::-1], x)


def _mixed(rng, alpha, x, labels, known):
  """Applies mixup (Zhang et al., ICLR 2018) between pairs of clips."""
  share = jax.random.beta(rng, alpha, alpha)
  return (
    share * x + (1 - share) * x[::-1],
    share * labels + (1 - share) * labels[::-1],
    known * known[::-1],
  )


# --- Models -------------------------------------------------------------------


def linear_probe(
  task: Task, width: int, config: ConfigDict, mesh: Mesh, seed: int
) -> Learner:
  """Returns a linear layer on features of `width`."""
  head = heads.LinearHead(width, task.num_outputs, nnx.Rngs(seed))
  graphdef, trained, fixed = nnx.split(head, nnx.Param, ...)
  return Learner(graphdef, _pure(trained), _pure(fixed), task, config, mesh)


def on_encoder(
  task: Task,
  weights: Weights,
  config: ConfigDict,
  mesh: Mesh,
  seed: int,
  *,
  attentive: bool,
  frozen: bool,
  dtype: str,
  attention: str,
  remat: str,
) -> Learner:
  """Returns an encoder with a head.

  Args:
    task: task to predict.
    weights: weights of the encoder.
    config: settings of the optimiser; see Learner.
    mesh: mesh of the devices.
    seed: seed of the head's initial weights.
    attentive: the head attends to all tokens; else it is linear on their mean.
    frozen: only the head is trained.
    dtype, attention, remat: implementation of the encoder; see models.vit.
  """
  platform = mesh.devices.flat[0].platform
  encoder = weights.encoder_only().autoencoder(
    dtype=dtype,
    attention=softmax_attention.choose(attention, platform, dtype),
    remat=remat,
  )
  architecture = weights.architecture.without_decoder()
  width, rngs = architecture.width, nnx.Rngs(seed)
  if attentive:
    head = heads.AttentiveHead(
      width, task.num_outputs, rngs, num_heads=architecture.num_heads
    )
  else:
    head = heads.LinearHead(width, task.num_outputs, rngs)
  is_trained = nnx.Param
  if frozen:
    is_trained = nnx.All(nnx.Param, nnx.PathContains("head"))
  graphdef, trained, fixed = nnx.split(
    heads.Classifier(encoder, head), is_trained, ...
  )
  return Learner(
    graphdef,
    _pure(trained),
    _pure(fixed),
    task,
    config,
    mesh,
    architecture,
    dtype,
  )


def _pure(state) -> Pytree:
  return nnx.to_pure_dict(state)
