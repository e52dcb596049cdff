"""Loss of the sync expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below this likelihood the logarithm is continued by its tangent.
_MIN_LIKELIHOOD = 1e-3


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
