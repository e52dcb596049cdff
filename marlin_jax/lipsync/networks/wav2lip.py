"""Wav2Lip: the convolutional generator that MARLIN's is compared with.

Prajwal et al. 2020, section 3.3; layers of github.com/Rudrabha/Wav2Lip,
models/wav2lip.py.

Axes: B clips, T frames, N = B T, S picture side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.lipsync.networks import convolutions, inputs
from marlin_jax.lipsync.networks.convolutions import (
  Convolution,
  TransposedConvolution,
)

# Rows of convolutions.rows, a block of them after which a picture is kept for
# the decoder. Sides of the pictures: 96, 48, 24, 12, 6, 3, 1.
_FACE = (
  ((16, 7, 1, 3, 0),),
  ((32, 3, 2, 1, 2),),
  ((64, 3, 2, 1, 3),),
  ((128, 3, 2, 1, 2),),
  ((256, 3, 2, 1, 2),),
  ((512, 3, 2, 1, 1),),
  ((512, 3, 1, 0, 0), (512, 1, 1, 0, 0)),
)
SOUND = (
  (32, 3, 1, 1, 2),
  (64, 3, (3, 1), 1, 2),
  (128, 3, 3, 1, 2),
  (256, 3, (3, 2), 1, 1),
  (512, 3, 1, 0, 0),
  (512, 1, 1, 0, 0),
)
# Channels, strides, padding, output padding, residual convolutions.
_DECODER = (
  (512, 1, 0, 0, 1),
  (512, 2, 1, 1, 2),
  (384, 2, 1, 1, 2),
  (256, 2, 1, 1, 2),
  (128, 2, 1, 1, 2),
  (64, 2, 1, 1, 2),
)


class Wav2Lip(nnx.Module):
  """Frames one by one: half a face, a whole one and a sound become a face.

  Attributes:
    num_frames: T of the windows it is trained on; any number can be given.
    image_size: S.
  """

  num_frames = 5
  image_size = 96

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
    how = {"rngs": rngs, "dtype": dtype}
    face_stages, kept, features = [], [], 6
    for table in _FACE:
      face_stages.append(convolutions.rows(features, table, width, **how))
      features = convolutions.scaled(table[-1][0], width)
      kept.append(features)
    self.face_stages = nnx.List(face_stages)
    self.sound_layers = convolutions.rows(1, SOUND, width, **how)
    features = convolutions.scaled(512, width)
    decoder_stages = [
      nnx.List([Convolution(features, features, 1, **how)]),
    ]
    for channels, *sizes, num_residual in _DECODER:
      features += kept.pop()
      channels = convolutions.scaled(channels, width)
      stage = [TransposedConvolution(features, channels, 3, *sizes, **how)]
      stage += [
        Convolution(channels, channels, 3, 1, 1, residual=True, **how)
        for _ in range(num_residual)
      ]
      decoder_stages.append(nnx.List(stage))
      features = channels
    self.decoder_stages = nnx.List(decoder_stages)
    self.output = Output(features + kept.pop(), width, **how)

  def __call__(
    self, masked: jax.Array, reference: jax.Array, mels: jax.Array
  ) -> jax.Array:
    """Draws the faces that say what is heard.

    Args:
      masked: float32 (B, T, 96, 96, 3), RGB in [0, 1], the lower half 0.
      reference: the same of another time, whole.
      mels: float32 (B, T, 16, 80), of each frame.

    Returns:
      float32 (B, T, 96, 96, 3) in [0, 1].

    Raises:
      ValueError: the pictures have another size.
    """
    shape = masked.shape
    if shape[2:] != (self.image_size, self.image_size, 3):
      raise ValueError(
        f"Wav2Lip's pictures are {self.image_size} x {self.image_size} x 3, "
        f"found {' x '.join(map(str, shape[2:]))}"
      )
    x = jnp.concatenate([masked, reference], axis=-1)
    x = x.reshape(-1, *x.shape[2:])
    kept = []
    for stage in self.face_stages:
      x = convolutions.run(stage, x)
      kept.append(x)
    x = mels.reshape(-1, *mels.shape[2:])
    x = convolutions.run(self.sound_layers, inputs.mel_images(x))
    for stage in self.decoder_stages:
      x = jnp.concatenate([convolutions.run(stage, x), kept.pop()], axis=-1)
    return self.output(x).reshape(shape)


class Output(nnx.Module):
  """Features to colours: (N, S, S, C) -> float32 (N, S, S, 3) in [0, 1]."""

  def __init__(
    self,
    features: int,
    width: float,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
  ):
    hidden = convolutions.scaled(32, width)
    self.hidden = Convolution(features, hidden, 3, 1, 1, rngs=rngs, dtype=dtype)
    self.colours = nnx.Conv(hidden, 3, (1, 1), dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.colours(self.hidden(x))
    return jax.nn.sigmoid(y.astype(jnp.float32))
