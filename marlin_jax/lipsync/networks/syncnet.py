"""SyncNet, the network behind published lip-sync scores.

Chung and Zisserman 2016, in the version whose weights are used for LSE-D and
LSE-C; layers of github.com/joonson/syncnet_python, SyncNetModel.py. It is used
with published weights only, in evaluation mode.

Axes: N windows of 5 frames.
"""

from __future__ import annotations

import jax
from flax import nnx

from marlin_jax.lipsync.networks.convolutions import Convolution, batch_norm

NUM_FRAMES, IMAGE_SIZE = 5, 224
# 0.2 seconds of coefficients, one row every 10 ms.
MFCC_ROWS, NUM_MFCC = 20, 13

# Channels, kernel, strides, padding; then window, strides and padding of the
# pooling, or None. Axes: frames, height, width.
_FACE = (
  ((96, (5, 7, 7), (1, 2, 2), 0), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
  ((256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
  ((256, (1, 3, 3), 1, (0, 1, 1)), None),
  ((256, (1, 3, 3), 1, (0, 1, 1)), None),
  ((256, (1, 3, 3), 1, (0, 1, 1)), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
  ((512, (1, 6, 6), 1, 0), None),
)
# Axes: coefficients, time.
_SOUND = (
  ((64, 3, 1, 1), None),
  ((192, 3, 1, 1), ((3, 3), (1, 2), (0, 0))),
  ((384, 3, 1, 1), None),
  ((256, 3, 1, 1), None),
  ((256, 3, 1, 1), ((3, 3), (2, 2), (0, 0))),
  ((512, (5, 4), 1, 0), None),
)


class SyncNet(nnx.Module):
  """Embeds lips and sound of 0.2 seconds; a small distance means in sync."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.face_layers = _layers(3, _FACE, 3, rngs)
    self.face_out = Out(rngs)
    self.sound_layers = _layers(1, _SOUND, 2, rngs)
    self.sound_out = Out(rngs)

  def faces(self, frames: jax.Array) -> jax.Array:
    """Embeds the lips of windows.

    Args:
      frames: float32 (N, 5, 224, 224, 3), whole faces, BGR in [0, 255].

    Returns:
      float32 (N, 1024), not normalised.
    """
    return self.face_out(_apply_pooled(self.face_layers, _FACE, frames))

  def sound(self, mfcc: jax.Array) -> jax.Array:
    """Embeds the sound of windows.

    Args:
      mfcc: float32 (N, 20, 13), time first.

    Returns:
      float32 (N, 1024), not normalised.
    """
    images = mfcc.swapaxes(1, 2)[..., None]
    return self.sound_out(_apply_pooled(self.sound_layers, _SOUND, images))


class Out(nnx.Module):
  """Head of two linear layers with batch norm and ReLU between them."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(512, 512, rngs=rngs)
    self.norm = batch_norm(512, rngs)
    self.linear = nnx.Linear(512, 1024, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.hidden(x.reshape(len(x), -1))
    return self.linear(jax.nn.relu(self.norm(x)))


def _layers(features_in, table, num_axes, rngs):
  layers = []
  for (features_out, *sizes), _ in table:
    layers.append(
      Convolution(
        features_in, features_out, *sizes, num_axes=num_axes, rngs=rngs
      )
    )
    features_in = features_out
  return nnx.List(layers)


def _apply_pooled(layers, table, x):
  """Applies layers, each followed by the pooling in its row of the table."""
  for layer, (_, pooling) in zip(layers, table, strict=True):
    x = layer(x)
    if pooling:
      window, strides, padding = pooling
      x = nnx.max_pool(x, window, strides, [(p, p) for p in padding])
  return x
