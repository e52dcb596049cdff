"""Visual quality discriminator of Wav2Lip, which judges the lower half.

Prajwal et al. 2020, section 3.4; layers of github.com/Rudrabha/Wav2Lip,
models/wav2lip.py, Wav2Lip_disc_qual.

Axes: B clips, T frames, S side of the images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.lipsync.networks import convolutions, inputs

# Image side that the layers reduce to one pixel.
_SIZE = 96
# Blocks of the published network; rows as in convolutions.conv_stack.
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
  """Convolutional discriminator of single frames, without batch norm.

  Returns logits, where the published network ends in a sigmoid, so that the
  loss is finite everywhere. Images larger than Wav2Lip's 96 pixels keep their
  resolution: the logits of all positions are averaged. Smaller images are
  enlarged to 96.
  """

  def __init__(
    self,
    *,
    rngs: nnx.Rngs,
    width: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
  ):
    """Initialises the weights.

    Args:
      rngs: random streams; `params` initialises the weights.
      width: multiplies the published numbers of channels.
      dtype: dtype of the convolutions.
    """
    table = [row for stage in STAGES for row in stage]
    self.layers = convolutions.conv_stack(
      3,
      table,
      width,
      normed=False,
      activation=jax.nn.leaky_relu,
      rngs=rngs,
      dtype=dtype,
    )
    self.logit = nnx.Conv(
      convolutions.scaled_channels(512, width),
      1,
      (1, 1),
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, video: jax.Array) -> jax.Array:
    """Judges the lower halves of frames.

    Args:
      video: float32 (B, T, S, S, 3), RGB in [0, 1], whole faces.

    Returns:
      float32 (B T,), logits of being real.
    """
    images = video.reshape(-1, *video.shape[2:])
    if images.shape[1] < _SIZE:
      images = inputs.resize(images, _SIZE, _SIZE)
    x = convolutions.apply_layers(self.layers, inputs.lower_half(images))
    return self.logit(x).astype(jnp.float32).mean((1, 2, 3))
