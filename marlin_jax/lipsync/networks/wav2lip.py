"""Wav2Lip's convolutional generator, the baseline of MARLIN's.

Prajwal et al. 2020, section 3.3; layers of github.com/Rudrabha/Wav2Lip,
models/wav2lip.py.

Axes: B clips, T frames, N = B T, S side of the images, C channels.
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

# Rows as in convolutions.conv_stack. The output of each block is a skip
# connection to the decoder; sides of these: 96, 48, 24, 12, 6, 3, 1.
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
  """Generator that draws each frame from a masked face, a reference and sound.

  Attributes:
    num_frames: T of the windows used in training; `__call__` takes any T.
    image_size: side of the images in pixels, S.
    mixes_frames: False: each frame is drawn by itself.
  """

  num_frames = 5
  image_size = 96
  mixes_frames = False

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
    layer_args = {"rngs": rngs, "dtype": dtype}
    # 6 channels: the masked face and the reference.
    face_stages, skip_channels, features = [], [], 6
    for table in _FACE:
      face_stages.append(
        convolutions.conv_stack(features, table, width, **layer_args)
      )
      features = convolutions.scaled_channels(table[-1][0], width)
      skip_channels.append(features)
    self.face_stages = nnx.List(face_stages)
    self.sound_layers = convolutions.conv_stack(1, SOUND, width, **layer_args)
    features = convolutions.scaled_channels(512, width)
    decoder_stages = [
      nnx.List([Convolution(features, features, 1, **layer_args)]),
    ]
    for channels, *sizes, num_residual in _DECODER:
      features += skip_channels.pop()
      channels = convolutions.scaled_channels(channels, width)
      stage = [
        TransposedConvolution(features, channels, 3, *sizes, **layer_args)
      ]
      stage += [
        Convolution(channels, channels, 3, 1, 1, residual=True, **layer_args)
        for _ in range(num_residual)
      ]
      decoder_stages.append(nnx.List(stage))
      features = channels
    self.decoder_stages = nnx.List(decoder_stages)
    self.output = Output(features + skip_channels.pop(), width, **layer_args)

  def __call__(
    self, masked: jax.Array, reference: jax.Array, mels: jax.Array
  ) -> jax.Array:
    """Draws faces that fit the sound.

    Args:
      masked: float32 (B, T, 96, 96, 3), RGB in [0, 1], the lower half 0.
      reference: float32 (B, T, 96, 96, 3), RGB in [0, 1], whole faces of the
        same person, at another time in training.
      mels: float32 (B, T, 16, 80), the window of each frame.

    Returns:
      float32 (B, T, 96, 96, 3) in [0, 1].

    Raises:
      ValueError: the images have another size.
    """
    shape = masked.shape
    if shape[2:] != (self.image_size, self.image_size, 3):
      raise ValueError(
        f"Wav2Lip's images are {self.image_size} x {self.image_size} x 3, "
        f"found {' x '.join(map(str, shape[2:]))}"
      )
    x = jnp.concatenate([masked, reference], axis=-1)
    x = x.reshape(-1, *x.shape[2:])
    skips = []
    for stage in self.face_stages:
      x = convolutions.apply_layers(stage, x)
      skips.append(x)
    mel = inputs.mel_images(mels.reshape(-1, *mels.shape[2:]))
    x = convolutions.apply_layers(self.sound_layers, mel)
    for stage in self.decoder_stages:
      x = convolutions.apply_layers(stage, x)
      x = jnp.concatenate([x, skips.pop()], axis=-1)
    return self.output(x).reshape(shape)


class Output(nnx.Module):
  """Output head: (N, S, S, C) -> float32 (N, S, S, 3), RGB in [0, 1]."""

  def __init__(
    self,
    features: int,
    width: float,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
  ):
    hidden = convolutions.scaled_channels(32, width)
    self.hidden = Convolution(features, hidden, 3, 1, 1, rngs=rngs, dtype=dtype)
    self.colours = nnx.Conv(hidden, 3, (1, 1), dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.colours(self.hidden(x))
    return jax.nn.sigmoid(y.astype(jnp.float32))
