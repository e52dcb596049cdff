"""A source of small batches that say where they belong; see prefetch_test.py.

It imports no jax, as the sources of real batches in worker processes.
"""

import dataclasses
import os
import signal
import sys
import time

import numpy as np

from marlin_jax.data.prepared_dataset import DatasetError


class Unsendable(Exception):
  """An error that pickle writes and cannot read."""

  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Makes batches of four rows in two parts.

  Attributes:
    fails_at: step that raises.
    error: the error, or how to make it.
    dies_at: step that kills its process.
  """

  fails_at: int = -1
  error: str = "dataset"
  dies_at: int = -1
  num_parts: int = 2

  def empty(self):
    return {
      "value": np.empty((4, 3), np.int32),
      "unset": np.zeros(3, bool),
      "process": np.empty(4, np.int64),
      "has_jax": np.empty(4, bool),
    }

  def fill(self, batch, step, part):
    if step == self.fails_at and self.error == "dataset":
      raise DatasetError(f"step {step} cannot be read")
    if step == self.fails_at:
      raise Unsendable("this", "that")
    if step == self.dies_at:
      os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.002 * (step % 3))  # parts do not end in order
    rows = slice(2 * part, 2 * part + 2)
    batch["value"][rows] = np.arange(3) + 10 * part + 100 * step
    batch["process"][rows] = os.getpid()
    batch["has_jax"][rows] = "jax" in sys.modules
    return part

  def receive(self, report):
    assert report in (0, 1)
