"""What the encoder looks at: attention maps and the face regions in them.

There is no class token, and a clip's feature is a mean over all tokens; so a
map says how much attention a token receives on average over all that look.

Axes: B clips, L layers, H heads, N tokens (ordered t h w), D width, R regions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.models.mae import Encoder
from marlin_jax.records.schema import REGIONS

# The last one holds the patches of frames in which no face was parsed.
SHARES = (*REGIONS, "not parsed")


class AttentionMaps(NamedTuple):
  """Attention that each token receives, mean over the tokens that look.

  Attributes:
    heads: float32 (B, L, H, N); sums to 1 over N, so 1/N is even.
    rollout: float32 (B, N), likewise: attention followed from the last layer
      back to the input.
  """

  heads: jax.Array
  rollout: jax.Array


def attention_maps(encoder: Encoder, patches: jax.Array) -> AttentionMaps:
  """Attention maps of whole clips.

  Rollout (Abnar & Zuidema 2020, "Quantifying attention flow in transformers"):
  in each layer the heads' mean A, half of it replaced by the identity for the
  residual connection, (A + I) / 2; multiplied over the layers.

  One layer's N x N matrices are held at a time, one per head, and the product:
  150 MB a clip for B/16 on 1568 tokens, where all layers would take 1.4 GB.

  Args:
    encoder: an nnx module, built without `scan`.
    patches: float (B, N, P), all tokens, as the encoder takes them.
  """
  x = encoder.embed(patches)
  batch_size, num_tokens, _ = x.shape
  flow = jnp.tile(jnp.eye(num_tokens), (batch_size, 1, 1))
  heads = []
  for block in encoder.transformer.blocks:
    x, flow, received = _follow(*nnx.split(block), x, flow)
    heads.append(received)
  return AttentionMaps(jnp.stack(heads, axis=1), flow.mean(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _follow(graphdef, params, x, flow):
  """A block's output, rollout up to there, and attention by head (B, H, N)."""
  block = nnx.merge(graphdef, params)
  weights = block.attention.weights(block.norm1(x))  # (B, H, N, N)
  mean = weights.mean(axis=1)
  flow = (jnp.matmul(mean, flow, precision="highest") + flow) / 2
  # XLA sees that both want the same weights and computes them once.
  return block(x), flow, weights.mean(axis=2)


def region_shares(attention: np.ndarray, regions: np.ndarray) -> np.ndarray:
  """How attention is shared out among face regions.

  A patch that several regions touch counts for each in equal parts.

  Args:
    attention: float (B, ..., N), not negative; of any sum.
    regions: uint16 (B, t, h, w) region bits, see records.Record.

  Returns:
    float64 (B, ..., R), in the order of SHARES; sums to 1 over R.

  Raises:
    ValueError: the two are not about the same tokens.
  """
  bits = regions.reshape(len(regions), -1, 1)
  touched = (bits >> np.arange(len(REGIONS), dtype=np.uint16)) & 1
  belongs = np.concatenate([touched, bits == 0], axis=-1, dtype=np.float64)
  belongs /= belongs.sum(-1, keepdims=True)  # (B, N, R)
  attention = np.asarray(attention, np.float64)
  if (len(attention), attention.shape[-1]) != belongs.shape[:2]:
    raise ValueError(
      f"attention of shape {attention.shape} and regions of shape "
      f"{regions.shape}: expected (B, ..., t*h*w) and (B, t, h, w)"
    )
  shares = attention / attention.sum(-1, keepdims=True)
  return np.einsum("b...n,bnr->b...r", shares, belongs)


def area_shares(regions: np.ndarray) -> np.ndarray:
  """What `region_shares` would be, were attention even: (B, R)."""
  return region_shares(
    np.ones(regions.reshape(len(regions), -1).shape), regions
  )
