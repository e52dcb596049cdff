"""A linear layer's output that is not worked out before it must be.

Two linear layers in a row are one whose kernel is the product of both. Where
what lies between them is wider than what goes in, as a token's pixels are wider
than the decoder's features, that one is cheaper on many tokens, and so are its
gradients, which autodiff takes through the product of the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx


class Affine(NamedTuple):
  """x @ kernel + bias, all in one dtype.

  Attributes:
    x: (..., D).
    kernel: (D, F).
    bias: (F,).
  """

  x: jax.Array
  kernel: jax.Array
  bias: jax.Array

  @classmethod
  def of(cls, layer: nnx.Linear, x: jax.Array) -> Affine:
    """What the layer gives for x, in the layer's dtype."""
    arrays = (x, layer.kernel[...], layer.bias[...])
    return cls(*(array.astype(layer.dtype) for array in arrays))

  def then(self, layer: nnx.Linear) -> Affine:
    """What the layer makes of it: (..., G)."""
    _, kernel, bias = self.of(layer, self.x)
    return Affine(self.x, self.kernel @ kernel, self.bias @ kernel + bias)

  @property
  def value(self) -> jax.Array:
    """(..., F)."""
    # As one plain matrix product, see vit.Dense.
    y = self.x.reshape(-1, self.x.shape[-1]) @ self.kernel + self.bias
    return y.reshape(*self.x.shape[:-1], -1)
