"""What there is to training the generator, beside the loop of training.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import loader
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.devices import sharding
from marlin_jax.lipsync import configuration
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import Variables, split_network
from marlin_jax.lipsync.networks.quality_discriminator import (
  QualityDiscriminator,
)
from marlin_jax.lipsync.training import pictures
from marlin_jax.lipsync.training.clips import TakeTargets
from marlin_jax.lipsync.training.generator_step import (
  GeneratorState,
  GeneratorTrainer,
  draw,
  generator_step,
  next_sync_weight,
)
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import formats
from marlin_jax.weights.weights import encoder_sha256

_SCALARS = (
  "loss_l1",
  "loss_sync",
  "loss_sync_target",
  "psnr_mouth",
  "psnr_reference",
)
_PICTURES = ("masked", "reference", "drawn", "target")


class GeneratorCourse:
  """A run of `--mode=train`; the attributes are those of ExpertCourse."""

  part = "generator"
  fields = ("video", "reference", "mel", "mels")

  def __init__(
    self, config: ConfigDict, mesh: Mesh, expert: str, checkpoint: str | None
  ):
    """Builds and reads the networks.

    Args:
      config: a valid one, see configs/eval_ls.py.
      mesh: the devices.
      expert: what networks.read_expert reads.
      checkpoint: MARLIN's encoder, as for the other tasks; None for wav2lip.

    Raises:
      ConfigError: the networks' windows differ.
      WeightsError: one cannot be read.
    """
    self.settings = settings = config.generator
    judge = build.read_expert(expert, dtype=config.dtype)
    self.take = TakeTargets(judge.num_frames)
    judge_structure, judge_arrays = split_network(judge)
    generator, network, encoder_hash = _generator(config, checkpoint)
    if settings.kind == "marlin" and generator.num_frames != judge.num_frames:
      raise ConfigError(
        f"the expert in {expert} judges {judge.num_frames} frames, and the "
        f"encoder in {checkpoint} sees {generator.num_frames}: train an expert "
        f"with --config.expert.num_frames={generator.num_frames}"
      )
    self.meta = network | configuration.identity(config, self.part)
    self.meta |= {
      "expert_sha256": build.sha256(judge_arrays),
      "encoder_sha256": encoder_hash,
    }
    self._trainer, self.state = _trainer(config, generator, judge_structure)
    self.summary = (
      f"{settings.kind} generator, windows of {judge.num_frames} frames of "
      f"{generator.image_size} pixels"
    )
    everywhere = sharding.replicated(mesh)
    self._judge = jax.device_put(judge_arrays, everywhere)
    self._step = jax.jit(
      functools.partial(generator_step, self._trainer),
      donate_argnums=0,
      out_shardings=(everywhere, everywhere),
    )
    self._mesh = mesh

  def step(self, state: GeneratorState, batch: dict):
    """One step; see generator_step. The old state is given up."""
    return self._step(state, self._judge, batch)

  def evaluator(
    self, dataset: Dataset, bad: loader.BadRecords
  ) -> GeneratorEvaluator:
    """What measures it on the evaluation split."""
    return GeneratorEvaluator(
      self._trainer,
      self._judge,
      self.take,
      dataset,
      self.settings,
      self._mesh,
      bad,
    )


def _generator(config: ConfigDict, checkpoint: str | None):
  """The network, what describes it, and the hash of its encoder."""
  settings, weights, encoder_hash = config.generator, None, None
  if settings.kind == "marlin":
    encoder = formats.open_encoder(checkpoint, config.random)
    weights = encoder.encoder_only()
    # The pictures are plain, whatever the encoder was trained on.
    weights = weights.with_plain_input()
    encoder_hash = encoder_sha256(weights)
  meta = build.generator_meta(
    settings.kind, settings.width, weights and weights.architecture
  )
  generator = build.make_generator(
    meta,
    weights,
    seed=config.seed,
    freeze_encoder=not settings.train_encoder,
    dtype=config.dtype,
    attention=config.attention,
    remat=config.remat,
  )
  return generator, meta, encoder_hash


def _trainer(config: ConfigDict, generator, judge):
  """The step's static half, and its first state."""
  settings = config.generator
  frozen = () if settings.train_encoder else ("encoder",)
  structure, arrays = split_network(generator, frozen=frozen)
  discriminator = disc_arrays = None
  if settings.adv_weight:
    discriminator, disc_arrays = split_network(
      QualityDiscriminator(
        width=settings.width,
        dtype=config.dtype,
        rngs=nnx.Rngs(config.seed + 1),
      )
    )
  adam = optax.adam(settings.lr, b1=settings.b1, b2=settings.b2)
  trainer = GeneratorTrainer(
    generator=structure,
    image_size=generator.image_size,
    expert=judge,
    discriminator=discriminator,
    adv_weight=settings.adv_weight,
    optimizer=adam,
    disc_optimizer=adam,
  )
  return trainer, trainer.init(arrays, disc_arrays)


class GeneratorEvaluator:
  """Draws the same clips every time, and decides on the sync weight."""

  def __init__(
    self,
    trainer: GeneratorTrainer,
    judge: Variables,
    take: TakeTargets,
    dataset: Dataset,
    settings: ConfigDict,
    mesh: Mesh,
    bad: loader.BadRecords | None = None,
  ):
    """Says which clips; nothing is read yet.

    Args:
      trainer: the networks' structures.
      judge: the expert's arrays.
      take: record -> clips.
      dataset: the evaluation split.
      settings: config.generator.
      mesh: the devices.
      bad: where to tell of records that cannot be used.
    """
    everywhere = sharding.replicated(mesh)
    self._split = sharding.batch_sharding(mesh)
    self._draw = jax.jit(
      functools.partial(draw, trainer),
      out_shardings={
        **dict.fromkeys(_SCALARS, everywhere),
        **dict.fromkeys(_PICTURES, self._split),
      },
    )
    self._judge, self._settings = judge, settings
    self._batches = functools.partial(
      loader.eval_batches,
      dataset,
      take,
      batch_size=settings.batch_size,
      rows=loader.own_rows(self._split, settings.batch_size),
      bad=bad,
    )

  def _results(self, state: GeneratorState, num_batches: int):
    batches = self._batches(num_batches=num_batches)
    for batch in loader.to_devices(batches, self._split):
      yield batch, self._draw(state, self._judge, batch)

  def evaluate(
    self, state: GeneratorState
  ) -> tuple[GeneratorState, dict[str, float]]:
    """Measures, and sets the sync weight by what was found.

    Returns:
      The state, and means over all clips of what generator_step.draw measures.
    """
    rows = [
      [float(result[name]) for name in _SCALARS]
      for _, result in self._results(state, self._settings.eval_batches)
    ]
    means = np.mean(rows, axis=0).tolist()
    scalars = dict(zip(_SCALARS, means, strict=True))
    weight = next_sync_weight(
      float(state.sync_weight),
      scalars["loss_sync"],
      threshold=self._settings.sync_threshold,
      weight=self._settings.sync_weight,
    )
    old = state.sync_weight
    new = jax.device_put(np.float32(weight), old.sharding)
    return state.replace(sync_weight=new), scalars | {"sync_weight": weight}

  def tell(self, scalars: dict[str, float]) -> str:
    """The numbers in a line."""
    return (
      f"L1 {scalars['loss_l1']:.4f}; sync loss {scalars['loss_sync']:.4f} "
      f"(true pictures {scalars['loss_sync_target']:.4f}), its weight "
      f"{scalars['sync_weight']:g}; PSNR of the lower half "
      f"{scalars['psnr_mouth']:.2f} dB (the reference's "
      f"{scalars['psnr_reference']:.2f} dB)"
    )

  def details(self) -> dict[str, Any]:
    """Nothing beside the scalars."""
    return {}

  def picture(self, state: GeneratorState, num_clips: int) -> np.ndarray:
    """Input, reference, generated and target of the first clips."""
    batch, result = next(self._results(state, 1))
    views = [
      sharding.local_rows(result[name])[:num_clips] for name in _PICTURES
    ]
    return pictures.strip(
      *views, sharding.local_rows(batch["mels"])[:num_clips]
    )
