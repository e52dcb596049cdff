"""Latent targets, against a PyTorch transcription; teachers of every kind."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs import pretrain_b
from marlin_jax.models import vit
from marlin_jax.objectives import objective
from marlin_jax.pretraining import build, configuration, flops
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import formats, safetensors_folder
from marlin_jax.weights.weights import Weights, WeightsError, encoder_sha256
from tests.support import layouts
from tests.support.demo_models import make_weights
from tests.support.training_runs import metrics_of, refused, train

NUM_CLIPS = 4
SMALL = layouts.SMALL | {
  "batch_size": NUM_CLIPS,
  "clips_per_device": NUM_CLIPS,
  "data.num_frames": 4,
  "data.frame_size": 64,
  "teacher.weight": 0.5,
}
# Wider and deeper than the student.
TEACHER = {"num_frames": 4, "image_size": 64, "width": 48, "depth": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """Returns the weights of a teacher, and their folder."""
  weights = make_weights(**TEACHER)
  path = tmp_path_factory.mktemp("teacher")
  safetensors_folder.write(weights, path)
  return weights, path


def experiment(**overrides):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  return build.Experiment(config, 10)


def batch_of(trainer):
  np_rng = np.random.default_rng(0)
  tubelets = trainer.task.tubelets
  shape = (NUM_CLIPS, *tubelets.video_shape)
  return {
    "video": np_rng.integers(0, 256, shape, np.uint8),
    "regions": np_rng.integers(0, 2048, (NUM_CLIPS, *tubelets.grid), np.uint16),
    "keys": jax.random.split(jax.random.key(0), NUM_CLIPS),
  }


def pass_over(made, state, batch):
  """Returns loss and metrics of the one objective, and what was masked."""
  trainer = made.trainer

  @jax.jit
  def run(state, frozen):
    inputs, *_ = trainer.prepare(batch)
    forward = trainer.forward(state.params, state.fixed, *inputs)
    total, metrics, _ = objective.value_and_grads(
      trainer.objectives,
      state,
      frozen,
      forward,
      batch | {"visible": inputs[1], "masked": inputs[2]},
    )
    return total, metrics, forward, inputs[2]

  return jax.device_get(run(state, made.constants.get("frozen", {})))


@pytest.mark.parametrize(
  ("layers", "imagenet", "scan"),
  [("", False, False), ("1,3", True, False), ("1,3", False, True)],
)
def test_the_loss_is_that_of_v_jepa(teacher, layers, imagenet, scan):
  weights, path = teacher
  made = experiment(
    **{
      "teacher.path": str(path),
      "teacher.layers": layers,
      "input.imagenet_norm": imagenet,
      "scan": scan,
    }
  )
  state = jax.jit(made.initialise)()
  batch = batch_of(made.trainer)
  total, metrics, forward, masked = pass_over(made, state, batch)

  # The teacher takes plain pixels, whatever the student does.
  encoder = weights.autoencoder().encoder
  tubelets = weights.architecture.tubelets
  x = encoder.embed(tubelets.patchify(batch["video"]).astype(np.float32) / 255)
  found = []
  for block in encoder.transformer.blocks:
    x = block(x)
    found.append(x)
  found[-1] = encoder.norm(x)
  numbers = [int(n) for n in layers.split(",")] if layers else [3]
  targets = []
  for number in numbers:
    h = torch.tensor(np.array(found[number - 1]))
    h = F.layer_norm(h, (h.size(-1),))
    index = torch.tensor(masked)[..., None].expand(-1, -1, h.size(-1))
    targets.append(torch.gather(h, 1, index))
  own = state.params["objectives"]["teacher"]["head"]
  features = torch.tensor(np.array(forward.prediction.features))
  predicted = F.linear(
    features,
    torch.tensor(np.array(own["kernel"]).T),
    torch.tensor(np.array(own["bias"])),
  )
  want = F.l1_loss(predicted, torch.cat(targets, -1)).item()
  assert metrics["loss_teacher"] == pytest.approx(want, rel=1e-4)
  assert total == pytest.approx(0.5 * want, rel=1e-4)
  assert metrics["teacher/features_rank"] > 1


@pytest.mark.slow
def test_a_teacher_sees_smaller_clips_with_their_places_positions(
  teacher, tmp_path
):
  """As one whose table is of the run's own grid."""
  weights, path = teacher[0].encoder_only(), teacher[1]
  small = dataclasses.replace(weights.architecture, num_frames=2, image_size=32)
  grids = (x.tubelets.grid for x in (weights.architecture, small))
  table = vit.positions_at(weights.arrays["encoder.positions"], *grids)
  cut = Weights(
    small, weights.arrays | {"encoder.positions": np.asarray(table)}, "cut"
  )
  safetensors_folder.write(cut, tmp_path)
  losses = []
  for folder in (path, tmp_path):
    made = experiment(
      **{
        "teacher.path": str(folder),
        "data.num_frames": 2,
        "data.frame_size": 32,
        "mask.ratio": 0.5,
      }
    )
    state = jax.jit(made.initialise)()
    _, metrics, *_ = pass_over(made, state, batch_of(made.trainer))
    losses.append(metrics["loss_teacher"])
  assert losses[0] == losses[1] > 0


def test_a_teacher_is_on_the_host_until_devices_take_their_shards(teacher):
  """Else the first device would hold all of it beside its shard."""
  made = experiment(**{"teacher.path": str(teacher[1]), "teacher.weight": 1.0})
  arrays = jax.tree.leaves(made.constants)
  assert arrays
  assert all(isinstance(x, np.ndarray) for x in arrays)


def test_the_average_teaches_with_the_weights_it_has():
  """V-JEPA's target encoder: the average, not the present weights."""
  made = experiment(**{"teacher.path": "ema", "ema_decay": 0.9})
  state = jax.jit(made.initialise)()
  batch = batch_of(made.trainer)
  assert not made.constants
  _, before, *_ = pass_over(made, state, batch)
  other = jax.tree.map(lambda x: x + 0.1, state.ema)
  _, after, *_ = pass_over(made, state.replace(ema=other), batch)
  assert after["loss_teacher"] != before["loss_teacher"]
  # Other losses read the present weights alone.
  assert after["teacher/features_std"] == before["teacher/features_std"]


@pytest.mark.parametrize("path", ["ema", "a folder"])
def test_flops_are_those_that_xla_counts(teacher, path):
  """By difference: XLA also counts the optimiser, which here weighs as much."""
  sizes = {"model.width": 192, "model.mlp_dim": 768, "model.dec_width": 128}
  sizes |= {"model.depth": 2, "model.dec_mlp_dim": 512, "adv.weight": 0.0}
  path = str(teacher[1]) if path == "a folder" else path
  counts = []
  for weight in (0.0, 1.0):
    made = experiment(
      **sizes,
      **{"teacher.path": path, "teacher.weight": weight, "ema_decay": 0.9},
    )
    found = made.lower_step().cost_analysis()["flops"] / NUM_CLIPS
    ours = flops.training_step(made.architecture, made.trainer, NUM_CLIPS)
    counts.append((found, ours))
  (found_without, without), (found, ours) = counts
  assert found - found_without == pytest.approx(ours - without, rel=0.05)


# --- configurations -----------------------------------------------------------


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({}, "teacher.path=''"),
    ({"teacher.path": "ema"}, "ema_decay=0"),
    ({"teacher.path": "x", "teacher.layers": "3,1"}, "rising order"),
    ({"teacher.path": "x", "teacher.layers": "0"}, "from 1"),
    ({"teacher.path": "x", "teacher.layers": "last"}, "numbers of blocks"),
    ({"teacher.weight": 0.0, "loss.pixel_weight": 0.0}, "another objective"),
    ({"teacher.path": "x", "loss.pixel_weight": 0.0}, "adv.weight=0.1"),
  ],
)
def test_what_cannot_be_run_is_refused(overrides, words):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  with pytest.raises(ConfigError, match=words):
    configuration.validate(config)


def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path):
  path = str(teacher[1])
  with pytest.raises(ConfigError, match=r"num_frames: 6, of the teacher 4"):
    _ = experiment(**{"teacher.path": path, "data.num_frames": 6}).objectives
  with pytest.raises(ConfigError, match=r"has 3 blocks"):
    _ = experiment(**{"teacher.path": path, "teacher.layers": "4"}).objectives
  with pytest.raises(WeightsError, match="nothing_here"):
    _ = experiment(
      **{"teacher.path": str(tmp_path / "nothing_here")}
    ).objectives


# --- runs ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_teaches_another_and_resumes_with_the_same_teacher_alone(
  sample_dataset, tmp_path
):
  """A run is the teacher; the student's checkpoint does not hold it."""
  options = {
    "adv.weight": 0.0,
    "data.path": sample_dataset,
    "num_steps": 4,
    "optim.schedule": "constant",
    "optim.warmup_ratio": 0.0,
  }
  first, student = tmp_path / "teacher", tmp_path / "student"
  assert train(first, **options).returncode == 0
  taught = options | {
    "loss.pixel_weight": 0.0,
    "teacher.path": str(first),
    "teacher.weight": 1.0,
  }
  result = train(student, **taught)
  assert result.returncode == 0, result
  assert "teacher, weight 1:" in result.stdout
  rows = metrics_of(student)
  assert {"train/loss_teacher", "train/teacher/features_rank"} <= set(rows[1])
  assert rows[4]["train/loss"] == rows[4]["train/loss_teacher"]
  # The student's workdir opens as any other run's, without the teacher's head.
  weights = formats.read(student)
  assert weights.architecture.has_decoder
  assert encoder_sha256(weights) != encoder_sha256(formats.read(first))

  # Trained further, it is another teacher.
  assert train(first, **options | {"num_steps": 6}).returncode == 0
  longer = taught | {"num_steps": 6}
  assert "teacher.sha256" in refused(train(student, **longer))
  longer["teacher.path"] = str(first / "checkpoints" / "4")
  result = train(student, **longer)
  assert "resumed from step 4" in result.stdout, result
