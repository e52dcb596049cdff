"""Starting a run from weights that are there already: `config.init_from`."""

from __future__ import annotations

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from marlin_jax.models import stacking
from marlin_jax.models.vit import NORM_EPS
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.weights import run_checkpoint
from marlin_jax.weights.weights import (
  Weights,
  WeightsError,
  eps_notice,
  unflatten,
)


def apply(
  weights: Weights, state: TrainState, config: ConfigDict
) -> tuple[TrainState, list[str]]:
  """Puts weights into a fresh state; what they lack stays as it was drawn.

  The position tables come along: the weights were trained with theirs. An input
  convention other than the configuration's is folded into the patch embedding.

  Args:
    weights: of any format, see formats.detect.
    state: before the first step.
    config: of the run.

  Returns:
    The state, and notices of what was adapted or is not there.

  Raises:
    WeightsError: the networks differ; lists each key of the configuration.
  """
  notices = eps_notice(weights.architecture, NORM_EPS, "a run")
  wanted = config.input.imagenet_norm
  if weights.architecture.imagenet_input != wanted:
    kinds = {False: "plain pixels", True: "ImageNet-normalised pixels"}
    notices.append(
      f"the encoder expected {kinds[not wanted]}; folded into its patch "
      f"embedding, it now takes {kinds[wanted]}"
    )
    weights = (
      weights.with_imagenet_input() if wanted else weights.with_plain_input()
    )
  architecture = weights.architecture
  _compare(weights, config)
  parts = {"params": state.params, "ema": state.ema, "fixed": state.fixed}
  if not architecture.has_decoder:
    notices.append("there is no decoder in it: ours starts at random")
  elif architecture.norm_pix != config.target.norm_pix:
    notices.append(
      "its decoder predicts "
      + ("normalised" if architecture.norm_pix else "plain")
      + " pixels and has to learn the other kind"
    )
  if not config.adv.weight:
    pass  # no one to judge
  elif architecture.disc_hidden == config.adv.hidden:
    parts["disc_params"] = state.disc_params
  else:
    notices.append(
      "the discriminator starts at random: there is "
      + (
        f"one of hidden size {architecture.disc_hidden}"
        if architecture.has_discriminator
        else "none"
      )
      + f" in it, ours has {config.adv.hidden}"
    )
  prefix = {"disc_params": "discriminator."}
  return state.replace(
    **{
      part: _filled(tree, weights.arrays, prefix.get(part, ""))
      for part, tree in parts.items()
    }
  ), notices


def _compare(weights: Weights, config: ConfigDict) -> None:
  architecture = weights.architecture
  differ = []
  for name, key in run_checkpoint.KEYS.items():
    section, _, leaf = key.partition(".")
    theirs, ours = getattr(architecture, name), config[section][leaf]
    network = section == "model" or name == "num_frames"
    absent = name.startswith("dec_") and not architecture.has_decoder
    if network and not absent and theirs != ours:
      differ.append(f"  config.{key}={ours}, in the weights {theirs}")
  if differ:
    raise WeightsError(
      f"init_from: {weights.source} is another network:\n" + "\n".join(differ)
    )


def _filled(tree, arrays: dict[str, np.ndarray], prefix: str):
  """The tree with every leaf replaced that has an array of its name."""
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
