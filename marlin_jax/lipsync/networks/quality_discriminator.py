"""The discriminator of visual quality, which judges the mouth's half.

Wav2Lip's (Prajwal et al. 2020, section 3.4; layers of
github.com/Rudrabha/Wav2Lip, models/wav2lip.py, Wav2Lip_disc_qual).

Axes: B clips, T frames, S picture side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.lipsync.networks import convolutions, inputs

# Side of the pictures that the layers reduce to one pixel.
_SIZE = 96
# Rows of convolutions.rows, in the blocks of the published network.
STAGES = (
  ((32, 7, 1, 3, 0),),
  ((64, 5, (1, 2), 2, 0), (64, 5, 1, 2, 0)),
  ((128, 5, 2, 2, 0), (128, 5, 1, 2, 0)),
  ((256, 5, 2, 2, 0), (256, 5, 1, 2, 0)),
  ((512, 3, 2, 1, 0), (512, 3, 1, 1, 0)),
  ((512, 3, 2, 1, 0), (512, 3, 1, 1, 0)),
  ((512, 3, 1, 0, 0), (512, 1, 1, 0, 0)),
)


class QualityDiscriminator(nnx.Module):
  """Frames one by one; no batch norm, a leaky ReLU.

  Logits, where the published network ends in a sigmoid: the loss is finite for
  any of them. Pictures larger than Wav2Lip's 96 keep their detail: of the
  several places that are then judged the mean counts. Smaller ones are enlarged
  to 96.
  """

  def __init__(
    self,
    *,
    rngs: nnx.Rngs,
    width: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
  ):
    """Draws the weights.

    Args:
      rngs: `params`.
      width: channels as a multiple of the published.
      dtype: of the convolutions.
    """
    table = [row for stage in STAGES for row in stage]
    self.layers = convolutions.rows(
      3,
      table,
      width,
      normed=False,
      activation=jax.nn.leaky_relu,
      rngs=rngs,
      dtype=dtype,
    )
    self.logit = nnx.Conv(
      convolutions.scaled(512, width), 1, (1, 1), dtype=dtype, rngs=rngs
    )

  def __call__(self, video: jax.Array) -> jax.Array:
    """How real the lower halves look.

    Args:
      video: float32 (B, T, S, S, 3), RGB in [0, 1], whole faces.

    Returns:
      float32 (B T,), logits of being real.
    """
    pictures = video.reshape(-1, *video.shape[2:])
    if pictures.shape[1] < _SIZE:
      pictures = inputs.resize(pictures, _SIZE, _SIZE)
    x = convolutions.run(self.layers, inputs.lower_half(pictures))
    return self.logit(x).astype(jnp.float32).mean((1, 2, 3))
