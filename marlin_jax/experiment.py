"""From a configuration to the parts of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax import masking, memory, optim, train_step, video
from marlin_jax.input_pipeline import Dataset, TakeClip
from marlin_jax.models import discriminator, mae

# Keys that change neither what is learned nor from what: free on resume.
_FREE_ON_RESUME = (
  "attention",
  "checkpoint_steps",
  "clips_per_device",
  "data.eval_split",
  "data.num_threads",
  "data.path",  # the data set's fingerprint is compared instead
  "eval_batches",
  "eval_steps",
  "keep_checkpoints",
  "log_steps",
  "mesh.data",
  "num_epochs",  # compared as num_steps
  "picture_clips",
  "picture_steps",
  "remat",
  "scan",
)


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


def build(config: ConfigDict, num_steps: int, num_devices: int) -> Experiment:
  """Puts a run together.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    num_steps: steps of the whole run.
    num_devices: devices that share the batch.
  """
  tubelets = video.Tubelets(
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
      attention=config.attention,
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
  fit = config.clips_per_device or memory.clips_that_fit(
    jax.local_devices()[0],
    num_params=count(mae_shapes) + count(disc_shapes),
    clip_bytes=memory.clip_bytes(
      model=config.model,
      num_tokens=tubelets.num_tokens,
      num_visible=masks.num_visible,
      pixels=tubelets.pixels,
      dtype=config.dtype,
      remat=config.remat,
    ),
  )
  schedule = optim.learning_rate(
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
    ),
    mae=mae_graph,
    discriminator=disc_graph,
    optimizer=adamw,
    disc_optimizer=adamw,
    num_micro=memory.num_parts(config.batch_size, num_devices, fit),
  )

  def initialise():
    _, params, fixed = train_step.split_model(make_mae())
    _, disc_params, _ = train_step.split_model(make_discriminator())
    return train_step.init_state(trainer, params, fixed, disc_params)

  take_clip = TakeClip(
    video.Clip(config.data.num_frames, config.data.stride),
    config.model.tubelet_size,
  )
  return Experiment(trainer, initialise, schedule, take_clip)


def count(params) -> int:
  """Numbers in a pytree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def identity(config: ConfigDict, dataset: Dataset, num_steps: int) -> dict:
  """What a run is about; a resumed run must agree in all of it.

  Returns:
    A flat dict that survives JSON.
  """

  def flatten(tree, prefix=""):
    for key, value in tree.items():
      if isinstance(value, ConfigDict):
        yield from flatten(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  kept = {k: v for k, v in flatten(config) if k not in _FREE_ON_RESUME}
  kept["num_steps"] = num_steps
  kept["data set (sha256)"] = dataset.fingerprint
  return json.loads(json.dumps(kept))
