"""Builds the parts of a pretraining run from its configuration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data.loader import TakeClip
from marlin_jax.devices import chips, sharding
from marlin_jax.models import softmax_attention, vit
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE
from marlin_jax.pretraining import memory, schedules, train_step
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.weights.architecture import Architecture


class Experiment(NamedTuple):
  """The parts of a run that its configuration determines.

  Attributes:
    trainer: static half of the training step; holds the pretext task.
    initialise: () -> the first TrainState; call it under jit.
    learning_rates: TrainState -> learning rate of each optimiser's last update,
      by metric name.
    take_clip: turns records into clips.
    architecture: sizes of both networks.
    clips_that_fit: clips that are estimated to fit in the memory of a device at
      once; `config.clips_per_device` overrides it.
  """

  trainer: train_step.Trainer
  initialise: Callable[[], train_step.TrainState]
  learning_rates: Callable[[train_step.TrainState], dict[str, float]]
  take_clip: TakeClip
  architecture: Architecture
  clips_that_fit: int


def make_experiment(
  config: ConfigDict,
  num_steps: int,
  mesh: Mesh | None = None,
  device_bytes: int | None = None,
) -> Experiment:
  """Builds the parts of a run; allocates no arrays.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    num_steps: steps of the whole run.
    mesh: the devices, from sharding.make_mesh; None: one device.
    device_bytes: memory that training may use on each device, the same on every
      process; None: `chips.device_bytes` of this process's first device.
  """
  architecture = Architecture.from_config(config)
  task = PretextTask.from_architecture(
    architecture, config.mask.strategy, config.mask.ratio
  )
  execution = choose_execution(config, mesh)

  def draw_networks():
    return make_networks(
      architecture,
      execution,
      seed=config.seed,
      start_grey=config.model.start_grey,
    )

  # --- Structure, without arrays ----------------------------------------------
  mae, discriminator = nnx.eval_shape(draw_networks)
  mae_graph, params, fixed = train_step.split_model(mae)
  disc_graph, disc_params, _ = train_step.split_model(discriminator)
  shapes = {"params": params, "fixed": fixed, "disc_params": disc_params}

  # --- Microbatches -----------------------------------------------------------
  if device_bytes is None:
    device_bytes = chips.device_bytes(jax.local_devices()[0])
  clips_that_fit = memory.clips_that_fit(
    device_bytes
    - _state_bytes(architecture, mesh, shapes, has_ema=bool(config.ema_decay)),
    memory.clip_bytes(
      architecture,
      task.masking.num_visible,
      execution,
      num_tensor=mesh.shape["tensor"] if mesh else 1,
    ),
  )
  num_shards = sharding.num_shards(mesh) if mesh else 1

  # --- Training step ----------------------------------------------------------
  adversarial = train_step.Adversarial(
    weight=config.adv.weight,
    gp_weight=config.adv.gp_weight,
    d_steps=config.adv.d_steps,
    g_steps=config.adv.g_steps,
    max_pull=config.adv.max_pull,
  )
  rate_of_step = make_schedule(config.optim, config.batch_size, num_steps)
  schedule = schedules.per_update(rate_of_step, adversarial.g_steps)
  disc_schedule = schedules.per_update(rate_of_step, adversarial.d_steps)
  on_mesh = mesh is not None and mesh.size > 1
  trainer = train_step.Trainer(
    task=task,
    adversarial=adversarial,
    mae=mae_graph,
    discriminator=disc_graph,
    optimizer=make_optimizer(config.optim, schedule),
    disc_optimizer=make_optimizer(config.optim, disc_schedule),
    ema_decay=config.ema_decay,
    ema_warmup=config.ema_warmup,
    decoder_ratio=config.mask.decoder_ratio,
    num_microbatches=memory.num_microbatches(
      config.batch_size // num_shards,
      config.clips_per_device or clips_that_fit,
    ),
    placement=sharding.MeshPlacement(mesh, config.dtype) if on_mesh else None,
  )

  def initialise():
    mae, discriminator = draw_networks()
    _, params, fixed = train_step.split_model(mae)
    _, disc_params, _ = train_step.split_model(discriminator)
    return train_step.init_state(trainer, params, fixed, disc_params)

  def learning_rates(state):
    rates = {"lr": schedules.last_rate(schedule, state.opt_state)}
    if adversarial.weight:
      rates["lr_disc"] = schedules.last_rate(
        disc_schedule, state.disc_opt_state
      )
    return rates

  return Experiment(
    trainer,
    initialise,
    learning_rates,
    TakeClip(architecture.clip, architecture.tubelet_size),
    architecture,
    clips_that_fit,
  )


def make_networks(
  architecture: Architecture,
  execution: vit.Execution,
  *,
  seed: int,
  start_grey: bool,
) -> tuple[MAE, Discriminator]:
  """Draws autoencoder and discriminator.

  Args:
    architecture: sizes of both networks.
    execution: dtype, attention, scan and remat.
    seed: seed of the parameters; each network has its own key.
    start_grey: see models.mae.MAE.
  """
  key = jax.random.key(seed)
  mae = architecture.make_autoencoder(
    rngs=nnx.Rngs(jax.random.fold_in(key, 0)),
    start_grey=start_grey,
    **dataclasses.asdict(execution),
  )
  discriminator = architecture.make_discriminator(
    rngs=nnx.Rngs(jax.random.fold_in(key, 1)), dtype=execution.dtype
  )
  return mae, discriminator


def make_schedule(
  settings: ConfigDict, batch_size: int, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate of each step; see schedules.learning_rate.

  Args:
    settings: section `optim` of a configuration.
    batch_size: clips per step over all devices.
    num_steps: steps of the whole run.
  """
  return schedules.learning_rate(
    base_lr=settings.base_lr,
    min_lr=settings.min_lr,
    warmup_ratio=settings.warmup_ratio,
    batch_size=batch_size,
    num_steps=num_steps,
  )


def make_optimizer(
  settings: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns AdamW with the settings of section `optim`.

  Args:
    settings: section `optim` of a configuration.
    schedule: number of updates so far -> learning rate.
  """
  adam = {
    "b1": settings.b1,
    "b2": settings.b2,
    "eps": settings.eps,
    "mu_dtype": settings.mu_dtype,
  }
  if settings.decay_params == "all":
    return optax.adamw(schedule, weight_decay=settings.weight_decay, **adam)

  def decay(path, update, param):
    is_kernel = path[-1].key == "kernel"
    return update + settings.weight_decay * param if is_kernel else update

  # adamw's mask would change the structure of its state, and with it that of
  # checkpoints.
  return optax.chain(
    optax.scale_by_adam(**adam),
    optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, decay)),
    optax.scale_by_learning_rate(schedule),
  )


def choose_execution(config: ConfigDict, mesh: Mesh | None) -> vit.Execution:
  """Returns how the networks are computed.

  Attention 'auto' depends on the platform of the mesh; without a mesh, on that
  of this process.
  """
  platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
  attention = softmax_attention.choose(config.attention, platform, config.dtype)
  return vit.Execution(config.dtype, attention, config.scan, config.remat)


def _state_bytes(
  architecture: Architecture, mesh: Mesh | None, shapes, *, has_ema: bool
) -> int:
  """Estimates the memory of one device that state and gradients take.

  Args:
    architecture: sizes of both networks.
    mesh: the devices; None: one device.
    shapes: parameters and position tables of both networks.
    has_ema: an average of the parameters is kept.
  """
  num_params, num_gathered = count(shapes), 0
  if mesh is not None:
    shardings = lay_out(architecture, mesh, shapes).shardings
    num_params = sharding.bytes_per_device(shapes, shardings) // 4
    if mesh.shape["fsdp"] > 1:
      num_gathered = num_params * mesh.shape["fsdp"]
  return memory.state_bytes(num_params, num_gathered, has_ema=has_ema)


def lay_out(architecture: Architecture, mesh: Mesh, shapes) -> sharding.Layout:
  """Places each array of a TrainState, or of its shapes, on the mesh."""
  num_heads = {
    "encoder": architecture.num_heads,
    "decoder": architecture.dec_num_heads,
  }
  return sharding.lay_out(mesh, shapes, num_heads)


def lower_step(
  trainer: train_step.Trainer,
  shapes: train_step.TrainState,
  layout: sharding.Layout,
  mesh: Mesh,
  batch_size: int,
) -> jax.stages.Lowered:
  """Traces the training step for a mesh, which may be of another machine.

  Args:
    trainer: from `make_experiment`.
    shapes: shapes of the state: jax.eval_shape(initialise).
    layout: layout of the state, from `lay_out`.
    mesh: the devices.
    batch_size: clips per step over all devices.

  Returns:
    The lowered step. `.compile()` gives step(state, batch, rng) -> (state,
    scalars), where batch holds `video` and `regions` alone. The old state is
    donated.
  """
  replicated = sharding.replicated(mesh)
  over_batch = sharding.batch_sharding(mesh)
  tubelets = trainer.task.tubelets

  def struct(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  frames = (batch_size, tubelets.num_frames, FRAME_SIZE, FRAME_SIZE, 3)
  batch = {
    "video": struct(frames, jnp.uint8, over_batch),
    "regions": struct((batch_size, *tubelets.grid), jnp.uint16, over_batch),
  }
  rng = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.tree.map(
    lambda x, where: struct(x.shape, x.dtype, where), shapes, layout.shardings
  )
  return jax.jit(
    functools.partial(train_step.train_step, trainer),
    donate_argnums=0,
    out_shardings=(layout.shardings, replicated),
  ).lower(state, batch, struct(rng.shape, rng.dtype, replicated))


def count(tree) -> int:
  """Returns the number of values in a pytree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
