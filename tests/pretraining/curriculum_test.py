"""A curriculum: stages of a run on smaller clips, before those of full size."""

import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain_b
from marlin_jax.data import loader
from marlin_jax.models import vit
from marlin_jax.pretraining import build, configuration, optimizer
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import formats, run_checkpoint
from marlin_jax.weights.architecture import Architecture
from tests.support import made_dataset, training_runs
from tests.support.files import arrays_of, rows_of
from tests.support.objectives import OBJECTIVES, overrides, random_batch
from tests.support.trainers import SAME_ROUNDING
from tests.support.training_runs import metrics_of, train

# Stages of 3, 4 and 5 steps, with 4, 16 and 32 tokens.
CURRICULUM = (
  "3: data.num_frames=2, data.frame_size=32, mask.ratio=0.5; "
  "4: data.num_frames=2, mask.ratio=0.75"
)
SIZES = {
  "batch_size": 2,
  "clips_per_device": 2,
  "num_steps": 12,
  "data.frame_size": 64,
  "mask.ratio": 0.9,
  "adv.weight": 0.0,
}
NUM_VIDEOS = 5


@pytest.fixture(scope="module")
def dataset(made_once):
  """Videos of one record each, of different lengths."""
  names = [f"{i}.mp4" for i in range(NUM_VIDEOS)]
  return made_once(
    "curriculum",
    lambda path: made_dataset.make(
      path,
      {
        name: [made_dataset.a_record(name, num_frames=10 + i)]
        for i, name in enumerate(names)
      },
    ),
  )


# --- Configuration ------------------------------------------------------------


def small_config(**changes):
  config = pretrain_b.get_config()
  settings = training_runs.TINY | SIZES | {"curriculum": CURRICULUM} | changes
  config.update_from_flattened_dict(settings)
  return config


def sizes_of(config):
  return config.data.num_frames, config.data.frame_size, config.mask.ratio


def test_a_stage_has_the_values_that_it_names_and_those_of_the_run():
  config = small_config()
  configuration.validate(config)
  stages = configuration.stages(config)
  assert [stage.num_steps for stage in stages] == [3, 4, 0]
  assert [sizes_of(stage.config) for stage in stages] == [
    (2, 32, 0.5),
    (2, 64, 0.75),
    (4, 64, 0.9),
  ]
  assert stages[-1].config is config
  config.curriculum = ""
  assert len(configuration.stages(config)) == 1


@pytest.mark.parametrize(
  ("curriculum", "message"),
  [
    ("data.num_frames=2", "'data.num_frames=2' does not begin with a number"),
    ("2e3: data.num_frames=2", "does not begin with a number of steps and ':'"),
    ("0: data.num_frames=2", "does not begin with a number of steps"),
    ("3", "'3' does not begin with a number of steps"),
    ("3:", "'' is not a key of a stage"),
    ("3: num_frames=2", "'num_frames' is not a key of a stage; .* the keys"),
    ("3: data.stride=2", "'data.stride' is not a key of a stage"),
    ("3: data.num_frames=two", "'two' is not a value of data.num_frames"),
    ("3: mask.ratio=0.5, mask.ratio=0.6", "has mask.ratio twice"),
    ("3: data.num_frames=3", "stage 1: data.num_frames=3: expected a multiple"),
    ("3: data.num_frames=8", "stage 1: data.num_frames=8: expected at most 4"),
    (
      "3: data.num_frames=2; 3: data.frame_size=96",
      "stage 2: data.frame_size=96: expected at most 64",
    ),
    ("3: data.frame_size=40", "data.frame_size=40: expected a multiple of"),
    ("3: mask.ratio=1.5", "stage 1: mask.ratio=1.5: expected 0 < value < 1"),
    (
      "3: data.num_frames=2, data.frame_size=32",
      "stage 1: mask.ratio=0.9: leaves nothing visible of 4 tokens",
    ),
    ("12: data.num_frames=2", "its stages take 12 steps, and the run has 12"),
  ],
)
def test_a_wrong_curriculum_is_refused(curriculum, message):
  with pytest.raises(ConfigError, match=message) as caught:
    configuration.validate(small_config(curriculum=curriculum))
  assert "1 problem" in str(caught.value)


def test_the_length_in_epochs_is_checked_when_it_is_known(dataset, tmp_path):
  result = train(
    tmp_path,
    **SIZES
    | {
      "data.path": dataset,
      "num_steps": 0,
      "num_epochs": 2,
      "curriculum": "5: data.num_frames=2",
    },
  )
  message = training_runs.refused(result)
  assert "its stages take 5 steps, and the run has 5" in message
  assert not (tmp_path / "config.json").exists()


# --- Positions ----------------------------------------------------------------


def test_a_token_keeps_its_place():
  """In time the first rows; in the picture the mean of the four around it."""
  grid = 3, 4, 6
  table = np.random.default_rng(0).normal(size=(*grid, 5)).astype(np.float32)
  flat = jnp.asarray(table.reshape(-1, 5))
  np.testing.assert_array_equal(vit.positions_at(flat, grid, grid), flat)
  np.testing.assert_array_equal(
    vit.positions_at(flat, grid, (2, 4, 6)), flat[: 2 * 4 * 6]
  )
  quarters = table[:2].reshape(2, 2, 2, 3, 2, 5).mean((2, 4))
  np.testing.assert_allclose(
    vit.positions_at(flat, grid, (2, 2, 3)), quarters.reshape(-1, 5), atol=1e-6
  )


# --- Steps --------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment():
  return build.Experiment(small_config(**{"optim.spike_sigmas": 6.0}), 12)


@pytest.fixture(scope="module")
def state(experiment):
  return jax.jit(experiment.initialise)()


def one_step(experiment, state):
  """Takes a step on a random batch; returns the new state and the scalars."""
  step = experiment.lower_step().compile(SAME_ROUNDING)
  # A copy, as the step takes its state's memory.
  return step(
    jax.tree.map(jnp.copy, state),
    random_batch(experiment.batch_shapes),
    jax.random.key(0),
    **experiment.constants,
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marlin", "sound"])
def test_a_step_of_a_stage_is_one_of_a_run_of_its_size(name, tmp_path):
  """With the positions of its tokens in the run's own clips."""
  config = small_config(**overrides(name, tmp_path))
  whole = build.Experiment(config, 12)
  state = jax.jit(whole.initialise)()
  stage = whole.by_stage[0]
  assert stage.task.masking.num_tokens == 4
  assert stage.task.masking.num_visible == 2
  got, got_scalars = one_step(stage, state)

  alone = build.Experiment(configuration.stages(config)[0].config, 12)
  grids = whole.task.tubelets.grid, alone.task.tubelets.grid

  def at_places(ours, theirs):
    if len(ours) == whole.task.masking.num_tokens:
      return vit.positions_at(ours, *grids)
    # The sound begins with the clip.
    np.testing.assert_array_equal(ours[: len(theirs)], theirs)
    return theirs

  tables = jax.tree.map(
    at_places, state.fixed, jax.jit(alone.initialise)().fixed
  )
  want, want_scalars = one_step(alone, state.replace(fixed=tables))
  assert got_scalars == want_scalars
  for part in ("step", "params", "opt_state", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(got, part), getattr(want, part)
    )
  jax.tree.map(np.testing.assert_array_equal, got.fixed, state.fixed)


def test_a_stage_is_not_compared_with_the_steps_before_it(experiment, state):
  stage = experiment.by_stage[1]
  recent = state.recent | {"num": jnp.int32(70)}
  nums = [
    one_step(stage, state.replace(step=jnp.int32(step), recent=recent))[
      0
    ].recent["num"]
    for step in (3, 4)
  ]
  assert nums == [1, 71]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_stages(name, tmp_path):
  """The state keeps its form; constants are not held again for each stage."""
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(
    training_runs.TINY
    | overrides(name, tmp_path)
    | {"curriculum": "3: data.num_frames=2, data.frame_size=32, mask.ratio=0.5"}
  )
  whole = build.Experiment(config, 6)
  for stage in whole.by_stage:
    new, _ = stage.lower_step().out_info
    assert jax.tree.structure(new) == jax.tree.structure(whole.shapes)
    assert jax.tree.all(
      jax.tree.map(lambda a, b: a.shape == b.shape, new, whole.shapes)
    )
    assert stage.constants is whole.constants


def test_without_a_curriculum_the_step_is_the_plain_one():
  experiment = build.Experiment(small_config(curriculum=""), 12)
  assert experiment.by_stage == [experiment]


# --- A run --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
  """Workdir of a run, its batches as (shape of the video, records), output."""
  workdir = tmp_path_factory.mktemp("curriculum") / "run"
  batches, readers = [], []
  train_batches = loader.train_batches

  def noted(*args, **settings):
    # Memory and worker processes of the stages before have been given back.
    assert not any(reader() for reader in readers)

    def read():
      for batch in train_batches(*args, **settings):
        batches.append((batch["video"].shape, batch["_id"].tolist()))
        yield batch

    reader = read()
    readers.append(weakref.ref(reader))
    return reader

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loader, "train_batches", noted)
    result = train(workdir, **options(dataset))
  assert result.returncode == 0, result
  assert len(readers) == 3
  return workdir, batches, result.stdout


def options(dataset):
  return SIZES | {
    "curriculum": CURRICULUM,
    "data.path": dataset,
    "checkpoint_steps": 1,
    "keep_checkpoints": 20,
  }


def test_each_stage_has_clips_of_its_size(run):
  _, batches, _ = run
  assert [shape for shape, _ in batches] == [
    *3 * [(2, 2, 32, 32, 3)],
    *4 * [(2, 2, 64, 64, 3)],
    *5 * [(2, 4, 64, 64, 3)],
  ]


def test_no_clip_of_an_epoch_is_lost_or_repeated_where_stages_meet(run):
  """The stages end within the second and the third epoch."""
  ids = [i for _, ids in run[1] for i in ids]
  epochs = [ids[i : i + NUM_VIDEOS] for i in range(0, 20, NUM_VIDEOS)]
  assert [sorted(epoch) for epoch in epochs] == 4 * [[*range(NUM_VIDEOS)]]


def test_the_learning_rate_has_one_schedule_over_all_stages(run):
  rates = [row["train/lr"] for row in metrics_of(run[0]).values()]
  schedule = optimizer.make_schedule(small_config().optim, 2, 12)
  assert rates == pytest.approx([float(schedule(step)) for step in range(12)])


def test_stages_their_cost_and_their_rates_are_told(run):
  workdir, _, output = run
  stages = [row["train/stage"] for row in metrics_of(workdir).values()]
  assert stages == [*3 * [1], *4 * [2], *5 * [3]]
  assert (
    "stage 1 of 3, to step 3: 2 frames of 32 pixels, 2 of 4 tokens visible, "
    in output
  )
  assert "GFLOP per clip (100% of the last)\n" in output
  assert "compiled the step of stage 2 of 3 in" in output
  assert "stage 2 of 3: 2 frames of 64 pixels, 4 of 16 tokens visible\n" in (
    output
  )
  events = [row for row in rows_of(workdir) if row.get("event") == "stage"]
  assert [(e["step"], e["stage"]) for e in events] == [
    (3, "stage 1 of 3"),
    (7, "stage 2 of 3"),
    (12, "stage 3 of 3"),
  ]
  assert all(event["clips_per_sec"] > 0 for event in events)


# Within each stage, and where they meet.
@pytest.mark.parametrize(
  "start",
  [
    3,
    *(pytest.param(start, marks=pytest.mark.slow) for start in (1, 5, 7, 10)),
  ],
)
def test_a_run_resumes_in_every_stage_with_the_same_bits(
  dataset, run, tmp_path, start
):
  whole = run[0]
  shutil.copytree(whole, tmp_path / "resumed")
  for step in range(start + 1, 13):
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
  result = train(tmp_path / "resumed", **options(dataset))
  assert f"resumed from step {start}" in result.stdout
  num_compiled = result.stdout.count("compiled the step")
  assert num_compiled == 3 - (start >= 3) - (start >= 7)
  assert metrics_of(tmp_path / "resumed") == metrics_of(whole)
  got, want = (arrays_of(x, 12) for x in (tmp_path / "resumed", whole))
  assert got.keys() == want.keys()
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


@pytest.mark.slow
def test_a_run_goes_on_sharded_and_with_worker_processes(
  dataset, run, tmp_path
):
  """From the middle of the second stage, to the same numbers."""
  whole = run[0]
  shutil.copytree(whole, tmp_path / "resumed")
  for step in range(6, 13):
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
  result = training_runs.run(
    tmp_path / "resumed",
    devices=2,
    **options(dataset)
    | {"mesh.fsdp": 2, "clips_per_device": 1, "data.num_workers": 1},
  )
  assert result.returncode == 0, result.stderr
  got, want = metrics_of(tmp_path / "resumed"), metrics_of(whole)
  assert got.keys() == want.keys()
  for step, row in want.items():
    assert got[step] == pytest.approx(row, rel=1e-3, abs=1e-6), step


def test_a_checkpoint_of_any_stage_is_one_of_the_whole_network(run):
  path = run[0] / "checkpoints" / "2"
  weights = formats.read(path)
  assert weights.architecture == Architecture.from_config(small_config())
  assert run_checkpoint.masking_of(str(path)) == ("fasking", 0.9)


def test_another_curriculum_is_refused_when_a_run_resumes(dataset, run):
  result = train(run[0], **options(dataset) | {"curriculum": ""})
  assert "curriculum: was '3: data.num_frames=2" in training_runs.refused(
    result
  )
