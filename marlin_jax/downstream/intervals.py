"""Bootstrap intervals of scores.

Axes: V examples, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Draws at once times examples times an allowance of 100 labels per example.
# More would need gigabytes.
_MAX_WEIGHTS = 20_000_000
_ALLOWED_LABELS = 100


def bootstrap(
  measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
  groups: Sequence[str],
  *,
  num_resamples: int,
  seed: int = 0,
  level: float = 0.95,
  report: Callable[[int], object] = lambda num: None,
) -> dict[str, tuple[float, float]]:
  """Returns percentile intervals from resampling whole groups.

  The videos of one person are alike, so intervals from resampling videos would
  be too narrow (Field and Welsh, JRSS B 2007).

  Args:
    measure: maps weights (V, R) to scores (R,) by name.
    groups: V names of the group, such as the person, of each example.
    num_resamples: number of draws with replacement.
    seed: of the draws.
    level: share of the draws inside the interval.
    report: called with the number of draws done since the last call.

  Returns:
    Lower and upper end by name; NaN for a score that is never defined, or if
    there is a single group.
  """
  names, group = np.unique(np.asarray(groups), return_inverse=True)
  np_rng = np.random.default_rng(seed)
  draws: dict[str, list[np.ndarray]] = {}
  draws_at_once = max(1, _MAX_WEIGHTS // (_ALLOWED_LABELS * len(group)))
  for first in range(0, num_resamples, draws_at_once):
    num = min(draws_at_once, num_resamples - first)
    times = np_rng.multinomial(
      len(names), np.full(len(names), 1 / len(names)), size=num
    )
    weights = times.astype(np.float64).T[group]
    for name, values in measure(weights).items():
      draws.setdefault(name, []).append(values)
    report(num)
  tails = [50 * (1 - level), 50 * (1 + level)]
  intervals = {}
  for name, parts in draws.items():
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if len(names) < 2 or not len(values):
      intervals[name] = (float("nan"), float("nan"))
    else:
      low, high = np.percentile(values, tails)
      intervals[name] = (float(low), float(high))
  return intervals
