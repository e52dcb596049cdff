"""Lip-sync generator with MARLIN as the face encoder.

Reconstructed from the authors' answers in their issues #1, #5, #16 and #19
(github.com/ControlNet/MARLIN); their code was never released. Known: windows of
16 frames of 224 x 224; face tokens (B, 1568, D) become maps (16 B, 14, 14,
D / 2); Wav2Lip's sound encoder gives D / 2 channels, the same at all 14 x 14
positions; a decoder of transposed convolutions, whose first stage is known
layer by layer; the input images, resized to each stage, replace Wav2Lip's skip
connections. Unknown, and chosen here:
  - Which of the 6 input channels the encoder sees, since it takes 3. Here it
    sees the upper half of the target above the lower half of the reference: a
    whole face, as in pretraining, which has no black halves. The seam lies
    between patches.
  - The later stages. Here each is like the first, with half the channels.

Axes: B clips, T frames, N = B T, S side of the images, D width of the encoder.
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

# Channels of the two input images.
_IMAGE_CHANNELS = 6
# Lower bound for the narrow encoders of tests.
_MIN_CHANNELS = 16


class MarlinGenerator(nnx.Module):
  """Generator that draws 16 frames from masked faces, references and sound.

  Attributes:
    num_frames: frames of a window, T.
    image_size: side of the images in pixels, S.
    mixes_frames: True: a frame depends on the others of its window.
    encoder: MARLIN's encoder, for unnormalised pixels.
    freeze_encoder: whether gradients are stopped before the encoder.
  """

  mixes_frames = True

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
    """Initialises all weights except the encoder's.

    Args:
      encoder: takes unnormalised pixels, see Weights.with_plain_input.
      rngs: random streams; `params` initialises the weights.
      tubelets: tubelets of the encoder; None: 16 frames of 224 x 224 pixels.
      freeze_encoder: stops gradients at the face tokens.
      sound_width: multiplies the channels of Wav2Lip's sound encoder.
      dtype: dtype of the convolutions; the encoder has its own.

    Raises:
      ValueError: the tubelets are not the encoder's, or cannot be decoded to
        images.
    """
    self.tubelets = tubelets or Tubelets()
    _check(encoder, self.tubelets)
    self.num_frames = self.tubelets.num_frames
    self.image_size = self.tubelets.image_size
    self.encoder = encoder
    self.freeze_encoder = freeze_encoder
    width = encoder.norm.num_features
    layer_args = {"rngs": rngs, "dtype": dtype}
    self.sound_layers = convolutions.conv_stack(
      1, wav2lip.SOUND, sound_width, **layer_args
    )
    self.sound_out = nnx.Linear(
      convolutions.scaled_channels(512, sound_width),
      width // self.tubelets.tubelet_size,
      **layer_args,
    )
    stages = []
    features = 2 * (width // self.tubelets.tubelet_size) + _IMAGE_CHANNELS
    # Each stage doubles the resolution: 4 stages for patches of 16 pixels.
    for i in range(1, self.tubelets.patch_size.bit_length()):
      features_out = max(width >> i, _MIN_CHANNELS) - _IMAGE_CHANNELS
      stages.append(
        nnx.List(
          [
            Convolution(features, features, 1, residual=True, **layer_args),
            Convolution(
              features, features, 3, 1, 1, residual=True, **layer_args
            ),
            TransposedConvolution(
              features, features_out, 4, 2, 1, **layer_args
            ),
          ]
        )
      )
      features = features_out + _IMAGE_CHANNELS
    self.decoder_stages = nnx.List(stages)
    self.output = wav2lip.Output(features, 1.0, **layer_args)

  def __call__(
    self, masked: jax.Array, reference: jax.Array, mels: jax.Array
  ) -> jax.Array:
    """Draws faces that fit the sound.

    Args:
      masked: float32 (B, T, S, S, 3), RGB in [0, 1], the lower half 0.
      reference: float32 (B, T, S, S, 3), RGB in [0, 1], whole faces of the same
        person, at another time in training.
      mels: float32 (B, T, 16, 80), the window of each frame.

    Returns:
      float32 (B, T, S, S, 3) in [0, 1].
    """
    faces = self._face_maps(masked, reference)  # (N, 14, 14, D / 2)
    mel = inputs.mel_images(mels.reshape(-1, *mels.shape[2:]))
    sound = convolutions.apply_layers(self.sound_layers, mel)
    sound = jnp.broadcast_to(self.sound_out(sound), faces.shape)
    images = jnp.concatenate([masked, reference], axis=-1)
    images = images.reshape(-1, *images.shape[2:])
    x = jnp.concatenate([faces, sound], axis=-1)
    for stage in self.decoder_stages:
      x = convolutions.apply_layers(stage, _append_images(x, images))
    return self.output(_append_images(x, images)).reshape(masked.shape)

  def _face_maps(self, masked: jax.Array, reference: jax.Array) -> jax.Array:
    """Encodes faces as feature maps, one per frame.

    The channels of a token are divided among the frames of its tubelet.

    Args:
      masked, reference: see `__call__`.

    Returns:
      (N, 14, 14, D / 2) for MARLIN's tubelets of 2 frames and 16 x 16 pixels.
    """
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


def _append_images(x: jax.Array, images: jax.Array) -> jax.Array:
  """Appends images as channels, resized to the feature map."""
  images = inputs.resize(images, x.shape[1], x.shape[2])
  return jnp.concatenate([x, images.astype(x.dtype)], axis=-1)


def _check(encoder: Encoder, tubelets: Tubelets) -> None:
  num_tokens = encoder.positions[...].shape[0]
  num_pixels = encoder.patch_embedding.in_features
  if (num_tokens, num_pixels) != (tubelets.num_tokens, tubelets.pixels):
    raise ValueError(
      f"the encoder has {num_tokens} tokens of {num_pixels} pixels, expected "
      f"{tubelets.num_tokens} of {tubelets.pixels} for {tubelets}"
    )
  if tubelets.patch_size & (tubelets.patch_size - 1):
    raise ValueError(
      f"the decoder doubles its resolution per stage: patches of "
      f"{tubelets.patch_size} pixels are not a power of 2"
    )
  width = encoder.norm.num_features
  if width % tubelets.tubelet_size:
    raise ValueError(
      f"a width of {width} does not divide among the "
      f"{tubelets.tubelet_size} frames of a tubelet"
    )
