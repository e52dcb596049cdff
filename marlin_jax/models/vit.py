"""Vision transformer: a stack of pre-norm blocks on tokens.

No class token, joint space-time attention, exact GELU, and no bias on the key
projection (VideoMAE's and MARLIN's network). Parameters are float32; matmuls
run in `dtype`; normalisation and softmax in float32.

Axes: B batch, N tokens, D width, H heads, K = D / H.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.models import linear, partition, softmax_attention

# MARLIN's. VideoMAE has 1e-6, and HuggingFace's copy of it 1e-12.
NORM_EPS = 1e-5
_SQRT_HALF = 0.5**0.5

# Arrays of a block kept for the backward pass, which recomputes the others.
REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Size:
  """Size of a stack of transformer blocks.

  Attributes:
    width: D, features per token.
    depth: number of blocks.
    num_heads: H, attention heads of a block.
    mlp_dim: hidden units of a block's MLP.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int


@dataclasses.dataclass(frozen=True)
class Execution:
  """How blocks are computed: speed, memory and rounding, not the function.

  Attributes:
    dtype: dtype of the matmuls; parameters stay float32.
    attention: one of options.ATTENTION except 'auto'.
    scan: compile one block and loop over it, which compiles faster and with
      remat needs the least memory. Otherwise the loop is unrolled, which runs
      faster.
    remat: 'none', or a key of REMAT_POLICIES.
  """

  dtype: str | jnp.dtype = "float32"
  attention: str = "plain"
  scan: bool = False
  remat: str = "none"


def exact_matmuls(dtype: str | jnp.dtype) -> contextlib.AbstractContextManager:
  """Returns a context in which float32 matmuls of a network are exact.

  GPUs round the inputs of float32 matmuls to TF32 and TPUs to bfloat16 unless
  told otherwise. Exact ones take 6 passes on TPU and, by the peak rates, 7 to 8
  times as long on an A100 or H100.

  Args:
    dtype: dtype of the network's matmuls; nothing changes unless float32.
  """
  if jnp.dtype(dtype) != jnp.float32:
    return contextlib.nullcontext()
  return jax.default_matmul_precision("highest")


class Fixed(nnx.Variable):
  """Variable that is saved but not trained: a position table.

  The table of an imported checkpoint differs from the exact one by up to 1e-4,
  so tables are saved with the parameters.
  """


def split_model(module: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
  """Splits a module into structure, trained parameters and fixed values."""
  graphdef, params, fixed = nnx.split(module, nnx.Param, Fixed)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(fixed)


def sincos_positions(num_tokens: int, width: int) -> np.ndarray:
  """Returns the sine-cosine position table (Vaswani et al. 2017).

  Computed in float64 and rounded.

  Returns:
    float32 (N, D); sine on even channels, cosine on odd ones.
  """
  rate = 10000.0 ** (-2 * (np.arange(width) // 2) / width)
  angle = np.arange(num_tokens)[:, None] * rate
  table = np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle))
  return table.astype(np.float32)


def position_table(num_tokens: int, width: int) -> Fixed:
  """Returns `sincos_positions` as a variable of a module."""
  return Fixed(jnp.asarray(sincos_positions(num_tokens, width)))


def learned_token(width: int, rngs: nnx.Rngs) -> nnx.Param:
  """Draws a token (width,) that is trained, such as a mask token."""
  draw = nnx.initializers.truncated_normal(0.02)
  return nnx.Param(draw(rngs.params(), (width,), jnp.float32))


def positions_at(
  table: jax.Array, grid: tuple[int, int, int], new: tuple[int, int, int]
) -> jax.Array:
  """Returns a position table for clips of another token grid.

  A token keeps its place in time and in the picture. Shorter clips have the
  first rows; for longer ones `sincos_positions` continues the table. Along h
  and w it is interpolated linearly between the centres of patches, as is usual
  for tables of vision transformers (Dosovitskiy et al. 2021, section 3.2).

  Args:
    table: (N, D).
    grid: tokens of the table along t, h and w.
    new: tokens of the clips along t, h and w.

  Returns:
    (N', D).
  """
  per_frame = grid[1] * grid[2]
  if new[0] > grid[0]:
    longer = sincos_positions(new[0] * per_frame, table.shape[-1])
    table = jnp.concatenate([table, longer[len(table) :]])
  table = table[: new[0] * per_frame].reshape(new[0], *grid[1:], -1)
  if new[1:] != grid[1:]:
    shape = *new, table.shape[-1]
    table = jax.image.resize(table, shape, "linear", antialias=False)
  return table.reshape(-1, table.shape[-1])


def layer_norm(
  width: int, rngs: nnx.Rngs, eps: float = NORM_EPS
) -> nnx.LayerNorm:
  """Returns a LayerNorm that computes in float32."""
  # The two-pass variance: the fast one loses precision for a large mean.
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
  the gradient of the weights. On other backends both forms compile to the same
  program, except for a copy on TPU if the number of tokens is not a multiple of
  8.
  """

  def __call__(self, x):
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    bias = None if self.bias is None else self.bias[...]
    y = linear.linear(flat, self.kernel[...], bias)
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
  """Returns a linear layer with Xavier-uniform weights and a zero bias.

  Args:
    features_in: size of the input.
    features_out: size of the output.
    rngs: draws the weights.
    dtype: dtype of the matmul.
    use_bias: add a bias.
    fan_out: output size that the initialiser assumes, default `features_out`.
      The reference draws query, key and value as one matrix, whose larger fan
      gives a smaller range.
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
  """Multi-head self-attention of the last M queries: (B, N, D) -> (B, M, D)."""

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
    """Returns queries (B, M, H, K) of x[:, start:], keys and values of x."""
    layers = (self.query, self.key, self.value)
    if partition.num_tensor() > 1:
      # The gradient of x is summed over devices: one sum for all three
      # projections instead of three.
      q, k, v = fused_dense(layers, x)
      q = q[:, start:]
    else:
      q, k, v = self.query(x[:, start:]), self.key(x), self.value(x)
    return [y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v)]

  def weights(self, x):
    """Returns attention weights, float32 (B, H, N, N), whose rows sum to 1.

    Independent of the implementation: most never materialise the weights, and
    theirs differ from these by rounding.
    """
    q, k, _ = self.project(x)
    return softmax_attention.weights(q, k)

  def __call__(self, x, start=0):
    q, k, v = self.project(x, start)
    y = softmax_attention.attend(self.implementation, q, k, v)
    return self.out(y.reshape(*y.shape[:2], -1))


def fused_dense(layers: Sequence[Dense], x: jax.Array) -> list[jax.Array]:
  """Applies layers of the same size to one input in a single matrix product.

  Returns:
    The output of each layer.
  """
  flat = x.reshape(-1, x.shape[-1]).astype(layers[0].dtype)
  kernel = jnp.stack([layer.kernel[...] for layer in layers])
  return [
    (y if layer.bias is None else linear.add_bias(y, layer.bias[...])).reshape(
      *x.shape[:-1], -1
    )
    for layer, y in zip(
      layers, linear.product("nd,sdf->snf", flat, kernel), strict=True
    )
  ]


class Block(nnx.Module):
  """Pre-norm transformer block; (B, N, D) -> (B, M, D), the last M tokens."""

  def __init__(
    self, size: Size, execution: Execution, norm_eps: float, rngs: nnx.Rngs
  ):
    width, dtype = size.width, execution.dtype
    self.norm1 = layer_norm(width, rngs, norm_eps)
    self.attention = Attention(
      width, size.num_heads, dtype, execution.attention, rngs
    )
    self.norm2 = layer_norm(width, rngs, norm_eps)
    self.mlp_in = dense(width, size.mlp_dim, rngs, dtype)
    self.mlp_out = dense(size.mlp_dim, width, rngs, dtype)

  def __call__(self, x, start=0, keep=None):
    """Runs the block.

    Args:
      x: (B, N, D), tokens.
      start: first token to compute; attention still sees all of them.
      keep: float32 (2, B), factors of the two branches of each clip; see
        `drop_path`.

    Returns:
      (B, N - start, D).
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
  """Draws the branches to drop: stochastic depth (Huang et al. 2016).

  Args:
    rng: a jax key.
    rate: drop rate of the last block, below 1; it rises linearly from 0 at the
      first block.
    depth: number of blocks.
    num_clips: B.

  Returns:
    float32 (depth, 2, B): 0 for a dropped branch, else 1 / (1 - drop rate), so
    that the expectation is 1.
  """
  keep_rate = 1 - rate * jnp.arange(depth) / max(depth - 1, 1)
  keep_rate = keep_rate[:, None, None]
  kept = jax.random.uniform(rng, (depth, 2, num_clips)) < keep_rate
  return kept / keep_rate


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Returns the exact GELU: x times the normal CDF of x.

  Equal to jax.nn.gelu(x, approximate=False) to rounding, but its gradient keeps
  only x for the backward pass, where jax.nn.gelu's keeps four arrays of that
  size. The MLP's hidden layer is the largest array of a block beside attention.
  """
  x32 = x.astype(jnp.float32)
  return (x32 * (1 + jax.lax.erf(x32 * _SQRT_HALF)) / 2).astype(x.dtype)


def _gelu_backward(x, grad):
  x32 = x.astype(jnp.float32)
  # erf(-x), since XLA would merge erf(x) with the forward pass's and keep it in
  # memory until here.
  cdf = (1 - jax.lax.erf(-x32 * _SQRT_HALF)) / 2
  density = jnp.exp(-jnp.square(x32) / 2) * (0.5 / math.pi) ** 0.5
  return ((grad * (cdf + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Transformer(nnx.Module):
  """Stack of blocks without the final norm; (B, N, D) -> (B, M, D).

  Attributes:
    blocks: a list of Block; with scan one Block whose parameters are stacked
      over all blocks, see models.stacking.
    scan, remat: see Execution.
  """

  def __init__(
    self, size: Size, execution: Execution, norm_eps: float, rngs: nnx.Rngs
  ):
    self.scan = execution.scan
    self.remat = execution.remat

    @nnx.split_rngs(splits=size.depth)
    @nnx.vmap
    def make_blocks(rngs):
      return Block(size, execution, norm_eps, rngs)

    self.blocks = make_blocks(rngs)
    if not self.scan:
      # Drawn stacked in both cases, so that a seed gives the same network.
      graphdef, stacked = nnx.split(self.blocks)

      def block(i):
        return nnx.merge(graphdef, jax.tree.map(lambda p: p[i], stacked))

      self.blocks = nnx.List(block(i) for i in range(size.depth))

  def __call__(self, x, start=0, keep=None):
    """Runs the blocks.

    Args:
      x: (B, N, D), tokens.
      start: first token that the last block computes.
      keep: float32 (depth, 2, B), from `drop_path`; not together with `start`.

    Returns:
      (B, N - start, D).
    """
    if self.scan:
      return self._scan(x, start, keep)
    # One jit for all blocks: the block is traced once.
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

  def part(self, x: jax.Array, begin: int, end: int) -> jax.Array:
    """Runs the blocks from number `begin` to before `end`, counted from 0.

    Args:
      x: (B, N, D), tokens.
      begin, end: 0 <= begin < end <= depth.

    Returns:
      (B, N, D).
    """
    apply = jax.jit(self._apply(), static_argnums=(0, 1))
    if self.scan:
      graphdef, params = nnx.split(self.blocks)
      params = jax.tree.map(lambda p: p[begin:end], nnx.to_pure_dict(params))
      step = functools.partial(apply, graphdef, 0)
      return jax.lax.scan(lambda x, p: (step(x, p), None), x, params)[0]
    for block in self.blocks[begin:end]:
      graphdef, params = nnx.split(block)
      x = apply(graphdef, 0, x, nnx.to_pure_dict(params))
    return x

  def _scan(self, x, start, keep):
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
    """Returns a function that runs one block, with the configured remat."""

    def apply(graphdef, start, x, params, keep=None):
      block = nnx.merge(graphdef, partition.weights(params))
      return partition.tokens(block(partition.tokens(x), start, keep))

    if self.remat == "none":
      return apply
    # Under scan the loop itself keeps XLA from merging the forward pass with
    # its recomputation.
    return jax.checkpoint(
      apply,
      policy=REMAT_POLICIES[self.remat],
      prevent_cse=not self.scan,
      static_argnums=(0, 1),
    )
