"""Attention maps of the encoder, and their shares by face region.

There is no class token, and the feature of a clip is a mean over all tokens. A
map therefore gives the attention that a token receives, averaged over queries.

Axes: B clips, L layers, H heads, N tokens (ordered t h w), D width, R regions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.mae import Encoder
from marlin_jax.records.schema import REGIONS

# The last share is of the patches of frames in which no face was parsed.
SHARES = (*REGIONS, "not parsed")


class AttentionMaps(NamedTuple):
  """Attention that each token receives, averaged over queries.

  Attributes:
    heads: float32 (B, L, H, N); sums to 1 over N, so 1/N is uniform.
    rollout: float32 (B, N), sums to 1: attention traced from the last layer
      back to the input.
  """

  heads: jax.Array
  rollout: jax.Array


def attention_maps(encoder: Encoder, patches: jax.Array) -> AttentionMaps:
  """Computes attention maps of whole clips.

  Rollout (Abnar & Zuidema 2020, "Quantifying attention flow in transformers")
  is the product over layers of (A + I) / 2, where A is the mean over heads and
  the identity I accounts for the residual connection.

  The N x N matrices of one layer, one per head, are held at a time beside the
  product: 150 MB per clip for B/16 with 1568 tokens, instead of 1.4 GB for all
  layers.

  Args:
    encoder: an nnx module, built without `scan`.
    patches: float (B, N, P), all tokens, see `clip_features.to_tokens`.
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
  """Returns a block's output, the rollout and the attention (B, H, N)."""
  block = nnx.merge(graphdef, params)
  with vit.exact_matmuls(block.mlp_in.dtype):
    weights = block.attention.weights(block.norm1(x))  # (B, H, N, N)
    mean = weights.mean(axis=1)
    flow = (jnp.matmul(mean, flow, precision="highest") + flow) / 2
    # XLA computes the attention weights once for this and for the block.
    return block(x), flow, weights.mean(axis=2)


def region_shares(attention: np.ndarray, regions: np.ndarray) -> np.ndarray:
  """Returns the share of the attention that falls on each face region.

  A patch in several regions counts for each in equal parts.

  Args:
    attention: float (B, ..., N), non-negative, with any sum.
    regions: uint16 (B, t, h, w) region bits, see `schema.Record`.

  Returns:
    float64 (B, ..., R), in the order of SHARES; sums to 1 over R.

  Raises:
    ValueError: the numbers of clips or tokens differ.
  """
  bits = regions.reshape(len(regions), -1, 1)
  touched = (bits >> np.arange(len(REGIONS), dtype=np.uint16)) & 1
  membership = np.concatenate([touched, bits == 0], axis=-1, dtype=np.float64)
  membership /= membership.sum(-1, keepdims=True)  # (B, N, R)
  attention = np.asarray(attention, np.float64)
  if (len(attention), attention.shape[-1]) != membership.shape[:2]:
    raise ValueError(
      f"attention of shape {attention.shape} and regions of shape "
      f"{regions.shape}: expected (B, ..., t*h*w) and (B, t, h, w)"
    )
  shares = attention / attention.sum(-1, keepdims=True)
  return np.einsum("b...n,bnr->b...r", shares, membership)


def area_shares(regions: np.ndarray) -> np.ndarray:
  """Returns `region_shares` of uniform attention, (B, R)."""
  return region_shares(
    np.ones(regions.reshape(len(regions), -1).shape), regions
  )
