"""cuDNN's attention on CPU: plain products behind jax's own partition rules.

A mesh that GPUs would refuse is refused, and lengths are respected.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir


def install():
  """Makes attention 'cudnn' run on CPU in this process."""
  cudnn.check_cudnn_version = lambda: 91000
  for primitive, function in (
    (cudnn._dot_product_attention_fwd_p, _forward),
    (cudnn._dot_product_attention_bwd_p, _backward),
  ):
    mlir.register_lowering(
      primitive, mlir.lower_fun(function, multiple_results=True), "cpu"
    )


def _forward(q, k, v, *rest, scale, is_training, **_):
  out = _attend(scale, rest, q, k, v)
  batch_size, num_queries, num_heads, _ = q.shape
  statistics = jnp.zeros((batch_size, num_heads, num_queries), jnp.float32)
  return (out, statistics) if is_training else (out,)


def _backward(q, k, v, *rest, scale, **_):
  *rest, _, _, grad = rest
  _, pull = jax.vjp(lambda *x: _attend(scale, rest, *x), q, k, v)
  return pull(grad)


def _attend(scale, rest, q, k, v):
  _, _, lengths, *_ = rest
  logits = jnp.einsum(
    "bmhk,bnhk->bhmn", q, k, preferred_element_type=jnp.float32
  )
  if lengths.size:
    # cuDNN gets as many lengths as it has clips, and reads the first of them.
    mask = jnp.arange(k.shape[1]) < lengths[: len(q), None, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
  weights = jax.nn.softmax(scale * logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhmn,bnhk->bmhk", weights, v)
