"""Metrics of a run: metrics.jsonl, trackers such as TensorBoard, progress line.

metrics.jsonl is the record of a run, which resuming and `marlin_jax.show` read.
Trackers repeat it where people look; a `Sink` of three methods is all that one
needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from marlin_jax.devices import distributed
from marlin_jax.records import extras, folders
from marlin_jax.records.cli import UserError

# Event of metrics.jsonl that holds the identifier of the run in trackers.
_TRACKED = "tracked"
# Event of a saved step whose evaluations, if any were due, have ended; with
# `is_last` if they were those of the last step.
EVALUATED = "evaluated"
_PROJECT = "marlin_jax"
# Events in tensorboardX's queue; the metrics of a step add about 40.
_MOST_EVENTS = 10_000


class TrackerError(UserError):
  """A tracker does not start; the message is its own."""


class Sink(Protocol):
  """Receives the metrics of a run, in process 0."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds finite scalars of a step; may be called several times for it."""

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 (H, W, 3)."""

  def close(self) -> None:
    """Writes what is left."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, as trackers know it.

  Attributes:
    folder: local folder of the run's small files.
    name: name of its workdir.
    config: its configuration by dotted key.
    start_step: step that it resumes from; 0: it begins.
    identifier: the same whenever the run resumes.
  """

  folder: Path
  name: str
  config: Mapping[str, Any]
  start_step: int = 0
  identifier: str = ""

  @property
  def title(self) -> str:
    """Name among the runs of a project, which may come from many workdirs."""
    return f"{self.name}-{self.identifier}"


# --- Sinks --------------------------------------------------------------------


class JsonLines:
  """metrics.jsonl: an object per line, with `step` and the scalars."""

  def __init__(self, run: Run):
    """Opens the file and removes lines of steps after `run.start_step`."""
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if _step_of(line) <= run.start_step]
    folders.write_bytes(path, "".join(f"{x}\n" for x in lines).encode())
    self._file = path.open("a", buffering=1)
    events = [x for x in map(json.loads, lines) if "event" in x]
    self.identifier = next(
      (x["id"] for x in events if x["event"] == _TRACKED), ""
    )
    # Earlier versions did not write `is_last`.
    self.evaluated_as_last = [
      x.get("is_last", True)
      for x in events
      if (x["event"], x["step"]) == (EVALUATED, run.start_step)
    ]

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Does nothing: pictures are files of the workdir."""

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """Event files in tensorboard/."""

  def __init__(self, run: Run):
    self._board = _summary_writer()(
      str(run.folder / "tensorboard"),
      purge_step=run.start_step + 1,
      # tensorboardX blocks on a full queue.
      max_queue=_MOST_EVENTS,
    )

  def _check_thread(self) -> None:
    """Raises OSError if the thread that writes the files has ended.

    It ends at the first error, and nobody would empty its queue.
    """
    events = self._board.file_writer.event_writer
    if not events._worker.is_alive():
      # Or this process would wait for its reader when it exits.
      events._event_queue.cancel_join_thread()
      raise OSError("its files could not be written, as on a full disk")

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._check_thread()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    self._check_thread()
    self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    self._check_thread()
    self._board.close()


class WeightsAndBiases:
  """A run of Weights & Biases.

  Its own variables choose place and mode: WANDB_MODE=offline, WANDB_PROJECT,
  WANDB_ENTITY. It refuses steps that go back, as after a crash: `step` is a
  metric like any other, and the horizontal axis of all.
  """

  def __init__(self, run: Run):
    import wandb

    self._image = wandb.Image
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", _PROJECT),
      name=run.title,
      id=run.identifier,
      resume="allow",
      dir=str(run.folder),
      config=dict(run.config),
    )
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log({"step": step, **scalars})

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    self._run.log({"step": step, name: self._image(picture)})

  def close(self) -> None:
    self._run.finish()


class Trackio:
  """A run of trackio: on this machine, or where TRACKIO_SPACE_ID says."""

  def __init__(self, run: Run):
    import trackio

    self._image = trackio.Image
    self._run = trackio.init(
      project=_PROJECT,
      name=run.title,
      config=dict(run.config),
      resume="allow",
      embed=False,
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    self._run.log({name: self._image(picture)}, step=step)

  def close(self) -> None:
    self._run.finish()


# The names are configuration.TRACKERS.
_TRACKERS: dict[str, Callable[[Run], Sink]] = {
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
  "trackio": Trackio,
}


def check_trackers(names: str) -> None:
  """Checks that trackers are installed.

  Args:
    names: as `config.trackers`.

  Raises:
    MissingLibraryError: one is not.
  """
  for name in filter(None, names.split(",")):
    if name in extras.LIBRARIES:
      extras.require(name, f"trackers={name}")


class MetricWriter:
  """Writes scalars and pictures of a run to its sinks, in process 0."""

  def __init__(self, run: Run, trackers: str = "tensorboard"):
    """Opens the sinks; metrics.jsonl is always one.

    Args:
      run: the run; metrics.jsonl gives its identifier.
      trackers: the others, as `config.trackers`.

    Raises:
      TrackerError: one of them does not start.
    """
    self._trackers: list[Sink] = []
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._record = JsonLines(run)
    identifier = self._record.identifier
    for name in filter(None, trackers.split(",")):
      if not identifier and name != "tensorboard":
        identifier = secrets.token_hex(4)
        self.event(_TRACKED, 0, id=identifier)
      try:
        tracker = _TRACKERS[name](
          dataclasses.replace(run, identifier=identifier)
        )
      except Exception as e:  # each has errors of its own
        self.close()
        raise TrackerError(
          f"trackers={name}: {e or type(e).__name__}. To train without it, "
          "leave it out of --config.trackers"
        ) from e
      self._trackers.append(tracker)

  def was_evaluated(self, *, is_last: bool) -> bool:
    """Returns True, on all processes, if `run.start_step` was EVALUATED.

    Args:
      is_last: as the last step, which it may not have been before.
    """
    was_evaluated = not self._writes or any(
      as_last or not is_last for as_last in self._record.evaluated_as_last
    )
    return bool(distributed.smallest(int(was_evaluated)))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds scalars of a step.

    Values that are not finite are left out: JSON cannot express them.
    """
    if self._writes:
      scalars = {k: v for k, v in scalars.items() if math.isfinite(v)}
      self._record.write(step, scalars)
      self._tell(lambda tracker: tracker.write(step, scalars))

  def event(self, name: str, step: int, **details: Any) -> None:
    """Adds an object with the key `event` to metrics.jsonl alone."""
    if self._writes:
      self._record.write(step, {"event": name, **details})

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 (H, W, 3), to the trackers."""
    if self._writes:
      self._tell(lambda tracker: tracker.write_picture(step, name, picture))

  def close(self) -> None:
    """Closes the sinks."""
    if self._writes:
      self._record.close()
      self._tell(lambda tracker: tracker.close())
      self._trackers.clear()

  def _tell(self, call: Callable[[Sink], None]) -> None:
    """Calls each tracker; one that fails is left out, and the run goes on."""
    for tracker in list(self._trackers):
      try:
        call(tracker)
      except Exception as e:  # each has errors of its own
        self._trackers.remove(tracker)
        tqdm.write(
          f"warning: {type(tracker).__name__} fails and gets no more metrics: "
          f"{e or type(e).__name__}",
          file=sys.stderr,
        )


def _summary_writer() -> type:
  """Imports tensorboardX.SummaryWriter without PyTorch.

  tensorboardX/writer.py imports PyTorch if it is installed, only for a type
  annotation, which takes 3 seconds at each start. The import fails, as if
  PyTorch was not installed, while sys.modules holds None in its place; see "The
  module cache" in the reference of Python's import system.
  """
  is_hidden = "torch" not in sys.modules
  if is_hidden:
    sys.modules["torch"] = None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if is_hidden:
      del sys.modules["torch"]
  return SummaryWriter


def _step_of(line: str) -> float:
  """Returns the step of a line of metrics.jsonl."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # the half-written last line of a killed run


def rates_text(scalars: Mapping[str, float]) -> str:
  """Describes the rates among metrics, those of `goodput.Timer.read`."""
  rates = [f"{scalars['time/clips_per_sec']:.1f} clips/s"]
  if "time/mfu" in scalars:
    rates.append(f"MFU {scalars['time/mfu']:.1%}")
  rates.append(f"data wait {scalars['time/data_wait_ratio']:.1%}")
  return ", ".join(rates)


class Progress:
  """Progress of a run, printed by process 0.

  A bar with the remaining time on a terminal; in a log file a line per report.
  """

  def __init__(
    self, total: int, *, start: int, work: Callable[[int], float] = float
  ):
    """Shows `start` of `total` steps.

    Args:
      total: steps of the run.
      start: steps already taken.
      work: maps a number of steps to what they cost, in any unit: the remaining
        time and the length of the bar are in proportion to it.
    """
    self._total, self._step, self._work = total, start, work
    self._prints = jax.process_index() == 0
    self._bar = tqdm(
      desc=self._place,
      total=work(total),
      initial=work(start),
      dynamic_ncols=True,
      # Shows every step: on small machines they are slow.
      mininterval=0.5,
      disable=not (self._prints and sys.stderr.isatty()),
      bar_format="{percentage:3.0f}%|{bar}| {desc} "
      "[{elapsed}<{remaining}{postfix}]",
    )

  def step(self) -> None:
    """Advances by a step."""
    self._step += 1
    self._bar.set_description_str(self._place, refresh=False)
    self._bar.update(self._cost(self._step))

  @property
  def _place(self) -> str:
    return f"{self._step}/{self._total}"

  def _cost(self, step: int) -> float:
    return self._work(step) - self._work(step - 1)

  def report(self, step: int, scalars: dict[str, float]) -> None:
    """Shows the losses and rates among a step's metrics."""
    losses = [
      f"{name.removeprefix('train/')} {value:.4f}"
      for name, value in scalars.items()
      if name.startswith("train/loss_") and not name.endswith("_limit")
    ]
    text = ", ".join([*losses, rates_text(scalars)])
    if not self._bar.disable:
      # A terminal cuts off the end of a long line.
      self._bar.set_postfix_str(text.replace("loss_", ""))
      return
    steps = (self._work(self._total) - self._work(step)) / self._cost(step)
    remaining = steps * scalars["time/step_secs"]
    self.say(
      f"step {step}/{self._total}: {text}, "
      f"ETA {tqdm.format_interval(remaining)}"
    )

  def say(self, line: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._prints:
      tqdm.write(line, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    """Removes the bar."""
    self._bar.close()
