"""Evaluations of MARLIN's and VideoMAE's files equal those of our format."""

import dataclasses

import numpy as np
import pytest
import torch

from configs import eval_far
from marlin_jax.downstream import clip_batches, splits
from marlin_jax.weights import (
  formats,
  huggingface,
  safetensors_folder,
  videomae,
)
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, encoder_sha256
from tests.support import authors, labelled_data
from tests.support.labelled_data import LABELS, draw_face, metric, renamed, run

# A published width, from which the number of heads of .pt and .pth follows.
MARLIN = Architecture(384, 1, 6, 64, num_frames=4)
# The file does not store the number of frames; 16 are assumed.
VIDEOMAE = dataclasses.replace(
  MARLIN, num_frames=16, imagenet_input=True, norm_eps=1e-6
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A data set of videos with one window each."""

  def short(i, np_rng):
    video = draw_face(i, np_rng)
    return dataclasses.replace(video, frames=video.frames[:7], num_tracks=1)

  videos = {
    split: renamed(labelled_data.make(num, short, seed), split)
    for seed, (split, num) in enumerate(
      {"train": 8, "val": 3, "test": 4}.items()
    )
  }
  return labelled_data.write(
    tmp_path_factory.mktemp("converted") / "data", videos, LABELS
  )


def drawn(architecture):
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(0, 0.05, shape).astype(np.float32)
    for name, shape in architecture.shapes().items()
  }
  return Weights(architecture, arrays | videomae.position_tables(architecture))


def evaluated(workdir, data, checkpoint):
  """Evaluates; removes the times from the results."""
  results = run(
    eval_far,
    workdir,
    data,
    checkpoint,
    tasks="mood",
    modes="linear,knn",
    **{"knn.k": 3},
  )
  for cell in results["cells"]:
    cell.pop("secs", None)
  return results


def features_of(workdir, split):
  """Returns the cached features (V, D) of an evaluation."""
  for settings in sorted(workdir.glob("features/features-*/settings.json")):
    if f'"split": "{split}"' in settings.read_text():
      return np.load(settings.with_name("000000000.npy"))
  raise AssertionError(f"no features of {split} in {workdir}")


def test_the_authors_files_give_their_features_and_the_same_scores(
  data, tmp_path
):
  weights = drawn(MARLIN)
  safetensors_folder.write(weights, tmp_path / "ours")
  want = evaluated(tmp_path / "w", data, tmp_path / "ours")
  network = authors.network(weights)
  path = tmp_path / "marlin.encoder.pt"
  torch.save(network.state_dict(), path)
  got = evaluated(tmp_path / "w-pt", data, path)
  assert got["checkpoint"]["sha256"] == want["checkpoint"]["sha256"]
  assert got["checkpoint"]["source"] == str(path)
  assert got["cells"] == want["cells"]
  assert metric(got, "linear") > metric(got, "constant")

  split = splits.open_split(str(data), "test", tmp_path)
  windows = split.windows(MARLIN.clip)
  assert len(windows) == 4
  clips = clip_batches.ClipReader(split, MARLIN.clip).read(windows)
  with torch.no_grad():
    expected = network.extract_features(
      authors.clips(clips.astype(np.float32) / 255), keep_seq=False
    )
  np.testing.assert_allclose(
    features_of(tmp_path / "w-pt", "test"), expected.numpy(), atol=1e-4
  )


def test_videomae_files_give_the_same_scores(data, tmp_path):
  weights = drawn(VIDEOMAE)
  safetensors_folder.write(weights, tmp_path / "ours")
  want = evaluated(tmp_path / "w", data, tmp_path / "ours")
  assert not videomae.write(weights, tmp_path / "theirs.pth")
  assert not huggingface.write(weights, tmp_path / "hf")
  got = evaluated(tmp_path / "w-pth", data, tmp_path / "theirs.pth")
  assert got["checkpoint"]["architecture"]["imagenet_input"]
  assert got["checkpoint"]["sha256"] == want["checkpoint"]["sha256"]
  assert got["cells"] == want["cells"]
  # The same bits, so a third evaluation is not needed.
  transformers = formats.read(tmp_path / "hf")
  assert encoder_sha256(transformers) == want["checkpoint"]["sha256"]
