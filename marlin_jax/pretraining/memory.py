"""Estimates how many clips a device can process at once.

The estimate follows from the sizes of the network. It is conservative: one to
two times the bytes that XLA allocates (tests/pretraining/memory_test.py). It
chooses the number of microbatches before the step is compiled;
`python -m marlin_jax.plan` gives exact numbers.
"""

from __future__ import annotations

import jax.numpy as jnp

from marlin_jax.models import softmax_attention, vit
from marlin_jax.weights.architecture import Architecture

_FLOAT32 = 4
# float32 values per parameter: itself, two Adam moments, its gradient, and the
# gradient's accumulator over microbatches.
_VALUES_PER_PARAM = 5
# Arrays as wide as the residual stream that one block keeps: inputs and outputs
# of both norms, query, key, value, mixed values, projections, residual sums.
_STREAM_ARRAYS = 12
# Arrays as wide as a block's hidden layer: before and after GELU.
_HIDDEN_ARRAYS = 2
# With remat 'dots' the block keeps the output of each matmul.
_STREAM_ARRAYS_DOTS = 6
# Arrays of a clip's pixels: prediction, target and their difference with their
# gradients, and the discriminator's hidden layers.
_PIXEL_ARRAYS = 8
# Arrays of attention weights that the backward pass holds for some heads at a
# time: scores, weights and their gradient.
_WEIGHT_ARRAYS = 3
# Rows of attention weights that a fused kernel pads and copies. Half of it was
# a little too low for 16 clips of B on a TPU v5e.
_FUSED_ROWS = 1024
# What the compiler allocates beyond the arrays counted here.
_MARGIN = 1.15


def state_bytes(num_params: int, num_gathered: int, *, has_ema: bool) -> int:
  """Estimates the memory that a device needs without any clip.

  Args:
    num_params: parameters of both networks that the device keeps.
    num_gathered: parameters that the device gathers from the others in a step.
    has_ema: an average of the parameters is kept, one more value for each.

  Returns:
    Bytes on one device.
  """
  values_per_param = _VALUES_PER_PARAM + has_ema
  return _FLOAT32 * (values_per_param * num_params + num_gathered)


def clip_bytes(
  architecture: Architecture,
  num_visible: int,
  execution: vit.Execution,
  *,
  num_tensor: int = 1,
) -> int:
  """Estimates the activations that one clip keeps for the backward pass.

  Args:
    architecture: sizes of both networks.
    num_visible: tokens of a clip that the encoder sees.
    execution: dtype, attention, scan and remat of the transformers.
    num_tensor: devices that share heads and hidden units.

  Returns:
    Bytes per clip.
  """
  tubelets = architecture.tubelets
  encoder = _stack_bytes(
    architecture.encoder, num_visible, execution, num_tensor
  )
  decoder = _stack_bytes(
    architecture.decoder, tubelets.num_tokens, execution, num_tensor
  )
  pixels = _PIXEL_ARRAYS * _FLOAT32 * tubelets.num_tokens * tubelets.pixels
  return int(_MARGIN * (encoder + decoder + pixels))


def _stack_bytes(
  size: vit.Size, num_tokens: int, execution: vit.Execution, num_tensor: int
) -> int:
  """Estimates the activations of one clip in a stack of blocks, in bytes."""
  item = jnp.dtype(execution.dtype).itemsize
  heads, mlp_dim = size.num_heads, size.mlp_dim
  if heads % num_tensor == 0:
    heads, mlp_dim = heads // num_tensor, -(-mlp_dim // num_tensor)

  # Attention: float32 scores and weights in `dtype`, kept by every block, or
  # those of some heads of one block at a time.
  attention, attention_at_once = 0, 0
  if softmax_attention.keeps_weights(execution.attention, num_tokens):
    attention = num_tokens**2 * heads * (_FLOAT32 + item)
  else:
    heads_at_once = softmax_attention.heads_at_once(execution.attention)
    rows = heads_at_once * num_tokens or heads * _FUSED_ROWS
    attention_at_once = _WEIGHT_ARRAYS * _FLOAT32 * rows * num_tokens

  hidden = _HIDDEN_ARRAYS * item * mlp_dim
  stream = _STREAM_ARRAYS * _FLOAT32 * size.width
  block = attention + num_tokens * (hidden + stream)
  saved_per_block = {
    "none": block,
    "dots": num_tokens * item * (mlp_dim + _STREAM_ARRAYS_DOTS * size.width),
    "full": num_tokens * item * size.width,
  }[execution.remat]
  # With remat, two blocks are recomputed where one ends and the next begins.
  recomputed = 0 if execution.remat == "none" else 2 * block
  return size.depth * saved_per_block + recomputed + attention_at_once


def clips_that_fit(free_bytes: int, clip_bytes: int) -> int:
  """Returns the number of clips that fit in memory; 0 if one may not fit."""
  return max(free_bytes // clip_bytes, 0)


def num_microbatches(clips_per_device: int, clips_at_once: int) -> int:
  """Returns the number of microbatches of a device's part of the batch.

  Args:
    clips_per_device: clips of one batch on one device.
    clips_at_once: clips that one device can hold; below 1 counts as 1.

  Returns:
    The least divisor of `clips_per_device` with microbatches small enough.
  """
  return next(
    n
    for n in range(1, clips_per_device + 1)
    if clips_per_device % n == 0
    and clips_per_device // n <= max(clips_at_once, 1)
  )
