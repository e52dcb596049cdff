"""Prediction by the k nearest neighbours, which needs no training.

Axes: V videos, M training videos, D features, K labels, classes or numbers.
"""

from __future__ import annotations

import numpy as np

# Videos compared with all training videos at once.
_BLOCK = 512


def predict(
  features: np.ndarray,
  train: np.ndarray,
  labels: np.ndarray,
  known: np.ndarray,
  *,
  k: int,
  temperature: float,
  centre: np.ndarray | float = 0.0,
) -> np.ndarray:
  """Returns weighted votes of the neighbours by cosine, as DINO (ICCV 2021).

  Args:
    features: (V, D).
    train: (M, D).
    labels: (M, K), in [0, 1] or numbers.
    known: (M, K), 1 where the label is known; others have no vote.
    k: number of neighbours; all if there are fewer.
    temperature: a vote has the weight exp(cosine / temperature).
    centre: (D,), taken from all features first. Where features share a large
      part, all cosines are near 1 and all votes weigh the same; the mean of
      `train` takes it away.

  Returns:
    float64 (V, K), means of labels; without votes, the mean of all training
    labels.
  """
  train, k = _unit(train - centre), min(k, len(train))
  mean = (labels * known).sum(0) / np.maximum(known.sum(0), 1)
  votes = np.empty((len(features), labels.shape[1]))
  for first in range(0, len(features), _BLOCK):
    cosines = _unit(features[first : first + _BLOCK] - centre) @ train.T
    # Stable: of equally near videos the first comes first.
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(cosines, nearest, axis=1)
    weight = np.exp((near - near[:, :1]) / temperature)[..., None]
    weight = weight * known[nearest]
    total = weight.sum(1)
    voted = (weight * labels[nearest]).sum(1) / np.where(total > 0, total, 1)
    votes[first : first + _BLOCK] = np.where(total > 0, voted, mean)
  return votes


def _unit(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
