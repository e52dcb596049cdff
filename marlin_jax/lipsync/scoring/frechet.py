"""The Frechet distance between two sets of features.

That of two Gaussians with their means and covariances (Dowson and Landau 1982):
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With Inception's features it is FID
(Heusel et al., NeurIPS 2017).
"""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """Compares two sets of features.

  Without scipy's square root of C1 C2, which is no symmetric matrix and loses
  its digits where there are fewer features than dimensions: the trace is the
  sum of the singular values of A^T B, A and B being square roots of the two
  covariances, and the centred features are such roots already.

  Args:
    a: float (N, D), at least two rows.
    b: float (M, D), at least two rows.

  Returns:
    0 or more; the same for (b, a).

  Raises:
    ValueError: the shapes do not fit, or a number is not finite.
  """
  for features in (a, b):
    if features.ndim != 2 or len(features) < 2 or a.shape[1:] != b.shape[1:]:
      raise ValueError(
        f"features of shapes {a.shape} and {b.shape}, expected (N, D) and "
        "(M, D) with two rows or more each"
      )
    if not np.isfinite(features).all():
      raise ValueError("features hold numbers that are not finite")
  (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
  cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
  total = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
  # Rounding can leave equal sets a little below nothing.
  return float(((mean_a - mean_b) ** 2).sum() + max(total, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean (D,) and R (min(N, D), D) with R^T R = covariance."""
  wide = features.astype(np.float64)
  mean = wide.mean(axis=0)
  root = (wide - mean) / np.sqrt(len(wide) - 1)
  if len(root) > root.shape[1]:
    root = np.linalg.qr(root, mode="r")
  return mean, root
