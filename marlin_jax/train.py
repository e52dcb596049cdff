"""Pretrains a masked autoencoder on a prepared data set.

  python -m marlin_jax.train --config=configs/pretrain_b.py --workdir=runs/b

A flag overrides any value of the configuration: --config.batch_size=64. The
same command with the same --workdir resumes the run, also on another number of
devices and processes. After Ctrl-C or SIGTERM the run saves before it ends.

A workdir holds config.json, metrics.jsonl (one object per logged step),
tensorboard/, checkpoints/, pictures/ and compiled/ (programs that a restart
need not compile again); quarantine.jsonl if records could not be read, damaged/
if checkpoints were damaged, profile/ if a profile was taken, and lock, which
names the process that is writing. WORKDIR/best is no folder, but opens the
checkpoint with the best config.best_metric, in marlin_jax.features and others.

Exit codes: 0 done; 1 refused, and the message says what to do; 75 ended early
(hung, could not save, lost another process) and can be restarted; 128 + signal:
saved and ended because of the signal.
"""

from __future__ import annotations

import functools

from absl import app, flags, logging
from ml_collections import ConfigDict

from marlin_jax.devices import xla_flags
from marlin_jax.pretraining import configuration
from marlin_jax.training import config_flags

flags.adopt_module_key_flags(config_flags)


def train_and_evaluate(config: ConfigDict, workdir: str):
  """Pretrains until the last step or a signal.

  Args:
    config: a valid configuration; see configs/pretrain_b.py.
    workdir: workdir of the run; created, or resumed from.

  Returns:
    The last TrainState, and the signal that ended the run early or None.

  Raises:
    UserError: the run cannot start, resume, save or continue.
  """
  # Imported here because the imports take seconds: --help and bad flags answer
  # at once.
  import jax

  from marlin_jax.training import loop, remote_files
  from marlin_jax.training.workdir import as_begun, begun_with

  remote_files.check_reachable(
    *(str(workdir), config.probe.path),
    *(data.path for data in configuration.data_sets(config)),
  )
  begun = begun_with(workdir)
  config, notes = as_begun(config, configuration.KEYS, workdir, begun)
  with loop.started(config, str(workdir)) as watchdog:
    if jax.process_index() == 0:
      print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
    configuration.validate(config)
    course, evaluated = _open(config, workdir, watchdog)

    def check_resumed(step):
      if "num_steps" in begun:  # not the workdir of another command
        before = course.steps_of(begun["num_steps"], begun["num_epochs"])
        configuration.check_cooldown(
          config, course.num_steps, begun | {"num_steps": before}, step
        )

    return loop.train(
      course,
      functools.partial(_evaluations, course, evaluated),
      workdir,
      watchdog,
      check_resumed,
    )


def _open(config, workdir, watchdog):
  """Opens the data; returns the course, and the splits to evaluate."""
  from etils import epath

  from marlin_jax.evaluators import quick_probe
  from marlin_jax.pretraining.course import (
    PretrainingCourse,
    TrainingData,
    evaluated_splits,
  )

  index_cache = epath.Path(workdir) / "index"
  parts = [
    TrainingData(data, config.data, index_cache)
    for data in configuration.data_sets(config)
  ]
  for part in parts:
    part.open(watchdog.alive)
  evaluated = evaluated_splits(parts, config.data)
  watchdog.alive("planning the step")
  course = PretrainingCourse(config, parts)
  if config.probe.steps:
    # Opened here to fail before a workdir is created.
    quick_probe.open_task(config.probe, course.probe_path)
  return course, evaluated


def _evaluations(course, evaluated, workdir, alive):
  """Returns the evaluations: losses, adversary, probe, pictures."""
  from marlin_jax.evaluators import adversary, probe, reconstruction
  from marlin_jax.training.evaluation import Evaluation

  config = course.config
  reconstructed = reconstruction.Reconstruction(
    course, evaluated, workdir.bad_records
  )
  evaluations = [Evaluation(config.eval_steps, reconstructed.losses)]
  if config.adv.weight:
    pull = adversary.AdversarialPull(workdir, config.adv.max_pull)
    evaluations.append(Evaluation(config.eval_steps, pull))
  if config.probe.steps:
    encoder_probe = probe.Probe(course, workdir, alive)
    evaluations.append(Evaluation(config.probe.steps, encoder_probe))
  evaluations.append(Evaluation(config.picture_steps, reconstructed.picture))
  return evaluations


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  # Orbax logs twenty lines per save, and a stack trace for each error that it
  # also raises.
  logging.set_verbosity(logging.FATAL)
  config = config_flags.config(configuration.validate)
  xla_flags.set_for_training()
  if config.deterministic:
    xla_flags.set_deterministic()
  from marlin_jax.training import loop

  loop.run_training(lambda: train_and_evaluate(config, config_flags.workdir()))


if __name__ == "__main__":
  config_flags.run(main)
