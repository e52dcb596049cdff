"""What a training does around its steps, whatever it trains.

It opens its folder, goes on where it stopped, tells how far it is, notes steps
that were not applied, saves, and ends when it is asked to. What differs stays
with train.py and lipsync/training.py: networks, data, evaluation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import loader
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.devices import distributed
from marlin_jax.records import folders
from marlin_jax.records.cli import UserError
from marlin_jax.training import (
  checkpoint,
  goodput,
  metrics,
  nonfinite,
  remote_files,
  watchdog,
)
from marlin_jax.training.configuration import flat


def carry_out(train: Callable[[], tuple[Any, int | None]]) -> None:
  """Trains; if it does not come to its end, exits as train.py tells.

  Args:
    train: returns the last state, and the signal that ended it early or None.
  """
  with distributed.leaving_on_errors():
    try:
      _, signum = train()
    except UserError as e:
      distributed.leave(f"error: {e}", code=e.exit_code)
  if signum is not None:
    sys.exit(128 + signum)


def start_processes(config: ConfigDict) -> None:
  """Joins the other processes, where there are any, before devices are used.

  Raises:
    StartError: they did not come together, or have another configuration.
  """
  distributed.initialise(config.distributed)
  distributed.check_same(
    {
      f"config.{key}": value
      for key, value in flat(config).items()
      if not key.startswith("distributed.")
    }
  )


class Workdir:
  """The folder of a run, for this run alone.

  Attributes:
    path: where it is, also in a bucket.
    config, dataset: of the run.
    held: closed when the run is over.
    checkpoints: those in it.
    start_step: the last that is saved; 0: none.
    files: where to write what is small; there after `begin`.
  """

  files: remote_files.RunFiles

  def __init__(
    self,
    path: str,
    config: ConfigDict,
    dataset: Dataset,
    num_params: int,
    held: contextlib.ExitStack,
  ):
    """Makes or opens it; sets damaged checkpoints aside.

    Args:
      path: local or gs://.
      config: of the run.
      dataset: what it trains on.
      num_params: float32 numbers in a checkpoint.
      held: gives the folder free when it is closed.

    Raises:
      OutputFolderError: another run has it, or there is no room.
      StartError: the processes see different data sets or checkpoints.
    """
    self.path = epath.Path(path)
    self.config, self.dataset, self.held = config, dataset, held
    self._is_leader = jax.process_index() == 0
    with distributed.leader_first():
      if self._is_leader:
        if remote_files.is_remote(self.path):
          self.path.mkdir(parents=True, exist_ok=True)
        else:
          lock = folders.Lock(Path(self.path), "lock")
          held.callback(lock.close)
          remote_files.check_room(Path(self.path), 4 * num_params)
        for note in checkpoint.set_damaged_aside(self.path / "checkpoints"):
          print(f"warning: {note}", flush=True)
    self.checkpoints = checkpoint.Checkpoints(
      str(self.path / "checkpoints"), keep=config.keep_checkpoints
    )
    self.start_step = self.checkpoints.last_saved or 0
    distributed.check_same(
      {
        f"the data set in {dataset.path}": dataset.fingerprint,
        f"the last step saved in {self.path}": self.start_step,
      }
    )

  def restore(self, shapes: Any, shardings: Any, identity: dict[str, Any]):
    """The state of `start_step`, as `Checkpoints.restore`."""
    return self.checkpoints.restore(
      self.start_step,
      shapes,
      shardings,
      identity,
      allow=self.config.allow_change.split(","),
    )

  def begin(self) -> None:
    """Writes the configuration: from here on the folder tells of this run."""
    if self._is_leader:
      if self.start_step:
        print(f"resumed from step {self.start_step} in {self.path}", flush=True)
      text = self.config.to_json(indent=2) + "\n"
      (self.path / "config.json").write_text(text)
    self.files = remote_files.RunFiles(
      self.path, apart=self._is_leader and remote_files.is_remote(self.path)
    )

  def seconds_before(self) -> dict[str, float] | None:
    """What goodput.Timer is to carry on from, on the first process."""
    if not self._is_leader:
      return None
    return goodput.carried_over(
      self.files.path / "metrics.jsonl", self.start_step
    )

  def bad_records(self) -> loader.BadRecords:
    """Where this process notes records that cannot be read."""
    me = jax.process_index()
    return loader.BadRecords(
      self.path / f"quarantine{f'.process_{me}' if me else ''}.jsonl",
      limit=self.config.data.max_bad_records,
    )


class Loop:
  """The steps of a run; a context manager around them.

    with loop:
      for step in loop.steps():
        state, scalars = ...
        loop.follow(scalars, ids)
        if loop.logs: loop.report(loop.train_scalars(scalars))
        if loop.saves: loop.save(state)
        if loop.due(config.eval_steps): ...
        if loop.saves: loop.publish()
    signum = loop.end(state)

  Attributes:
    step: that which is running.
    writer: of metrics and pictures.
  """

  def __init__(
    self,
    workdir: Workdir,
    mesh: Mesh,
    timer: goodput.Timer,
    *,
    num_steps: int,
    num_skipped: int,
    identity: dict[str, Any],
  ):
    """Opens what it writes.

    Args:
      workdir: has begun. The watchdog ends with what it holds, after all is
        saved.
      mesh: the devices.
      timer: of the run.
      num_steps: of the whole run.
      num_skipped: steps that were not applied before.
      identity: what a run that is resumed must agree in.
    """
    config = workdir.config
    self.step = workdir.start_step
    self._timer = timer
    self.writer = metrics.MetricWriter(
      workdir.files.path, start_step=workdir.start_step
    )
    self._workdir, self._identity = workdir, identity
    self._num_steps = num_steps
    self._progress = metrics.Progress(num_steps, start=workdir.start_step)
    self._stop = metrics.StopSignal()
    self._stop_together = distributed.StopTogether(mesh)
    self._signum: int | None = None
    self._skips = nonfinite.SkippedSteps(
      workdir.dataset,
      max_in_row=config.max_skipped_steps,
      num_before=num_skipped,
    )
    self._guard = watchdog.Watchdog(**config.watchdog)
    workdir.held.callback(self._guard.close)

  def __enter__(self) -> None:
    self._stop.__enter__()

  def __exit__(self, *error) -> None:
    self._stop.__exit__(*error)

  def steps(self) -> Iterator[int]:
    """Yields the numbers of those to be taken."""
    self._timer.enter("step")
    while self.step < self._num_steps and not self._stopping:
      self.step += 1
      self.alive(f"step {self.step}")
      yield self.step

  def alive(self, doing: str) -> None:
    """Tells the watchdog that the run does something, and what."""
    self._guard.alive(doing)

  def say(self, line: str) -> None:
    """Prints a line that stays."""
    self._progress.say(line)

  def follow(self, scalars: dict[str, jax.Array], ids: jax.Array) -> None:
    """Notes that a step has been started; looks at what has happened meanwhile.

    Args:
      scalars: its metrics.
      ids: int (B,), the records of its clips, spread over the devices.

    Raises:
      NotFiniteError: too many steps in a row were not applied.
      SaveError: a checkpoint could not be saved.
    """
    self._progress.step()
    self._tell_skipped()
    self._skips.follow(self.step, scalars, ids)
    if saved := self._workdir.checkpoints.poll():
      self.say(f"step {saved} is saved")
    # Read once: a signal in the middle of this round ends the next.
    self._signum = self._stop_together(self._stop.received)

  @property
  def _stopping(self) -> bool:
    return self._signum is not None

  def _is_turn(self, every: int) -> bool:
    is_last = self.step == self._num_steps or self._stopping
    return self.step % every == 0 or is_last

  @property
  def logs(self) -> bool:
    """Whether the metrics of this step are wanted."""
    # The first too: on a small machine the tenth may be an hour away.
    is_first = self.step == self._workdir.start_step + 1
    return self._is_turn(self._workdir.config.log_steps) or is_first

  @property
  def saves(self) -> bool:
    """Whether this step gets a checkpoint."""
    return self._is_turn(self._workdir.config.checkpoint_steps)

  def due(self, every: int) -> bool:
    """Whether it is time for what is done every so many steps, and at last.

    Not for a run that a signal ends: nobody may be left to wait for it.
    """
    return self._is_turn(every) and not self._stopping

  def train_scalars(self, scalars: dict[str, jax.Array]) -> dict[str, float]:
    """The metrics of this step, which `follow` has got, when it is done."""
    self._tell_skipped()
    return {f"train/{k}": float(v) for k, v in scalars.items()}

  def report(self, scalars: dict[str, float]) -> None:
    """Writes and shows metrics, and where the time goes."""
    scalars = scalars | self._timer.read()
    self.writer.write(self.step, scalars)
    self._progress.report(self.step, scalars)

  def save(self, state: Any) -> None:
    """Saves a checkpoint; SaveError as `Checkpoints.save`."""
    with self._timer.on("checkpoint"):
      self._workdir.checkpoints.save(self.step, state, self._identity)

  def publish(self) -> None:
    """After all that is done at the step of a checkpoint."""
    # What a run that is resumed from here has spent.
    self.writer.write(self.step, self._timer.totals())
    with self._timer.on("checkpoint"):
      self._workdir.files.publish()

  def end(self, state: Any) -> int | None:
    """Closes all that was opened.

    Args:
      state: the last.

    Returns:
      The signal that has ended the run early, or None.

    Raises:
      SaveError: as `Checkpoints.close`.
    """
    self._timer.enter("checkpoint")
    self._progress.close()
    self._workdir.checkpoints.close()
    self.writer.write(int(state.step), self._timer.totals())
    self.writer.close()
    self._workdir.files.close()
    return self._signum if int(state.step) < self._num_steps else None

  def _tell_skipped(self) -> None:
    if found := self._skips.check():
      self.writer.event("skipped", **found._asdict())
      self.say(str(found))
