"""Vision transformer: a stack of pre-norm blocks on tokens.

No class token, joint space-time attention, exact GELU, and no bias on the key
projection (VideoMAE's and MARLIN's network). Parameters are float32; matmuls
run in `dtype`; normalisation and softmax in float32.

Axes: B batch, N tokens, D width, H heads, K = D / H.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.models import partition, softmax_attention

# MARLIN's. VideoMAE has 1e-6, and HuggingFace's copy of it 1e-12.
NORM_EPS = 1e-5
_SQRT_HALF = 0.5**0.5

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
  the gradient of the weights. Elsewhere the two are the same program, but for a
  copy on TPU where the number of tokens is no multiple of 8.
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
  """Multi-head self-attention; (B, N, D) -> (B, M, D) for the last M tokens."""

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

  def project(self, x, start=0):
    """Queries (B, M, H, K) of the last M tokens, keys and values of all."""
    layers = (self.query, self.key, self.value)
    if partition.num_tensor() > 1:
      # There the gradient of x is summed over devices: once for all three
      # instead of once for each.
      q, k, v = joined(layers, x)
      q = q[:, start:]
    else:
      q, k, v = self.query(x[:, start:]), self.key(x), self.value(x)
    return [y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v)]

  def weights(self, x):
    """How much each token looks at each: float32 (B, H, N, N), rows sum to 1.

    Whatever the implementation: most never hold them, and their own differ by
    rounding.
    """
    q, k, _ = self.project(x)
    return softmax_attention.weights(q, k)

  def __call__(self, x, start=0):
    q, k, v = self.project(x, start)
    y = softmax_attention.attend(self.implementation, q, k, v)
    return self.out(y.reshape(*y.shape[:2], -1))


def joined(layers: Sequence[Dense], x: jax.Array) -> list[jax.Array]:
  """Several layers of the same size on one input, in one matrix product."""
  dtype = layers[0].dtype
  kernel = jnp.stack([layer.kernel[...].astype(dtype) for layer in layers])
  flat = x.reshape(-1, x.shape[-1]).astype(dtype)
  out = jnp.einsum("nd,sdf->snf", flat, kernel)
  out = out.reshape(len(layers), *x.shape[:-1], -1)
  return [
    y if layer.bias is None else y + layer.bias[...].astype(dtype)
    for layer, y in zip(layers, out, strict=True)
  ]


class Block(nnx.Module):
  """Pre-norm transformer block; (B, N, D) -> (B, M, D), the last M tokens."""

  def __init__(
    self, width, mlp_dim, num_heads, dtype, attention, norm_eps, rngs
  ):
    self.norm1 = layer_norm(width, rngs, norm_eps)
    self.attention = Attention(width, num_heads, dtype, attention, rngs)
    self.norm2 = layer_norm(width, rngs, norm_eps)
    self.mlp_in = dense(width, mlp_dim, rngs, dtype)
    self.mlp_out = dense(mlp_dim, width, rngs, dtype)

  def __call__(self, x, start=0, keep=None):
    """Runs the block.

    Args:
      x: tokens.
      start: the first that is wanted.
      keep: float32 (2, B), what the two branches of each clip are multiplied
        with; see `drop_path`.
    """
    y = self.attention(self.norm1(x), start)
    x = x[:, start:] + (y if keep is None else _scaled(y, keep[0]))
    y = self.mlp_out(gelu(self.mlp_in(self.norm2(x))))
    return x + (y if keep is None else _scaled(y, keep[1]))


def _scaled(y: jax.Array, factor: jax.Array) -> jax.Array:
  return y * factor[:, None, None].astype(y.dtype)


def drop_path(
  rng: jax.Array, rate: float, depth: int, num_clips: int
) -> jax.Array:
  """Draws which branches of which clips are left out (Huang et al. 2016).

  Args:
    rng: a key.
    rate: of the last block, below 1; that of the others rises to it from 0.
    depth: blocks.
    num_clips: B.

  Returns:
    float32 (depth, 2, B): 0, or what makes up for those that are 0.
  """
  kept = 1 - rate * jnp.arange(depth) / max(depth - 1, 1)
  kept = kept[:, None, None]
  drawn = jax.random.uniform(rng, (depth, 2, num_clips)) < kept
  return drawn / kept


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) for the normal distribution's Phi, not its tanh approximation.

  As jax.nn.gelu to rounding. Of arrays as wide as the hidden layer, the largest
  a block has beside attention, that one's gradient asks for four; this one's
  for x.
  """
  wide = x.astype(jnp.float32)
  return (wide * (1 + jax.lax.erf(wide * _SQRT_HALF)) / 2).astype(x.dtype)


def _gelu_backward(x, slope):
  wide = x.astype(jnp.float32)
  # Of -x: the compiler would take erf(x) for the forward pass' own, and keep it
  # from there to here.
  cdf = (1 - jax.lax.erf(-wide * _SQRT_HALF)) / 2
  density = jnp.exp(-jnp.square(wide) / 2) * (0.5 / math.pi) ** 0.5
  return ((slope * (cdf + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Transformer(nnx.Module):
  """A stack of blocks without the final norm; (B, N, D) -> (B, M, D).

  Attributes:
    blocks: a list of Block; with `scan` one Block whose parameters are those of
      all, joined as in models.blocks.
    scan: compile one block and loop over it, which compiles faster and with
      remat needs the least memory; otherwise the loop is unrolled, which runs
      faster.
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

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def draw(rngs):
      return Block(width, mlp_dim, num_heads, dtype, attention, norm_eps, rngs)

    self.blocks = draw(rngs)
    if not scan:
      # Drawn together all the same: a seed stands for the same network.
      graphdef, params = nnx.split(self.blocks)
      self.blocks = nnx.List(
        nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))
        for i in range(depth)
      )

  def __call__(self, x, start=0, keep=None):
    """Runs the blocks.

    Args:
      x: tokens.
      start: the first that is wanted: the last block computes no other.
      keep: float32 (depth, 2, B), from `drop_path`; not together with `start`.
    """
    if self.scan:
      return self._loop(x, start, keep)
    # Traced once, and not for every block.
    apply = jax.jit(self._apply(), static_argnums=(0, 1))
    for i, block in enumerate(self.blocks):
      is_last = i == len(self.blocks) - 1
      graphdef, params = nnx.split(block)
      x = apply(
        graphdef,
        start if is_last else 0,
        x,
        nnx.to_pure_dict(params),
        None if keep is None else keep[i],
      )
    return x

  def _loop(self, x, start, keep):
    graphdef, params = nnx.split(self.blocks)
    params = nnx.to_pure_dict(params)
    last = None
    if start:
      last = jax.tree.map(lambda p: p[-1], params)
      params = jax.tree.map(lambda p: p[:-1], params)
    apply = functools.partial(self._apply(), graphdef)
    x, _ = jax.lax.scan(lambda x, p: (apply(0, x, *p), None), x, (params, keep))
    return apply(start, x, last) if start else x

  def _apply(self):
    """A function that runs one block, with or without keeping its inside."""

    def apply(graphdef, start, x, params, keep=None):
      block = nnx.merge(graphdef, partition.weights(params))
      return partition.tokens(block(partition.tokens(x), start, keep))

    if self.remat == "none":
      return apply
    # Under scan the loop itself already keeps XLA from merging the two
    # computations of a block.
    return jax.checkpoint(
      apply,
      policy=REMAT_POLICIES[self.remat],
      prevent_cse=not self.scan,
      static_argnums=(0, 1),
    )
