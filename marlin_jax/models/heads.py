"""Heads that turn an encoder's features into predictions.

Axes: B clips, N tokens, P pixels per token, D width, H heads, K predictions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit


class Classifier(nnx.Module):
  """Encoder with a head; maps tokens (B, N, P) to logits float32 (B, K).

  `keep`, float32 (depth, 2, B), scales the branches of the blocks in stochastic
  depth; see `vit.drop_path`.
  """

  def __init__(self, encoder: nnx.Module, head: nnx.Module):
    self.encoder = encoder
    self.head = head

  def __call__(self, tokens: jax.Array, keep: jax.Array | None = None):
    hidden = self.encoder.tokens(tokens, keep=keep).astype(jnp.float32)
    if not self.head.takes_tokens:
      hidden = hidden.mean(axis=1)
    return self.head(self.encoder.norm(hidden))


class LinearHead(nnx.Module):
  """Linear layer on the pooled feature: (B, D) -> (B, K)."""

  takes_tokens = False

  def __init__(self, width: int, num_outputs: int, rngs: nnx.Rngs):
    self.linear = _linear(width, num_outputs, rngs)

  def __call__(self, pooled: jax.Array) -> jax.Array:
    return self.linear(pooled)


class AttentiveHead(nnx.Module):
  """Cross-attention of one learned query to all tokens, then a linear layer.

  (B, N, D) -> (B, K). The attentive probe of CAE (Chen et al., IJCV 2024) and
  V-JEPA (Bardes et al., TMLR 2024) without its second block, an MLP.
  """

  takes_tokens = True

  def __init__(
    self, width: int, num_outputs: int, rngs: nnx.Rngs, *, num_heads: int
  ):
    self.query = vit.learned_token(width, rngs)
    self.key = vit.dense(width, width, rngs, jnp.float32, use_bias=False)
    self.value = vit.dense(width, width, rngs, jnp.float32)
    self.out = vit.dense(width, width, rngs, jnp.float32)
    self.norm = vit.layer_norm(width, rngs)
    self.linear = _linear(width, num_outputs, rngs)
    self.num_heads = num_heads

  def __call__(self, tokens: jax.Array) -> jax.Array:
    b, n, width = tokens.shape
    split = (b, n, self.num_heads, -1)
    keys = self.key(tokens).reshape(split)
    values = self.value(tokens).reshape(split)
    query = self.query[...].reshape(self.num_heads, -1)
    scale = (width / self.num_heads) ** -0.5
    weights = jax.nn.softmax(
      jnp.einsum("hk,bnhk->bhn", query, keys) * scale, axis=-1
    )
    y = jnp.einsum("bhn,bnhk->bhk", weights, values).reshape(b, width)
    return self.linear(self.norm(self.query[...] + self.out(y)))


def _linear(width: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
  """Returns a linear layer with PyTorch's initialisation, as in the paper."""
  bound = width**-0.5
  return nnx.Linear(
    width,
    num_outputs,
    kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    bias_init=lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
      key, shape, dtype, -bound, bound
    ),
    rngs=rngs,
  )
