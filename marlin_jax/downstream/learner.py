"""Model to train: a head, alone or on an encoder, and its training step.

Of the encoder nothing is trained, or all, or the scales and biases of its
LayerNorms, or low-rank adapters of its projections to queries and values (LoRA:
Hu et al., ICLR 2022). Adapters are added to the weights, so that the encoder
that is kept is an ordinary one.

Axes: B clips, N tokens, P pixels per token, D width, K predictions, R rank.
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

from marlin_jax.devices import chips, distributed, microbatches, sharding
from marlin_jax.downstream import protocols
from marlin_jax.downstream.tasks import Task, Units
from marlin_jax.inference import clip_features
from marlin_jax.models import heads, partition, softmax_attention, vit
from marlin_jax.pretraining import memory
from marlin_jax.weights.architecture import (
  Architecture,
  flatten,
  unflatten,
)
from marlin_jax.weights.weights import Weights, of_modules

Pytree = Any

# What is trained of an encoder.
TUNED = ("nothing", "norms", "lora", "all")
# Key of the adapters among the trained parameters.
_ADAPTERS = "lora"


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
    num_microbatches: microbatches per batch, processed one after the other with
      accumulated gradients; the result is that of the whole batch.
    adapter_scale: factor of the adapters, if there are any.
    value_loss: loss of numbers: 'mse', or 'ccc', 1 - CCC of the batch.
  """

  graphdef: nnx.GraphDef
  trained: Pytree
  fixed: Pytree
  task: Task
  config: ConfigDict
  mesh: Mesh
  architecture: Architecture | None = None
  dtype: str = "float32"
  num_microbatches: int = 1
  adapter_scale: float = 0.0
  value_loss: str = "mse"

  def begin(self) -> Pytree:
    """Returns the initial state, placed on the mesh."""
    opt_state = self._optimiser.init(self.trained)
    state = {"trained": self.trained, "opt": opt_state}
    return sharding.put(state, self.shardings)

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
    return sharding.put(self.fixed, self._place(self.fixed))

  def put(self, *arrays: np.ndarray) -> list[jax.Array]:
    """Shards a batch over the devices, given the rows of this process."""
    split = sharding.batch_sharding(self.mesh)
    return [
      jax.make_array_from_process_local_data(split, array) for array in arrays
    ]

  # --- Training ---------------------------------------------------------------

  def step(self, state: Pytree, x, labels, known, rng, lr):
    """Updates the trained parameters.

    Args:
      state: result of `begin` or `step`; donated.
      x: uint8 clips (B, T, H, W, 3), or features float32 (B, D); of several
        processes each gives its own rows, see `loader.own_rows`.
      labels, known: float32 (B, K), likewise; see `Task.encode`.
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
      loss, grads = self._gradient(
        state["trained"], fixed, self._augmented(x, labels, known, rng)
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

  def _augmented(self, x, labels, known, rng) -> dict[str, jax.Array]:
    """Draws the augmentations of a batch.

    Returns:
      Arrays that `_loss` takes, each with the axis B first, so that the batch
      can be split: `x`, `labels`, `known` (B, K), and, if configured, the clips
      `other` to mix in, the `share` (B,) of `x` in the mixture, and the factors
      `keep` (B, depth, 2) of the branches.
    """
    if not self.architecture:
      return {"x": x, "labels": labels, "known": known}
    rng_flip, rng_mix, rng_drop = jax.random.split(rng, 3)
    if self.config.get("flip", False):
      x = _flipped(rng_flip, x)
    batch = {"x": x, "labels": labels, "known": known}
    if alpha := self.config.get("mixup", 0.0):
      batch = _mixed(rng_mix, alpha, batch)
    if rate := self.config.get("drop_path", 0.0):
      keep = vit.drop_path(rng_drop, rate, self.architecture.depth, len(x))
      batch["keep"] = jnp.moveaxis(keep, 2, 0)
    return batch

  def _gradient(self, trained, fixed, batch):
    """Returns the loss of a batch, a mean over its known labels; the gradient.

    Gradients of microbatches are accumulated.
    """
    num, total = self.num_microbatches, jnp.maximum(batch["known"].sum(), 1.0)
    gradient = jax.value_and_grad(self._loss)
    if num == 1:
      return gradient(trained, fixed, batch)
    parts = microbatches.split(batch, num)
    if self.task.is_value and self.value_loss == "ccc":
      return self._gradient_of_all(trained, fixed, parts)

    def of_part(part):
      # A microbatch counts by its known labels.
      weight = num * part["known"].sum() / total
      return jax.tree.map(lambda x: weight * x, gradient(trained, fixed, part))

    return microbatches.mean_over(parts, of_part)

  def _gradient_of_all(self, trained, fixed, parts):
    """Returns `_gradient` of a loss that is no mean over clips.

    A first pass computes the outputs of all microbatches, from which the second
    goes back.
    """
    outputs = jax.lax.map(lambda x: self._outputs(trained, fixed, x), parts)

    def loss_of_all(outputs):
      arrays = outputs, parts["labels"], parts["known"]
      rows = (x.reshape(-1, x.shape[-1]) for x in arrays)
      return loss_of(self.task, *rows, self.value_loss)

    def of_part(part):
      batch, slope = part
      return jax.grad(
        lambda trained: (self._outputs(trained, fixed, batch) * slope).sum()
      )(trained)

    loss, slopes = jax.value_and_grad(loss_of_all)(outputs)
    mean = microbatches.mean_over((parts, slopes), of_part)
    return loss, jax.tree.map(lambda x: self.num_microbatches * x, mean)

  def _loss(self, trained, fixed, batch):
    outputs = self._outputs(trained, fixed, batch)
    labels, known = batch["labels"], batch["known"]
    return loss_of(self.task, outputs, labels, known, self.value_loss)

  def _outputs(self, trained, fixed, batch):
    x, keep = batch["x"], batch.get("keep")
    if self.architecture:
      x = clip_features.to_tokens(x, self.architecture)
      if "other" in batch:
        share = batch["share"][:, None, None]
        other = clip_features.to_tokens(batch["other"], self.architecture)
        x = share * x + (1 - share) * other
    args = () if keep is None else (jnp.moveaxis(keep, 0, 2),)
    return self._network(trained, fixed)(x, *args)

  def _network(self, trained, fixed):
    placement = None
    if self.mesh.size > 1:
      placement = sharding.MeshPlacement(self.mesh, self.dtype)

    def call(*args):
      with partition.use(placement):
        params = map(partition.weights, self._merged(trained, fixed))
        return nnx.merge(self.graphdef, *params)(*args)

    return call

  def _merged(self, trained, fixed):
    """Returns both with the adapters added to the weights that they adapt."""
    if _ADAPTERS not in trained:
      return trained, fixed
    trained = dict(trained)
    adapters = trained.pop(_ADAPTERS)
    with vit.exact_matmuls("float32"):
      return trained, _adapted(fixed, adapters, self.adapter_scale)

  # --- Prediction -------------------------------------------------------------

  def gathered(self, trained: Pytree) -> Pytree:
    """Returns whole NumPy arrays on every process; call it in all of them."""
    whole = jax.jit(
      lambda tree: tree, out_shardings=sharding.replicated(self.mesh)
    )
    return jax.tree.map(np.asarray, whole(trained))

  def encoder_weights(self, trained: Pytree) -> Weights:
    """Returns the weights of the encoder, trained or not.

    Args:
      trained: from `gathered`.
    """
    params = [
      flatten(tree["encoder"])
      for tree in reversed(self._merged(trained, self.fixed))
      if "encoder" in tree
    ]
    merged = {name: array for tree in params for name, array in tree.items()}
    return of_modules(self.architecture, unflatten(merged))

  def logits(self, trained: Pytree, x) -> jax.Array:
    """Returns float32 (B, K), on every process; `x` as for `step`."""
    return self._logits(trained, self._fixed, *self.put(x))

  @functools.cached_property
  def _logits(self):
    def logits(trained, fixed, x):
      if self.architecture:
        x = clip_features.to_tokens(x, self.architecture)
      with vit.exact_matmuls(self.dtype):  # as in the model that is kept
        return self._network(trained, fixed)(x)

    return jax.jit(logits, out_shardings=sharding.replicated(self.mesh))


def loss_of(
  task: Task, logits, labels, known, value_loss: str = "mse"
) -> jax.Array:
  """Returns the mean loss over known labels.

  Cross-entropy by softmax or sigmoid; of numbers `value_loss`.

  Args:
    task: selects the loss.
    logits: (B, K).
    labels, known: (B, K); see `Task.encode`. Numbers are standardised.
    value_loss: 'mse', the squared error; or 'ccc', 1 - CCC of the batch
      (Trigeorgis et al., ICASSP 2016).
  """
  if task.is_value and value_loss == "ccc":
    return 1 - _concordance(logits, labels, known).mean()
  if task.is_value:
    losses = jnp.square(logits - labels)
  elif task.is_class:
    losses = optax.softmax_cross_entropy(logits, labels)
    known = known[:, 0]
  else:
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  return (losses * known).sum() / jnp.maximum(known.sum(), 1.0)


def _concordance(numbers, labels, known) -> jax.Array:
  """Returns Lin's concordance correlation coefficient of a batch, (K,)."""
  total = jnp.maximum(known.sum(0), 1.0)

  def mean(x):
    return (x * known).sum(0) / total

  x, y = numbers - mean(numbers), labels - mean(labels)
  bias = mean(numbers - labels)
  spread = mean(x * x) + mean(y * y) + bias * bias
  # Of a batch of one constant, the gradient is 0.
  return 2 * mean(x * y) / jnp.maximum(spread, 1e-8)


def _flipped(rng, x):
  """Mirrors each clip with probability 0.5."""
  chosen = jax.random.bernoulli(rng, 0.5, (len(x), 1, 1, 1, 1))
  return jnp.where(chosen, x[:, :, :, ::-1], x)


def _mixed(rng, alpha, batch):
  """Applies mixup (Zhang et al., ICLR 2018) between pairs of clips.

  The clips themselves are mixed as tokens, by `Learner._loss`.
  """
  share = jax.random.beta(rng, alpha, alpha)
  x, labels, known = (batch[name] for name in ("x", "labels", "known"))
  return {
    "x": x,
    "other": x[::-1],
    "share": jnp.full(len(x), share),
    "labels": share * labels + (1 - share) * labels[::-1],
    "known": known * known[::-1],
  }


def _adapted(params: Pytree, adapters: Pytree, scale: float) -> Pytree:
  """Adds scale * a @ b to the kernel of each layer that has an adapter."""
  if "a" in adapters:
    delta = scale * (adapters["a"] @ adapters["b"])
    return params | {"kernel": params["kernel"] + delta}
  return params | {
    name: _adapted(params[name], below, scale)
    for name, below in adapters.items()
  }


# --- Models -------------------------------------------------------------------


def linear_probe(
  task: Task,
  width: int,
  config: ConfigDict,
  mesh: Mesh,
  seed: int,
  value_loss: str = "mse",
) -> Learner:
  """Returns a linear layer on features of `width`."""
  head = heads.LinearHead(width, task.num_outputs, nnx.Rngs(seed))
  graphdef, trained, fixed = nnx.split(head, nnx.Param, ...)
  return Learner(
    graphdef,
    _pure(trained),
    _pure(fixed),
    task,
    config,
    mesh,
    value_loss=value_loss,
  )


def on_encoder(
  task: Task,
  weights: Weights,
  config: ConfigDict,
  mesh: Mesh,
  seed: int,
  *,
  attentive: bool,
  tuned: str,
  dtype: str,
  attention: str,
  remat: str,
  clips_per_device: int = 0,
  value_loss: str = "mse",
  rank: int = 8,
  alpha: float = 16.0,
) -> Learner:
  """Returns an encoder with a head.

  Args:
    task: task to predict.
    weights: weights of the encoder.
    config: settings of the optimiser; see Learner.
    mesh: mesh of the devices.
    seed: seed of the head's initial weights.
    attentive: the head attends to all tokens; else it is linear on their mean.
    tuned: what is trained beside the head, one of TUNED.
    dtype, attention, remat: implementation of the encoder; see models.vit.
    clips_per_device: clips of a microbatch on each device; 0: as many as are
      estimated to fit.
    value_loss: loss of numbers: 'mse', or 'ccc', 1 - CCC of the batch.
    rank: R of the adapters, if `tuned` is 'lora'.
    alpha: an adapter is scaled by alpha / rank.
  """
  platform = mesh.devices.flat[0].platform
  attention = softmax_attention.choose(attention, platform, dtype)
  encoder = weights.encoder_only().autoencoder(
    dtype=dtype, attention=attention, remat=remat
  )
  architecture = weights.architecture.without_decoder()
  width, rngs = architecture.width, nnx.Rngs(seed)
  if attentive:
    head = heads.AttentiveHead(
      width, task.num_outputs, rngs, num_heads=architecture.num_heads
    )
  else:
    head = heads.LinearHead(width, task.num_outputs, rngs)
  graphdef, trained, fixed = nnx.split(
    heads.Classifier(encoder, head), _is_trained(tuned), ...
  )
  trained, fixed = _pure(trained), _pure(fixed)
  scale = 0.0
  if tuned == "lora":
    scale = alpha / rank
    trained[_ADAPTERS] = _adapters(fixed, rank, seed)
  model = Learner(
    graphdef,
    trained,
    fixed,
    task,
    config,
    mesh,
    architecture,
    dtype,
    adapter_scale=scale,
    value_loss=value_loss,
  )
  return dataclasses.replace(
    model,
    num_microbatches=memory.num_microbatches(
      config.batch_size // sharding.num_shards(mesh),
      clips_per_device
      or _clips_that_fit(
        model, vit.Execution(dtype, attention, False, remat), tuned
      ),
    ),
  )


def _is_trained(tuned: str):
  """Returns the filter of the module's own parameters that are trained."""
  parts = [nnx.PathContains("head")]
  if tuned == "norms":
    parts += map(nnx.PathContains, ("norm", "norm1", "norm2"))
  return nnx.Param if tuned == "all" else nnx.All(nnx.Param, nnx.Any(*parts))


def _adapters(fixed: Pytree, rank: int, seed: int) -> Pytree:
  """Draws adapters of the projections to queries and values of all blocks.

  Returns:
    Nested dicts by path with `a` (D, R), drawn, and `b` (R, D), zeros.
  """
  key = jax.random.key(seed)

  def adapter(number, kernel):
    shape = len(kernel), rank
    a = jax.random.normal(jax.random.fold_in(key, number), shape)
    return {"a": a / len(kernel) ** 0.5, "b": jnp.zeros((rank, len(kernel.T)))}

  blocks = fixed["encoder"]["transformer"]["blocks"]
  adapted = {
    index: {
      "attention": {
        name: adapter(2 * i + j, block["attention"][name]["kernel"])
        for j, name in enumerate(("query", "value"))
      }
    }
    for i, (index, block) in enumerate(blocks.items())
  }
  return {"encoder": {"transformer": {"blocks": adapted}}}


def _clips_that_fit(
  model: Learner, execution: vit.Execution, tuned: str
) -> int:
  """Estimates the clips of a microbatch on a device, the same on all processes.

  A frozen encoder keeps nothing for the backward pass: one block counts.
  """
  architecture, mesh = model.architecture, model.mesh
  if tuned == "nothing":
    architecture = dataclasses.replace(architecture, depth=1)
  trained, fixed = (
    sharding.bytes_per_device(tree, model._place(tree)) // 4
    for tree in (model.trained, model.fixed)
  )
  fsdp = mesh.shape["fsdp"]
  state = memory.state_bytes(
    trained,
    num_gathered=fixed + (trained + fixed) * fsdp * (fsdp > 1),
    has_ema=True,  # the best round
  )
  device_bytes = chips.device_bytes(jax.local_devices()[0])
  return memory.clips_that_fit(
    distributed.smallest(device_bytes) - state,
    memory.clip_bytes(
      architecture,
      architecture.tubelets.num_tokens,
      execution,
      num_tensor=mesh.shape["tensor"],
    ),
  )


def in_units(trained: Pytree, units: Units) -> Pytree:
  """Returns trained parameters whose outputs are in the units of the targets.

  Args:
    trained: parameters of a Learner; the last layer of each head is `linear`.
    units: those in which it was trained.
  """
  if "head" in trained:
    return {**trained, "head": in_units(trained["head"], units)}
  return {**trained, "linear": units.folded(trained["linear"])}


def _pure(state) -> Pytree:
  return nnx.to_pure_dict(state)
