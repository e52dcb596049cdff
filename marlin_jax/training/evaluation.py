"""Evaluations of a training: when they are due, and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from marlin_jax.training import metrics
from marlin_jax.training.course import State
from marlin_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Picture:
  """Picture made by an evaluator.

  Attributes:
    name: name in TensorBoard.
    image: uint8 (rows, columns, 3), saved as PNG.
    save_animation: writes the picture as a GIF to a path; None: no animation.
  """

  name: str
  image: np.ndarray
  save_animation: Callable[[Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of an evaluator.

  Attributes:
    scalars: metrics by full name, such as 'eval/val/loss_rec'.
    sentence: the main numbers in one sentence, printed; '': nothing is printed.
    picture: picture to save; None: no picture.
    events: objects for metrics.jsonl by name.
    state: state after the evaluation, of one with `before_save` alone; None:
      unchanged.
  """

  scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  sentence: str = ""
  picture: Picture | None = None
  events: Mapping[str, dict] = dataclasses.field(default_factory=dict)
  state: State | None = None


class Evaluation(NamedTuple):
  """Evaluator with its schedule.

  Attributes:
    every: steps from one evaluation to the next. The last step is evaluated
      too, unless a signal ends the run.
    evaluator: maps a state to its result, in all processes together.
    before_save: evaluate before the checkpoint of the step, at multiples of
      `every` even when a signal ends the run. For evaluators that change the
      state.
  """

  every: int
  evaluator: Callable[[State], Result]
  before_save: bool = False

  def is_due(self, step: int, *, is_last: bool) -> bool:
    """Returns True for multiples of `every`, and for the last step."""
    return is_last or step % self.every == 0


def write_result(
  result: Result,
  step: int,
  workdir: Workdir,
  writer: metrics.MetricWriter,
  progress: metrics.Progress,
) -> None:
  """Writes and prints the result of an evaluation."""
  if result.scalars:
    writer.write(step, result.scalars)
  for name, details in result.events.items():
    writer.event(name, step, **details)
  if result.sentence:
    progress.say(f"step {step}: {result.sentence}")
  if result.picture and jax.process_index() == 0:
    folder = workdir.files.path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"step_{step:07d}.png"]
    Image.fromarray(result.picture.image).save(folder / names[0])
    if result.picture.save_animation:
      names.append(f"step_{step:07d}.gif")
      result.picture.save_animation(folder / names[1])
    writer.write_picture(step, result.picture.name, result.picture.image)
    paths = [str(workdir.path / "pictures" / name) for name in names]
    progress.say(f"step {step}: {' and '.join(paths)}")
