"""Frechet distance between two sets of features.

Of Gaussians with the means and covariances of the sets (Dowson and Landau
1982): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With Inception's features it
is FID (Heusel et al., NeurIPS 2017).

Axes: N, M features of the two sets, D feature size.
"""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the Frechet distance between two sets of features.

  It does not use scipy's square root of C1 C2: that matrix is not symmetric,
  and its root loses precision if there are fewer features than dimensions.
  Instead, the trace of the root is the sum of the singular values of A^T B,
  where A and B are square roots of the covariances; the centred features are
  such roots already.

  Args:
    a: float (N, D), at least two rows.
    b: float (M, D), at least two rows.

  Returns:
    The distance, at least 0; symmetric in a and b.

  Raises:
    ValueError: the shapes do not match, or a value is not finite.
  """
  for features in (a, b):
    if features.ndim != 2 or len(features) < 2 or a.shape[1:] != b.shape[1:]:
      raise ValueError(
        f"features of shapes {a.shape} and {b.shape}, expected (N, D) and "
        "(M, D) with two rows or more each"
      )
    if not np.isfinite(features).all():
      raise ValueError("features contain values that are not finite")
  (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
  cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
  total = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
  # For equal sets rounding can make the total slightly negative.
  return float(((mean_a - mean_b) ** 2).sum() + max(total, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean (D,) and R (min(N, D), D) with R^T R = covariance."""
  wide = features.astype(np.float64)
  mean = wide.mean(axis=0)
  root = (wide - mean) / np.sqrt(len(wide) - 1)
  if len(root) > root.shape[1]:
    root = np.linalg.qr(root, mode="r")
  return mean, root
