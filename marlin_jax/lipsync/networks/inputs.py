"""Inputs of the lip-sync networks: images and mel spectrograms as arrays.

Axes: N images, H W pixels, S side of a square image, C channels, M mel rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def as_floats(images: jax.Array) -> jax.Array:
  """Converts uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
  """Resizes (..., H, W, C), bilinear with antialiasing.

  Images that have the size already are returned as they are.
  """
  shape = (*images.shape[:-3], height, width, images.shape[-1])
  if images.shape == shape:
    return images
  return jax.image.resize(images, shape, "bilinear")


def lower_half(images: jax.Array) -> jax.Array:
  """Crops the lower half: (..., S, S, 3) -> (..., S - S // 2, S, 3)."""
  return images[..., images.shape[-3] // 2 :, :, :]


def hide_mouth(images: jax.Array) -> jax.Array:
  """Sets the lower half of (..., S, S, 3) to black."""
  return images.at[..., images.shape[-3] // 2 :, :, :].set(0)


def mel_images(mel: jax.Array) -> jax.Array:
  """Lays mel spectrograms out as images with one row per band.

  Args:
    mel: (N, M, 80).

  Returns:
    (N, 80, M, 1).
  """
  return mel.swapaxes(-1, -2)[..., None]
