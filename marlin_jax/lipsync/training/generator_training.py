"""Training of the generator.

Resumed, a run has the same bits as one that was not interrupted: the evaluation
that sets the sync weight comes before the checkpoint of its step, even when a
signal ends the run.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax.data import loader
from marlin_jax.data.reader import BadRecords
from marlin_jax.devices import sharding
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import split_network
from marlin_jax.lipsync.networks.quality_discriminator import (
  QualityDiscriminator,
)
from marlin_jax.lipsync.training import course, pictures
from marlin_jax.lipsync.training.clips import TakeTargets
from marlin_jax.lipsync.training.generator_step import (
  GeneratorState,
  GeneratorTrainer,
  generate,
  generator_step,
  next_sync_weight,
)
from marlin_jax.training.configuration import ConfigError
from marlin_jax.training.evaluation import Evaluation, Picture, Result
from marlin_jax.weights import formats
from marlin_jax.weights.weights import encoder_sha256

_SCALARS = (
  "loss_l1",
  "loss_sync",
  "loss_sync_target",
  "psnr_mouth",
  "psnr_reference",
)
_PICTURES = ("masked", "reference", "generated", "target")


def train_generator(
  config: ConfigDict,
  data: str,
  workdir: str,
  expert: str,
  encoder: str | None,
):
  """Trains the generator; see `course.train`.

  Args:
    config, data, workdir: see `course.train`.
    expert: the sync expert; see `networks.build.read_expert`.
    encoder: MARLIN's encoder: weights in any format, a published model's name
      or 'random'; None for config.generator.kind=wav2lip.

  Returns:
    The last GeneratorState, and the signal that ended the run early or None.

  Raises:
    WeightsError: expert or encoder cannot be read.
    UserError: as `course.train`.
  """
  make_course = functools.partial(
    GeneratorCourse, expert=expert, encoder=encoder
  )
  return course.train(config, data, workdir, make_course)


class GeneratorCourse(course.LipsyncCourse):
  """Course of --mode=train."""

  section = "generator"
  fields = ("video", "reference", "mel", "mels")

  def __init__(
    self,
    config,
    mesh,
    dataset,
    eval_dataset,
    people=None,
    *,
    expert: str,
    encoder: str | None,
  ):
    """Reads the expert and the encoder and builds the generator.

    Args:
      config, mesh, dataset, eval_dataset, people: see LipsyncCourse.
      expert, encoder: see `train_generator`.

    Raises:
      ConfigError: expert and encoder have windows of different lengths.
      WeightsError: expert or encoder cannot be read.
    """
    super().__init__(config, mesh, dataset, eval_dataset, people)
    settings = self.settings
    judge = build.read_expert(expert, dtype=config.dtype)
    self.take_clip = TakeTargets(judge.num_frames)
    judge_structure, judge_arrays = split_network(judge)
    generator, network, encoder_hash = _generator(config, encoder)
    if settings.kind == "marlin" and generator.num_frames != judge.num_frames:
      raise ConfigError(
        f"the expert in {expert} judges {judge.num_frames} frames, and the "
        f"encoder in {encoder} sees {generator.num_frames}: train an expert "
        f"with --config.expert.num_frames={generator.num_frames}"
      )
    self.summary = (
      f"{settings.kind} generator, windows of {judge.num_frames} frames of "
      f"{generator.image_size} pixels"
    )
    self.trainer, state = _trainer(config, generator, judge_structure)
    sources = {
      "expert_sha256": build.sha256(judge_arrays),
      "encoder_sha256": encoder_hash,
    }
    self.set_state(state, network, sources)
    self.judge = jax.device_put(judge_arrays, self.everywhere)

  def make_step(self):
    """Returns the step, which compiles when it is first called."""
    step = jax.jit(
      functools.partial(generator_step, self.trainer),
      donate_argnums=0,
      out_shardings=(self.everywhere, self.everywhere),
    )
    return lambda state, batch: step(state, self.judge, batch)

  def evaluations(self, workdir, alive) -> list[Evaluation]:
    """Returns the evaluations, for `loop.train`."""
    evaluator = GeneratorEvaluator(self, workdir.bad_records)
    return [
      Evaluation(self.settings.eval_steps, evaluator.scores, before_save=True),
      Evaluation(self.config.picture_steps, evaluator.picture),
    ]


def _generator(config: ConfigDict, checkpoint: str | None):
  """Returns the network, its metadata and the hash of its encoder."""
  settings, weights, encoder_hash = config.generator, None, None
  if settings.kind == "marlin":
    weights = formats.open_encoder(checkpoint, config.random).encoder_only()
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
  """Returns the static half of the step and its first state."""
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
  """Generates the same clips at every call and sets the sync weight."""

  def __init__(self, generator: GeneratorCourse, bad: BadRecords | None = None):
    """Chooses the clips; reads nothing.

    Args:
      generator: networks, evaluation split and devices.
      bad: list of unusable records; see `loader.eval_batches`.
    """
    self._settings, self._judge = generator.settings, generator.judge
    self._num_pictures = generator.config.picture_clips
    self._split = sharding.batch_sharding(generator.mesh)
    self._split_name = generator.eval_dataset.split
    self._generate = jax.jit(
      functools.partial(generate, generator.trainer),
      out_shardings={
        **dict.fromkeys(_SCALARS, generator.everywhere),
        **dict.fromkeys(_PICTURES, self._split),
      },
    )
    self._batches = functools.partial(
      loader.eval_batches,
      (generator.eval_dataset,),
      generator.take_clip,
      batch_size=generator.batch_size,
      rows=loader.own_rows(self._split, generator.batch_size),
      bad=bad,
    )

  def _results(self, state: GeneratorState, num_batches: int):
    batches = self._batches(num_batches=num_batches)
    for batch in loader.to_devices(batches, self._split):
      yield batch, self._generate(state, self._judge, batch)

  def scores(self, state: GeneratorState) -> Result:
    """Evaluates the scalars of `generator_step.generate`, means over all clips.

    The result's state has the sync weight that follows from them.
    """
    rows = [
      [float(result[name]) for name in _SCALARS]
      for _, result in self._results(state, self._settings.eval_batches)
    ]
    means = np.mean(rows, axis=0).tolist()
    scores = dict(zip(_SCALARS, means, strict=True))
    weight = next_sync_weight(
      float(state.sync_weight),
      scores["loss_sync"],
      threshold=self._settings.sync_threshold,
      weight=self._settings.sync_weight,
    )
    scores["sync_weight"] = weight
    on_devices = jax.device_put(np.float32(weight), state.sync_weight.sharding)
    return Result(
      {f"eval/{self._split_name}/{k}": v for k, v in scores.items()},
      f"{self._split_name}: L1 {scores['loss_l1']:.4f}; sync loss "
      f"{scores['loss_sync']:.4f} (true pictures "
      f"{scores['loss_sync_target']:.4f}), its weight {weight:g}; PSNR of the "
      f"lower half {scores['psnr_mouth']:.2f} dB (reference "
      f"{scores['psnr_reference']:.2f} dB)",
      state=state.replace(sync_weight=on_devices),
    )

  def picture(self, state: GeneratorState) -> Result:
    """Draws input, reference, generated and target of the first clips."""
    batch, result = next(self._results(state, 1))
    arrays = [*(result[name] for name in _PICTURES), batch["mels"]]
    clips = [sharding.local_rows(x)[: self._num_pictures] for x in arrays]
    return Result(picture=Picture("lipsync", pictures.strip(*clips)))
