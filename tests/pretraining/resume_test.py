"""A run that stops and resumes gives the bits of an undisturbed one."""

import shutil

import pytest

from configs import eval_ls
from marlin_jax.checkpoints import checksums
from marlin_jax.pretraining import spikes
from marlin_jax.weights import formats
from marlin_jax.weights.weights import WeightsError
from tests.support import objectives, talking_mouths
from tests.support.files import arrays_of, rows_of
from tests.support.training_runs import metrics_of, refused, train

OPTIMISER = {
  "ema_warmup": True,
  "optim.clip_norm": 0.5,
  "optim.decay_params": "kernels",
  "optim.layer_decay": 0.75,
  "optim.schedule": "constant",
  "optim.spike_sigmas": 0.5,
  "optim.warmup_steps": 2,
  "optim.weight_decay": 0.05,
}


def assert_same_bits(workdir, reference, step):
  assert metrics_of(workdir) == metrics_of(reference)
  got, want = arrays_of(workdir, step), arrays_of(reference, step)
  assert got.keys() == want.keys()
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


@pytest.fixture(scope="module")
def workdirs(sample_dataset, tmp_path_factory):
  """A run of eight steps; and one of four that goes on to eight.

  Both use every option of the optimiser.
  """
  whole, resumed = (tmp_path_factory.mktemp(x) for x in ("whole", "resumed"))
  options = {"data.path": sample_dataset, **OPTIMISER}
  eight = {"num_steps": 8, "optim.cooldown_steps": 4}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(spikes, "LEAST", 4)
    results = [
      train(whole, **options, **eight),
      train(resumed, **options, num_steps=4),
      train(resumed, **options, **eight),
    ]
  assert [r.returncode for r in results] == [0, 0, 0], results
  assert "resumed from step 4" in results[2].stdout
  return whole, resumed


def test_with_every_option_of_the_optimiser_all_bits_are_the_same(workdirs):
  whole, resumed = workdirs
  assert_same_bits(resumed, whole, 8)


def test_a_cool_down_after_the_run_is_refused(workdirs, sample_dataset):
  options = {"data.path": sample_dataset, **OPTIMISER}
  late = {"num_steps": 9, "optim.cooldown_steps": 2}
  told = refused(train(workdirs[1], **options, **late))
  assert "the run resumes from step 8: expected num_steps of at least" in told


def test_a_damaged_checkpoint_does_not_forbid_a_cool_down(
  workdirs, sample_dataset, tmp_path
):
  shutil.copytree(workdirs[1], tmp_path / "run")
  for step in ("6", "8"):
    damaged = tmp_path / "run" / "checkpoints" / step / checksums.NAME
    damaged.write_text("")
  options = {"data.path": sample_dataset, **OPTIMISER}
  earlier = {"num_steps": 7, "optim.cooldown_steps": 2}
  result = train(tmp_path / "run", **options, **earlier)
  assert result.returncode == 0, result.stderr
  assert "resumed from step 4" in result.stdout


def test_the_workdir_of_another_command_is_refused(
  workdirs, sample_dataset, tmp_path
):
  shutil.copytree(workdirs[1], tmp_path / "run")
  config = eval_ls.get_config().to_json()
  (tmp_path / "run" / "config.json").write_text(config)
  options = {"data.path": sample_dataset, **OPTIMISER}
  eight = {"num_steps": 8, "optim.cooldown_steps": 4}
  told = refused(train(tmp_path / "run", **options, **eight))
  assert "cannot resume from" in told


def test_the_options_were_in_effect(workdirs):
  rows = metrics_of(workdirs[0])
  assert 0 < rows[8]["train/num_skipped"] < 3
  rates = [row["train/lr"] for row in rows.values()]
  assert rates[0] < rates[1] == rates[3] > rates[7]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
  """Returns a data set with sound."""
  path = tmp_path_factory.mktemp("talks") / "data"
  return talking_mouths.write_dataset(path, 4, 1, num_frames=16)


@pytest.mark.slow
@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_every_objective_resumes_with_the_same_bits(talks, tmp_path, objective):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  options = {"data.path": talks, "optim.schedule": "constant"}
  options |= {"optim.warmup_ratio": 0.0}
  options |= objectives.overrides(objective, tmp_path)
  results = [
    train(whole, **options, num_steps=4),
    train(resumed, **options, num_steps=2),
    train(resumed, **options, num_steps=4),
  ]
  assert [r.returncode for r in results] == [0, 0, 0], results
  assert "resumed from step 2" in results[2].stdout
  assert_same_bits(resumed, whole, 4)
  # It opens as any run's, and another run starts from it.
  other = tmp_path / "other"
  result = train(other, **options, num_steps=1, init_from=resumed)
  assert f"starts from {resumed}" in result.stdout, result


@pytest.mark.slow
def test_however_checkpoints_are_saved_and_kept_all_bits_are_the_same(
  sample_dataset, tmp_path
):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  options = {
    "best_metric": "eval/train/loss_rec",
    "checkpoint_minutes": 1e-6,
    "checkpoint_steps": 0,
    "data.path": sample_dataset,
    "eval_steps": 2,
    "keep_checkpoints": 2,
    "keep_every_steps": 3,
  }
  assert train(whole, **options).returncode == 0
  shutil.copytree(whole, resumed)
  for step in ("5", "6"):
    shutil.rmtree(resumed / "checkpoints" / step)
  result = train(resumed, **options)
  assert "resumed from step" in result.stdout
  assert_same_bits(resumed, whole, 6)
  losses = {
    row["step"]: row["eval/train/loss_rec"]
    for row in rows_of(whole)
    if "eval/train/loss_rec" in row
  }
  assert list(losses) == [2, 4, 6]
  best = min(losses, key=losses.get)
  kept = {int(p.name) for p in (whole / "checkpoints").iterdir()}
  assert kept == {3, 5, 6, best}
  for workdir in (whole, resumed):
    path = formats.resolve(str(workdir / "best"))
    source = formats.read(path).source
    assert source == str(workdir / "checkpoints" / str(best))


def test_without_a_metric_there_is_no_best_checkpoint(workdirs):
  with pytest.raises(WeightsError, match=r"train with config\.best_metric"):
    formats.read(workdirs[0] / "best")
