"""Folders of the HuggingFace hub: the authors' own, sharded ones, by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from marlin_jax.weights import (
  formats,
  huggingface,
  marlin_pytorch,
  name_tables,
  safetensors_folder,
  videomae,
)
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError
from tests.support import hub
from tests.support.processes import ROOT

ENCODER = Architecture(
  width=32, depth=2, num_heads=4, mlp_dim=64, image_size=112, num_frames=8
)


@pytest.fixture(scope="module")
def weights():
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(size=shape).astype(np.float32) * 0.1
    for name, shape in ENCODER.shapes().items()
  }
  return Weights(ENCODER, arrays | videomae.position_tables(ENCODER))


@pytest.fixture
def authors_folder(weights, tmp_path):
  """As the authors' publish_hf.py writes it."""
  folder = tmp_path / "hub" / "owner" / "marlin_tiny"
  folder.mkdir(parents=True)
  arrays = name_tables.write(
    marlin_pytorch.rules(weights.architecture), weights.arrays
  )
  safetensors.numpy.save_file(
    {f"marlin.{name}": array for name, array in arrays.items()},
    folder / "model.safetensors",
    metadata={"format": "pt"},
  )
  config = {
    "model_type": "marlin",
    "architectures": ["MarlinModel"],
    "img_size": 112,
    "encoder_num_heads": 4,
    "decoder_num_heads": 2,
    "as_feature_extractor": True,
  }
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "modeling.py").write_text("raise SystemExit('code was run')")
  return folder


def assert_same(got, want):
  assert got.architecture == want.architecture
  for name, array in want.arrays.items():
    np.testing.assert_array_equal(got.arrays[name], array)


def test_the_authors_folder_is_read(weights, authors_folder):
  assert formats.format_of(authors_folder) == "marlin"
  assert_same(formats.read(authors_folder), weights)


def test_a_name_on_the_hub_is_fetched_without_its_code(
  weights, authors_folder, tmp_path
):
  with hub.serving(tmp_path / "hub") as address:
    environment = os.environ | {
      "HF_ENDPOINT": address,
      "HF_HOME": str(tmp_path / "cache"),
    }

    def convert(name):
      return subprocess.run(
        [
          *(sys.executable, "-m", "marlin_jax.convert", name),
          str(tmp_path / "converted"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
        timeout=250,
      )

    result = convert("hf://owner/marlin_tiny")
    assert result.returncode == 0, result.stderr
    assert_same(formats.read(tmp_path / "converted"), weights)
    assert not list((tmp_path / "cache").rglob("modeling.py"))
    missing = convert("owner/nothing")
  assert missing.returncode == 1
  assert "'owner/nothing' is no file or folder here" in missing.stderr
  assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("kind", ["sharded", "pickled"])
def test_other_files_of_huggingface_folders_are_read(weights, tmp_path, kind):
  huggingface.write(weights, tmp_path)
  file = tmp_path / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  file.unlink()
  if kind == "sharded":
    names = sorted(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, members in parts.items():
      safetensors.numpy.save_file(
        {name: arrays[name] for name in members}, tmp_path / part
      )
    index = {n: part for part, members in parts.items() for n in members}
    (tmp_path / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": index})
    )
  else:
    torch.save(
      {name: torch.from_numpy(array) for name, array in arrays.items()},
      tmp_path / "pytorch_model.bin",
    )
  assert_same(formats.read(tmp_path), weights)
  (tmp_path / "a.safetensors").unlink(missing_ok=True)
  (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
  with pytest.raises(WeightsError, match=r"a\.safetensors|pytorch_model\.bin"):
    formats.read(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(weights, tmp_path):
  huggingface.write(weights, tmp_path)
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": {"x": "../secret.safetensors"}})
  )
  with pytest.raises(WeightsError, match="secret"):
    safetensors_folder.load_shards(tmp_path)
