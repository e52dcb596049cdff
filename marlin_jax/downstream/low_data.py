"""Stratified subsets of the training videos, for low-data runs.

Axes: V videos, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def nested_order(
  strata: np.ndarray, people: Sequence[str], seed: int
) -> list[np.ndarray]:
  """Orders people so that every prefix is stratified.

  The people of each stratum, in random order, are spread evenly over the whole:
  the first m of n people include m/n of each stratum, plus or minus one person.
  All ratios share one order, so the subset of 1% is part of the subset of 10%.

  Args:
    strata: int (V,), number of the stratum of each video.
    people: V names, the person in each video. The videos of a person stay
      together, in the stratum of most of them.
    seed: seed of the random order.

  Returns:
    The numbers of the videos of each person, ascending, by person in order.
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
  """Selects a subset of the training videos.

  Args:
    ratio: share of the people, in (0, 1]; at least one person is taken.
    strata, people, seed: see `nested_order`.

  Returns:
    The numbers of the videos, int, ascending.
  """
  order = nested_order(strata, people, seed)
  # In floating point 0.07 * 100 exceeds 7.
  num = max(1, math.ceil(ratio * len(order) - 1e-9))
  return np.sort(np.concatenate(order[:num]))
