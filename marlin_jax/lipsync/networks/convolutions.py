"""The one layer of the lip-synchronisation networks, and rows of it.

Convolution, batch normalisation, activation. Batch normalisation takes its
statistics from the batch in training mode and running ones otherwise: nnx's
`network.train()` and `network.eval()`, or `nnx.view(network,
use_running_average=...)`, choose. A new network is in training mode. Under one
jit the batch is the whole batch, however many devices share it.

Axes: N pictures, spatial axes, C channels, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

# PyTorch's 0.1. It keeps the variance over n - 1 where nnx keeps it over n: of
# no account with thousands of values in a batch.
_MOMENTUM = 0.9

Sizes = int | tuple[int, ...]


class Convolution(nnx.Module):
  """Convolution, norm, activation; github.com/Rudrabha/Wav2Lip models/conv.py.

  Attributes:
    convolution: of any number of spatial axes.
    norm: None where there is none.
    residual: the input is added before the activation.
    activation: of single values.
  """

  def __init__(
    self,
    features_in: int,
    features_out: int,
    kernel: Sizes,
    strides: Sizes = 1,
    padding: Sizes = 0,
    *,
    rngs: nnx.Rngs,
    num_axes: int = 2,
    residual: bool = False,
    normed: bool = True,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    dtype: jnp.dtype = jnp.float32,
  ):
    kernel, strides, padding = (
      _each_axis(x, num_axes) for x in (kernel, strides, padding)
    )
    self.convolution = nnx.Conv(
      features_in,
      features_out,
      kernel,
      strides,
      padding=[(p, p) for p in padding],
      kernel_init=_drawn_as_pytorch("fan_in"),
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = batch_norm(features_out, rngs) if normed else None
    self.residual = residual
    self.activation = activation
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.convolution(x)
    if self.norm is not None:
      y = self.norm(y)
    if self.residual:
      y = y + x
    return self.activation(y).astype(self.dtype)


class TransposedConvolution(nnx.Module):
  """Transposed convolution of two axes, batch norm, ReLU; as PyTorch pads.

  A picture of n pixels becomes one of
  `(n - 1) * strides - 2 * padding + kernel + output_padding`.
  """

  def __init__(
    self,
    features_in: int,
    features_out: int,
    kernel: int,
    strides: int,
    padding: int,
    output_padding: int = 0,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
  ):
    before = kernel - 1 - padding
    self.convolution = nnx.ConvTranspose(
      features_in,
      features_out,
      (kernel, kernel),
      strides,
      padding=[(before, before + output_padding)] * 2,
      # What PyTorch takes for the fan-in of a transposed convolution.
      kernel_init=_drawn_as_pytorch("fan_out"),
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = batch_norm(features_out, rngs)
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.relu(self.norm(self.convolution(x))).astype(self.dtype)


def rows(
  features_in: int, table: Iterable[tuple], width: float, **how
) -> nnx.List:
  """Convolutions one after another, out of a table.

  Args:
    features_in: channels of the input.
    table: rows of channels, kernel, strides, padding and how many residual 3x3
      convolutions follow.
    width: what the table's channels are multiplied by.
    **how: of Convolution.
  """
  found = []
  for channels, kernel, strides, padding, num_residual in table:
    channels = scaled(channels, width)
    found.append(
      Convolution(features_in, channels, kernel, strides, padding, **how)
    )
    found += [
      Convolution(channels, channels, 3, 1, 1, residual=True, **how)
      for _ in range(num_residual)
    ]
    features_in = channels
  return nnx.List(found)


def run(layers: Iterable[nnx.Module], x: jax.Array) -> jax.Array:
  """Calls one layer after the other."""
  for layer in layers:
    x = layer(x)
  return x


def scaled(channels: int, width: float) -> int:
  """Channels of a network that is `width` times as wide, at least 1."""
  return max(round(channels * width), 1)


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
  # The two-pass variance: the fast one loses digits where the mean is large.
  return nnx.BatchNorm(
    features,
    momentum=_MOMENTUM,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )


def _each_axis(size: Sizes, num_axes: int) -> tuple[int, ...]:
  return (size,) * num_axes if isinstance(size, int) else size


def _drawn_as_pytorch(fan: str):
  return nnx.initializers.variance_scaling(1 / 3, fan, "uniform")
