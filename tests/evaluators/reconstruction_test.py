"""The reconstruction loss: on which clips it is measured."""

import jax
import pytest
from etils import epath

from configs import pretrain_b
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.evaluators.reconstruction import Reconstruction
from marlin_jax.pretraining import configuration
from marlin_jax.pretraining.course import (
  PretrainingCourse,
  TrainingData,
  evaluated_splits,
)
from tests.support.training_runs import TINY


def opened(path, settings):
  data = configuration.DataSet(str(path), 1.0, "data")
  cache = epath.Path(path) / "index"
  return TrainingData(data, settings, cache).open(lambda *_, **__: None)


def losses(path, clips_per_device):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(
    TINY | {"clips_per_device": clips_per_device, "data.sample_by": "record"}
  )
  data = opened(path, config.data)
  course = PretrainingCourse(config, [data])
  state = jax.jit(course.initialise)()
  result = Reconstruction(course, evaluated_splits([data], config.data)).losses(
    state
  )
  return course.trainer.num_microbatches, result.scalars


def test_the_loss_does_not_depend_on_the_memory_of_the_device(sample_dataset):
  (whole, want), (parts, got) = (losses(sample_dataset, n) for n in (4, 2))
  assert (whole, parts) == (1, 2)
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-5), name


def test_a_data_set_with_evaluated_splits_videos_is_evaluated_on_them(
  face_data, sample_dataset, capfd
):
  settings = pretrain_b.get_config().data
  settings.sample_by = "record"
  faces, sample = opened(face_data, settings), opened(sample_dataset, settings)

  def evaluated(*parts):
    return [(x.path, x.split) for x in evaluated_splits(parts, settings)]

  assert evaluated(faces) == [(faces.path, "val")]
  assert not capfd.readouterr().out
  assert evaluated(sample) == [(sample.path, "train")]
  assert "evaluated on 'train', which is trained on" in capfd.readouterr().out
  # One that has none is left out beside another.
  assert evaluated(sample, faces) == [(faces.path, "val")]
  assert f"{sample.path} has no split 'val', so" in capfd.readouterr().out
  settings.eval_split = "train"
  assert evaluated(faces, sample) == [
    (faces.path, "train"),
    (sample.path, "train"),
  ]
  assert not capfd.readouterr().out
  settings.eval_split = "test"
  with pytest.raises(DatasetError, match="no split 'test'"):
    evaluated(sample)
