"""Starts a run from existing weights: `config.init_from`."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from marlin_jax.devices import distributed
from marlin_jax.models import stacking, vit
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.weights import formats
from marlin_jax.weights.architecture import (
  CONFIG_KEYS,
  DISCRIMINATOR,
  POSITIONS,
  Architecture,
  unflatten,
)
from marlin_jax.weights.weights import Weights, WeightsError, eps_notice


def read(source: str) -> Weights:
  """Reads the weights that a run starts from; for all processes together.

  Args:
    source: a path, or a name, see `formats.resolve`. Of a model that the
      authors published, the file with the decoder is taken.

  Raises:
    WeightsError: there are no such weights, or they cannot be read.
  """
  # Process 0 downloads them.
  with distributed.process_0_first():
    path = formats.resolve(source, full=True)
  return formats.read(path)


def apply(
  weights: Weights,
  state: TrainState,
  ours: Architecture,
  *,
  uses_discriminator: bool,
) -> tuple[TrainState, list[str]]:
  """Replaces the arrays of a new state that the weights hold.

  Position tables are replaced too, since the weights were trained with theirs;
  for clips or frames of another size they are adapted, see `vit.positions_at`.
  If the weights expect another input convention than the run, it is folded into
  the patch embedding.

  Args:
    weights: initial weights, see weights.formats.
    state: the state before the first step.
    ours: architecture of the run.
    uses_discriminator: the run trains with the adversarial loss.

  Returns:
    The state, and one sentence for each adapted or missing part.

  Raises:
    WeightsError: the sizes of the networks differ; lists the config keys.
  """
  notices = eps_notice(weights.architecture, vit.NORM_EPS, "a run")
  weights, input_notices = _with_input_of(weights, ours)
  notices += input_notices
  _check_sizes(weights, ours)
  weights, size_notices = _at_clip_size(weights, ours)
  notices += size_notices
  theirs = weights.architecture

  # Field of TrainState -> prefix of its arrays' names in the weights.
  prefixes = {"params": "", "ema": "", "fixed": ""}
  if not theirs.has_decoder:
    notices.append("the weights hold no decoder: it starts from random values")
  elif _target(theirs) != _target(ours):
    notices.append(
      f"the decoder of the weights predicts {_target(theirs)} and has to learn "
      f"{_target(ours)}"
    )
  if uses_discriminator:
    if theirs.disc_hidden == ours.disc_hidden:
      prefixes["disc_params"] = DISCRIMINATOR
    else:
      held = (
        f"a discriminator of hidden size {theirs.disc_hidden}"
        if theirs.has_discriminator
        else "no discriminator"
      )
      notices.append(
        "the discriminator starts from random values: the weights hold "
        f"{held}, the run's has {ours.disc_hidden}"
      )
  return state.replace(
    **{
      field: _filled(getattr(state, field), weights.arrays, prefix)
      for field, prefix in prefixes.items()
    }
  ), notices


def _target(architecture: Architecture) -> str:
  """Describes what a decoder predicts."""
  kind = "normalised" if architecture.norm_pix else "plain"
  frames = "differences between frames of" if architecture.motion_weight else ""
  return f"{frames} {kind} pixels".strip()


def _with_input_of(
  weights: Weights, ours: Architecture
) -> tuple[Weights, list[str]]:
  """Folds the weights' input convention into the patch embedding if needed."""
  if weights.architecture.imagenet_input == ours.imagenet_input:
    return weights, []
  before, after = "plain pixels", "ImageNet-normalised pixels"
  if ours.imagenet_input:
    adapted = weights.with_imagenet_input()
  else:
    adapted = weights.with_plain_input()
    before, after = after, before
  return adapted, [
    f"the encoder of the weights expects {before}; the normalisation is folded "
    f"into its patch embedding, which now takes {after}"
  ]


def _at_clip_size(
  weights: Weights, ours: Architecture
) -> tuple[Weights, list[str]]:
  """Adapts the position tables if clips or frames have another size."""
  theirs = weights.architecture
  adapted = dataclasses.replace(
    theirs, num_frames=ours.num_frames, image_size=ours.image_size
  )
  notices = []
  if theirs.num_frames != ours.num_frames:
    kept = "continued" if ours.num_frames > theirs.num_frames else "cut off"
    notices.append(
      f"the weights were trained on clips of {theirs.num_frames} frames: their "
      f"positions in time are {kept} for {ours.num_frames}"
    )
  if theirs.image_size != ours.image_size:
    notices.append(
      f"the weights were trained on frames of {theirs.image_size} pixels: "
      f"their positions are interpolated from {_patches(theirs)} to "
      f"{_patches(ours)} patches"
    )
  if not notices:
    return weights, []
  grids = theirs.tubelets.grid, adapted.tubelets.grid
  tables = {
    name: np.asarray(vit.positions_at(weights.arrays[name], *grids))
    for name in POSITIONS
    if name in weights.arrays
  }
  return Weights(adapted, weights.arrays | tables, weights.source), notices


def _patches(architecture: Architecture) -> str:
  return "{1} x {2}".format(*architecture.tubelets.grid)


def _check_sizes(weights: Weights, ours: Architecture) -> None:
  """Raises WeightsError where sizes of the networks differ."""
  theirs = weights.architecture
  differences = [
    f"  config.{key}={getattr(ours, name)}, in the weights "
    f"{getattr(theirs, name)}"
    for name, key in CONFIG_KEYS.items()
    if key.startswith("model.")
    and (theirs.has_decoder or not name.startswith("dec_"))
    and getattr(theirs, name) != getattr(ours, name)
  ]
  if differences:
    raise WeightsError(
      f"init_from: {weights.source} has other sizes than the configuration; "
      "set these keys to the sizes of the weights:\n" + "\n".join(differences)
    )


def _filled(tree, arrays: dict[str, np.ndarray], prefix: str):
  """Returns the tree with every leaf replaced for which there is an array."""
  given = unflatten(
    {
      name.removeprefix(prefix): array
      for name, array in arrays.items()
      if name.startswith(prefix)
    }
  )
  given = flatten_dict(stacking.in_form_of(tree, given))
  return unflatten_dict(
    {
      path: jax.device_put(given[path], leaf.sharding)
      if path in given
      else leaf
      for path, leaf in flatten_dict(tree).items()
    }
  )
