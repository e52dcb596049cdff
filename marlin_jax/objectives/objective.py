"""An extra objective of pretraining: its networks, its loss, its cost.

The autoencoder runs once per update; MARLIN's loss and every extra objective
read that pass. The loss of a step is the sum of MARLIN's and, for each extra
objective, its weight times its loss.

Axes: B clips, V visible tokens, M masked tokens, D encoder width.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.models import partition, vit
from marlin_jax.models.prediction import Prediction
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights.architecture import OBJECTIVES, Architecture

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Run:
  """The run that an objective is part of.

  Attributes:
    config: its configuration.
    architecture: sizes of its networks.
    execution: how its networks are computed.
    num_visible: V, tokens of a clip that the encoder sees.
    num_masked: M, tokens of a clip that are predicted.
    batch_size: clips per step over all devices.
  """

  config: ConfigDict
  architecture: Architecture
  execution: vit.Execution
  num_visible: int
  num_masked: int
  batch_size: int


class Forward(NamedTuple):
  """Output of the autoencoder's pass over a batch; a pytree.

  Attributes:
    prediction: decoder features of the masked tokens, and the pixels that they
      predict.
    encoded: float32 (B, V, D), the visible tokens after the encoder's final
      norm; None if there is no extra objective to read them.
  """

  prediction: Prediction
  encoded: jax.Array | None


class Objective(abc.ABC):
  """An extra objective; a subclass is a module of this package.

  Attributes:
    name: section of the configuration, and name of the metrics.
    run: the run that it is part of.
    weight: factor of its loss, `config.NAME.weight`.
    fields: extra keys of a batch, with shape and dtype of one clip.
    num_together: clips that follow each other in a batch and are never split
      over two microbatches.
    least_clips: clips that a microbatch must have, to be compared.
    num_heads: attention heads of each transformer in `networks` and in
      `frozen`, by the name of its attribute.
    frozen: NumPy arrays that it reads and does not train, nested dicts by path.
      They are not part of the state, and so of no checkpoint; and the same in
      all stages of a curriculum, whatever the sizes of clips.
    reads_average: it reads the average of the autoencoder's weights in place of
      `frozen`.
    identity: values beside the configuration that a resumed run must share.
    clip_bytes: estimate of the activations that one clip keeps for the backward
      pass.
  """

  name: ClassVar[str]
  fields: Mapping[str, jax.ShapeDtypeStruct] = {}
  num_together: int = 1
  least_clips: int = 1
  num_heads: Mapping[str, int] = {}
  frozen: Pytree = {}
  reads_average: bool = False
  identity: Mapping[str, str] = {}
  clip_bytes: int = 0

  def __init__(self, run: Run):
    """Reads the section of the configuration.

    Raises:
      UserError: the run cannot have this objective.
    """
    self.run = run
    self.settings: ConfigDict = run.config[self.name]
    self.weight: float = self.settings.weight

  def check_data(
    self, datasets: Sequence[Dataset], clips_per_epoch: int
  ) -> None:
    """Checks that the objective can be trained on the data.

    Args:
      datasets: the data sets.
      clips_per_epoch: number of their videos, or of their people with
        `data.sample_by="subject"`.

    Raises:
      UserError: it cannot.
    """
    del datasets, clips_per_epoch

  def at_stage(self, run: Run) -> Objective:
    """Returns the objective at a stage of a curriculum, which has other clips.

    Args:
      run: the run, with the sizes of the stage.
    """
    return type(self)(run)

  def networks(self, rngs: nnx.Rngs) -> nnx.Module:
    """Draws the networks that are trained for this objective alone.

    Layers whose names the table devices.sharding.RULES knows, such as `head`,
    `hidden` and those of transformer blocks, are sharded over the mesh. Their
    parameters must not depend on the sizes of clips, which a curriculum
    changes.
    """
    del rngs
    return nnx.Dict()

  def of_whole_batch(self, batch: dict) -> dict[str, jax.Array]:
    """Returns more keys of a batch, (B, ...), of which a microbatch has a part.

    For losses that depend on all clips of a batch.

    Args:
      batch: a whole batch, see `loss`, without `visible` and `masked`.
    """
    del batch
    return {}

  @abc.abstractmethod
  def loss(
    self, own: nnx.Module, frozen: Pytree, forward: Forward, batch: dict
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of a batch or microbatch, and metrics.

    Args:
      own: the networks, with their present parameters.
      frozen: the arrays of `frozen`; with `reads_average` {"params": ...,
        "fixed": ...} of the averaged autoencoder.
      forward: the autoencoder's pass.
      batch: `video` uint8 (B, T, H, W, 3); `regions` uint16 (B, T / pt, h, w);
        `fields` and `of_whole_batch`; `visible` int (B, V) and `masked` int
        (B, M), token numbers; `keys`, B jax keys for this objective alone.

    Returns:
      float32 scalar, not weighted; and float32 scalars by name, which the
      metrics of a step hold as NAME/KEY. With microbatches the mean of each is
      taken over them.
    """

  @property
  @abc.abstractmethod
  def flops(self) -> float:
    """FLOPs per clip and update that the objective adds, backward included."""

  @abc.abstractmethod
  def describe(self) -> str:
    """Returns a line for the head of a run."""

  @functools.cached_property
  def structure(self) -> nnx.GraphDef:
    """Structure of the networks."""
    return vit.split_model(nnx.eval_shape(self._networks_of_seed_0))[0]

  def _networks_of_seed_0(self) -> nnx.Module:
    return self.networks(nnx.Rngs(0))


# --- The objectives of a run --------------------------------------------------


def draw(
  objectives: Sequence[Objective], key: jax.Array
) -> tuple[Pytree, Pytree]:
  """Draws the networks of all objectives.

  Args:
    objectives: the objectives.
    key: the run's key; each objective has one of its own, by its name.

  Returns:
    Trained parameters and fixed values, to be joined with the autoencoder's:
    {OBJECTIVES: {NAME: ...}}, and {} if no objective has any.
  """
  params, fixed = {}, {}
  for objective in objectives:
    rngs = nnx.Rngs(jax.random.fold_in(key, _number(objective)))
    _, params[objective.name], fixed[objective.name] = vit.split_model(
      objective.networks(rngs)
    )
  return tuple(
    {OBJECTIVES: filled}
    if (filled := {k: x for k, x in tree.items() if x})
    else {}
    for tree in (params, fixed)
  )


def without_own(tree: Pytree) -> Pytree:
  """Returns the autoencoder's part of a state's params, ema or fixed."""
  return {name: x for name, x in tree.items() if name != OBJECTIVES}


def all_heads(objectives: Sequence[Objective]) -> dict[str, int]:
  """Returns attention heads by NAME/PART, see devices.sharding.lay_out."""
  return {
    f"{objective.name}/{part}": number
    for objective in objectives
    for part, number in objective.num_heads.items()
  }


def num_together(objectives: Sequence[Objective]) -> int:
  """Returns how many clips in a row a microbatch holds together."""
  return math.lcm(*(x.num_together for x in objectives))


def value_and_grads(
  objectives: Sequence[Objective],
  state: Any,
  frozen: Mapping[str, Pytree],
  forward: Forward,
  batch: dict,
) -> tuple[jax.Array, dict[str, jax.Array], tuple[Forward, Pytree]]:
  """Returns the weighted sum of the objectives' losses, and its gradients.

  Args:
    objectives: the objectives, at least one.
    state: a pretraining.train_step.TrainState.
    frozen: the objectives' `frozen`, by their names.
    forward, batch: see Objective.loss, whose `keys` are made from these.

  Returns:
    The sum; metrics; and its gradients for `forward` and for the objectives'
    own part of `state.params`, {OBJECTIVES: ...} or {}.

  Raises:
    ConfigError: there are too few clips for an objective.
  """
  num_clips = len(batch["video"])
  for x in objectives:
    if num_clips < x.least_clips:
      raise ConfigError(
        f"{x.name}.weight={x.weight}: clips per microbatch: {num_clips}, "
        f"expected at least {x.least_clips}, which are compared; raise "
        "config.batch_size, or config.clips_per_device if they fit"
      )
  average = {
    "params": without_own(state.ema),
    "fixed": without_own(state.fixed),
  }
  fixed = state.fixed.get(OBJECTIVES, {})

  def weighted_sum(forward, own):
    total, metrics = jnp.float32(0), {}
    for x in objectives:
      params = partition.weights(own.get(OBJECTIVES, {}).get(x.name, {}))
      loss, found = x.loss(
        nnx.merge(x.structure, params, fixed.get(x.name, {})),
        average if x.reads_average else frozen.get(x.name, {}),
        forward,
        batch | {"keys": _fold_in(batch["keys"], _number(x))},
      )
      total += x.weight * loss
      metrics[f"loss_{x.name}"] = loss
      metrics |= {f"{x.name}/{key}": value for key, value in found.items()}
    return total, metrics

  own = {key: tree for key, tree in state.params.items() if key == OBJECTIVES}
  (total, metrics), grads = jax.value_and_grad(
    weighted_sum, argnums=(0, 1), has_aux=True
  )(forward, own)
  return total, metrics, grads


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _number(objective: Objective) -> int:
  """Returns a number for `fold_in` that no other objective shifts."""
  return zlib.crc32(objective.name.encode())
