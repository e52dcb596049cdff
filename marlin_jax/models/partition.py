"""Where the values of a network live while it runs.

The networks say what a value is, tokens or weights; a Placement (see
sharding.py) says where on the mesh it lives. Where none is in use, as on one
device and in every test of a network alone, all of this does nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

Pytree = Any


class Placement(Protocol):
  """What a mesh wants of the values that flow through a network.

  Attributes:
    num_tensor: devices that share one block's heads and hidden units.
  """

  num_tensor: int

  def tokens(self, x: jax.Array) -> jax.Array:
    """Places (B, N, D)."""

  def weights(self, params: Pytree) -> Pytree:
    """Readies parameters, nested dicts by name, for use."""

  def own_heads(self, attend: Callable[..., jax.Array]):
    """Has each device run a function on its own clips and heads."""


_in_use: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
  "placement", default=None
)


@contextlib.contextmanager
def use(placement: Placement | None) -> Iterator[None]:
  """Networks called inside run on this placement; None: on none."""
  token = _in_use.set(placement)
  try:
    yield
  finally:
    _in_use.reset(token)


def tokens(x: jax.Array) -> jax.Array:
  """Places (B, N, D) as the placement in use wants it."""
  placement = _in_use.get()
  return x if placement is None else placement.tokens(x)


def weights(params: Pytree) -> Pytree:
  """Readies one block's parameters as the placement in use wants it."""
  placement = _in_use.get()
  return params if placement is None else placement.weights(params)


def own_heads(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Has each device run a function on the clips and heads it has.

  For what the compiler cannot cut up itself.

  Args:
    attend: of arrays (B, N, H, K) each, and so its result.
  """
  placement = _in_use.get()
  return attend if placement is None else placement.own_heads(attend)


def num_tensor() -> int:
  """Devices that share one block's heads and hidden units."""
  placement = _in_use.get()
  return 1 if placement is None else placement.num_tensor
