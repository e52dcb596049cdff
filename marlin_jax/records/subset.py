"""Subset of range(N), one bit for each number.

A hundred million numbers take 12.5 MB; their list would take 800 MB.
"""

from __future__ import annotations

import numpy as np

# Numbers that are counted together; a multiple of 8.
_BLOCK = 4096


class Subset:
  """Ascending numbers of a subset of range(N).

  Indexing takes time O(log N).
  """

  def __init__(self, bits: np.ndarray, ends: np.ndarray | None = None):
    """Counts the numbers.

    Args:
      bits: uint8 (ceil(N / 8),), from np.packbits of bool (N,).
      ends: counts that another Subset of these bits has made; None: they are
        counted.
    """
    self._bits, self._ends = bits, ends
    if ends is not None:
      return
    if not len(bits):
      bits = np.zeros(1, np.uint8)
    counts = np.bitwise_count(bits)
    per_block = np.add.reduceat(
      counts, np.arange(0, len(counts), _BLOCK // 8), dtype=np.int64
    )
    self._ends = np.cumsum(per_block)

  @property
  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Arguments that make the same Subset without counting."""
    return self._bits, self._ends

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, position: int) -> int:
    """Returns the number at a position, in [0, len(self))."""
    if not 0 <= position < len(self):
      raise IndexError(position)
    block = int(np.searchsorted(self._ends, position, "right"))
    before = int(self._ends[block - 1]) if block else 0
    first = block * _BLOCK
    return int(self.within(first, first + _BLOCK)[position - before])

  def within(self, first: int, stop: int) -> np.ndarray:
    """Returns the numbers of the subset in [first, stop)."""
    first_byte = first // 8
    bits = np.unpackbits(self._bits[first_byte : -(-stop // 8)])
    numbers = np.flatnonzero(bits) + 8 * first_byte
    return numbers[(numbers >= first) & (numbers < stop)]

  def mask(self, numbers: np.ndarray) -> np.ndarray:
    """Returns for each number whether the subset holds it: bool."""
    shifts = (7 - numbers % 8).astype(np.uint8)
    return (self._bits[numbers // 8] >> shifts & 1).astype(bool)
