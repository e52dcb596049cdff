"""marlin_jax.compat against marlin-pytorch with the same random weights."""

import dataclasses
import importlib.util
import inspect

import numpy as np
import pytest

from marlin_jax.compat import Marlin
from marlin_jax.weights import formats, marlin_pytorch
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError
from tests.support import authors
from tests.support.videos import moving_noise, write_video

TINY = Architecture(
  width=32,
  depth=1,
  num_heads=2,
  mlp_dim=64,
  dec_width=16,
  dec_depth=1,
  dec_num_heads=2,
  dec_mlp_dim=32,
)
needs_theirs = pytest.mark.skipif(
  not importlib.util.find_spec("marlin_pytorch"),
  reason="marlin-pytorch is not installed",
)


@pytest.fixture(scope="module")
def weights() -> Weights:
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(0, 0.3, shape).astype(np.float32)
    for name, shape in TINY.shapes().items()
  }
  return Weights(TINY, arrays)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
  """Float clips in [0, 1], (B, C, T, H, W)."""
  np_rng = np.random.default_rng(1)
  return np_rng.random((2, 3, 16, 224, 224), np.float32)


@needs_theirs
@pytest.mark.parametrize("arguments", [(), (True,), (False,)])
def test_features_of_clips_are_theirs(weights, clips, arguments):
  import torch

  tensor = torch.from_numpy(clips)
  want = authors.network(weights).extract_features(tensor, *arguments).numpy()
  for x in (clips, tensor):
    got = Marlin(weights).eval().extract_features(x, *arguments)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@needs_theirs
@pytest.mark.parametrize(
  "arguments",
  [(), (False, 1), (False, 2, 8, "mean"), (False, 2, 16, "max", True)],
)
def test_features_of_a_video_are_theirs(
  weights, tmp_path, monkeypatch, arguments
):
  frames = moving_noise(70, 224, 224)
  path = write_video(tmp_path / "v.mp4", frames, "mpeg4", "yuv420p")
  streams = [{"nb_frames": "70"}]
  monkeypatch.setattr("ffmpeg.probe", lambda _: {"streams": streams})
  want = authors.network(weights).extract_video(str(path), *arguments).numpy()
  got = Marlin(weights).extract_video(str(path), *arguments)
  assert got.shape == want.shape
  # The decoders convert colours with other rounding.
  np.testing.assert_allclose(got, want, rtol=0, atol=0.02)


@needs_theirs
def test_predictions_are_theirs(weights, clips):
  import torch

  num_tokens = TINY.tubelets.num_tokens
  np_rng = np.random.default_rng(2)
  mask = np.stack([np_rng.permutation(num_tokens) < 150 for _ in range(2)])
  with torch.no_grad():
    want = authors.network(weights)(
      torch.from_numpy(clips), torch.from_numpy(mask)
    ).numpy()
  got = Marlin(weights)(clips, torch.from_numpy(mask))
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@needs_theirs
@pytest.mark.parametrize(
  "name",
  [
    "extract_features",
    "extract_video",
    "from_file",
    "from_online",
    "clean_cache",
  ],
)
def test_arguments_have_their_names_order_and_defaults(name):
  theirs = authors.package().Marlin
  ours, expected = (
    [
      (p.name, p.default)
      for p in inspect.signature(getattr(cls, name)).parameters.values()
      if p.kind is not p.KEYWORD_ONLY
    ]
    for cls in (Marlin, theirs)
  )
  assert ours == expected


def test_files_are_opened_and_a_wrong_name_is_told(
  weights, clips, tmp_path, monkeypatch
):
  path = tmp_path / "a.full.pt"
  marlin_pytorch.write(weights, path)
  with pytest.raises(WeightsError, match="width 32, and marlin_vit_base_ytf"):
    Marlin.from_file(
      "marlin_vit_base_ytf", str(path), num_heads=2, dec_num_heads=2
    )
  model = Marlin.from_file("mine", str(path), num_heads=2, dec_num_heads=2)
  assert not model.as_feature_extractor
  assert model.clip_frames == 16
  np.testing.assert_array_equal(
    model.extract_features(clips[:1]),
    Marlin(weights).extract_features(clips[:1]),
  )
  with pytest.raises(WeightsError, match="marlin_vit_small_ytf"):
    Marlin.from_online("mine")


def test_the_cache_of_published_models_is_cleaned(
  weights, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  file = tmp_path / "models" / "marlin_vit_base_ytf.encoder.pt"
  file.parent.mkdir()
  published = dataclasses.replace(
    TINY.without_decoder(), width=768, num_heads=12
  )
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(0, 0.1, shape).astype(np.float32)
    for name, shape in published.shapes().items()
  }
  marlin_pytorch.write(Weights(published, arrays), file)
  other = file.with_name("mine.pt")
  other.write_bytes(b"kept")
  model = Marlin.from_online("marlin_vit_base_ytf")
  assert model.as_feature_extractor
  assert formats.downloaded() == [file]
  Marlin.clean_cache()
  assert str(file) in capsys.readouterr().out
  assert not file.exists()
  assert other.exists()


def test_wrong_shapes_are_told(weights, clips):
  model = Marlin(weights)
  with pytest.raises(ValueError, match=r"expected \(B, 3, T, H, W\)"):
    model.extract_features(clips.transpose(0, 2, 3, 4, 1))
  mask = np.zeros((2, TINY.tubelets.num_tokens), bool)
  mask[0, :5] = True
  with pytest.raises(ValueError, match=r"\[0, 5\] visible tokens"):
    model(clips, mask)
  with pytest.raises(ValueError, match="mask of shape"):
    model(clips, mask[0])
  encoder = Marlin(weights.encoder_only())
  with pytest.raises(WeightsError, match="no decoder"):
    encoder(clips, mask)
