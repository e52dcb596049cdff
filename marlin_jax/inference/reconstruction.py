"""Masks tokens of clips and reconstructs them.

Axes: B clips, T frames, S pixels of the square picture, N tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from marlin_jax.inference import pictures
from marlin_jax.inference.clips import Clips
from marlin_jax.models import vit
from marlin_jax.pretraining.pretext_task import PretextTask, reconstruct_batch

if TYPE_CHECKING:
  from marlin_jax.models.mae import MAE


@dataclasses.dataclass(frozen=True)
class ReconstructedClips:
  """Clips and their reconstruction.

  Attributes:
    clips: the originals; `clips.video` is uint8 (B, T, S, S, 3).
    visible: bool (B, N), tokens that the encoder saw.
    reconstruction: float32 (B, T, S, S, 3) in [0, 1]: the original where
      visible, else the prediction. A network trained with `task.norm_pix`
      predicts normalised tokens; their true mean and deviation are then used.
    loss_pixels: mean squared error of the masked pixels in [0, 1].
    loss_own_colour: the same error for a prediction of each patch's mean
      colour, as a baseline.
    task: masking and prediction target.
  """

  clips: Clips
  visible: np.ndarray
  reconstruction: np.ndarray
  loss_pixels: float
  loss_own_colour: float
  task: PretextTask

  def views(self) -> pictures.Views:
    """Returns the original, the visible tokens and the reconstruction."""
    return pictures.panels(
      self.clips.video,
      self.visible,
      self.reconstruction,
      self.task.tubelets.grid,
      norm_pix=self.task.norm_pix,
    )

  def save(self, path: str | os.PathLike) -> None:
    """Writes the views as a still (.png) or an animation (.gif, .mp4).

    Raises:
      ValueError: the suffix of `path` is none of these.
      OSError: the file cannot be written.
    """
    pictures.save(
      self.views(),
      Path(path),
      frame_numbers=self.clips.frame_numbers,
      fps=self.clips.fps,
    )


def reconstruct(
  mae: MAE, clips: Clips, task: PretextTask, seed: int
) -> ReconstructedClips:
  """Masks each clip and reconstructs it.

  Args:
    mae: the autoencoder.
    clips: clips of the size that `mae` takes, with regions if the masking needs
      them.
    task: masking and prediction target.
    seed: seed of the masks. The mask of a clip depends on its place in the
      batch and on the number of clips, as in `train_step.reconstruct`.

  Raises:
    ValueError: regions are missing, or their shape is not that of the tokens.
  """
  graphdef, params = nnx.split(mae)
  num_clips = len(clips.video)
  keys = jax.random.split(jax.random.key(seed), num_clips)
  regions = _regions(clips, task)
  results = [
    jax.device_get(
      _reconstruct(
        task,
        graphdef,
        params,
        {
          "video": clips.video[i : i + 1],
          "regions": regions[i : i + 1],
          "keys": keys[i : i + 1],
        },
      )
    )
    for i in range(num_clips)
  ]

  def joined(name):
    return np.concatenate([result[name] for result in results])

  def mean(name):
    return float(np.mean([result[name] for result in results]))

  return ReconstructedClips(
    clips=clips,
    visible=joined("visible"),
    reconstruction=joined("video").clip(0, 1),
    loss_pixels=mean("loss_pixels"),
    loss_own_colour=mean("loss_own_colour"),
    task=task,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reconstruct(task, graphdef, params, batch):
  mae = nnx.merge(graphdef, params)
  with vit.exact_matmuls(mae.dtype):
    return reconstruct_batch(task, mae, batch)


def _regions(clips: Clips, task: PretextTask) -> np.ndarray:
  expected = (len(clips.video), *task.tubelets.grid)
  if not task.masking.needs_regions:
    return np.zeros(expected, np.uint16)  # unused
  if clips.regions is None:
    raise ValueError(
      f"{task.masking.strategy} needs face regions, which these clips lack: "
      "pass `regions` or the path of a video, or use another strategy, such as "
      "'tube'"
    )
  if clips.regions.shape != expected:
    raise ValueError(
      f"regions of shape {clips.regions.shape}, expected {expected}, one value "
      "per token"
    )
  return clips.regions
