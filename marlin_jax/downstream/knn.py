"""k nearest neighbours: what features know without any training.

Axes: V videos, M training videos, D features, K labels or classes.
"""

from __future__ import annotations

import numpy as np

# Videos compared at a time with all training videos.
_AT_ONCE = 512


def predict(
  features: np.ndarray,
  train: np.ndarray,
  wanted: np.ndarray,
  known: np.ndarray,
  *,
  k: int,
  temperature: float,
) -> np.ndarray:
  """Weighted votes of the nearest by cosine, as DINO's (ICCV 2021).

  Args:
    features: (V, D).
    train: (M, D).
    wanted: (M, K) in [0, 1].
    known: (M, K), 0 where a training video's label is unknown: it then has no
      vote.
    k: how many vote; all where there are fewer.
    temperature: a vote weighs exp(cosine / temperature).

  Returns:
    float64 (V, K), in [0, 1]; where nobody votes, the mean of all.
  """
  train, k = _unit(train), min(k, len(train))
  mean = (wanted * known).sum(0) / np.maximum(known.sum(0), 1)
  votes = np.empty((len(features), wanted.shape[1]))
  for first in range(0, len(features), _AT_ONCE):
    cosines = _unit(features[first : first + _AT_ONCE]) @ train.T
    # Stable: of equally near ones the first.
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(cosines, nearest, axis=1)
    weight = np.exp((near - near[:, :1]) / temperature)[..., None]
    weight = weight * known[nearest]
    total = weight.sum(1)
    voted = (weight * wanted[nearest]).sum(1) / np.maximum(total, 1e-30)
    votes[first : first + _AT_ONCE] = np.where(total > 0, voted, mean)
  return votes


def _unit(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
