"""softmax(q k^T) v in several implementations, equal to rounding.

Logits, softmax and sums are float32; matrix products run in the dtype of q, k
and v.

Axes: B batch, N tokens, M queries (N, or the last of them), H heads, K head
size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from marlin_jax.models import partition

# Heads whose attention weights are in memory at the same time.
_HEADS_AT_ONCE = {"by_head": 1, "chunked": 4}
# Queries of a head in one product: half of a clip's tokens, which is slightly
# faster on CPU than all of them.
_QUERIES = 784
# Up to this many tokens, as in the encoder during training, the weights are
# cheaper to keep than to recompute.
_KEPT_TOKENS = 512
# Mosaic requires lengths that are a multiple of this.
_LANES = 128


def choose(implementation: str, platform: str, dtype) -> str:
  """Resolves 'auto'; returns any other name as it is.

  Args:
    implementation: one of options.ATTENTION.
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: dtype of q, k and v.
  """
  if implementation != "auto":
    return implementation
  if platform == "tpu":
    return "flash"
  # cuDNN's attention has no float32.
  if platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16:
    return "cudnn"
  return "by_head" if platform == "cpu" else "chunked"


def keeps_weights(implementation: str, num_tokens: int) -> bool:
  """Returns True if all weights are kept for the backward pass."""
  return implementation == "plain" or num_tokens <= _KEPT_TOKENS


def heads_at_once(implementation: str) -> int:
  """Returns the heads whose (N, N) weights are in memory at a time.

  0 for a fused implementation, which never holds them.
  """
  return _HEADS_AT_ONCE.get(implementation, 0)


def attend(
  implementation: str, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
  """Computes attention.

  Args:
    implementation: 'plain' keeps all weights for the backward pass, float32
      (B, H, M, N); the others recompute them and keep (B, H, M). 'by_head'
      (one head at a time) and 'chunked' (some heads at a time) run on any
      backend, 'cudnn' on GPU in bfloat16, and 'flash' (Pallas) on TPU.
    q: (B, M, H, K), queries, not scaled.
    k: (B, N, H, K), keys.
    v: (B, N, H, K), values.

  Returns:
    (B, M, H, K) in the dtype of v.
  """
  if implementation == "cudnn":
    return _cudnn(q, k, v)
  if keeps_weights(implementation, k.shape[1]):
    return _plain(q, k, v)
  if implementation == "flash":
    attention = _flash
  else:
    attention = functools.partial(_chunked, heads_at_once(implementation))
  return partition.own_heads(attention)(q, k, v)


def weights(q: jax.Array, k: jax.Array) -> jax.Array:
  """Returns attention weights.

  Args:
    q: (B, M, H, K), queries, not scaled.
    k: (B, N, H, K), keys.

  Returns:
    float32 (B, H, M, N), whose rows sum to 1.
  """
  q, k = _heads_first(q * q.shape[-1] ** -0.5), _heads_first(k)
  return jax.nn.softmax(_product("bhmk,bhnk->bhmn", q, k), axis=-1)


def _plain(q, k, v):
  mixed = jnp.einsum(
    "bhmn,bhnk->bhmk", weights(q, k).astype(v.dtype), _heads_first(v)
  )
  return _heads_first(mixed)


def _heads_first(x):
  """Swaps tokens and heads: (B, N, H, K) <-> (B, H, N, K)."""
  return x.transpose(0, 2, 1, 3)


# --- chunked and by_head ------------------------------------------------------
# Dao et al. 2022 (FlashAttention), section 3.1, without tiling of the keys: the
# log-sum-exp of each row is kept, from which the backward pass recomputes the
# weights without searching the largest logit again.


def _chunked(at_once, q, k, v):
  return _scaled_chunked(at_once, q * q.shape[-1] ** -0.5, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_chunked(at_once, q, k, v):
  """Attends with q (B, M, H, K), scaled; k and v (B, N, H, K)."""
  return _chunked_forward(at_once, q, k, v)[0]


def _chunked_forward(at_once, q, k, v):
  out, log_sum = _over_heads(at_once, _mix, q, k, v)
  return out, (q, k, v, out, log_sum)


def _chunked_backward(at_once, residuals, grad):
  q, k, v, out, log_sum = residuals
  mean = (grad.astype(jnp.float32) * out).sum(-1, keepdims=True)
  return _over_heads(at_once, _mix_backward, q, k, v, log_sum, grad, mean)


_scaled_chunked.defvjp(_chunked_forward, _chunked_backward)


def _over_heads(at_once, function, *arrays):
  """Maps a function of one head over arrays (B, N, H, ..), some at a time."""
  batch_size, _, num_heads = arrays[0].shape[:3]

  def run(i):
    return function(*(x[i // num_heads, :, i % num_heads] for x in arrays))

  results = jax.lax.map(
    run,
    jnp.arange(batch_size * num_heads),
    batch_size=at_once if at_once > 1 else None,
  )
  return tuple(
    x.reshape(batch_size, num_heads, *x.shape[1:]).swapaxes(1, 2)
    for x in results
  )


def _mix(q, k, v):
  """Attends with one head.

  Args:
    q: (M, K), scaled.
    k, v: (N, K).

  Returns:
    (M, K), and the log-sum-exp of each row, float32 (M, 1).
  """
  chunks = []
  for rows in _chunks(len(q)):
    logits = _product("mk,nk->mn", q[rows], k)
    largest = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - largest)
    total = exp.sum(-1, keepdims=True)
    # Normalised after the product: K values a row instead of N.
    mixed = _product("mn,nk->mk", exp.astype(v.dtype), v) / total
    chunks.append((mixed.astype(v.dtype), largest + jnp.log(total)))
  return tuple(map(jnp.concatenate, zip(*chunks, strict=True)))


def _mix_backward(q, k, v, log_sum, grad, mean):
  """Returns the gradients of q, k and v of one head."""
  d_q, d_k, d_v = [], 0, 0
  for rows in _chunks(len(q)):
    weights = jnp.exp(_product("mk,nk->mn", q[rows], k) - log_sum[rows])
    d_weights = _product("mk,nk->mn", grad[rows], v)
    d_logits = (weights * (d_weights - mean[rows])).astype(q.dtype)
    d_q.append(_product("mn,nk->mk", d_logits, k).astype(q.dtype))
    # (K, N), which CPUs accumulate faster than (N, K).
    d_k += _product("mk,mn->kn", q[rows], d_logits)
    d_v += _product("mk,mn->kn", grad[rows], weights.astype(v.dtype))
  return jnp.concatenate(d_q), d_k.T.astype(k.dtype), d_v.T.astype(v.dtype)


def _chunks(num_queries):
  size = -(-num_queries // -(-num_queries // _QUERIES))
  return [slice(i, i + size) for i in range(0, num_queries, size)]


def _product(axes, a, b):
  return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _padded(x, axis, size):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


# --- cudnn --------------------------------------------------------------------


def _cudnn(q, k, v):
  lengths = {}
  num_queries, num_tokens = q.shape[1], k.shape[1]
  if num_queries % 2 or num_tokens % 2:
    # jax 0.10.2 refuses the gradient of odd lengths, since its check treats the
    # absent bias as present. cuDNN ignores tokens beyond the given lengths.
    lengths = {
      "query_seq_lengths": jnp.full(len(q), num_queries),
      "key_value_seq_lengths": jnp.full(len(q), num_tokens),
    }
    q, k, v = (_padded(x, 1, x.shape[1] + x.shape[1] % 2) for x in (q, k, v))
  mixed = jax.nn.dot_product_attention(
    q, k, v, implementation="cudnn", **lengths
  )
  return mixed[:, :num_queries]


# --- flash --------------------------------------------------------------------


def _flash(q, k, v):
  # Imported on use, since it takes a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas

  num_queries, num_tokens, num_heads = q.shape[1], k.shape[1], q.shape[2]
  q, k, v = (
    _padded(_heads_first(x), 2, -(-x.shape[1] // _LANES) * _LANES)
    for x in (q * q.shape[-1] ** -0.5, k, v)
  )
  # 1568 tokens are padded to 13 x 128, and 13 is prime: blocks of all keys and
  # 128 queries. One kernel computes all three gradients.
  queries, keys = q.shape[2], k.shape[2]
  attend = pallas.make_splash_mha(
    pallas.MultiHeadMask([pallas.FullMask((queries, keys))] * num_heads),
    block_sizes=pallas.BlockSizes(
      block_q=_LANES,
      block_kv=keys,
      block_q_dkv=_LANES,
      block_kv_dkv=keys,
      block_kv_dkv_compute=keys,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  # Padded keys are in a segment without queries.
  segments = pallas.SegmentIds(
    q=jnp.zeros(queries, jnp.int32),
    kv=(jnp.arange(keys) >= num_tokens).astype(jnp.int32),
  )
  mixed = jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, segments)
  return _heads_first(mixed[:, :, :num_queries])
