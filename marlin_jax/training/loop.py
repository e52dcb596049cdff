"""Training loop that pretraining and lip synchronisation share.

`train` is the whole loop: batch, step, guard, log, checkpoint, evaluate, end. A
`Course` defines network, data and training step; a list of `Evaluation`s
defines the measurements.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from marlin_jax.checkpoints.inventory import ResumeError
from marlin_jax.data import loader
from marlin_jax.devices import (
  compilation_cache,
  coordination,
  distributed,
  sharding,
)
from marlin_jax.records import cli
from marlin_jax.records.cli import UserError
from marlin_jax.records.signals import StopSignal
from marlin_jax.training import goodput, metrics, profiler, skipped_steps
from marlin_jax.training.configuration import flat
from marlin_jax.training.course import Course, Scalars, Stage, State, work
from marlin_jax.training.evaluation import Evaluation, Result, write_result
from marlin_jax.training.watchdog import Watchdog
from marlin_jax.training.workdir import BestMetric, SaveTimer, Workdir


def run_training(run: Callable[[], tuple[State, int | None]]) -> None:
  """Runs a training and exits with the exit codes of marlin_jax.train.

  Args:
    run: returns the last state and the signal that ended the run early, or
      None.
  """
  profiler.accept_signals()
  with (
    goodput.running(goodput.process_age_secs()),
    distributed.leaving_on_errors(),
  ):
    try:
      _, signum = run()
    except UserError as e:
      coordination.end_all(f"error: {e}", e.exit_code)
    except OSError as e:
      if e.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      where = e.filename or "probably that of --workdir"
      coordination.end_all(
        f"error: a disk is full ({where}): {e.strerror}. Make room, then run "
        "the same command again: it resumes from the last checkpoint",
        distributed.TRY_AGAIN,
      )
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      # The same command would need as much again: not for a restart.
      coordination.end_all(
        f"error: a device is out of memory: {e}\nLower "
        "config.clips_per_device (or batch_size), or set config.remat='full'; "
        "end other programs that use the device",
        1,
      )
  if signum is not None:
    sys.exit(128 + signum)


@contextlib.contextmanager
def started(config: ConfigDict, path: str) -> Iterator[Watchdog]:
  """Joins the other processes, if any, and watches over this one.

  Enter it before devices are used.

  Args:
    config: configuration of the run.
    path: workdir.

  Raises:
    MissingLibraryError: a tracker is not installed.
    StartError: a process is missing or has another configuration.
  """
  metrics.check_trackers(config.trackers)
  compilation_cache.set_up(config.compilation_cache, path)
  with goodput.running(), Watchdog(**config.watchdog) as watchdog:
    # It has a time limit of its own.
    watchdog.alive("waiting for the other processes", is_limited=False)
    distributed.initialise(config.distributed)
    distributed.check_same(distributed.shared_values(flat(config)))
    watchdog.alive("opening the data")
    yield watchdog


def train(
  course: Course,
  make_evaluations: Callable[
    [Workdir, Callable[..., None]], Sequence[Evaluation]
  ],
  path: str,
  watchdog: Watchdog,
  check_resumed: Callable[[int], None] = lambda step: None,
) -> tuple[State, int | None]:
  """Trains until the last step or a signal.

  With the workdir of an earlier run, it resumes from the last checkpoint and
  gives the same bits as an uninterrupted run.

  Args:
    course: course to train.
    make_evaluations: maps the workdir and `watchdog.alive` to the evaluations.
      An evaluation that takes minutes calls it with a description of its work,
      such as 'the probe'.
    path: workdir; created, or resumed from.
    watchdog: from `started`.
    check_resumed: refuses to go on from a step, with a UserError; called with
      that of the last intact checkpoint.

  Returns:
    The last state, and the signal that ended the run early or None.

  Raises:
    UserError: the run cannot start, resume, save or continue.
  """
  if jax.process_index() == 0:
    reading = cli.Row("reading", str(_reading(course.config)))
    print(cli.format_rows([*course.describe(), reading]), flush=True)
  num_values = sum(math.prod(x.shape) for x in jax.tree.leaves(course.shapes))
  watchdog.alive("opening the workdir and checking its checkpoints")
  datasets = course.stages[0].draws.datasets
  with Workdir(path, course.config, datasets, num_values) as workdir:
    if workdir.start_step:
      check_resumed(workdir.start_step)
    loop = _Loop(course, make_evaluations, workdir, watchdog)
    signum = loop.run()
  return loop.state, signum


class _Loop:
  """The loop of `train`, and what it works with.

  Attributes:
    state: state after the last step that was taken.

  `_signum` is the signal that ends the run with this step, or None; `_saves` is
  True if this step is to be saved.
  """

  def __init__(
    self,
    course: Course,
    make_evaluations: Callable[
      [Workdir, Callable[..., None]], Sequence[Evaluation]
    ],
    workdir: Workdir,
    watchdog: Watchdog,
  ) -> None:
    """Restores the state, starts to read and compiles the steps."""
    config, start_step = course.config, workdir.start_step
    self._course, self._workdir, self._watchdog = course, workdir, watchdog
    watchdog.alive("restoring the state" if start_step else "the first state")
    if start_step:
      self.state = workdir.restore(
        course.shapes, course.shardings, course.identity
      )
      if start_step > course.num_steps:
        raise ResumeError(
          f"the run in {workdir.path} has taken {start_step} steps, more than "
          f"num_steps={course.num_steps}: expected at least {start_step}"
        )
    else:
      self.state = course.first_state()
    workdir.begin()

    watchdog.alive("opening the evaluations")
    self._evaluations = make_evaluations(workdir, watchdog.alive)
    self._timer = goodput.Timer(
      clips_per_step=course.batch_size, carried=workdir.earlier_secs()
    )
    stages = [s for s in course.stages if s.last_step > start_step]
    self._batches = _batches(course, stages, workdir)
    # All of them now: one that does not fit in memory is found at once.
    take_steps = []
    for stage in stages:
      watchdog.alive(f"compiling the step{stage.name and f' of {stage.name}'}")
      with self._timer.on("compile"):
        take_steps.append(stage.make_step())
    self._to_come = iter(zip(stages, take_steps, strict=True))
    self._stage: Stage | None = None

    self._writer = metrics.MetricWriter(
      metrics.Run(
        workdir.files.path, workdir.path.name, flat(config), start_step
      ),
      config.trackers,
    )
    self._progress = metrics.Progress(
      course.num_steps,
      start=start_step,
      work=functools.partial(work, course.stages),
    )
    self._skipped = skipped_steps.SkippedSteps(
      course.stages[0].draws.datasets,
      max_in_row=config.max_skipped_steps,
      num_before=int(self.state.num_skipped),
    )
    self._profiles = profiler.Profiler(
      workdir.files.path / "profile",
      str(workdir.path / "profile"),
      self._timer,
      self._progress.say,
      **config.get("profile", {}),
    )
    self._requests = distributed.Requests(course.mesh)
    self._saves, self._signum = False, None
    self._save_timer = SaveTimer(config.checkpoint_minutes)
    self._best = BestMetric(
      config.best_metric,
      workdir.checkpoints,
      start_step + max(e.every for e in self._evaluations),
    )

  @property
  def last_step(self) -> int:
    """Number of the last step that was taken."""
    return int(self.state.step)

  def run(self) -> int | None:
    """Takes the steps; returns the signal that ended the run early, or None."""
    # Signals are noted until all is saved.
    with (
      StopSignal() as self._stop,
      contextlib.closing(self._writer),
      contextlib.closing(self._progress),
    ):
      self._timer.enter("step")
      with self._profiles:
        self._evaluate_resumed()
        self._take_steps()
      self._end()
    return self._signum

  def _take_steps(self) -> None:
    """Takes the remaining steps, until a signal."""
    config, num_steps = self._course.config, self._course.num_steps
    for step in range(self._workdir.start_step + 1, num_steps + 1):
      if self._signum is not None:
        return
      self._watchdog.alive(f"step {step}")
      scalars = self._take_step(step)
      self._saves = step == num_steps or any(
        every and step % every == 0
        for every in (config.checkpoint_steps, config.keep_every_steps)
      )
      # Read once per step: a signal that arrives later stops the next step.
      self._read_requests(self._save_timer.is_due())
      self._log(step, scalars)
      self._evaluate_and_save(step)

  def _read_requests(self, save_is_due: bool = False) -> None:
    """Follows the requests of all processes to end or to save."""
    self._signum, saves = self._requests(self._stop.received, save_is_due)
    self._saves |= saves or self._signum is not None

  def _take_step(self, step: int) -> Scalars:
    """Takes a step; returns its scalars, which are still being computed."""
    timer, progress = self._timer, self._progress
    if self._stage is None or step > self._stage.last_step:
      self._stage, self._update = next(self._to_come)
      timer.begin_stage(self._stage.peak_clips_per_sec)
      if self._stage.name:
        progress.say(f"{self._stage.name}: {self._stage.summary}")
    with timer.on("data"):
      batch = next(self._batches)
    with self._profiles.step(step):
      inputs = {field: batch[field] for field in self._course.fields}
      self.state, scalars = self._update(self.state, inputs)
      timer.step_started(scalars)  # waits for the previous step

    # Guard: a step's metrics are checked while the next step runs.
    progress.step()
    self._report_skipped()
    self._skipped.follow(step, scalars, batch["_id"])
    if saved := self._workdir.checkpoints.poll():
      progress.say(f"step {saved} is saved")
    return scalars

  def _report_skipped(self) -> None:
    if skip := self._skipped.check():
      self._writer.event("skipped", **skip._asdict())
      self._progress.say(str(skip))

  def _log(self, step: int, scalars: Scalars) -> None:
    """Logs a step that is due, and the end of a stage."""
    stage = self._stage
    # On a small machine the second log may be an hour away: log the first step
    # too.
    is_first = step == self._workdir.start_step + 1
    is_last = step == self._course.num_steps or self._signum is not None
    # Rates of two stages are not mixed.
    ends_stage = step == stage.last_step
    is_due = step % self._course.config.log_steps == 0
    if is_first or is_last or ends_stage or is_due:
      self._report_skipped()
      row = {
        f"train/{k}": float(v)
        for k, v in scalars.items()
        # The step may have no clip of a data set.
        if not (k.startswith("loss_rec/") and math.isnan(v))
      }
      for name, rate in self._course.learning_rates(self.state).items():
        row[f"train/{name}"] = rate
      if stage.name:
        row["train/stage"] = self._course.stages.index(stage) + 1
      row |= self._timer.read()
      self._writer.write(step, row)
      self._progress.report(step, row)
    if ends_stage and stage.name:
      rates = self._timer.stage_rates()
      details = {"stage": stage.name, "clips": stage.summary} | {
        name.removeprefix("time/"): float(f"{rate:.4g}")
        for name, rate in rates.items()
      }
      self._writer.event("stage", step, **details)
      self._progress.say(
        f"{stage.name} ends with step {step}: {metrics.rates_text(rates)}"
      )

  def _evaluate_and_save(self, step: int) -> None:
    """Runs the evaluations that are due, and saves if that is requested."""
    found = self._evaluate_before_save(step)
    # A metric that decides which checkpoint is the best is measured first.
    decides = bool(self._course.config.best_metric)
    is_saved = self._saves and not decides
    if is_saved:
      self._save(step, found)
    more, left = self._evaluate(step, self._due(step, before_save=False))
    found |= more
    if decides:
      self._saves |= self._is_best(step, found)
    if self._saves and not is_saved:
      self._save(step, found)
    if self._saves:
      self._publish(step, is_evaluated=not left)

  def _due(self, step: int, *, before_save: bool) -> list[Evaluation]:
    is_last = step == self._course.num_steps
    return [
      evaluation
      for evaluation in self._evaluations
      if evaluation.before_save == before_save
      and evaluation.is_due(step, is_last=is_last)
    ]

  def _evaluate_before_save(self, step: int) -> dict[str, float]:
    """Runs the evaluations that come before a save; returns their metrics."""
    found = {}
    for evaluation in self._due(step, before_save=True):
      is_multiple = evaluation.is_due(step, is_last=False)
      if is_multiple or self._signum is None:
        result = self._run(step, evaluation)
        found |= result.scalars
        # Only at multiples: a longer run does not evaluate at this run's last
        # step, and must have the same bits.
        if is_multiple and result.state is not None:
          self.state = result.state
    return found

  def _evaluate(
    self, step: int, due: list[Evaluation]
  ) -> tuple[dict[str, float], list[Evaluation]]:
    """Runs evaluations until a signal, after which time may be short.

    Returns:
      Their metrics, and the evaluations that are left.
    """
    found = {}
    for i, evaluation in enumerate(due):
      if self._signum is not None:
        return found, due[i:]
      found |= self._run(step, evaluation).scalars
      self._read_requests()
    if step == self._course.num_steps:
      self._signum = None  # nothing is left for it to end
    return found, []

  def _evaluate_resumed(self) -> None:
    """Runs the evaluations of the step that is resumed from, if any are left.

    The process that saved the step may have ended in the middle of them, or the
    step has become the last one.
    """
    step = self._workdir.start_step
    if not step:
      return
    due = self._due(step, before_save=False)
    # At multiples of `every` they ran before the save, signal or not.
    due += [
      evaluation
      for evaluation in self._due(step, before_save=True)
      if not evaluation.is_due(step, is_last=False)
    ]
    is_last = step == self._course.num_steps
    if due and not self._writer.was_evaluated(is_last=is_last):
      self._watchdog.alive(f"the evaluations of step {step}")
      self._progress.say(f"step {step}: its evaluations are not complete")
      _, left = self._evaluate(step, due)
      self._publish(step, is_evaluated=not left)

  def _run(self, step: int, evaluation: Evaluation) -> Result:
    """Runs an evaluation; writes and prints its result."""
    with self._timer.on("eval"):
      result = evaluation.evaluator(self.state)
      write_result(result, step, self._workdir, self._writer, self._progress)
    return result

  def _is_best(self, step: int, found: Mapping[str, float]) -> bool:
    """Returns True, on all processes, for the best value of `best_metric`."""
    is_last = step == self._course.num_steps and self._signum is None
    if warning := self._best.missing(step, found, is_last=is_last):
      self._progress.say(warning)
    return self._best.improves(found)

  def _save(self, step: int, found: Mapping[str, float]) -> None:
    with self._timer.on("checkpoint"):
      self._workdir.checkpoints.save(
        step, self.state, self._course.identity, self._best.value(found)
      )
      self._save_timer.restart()

  def _publish(self, step: int, *, is_evaluated: bool) -> None:
    """Writes what a run that resumes from this checkpoint reads."""
    if is_evaluated:
      is_last = step == self._course.num_steps
      self._writer.event(metrics.EVALUATED, step, is_last=is_last)
    # A resumed run continues these totals.
    self._writer.write(step, self._timer.totals())
    with self._timer.on("checkpoint"):
      self._workdir.files.publish()

  def _end(self) -> None:
    """Waits until all processes have saved; prints the summary."""
    self._timer.enter("checkpoint")
    self._progress.close()
    self._workdir.checkpoints.close()
    self._writer.write(self.last_step, self._timer.totals())
    self._writer.close()
    self._workdir.files.close()
    # A process that leaves waits for the others in jax's shutdown, which aborts
    # all of them when it takes too long.
    self._watchdog.alive("saving in another process")
    coordination.wait_for_all()
    if jax.process_index() == 0:
      num_steps = self._course.num_steps
      print(_summary(self._workdir.path, self.last_step, num_steps))
      print(self._timer.summary(), flush=True)


def _reading(config: ConfigDict) -> loader.Reading:
  return loader.reading(config.data.num_workers, config.data.num_threads)


def _batches(course: Course, stages: Sequence[Stage], workdir: Workdir):
  """Yields the batches of the remaining steps, on the devices.

  Args:
    course: the course.
    stages: its remaining stages.
    workdir: the workdir.
  """
  split = sharding.batch_sharding(course.mesh)

  def read(stage: Stage, start_step: int):
    return loader.train_batches(
      stage.draws,
      stage.take_clip,
      batch_size=course.batch_size,
      start_step=start_step,
      **_reading(course.config)._asdict(),
      num_batches=stage.last_step - start_step,
      rows=loader.own_rows(split, course.batch_size),
      bad=workdir.bad_records,
    )

  # Reading starts now, and that of a later stage when the one before has ended.
  begun = [read(stage, workdir.start_step) for stage in stages[:1]]

  # Nothing else may hold a reader: its memory and its worker processes are
  # given back before those of the next stage are made.
  def readers():
    while begun:
      yield begun.pop()
    for before, stage in itertools.pairwise(stages):
      yield read(stage, before.last_step)

  return loader.to_devices(itertools.chain.from_iterable(readers()), split)


def _summary(workdir: Any, step: int, num_steps: int) -> str:
  """Returns the last step and the paths of the run's output."""
  lines = [
    f"step {step} of {num_steps} is saved in {workdir / 'checkpoints'}",
    f"  metrics: {workdir / 'metrics.jsonl'}",
    cli.as_started(f"  charts: python -m marlin_jax.show {workdir}"),
  ]
  for path in sorted((workdir / "pictures").glob("step_*.*"))[-2:]:
    kind = "animation" if path.suffix == ".gif" else "picture"
    lines.append(f"  {kind}: {path}")
  if step < num_steps:
    lines.append("to resume, run the same command again")
  return "\n".join(lines)
