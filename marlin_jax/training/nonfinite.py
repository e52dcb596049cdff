"""Steps that were not applied, because something in them was not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from marlin_jax.data.prepared_dataset import Dataset, DatasetError, RecordSource
from marlin_jax.records.cli import UserError


class NotFiniteError(UserError):
  """A loss or a gradient is not finite, too often to go on."""


class SkippedStep(NamedTuple):
  """A step that changed nothing.

  Attributes:
    step: its number.
    not_finite: the metrics that were not, as text, by name.
    clips: names of the records that its clips came from.
  """

  step: int
  not_finite: dict[str, str]
  clips: list[str]

  def __str__(self) -> str:
    numbers = ", ".join(f"{k} {v}" for k, v in self.not_finite.items())
    clips = ", ".join(self.clips[:4])
    more = f" and {len(self.clips) - 4} more" if len(self.clips) > 4 else ""
    return f"step {self.step} not applied: {numbers}; clips of {clips}{more}"


class SkippedSteps:
  """Finds them a step later, when their metrics are known without waiting."""

  def __init__(self, dataset: Dataset, *, max_in_row: int, num_before: int):
    """Starts to count.

    Args:
      dataset: what the clips are of.
      max_in_row: how many without one that is applied are bearable.
      num_before: how many there were so far, in the whole run.
    """
    self._dataset, self._max_in_row = dataset, max_in_row
    self._pending: tuple[int, dict, jax.Array] | None = None
    self._num, self._in_row = num_before, 0

  def check(self) -> SkippedStep | None:
    """Looks at the step that was last given to `follow`.

    To be called by all processes alike, when the step is done.

    Raises:
      NotFiniteError: it was one too many in a row.
    """
    if self._pending is None:
      return None
    (step, scalars, ids), self._pending = self._pending, None
    before, self._num = self._num, int(scalars["num_skipped"])
    if self._num == before:
      self._in_row = 0
      return None
    self._in_row += 1
    values = {name: float(value) for name, value in scalars.items()}
    bad = {k: str(v) for k, v in values.items() if not math.isfinite(v)}
    found = SkippedStep(step, bad, self._names(ids))
    if self._in_row >= self._max_in_row:
      raise NotFiniteError(
        f"{found}\nThat was the last of {self._in_row} in a row, and "
        f"config.max_skipped_steps is {self._max_in_row}. What is saved is "
        "finite. A lower optim.base_lr or adv.weight, adv.max_pull=10 or dtype "
        "float32 may help, from the last checkpoint with config.allow_change."
      )
    return found

  def follow(self, step: int, scalars: dict[str, jax.Array], ids: jax.Array):
    """Remembers a step that has been started.

    Args:
      step: its number.
      scalars: its metrics.
      ids: int (B,), the records of its clips, spread over the devices.
    """
    self._pending = step, scalars, ids

  def _names(self, ids: jax.Array) -> list[str]:
    ids = multihost_utils.process_allgather(ids, tiled=True)
    source = RecordSource(self._dataset)
    return [self._name(source, int(i)) for i in np.ravel(ids)]

  def _name(self, source: RecordSource, index: int) -> str:
    try:
      return source[index][1].name
    except DatasetError:
      return f"record {index}"
