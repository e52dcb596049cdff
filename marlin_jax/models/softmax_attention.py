"""softmax(q k^T) v, computed in several ways that agree to rounding.

Logits, softmax and sums are float32; products run in the dtype of q, k and v.

Axes: B batch, N tokens, M queries (N, or the last of them), H heads, K head
size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from marlin_jax.models import partition

IMPLEMENTATIONS = ("auto", "plain", "chunked", "cudnn", "flash")

# Queries whose logits are there at the same time. Fewer tokens than this, as in
# the encoder while it is trained, are cheaper to keep than to compute again.
CHUNK = 512
# What Mosaic wants a length to be a multiple of.
_LANES = 128


def choose(implementation: str, platform: str, dtype) -> str:
  """What 'auto' stands for; any other name stands for itself.

  Args:
    implementation: one of IMPLEMENTATIONS.
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: of q, k and v.
  """
  if implementation != "auto":
    return implementation
  if platform == "tpu":
    return "flash"
  # cuDNN's has no float32.
  if platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16:
    return "cudnn"
  return "chunked"


def keeps_weights(implementation: str, num_tokens: int) -> bool:
  """Whether all weights are kept for the backward pass."""
  return implementation == "plain" or num_tokens <= CHUNK


def attend(
  implementation: str, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
  """q (B, M, H, K), k and v (B, N, H, K) -> (B, M, H, K).

  Args:
    implementation: 'plain' keeps all weights for the backward pass, float32
      (B, H, M, N); the others compute them again and keep (B, H, M). 'chunked'
      runs on any backend, 'cudnn' on GPU in bfloat16 and 'flash', Pallas', on
      TPU.
    q: queries; scaled by K^-0.5 in here.
    k: keys.
    v: values.
  """
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  if keeps_weights(implementation, k.shape[1]):
    return _plain(q, k, v)
  if implementation == "flash":
    return partition.own_heads(_flash)(q, k, v)
  q, k, v = (_heads_first(x) for x in (q, k, v))
  return _heads_first(_chunked(q * q.shape[-1] ** -0.5, k, v))


def weights(q: jax.Array, k: jax.Array) -> jax.Array:
  """q (B, M, H, K), k (B, N, H, K) -> float32 (B, H, M, N); rows sum to 1."""
  q, k = _heads_first(q), _heads_first(k)
  return jax.nn.softmax(_logits(q * q.shape[-1] ** -0.5, k), axis=-1)


def _plain(q, k, v):
  mixed = jnp.einsum(
    "bhmn,bhnk->bhmk", weights(q, k).astype(v.dtype), _heads_first(v)
  )
  return _heads_first(mixed)


def _heads_first(x):
  """(B, N, H, K) -> (B, H, N, K), and back."""
  return x.transpose(0, 2, 1, 3)


def _logits(q, k):
  return jnp.einsum("bhmk,bhnk->bhmn", q, k, preferred_element_type=jnp.float32)


# --- chunked ------------------------------------------------------------------
# Dao et al. 2022 (FlashAttention), section 3.1, without its tiling of the keys:
# of each row of weights the logarithm of its sum is kept, which gives the
# weights back without a second look for the largest logit.


@jax.custom_vjp
def _chunked(q, k, v):
  """q (B, H, M, K), scaled; k and v (B, H, N, K)."""
  return _chunked_forward(q, k, v)[0]


def _chunked_forward(q, k, v):
  def mix(q):
    logits = _logits(q, k)
    top = logits.max(-1, keepdims=True)
    raised = jnp.exp(logits - top)
    total = raised.sum(-1, keepdims=True)
    # Divided by their sum only now: K numbers a row instead of N.
    mixed = jnp.einsum(
      "bhmn,bhnk->bhmk",
      raised.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    return (mixed / total).astype(v.dtype), top + jnp.log(total)

  num_queries = q.shape[2]
  out, log_sum = jax.lax.map(mix, _cut(q))
  out, log_sum = (_joined(x, num_queries) for x in (out, log_sum))
  return out, (q, k, v, out, log_sum)


def _chunked_backward(kept, slope):
  q, k, v, out, log_sum = kept
  mean = (slope.astype(jnp.float32) * out).sum(-1, keepdims=True)

  def pull_back(sums, chunk):
    q, log_sum, slope, mean = chunk
    weights = jnp.exp(_logits(q, k) - log_sum)
    d_logits = (weights * (_logits(slope, v) - mean)).astype(q.dtype)
    products = (
      jnp.einsum("bhmn,bhmk->bhnk", a, b, preferred_element_type=jnp.float32)
      for a, b in ((d_logits, q), (weights.astype(v.dtype), slope))
    )
    d_q = jnp.einsum("bhmn,bhnk->bhmk", d_logits, k)
    return tuple(map(jnp.add, sums, products)), d_q

  none = jnp.zeros(k.shape, jnp.float32)
  chunks = tuple(_cut(x) for x in (q, log_sum, slope, mean))
  (d_k, d_v), d_q = jax.lax.scan(pull_back, (none, none), chunks)
  return _joined(d_q, q.shape[2]), d_k.astype(k.dtype), d_v.astype(v.dtype)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _cut(x):
  """(B, H, M, K) -> (chunks, B, H, queries, K), with zeros at the end."""
  num_chunks = -(-x.shape[2] // CHUNK)
  size = -(-x.shape[2] // num_chunks)
  x = _padded(x, 2, num_chunks * size)
  x = x.reshape(*x.shape[:2], num_chunks, size, x.shape[-1])
  return jnp.moveaxis(x, 2, 0)


def _joined(chunks, num_queries):
  """The inverse of `_cut`."""
  x = jnp.moveaxis(chunks, 0, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :num_queries]


def _padded(x, axis, size):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


# --- flash --------------------------------------------------------------------


def _flash(q, k, v):
  # Imported where it is used: it takes a second.
  from jax.experimental.pallas.ops.tpu import flash_attention as pallas

  batch_size, num_queries, _, size = q.shape
  num_tokens = k.shape[1]
  q, k, v = (
    _padded(_heads_first(x), 2, -(-x.shape[1] // _LANES) * _LANES)
    for x in (q, k, v)
  )
  # Padded keys belong to a segment that no query is in.
  segments = pallas.SegmentIds(
    q=jnp.zeros((batch_size, q.shape[2]), jnp.int32),
    kv=jnp.tile(jnp.arange(k.shape[2]) >= num_tokens, (batch_size, 1)).astype(
      jnp.int32
    ),
  )
  # 1568 tokens are padded to 13 x 128, which has no other divisor: all of one
  # side at a time, and so many of the other. For the queries' gradient Pallas
  # repeats a number of each query as often as there are keys in a block.
  keys, queries = k.shape[2], _LANES
  mixed = pallas.flash_attention(
    q,
    k,
    v,
    segment_ids=segments,
    sm_scale=size**-0.5,
    block_sizes=pallas.BlockSizes(
      block_q=queries,
      block_k_major=keys,
      block_k=keys,
      block_b=1,
      block_q_major_dkv=queries,
      block_k_major_dkv=keys,
      block_k_dkv=keys,
      block_q_dkv=queries,
      block_k_major_dq=_LANES,
      block_k_dq=_LANES,
      block_q_dq=q.shape[2],
    ),
  )
  return _heads_first(mixed[:, :, :num_queries])
