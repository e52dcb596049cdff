"""Bootstrap over groups of examples, such as people, and its intervals.

Axes: V examples, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Draws at once times examples times an allowance of 100 labels per example.
# More would need gigabytes.
_MAX_WEIGHTS = 20_000_000
_ALLOWED_LABELS = 100


def draws(
  measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
  groups: Sequence[str],
  *,
  num_resamples: int,
  seed: int = 0,
  report: Callable[[int], object] = lambda num: None,
) -> dict[str, np.ndarray]:
  """Returns scores of resampled data, by drawing whole groups.

  The videos of one person are alike, so intervals from resampling videos would
  be too narrow (Field and Welsh, JRSS B 2007).

  Args:
    measure: maps weights (V, R) to scores (R,) by name.
    groups: V names: the group of each example, such as a person.
    num_resamples: number of draws with replacement.
    seed: seed of the draws: with the same groups the draws are the same, and
      the first of more draws too.
    report: called with the number of draws done since the last call.

  Returns:
    float64 (R,) by name; NaN where a score is not defined, or if there is a
    single group.
  """
  names, group = np.unique(np.asarray(groups), return_inverse=True)
  np_rng = np.random.default_rng(seed)
  parts: dict[str, list[np.ndarray]] = {}
  draws_at_once = max(1, _MAX_WEIGHTS // (_ALLOWED_LABELS * len(group)))
  for first in range(0, num_resamples, draws_at_once):
    num = min(draws_at_once, num_resamples - first)
    times = np_rng.multinomial(
      len(names), np.full(len(names), 1 / len(names)), size=num
    )
    weights = times.astype(np.float64).T[group]
    for name, values in measure(weights).items():
      parts.setdefault(name, []).append(values)
    report(num)
  drawn = {name: np.concatenate(values) for name, values in parts.items()}
  if len(names) < 2:
    return {
      name: np.full_like(values, np.nan) for name, values in drawn.items()
    }
  return drawn


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Returns the percentile interval of draws, (R,); NaN if none is defined."""
  draws = draws[np.isfinite(draws)]
  if not len(draws):
    return float("nan"), float("nan")
  low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
  return float(low), float(high)
