"""Which part of the training videos a low-data run sees.

Axes: V videos, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def nested_order(
  strata: np.ndarray, people: Sequence[str], seed: int
) -> list[np.ndarray]:
  """Orders people so that every beginning has of each stratum its share.

  Each stratum's people, in random order, are spread evenly over the whole: so
  of the first m of n people there is of a stratum its m/n-th part, give or take
  one. One order serves all ratios: 1% is inside 10%.

  Args:
    strata: int (V,).
    people: V names; a person's videos stay together. Their stratum is that of
      most of them.
    seed: of the order.

  Returns:
    For each person in turn the numbers of their videos, ascending.
  """
  names, person = np.unique(np.asarray(people), return_inverse=True)
  videos = [np.flatnonzero(person == p) for p in range(len(names))]
  stratum = np.array([np.bincount(strata[rows]).argmax() for rows in videos])
  np_rng = np.random.default_rng(seed)
  place = np.empty(len(names))
  for s in np.unique(stratum):
    members = np_rng.permutation(np.flatnonzero(stratum == s))
    place[members] = (np.arange(len(members)) + np_rng.random()) / len(members)
  return [videos[p] for p in np.argsort(place, kind="stable")]


def take(
  ratio: float, strata: np.ndarray, people: Sequence[str], seed: int
) -> np.ndarray:
  """A part of the training videos.

  Args:
    ratio: of the people, above 0; 1 is all. At least one is taken.
    strata, people, seed: as for `nested_order`.

  Returns:
    int, ascending: the numbers of the videos.
  """
  order = nested_order(strata, people, seed)
  # 0.07 * 100 is a little more than 7.
  num = max(1, math.ceil(ratio * len(order) - 1e-9))
  return np.sort(np.concatenate(order[:num]))


def strata_of(targets: np.ndarray) -> np.ndarray:
  """The stratum of each video: its class, or its rarest label.

  Args:
    targets: (V, K) of 0, 1 and NaN, or classes (V,), NaN where unknown.

  Returns:
    int (V,); 0 where nothing is known, or no label is 1.
  """
  if targets.ndim == 1:
    return np.nan_to_num(targets + 1).astype(int)
  there = targets == 1
  by_rarity = np.argsort(there.sum(axis=0), kind="stable")
  sorted_there = there[:, by_rarity]
  return np.where(
    there.any(axis=1), 1 + by_rarity[sorted_there.argmax(axis=1)], 0
  )
