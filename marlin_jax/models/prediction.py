"""Predicted pixels as a linear map of the decoder's features.

The discriminator's first layer is linear too, so on predictions it and the
decoder's head are one linear layer, whose kernel is the product of both. A
token has more pixels than the decoder has features, so the fused layer is
cheaper on many tokens, and so are its gradients, which autodiff takes through
the product of the kernels.

Axes: B clips, M masked tokens, D decoder width, P pixels per token, F features.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import linear, partition


class Prediction(NamedTuple):
  """Decoder features and the head that maps them to pixels; a pytree.

  All arrays have the head's dtype, except that `kernel` and `bias` are float32
  with partition.float32_sums. A gradient in a Prediction is a Prediction.

  Attributes:
    features: (B, M, D), the head's input.
    kernel: (D, P), of the head.
    bias: (P,), of the head.
  """

  features: jax.Array
  kernel: jax.Array
  bias: jax.Array

  @classmethod
  def from_head(cls, head: nnx.Linear, features: jax.Array) -> Prediction:
    """Returns head(features) without computing it.

    Args:
      head: linear layer from D to P.
      features: (B, M, D).
    """
    kernel, bias = head.kernel[...], head.bias[...]
    if not partition.float32_sums():
      kernel, bias = kernel.astype(head.dtype), bias.astype(head.dtype)
    return cls(features.astype(head.dtype), kernel, bias)

  @property
  def pixels(self) -> jax.Array:
    """(B, M, P), computed on access."""
    return _linear(self.features, self.kernel, self.bias)

  def through(self, layer: nnx.Linear) -> jax.Array:
    """Returns layer(pixels) without computing the pixels.

    Args:
      layer: linear layer from P to F.

    Returns:
      (B, M, F) in the layer's dtype.
    """
    features, head_kernel, head_bias, kernel, bias = (
      x.astype(layer.dtype) for x in (*self, layer.kernel[...], layer.bias[...])
    )
    fused = jnp.matmul
    if partition.float32_sums():
      # Gradients of the fused layer are sums over clips. In a lower precision
      # the compiler would round them before it sums them over devices.
      fused = functools.partial(
        fused, preferred_element_type=jnp.float32, precision="highest"
      )
    return _linear(
      features, fused(head_kernel, kernel), fused(head_bias, kernel) + bias
    )


def _linear(x, kernel, bias):
  # One plain matrix product, see vit.Dense.
  y = linear.linear(x.reshape(-1, x.shape[-1]), kernel, bias)
  return y.reshape(*x.shape[:-1], -1)
