"""Course of a training: network, data and step, in stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data.clips import ClipTaker
from marlin_jax.data.sampling import Draws
from marlin_jax.records import cli

# State of a training: a pytree with `step` and `num_skipped`, int32 scalars.
State = Any
Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Consecutive steps of a run that take clips of one size.

  Attributes:
    last_step: number of its last step, from 1.
    draws: clips of the training split by their place in the run. The data sets
      are those of all stages.
    take_clip: turns records into clips; see `loader.train_batches`.
    make_step: compiles the training step, (state, batch) -> (new state,
      scalars). The step may donate the old state's memory. The scalars include
      `num_skipped`, the number of updates not applied so far.
    name: such as 'stage 1 of 3'; '': the run is a single stage.
    summary: describes its clips.
    arithmetic: of one step, in a unit that all stages share.
    peak_clips_per_sec: rate at a model FLOPs utilisation of 1; None: unknown.
  """

  last_step: int
  draws: Draws
  take_clip: ClipTaker
  make_step: Callable[[], Callable[[State, dict], tuple[State, Scalars]]]
  name: str = ""
  summary: str = ""
  arithmetic: float = 1.0
  peak_clips_per_sec: float | None = None


def work(stages: Sequence[Stage], step: int) -> float:
  """Returns the arithmetic of the steps up to `step`, see `Stage`."""
  total, done = 0.0, 0
  for stage in stages:
    num_steps = max(min(stage.last_step, step) - done, 0)
    total, done = total + stage.arithmetic * num_steps, stage.last_step
  return total


class Course(Protocol):
  """Network, data and training step of a run.

  Attributes:
    config: configuration of the run; see configs/pretrain_b.py.
    stages: stages of the run; the last ends with its last step.
    fields: keys of a batch that the training step gets.
    batch_size: clips per step over all devices.
    num_steps: steps of the whole run.
    mesh: devices.
    shapes: state, as arrays or shapes.
    shardings: sharding of each array of the state.
    identity: flat dict of JSON values, saved with each checkpoint; a run
      resumes only if its values are the same.
  """

  config: ConfigDict
  stages: Sequence[Stage]
  fields: tuple[str, ...]
  batch_size: int
  num_steps: int
  mesh: Mesh
  shapes: State
  shardings: Any
  identity: dict[str, Any]

  def describe(self) -> list[cli.Row]:
    """Returns the rows that are printed when the run starts."""

  def first_state(self) -> State:
    """Returns the state before the first step, on the devices."""

  def learning_rates(self, state: State) -> dict[str, float]:
    """Returns the learning rates to log under 'train/', by name.

    Args:
      state: state after the step.
    """
