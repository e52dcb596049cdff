"""The reconstruction loss: on which clips it is measured."""

import jax
import pytest
from ml_collections import ConfigDict

from configs import pretrain_b
from marlin_jax import train
from marlin_jax.data.prepared_dataset import open_dataset
from marlin_jax.devices import sharding
from marlin_jax.evaluators.reconstruction import Reconstruction
from marlin_jax.pretraining.course import PretrainingCourse, TrainingData
from tests.support.training_runs import TINY


def losses(path, clips_per_device):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(
    TINY | {"clips_per_device": clips_per_device, "data.sample_by": "record"}
  )
  dataset = open_dataset(str(path), "train")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  data = [TrainingData(dataset, None, "data", 1.0)]
  course = PretrainingCourse(config, data, mesh)
  state = jax.jit(course.initialise)()
  result = Reconstruction(course, [dataset]).losses(state)
  return course.trainer.num_microbatches, result.scalars


def test_the_loss_does_not_depend_on_the_memory_of_the_device(sample_dataset):
  (whole, want), (parts, got) = (losses(sample_dataset, n) for n in (4, 2))
  assert (whole, parts) == (1, 2)
  assert got.keys() == want.keys()
  for name, value in want.items():
    if not name.endswith("loss_batch_colour"):  # the colour of each part
      assert got[name] == pytest.approx(value, rel=1e-5), name


def test_a_data_set_with_held_out_videos_is_evaluated_on_them(
  face_data, sample_dataset, capfd
):
  settings = ConfigDict({"split": "train", "eval_split": ""})
  assert train._open_evaluation(str(face_data), settings).split == "val"
  assert not capfd.readouterr().out
  assert train._open_evaluation(str(sample_dataset), settings).split == "train"
  assert "evaluated on 'train', which is trained on" in capfd.readouterr().out
  settings.eval_split = "train"
  assert train._open_evaluation(str(face_data), settings).split == "train"
  assert not capfd.readouterr().out
