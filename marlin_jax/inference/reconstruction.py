"""Hiding parts of a video and having a network fill them in.

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
from marlin_jax.pretraining.pretext_task import PretextTask, reconstruct_batch

if TYPE_CHECKING:
  from marlin_jax.models.mae import MAE


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Clips before and after.

  Attributes:
    clips: what was there; `clips.video` is uint8 (B, T, S, S, 3).
    visible: bool (B, N), what the encoder saw.
    reconstruction: float32 (B, T, S, S, 3) in [0, 1]: the original where
      visible, the prediction where not. A network that predicts normalised
      tokens (task.norm_pix) says nothing of their mean and deviation:
      those are then the true ones.
    loss_pixels: mean squared error of the hidden pixels in [0, 1].
    loss_own_colour: the same for flat patches, each in its own mean colour: the
      bar to clear.
    task: what was hidden, and in what form it was predicted.
  """

  clips: Clips
  visible: np.ndarray
  reconstruction: np.ndarray
  loss_pixels: float
  loss_own_colour: float
  task: PretextTask

  def views(self) -> pictures.Views:
    """Original, what the encoder saw, and reconstruction, to be shown."""
    return pictures.panels(
      self.clips.video,
      self.visible,
      self.reconstruction,
      self.task.tubelets.grid,
      norm_pix=self.task.norm_pix,
    )

  def save(self, path: str | os.PathLike) -> None:
    """Writes `views`; the suffix decides: a still (.png), or .gif or .mp4.

    Raises:
      ValueError: another suffix.
      OSError: it cannot be written.
    """
    pictures.save(
      self.views(),
      Path(path),
      frame_numbers=self.clips.frame_numbers,
      fps=self.clips.fps,
    )


def reconstruct(
  mae: MAE, clips: Clips, task: PretextTask, seed: int
) -> Reconstruction:
  """Hides tokens of each clip and fills them in, clip by clip.

  Args:
    mae: the network.
    clips: of its sizes; with regions where the masking needs them.
    task: what is masked and predicted.
    seed: of the masks. A clip's depends on its place in the batch and the
      number of clips, as in train_step.reconstruct.

  Raises:
    ValueError: regions are missing, or have another shape than the tokens.
  """
  graphdef, params = nnx.split(mae)
  num_clips = len(clips.video)
  keys = jax.random.split(jax.random.key(seed), num_clips)
  regions = _regions(clips, task)
  results = [
    jax.device_get(
      _fill_in(
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

  return Reconstruction(
    clips=clips,
    visible=joined("visible"),
    reconstruction=joined("video").clip(0, 1),
    loss_pixels=mean("loss_pixels"),
    loss_own_colour=mean("loss_own_colour"),
    task=task,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill_in(task, graphdef, params, batch):
  return reconstruct_batch(task, nnx.merge(graphdef, params), batch)


def _regions(clips: Clips, task: PretextTask) -> np.ndarray:
  expected = (len(clips.video), *task.tubelets.grid)
  if not task.masking.needs_regions:
    return np.zeros(expected, np.uint16)  # not looked at
  if clips.regions is None:
    raise ValueError(
      f"{task.masking.strategy} needs to know where the regions of the face "
      "are, and these clips come without: give `regions`, or the path of a "
      "video, or use another strategy, such as 'tube'"
    )
  if clips.regions.shape != expected:
    raise ValueError(
      f"regions of shape {clips.regions.shape}, expected {expected}, one value "
      "per token"
    )
  return clips.regions
