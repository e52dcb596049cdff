"""Reconstruction of a fixed set of clips: numbers, a picture, an animation."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from marlin_jax.data import loader
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.devices import sharding
from marlin_jax.inference import pictures
from marlin_jax.pretraining.train_step import Trainer, TrainState, reconstruct

_SCALARS = (
  "loss_rec",
  "loss_pixels",
  "loss_batch_colour",
  "loss_own_colour",
)


class Reconstruction:
  """Hides the same tokens of the same clips every time it is called."""

  def __init__(
    self,
    trainer: Trainer,
    dataset: Dataset,
    take_clip: loader.TakeClip,
    split: NamedSharding,
    *,
    batch_size: int,
    num_batches: int,
    seed: int,
    bad: loader.BadRecords | None = None,
  ):
    """Says which clips, and how they are spread; nothing is read yet."""
    self._task = trainer.task
    everywhere = sharding.replicated(split.mesh)
    self._reconstruct = jax.jit(
      functools.partial(reconstruct, trainer),
      out_shardings={
        "video": split,
        "visible": split,
        **dict.fromkeys(_SCALARS, everywhere),
      },
    )
    self._batches = functools.partial(
      loader.eval_batches,
      dataset,
      take_clip,
      batch_size=batch_size,
      rows=loader.own_rows(split, batch_size),
      bad=bad,
    )
    self._num_batches = num_batches
    self._split = split
    self._key = jax.random.key(seed)

  def _results(self, state: TrainState, num_batches: int):
    batches = self._batches(num_batches=num_batches)
    for i, batch in enumerate(loader.to_devices(batches, self._split)):
      yield (
        batch,
        self._reconstruct(state, batch, jax.random.fold_in(self._key, i)),
      )

  def metrics(self, state: TrainState) -> dict[str, float]:
    """Means over all clips of what train_step.reconstruct measures."""
    rows = [
      [float(result[name]) for name in _SCALARS]
      for _, result in self._results(state, self._num_batches)
    ]
    return dict(zip(_SCALARS, np.mean(rows, axis=0).tolist(), strict=True))

  def views(self, state: TrainState, num_clips: int) -> pictures.Views:
    """Pictures of the first clips; see summaries.panels."""
    batch, result = next(self._results(state, 1))
    # With several processes each shows clips of its own.
    video, visible, made = (
      sharding.local_rows(x)[:num_clips]
      for x in (batch["video"], result["visible"], result["video"])
    )
    return pictures.panels(
      video,
      visible,
      made,
      self._task.tubelets.grid,
      norm_pix=self._task.norm_pix,
    )


def save(views: pictures.Views, directory: Path, name: str, fps: float):
  """Writes NAME.png and NAME.gif.

  Args:
    views: from `Reconstruction.views`.
    directory: created where it is missing.
    name: of the files.
    fps: of the animation.

  Returns:
    The picture, uint8 (rows, columns, 3), and the two paths.
  """
  directory.mkdir(parents=True, exist_ok=True)
  paths = directory / f"{name}.png", directory / f"{name}.gif"
  picture = pictures.picture(views)
  Image.fromarray(picture).save(paths[0])
  pictures.save_animation(views, paths[1], fps=fps)
  return picture, paths
