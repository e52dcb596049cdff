"""Permutations without memory: bijective, uniform, fast, never changed."""

import collections
import itertools
import time

import numpy as np
import pytest

from marlin_jax.data.permutation import Permutation, WindowedPermutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4097])
def test_every_number_has_a_place_of_its_own(size):
  for seed in range(3):
    permutation = Permutation(size, (seed, 0))
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_a_few_are_equally_likely(size):
  num_keys = 2400
  counts = collections.Counter(
    tuple(map(Permutation(size, (key,)), range(size)))
    for key in range(num_keys)
  )
  every = list(itertools.permutations(range(size)))
  expected = num_keys / len(every)
  chi_square = sum((counts[p] - expected) ** 2 / expected for p in every)
  # The 0.9999 quantile is 15.1, 25.7 and 58.6.
  assert chi_square < {2: 15.1, 3: 25.7, 4: 58.6}[size]


def test_places_are_uniform_and_neighbours_are_parted():
  size, num_cells = 20_000, 20
  places = np.array([*map(Permutation(size, (1,)), range(size))])
  cell = num_cells * np.arange(size) // size, num_cells * places // size
  counts = np.zeros((num_cells, num_cells))
  np.add.at(counts, cell, 1)
  expected = size / num_cells**2
  chi_square = ((counts - expected) ** 2 / expected).sum()
  # 361 degrees of freedom: mean 361, standard deviation 27.
  assert abs(chi_square - 361) < 5 * 27
  correlation = np.corrcoef(places[:-1], places[1:])[0, 1]
  assert abs(correlation) < 5 / np.sqrt(size)


def test_another_key_gives_another_permutation():
  one, other = (
    [*map(Permutation(1000, (0, key)), range(1000))] for key in range(2)
  )
  assert np.mean(np.equal(one, other)) < 0.01


def test_a_hundred_million_numbers_take_no_time():
  start = time.perf_counter()
  permutation = Permutation(100_000_000, (0,))
  assert len({permutation(i) for i in range(1000)}) == 1000
  assert time.perf_counter() - start < 1  # a table takes 10 s and 800 MB


def test_the_permutation_never_changes():
  """Runs that have begun go on with it."""
  assert [*map(Permutation(10, (0, 0, 0)), range(10))] == [
    3,
    4,
    9,
    6,
    8,
    0,
    7,
    1,
    2,
    5,
  ]
  assert [*map(Permutation(10**8, (1, 2)), range(3))] == [
    61131628,
    41432559,
    116849,
  ]


# --- in windows ---------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 8, 64, 100, 5000])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000])
def test_windows_leave_no_number_out(size, window):
  permutation = WindowedPermutation(size, (0, 1), window)
  assert sorted(map(permutation, range(size))) == list(range(size))


def test_a_window_is_of_few_blocks_in_random_order():
  size, window = 64_000, 640
  first, second = (
    np.array([*map(WindowedPermutation(size, (key,), window), range(size))])
    for key in range(2)
  )
  windows = first.reshape(-1, window)
  # 8 blocks of 80 consecutive numbers.
  assert {len(np.unique(row // 80)) for row in windows} == {8}
  assert np.mean(np.abs(np.diff(first)) == 1) < 0.01
  # Which blocks are together is another matter in each pass.
  assert np.mean(first == second) < 0.01
  centres = [x.reshape(-1, window).mean(1) for x in (first, second)]
  assert abs(np.corrcoef(*centres)[0, 1]) < 0.4
  assert abs(np.corrcoef(centres[0], np.arange(len(windows)))[0, 1]) < 0.4
