"""Builds the parts of a pretraining run from its configuration."""

from __future__ import annotations

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
    trainer: static half of the training step.
    initialise: () -> the first TrainState; call it under jit.
    learning_rates: TrainState -> learning rate of each optimiser's last update,
      by metric name.
    take_clip: record -> clip.
  """

  trainer: train_step.Trainer
  initialise: Callable[[], train_step.TrainState]
  learning_rates: Callable[[train_step.TrainState], dict[str, float]]
  take_clip: TakeClip


def make_experiment(
  config: ConfigDict,
  num_steps: int,
  mesh: Mesh | None = None,
  device_bytes: int | None = None,
) -> Experiment:
  """Builds the parts of a run.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    num_steps: steps of the whole run.
    mesh: the devices, from sharding.make_mesh; None: one device.
    device_bytes: memory that training may use on each device, the same on every
      process; None: `chips.device_bytes` of this process's first device.
  """
  mae, discriminator = nnx.eval_shape(lambda: make_networks(config, mesh))
  mae_graph, _, _ = train_step.split_model(mae)
  disc_graph, _, _ = train_step.split_model(discriminator)
  adversarial = train_step.Adversarial(
    weight=config.adv.weight,
    gp_weight=config.adv.gp_weight,
    d_steps=config.adv.d_steps,
    g_steps=config.adv.g_steps,
    max_pull=config.adv.max_pull,
  )
  rate_of_step = make_schedule(config, num_steps)
  schedule = schedules.per_update(rate_of_step, adversarial.g_steps)
  disc_schedule = schedules.per_update(rate_of_step, adversarial.d_steps)
  on_mesh = mesh is not None and mesh.size > 1
  trainer = train_step.Trainer(
    task=PretextTask.from_config(config),
    adversarial=adversarial,
    mae=mae_graph,
    discriminator=disc_graph,
    optimizer=make_optimizer(config, schedule),
    disc_optimizer=make_optimizer(config, disc_schedule),
    ema_decay=config.ema_decay,
    decoder_ratio=config.mask.decoder_ratio,
    num_microbatches=num_microbatches(config, mesh, device_bytes),
    placement=sharding.MeshPlacement(mesh, config.dtype) if on_mesh else None,
  )

  def initialise():
    mae, discriminator = make_networks(config, mesh)
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

  clip = Architecture.from_config(config).clip
  take_clip = TakeClip(clip, config.model.tubelet_size)
  return Experiment(trainer, initialise, learning_rates, take_clip)


def make_networks(
  config: ConfigDict, mesh: Mesh | None
) -> tuple[MAE, Discriminator]:
  """Draws autoencoder and discriminator from the configuration's seed."""
  architecture = Architecture.from_config(config)
  key = jax.random.key(config.seed)
  mae = architecture.make_autoencoder(
    rngs=nnx.Rngs(jax.random.fold_in(key, 0)),
    start_grey=config.model.start_grey,
    dtype=config.dtype,
    attention=choose_attention(config, mesh),
    scan=config.scan,
    remat=config.remat,
  )
  discriminator = architecture.make_discriminator(
    rngs=nnx.Rngs(jax.random.fold_in(key, 1)), dtype=config.dtype
  )
  return mae, discriminator


def make_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
  """Returns the learning rate of each step; see schedules.learning_rate."""
  return schedules.learning_rate(
    base_lr=config.optim.base_lr,
    min_lr=config.optim.min_lr,
    warmup_ratio=config.optim.warmup_ratio,
    batch_size=config.batch_size,
    num_steps=num_steps,
  )


def make_optimizer(
  config: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns AdamW with the settings of config.optim.

  Args:
    config: a valid configuration.
    schedule: number of updates so far -> learning rate.
  """
  return optax.adamw(
    schedule,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    mu_dtype=config.optim.mu_dtype,
  )


def choose_attention(config: ConfigDict, mesh: Mesh | None) -> str:
  """Returns the attention implementation, which 'auto' leaves to devices."""
  platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
  return softmax_attention.choose(config.attention, platform, config.dtype)


def num_microbatches(
  config: ConfigDict, mesh: Mesh | None, device_bytes: int | None = None
) -> int:
  """Returns the number of microbatches that a batch is split into.

  As few as `config.clips_per_device` allows or, if that is 0, as memory is
  estimated to hold.

  Args:
    config: a valid configuration.
    mesh: the devices; None: one device.
    device_bytes: as for `make_experiment`.
  """
  clips_at_once = config.clips_per_device
  if not clips_at_once:
    if device_bytes is None:
      device_bytes = chips.device_bytes(jax.local_devices()[0])
    clips_at_once = memory.clips_that_fit(
      device_bytes - _state_bytes(config, mesh), _clip_bytes(config, mesh)
    )
  num_shards = sharding.num_shards(mesh) if mesh else 1
  return memory.num_microbatches(config.batch_size // num_shards, clips_at_once)


def _state_bytes(config: ConfigDict, mesh: Mesh | None) -> int:
  """Estimates the memory of one device that state and gradients take."""
  mae, discriminator = nnx.eval_shape(lambda: make_networks(config, mesh))
  _, params, fixed = train_step.split_model(mae)
  _, disc_params, _ = train_step.split_model(discriminator)
  shapes = {"params": params, "fixed": fixed, "disc_params": disc_params}
  num_params, num_gathered = count(shapes), 0
  if mesh is not None:
    shardings = lay_out(config, mesh, shapes).shardings
    num_params = sharding.bytes_per_device(shapes, shardings) // 4
    if mesh.shape["fsdp"] > 1:
      num_gathered = num_params * mesh.shape["fsdp"]
  return memory.state_bytes(
    num_params, num_gathered, has_ema=bool(config.ema_decay)
  )


def _clip_bytes(config: ConfigDict, mesh: Mesh | None) -> int:
  """Estimates the activations of one clip on one device, in bytes."""
  return memory.clip_bytes(
    Architecture.from_config(config),
    PretextTask.from_config(config).masking.num_visible,
    vit.Execution(
      config.dtype, choose_attention(config, mesh), config.scan, config.remat
    ),
    num_tensor=mesh.shape["tensor"] if mesh else 1,
  )


def lay_out(config: ConfigDict, mesh: Mesh, shapes) -> sharding.Layout:
  """Places each array of a TrainState, or of its shapes, on the mesh."""
  num_heads = {
    "encoder": config.model.num_heads,
    "decoder": config.model.dec_num_heads,
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
    shapes: of the state: jax.eval_shape(initialise).
    layout: of the state, from `lay_out`.
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
