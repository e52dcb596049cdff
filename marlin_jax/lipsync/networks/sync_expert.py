"""Expert that judges whether lips and sound are in sync.

Wav2Lip's SyncNet_color (Prajwal et al. 2020, section 3.1; layers of
github.com/Rudrabha/Wav2Lip, models/syncnet.py). It embeds the lips and the
sound of a window as unit vectors; their dot product is the probability of being
in sync.

Axes: B clips, T frames, S side of the images, M mel rows, D embedding size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.lipsync.networks import convolutions, inputs

# Heights of the lower half that the face layers reduce to one pixel; its width
# is twice as much.
HEIGHT, SMALL_HEIGHT = 48, 24
# Frames of a window -> mel rows: 80 per second at 25 frames per second.
MEL_ROWS = {5: 16, 16: 52}
# Stride over time added to the published sound layers. The 52 rows of 16 frames
# would otherwise not be reduced to 3 before the last convolution.
_TIME_STRIDES = {5: 1, 16: 3}

# Rows as in convolutions.conv_stack.
_FACE = (
  (32, 7, 1, 3, 0),
  (64, 5, (1, 2), 1, 2),
  (128, 3, 2, 1, 3),
  (256, 3, 2, 1, 2),
  (512, 3, 2, 1, 2),
  (512, 3, 2, 1, 0),
  (512, 3, 1, 0, 0),
  (512, 1, 1, 0, 0),
)


# Row of _FACE that pictures of half the height do without.
_SMALL_WITHOUT = 4


def _face_table(height: int):
  if height == HEIGHT:
    return _FACE
  return _FACE[:_SMALL_WITHOUT] + _FACE[_SMALL_WITHOUT + 1 :]


def _sound_table(time_stride: int):
  return (
    (32, 3, 1, 1, 2),
    (64, 3, (3, time_stride), 1, 2),
    (128, 3, 3, 1, 2),
    (256, 3, (3, 2), 1, 2),
    (512, 3, 1, 0, 0),
    (512, 1, 1, 0, 0),
  )


class SyncExpert(nnx.Module):
  """Embeds windows of 5 frames (Wav2Lip's) or 16 (MARLIN's clips).

  How the authors adapted the network to 16 frames is unknown (their issue #16:
  retrained with 16). Here the first face layer takes 48 channels instead of 15,
  and the sound layers have one more stride over time. Images of any size are
  first resized to Wav2Lip's, which the layers require; the authors' network may
  see 224 pixels.

  Attributes:
    num_frames: frames of a window, T.
    num_mel_rows: mel rows of a window, M.
    height: height of the lower half of the face in pixels.
  """

  def __init__(
    self,
    num_frames: int,
    *,
    rngs: nnx.Rngs,
    width: float = 1.0,
    height: int = HEIGHT,
    dtype: jnp.dtype = jnp.float32,
  ):
    """Initialises the weights.

    Args:
      num_frames: frames of a window, 5 or 16.
      rngs: random streams; `params` initialises the weights.
      width: multiplies the published numbers of channels; D is 512 times it.
      height: 48 as published, or 24, with one layer less and a fourth of the
        computation.
      dtype: dtype of the convolutions.

    Raises:
      ValueError: `num_frames` is neither 5 nor 16, or `height` neither 48 nor
        24.
    """
    if height not in (HEIGHT, SMALL_HEIGHT):
      raise ValueError(
        f"no expert for pictures {height} pixels high, expected {HEIGHT} or "
        f"{SMALL_HEIGHT}"
      )
    if num_frames not in MEL_ROWS:
      raise ValueError(
        f"no expert for windows of {num_frames} frames, expected one of "
        f"{', '.join(map(str, MEL_ROWS))}"
      )
    self.num_frames = num_frames
    self.num_mel_rows = MEL_ROWS[num_frames]
    self.height = height
    layer_args = {"width": width, "rngs": rngs, "dtype": dtype}
    self.face_layers = convolutions.conv_stack(
      3 * num_frames, _face_table(height), **layer_args
    )
    self.sound_layers = convolutions.conv_stack(
      1, _sound_table(_TIME_STRIDES[num_frames]), **layer_args
    )

  def faces(self, video: jax.Array) -> jax.Array:
    """Embeds the lips of windows.

    Args:
      video: float32 (B, T, S, S, 3), RGB in [0, 1], whole faces.

    Returns:
      float32 (B, D), unit vectors without negative components.
    """
    b, t, *_ = video.shape
    size = self.height, 2 * self.height
    lips = inputs.resize(inputs.lower_half(video), *size)
    # Frames become channels, each frame's RGB together.
    lips = lips.transpose(0, 2, 3, 1, 4).reshape(b, *size, 3 * t)
    return _unit(convolutions.apply_layers(self.face_layers, lips))

  def sound(self, mel: jax.Array) -> jax.Array:
    """Embeds the sound of windows.

    Args:
      mel: float32 (B, M, 80).

    Returns:
      float32 (B, D), unit vectors without negative components.
    """
    x = convolutions.apply_layers(self.sound_layers, inputs.mel_images(mel))
    return _unit(x)


def _unit(x: jax.Array) -> jax.Array:
  """Normalises (B, 1, 1, D) to float32 (B, D) of length 1; zeros stay zeros."""
  x = x.reshape(len(x), -1).astype(jnp.float32)
  # Not by the length, whose gradient is infinite at 0.
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
