"""Reports steps that were skipped: a value was not finite, or a spike."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from marlin_jax.data.prepared_dataset import Dataset, DatasetError
from marlin_jax.data.sampling import first_ids
from marlin_jax.records.cli import UserError

_MAX_NAMES = 16


# Metrics NAME with this suffix are the highest value of NAME that is applied.
_LIMIT = "_limit"


class NotFiniteError(UserError):
  """Too many steps in a row without a finite loss and gradient."""


class SkippedStep(NamedTuple):
  """Step that was not applied.

  Attributes:
    step: number of the step.
    not_finite: the metrics that were not finite, as text, by name.
    spikes: the metrics that were above their limits, and the limits, by name.
    clips: names of the records of its first clips, at most 16; only their
      numbers on processes other than process 0.
    num_clips: number of its clips.
  """

  step: int
  not_finite: dict[str, str]
  spikes: dict[str, tuple[float, float]]
  clips: list[str]
  num_clips: int

  def __str__(self) -> str:
    numbers = ", ".join(
      [f"{name} {value}" for name, value in self.not_finite.items()]
      + [
        f"{name} {value:.4g} is above {limit:.4g}"
        for name, (value, limit) in self.spikes.items()
      ]
    )
    clips = ", ".join(self.clips[:4])
    more = f" and {self.num_clips - 4} more" if self.num_clips > 4 else ""
    return f"step {self.step} not applied: {numbers}; clips of {clips}{more}"


class SkippedSteps:
  """Detects skipped steps, one step late, when their metrics are ready."""

  def __init__(
    self, datasets: Sequence[Dataset], *, max_in_row: int, num_before: int
  ):
    """Initialises the counters.

    Args:
      datasets: data sets of the clips.
      max_in_row: number of skipped steps in a row that ends the run.
      num_before: skipped steps of the run so far.
    """
    self._datasets, self._max_in_row = datasets, max_in_row
    self._first_ids = first_ids(datasets)
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
    limits = {k: values.pop(k) for k in list(values) if k.endswith(_LIMIT)}
    skipped = SkippedStep(
      step,
      {
        name: str(value)
        for name, value in values.items()
        if not math.isfinite(value) and not name.startswith("loss_rec/")
      },
      {
        name: (value, limit)
        for name, value in values.items()
        if (limit := limits.get(name + _LIMIT, math.inf)) < value < math.inf
      },
      self._names(ids),
      ids.size,
    )
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
    return [self._name(int(i)) for i in np.ravel(ids)[:_MAX_NAMES]]

  def _name(self, index: int) -> str:
    # A name is in the record, which takes reading all of it. Process 0 alone
    # writes the names.
    if jax.process_index() == 0:
      with contextlib.suppress(DatasetError):
        i = bisect.bisect_right(self._first_ids, index) - 1
        source = self._datasets[i].source
        return source[index - self._first_ids[i]][1].name
    return f"record {index}"
