"""Sharding hooks that the networks call on their values.

A network marks a value as tokens or weights; the Placement in use decides how
it is sharded over the mesh, see devices/sharding.py. Without a Placement, as on
one device, the hooks return their argument.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

Pytree = Any


class Placement(Protocol):
  """How a mesh shards the values inside a network.

  Attributes:
    num_tensor: devices that share one block's heads and hidden units.
    float32_sums: gradients of weights are computed, and summed over devices, in
      float32 and not in the dtype of the matmuls.
  """

  num_tensor: int
  float32_sums: bool

  def tokens(self, x: jax.Array) -> jax.Array:
    """Shards tokens (B, N, D)."""

  def weights(self, params: Pytree) -> Pytree:
    """Gathers and casts parameters, nested dicts by name, for use."""

  def own_heads(self, attend: Callable[..., jax.Array]):
    """Wraps a function to run on each device's own clips and heads."""


_in_use: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
  "placement", default=None
)


@contextlib.contextmanager
def use(placement: Placement | None) -> Iterator[None]:
  """Sets the Placement of networks that are called inside; None: one device."""
  token = _in_use.set(placement)
  try:
    yield
  finally:
    _in_use.reset(token)


def tokens(x: jax.Array) -> jax.Array:
  """Shards tokens (B, N, D)."""
  placement = _in_use.get()
  return x if placement is None else placement.tokens(x)


def weights(params: Pytree) -> Pytree:
  """Gathers and casts the parameters of one block."""
  placement = _in_use.get()
  return params if placement is None else placement.weights(params)


def own_heads(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns a function that runs on each device's own clips and heads.

  For functions that the compiler cannot partition itself.

  Args:
    attend: arrays (B, N, H, K) -> (B, N, H, K).
  """
  placement = _in_use.get()
  return attend if placement is None else placement.own_heads(attend)


def num_tensor() -> int:
  """Devices that share one block's heads and hidden units."""
  placement = _in_use.get()
  return 1 if placement is None else placement.num_tensor


def float32_sums() -> bool:
  """Returns True if gradients of weights are summed in float32."""
  placement = _in_use.get()
  return placement is not None and placement.float32_sums
