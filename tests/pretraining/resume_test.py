"""A run that stops and resumes gives the bits of an undisturbed one."""

import pytest

from marlin_jax.pretraining import spikes
from tests.support.files import arrays_of
from tests.support.training_runs import metrics_of, train

OPTIMISER = {
  "ema_warmup": True,
  "optim.clip_norm": 0.5,
  "optim.decay_params": "kernels",
  "optim.layer_decay": 0.75,
  "optim.schedule": "constant",
  "optim.spike_sigmas": 0.1,
  "optim.warmup_steps": 2,
  "optim.weight_decay": 0.05,
}


def assert_same_bits(workdir, reference):
  assert metrics_of(workdir) == metrics_of(reference)
  got, want = arrays_of(workdir, 8), arrays_of(reference, 8)
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
  assert_same_bits(resumed, whole)


def test_the_options_were_in_effect(workdirs):
  rows = metrics_of(workdirs[0])
  assert 0 < rows[8]["train/num_skipped"] < 4
  rates = [row["train/lr"] for row in rows.values()]
  assert rates[0] < rates[1] == rates[3] > rates[7]
