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
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from marlin_jax import (
  checkpoint,
  distributed,
  goodput,
  input_pipeline,
  metrics,
  output_folder,
  prepared_dataset,
  run_files,
  sharding,
  skipped,
  watchdog,
)
from marlin_jax.experiment import count, flat
from marlin_jax.lipsync.expert_training import ExpertCourse
from marlin_jax.lipsync.generator_training import GeneratorCourse
from marlin_jax.validate import ConfigError

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
    ConfigError, DatasetError, FloatingPointError, OutputFolderError,
      ResumeError, SaveError, StartError: it cannot be done as asked; the
      message says why and what to do.
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
  run_files.check_reachable(str(workdir), data)

  # --- Processes --------------------------------------------------------------
  distributed.initialise(config.distributed)
  is_leader = jax.process_index() == 0
  distributed.check_same(
    {
      f"config.{key}": value
      for key, value in flat(config).items()
      if not key.startswith("distributed.")
    }
  )

  # --- Data, devices, networks ------------------------------------------------
  dataset = prepared_dataset.open_dataset(data, config.data.train)
  eval_dataset = prepared_dataset.open_dataset(data, config.data.val)
  try:
    mesh = sharding.make_mesh(config.mesh.data)
  except ValueError as e:
    raise ConfigError(str(e)) from e
  course = build(mesh)
  settings = course.settings
  _check_batch(settings.batch_size, sharding.num_shards(mesh))
  everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  if is_leader:
    print(_plan(course, dataset, eval_dataset, mesh), flush=True)

  # --- Workdir ----------------------------------------------------------------
  workdir = epath.Path(workdir)
  with distributed.leader_first():
    if is_leader:
      if run_files.is_remote(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
      else:
        lock = output_folder.Lock(Path(workdir), "lock")
        held.callback(lock.close)
        run_files.check_room(Path(workdir), 4 * count(course.state))
      for note in checkpoint.set_damaged_aside(workdir / "checkpoints"):
        print(f"warning: {note}", flush=True)

  # --- Resume -----------------------------------------------------------------
  checkpoints = checkpoint.Checkpoints(
    str(workdir / "checkpoints"), keep=config.keep_checkpoints
  )
  identity = course.meta | {
    "data.fingerprint": dataset.fingerprint,
    "eval_data.fingerprint": eval_dataset.fingerprint,
  }
  identity = json.loads(json.dumps(identity))
  start_step = checkpoints.last_saved or 0
  distributed.check_same(
    {
      f"the data set in {data}": dataset.fingerprint,
      f"the last step saved in {workdir}": start_step,
    }
  )
  if start_step:
    state = checkpoints.restore(
      start_step,
      course.state,
      jax.tree.map(lambda _: everywhere, course.state),
      identity,
      allow=config.allow_change.split(","),
    )
  else:
    state = jax.device_put(course.state, everywhere)
  if is_leader:
    if start_step:
      print(f"resumed from step {start_step} in {workdir}", flush=True)
    (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
  files = run_files.RunFiles(
    workdir, apart=is_leader and run_files.is_remote(workdir)
  )

  # --- Loop -------------------------------------------------------------------
  me = jax.process_index()
  bad_records = input_pipeline.BadRecords(
    workdir / f"quarantine{f'.process_{me}' if me else ''}.jsonl",
    limit=config.data.max_bad_records,
  )
  batches = input_pipeline.to_devices(
    input_pipeline.train_batches(
      dataset,
      course.take,
      batch_size=settings.batch_size,
      seed=config.seed,
      start_step=start_step,
      num_threads=config.data.num_threads,
      rows=input_pipeline.own_rows(split, settings.batch_size),
      bad=bad_records,
    ),
    split,
  )
  evaluator = course.evaluator(eval_dataset, bad_records)
  carried = None
  if is_leader:
    path = files.path / "metrics.jsonl"
    carried = goodput.carried_over(path, start_step)
  timer = goodput.Timer(clips_per_step=settings.batch_size, carried=carried)
  writer = metrics.MetricWriter(files.path, start_step=start_step)
  progress = metrics.Progress(settings.num_steps, start=start_step)
  stop_together = distributed.StopTogether(mesh)
  skips = skipped.SkippedSteps(
    dataset,
    max_in_row=config.max_skipped_steps,
    num_before=int(state.num_skipped),
  )
  guard = watchdog.Watchdog(**config.watchdog)
  held.callback(guard.close)
  signum = None

  def tell_skipped(found: skipped.SkippedStep | None) -> None:
    if found:
      writer.event("skipped", **found._asdict())
      progress.say(str(found))

  timer.enter("step")
  with metrics.StopSignal() as stop:
    for step in range(start_step + 1, settings.num_steps + 1):
      guard.alive(f"step {step}")
      with timer.on("data"):
        batch = next(batches)
      inputs = {key: batch[key] for key in course.fields}
      state, scalars = course.step(state, inputs)
      timer.step_started(scalars)
      progress.step()
      tell_skipped(skips.check())
      skips.follow(step, scalars, batch["_id"])
      if saved := checkpoints.poll():
        progress.say(f"step {saved} is saved")
      # Read once: a signal in the middle of this round ends the next.
      signum = stop_together(stop.received)
      stopping = signum is not None
      last = step == settings.num_steps or stopping

      if step % config.log_steps == 0 or step == start_step + 1 or last:
        tell_skipped(skips.check())
        scalars = {f"train/{k}": float(v) for k, v in scalars.items()}
        scalars |= timer.read()
        writer.write(step, scalars)
        progress.report(step, scalars)

      # Before the checkpoint, and whatever is about to happen: it may change
      # the state. Those at other steps may not, for a longer run has none.
      deciding = step % settings.eval_steps == 0
      if deciding or (last and not stopping):
        with timer.on("eval"):
          decided, scalars = evaluator.evaluate(state)
        state = decided if deciding else state
        name = f"eval/{config.data.val}"
        writer.write(step, {f"{name}/{k}": v for k, v in scalars.items()})
        if details := evaluator.details():
          writer.event("offsets", step, **details)
        progress.say(
          f"step {step}, {config.data.val}: {evaluator.tell(scalars)}"
        )

      if step % config.checkpoint_steps == 0 or last:
        with timer.on("checkpoint"):
          checkpoints.save(step, state, identity)

      if (step % config.picture_steps == 0 or last) and not stopping:
        with timer.on("eval"):
          picture = evaluator.picture(state, config.picture_clips)
          if is_leader:
            path = files.path / "pictures" / f"step_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            writer.write_picture(step, "lipsync", picture)
            progress.say(f"step {step}: {workdir / 'pictures' / path.name}")

      if step % config.checkpoint_steps == 0 or last:
        # What a run that is resumed from here has spent.
        writer.write(step, timer.totals())
        with timer.on("checkpoint"):
          files.publish()

      if stopping:
        break

  # --- End --------------------------------------------------------------------
  timer.enter("checkpoint")
  progress.close()
  checkpoints.close()
  writer.write(int(state.step), timer.totals())
  writer.close()
  files.close()
  done = int(state.step) >= settings.num_steps
  if is_leader:
    print(
      f"step {int(state.step)} of {settings.num_steps} is saved in", end=" "
    )
    print(workdir / "checkpoints")
    if not done:
      print("the same command goes on from there")
    print(timer.summary(), flush=True)
  return state, None if done else signum


def _check_batch(batch_size: int, num_devices: int) -> None:
  if batch_size % num_devices:
    raise ConfigError(
      f"a batch_size of {batch_size} does not divide over {num_devices} "
      "devices; choose a multiple, or set config.mesh.data"
    )


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
