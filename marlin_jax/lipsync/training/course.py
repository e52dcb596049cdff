"""Trains the sync expert or the generator, sharded and resumable.

The same command goes on where a run stopped. Resumed, it takes the same bits as
one that was not interrupted: which clips a step sees follows from the step, and
an evaluation that decides on the sync weight comes before the checkpoint of its
step, also where the run is about to stop.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.devices import sharding
from marlin_jax.lipsync.training.expert_training import ExpertCourse
from marlin_jax.lipsync.training.generator_training import GeneratorCourse
from marlin_jax.pretraining.experiment import count
from marlin_jax.training import goodput, remote_files
from marlin_jax.training import loop as training_run

Course = ExpertCourse | GeneratorCourse


def train_expert(config: ConfigDict, data: str, workdir: str):
  """Trains the sync expert.

  Args:
    config: a valid one, see configs/eval_ls.py.
    data: a data set with sound at 25 frames a second, from data_prep.prepare.
    workdir: made, or resumed from.

  Returns:
    The last ExpertState, and the signal that ended the run early or None.

  Raises:
    UserError: it cannot be done as asked.
  """
  return _train(config, data, workdir, lambda m: ExpertCourse(config, m))


def train_generator(
  config: ConfigDict,
  data: str,
  workdir: str,
  expert: str,
  encoder: str | None,
):
  """Trains the generator.

  Args:
    config, data, workdir: as for `train_expert`.
    expert: what networks.read_expert reads.
    encoder: MARLIN's: weights in any format, a published model's name or
      'random'; None for config.generator.kind=wav2lip.

  Returns:
    The last GeneratorState, and the signal that ended the run early or None.

  Raises:
    WeightsError: expert or encoder cannot be read; and as `train_expert`.
  """
  return _train(
    config,
    data,
    workdir,
    lambda mesh: GeneratorCourse(config, mesh, expert, encoder),
  )


def _train(
  config: ConfigDict, data: str, workdir: str, build: Callable[[Mesh], Course]
):
  with contextlib.ExitStack() as held:
    return _run(config, data, workdir, build, held)


def _run(config, data, workdir, build, held: contextlib.ExitStack):
  """The phases in their order; what is to be closed in any case is `held`."""
  remote_files.check_reachable(str(workdir), data)

  # --- Processes --------------------------------------------------------------
  training_run.start_processes(config)
  is_leader = jax.process_index() == 0

  # --- Data, devices, networks ------------------------------------------------
  dataset = prepared_dataset.open_dataset(data, config.data.train)
  eval_dataset = prepared_dataset.open_dataset(data, config.data.val)
  mesh = sharding.make_mesh(config.mesh.data)
  course = build(mesh)
  settings = course.settings
  sharding.check_batch(mesh, settings.batch_size, f"{course.part}.batch_size")
  everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  if is_leader:
    print(_plan(course, dataset, eval_dataset, mesh), flush=True)

  # --- Workdir ----------------------------------------------------------------
  workdir = training_run.Workdir(
    workdir, config, dataset, count(course.state), held
  )

  # --- Resume -----------------------------------------------------------------
  identity = course.meta | {
    "data.fingerprint": dataset.fingerprint,
    "eval_data.fingerprint": eval_dataset.fingerprint,
  }
  identity = json.loads(json.dumps(identity))
  if workdir.start_step:
    shardings = jax.tree.map(lambda _: everywhere, course.state)
    state = workdir.restore(course.state, shardings, identity)
  else:
    state = jax.device_put(course.state, everywhere)
  workdir.begin()

  # --- Loop -------------------------------------------------------------------
  bad_records = workdir.bad_records()
  batches = loader.to_devices(
    loader.train_batches(
      dataset,
      course.take,
      batch_size=settings.batch_size,
      seed=config.seed,
      start_step=workdir.start_step,
      num_threads=config.data.num_threads,
      rows=loader.own_rows(split, settings.batch_size),
      bad=bad_records,
    ),
    split,
  )
  evaluator = course.evaluator(eval_dataset, bad_records)
  timer = goodput.Timer(
    clips_per_step=settings.batch_size, carried=workdir.seconds_before()
  )
  loop = training_run.Loop(
    workdir,
    mesh,
    timer,
    num_steps=settings.num_steps,
    num_skipped=int(state.num_skipped),
    identity=identity,
  )
  with loop:
    for step in loop.steps():
      with timer.on("data"):
        batch = next(batches)
      inputs = {key: batch[key] for key in course.fields}
      state, scalars = course.step(state, inputs)
      timer.step_started(scalars)
      loop.follow(scalars, batch["_id"])

      if loop.logs:
        loop.report(loop.train_scalars(scalars))

      # Before the checkpoint, and whatever is about to happen: it may change
      # the state. Those at other steps may not, for a longer run has none.
      deciding = step % settings.eval_steps == 0
      if deciding or loop.due(settings.eval_steps):
        with timer.on("eval"):
          decided, scalars = evaluator.evaluate(state)
        state = decided if deciding else state
        name = f"eval/{config.data.val}"
        loop.writer.write(step, {f"{name}/{k}": v for k, v in scalars.items()})
        if details := evaluator.details():
          loop.writer.event("offsets", step, **details)
        loop.say(f"step {step}, {config.data.val}: {evaluator.tell(scalars)}")

      if loop.saves:
        loop.save(state)

      if loop.due(config.picture_steps):
        with timer.on("eval"):
          picture = evaluator.picture(state, config.picture_clips)
          if is_leader:
            path = workdir.files.path / "pictures" / f"step_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            loop.writer.write_picture(step, "lipsync", picture)
            loop.say(f"step {step}: {workdir.path / 'pictures' / path.name}")

      if loop.saves:
        loop.publish()

  # --- End --------------------------------------------------------------------
  signum = loop.end(state)
  done = int(state.step) >= settings.num_steps
  if is_leader:
    print(
      f"step {int(state.step)} of {settings.num_steps} is saved in", end=" "
    )
    print(workdir.path / "checkpoints")
    if not done:
      print("the same command goes on from there")
    print(timer.summary(), flush=True)
  return state, signum


def _plan(course, dataset, eval_dataset, mesh: Mesh) -> str:
  """Tells what is about to happen, before the first long wait."""
  kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
  num_params = count(jax.tree.leaves(course.state.trained.params))
  return "\n".join(
    [
      f"data     {dataset.path}: split '{dataset.split}', records: "
      f"{dataset.num_records}, videos: {dataset.num_videos}; evaluated on "
      f"'{eval_dataset.split}', records: {eval_dataset.num_records}, videos: "
      f"{eval_dataset.num_videos}",
      f"network  {course.summary}; {num_params / 1e6:.1f}M parameters learn",
      f"devices  {mesh.size} x {kinds}",
      f"batch    {course.settings.batch_size} clips",
      f"steps    {course.settings.num_steps}",
    ]
  )
