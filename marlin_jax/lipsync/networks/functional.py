"""Networks as pure functions of their variables, batch normalisation included.

In training mode batch normalisation uses the mean and variance of the batch and
updates running averages of them; in evaluation mode it uses the running
averages. Under jit the batch is the global batch, so the statistics, and the
results, do not depend on the number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
from flax import nnx

Pytree = Any


@flax.struct.dataclass
class Variables:
  """Variables of a network, as nested dicts of arrays.

  Attributes:
    params: trained parameters.
    stats: running averages of batch normalisation.
    fixed: arrays that do not change: frozen parts, position tables.
  """

  params: Pytree
  stats: Pytree
  fixed: Pytree


@dataclasses.dataclass(frozen=True)
class Graph:
  """Structure of a network, without its variables.

  Attributes:
    training: graph in training mode.
    evaluation: graph in evaluation mode.
  """

  training: nnx.GraphDef
  evaluation: nnx.GraphDef

  def train_apply(
    self,
    params: Pytree,
    variables: Variables,
    fn: Callable[[nnx.Module], Any],
  ) -> tuple[Any, Pytree]:
    """Applies a function to the network in training mode.

    Args:
      params: replace `variables.params`, so that they can be differentiated.
      variables: give `stats` and `fixed`.
      fn: takes the network.

    Returns:
      The result of `fn`, and the updated `stats`.
    """
    network = nnx.merge(self.training, params, variables.stats, variables.fixed)
    result = fn(network)
    return result, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  def eval_network(self, variables: Variables) -> nnx.Module:
    """Returns the network in evaluation mode."""
    return nnx.merge(
      self.evaluation, variables.params, variables.stats, variables.fixed
    )


def split_network(
  network: nnx.Module, *, frozen: Sequence[str] = ()
) -> tuple[Graph, Variables]:
  """Splits a network into its structure and its variables.

  Args:
    network: any module; left in evaluation mode.
    frozen: attributes of `network` whose parameters are not trained.
  """

  def is_trained(path, value) -> bool:
    return isinstance(value, nnx.Param) and path[0] not in frozen

  network.train()
  training = nnx.graphdef(network)
  network.eval()
  evaluation = nnx.graphdef(network)
  states = nnx.split_state(nnx.state(network), is_trained, nnx.BatchStat, ...)
  return Graph(training, evaluation), Variables(*map(nnx.to_pure_dict, states))
