"""Training of the sync expert.

Axes: B clips, O offsets.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from marlin_jax.data import loader
from marlin_jax.data.augmentation import Augmentation
from marlin_jax.data.reader import BadRecords
from marlin_jax.devices import sharding
from marlin_jax.lipsync import offset_chart
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import Variables, split_network
from marlin_jax.lipsync.training import course
from marlin_jax.lipsync.training.clips import TakeApart, TakeOffsets, TakePairs
from marlin_jax.lipsync.training.expert_step import (
  ExpertState,
  ExpertTrainer,
  Jitter,
  expert_step,
  offset_cosines,
)
from marlin_jax.lipsync.training.losses import published_sync_loss
from marlin_jax.training.configuration import ConfigError
from marlin_jax.training.evaluation import Evaluation, Picture, Result


def train_expert(
  config: ConfigDict, data: str, workdir: str, start: str | None = None
):
  """Trains the sync expert; see `course.train`.

  Args:
    config, data, workdir: see `course.train`.
    start: expert to start from, of the same layout; see
      `networks.build.read_expert`. None: random weights.

  Returns:
    The last ExpertState, and the signal that ended the run early or None.

  Raises:
    ConfigError: `start` has another layout.
    WeightsError: `start` cannot be read.
    UserError: as `course.train`.
  """
  make_course = functools.partial(ExpertCourse, start=start)
  return course.train(config, data, workdir, make_course)


class ExpertCourse(course.LipsyncCourse):
  """Course of --mode=train_expert."""

  section = "expert"

  def __init__(
    self, config, mesh, dataset, eval_dataset, people=None, *, start=None
  ):
    """Builds the network.

    Args:
      config, mesh, dataset, eval_dataset, people: see LipsyncCourse.
      start: see `train_expert`.
    """
    settings = config.expert
    super().__init__(
      config, mesh, dataset, eval_dataset, people, settings.clips_per_record
    )
    is_contrastive = settings.loss == "contrastive"
    self.fields = ("video", "mel", "start" if is_contrastive else "offset")
    take = TakeApart if is_contrastive else TakePairs
    self.take_clip = take(
      settings.num_frames,
      settings.frame_size,
      Augmentation(settings.flip_ratio, settings.min_crop_ratio),
    )
    self.summary = f"sync expert, windows of {settings.num_frames} frames"
    network = build.expert_meta(
      settings.num_frames, settings.width, settings.height
    )
    expert = build.make_expert(network, seed=config.seed, dtype=config.dtype)
    structure, arrays = split_network(expert)
    sources = {}
    if start is not None:
      arrays = _started_from(start, arrays)
      sources["start_sha256"] = build.sha256(arrays)
    self.trainer = ExpertTrainer(
      structure,
      _optimizer(settings),
      temperature=settings.temperature if is_contrastive else 0.0,
      clips_per_record=settings.clips_per_record,
      jitter=Jitter(settings.colour_jitter, settings.gain_jitter),
      seed=config.seed,
    )
    self.set_state(self.trainer.init(arrays), network, sources)

  def make_step(self):
    """Returns the step, which compiles when it is first called."""
    return jax.jit(
      functools.partial(expert_step, self.trainer),
      donate_argnums=0,
      out_shardings=(self.everywhere, self.everywhere),
    )

  def evaluations(self, workdir, alive) -> list[Evaluation]:
    """Returns the evaluations, for `loop.train`."""
    evaluator = ExpertEvaluator(self, workdir.bad_records)
    return [
      # The order of saving and evaluating is that of GeneratorCourse.
      Evaluation(self.settings.eval_steps, evaluator.scores, before_save=True),
      Evaluation(self.config.picture_steps, evaluator.picture),
    ]


def _started_from(path: str, template: Variables) -> Variables:
  """Reads the variables of an expert of the template's layout."""
  _, arrays = split_network(build.read_expert(path))
  shapes = [jax.tree.map(np.shape, x) for x in (arrays, template)]
  if shapes[0] != shapes[1]:
    raise ConfigError(
      f"the expert in {path} has other layers: expected the "
      "config.expert.num_frames, width and height that it was trained with"
    )
  return arrays


def _optimizer(settings: ConfigDict) -> optax.GradientTransformation:
  if not settings.weight_decay:
    return optax.adam(settings.lr)
  return optax.adamw(
    settings.lr,
    weight_decay=settings.weight_decay,
    # Kernels, not biases and scales.
    mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
  )


class ExpertEvaluator:
  """Measures at each offset how well sound fits, on the same clips always."""

  def __init__(self, expert: ExpertCourse, bad: BadRecords | None = None):
    """Chooses the clips; reads nothing.

    Args:
      expert: network, evaluation split and devices.
      bad: list of unusable records; see `loader.eval_batches`.
    """
    structure, settings = expert.trainer.expert, expert.settings

    def measure(arrays, batch):
      return offset_cosines(structure, arrays, batch), batch["inside"]

    self._measure = jax.jit(measure, out_shardings=expert.everywhere)
    self._split = sharding.batch_sharding(expert.mesh)
    self._split_name = expert.eval_dataset.split
    self._batches = functools.partial(
      loader.eval_batches,
      (expert.eval_dataset,),
      TakeOffsets(
        settings.num_frames,
        settings.frame_size,
        max_offset=settings.max_offset,
      ),
      batch_size=settings.batch_size,
      num_batches=settings.eval_batches,
      rows=loader.own_rows(self._split, settings.batch_size),
      bad=bad,
    )
    self._num_curves = expert.config.picture_clips
    self._offsets = np.arange(-settings.max_offset, settings.max_offset + 1)
    self._curves: np.ndarray | None = None

  def scores(self, state: ExpertState) -> Result:
    """Evaluates `offset_scores`; the mean curve is an event."""
    curves = []
    for batch in loader.to_devices(self._batches(), self._split):
      cosines, inside = self._measure(state.expert, batch)
      curves.append(np.where(inside, cosines, np.nan))
    self._curves = np.concatenate(curves)
    scores, mean = offset_scores(self._curves), mean_curve(self._curves)
    return Result(
      {f"eval/{self._split_name}/{k}": v for k, v in scores.items()},
      f"{self._split_name}: loss {scores['loss_sync']:.4f}, accuracy "
      f"{scores['accuracy']:.1%}; cosine in sync "
      f"{scores['cosine_in_sync']:.3f}, shifted "
      f"{scores['cosine_shifted']:.3f}; best offset "
      f"{scores['best_offset']:+.0f}, right for "
      f"{scores['offset_accuracy']:.1%} of the clips",
      events={
        "offsets": {
          "offsets": self._offsets.tolist(),
          "cosines": [x if np.isfinite(x) else None for x in mean.tolist()],
        }
      },
    )

  def picture(self, state: ExpertState) -> Result:
    """Draws the mean curve of the last evaluation, and some clips' curves."""
    if self._curves is None:
      self.scores(state)
    curves = {"mean": mean_curve(self._curves)}
    curves |= {
      str(i): c for i, c in enumerate(self._curves[: self._num_curves])
    }
    title = f"Cosine of lips and sound, {len(self._curves)} clips"
    chart = offset_chart.draw(self._offsets, curves, title)
    return Result(picture=Picture("lipsync", chart))


def mean_curve(cosines: np.ndarray) -> np.ndarray:
  """Returns the mean over clips at each offset, (2K + 1,); NaN without any.

  Args:
    cosines: see `offset_scores`.
  """
  inside = np.isfinite(cosines)
  num = inside.sum(axis=0)
  total = np.where(inside, cosines, 0).sum(axis=0)
  return np.where(num > 0, total / np.maximum(num, 1), np.nan)


def offset_scores(cosines: np.ndarray) -> dict[str, float]:
  """Returns the scores of an expert from its cosines at all offsets.

  Args:
    cosines: float (B, 2K + 1), column i for sound that is i - K frames later;
      NaN where there is no such sound.

  Returns:
    Scalars by name:
    cosine_in_sync: mean cosine in sync.
    cosine_shifted: mean cosine at the largest offset in both directions; where
      all clips are of records too short for K, at the largest that one has.
    margin: cosine_in_sync - cosine_shifted.
    loss_sync: published loss, with equal weights of sound in sync and sound at
      the largest offsets; 0.693 for a constant cosine of 0.5.
    accuracy: accuracy of classifying a cosine above 0.5 as in sync, with the
      same weights.
    ranked: share of pairs of sound in sync and sound at a largest offset, on
      the same frames, in which the cosine in sync is higher.
    best_offset: offset with the highest mean cosine.
    offset_accuracy: share of clips whose highest cosine is at offset 0.
  """
  middle, mean = cosines.shape[1] // 2, mean_curve(cosines)
  largest = np.abs(np.flatnonzero(np.isfinite(mean)) - middle).max()
  in_sync = cosines[:, middle]
  shifted = cosines[:, [middle - largest, middle + largest]]
  pairs = (in_sync[:, None] > shifted)[np.isfinite(shifted)]
  shifted = shifted[np.isfinite(shifted)]
  per_side = [
    float(published_sync_loss(values, np.full(values.shape, truth)))
    for values, truth in ((in_sync, True), (shifted, False))
  ]
  return {
    "loss_sync": float(np.mean(per_side)),
    "accuracy": float(((in_sync > 0.5).mean() + (shifted <= 0.5).mean()) / 2),
    "cosine_in_sync": float(in_sync.mean()),
    "cosine_shifted": float(shifted.mean()),
    "margin": float(in_sync.mean() - shifted.mean()),
    "ranked": float(pairs.mean()),
    "best_offset": float(np.nanargmax(mean) - middle),
    "offset_accuracy": float((np.nanargmax(cosines, axis=1) == middle).mean()),
  }
