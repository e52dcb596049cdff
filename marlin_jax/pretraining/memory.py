"""How many clips a device can work on at once.

An estimate from the sizes of the network, on the safe side; see the test that
compares it with what XLA allocates.
"""

from __future__ import annotations

from marlin_jax.models import softmax_attention

# For what the compiler adds of its own.
_MARGIN = 1.15
# Rows of a head's weights, for what fused attention pads and copies: with half
# of them 16 clips of B on a TPU v5e take a little more than is foretold.
_FUSED_ROWS = 1024


def clips_that_fit(
  device_bytes: int,
  *,
  num_params: int,
  num_gathered: int,
  clip_bytes: int,
  has_ema: bool,
) -> int:
  """Clips that fit beside the state; 0 where not even one is sure to.

  Args:
    device_bytes: what training may use on one device.
    num_params: of both networks, kept by one device; each takes five float32
      values: itself, its two Adam moments, its gradient and the gradient's
      accumulator.
    num_gathered: parameters that a device puts together from what it and
      others keep; each takes one more value.
    clip_bytes: activations per clip.
    has_ema: an average of the parameters is kept: one value more for each.
  """
  room = device_bytes - 4 * ((5 + has_ema) * num_params + num_gathered)
  return max(room // clip_bytes, 0)


def clip_bytes(
  *,
  model,
  num_tokens: int,
  num_visible: int,
  pixels: int,
  dtype: str,
  attention: str,
  remat: str,
  num_tensor: int = 1,
) -> int:
  """Activations that one clip keeps alive between forward and backward.

  Args:
    model: sizes; config.model.
    num_tokens: tokens of a clip.
    num_visible: of these, seen by the encoder.
    pixels: values per token.
    dtype: of the matmuls.
    attention: what softmax_attention.choose gave.
    remat: config.remat.
    num_tensor: devices that share heads and hidden units.
  """
  size = 2 if dtype == "bfloat16" else 4

  def stack(tokens, width, depth, mlp_dim, heads):
    # Scores and weights, the hidden layer before and after GELU, and what is as
    # wide as the stream. Softmax and norms are float32.
    if heads % num_tensor == 0:
      heads, mlp_dim = heads // num_tensor, -(-mlp_dim // num_tensor)
    scores, passing = tokens**2 * heads * (4 + size), 0
    if not softmax_attention.keeps_weights(attention, tokens):
      # Of one block at a time: whole heads, or what fused ones take.
      at_once = softmax_attention.heads_at_once(attention)
      rows = at_once * tokens or heads * _FUSED_ROWS
      scores, passing = 0, 3 * 4 * rows * tokens
    block = scores + tokens * (size * 2 * mlp_dim + 4 * 12 * width)
    kept = {
      "none": block,
      "dots": size * tokens * (mlp_dim + 6 * width),
      "full": size * tokens * width,
    }[remat]
    # With remat two blocks are whole where one ends and the next begins.
    return depth * kept + (2 * block if remat != "none" else 0) + passing

  encoder = stack(
    num_visible, model.width, model.depth, model.mlp_dim, model.num_heads
  )
  decoder = stack(
    num_tokens,
    model.dec_width,
    model.dec_depth,
    model.dec_mlp_dim,
    model.dec_num_heads,
  )
  # Prediction, target, their difference, the discriminator's hidden layers.
  ends = 8 * 4 * num_tokens * pixels
  return int(_MARGIN * (encoder + decoder + ends))


def num_parts(batch_size: int, num_devices: int, fit: int) -> int:
  """Parts to cut a batch into so that at most `fit` clips meet on a device.

  Args:
    batch_size: clips over all devices, a multiple of num_devices.
    num_devices: devices that share the batch.
    fit: clips that one device can hold; below 1 counts as 1.

  Returns:
    The least divisor of the batch per device that is enough.
  """
  per_device = batch_size // num_devices
  return next(
    n
    for n in range(1, per_device + 1)
    if per_device % n == 0 and per_device // n <= max(fit, 1)
  )
