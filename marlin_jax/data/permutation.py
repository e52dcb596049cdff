"""Pseudo-random permutations that are computed point by point.

A Feistel network permutes the numbers of 2k bits; a result beyond the size is
permuted again until it is within it (cycle walking; Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002). A permutation of any size takes no
memory, and a few microseconds per number.
"""

from __future__ import annotations

import functools

import numpy as np

_MASK = (1 << 64) - 1
# Luby and Rackoff prove 4 for large halves; small ones need more.
_NUM_ROUNDS = 8
# Halves of fewer bits give too few different permutations.
_MIN_HALF_BITS = 3
# Blocks in a window of `WindowedPermutation`.
_BLOCKS_PER_WINDOW = 8


class Permutation:
  """Permutation of range(size).

  >>> sorted(map(Permutation(3, (0,)), range(3)))
  [0, 1, 2]
  """

  def __init__(self, size: int, key: tuple[int, ...]):
    """Selects the permutation.

    Args:
      size: numbers to permute, at least 1.
      key: integers of at least 0; another key gives another permutation.
    """
    self._size = size
    half_bits = ((size - 1).bit_length() + 1) // 2
    self._half_bits = max(half_bits, _MIN_HALF_BITS)
    sequence = np.random.SeedSequence(key)
    self._keys = sequence.generate_state(_NUM_ROUNDS, np.uint64).tolist()

  def __call__(self, number: int) -> int:
    """Returns the image of `number`, in range(size)."""
    bits = self._half_bits
    mask = (1 << bits) - 1
    while True:
      left, right = number >> bits, number & mask
      for key in self._keys:
        left, right = right, left ^ (mix_bits(right ^ key) & mask)
      number = left << bits | right
      if number < self._size:
        return number


class WindowedPermutation:
  """Permutation of range(size) that reads mostly consecutive numbers.

  Blocks of consecutive numbers are permuted, then the numbers within each
  window of a few blocks. A disk or a bucket is read almost in sequence in this
  order.
  """

  def __init__(self, size: int, key: tuple[int, ...], window: int):
    """Selects the permutation.

    Args:
      size: numbers to permute, at least 1.
      key: integers of at least 0; another key gives another permutation.
      window: numbers that are permuted together, at least 1.
    """
    self._size, self._key, self._window = size, key, window
    self._block = max(window // _BLOCKS_PER_WINDOW, 1)
    # The numbers of the last block, if it is shorter, stay last.
    self._num_blocks = size // self._block
    self._blocks = Permutation(max(self._num_blocks, 1), (*key, 0))
    self._mixed = functools.lru_cache(maxsize=4)(self._permutation_within)

  def __call__(self, number: int) -> int:
    """Returns the image of `number`, in range(size)."""
    window, place = divmod(number, self._window)
    number = window * self._window + self._mixed(window)(place)
    block, place = divmod(number, self._block)
    if block < self._num_blocks:
      block = self._blocks(block)
    return block * self._block + place

  def _permutation_within(self, window: int) -> Permutation:
    size = min(self._window, self._size - window * self._window)
    return Permutation(size, (*self._key, 1, window))


def mix_bits(number: int) -> int:
  """Returns a 64-bit hash of a 64-bit number.

  The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), a bijection.
  """
  number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
  number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
  return number ^ number >> 31
