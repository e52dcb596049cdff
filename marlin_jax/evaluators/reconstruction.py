"""Reconstruction of a fixed set of clips: losses, a picture, an animation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from marlin_jax.data import loader
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.reader import BadRecords
from marlin_jax.devices import sharding
from marlin_jax.inference import pictures
from marlin_jax.pretraining import losses
from marlin_jax.pretraining.course import PretrainingCourse
from marlin_jax.pretraining.train_step import TrainState, reconstruct
from marlin_jax.training.evaluation import Picture, Result

_LOSSES = ("loss_rec", "loss_pixels", "loss_own_colour")
_FEATURES = ("clip_means", "mean_square")
_FPS = 30  # of most videos


class Reconstruction:
  """Reconstructs a fixed set of clips with fixed masks."""

  def __init__(
    self,
    course: PretrainingCourse,
    datasets: Sequence[Dataset],
    bad: BadRecords | None = None,
  ):
    """Chooses the clips; reads nothing.

    Args:
      course: network and devices.
      datasets: evaluation split of each data set.
      bad: list of unreadable records; see `loader.eval_batches`.
    """
    trainer, config = course.trainer, course.config
    self._task, self._config = trainer.task, config
    self._split_name = "+".join(dict.fromkeys(d.split for d in datasets))
    self._split = sharding.batch_sharding(course.mesh)
    everywhere = sharding.replicated(course.mesh)
    self._reconstruct = jax.jit(
      functools.partial(reconstruct, trainer),
      out_shardings={
        "video": self._split,
        "visible": self._split,
        **dict.fromkeys((*_LOSSES, "colour_sums", *_FEATURES), everywhere),
      },
    )
    self._num_parts = trainer.num_microbatches
    part_size = config.batch_size // self._num_parts
    self._parts = functools.partial(
      loader.eval_batches,
      datasets,
      course.take_clip.without_augmentation(),
      batch_size=part_size,
      rows=loader.own_rows(self._split, part_size),
      bad=bad,
    )
    self._key = jax.random.key(config.seed)

  def _results(self, state: TrainState, num_batches: int):
    """Yields each part of the batches and its reconstruction.

    Clips and masks do not depend on the number of parts, and with it on the
    memory of the devices.
    """
    size, num_parts = self._config.batch_size, self._num_parts
    parts = self._parts(num_batches=num_batches * num_parts)
    for i, part in enumerate(loader.to_devices(parts, self._split)):
      number, place = divmod(i, num_parts)
      keys = jax.random.split(jax.random.fold_in(self._key, number), size)
      keys = keys.reshape(num_parts, -1)[place]
      yield part, self._reconstruct(state, part, keys)

  def losses(self, state: TrainState) -> Result:
    """Returns the losses of `train_step.reconstruct`, averaged over clips.

    And `clip_share`, see losses.clip_share.
    """
    num_batches, size = self._config.eval_batches, self._config.batch_size
    rows, sums, features = [], [], []
    for _, result in self._results(state, num_batches):
      rows.append([float(result[name]) for name in _LOSSES])
      sums.append(np.asarray(result["colour_sums"], np.float64))
      features.append([np.asarray(result[name]) for name in _FEATURES])
    loss = dict(zip(_LOSSES, np.mean(rows, axis=0).tolist(), strict=True))
    # Colours are those of a batch, not of a part.
    sums = np.reshape(sums, (num_batches, self._num_parts, *sums[0].shape))
    loss["loss_batch_colour"] = float(
      np.mean(
        [
          losses.batch_colour_loss(loss["loss_own_colour"], of_batch, size)
          for of_batch in sums.sum(1)
        ]
      )
    )
    clip_means, mean_squares = zip(*features, strict=True)
    share = losses.clip_share(
      np.concatenate(clip_means), float(np.mean(mean_squares))
    )
    name = self._split_name
    scalars = loss | {"clip_share": share}
    return Result(
      {f"eval/{name}/{key}": value for key, value in scalars.items()},
      f"pixel loss {loss['loss_pixels']:.4f} on {name}; flat patches of the "
      f"batch's mean colour {loss['loss_batch_colour']:.4f}, of their own "
      f"{loss['loss_own_colour']:.4f}; {share:.0%} of the variance of the "
      "features tells clips apart",
    )

  def picture(self, state: TrainState) -> Result:
    """Draws the first clips: original, visible tokens, reconstruction.

    Each process draws the clips that it holds; process 0 saves its picture.
    """
    batch, result = next(self._results(state, 1))
    video, visible, reconstructed = (
      sharding.local_rows(x)[: self._config.picture_clips]
      for x in (batch["video"], result["visible"], result["video"])
    )
    views = pictures.panels(
      video,
      visible,
      reconstructed,
      self._task.tubelets.grid,
      norm_pix=self._task.norm_pix,
    )
    fps = _FPS / self._config.data.stride
    return Result(
      picture=Picture(
        "reconstruction",
        pictures.picture(views),
        functools.partial(pictures.save_animation, views, fps=fps),
      )
    )
