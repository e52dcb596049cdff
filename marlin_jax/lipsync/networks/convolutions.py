"""Convolution blocks of the lip-sync networks.

A block is convolution, batch normalisation, activation. `network.train()` and
`network.eval()`, or `nnx.view(network, use_running_average=...)`, select the
batch's statistics or the running averages; a new network is in training mode.
Under jit the batch is the global batch, on any number of devices.

Axes: N images, spatial axes, C channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

# PyTorch's momentum of 0.1. PyTorch's running variance divides by n - 1, nnx's
# by n; the difference is negligible with thousands of values per batch.
_MOMENTUM = 0.9

Sizes = int | tuple[int, ...]


class Convolution(nnx.Module):
  """Convolution, batch norm, activation.

  As github.com/Rudrabha/Wav2Lip, models/conv.py.

  Attributes:
    convolution: over any number of spatial axes.
    norm: batch norm, or None.
    residual: True if the input is added before the activation.
    activation: applied elementwise.
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
      _per_axis(size, num_axes) for size in (kernel, strides, padding)
    )
    self.convolution = nnx.Conv(
      features_in,
      features_out,
      kernel,
      strides,
      padding=[(p, p) for p in padding],
      kernel_init=_pytorch_init("fan_in"),
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
  """Transposed 2D convolution, batch norm, ReLU, with PyTorch's padding.

  The output has `(n - 1) * strides - 2 * padding + kernel + output_padding`
  pixels per axis for an input of n.
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
      # PyTorch computes the fan-in of a transposed convolution this way.
      kernel_init=_pytorch_init("fan_out"),
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = batch_norm(features_out, rngs)
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.relu(self.norm(self.convolution(x))).astype(self.dtype)


def conv_stack(
  features_in: int, table: Iterable[tuple], width: float, **conv_args
) -> nnx.List:
  """Returns a stack of convolutions described by a table.

  Args:
    features_in: channels of the input.
    table: rows of channels, kernel, strides, padding and the number of residual
      3x3 convolutions that follow.
    width: multiplies the table's channels.
    **conv_args: keyword arguments of Convolution.
  """
  layers = []
  for channels, kernel, strides, padding, num_residual in table:
    channels = scaled_channels(channels, width)
    layers.append(
      Convolution(features_in, channels, kernel, strides, padding, **conv_args)
    )
    layers += [
      Convolution(channels, channels, 3, 1, 1, residual=True, **conv_args)
      for _ in range(num_residual)
    ]
    features_in = channels
  return nnx.List(layers)


def apply_layers(layers: Iterable[nnx.Module], x: jax.Array) -> jax.Array:
  """Applies layers one after another."""
  for layer in layers:
    x = layer(x)
  return x


def scaled_channels(channels: int, width: float) -> int:
  """Returns the channels of a network `width` times as wide, at least 1."""
  return max(round(channels * width), 1)


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """Returns a batch norm that computes in float32."""
  # The two-pass variance: the fast one loses digits where the mean is large.
  return nnx.BatchNorm(
    features,
    momentum=_MOMENTUM,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )


def _per_axis(size: Sizes, num_axes: int) -> tuple[int, ...]:
  return (size,) * num_axes if isinstance(size, int) else size


def _pytorch_init(fan: str):
  """Returns PyTorch's default initializer of kernels."""
  return nnx.initializers.variance_scaling(1 / 3, fan, "uniform")
