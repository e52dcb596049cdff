"""Builds the parts of a pretraining run from its configuration."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data.augmentation import Augmentation
from marlin_jax.data.clip_geometry import SoundPatches
from marlin_jax.data.clips import TakeClip
from marlin_jax.devices import chips, sharding
from marlin_jax.models import softmax_attention, vit
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE
from marlin_jax.objectives import objective, table
from marlin_jax.objectives.objective import Objective
from marlin_jax.pretraining import (
  configuration,
  flops,
  memory,
  optimizer,
  train_step,
)
from marlin_jax.pretraining.masking import num_decoded
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights.architecture import (
  POSITIONS,
  Architecture,
)


class Experiment:
  """The parts of a run that its configuration determines.

  The configuration is read here: each part is built when it is first used, and
  is given the values that it needs.

  Attributes:
    config: the configuration.
    batch_size: clips per step over all devices.
    num_steps: steps of the whole run.
  """

  def __init__(
    self,
    config: ConfigDict,
    num_steps: int,
    mesh: Mesh | None = None,
    device_bytes: int | None = None,
  ):
    """Builds nothing yet.

    Args:
      config: a valid configuration, see configs/pretrain_b.py.
      num_steps: steps of the whole run.
      mesh: the devices, from sharding.make_mesh; None: one device.
      device_bytes: memory that training may use on each device, the same on
        every process; None: `chips.device_bytes` of this process's first
        device.
    """
    self.config, self.num_steps = config, num_steps
    self.batch_size = config.batch_size
    self._mesh = mesh
    self._device_bytes = device_bytes

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices."""
    return self._mesh or sharding.make_mesh(devices=jax.local_devices()[:1])

  # --- Clips and networks -----------------------------------------------------

  @functools.cached_property
  def architecture(self) -> Architecture:
    """Sizes of both networks."""
    return Architecture.from_config(self.config)

  @functools.cached_property
  def take_clip(self) -> TakeClip:
    """Turns records into clips."""
    reads_sound = any("mel" in x.fields for x in self.objectives)
    return TakeClip(
      self.architecture.clip,
      self.architecture.tubelet_size,
      self.architecture.image_size,
      self.architecture.patch_size,
      needs_regions=self.task.masking.needs_regions,
      augmentation=Augmentation(**self.config.augment),
      sound=SoundPatches.of(self.architecture.clip) if reads_sound else None,
    )

  @functools.cached_property
  def task(self) -> PretextTask:
    """Masking, and the form of input and target."""
    mask = self.config.mask
    return PretextTask.from_architecture(
      self.architecture,
      mask.strategy,
      mask.ratio,
      region_weight=self.config.loss.region_weight,
    )

  @functools.cached_property
  def execution(self) -> vit.Execution:
    """How networks are computed; attention 'auto' depends on the platform."""
    config = self.config
    attention = softmax_attention.choose(
      config.attention, self.mesh.devices.flat[0].platform, config.dtype
    )
    return vit.Execution(config.dtype, attention, config.scan, config.remat)

  def draw_networks(self) -> tuple[MAE, Discriminator]:
    """Draws autoencoder and discriminator, each by a key of its own."""
    key = jax.random.key(self.config.seed)
    mae = self.architecture.make_autoencoder(
      rngs=nnx.Rngs(jax.random.fold_in(key, 0)),
      first_prediction=(
        self.task.target_of_grey if self.config.model.start_grey else None
      ),
      **dataclasses.asdict(self.execution),
    )
    discriminator = self.architecture.make_discriminator(
      rngs=nnx.Rngs(jax.random.fold_in(key, 1)), dtype=self.execution.dtype
    )
    return mae, discriminator

  @functools.cached_property
  def _structure(self) -> tuple[tuple, tuple]:
    """Both networks, see `vit.split_model`, without arrays."""
    return tuple(map(vit.split_model, nnx.eval_shape(self.draw_networks)))

  # --- Extra objectives -------------------------------------------------------

  @functools.cached_property
  def objectives(self) -> tuple[Objective, ...]:
    """Objectives beside MARLIN's.

    Raises:
      UserError: the run cannot have one of them.
    """
    return table.make(self._run)

  @property
  def _run(self) -> objective.Run:
    """The run as its objectives know it."""
    masking = self.task.masking
    return objective.Run(
      self.config,
      self.architecture,
      self.execution,
      num_visible=masking.num_visible,
      num_masked=num_decoded(
        masking.num_tokens - masking.num_visible,
        self.config.mask.decoder_ratio,
      ),
      batch_size=self.batch_size,
    )

  def _draw_objectives(self) -> tuple[dict, dict]:
    """Draws their networks; see `objective.draw`."""
    return objective.draw(self.objectives, jax.random.key(self.config.seed))

  @functools.cached_property
  def constants(self) -> dict[str, dict]:
    """Arguments of the step that are the same at every step, by name.

    `frozen`: the arrays that objectives read, if there are any.
    """
    frozen = {x.name: x.frozen for x in self.objectives if x.frozen}
    return {"frozen": frozen} if frozen else {}

  @functools.cached_property
  def constants_shardings(self) -> dict[str, dict]:
    """Sharding of each of the constants."""
    heads = objective.all_heads(self.objectives)
    return sharding.lay_out(self.mesh, self.constants, heads).shardings

  # --- Optimisers -------------------------------------------------------------

  @functools.cached_property
  def adversarial(self) -> train_step.Adversarial:
    """Settings of the adversarial loss."""
    adv = self.config.adv
    return train_step.Adversarial(
      weight=adv.weight,
      gp_weight=adv.gp_weight,
      d_steps=adv.d_steps,
      g_steps=adv.g_steps,
      max_pull=adv.max_pull,
    )

  @functools.cached_property
  def _rates(self) -> tuple[optax.Schedule, optax.Schedule]:
    """Learning rates of autoencoder and discriminator by number of updates."""
    rate_of_step = optimizer.make_schedule(
      self.config.optim, self.batch_size, self.num_steps
    )
    adversarial = self.adversarial
    return (
      optimizer.per_update(rate_of_step, adversarial.g_steps),
      optimizer.per_update(rate_of_step, adversarial.d_steps),
    )

  def learning_rates(self, state: train_step.TrainState) -> dict[str, float]:
    """Returns the rate of each optimiser's last update, by metric name."""
    schedule, disc_schedule = self._rates
    rates = {"lr": optimizer.last_rate(schedule, state.opt_state)}
    if self.adversarial.weight:
      rates["lr_disc"] = optimizer.last_rate(
        disc_schedule, state.disc_opt_state
      )
    return rates

  # --- Memory -----------------------------------------------------------------

  @functools.cached_property
  def clips_that_fit(self) -> int:
    """Clips that are estimated to fit in the memory of a device at once.

    `config.clips_per_device` overrides it.
    """
    device_bytes = self._device_bytes
    if device_bytes is None:
      device_bytes = chips.device_bytes(jax.local_devices()[0])
    return memory.clips_that_fit(
      device_bytes - self._state_bytes(),
      memory.clip_bytes(
        self.architecture,
        self.task.masking.num_visible,
        self.execution,
        num_tensor=self.mesh.shape["tensor"],
      )
      + sum(x.clip_bytes for x in self.objectives),
    )

  def _state_bytes(self) -> int:
    """Estimates the memory of one device that state and gradients take."""
    (_, params, fixed), (_, disc_params, _) = self._structure
    own, own_fixed = jax.eval_shape(self._draw_objectives)
    shapes = {
      "params": params | own,
      "fixed": fixed | own_fixed,
      "disc_params": disc_params,
    }
    shardings = self._lay_out(shapes).shardings
    num_params = sharding.bytes_per_device(shapes, shardings) // 4
    fsdp = self.mesh.shape["fsdp"]
    return memory.state_bytes(
      num_params,
      num_gathered=num_params * fsdp if fsdp > 1 else 0,
      has_ema=bool(self.config.ema_decay),
    ) + sharding.bytes_per_device(self.constants, self.constants_shardings)

  @property
  def num_microbatches(self) -> int:
    """Microbatches of a batch, see `train_step.Trainer`.

    Raises:
      ConfigError: clips_per_device is smaller than a group of clips that stay
        together, or such a group is on several devices.
    """
    asked = self.config.clips_per_device
    clips = self.batch_size // sharding.num_shards(self.mesh)
    together = objective.num_together(self.objectives)
    if asked and asked < clips and (clips % together or asked < together):
      raise ConfigError(
        f"clips_per_device={asked}: {together} clips in a row stay in one "
        f"microbatch, and a device has {clips} clips of the batch: expected at "
        f"least {together}, and a batch_size that gives each device a multiple "
        f"of {together}; or 0, as many as fit"
      )
    return self.microbatches_of(asked or self.clips_that_fit)

  def microbatches_of(self, clips_at_once: int) -> int:
    """Returns the number of microbatches with clips that a device can hold."""
    clips = self.batch_size // sharding.num_shards(self.mesh)
    together = objective.num_together(self.objectives)
    if clips % together:
      return 1  # some are on two devices, each of which splits its own
    return memory.num_microbatches(clips // together, clips_at_once // together)

  @property
  def fewest_at_once(self) -> int:
    """Clips of the smallest microbatch on one device that objectives allow."""
    shards = sharding.num_shards(self.mesh)
    clips = self.batch_size // shards
    together = objective.num_together(self.objectives)
    least = max((x.least_clips for x in self.objectives), default=1)
    choices = range(together, clips, together)
    return next(
      (n for n in choices if clips % n == 0 and n * shards >= least), clips
    )

  # --- Training step ----------------------------------------------------------

  @functools.cached_property
  def trainer(self) -> train_step.Trainer:
    """Static half of the training step."""
    config, mesh = self.config, self.mesh
    (mae, *_), (discriminator, *_) = self._structure
    schedule, disc_schedule = self._rates
    make_optimizer = functools.partial(
      optimizer.make_optimizer, config.optim, depth=self.architecture.depth
    )
    return train_step.Trainer(
      task=self.task,
      adversarial=self.adversarial,
      mae=mae,
      discriminator=discriminator,
      optimizer=make_optimizer(schedule),
      disc_optimizer=make_optimizer(disc_schedule),
      objectives=self.objectives,
      pixel_weight=config.loss.pixel_weight,
      ema_decay=config.ema_decay,
      ema_warmup=config.ema_warmup,
      decoder_ratio=config.mask.decoder_ratio,
      num_microbatches=self.num_microbatches,
      placement=(
        sharding.MeshPlacement(mesh, config.dtype, config.float32_sums)
        if mesh.size > 1
        else None
      ),
      matmul_precision=config.matmul_precision,
      spike_sigmas=config.optim.spike_sigmas,
    )

  def initialise(self) -> train_step.TrainState:
    """Returns the first state; call it under jit."""
    (_, params, fixed), (_, disc_params, _) = map(
      vit.split_model, self.draw_networks()
    )
    own, own_fixed = self._draw_objectives()
    return train_step.init_state(
      self.trainer, params | own, fixed | own_fixed, disc_params
    )

  @functools.cached_property
  def shapes(self) -> train_step.TrainState:
    """Shapes of the state."""
    return jax.eval_shape(self.initialise)

  @functools.cached_property
  def layout(self) -> sharding.Layout:
    """Layout of the state on the mesh."""
    return self._lay_out(self.shapes)

  def _lay_out(self, shapes) -> sharding.Layout:
    heads = objective.all_heads(self.objectives)
    return lay_out(self.architecture, self.mesh, shapes, heads)

  @property
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a batch that the step gets."""
    tubelets = self.task.tubelets
    clip = {
      "video": jax.ShapeDtypeStruct(tubelets.video_shape, jnp.uint8),
      "regions": jax.ShapeDtypeStruct(tubelets.grid, jnp.uint16),
      "_id": jax.ShapeDtypeStruct((), jnp.int32),
    }
    for x in self.objectives:
      clip |= x.fields
    return {
      name: jax.ShapeDtypeStruct(
        (self.batch_size, *clip[name].shape), clip[name].dtype
      )
      for name in self.trainer.fields
    }

  def lower_step(self) -> jax.stages.Lowered:
    """Traces the training step for the mesh, which may be of another machine.

    Returns:
      The lowered step. `.compile()` gives step(state, batch, rng, **constants)
      -> (state, scalars), where batch holds `batch_shapes` alone. The old state
      is donated.
    """
    replicated = sharding.replicated(self.mesh)
    over_batch = sharding.batch_sharding(self.mesh)

    def struct(x, where):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    shardings = self.layout.shardings
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(
      self._step,
      donate_argnums=0,
      out_shardings=(shardings, replicated),
    ).lower(
      jax.tree.map(struct, self.shapes, shardings),
      {k: struct(x, over_batch) for k, x in self.batch_shapes.items()},
      struct(rng, replicated),
      **jax.tree.map(struct, self.constants, self.constants_shardings),
    )

  @property
  def _step(self) -> Callable[..., tuple[train_step.TrainState, dict]]:
    """The step: (state, batch, rng, **constants) -> (new state, scalars)."""
    return functools.partial(train_step.train_step, self.trainer)

  @property
  def flops_per_clip(self) -> float:
    """FLOPs of a training step per clip, see `flops.training_step`."""
    return flops.training_step(self.architecture, self.trainer, self.batch_size)

  # --- Curriculum -------------------------------------------------------------

  @property
  def clips_summary(self) -> str:
    """The clips in words: frames, pixels and tokens."""
    sizes, masking = self.architecture, self.task.masking
    return (
      f"{sizes.num_frames} frames of {sizes.image_size} pixels, "
      f"{masking.num_visible} of {masking.num_tokens} tokens visible"
    )

  @functools.cached_property
  def by_stage(self) -> list[Experiment]:
    """The experiment at each stage of the curriculum; itself without one."""
    stages = configuration.stages(self.config)
    if len(stages) == 1:
      return [self]
    starts = itertools.accumulate((s.num_steps for s in stages), initial=0)
    return [
      StageExperiment(self, stage.config, start)
      for stage, start in zip(stages, starts, strict=False)
    ]


class StageExperiment(Experiment):
  """A stage of an experiment: other sizes of clips, other masking ratio.

  Networks, optimisers and state are those of the experiment. A token keeps its
  place in time and in the picture, see `vit.positions_at`.

  Attributes:
    num_earlier: steps of the run before the stage.

  The other attributes are those of `Experiment`.
  """

  def __init__(self, whole: Experiment, config: ConfigDict, num_earlier: int):
    """Builds nothing yet.

    Args:
      whole: the experiment.
      config: its configuration with the sizes of the stage.
      num_earlier: steps of the run before the stage.
    """
    super().__init__(config, whole.num_steps, whole.mesh, whole._device_bytes)
    self._whole, self.num_earlier = whole, num_earlier

  @functools.cached_property
  def trainer(self) -> train_step.Trainer:
    """The experiment's, with task and objectives of the stage."""
    return dataclasses.replace(
      self._whole.trainer,
      task=self.task,
      objectives=self.objectives,
      num_microbatches=self.num_microbatches,
    )

  @property
  def shapes(self) -> train_step.TrainState:
    return self._whole.shapes

  @property
  def layout(self) -> sharding.Layout:
    return self._whole.layout

  @functools.cached_property
  def objectives(self) -> tuple[Objective, ...]:
    return tuple(x.at_stage(self._run) for x in self._whole.objectives)

  @property
  def constants(self) -> dict[str, dict]:
    return self._whole.constants

  @property
  def _step(self) -> Callable[..., tuple[train_step.TrainState, dict]]:
    grids = (self._whole.task.tubelets.grid, self.task.tubelets.grid)

    def at_grid(path, table):
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      return vit.positions_at(table, *grids) if name in POSITIONS else table

    def step(state, batch, rng, **constants):
      # Steps of another stage say nothing about a spike.
      is_first = state.step == self.num_earlier
      recent = jax.tree.map(
        lambda x: jnp.where(is_first, jnp.zeros_like(x), x), state.recent
      )
      tables = jax.tree_util.tree_map_with_path(at_grid, state.fixed)
      new, scalars = train_step.train_step(
        self.trainer,
        state.replace(fixed=tables, recent=recent),
        batch,
        rng,
        **constants,
      )
      return new.replace(fixed=state.fixed), scalars

    return step


def lay_out(
  architecture: Architecture,
  mesh: Mesh,
  shapes,
  heads: Mapping[str, int] = types.MappingProxyType({}),
) -> sharding.Layout:
  """Places each array of a TrainState, or of its shapes, on the mesh.

  Args:
    architecture: sizes of the autoencoder.
    mesh: the devices.
    shapes: the state, or parts of it.
    heads: attention heads of other networks, see sharding.lay_out.
  """
  return sharding.lay_out(
    mesh,
    shapes,
    # The first name that is in a path counts.
    {
      **heads,
      "encoder": architecture.num_heads,
      "decoder": architecture.dec_num_heads,
    },
  )


def count(tree) -> int:
  """Returns the number of values in a pytree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
