"""Vision transformer: a stack of pre-norm blocks on tokens.

No class token, joint space-time attention, exact GELU, and no bias on the key
projection (VideoMAE's and MARLIN's network). Parameters are float32; matmuls
run in `dtype`; normalisation and softmax in float32.

Axes: B batch, N tokens, D width, H heads, K = D / H.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.models import partition

# MARLIN's. VideoMAE has 1e-6, and HuggingFace's copy of it 1e-12.
NORM_EPS = 1e-5

# What the backward pass keeps of a block; everything else it computes again.
REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Fixed(nnx.Variable):
  """A saved value that training does not change: the position tables.

  An imported checkpoint brings its own table, which differs from the exact one
  by up to 1e-4, so the table belongs to the checkpoint.
  """


def sincos_positions(num_tokens: int, width: int) -> np.ndarray:
  """Sine-cosine position table (Vaswani et al. 2017), from float64.

  Returns:
    float32 (N, D); sine on even channels, cosine on odd ones.
  """
  rate = 10000.0 ** (-2 * (np.arange(width) // 2) / width)
  angle = np.arange(num_tokens)[:, None] * rate
  table = np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle))
  return table.astype(np.float32)


def layer_norm(
  width: int, rngs: nnx.Rngs, eps: float = NORM_EPS
) -> nnx.LayerNorm:
  # The two-pass variance: the fast one loses digits where the mean is large.
  return nnx.LayerNorm(
    width,
    epsilon=eps,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )


class Dense(nnx.Linear):
  """nnx.Linear on the last axis, as one plain matrix product.

  With batch and tokens as two axes XLA's CPU backend takes twice as long for
  the gradient of the weights; elsewhere the two are the same program.
  """

  def __call__(self, x):
    y = super().__call__(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], -1)


def dense(
  features_in: int,
  features_out: int,
  rngs: nnx.Rngs,
  dtype: jnp.dtype,
  *,
  use_bias: bool = True,
  fan_out: int | None = None,
) -> Dense:
  """A linear layer with Xavier-uniform weights and a zero bias.

  `fan_out` stands in where the reference draws several projections as one
  matrix, whose larger fan gives a smaller range.
  """
  fan = (features_in + (fan_out or features_out)) / 2
  init = nnx.initializers.variance_scaling(
    features_in / fan, "fan_in", "uniform"
  )
  return Dense(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=init,
    dtype=dtype,
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Multi-head self-attention; (B, N, D) -> (B, N, D)."""

  def __init__(self, width, num_heads, dtype, implementation, rngs):
    self.num_heads = num_heads
    self.implementation = implementation
    project = functools.partial(
      dense, width, width, rngs, dtype, fan_out=3 * width
    )
    self.query = project()
    self.key = project(use_bias=False)
    self.value = project()
    self.out = dense(width, width, rngs, dtype)

  def project(self, x):
    """Query, key and value, (B, N, H, K) each."""
    heads = (*x.shape[:2], self.num_heads, -1)
    layers = (self.query, self.key, self.value)
    # Joined where devices share the heads: there the gradient of x is summed
    # over devices, once for all three instead of once for each.
    project = joined if partition.num_tensor() > 1 else apart
    return [y.reshape(heads) for y in project(layers, x)]

  def weights(self, x):
    """How much each token looks at each: float32 (B, H, N, N), rows sum to 1.

    Whatever the implementation: 'cudnn' never holds them, and its own differ by
    rounding.
    """
    q, k, _ = self.project(x)
    return attention_weights(q, k)

  def __call__(self, x):
    q, k, v = self.project(x)
    if self.implementation == "cudnn":
      y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
      y = plain_attention(q, k, v)
    return self.out(y.reshape(x.shape))


def apart(layers: Sequence[Dense], x: jax.Array) -> list[jax.Array]:
  """Several layers of the same size on one input, each on its own."""
  return [layer(x) for layer in layers]


def joined(layers: Sequence[Dense], x: jax.Array) -> list[jax.Array]:
  """As `apart`, to rounding, in one matrix product."""
  dtype = layers[0].dtype
  kernel = jnp.stack([layer.kernel[...].astype(dtype) for layer in layers])
  flat = x.reshape(-1, x.shape[-1]).astype(dtype)
  out = jnp.einsum("nd,sdf->snf", flat, kernel)
  out = out.reshape(len(layers), *x.shape[:-1], -1)
  return [
    y if layer.bias is None else y + layer.bias[...].astype(dtype)
    for layer, y in zip(layers, out, strict=True)
  ]


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Exact attention on every backend; q, k, v (B, N, H, K) -> (B, N, H, K).

  On CPU about 8% faster than jax.nn.dot_product_attention, which it equals.
  """
  weights = attention_weights(q, k).astype(v.dtype)
  v = v.transpose(0, 2, 1, 3)  # (B, H, N, K)
  return jnp.einsum("bhqn,bhnk->bhqk", weights, v).transpose(0, 2, 1, 3)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
  """q, k (B, N, H, K) -> float32 (B, H, N, N), one row per query."""
  q, k = (a.transpose(0, 2, 1, 3) for a in (q, k))  # (B, H, N, K)
  logits = jnp.einsum(
    "bhqk,bhnk->bhqn",
    q * q.shape[-1] ** -0.5,
    k,
    preferred_element_type=jnp.float32,
  )
  return jax.nn.softmax(logits, axis=-1)


class Block(nnx.Module):
  """Pre-norm transformer block; (B, N, D) -> (B, N, D)."""

  def __init__(
    self, width, mlp_dim, num_heads, dtype, attention, norm_eps, rngs
  ):
    self.norm1 = layer_norm(width, rngs, norm_eps)
    self.attention = Attention(width, num_heads, dtype, attention, rngs)
    self.norm2 = layer_norm(width, rngs, norm_eps)
    self.mlp_in = dense(width, mlp_dim, rngs, dtype)
    self.mlp_out = dense(mlp_dim, width, rngs, dtype)

  def __call__(self, x):
    x = x + self.attention(self.norm1(x))
    hidden = jax.nn.gelu(self.mlp_in(self.norm2(x)), approximate=False)
    return x + self.mlp_out(hidden)


class Transformer(nnx.Module):
  """A stack of blocks without the final norm; (B, N, D) -> (B, N, D).

  Parameters are kept block by block whatever `scan` says, so that a checkpoint
  does not depend on it.

  Attributes:
    scan: compile one block and loop over it: compiles faster, and with remat
      needs the least memory; unrolled runs 1.1-1.25x faster on CPU.
    remat: 'none', or a key of REMAT_POLICIES.
  """

  def __init__(
    self,
    *,
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    dtype: jnp.dtype,
    attention: str,
    scan: bool,
    remat: str,
    norm_eps: float,
    rngs: nnx.Rngs,
  ):
    self.scan = scan
    self.remat = remat
    self.blocks = nnx.List(
      [
        Block(width, mlp_dim, num_heads, dtype, attention, norm_eps, rngs)
        for _ in range(depth)
      ]
    )

  def __call__(self, x):
    graphdef = nnx.graphdef(self.blocks[0])
    params = [nnx.to_pure_dict(nnx.state(block)) for block in self.blocks]

    def apply(x, block_params):
      block = nnx.merge(graphdef, partition.weights(block_params))
      return partition.tokens(block(partition.tokens(x)))

    if self.remat != "none":
      # Under scan the loop itself already keeps XLA from merging the two
      # computations of a block.
      apply = jax.checkpoint(
        apply, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan
      )
    if self.scan:
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
      return jax.lax.scan(lambda x, p: (apply(x, p), None), x, stacked)[0]
    for block_params in params:
      x = apply(x, block_params)
    return x
