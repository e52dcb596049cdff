"""MARLIN as the face encoder of a lip-synchronisation generator.

Put together from what the authors tell in their threads #1, #5, #16 and #19
(github.com/ControlNet/MARLIN); their code was never released. Known: windows of
16 frames of 224 x 224; face tokens (B, 1568, D) become maps (16 B, 14, 14,
D / 2); Wav2Lip's sound encoder gives D / 2 channels, the same at all 14 x 14
places; a decoder of transposed convolutions, whose first stage is known layer
by layer; Wav2Lip's skip connections give way to the input pictures, resized to
each stage. Not known, and how it is here:
  - What of the 6 input channels the encoder sees, for it takes 3. Here the
    target's upper half above the reference's lower half: a whole face, as in
    pretraining, where a black half is nothing it has seen. The seam lies
    between patches.
  - The later stages: as the first, with half the channels each.

Axes: B clips, T frames, N = B T, S picture side, D the encoder's width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.lipsync.networks import convolutions, inputs, wav2lip
from marlin_jax.lipsync.networks.convolutions import (
  Convolution,
  TransposedConvolution,
)
from marlin_jax.models.mae import Encoder

# Channels of the two input pictures.
_PICTURES = 6
# What narrow encoders, in tests, would go below.
_LEAST_CHANNELS = 16


class LipsyncGenerator(nnx.Module):
  """Half a face, a whole one and a sound become a face, 16 frames at a time.

  Attributes:
    num_frames: T.
    image_size: S.
    encoder: MARLIN's, for plain pixels.
    freeze_encoder: no gradient reaches it.
  """

  def __init__(
    self,
    encoder: Encoder,
    *,
    rngs: nnx.Rngs,
    tubelets: Tubelets | None = None,
    freeze_encoder: bool = False,
    sound_width: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
  ):
    """Draws the weights of everything but the encoder.

    Args:
      encoder: of weights for plain pixels, see Weights.with_plain_input.
      rngs: `params`.
      tubelets: the encoder's; by default 16 frames of 224 x 224.
      freeze_encoder: stops gradients at the face tokens.
      sound_width: channels of the sound encoder, as a multiple of Wav2Lip's.
      dtype: of the convolutions; the encoder has its own.

    Raises:
      ValueError: these are not the tubelets of that encoder, or they cannot
        become pictures.
    """
    self.tubelets = tubelets or Tubelets()
    _check(encoder, self.tubelets)
    self.num_frames = self.tubelets.num_frames
    self.image_size = self.tubelets.image_size
    self.encoder = encoder
    self.freeze_encoder = freeze_encoder
    width = encoder.norm.num_features
    how = {"rngs": rngs, "dtype": dtype}
    self.sound_layers = convolutions.rows(1, wav2lip.SOUND, sound_width, **how)
    self.sound_out = nnx.Linear(
      convolutions.scaled(512, sound_width),
      width // self.tubelets.tubelet_size,
      dtype=dtype,
      rngs=rngs,
    )
    stages = []
    features = 2 * (width // self.tubelets.tubelet_size) + _PICTURES
    # One doubling for each halving that a patch stands for: 4 for 16 pixels.
    for i in range(1, self.tubelets.patch_size.bit_length()):
      fewer = max(width >> i, _LEAST_CHANNELS) - _PICTURES
      stages.append(
        nnx.List(
          [
            Convolution(features, features, 1, residual=True, **how),
            Convolution(features, features, 3, 1, 1, residual=True, **how),
            TransposedConvolution(features, fewer, 4, 2, 1, **how),
          ]
        )
      )
      features = fewer + _PICTURES
    self.decoder_stages = nnx.List(stages)
    self.output = wav2lip.Output(features, 1.0, **how)

  def __call__(
    self, masked: jax.Array, reference: jax.Array, mels: jax.Array
  ) -> jax.Array:
    """Draws the faces that say what is heard.

    Args:
      masked: float32 (B, T, S, S, 3), RGB in [0, 1], the lower half 0.
      reference: the same of another time, whole.
      mels: float32 (B, T, 16, 80), of each frame.

    Returns:
      float32 (B, T, S, S, 3) in [0, 1].
    """
    faces = self._face_maps(masked, reference)  # (N, 14, 14, D / 2)
    sound = mels.reshape(-1, *mels.shape[2:])
    sound = inputs.mel_images(sound)
    sound = self.sound_out(convolutions.run(self.sound_layers, sound))
    sound = jnp.broadcast_to(sound, faces.shape)
    pictures = jnp.concatenate([masked, reference], axis=-1)
    pictures = pictures.reshape(-1, *pictures.shape[2:])
    x = jnp.concatenate([faces, sound], axis=-1)
    for stage in self.decoder_stages:
      x = convolutions.run(stage, _with_pictures(x, pictures))
    return self.output(_with_pictures(x, pictures)).reshape(masked.shape)

  def _face_maps(self, masked, reference):
    """A token's channels, cut in two, are of its tubelet's two frames."""
    half = self.image_size // 2
    video = jnp.concatenate(
      [masked[:, :, :half], reference[:, :, half:]], axis=2
    )
    tokens = self.encoder.norm(
      self.encoder.tokens(self.tubelets.patchify(video))
    )
    if self.freeze_encoder:
      tokens = jax.lax.stop_gradient(tokens)
    t, h, w = self.tubelets.grid
    pt = self.tubelets.tubelet_size
    maps = tokens.reshape(-1, t, h, w, pt, tokens.shape[-1] // pt)
    maps = maps.transpose(0, 1, 4, 2, 3, 5)
    return maps.reshape(-1, h, w, maps.shape[-1])


def _with_pictures(x, pictures):
  pictures = inputs.resize(pictures, x.shape[1], x.shape[2])
  return jnp.concatenate([x, pictures.astype(x.dtype)], axis=-1)


def _check(encoder: Encoder, tubelets: Tubelets) -> None:
  found = (encoder.positions[...].shape[0], encoder.patch_embedding.in_features)
  if found != (tubelets.num_tokens, tubelets.pixels):
    raise ValueError(
      f"the encoder has {found[0]} tokens of {found[1]} pixels, expected "
      f"{tubelets.num_tokens} of {tubelets.pixels} for {tubelets}"
    )
  if tubelets.patch_size & (tubelets.patch_size - 1):
    raise ValueError(
      f"patches of {tubelets.patch_size} pixels: the decoder doubles from 1, "
      "expected a power of 2"
    )
  width = encoder.norm.num_features
  if width % tubelets.tubelet_size:
    raise ValueError(
      f"tokens of width {width} cannot be shared among the "
      f"{tubelets.tubelet_size} frames of a tubelet"
    )
