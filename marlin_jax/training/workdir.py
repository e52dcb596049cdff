"""Working directory of a run: lock, configuration, and when it is saved."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from marlin_jax.checkpoints import inventory
from marlin_jax.checkpoints.inventory import ResumeError
from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.reader import BadRecords
from marlin_jax.devices import distributed
from marlin_jax.records import folders
from marlin_jax.training import goodput, remote_files
from marlin_jax.training.configuration import Key, flat, get


def begun_with(path: epath.PathLike) -> dict[str, Any]:
  """Returns the flat configuration of the run that a workdir resumes.

  {} without one: a run that has saved nothing begins anew, with the
  configuration of the command.
  """
  path = epath.Path(path)
  if not inventory.steps(path / "checkpoints"):
    return {}
  saved = _read_config(path / "config.json")
  return flat(ConfigDict(saved)) if saved else {}


def as_begun(
  config: ConfigDict,
  keys: Mapping[str, Key],
  path: epath.PathLike,
  begun: Mapping[str, Any],
) -> tuple[ConfigDict, list[str]]:
  """Gives keys with `keeps_before` the value that the run in a workdir has.

  Args:
    config: configuration of the command.
    keys: rules of its keys.
    path: workdir, for the lines.
    begun: from `begun_with`; it lacks keys that are younger than the run.

  Returns:
    The configuration, which may have become invalid, and a line for each value
    that changed. Keys in `allow_change` do not change.
  """
  if not begun:
    return config, []
  kept = {
    key: rule.before
    for key, rule in keys.items()
    if rule.keeps_before
    and begun.get(key, rule.before) == rule.before != get(config, key)
    and key not in config.allow_change.split(",")
  }
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(kept)
  return changed, [
    f"the run in {path} began with {key}={value!r} and goes on with it, not "
    f"with {get(config, key)!r}; config.allow_change={key} would change it"
    for key, value in kept.items()
  ]


def check_config(file: epath.Path, config: ConfigDict) -> None:
  """Raises OutputFolderError if a config.json is not of a run.

  Args:
    file: the file; it may be missing, or half-written by a run.
    config: the configuration that is to replace it.
  """
  if (found := _read_config(file)) is None:
    return
  if 2 * len({*found} & {*config.keys()}) < len({*config.keys()}):
    raise folders.OutputFolderError(
      f"{file} was not written by a run; choose another --workdir"
    )


def _read_config(file: epath.Path) -> dict[str, Any] | None:
  """Returns the object in a config.json; None: it is missing or half-written.

  Another JSON value becomes {}.
  """
  if not file.exists():
    return None
  try:
    found = json.loads(file.read_text())
  except ValueError:
    return None
  return found if isinstance(found, dict) else {}


class Workdir:
  """The workdir of a run; a context manager that holds its lock.

  Attributes:
    path: location; may be in a bucket.
    checkpoints: the checkpoints in it.
    start_step: step of the last checkpoint; 0 without one.
    files: local folder of the small files; available after `begin`.
  """

  checkpoints: Checkpoints
  start_step: int
  files: remote_files.RunFiles

  def __init__(
    self,
    path: str,
    config: ConfigDict,
    datasets: Sequence[Dataset],
    num_values: int,
  ):
    """Stores the arguments; entering the context opens the directory.

    Args:
      path: a local path or gs://BUCKET/FOLDER.
      config: configuration of the run.
      datasets: training data.
      num_values: float32 values in a checkpoint, for the check of free space.
    """
    self.path = epath.Path(path)
    self._config, self._datasets = config, datasets
    self._num_values = num_values
    self._is_process_0 = jax.process_index() == 0

  def __enter__(self) -> Workdir:
    """Creates or opens the directory and moves damaged checkpoints aside.

    Raises:
      OutputFolderError: the folder is no workdir of a run, another run holds
        the lock, or the disk is too full for a checkpoint.
      ResumeError: the directory holds converted weights, or no checkpoint is
        intact.
      StartError: processes see different data sets or checkpoints.
    """
    with contextlib.ExitStack() as stack:
      with distributed.process_0_first():
        if self._is_process_0:
          self._check_kind()
          if folders.is_remote(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
          else:
            lock = folders.Lock(Path(self.path), "lock")
            stack.callback(lock.close)
            remote_files.check_room(Path(self.path), 4 * self._num_values)
          for note in inventory.set_damaged_aside(self.path / "checkpoints"):
            print(f"warning: {note}", flush=True)
      self.checkpoints = Checkpoints(
        str(self.path / "checkpoints"),
        keep=self._config.keep_checkpoints,
        keep_every=self._config.keep_every_steps,
        best_metric=self._config.best_metric,
        best_mode=self._config.best_mode,
      )
      self.start_step = self.checkpoints.last_saved or 0
      distributed.check_same(
        {
          **{
            f"the data set in {dataset.path}": dataset.fingerprint
            for dataset in self._datasets
          },
          f"the last step saved in {self.path}": self.start_step,
        }
      )
      if self.checkpoints.last_saved == 0:
        raise ResumeError(
          f"{self.path} holds converted weights, not a run: choose another "
          f"--workdir; pretraining starts from the weights with "
          f"--config.init_from={self.path}"
        )
      self._closing = stack.pop_all()
    return self

  def _check_kind(self) -> None:
    """Refuses data sets, features and evaluations, before a file is written."""
    is_run = (self.path / "config.json").exists()
    if (self.path / folders.SETTINGS).exists() and not is_run:
      raise folders.OutputFolderError(
        f"{self.path} holds a {folders.SETTINGS}, as data sets, features and "
        "evaluations do, and is no workdir of a run; choose another --workdir"
      )

  def __exit__(self, *error) -> None:
    self._closing.close()

  def restore(self, shapes: Any, shardings: Any, identity: dict[str, Any]):
    """Returns the state of `start_step`; see `Checkpoints.restore`."""
    return self.checkpoints.restore(
      self.start_step,
      shapes,
      shardings,
      identity,
      allow=self._config.allow_change.split(","),
    )

  def begin(self) -> None:
    """Writes config.json, after which the workdir belongs to this run.

    Raises:
      OutputFolderError: the workdir has a config.json of another program.
    """
    if self._is_process_0:
      check_config(self.path / "config.json", self._config)
      if self.start_step:
        print(f"resumed from step {self.start_step} in {self.path}", flush=True)
      text = self._config.to_json(indent=2) + "\n"
      folders.write_bytes(self.path / "config.json", text.encode())
    self.files = remote_files.RunFiles(
      self.path,
      is_temporary=self._is_process_0 and folders.is_remote(self.path),
    )

  def earlier_secs(self) -> dict[str, float] | None:
    """Returns the time that earlier processes spent, for `goodput.Timer`.

    None on all processes but process 0, which alone reports times.
    """
    if not self._is_process_0:
      return None
    return goodput.carried_over(
      self.files.path / "metrics.jsonl", self.start_step
    )

  @functools.cached_property
  def bad_records(self) -> BadRecords:
    """List of unreadable records of this process.

    Training and all evaluators share it, because it rewrites the whole file. It
    counts those that other processes had listed when it was opened.
    """
    index = jax.process_index()
    own = self.path / f"quarantine{f'.process_{index}' if index else ''}.jsonl"
    return BadRecords(
      own,
      limit=self._config.data.max_bad_records,
      others=[
        path
        for path in self.path.glob("quarantine*.jsonl")
        if path != own and path.is_file()
      ],
    )


class SaveTimer:
  """Requests a checkpoint, in process 0, when the last one is old."""

  def __init__(self, minutes: float):
    """Starts; 0 minutes: never requests one."""
    self._secs = 60 * minutes
    self.restart()

  def restart(self) -> None:
    """Starts anew: a checkpoint is being saved."""
    requests = self._secs and jax.process_index() == 0
    self._due = time.monotonic() + self._secs if requests else math.inf

  def is_due(self) -> bool:
    """Returns True once, when it is time."""
    is_due = time.monotonic() >= self._due
    if is_due:
      self._due = math.inf
    return is_due


class BestMetric:
  """Follows the metric that decides which checkpoint is the best."""

  def __init__(
    self,
    name: str,
    checkpoints: Checkpoints,
    known_by: int,
  ):
    """Stores the arguments.

    Args:
      name: config.best_metric.
      checkpoints: checkpoints of the run.
      known_by: step by which each evaluation has run in this process.
    """
    self._name, self._checkpoints = name, checkpoints
    self._known_by = known_by
    self._seen: set[str] = set()
    self._is_silent = False

  def value(self, found: Mapping[str, float]) -> float | None:
    """Returns the metric among the scalars of a step, if it is finite."""
    value = found.get(self._name, math.nan)
    return value if math.isfinite(value) else None

  def improves(self, found: Mapping[str, float]) -> bool:
    """Returns True, on all processes, if the metric is the best so far."""
    value = self.value(found)
    is_best = value is not None and self._checkpoints.is_best(value)
    return bool(found) and bool(distributed.smallest(int(is_best)))

  def missing(
    self, step: int, found: Mapping[str, float], *, is_last: bool
  ) -> str | None:
    """Returns a warning, once, if no evaluation has the metric."""
    self._seen |= found.keys()
    if self._is_silent or not (is_last or step >= self._known_by):
      return None
    self._is_silent = True
    if self._name in self._seen:
      return None
    return (
      f"warning: best_metric={self._name!r} is in no evaluation; there are: "
      + ", ".join(sorted(self._seen))
    )
