"""The expert that judges whether lips and sound are in sync.

Wav2Lip's SyncNet_color (Prajwal et al. 2020, section 3.1; layers of
github.com/Rudrabha/Wav2Lip, models/syncnet.py): lips and sound of a window each
become one unit vector, whose product is the probability of being in sync.

Axes: B clips, T frames, S picture side, M mel columns, D size of the vectors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.lipsync.networks import convolutions, inputs

# Of the lower half that the face layers reduce to one pixel.
HEIGHT, WIDTH = 48, 96
# Frames of a window -> mel columns: 80 a second at 25 frames a second.
MEL_COLUMNS = {5: 16, 16: 52}
# By what the sound layers shrink time where the published ones, for 16 columns,
# do not: 52 columns would not come down to 3 before the last convolution.
_TIME_STRIDES = {5: 1, 16: 3}

# Rows of convolutions.rows.
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


def _sound(time_stride: int):
  return (
    (32, 3, 1, 1, 2),
    (64, 3, (3, time_stride), 1, 2),
    (128, 3, 3, 1, 2),
    (256, 3, (3, 2), 1, 2),
    (512, 3, 1, 0, 0),
    (512, 1, 1, 0, 0),
  )


class SyncExpert(nnx.Module):
  """Windows of 5 frames (Wav2Lip's) or 16 (MARLIN's clips).

  How the authors changed the network for 16 frames is not known (their thread
  #16: retrained with 16); here the first face layer takes 48 channels instead
  of 15, and the sound layers shrink time once more. Any picture size is first
  reduced to Wav2Lip's, which the layers ask for; the authors' may see 224.

  Attributes:
    num_frames: T.
    mel_columns: M.
  """

  def __init__(
    self,
    num_frames: int,
    *,
    rngs: nnx.Rngs,
    width: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
  ):
    """Draws the weights.

    Args:
      num_frames: a key of MEL_COLUMNS.
      rngs: `params`.
      width: channels as a multiple of the published; D is 512 times it.
      dtype: of the convolutions.

    Raises:
      ValueError: there is no such window.
    """
    if num_frames not in MEL_COLUMNS:
      raise ValueError(
        f"no expert for windows of {num_frames} frames, expected one of "
        f"{', '.join(map(str, MEL_COLUMNS))}"
      )
    self.num_frames = num_frames
    self.mel_columns = MEL_COLUMNS[num_frames]
    how = {"width": width, "rngs": rngs, "dtype": dtype}
    self.face_layers = convolutions.rows(3 * num_frames, _FACE, **how)
    self.sound_layers = convolutions.rows(
      1, _sound(_TIME_STRIDES[num_frames]), **how
    )

  def faces(self, video: jax.Array) -> jax.Array:
    """Lips as vectors.

    Args:
      video: float32 (B, T, S, S, 3), RGB in [0, 1], whole faces.

    Returns:
      float32 (B, D), of length 1, no component below 0.
    """
    b, t, *_ = video.shape
    lips = inputs.resize(inputs.lower_half(video), HEIGHT, WIDTH)
    # The frames side by side as channels, each frame's colours together.
    lips = lips.transpose(0, 2, 3, 1, 4).reshape(b, HEIGHT, WIDTH, 3 * t)
    return _unit(convolutions.run(self.face_layers, lips))

  def sound(self, mel: jax.Array) -> jax.Array:
    """Sound as vectors: float32 (B, M, 80) -> (B, D), as of `faces`."""
    pictures = inputs.mel_images(mel)
    return _unit(convolutions.run(self.sound_layers, pictures))


def _unit(x: jax.Array) -> jax.Array:
  """(B, 1, 1, D) -> float32 (B, D) of length 1, or 0 where all of it is."""
  x = x.reshape(len(x), -1).astype(jnp.float32)
  # Not of the length: its slope at 0 is not finite.
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
