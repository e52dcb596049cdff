"""Networks as pure functions of their arrays, batch normalisation included.

Batch normalisation takes mean and variance of the batch while a network learns,
and keeps a running average of them, which it takes afterwards. Under jit the
batch is the global one, however it is spread over devices: the statistics, and
with them the result, do not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
from flax import nnx

Pytree = Any


@flax.struct.dataclass
class Arrays:
  """What a network is made of beside its structure; nested dicts by path.

  Attributes:
    params: what learns.
    stats: running averages of batch normalisation.
    fixed: what stays as it is: frozen parts, position tables.
  """

  params: Pytree
  stats: Pytree
  fixed: Pytree


@dataclasses.dataclass(frozen=True)
class Structure:
  """A network without its arrays.

  Attributes:
    learning: with batch normalisation by the batch.
    evaluating: with batch normalisation by the running averages.
  """

  learning: nnx.GraphDef
  evaluating: nnx.GraphDef

  def learn(
    self, params: Pytree, arrays: Arrays, use: Callable[[nnx.Module], Any]
  ) -> tuple[Any, Pytree]:
    """Uses the network as it does while it learns.

    Args:
      params: in the place of the arrays' own, to be differentiated.
      arrays: the rest.
      use: gets the network.

    Returns:
      What `use` returns, and the new `stats`.
    """
    network = nnx.merge(self.learning, params, arrays.stats, arrays.fixed)
    result = use(network)
    return result, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  def evaluate(self, arrays: Arrays) -> nnx.Module:
    """The network as it is after learning."""
    return nnx.merge(self.evaluating, arrays.params, arrays.stats, arrays.fixed)


def split(
  network: nnx.Module, *, frozen: Sequence[str] = ()
) -> tuple[Structure, Arrays]:
  """Takes a network apart; it is left in evaluation mode.

  Args:
    network: any.
    frozen: attributes of it that shall not learn.
  """

  def learns(path, value) -> bool:
    return isinstance(value, nnx.Param) and path[0] not in frozen

  network.train()
  learning = nnx.graphdef(network)
  network.eval()
  evaluating = nnx.graphdef(network)
  state = nnx.state(network)
  params, stats, fixed = nnx.split_state(state, learns, nnx.BatchStat, ...)
  arrays = Arrays(*(nnx.to_pure_dict(part) for part in (params, stats, fixed)))
  return Structure(learning, evaluating), arrays
