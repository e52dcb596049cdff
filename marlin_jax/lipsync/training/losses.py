"""Losses of the sync expert.

Axes: G records, N clips of a record.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below this likelihood the logarithm is continued by its tangent.
_MIN_LIKELIHOOD = 1e-3


# Of PyTorch's binary_cross_entropy: the logarithm is at least this.
_MIN_LOG = -100.0


def sync_loss(cosine: jax.Array, in_sync: jax.Array) -> jax.Array:
  """Returns the binary cross-entropy of cosines taken as probabilities.

  As github.com/Rudrabha/Wav2Lip, color_syncnet_train.py (cosine_loss), except
  where the likelihood of the true label is below 0.001: there the logarithm is
  continued by its tangent. The gradient is then at most 1000, and a cosine
  that is 0 or negative still gets a gradient of the right sign. (PyTorch clamps
  the logarithm at -100, divides by as little as 1e-12 in the gradient and
  rejects negative inputs.)

  Args:
    cosine: (B,) in [-1, 1].
    in_sync: bool (B,), the labels.

  Returns:
    float32 scalar, the mean over B.
  """
  likelihood = jnp.where(in_sync, cosine, 1 - cosine).astype(jnp.float32)
  # Clamped before the log: where() alone would give NaN gradients.
  log = jnp.log(jnp.maximum(likelihood, _MIN_LIKELIHOOD))
  tangent = (
    jnp.log(_MIN_LIKELIHOOD) + (likelihood - _MIN_LIKELIHOOD) / _MIN_LIKELIHOOD
  )
  return -jnp.mean(jnp.where(likelihood > _MIN_LIKELIHOOD, log, tangent))


def published_sync_loss(cosine: jax.Array, in_sync: jax.Array) -> jax.Array:
  """Returns the cross-entropy as PyTorch computes it, with logarithms >= -100.

  Evaluations report it, and the weight of the generator's sync loss depends on
  it: a cosine of 0 counts 100, where the tangent of `sync_loss` gives 7.9.

  Args:
    cosine: (B,) in [-1, 1]; below 0 counts as 0, where PyTorch raises.
    in_sync: bool (B,), the labels.

  Returns:
    float32 scalar, the mean over B.
  """
  likelihood = jnp.where(in_sync, cosine, 1 - cosine).astype(jnp.float32)
  log = jnp.log(jnp.clip(likelihood, 0, 1))
  return -jnp.mean(jnp.maximum(log, _MIN_LOG))


def contrastive_loss(
  cosine: jax.Array, is_compared: jax.Array, temperature: float
) -> jax.Array:
  """Returns the cross-entropy of finding the sound of frames, and vice versa.

  As InfoNCE (van den Oord et al., 2018), among the clips of the same record
  (Chung et al., ICASSP 2019, for sync).

  Args:
    cosine: (G, N, N), of the frames of a row and the sound of a column.
    is_compared: bool (G, N, N), false for sound that is nearly in sync; true on
      the diagonal.
    temperature: divides the cosines.

  Returns:
    float32 scalar, the mean over rows and columns.
  """
  logits = cosine.astype(jnp.float32) / temperature
  logits = jnp.where(is_compared, logits, -jnp.inf)

  def one_way(axis: int) -> jax.Array:
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return jnp.mean(jax.nn.logsumexp(logits, axis=axis) - own)

  return (one_way(1) + one_way(2)) / 2
