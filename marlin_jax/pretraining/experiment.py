"""From a configuration to the parts of a run."""

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

from marlin_jax.data import clip_geometry
from marlin_jax.data.loader import TakeClip
from marlin_jax.devices import chips, sharding
from marlin_jax.models import discriminator, mae, softmax_attention
from marlin_jax.pretraining import masking, memory, schedules, train_step
from marlin_jax.records.schema import FRAME_SIZE


class Experiment(NamedTuple):
  """The parts of a run that its configuration determines.

  Attributes:
    trainer: the training step's static half.
    initialise: makes the first TrainState; to be jitted.
    schedule: step -> learning rate.
    take_clip: record -> clip.
  """

  trainer: train_step.Trainer
  initialise: Callable[[], train_step.TrainState]
  schedule: optax.Schedule
  take_clip: TakeClip


def build(
  config: ConfigDict,
  num_steps: int,
  mesh: Mesh | None = None,
  device_bytes: int | None = None,
) -> Experiment:
  """Puts a run together.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    num_steps: steps of the whole run.
    mesh: the devices, from sharding.make_mesh; None: one device.
    device_bytes: memory to plan with on each device; None: that of this
      process's first. Must be the same on every process.
  """
  tubelets = clip_geometry.Tubelets(
    config.data.num_frames, tubelet_size=config.model.tubelet_size
  )
  masks = masking.Masking(
    config.mask.strategy, config.mask.ratio, tubelets.grid
  )
  sizes = dict(config.model)
  del sizes["tubelet_size"]
  key = jax.random.key(config.seed)

  def make_mae():
    return mae.MAE(
      num_tokens=tubelets.num_tokens,
      pixels=tubelets.pixels,
      dtype=config.dtype,
      attention=attention_of(config, mesh),
      scan=config.scan,
      remat=config.remat,
      rngs=nnx.Rngs(jax.random.fold_in(key, 0)),
      **sizes,
    )

  def make_discriminator():
    return discriminator.Discriminator(
      pixels=tubelets.pixels,
      hidden=config.adv.hidden,
      dtype=config.dtype,
      rngs=nnx.Rngs(jax.random.fold_in(key, 1)),
    )

  mae_graph, *mae_shapes = train_step.split_model(nnx.eval_shape(make_mae))
  disc_graph, *disc_shapes = train_step.split_model(
    nnx.eval_shape(make_discriminator)
  )
  if device_bytes is None:
    device_bytes = chips.device_bytes(jax.local_devices()[0])
  params, fixed = mae_shapes
  params = {"params": params, "fixed": fixed, "disc_params": disc_shapes[0]}
  fit = config.clips_per_device or clips_that_fit(
    config, mesh, params, device_bytes
  )
  schedule = schedules.learning_rate(
    base_lr=config.optim.base_lr,
    min_lr=config.optim.min_lr,
    warmup_ratio=config.optim.warmup_ratio,
    batch_size=config.batch_size,
    num_steps=num_steps,
  )
  adamw = optax.adamw(
    schedule,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    mu_dtype=config.optim.mu_dtype,
  )
  trainer = train_step.Trainer(
    task=train_step.Task(
      tubelets, masks, config.target.norm_pix, config.input.imagenet_norm
    ),
    adversarial=train_step.Adversarial(
      config.adv.weight,
      config.adv.gp_weight,
      config.adv.d_steps,
      config.adv.g_steps,
      config.adv.max_pull,
    ),
    mae=mae_graph,
    discriminator=disc_graph,
    optimizer=adamw,
    disc_optimizer=adamw,
    ema_decay=config.ema_decay,
    decoder_ratio=config.mask.decoder_ratio,
    num_micro=memory.num_parts(
      config.batch_size, sharding.num_shards(mesh) if mesh else 1, fit
    ),
    placement=sharding.MeshPlacement(mesh, config.dtype)
    if mesh and mesh.size > 1
    else None,
  )

  def initialise():
    _, params, fixed = train_step.split_model(make_mae())
    _, disc_params, _ = train_step.split_model(make_discriminator())
    return train_step.init_state(trainer, params, fixed, disc_params)

  take_clip = TakeClip(
    clip_geometry.Clip(config.data.num_frames, config.data.stride),
    config.model.tubelet_size,
  )
  return Experiment(trainer, initialise, schedule, take_clip)


def clips_that_fit(
  config: ConfigDict, mesh: Mesh | None, params, device_bytes: int
) -> int:
  """How many clips one device is thought to hold at once.

  Args:
    config: a valid configuration.
    mesh: as for `build`.
    params: the parameters' shapes: {"params": ..., "fixed": ...,
      "disc_params": ...}.
    device_bytes: memory to plan with on each device.
  """
  tubelets = clip_geometry.Tubelets(
    config.data.num_frames, tubelet_size=config.model.tubelet_size
  )
  masks = masking.Masking(
    config.mask.strategy, config.mask.ratio, tubelets.grid
  )
  return memory.clips_that_fit(
    device_bytes,
    **_kept_and_gathered(config, mesh, params),
    has_ema=bool(config.ema_decay),
    clip_bytes=memory.clip_bytes(
      model=config.model,
      num_tokens=tubelets.num_tokens,
      num_visible=masks.num_visible,
      pixels=tubelets.pixels,
      dtype=config.dtype,
      attention=attention_of(config, mesh),
      remat=config.remat,
      num_tensor=mesh.shape["tensor"] if mesh else 1,
    ),
  )


def attention_of(config: ConfigDict, mesh: Mesh | None) -> str:
  """What `config.attention` stands for on these devices."""
  platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
  return softmax_attention.choose(config.attention, platform, config.dtype)


def lay_out(config: ConfigDict, mesh: Mesh, shapes) -> sharding.Layout:
  """Finds a place on the mesh for each array of a TrainState or its shapes."""
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
  """Traces the training step for a mesh, which need not be of this machine.

  Args:
    trainer: from `build`.
    shapes: of the state: jax.eval_shape(initialise).
    layout: of the state: `lay_out`.
    mesh: the devices.
    batch_size: clips per step over all of them.

  Returns:
    `.compile()` gives step(state, batch, rng) -> (state, scalars), where batch
    holds `video` and `regions` alone. The old state's memory is given up.
  """
  everywhere = sharding.replicated(mesh)
  split = sharding.batch_sharding(mesh)
  tubelets = trainer.task.tubelets

  def struct(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  frames = (batch_size, tubelets.num_frames, FRAME_SIZE, FRAME_SIZE, 3)
  batch = {
    "video": struct(frames, jnp.uint8, split),
    "regions": struct((batch_size, *tubelets.grid), jnp.uint16, split),
  }
  rng = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.tree.map(
    lambda x, where: struct(x.shape, x.dtype, where), shapes, layout.shardings
  )
  return jax.jit(
    functools.partial(train_step.train_step, trainer),
    donate_argnums=0,
    out_shardings=(layout.shardings, everywhere),
  ).lower(state, batch, struct(rng.shape, rng.dtype, everywhere))


def _kept_and_gathered(config, mesh, params) -> dict[str, int]:
  """Parameters that one device keeps, and those it puts together in a step."""
  if mesh is None:
    return {"num_params": count(params), "num_gathered": 0}
  shardings = lay_out(config, mesh, params).shardings
  kept = sharding.bytes_per_device(params, shardings) // 4
  cut_by_fsdp = mesh.shape["fsdp"] > 1
  return {
    "num_params": kept,
    "num_gathered": kept * mesh.shape["fsdp"] if cut_by_fsdp else 0,
  }


def count(params) -> int:
  """Numbers in a pytree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
