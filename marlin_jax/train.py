"""Pretrains a masked autoencoder on a prepared data set.

  python -m marlin_jax.train --config=configs/pretrain_b.py --workdir=runs/b

Any value of the configuration can be overridden: --config.batch_size=64. Run
again with the same --workdir, it goes on where it stopped, on as many devices
and processes as there are now; a run interrupted by Ctrl-C or SIGTERM saves
first.

A workdir holds config.json, metrics.jsonl (one object per logged step),
tensorboard/, checkpoints/ and pictures/; quarantine.jsonl where records could
not be read, damaged/ where checkpoints could not be trusted, and lock, which
says who is writing.

Exit codes: 0 done; 1 cannot be done as asked, see the message; 75 broke off
(hung, could not save, lost another process), to be started again; 128 + signal:
saved and ended because of the signal.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict

from marlin_jax.devices import xla_flags
from marlin_jax.pretraining import configuration
from marlin_jax.training import config_flags
from marlin_jax.training.configuration import flat

flags.adopt_module_key_flags(config_flags)


def train_and_evaluate(config: ConfigDict, workdir: str):
  """The whole run.

  Args:
    config: a valid configuration, see configs/pretrain_b.py.
    workdir: directory of the run; made, or resumed from.

  Returns:
    The last TrainState, and the signal that ended the run early or None.

  Raises:
    UserError: it cannot be done as asked.
  """
  with contextlib.ExitStack() as held:
    return _run(config, workdir, held)


def _run(config: ConfigDict, workdir: str, held: contextlib.ExitStack):
  """The phases in their order; what is to be closed in any case is `held`."""
  # Imported here: they take seconds, which --help and bad flags need not wait.
  import jax

  from marlin_jax.data import loader, prepared_dataset, sample
  from marlin_jax.devices import chips, distributed, sharding
  from marlin_jax.evaluators import probe, reconstruction
  from marlin_jax.pretraining import experiment, warm_start
  from marlin_jax.training import (
    goodput,
    profiler,
    remote_files,
  )
  from marlin_jax.training import (
    loop as training_run,
  )
  from marlin_jax.training.checkpoint import ResumeError
  from marlin_jax.weights import formats
  from marlin_jax.weights import run_checkpoint as run_format

  remote_files.check_reachable(
    str(workdir), config.data.path, config.probe.path
  )

  # --- Processes --------------------------------------------------------------
  training_run.start_processes(config)
  is_leader = jax.process_index() == 0

  # --- Data -------------------------------------------------------------------
  data_path = config.data.path
  if data_path == "sample":
    if is_leader:
      print(sample.NOTICE, flush=True)
    with distributed.leader_first():
      data_path = sample.prepare_sample()
  dataset = prepared_dataset.open_dataset(
    data_path, config.data.split, config.data.min_quality
  )
  # Evaluated on all of it: whatever the threshold, on the same clips.
  eval_dataset = prepared_dataset.open_dataset(
    data_path, config.data.eval_split
  )
  probe_path = config.probe.path or data_path
  if config.probe.steps:
    probe.task_of(config.probe, probe_path)
  num_steps = config.num_steps or math.ceil(
    config.num_epochs * dataset.num_videos / config.batch_size
  )

  # --- Devices ----------------------------------------------------------------
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(mesh, config.batch_size)
  everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  # --- Model ------------------------------------------------------------------
  # The least, so that all cut a batch into as many parts.
  device_bytes = chips.device_bytes(jax.local_devices()[0])
  trainer, initialise, schedule, take_clip = experiment.build(
    config, num_steps, mesh, distributed.smallest(device_bytes)
  )
  shapes = jax.eval_shape(initialise)
  layout = experiment.lay_out(config, mesh, shapes)
  if is_leader:
    print(_plan(config, dataset, trainer, mesh, shapes, layout, num_steps))

  # --- Workdir ----------------------------------------------------------------
  workdir = training_run.Workdir(
    workdir, config, dataset, experiment.count(shapes), held
  )

  # --- Resume -----------------------------------------------------------------
  identity = configuration.identity(config, dataset.fingerprint, num_steps)
  if workdir.start_step:
    state = workdir.restore(shapes, layout.shardings, identity)
  else:
    if workdir.checkpoints.last_saved == 0:
      raise ResumeError(
        f"{workdir.path} holds converted weights, not a run: start from them "
        f"with --config.init_from={workdir.path} and another --workdir"
      )
    state = jax.jit(initialise, out_shardings=layout.shardings)()
    if config.init_from:
      weights = formats.read(config.init_from)
      state, notices = warm_start.apply(weights, state, config)
      if is_leader:
        print("\nnote: ".join([f"starts from {weights.source}", *notices]))
  workdir.begin()

  # --- Probe ------------------------------------------------------------------
  prober = None
  if config.probe.steps:
    architecture = run_format.architecture_of(flat(config))
    is_remote = remote_files.is_remote(workdir.path)
    cache = None if is_remote else workdir.files.path / "probe"
    with distributed.leader_first():
      data = probe.open_data(config.probe, architecture, probe_path, cache)
    distributed.check_same(
      {f"the data set in {probe_path}": data.train.split.dataset.fingerprint}
    )
    if is_leader:
      print("\n".join([str(data), *(f"WARNING: {w}" for w in data.warnings)]))
    prober = probe.TrainingProbe(trainer, architecture, data, config, mesh)

  # --- Compile ----------------------------------------------------------------
  timer = goodput.Timer(
    clips_per_step=config.batch_size,
    peak_clips_per_sec=goodput.peak_clips_per_sec(
      config, mesh.devices.flat[0].device_kind, mesh.size
    ),
    carried=workdir.seconds_before(),
  )
  bad_records = workdir.bad_records()
  batches = loader.to_devices(
    loader.train_batches(
      dataset,
      take_clip,
      batch_size=config.batch_size,
      seed=config.seed,
      start_step=workdir.start_step,
      num_threads=config.data.num_threads,
      clips_per_record=config.data.clips_per_record,
      rows=loader.own_rows(split, config.batch_size),
      bad=bad_records,
    ),
    split,
  )
  evaluator = reconstruction.Reconstruction(
    trainer,
    eval_dataset,
    take_clip,
    split,
    batch_size=config.batch_size // trainer.num_micro,
    num_batches=config.eval_batches,
    seed=config.seed,
    bad=bad_records,
  )
  make_key = functools.partial(jax.random.key, config.seed)
  rng = jax.jit(make_key, out_shardings=everywhere)()
  with timer.on("compile"):
    step_fn = experiment.lower_step(
      trainer, shapes, layout, mesh, config.batch_size
    ).compile()
  if is_leader:
    secs = timer.own_secs("compile")
    print(f"compiled the step in {secs:.1f} s", flush=True)

  # --- Loop -------------------------------------------------------------------
  loop = training_run.Loop(
    workdir,
    mesh,
    timer,
    num_steps=num_steps,
    num_skipped=int(state.num_skipped),
    identity=identity,
  )
  profile = profiler.Profiler(
    workdir.files.path / "profile",
    str(workdir.path / "profile"),
    config.profile,
    timer,
    loop.say,
  )
  with loop, profile:
    for step in loop.steps():
      with timer.on("data"):
        batch = next(batches)
      inputs = {"video": batch["video"], "regions": batch["regions"]}
      with profile.step(step):
        state, scalars = step_fn(state, inputs, rng)
        timer.step_started(scalars)
      loop.follow(scalars, batch["_id"])

      if loop.logs:
        scalars = loop.train_scalars(scalars)
        updates = step - 1 - scalars["train/num_skipped"]
        scalars["train/lr"] = float(schedule(updates))
        loop.report(scalars)

      if loop.saves:
        loop.save(state)

      if loop.due(config.eval_steps):
        with timer.on("eval"):
          scalars = evaluator.metrics(state)
        name = f"eval/{config.data.eval_split}"
        loop.writer.write(step, {f"{name}/{k}": v for k, v in scalars.items()})
        loop.say(
          f"step {step}: pixel loss {scalars['loss_pixels']:.4f} on "
          f"{config.data.eval_split}; flat patches of the batch's mean colour "
          f"{scalars['loss_batch_colour']:.4f}, of their own "
          f"{scalars['loss_own_colour']:.4f}"
        )

      if prober and loop.due(config.probe.steps):
        with timer.on("eval"):
          # Minutes, on a slow machine.
          scalars = prober.metrics(state, lambda _: loop.alive("the probe"))
        loop.writer.write(step, {f"eval/{k}": v for k, v in scalars.items()})
        loop.say(
          f"step {step}: AUC for {config.probe.label} on "
          f"{config.probe.eval_split}: linear probe "
          f"{scalars['probe/auc']:.4f}, neighbours {scalars['knn/auc']:.4f}"
        )

      if loop.due(config.picture_steps):
        with timer.on("eval"):
          views = evaluator.views(state, config.picture_clips)
          if is_leader:
            picture, paths = reconstruction.save(
              views,
              workdir.files.path / "pictures",
              f"step_{step:07d}",
              fps=30 / config.data.stride,  # most videos' own speed
            )
            loop.writer.write_picture(step, "reconstruction", picture)
            shown = workdir.path / "pictures"
            names = [str(shown / path.name) for path in paths]
            loop.say(f"step {step}: {' and '.join(names)}")

      if loop.saves:
        loop.publish()

  # --- End --------------------------------------------------------------------
  signum = loop.end(state)
  if is_leader:
    print(_summary(workdir.path, int(state.step), num_steps))
    print(timer.summary(), flush=True)
  return state, signum


def _plan(config, dataset, trainer, mesh, shapes, layout, num_steps) -> str:
  """Tells what is about to happen, before the first long wait."""
  from marlin_jax.devices import sharding
  from marlin_jax.pretraining import experiment

  kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
  processes = {d.process_index for d in mesh.devices.flat}
  masks = trainer.task.masking
  per_record = config.data.clips_per_record
  num_params = experiment.count(shapes.params)
  state_bytes = sharding.bytes_per_device(shapes, layout.shardings)
  lines = [
    f"data     {dataset.path}: split '{dataset.split}', records: "
    f"{dataset.num_records}, videos: {dataset.num_videos}",
    f"model    {num_params / 1e6:.1f}M parameters, {config.dtype}",
    f"masking  {masks.strategy}: {masks.num_visible} of {masks.num_tokens} "
    "tokens are visible",
    f"devices  {mesh.size} x {kinds}"
    + (f" in {len(processes)} processes" if len(processes) > 1 else ""),
    f"batch    {config.batch_size} clips"
    + (f", {per_record} of each record" if per_record > 1 else ""),
    f"steps    {num_steps}",
  ]
  if trainer.num_micro > 1:
    lines[-2] += f", in {trainer.num_micro} parts with accumulated gradients"
  if mesh.size > 1:
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines[3] += (
      f": {sizes}; each keeps {state_bytes / 1e6:.1f} MB of parameters and "
      "optimiser states"
    )
    lines[3] += "".join(f"\n         {note}" for note in layout.notes)
  on_cpu = mesh.devices.flat[0].platform == "cpu" and sys.platform == "linux"
  if on_cpu and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    lines[3] += (
      "\n         steps are faster with MALLOC_TRIM_THRESHOLD_ set, see CPU in "
      "docs/TRAINING.md"
    )
  if found := dataset.selection:
    lines[0] += (
      f"\n         left out, below data.min_quality={found.min_quality}: "
      f"records: {found.num_left_out}, videos: {found.num_videos_left_out}"
    )
  if dataset.num_records < config.batch_size:
    lines[0] += (
      "\n         fewer records than clips in a batch: they repeat in it, with "
      "other starts and masks"
    )
  return "\n".join(lines)


def _summary(workdir, step: int, num_steps: int) -> str:
  """What a run leaves and where to look."""
  pictures = sorted((workdir / "pictures").glob("step_*.*"))[-2:]
  lines = [f"step {step} of {num_steps} is saved in {workdir / 'checkpoints'}"]
  lines += [
    f"  {what}: {path}"
    for what, path in (
      ("metrics", workdir / "metrics.jsonl"),
      *(
        ("animation" if path.suffix == ".gif" else "picture", path)
        for path in pictures
      ),
    )
  ]
  if step < num_steps:
    lines.append("the same command goes on from there")
  return "\n".join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  xla_flags.set_for_training()
  # Orbax tells twenty lines about every save, and shows the stacks of errors
  # that it raises all the same.
  logging.set_verbosity(logging.FATAL)
  config = config_flags.config(configuration.validate)
  from marlin_jax.training import loop as training_run

  training_run.carry_out(
    lambda: train_and_evaluate(config, config_flags.workdir())
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=config_flags.parse)
