"""What there is to training the sync expert, beside the loop of training.py.

Axes: B clips, O offsets.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import loader
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.devices import sharding
from marlin_jax.lipsync import configuration, offset_chart
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import split_network
from marlin_jax.lipsync.training.clips import TakeOffsets, TakePairs
from marlin_jax.lipsync.training.expert_step import (
  ExpertState,
  ExpertTrainer,
  expert_step,
  offset_cosines,
)
from marlin_jax.lipsync.training.losses import sync_loss


class ExpertCourse:
  """A run of `--mode=train_expert`.

  Attributes:
    part: its section of the configuration.
    settings: that section, config.expert.
    take: record -> clips.
    fields: of a batch, what a step gets.
    meta: what a resumed run must agree in, and what says what the network is.
    state: the first state, on the host.
    summary: the network in a line.
  """

  part = "expert"
  fields = ("video", "mel", "offset")

  def __init__(self, config: ConfigDict, mesh: Mesh):
    """Builds the network.

    Args:
      config: a valid one, see configs/eval_ls.py.
      mesh: the devices.
    """
    self.settings = config.expert
    self.take = TakePairs(config.expert.num_frames)
    network = build.expert_meta(config.expert.num_frames, config.expert.width)
    self.meta = network | configuration.identity(config, self.part)
    expert = build.make_expert(network, seed=config.seed, dtype=config.dtype)
    structure, arrays = split_network(expert)
    self._trainer = ExpertTrainer(structure, optax.adam(config.expert.lr))
    self.state = self._trainer.init(arrays)
    self.summary = f"sync expert, windows of {config.expert.num_frames} frames"
    everywhere = sharding.replicated(mesh)
    self.step = jax.jit(
      functools.partial(expert_step, self._trainer),
      donate_argnums=0,
      out_shardings=(everywhere, everywhere),
    )
    self._mesh = mesh

  def evaluator(
    self, dataset: Dataset, bad: loader.BadRecords
  ) -> ExpertEvaluator:
    """What measures it on the evaluation split."""
    return ExpertEvaluator(
      self._trainer, dataset, self.settings, self._mesh, bad
    )


class ExpertEvaluator:
  """How well sound fits at each offset, for the same clips every time."""

  def __init__(
    self,
    trainer: ExpertTrainer,
    dataset: Dataset,
    settings: ConfigDict,
    mesh: Mesh,
    bad: loader.BadRecords | None = None,
  ):
    """Says which clips; nothing is read yet.

    Args:
      trainer: holds the network's structure.
      dataset: the evaluation split.
      settings: config.expert.
      mesh: the devices.
      bad: where to tell of records that cannot be used.
    """
    everywhere = sharding.replicated(mesh)

    def measure(arrays, batch):
      return offset_cosines(trainer.expert, arrays, batch), batch["inside"]

    self._measure = jax.jit(measure, out_shardings=everywhere)
    self._split = sharding.batch_sharding(mesh)
    self._batches = functools.partial(
      loader.eval_batches,
      dataset,
      TakeOffsets(settings.num_frames, settings.max_offset),
      batch_size=settings.batch_size,
      num_batches=settings.eval_batches,
      rows=loader.own_rows(self._split, settings.batch_size),
      bad=bad,
    )
    self.offsets = np.arange(-settings.max_offset, settings.max_offset + 1)
    self._curves: np.ndarray | None = None

  def evaluate(
    self, state: ExpertState
  ) -> tuple[ExpertState, dict[str, float]]:
    """Measures; the state is returned as it is.

    Returns:
      The state and the scalars of `offset_scores`.
    """
    found = []
    for batch in loader.to_devices(self._batches(), self._split):
      cosines, inside = self._measure(state.expert, batch)
      found.append(np.where(inside, cosines, np.nan))
    self._curves = np.concatenate(found)
    return state, offset_scores(self._curves)

  def tell(self, scalars: dict[str, float]) -> str:
    """The numbers in a line."""
    return (
      f"loss {scalars['loss_sync']:.4f}, accuracy {scalars['accuracy']:.1%}; "
      f"in sync {scalars['cosine_in_sync']:.3f}, shifted "
      f"{scalars['cosine_shifted']:.3f}; best offset "
      f"{scalars['best_offset']:+.0f}, right for "
      f"{scalars['offset_accuracy']:.1%} of the clips"
    )

  def details(self) -> dict[str, Any]:
    """The curve of the last evaluation, for metrics.jsonl."""
    return {
      "offsets": self.offsets.tolist(),
      "cosines": np.nanmean(self._curves, axis=0).tolist(),
    }

  def picture(self, state: ExpertState, num_clips: int) -> np.ndarray:
    """The curve as a chart, with those of some clips behind it."""
    if self._curves is None:
      self.evaluate(state)
    curves = {"mean": np.nanmean(self._curves, axis=0)}
    curves |= {str(i): c for i, c in enumerate(self._curves[:num_clips])}
    title = f"Cosine of lips and sound, {len(self._curves)} clips"
    return offset_chart.draw(self.offsets, curves, title)


def offset_scores(cosines: np.ndarray) -> dict[str, float]:
  """What cosines at all offsets say about an expert.

  Args:
    cosines: float (B, 2K + 1), column i for sound that is i - K frames later;
      NaN where there is no such sound.

  Returns:
    cosine_in_sync and cosine_shifted, the means without a shift and at the
    largest both ways, and `margin`, their difference; `loss_sync`, the training
    loss of the two with equal weights (a constant cosine of 0.5 scores 0.693),
    and `accuracy`, likewise, of the cosine being above 0.5 where in sync;
    `ranked`, the share of pairs of the two in which that in sync scores higher
    on the same pictures; `best_offset`, where the mean curve is highest, and
    `offset_accuracy`, the share of clips whose own is at 0.
  """
  middle = cosines.shape[1] // 2
  in_sync = cosines[:, middle]
  shifted = cosines[:, [0, -1]]
  pairs = (in_sync[:, None] > shifted)[np.isfinite(shifted)]
  shifted = shifted[np.isfinite(shifted)]
  per_side = [
    float(sync_loss(values, np.full(values.shape, truth)))
    for values, truth in ((in_sync, True), (shifted, False))
  ]
  mean = np.nanmean(cosines, axis=0)
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
