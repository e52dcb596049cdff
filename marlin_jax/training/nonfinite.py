"""Reports steps that were skipped because a loss or gradient was not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from marlin_jax.data.prepared_dataset import Dataset, DatasetError, RecordSource
from marlin_jax.records.cli import UserError


class NotFiniteError(UserError):
  """Too many steps in a row without a finite loss and gradient."""


class SkippedStep(NamedTuple):
  """Step that was not applied.

  Attributes:
    step: number of the step.
    not_finite: the metrics that were not finite, as text, by name.
    clips: names of the records of its clips.
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
  """Detects skipped steps, one step late, when their metrics are ready."""

  def __init__(self, dataset: Dataset, *, max_in_row: int, num_before: int):
    """Initialises the counters.

    Args:
      dataset: data set of the clips.
      max_in_row: number of skipped steps in a row that ends the run.
      num_before: skipped steps of the run so far.
    """
    self._dataset, self._max_in_row = dataset, max_in_row
    self._pending: tuple[int, dict, jax.Array] | None = None
    self._num, self._in_row = num_before, 0

  def check(self) -> SkippedStep | None:
    """Checks the step last given to `follow`; waits until it is done.

    Called by all processes together.

    Returns:
      The step if it was skipped and was not checked before, else None.

    Raises:
      NotFiniteError: `max_in_row` steps in a row were skipped.
    """
    if self._pending is None:
      return None
    (step, scalars, ids), self._pending = self._pending, None
    num_before, self._num = self._num, int(scalars["num_skipped"])
    if self._num == num_before:
      self._in_row = 0
      return None
    self._in_row += 1
    values = {name: float(value) for name, value in scalars.items()}
    not_finite = {k: str(v) for k, v in values.items() if not math.isfinite(v)}
    skipped = SkippedStep(step, not_finite, self._names(ids))
    if self._in_row >= self._max_in_row:
      raise NotFiniteError(
        f"{skipped}\nThis was the last of {self._in_row} in a row, and "
        f"config.max_skipped_steps is {self._max_in_row}. All checkpoints are "
        "finite. To resume from the last one with a lower optim.base_lr or "
        "adv.weight, with adv.max_pull=10 or with dtype=float32, name the keys "
        "that change in config.allow_change."
      )
    return skipped

  def follow(self, step: int, scalars: dict[str, jax.Array], ids: jax.Array):
    """Registers a dispatched step for the next call of `check`.

    Args:
      step: number of the step.
      scalars: its metrics, with `num_skipped`.
      ids: int (B,), numbers of the clips' records, sharded over the devices.
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
