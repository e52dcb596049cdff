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
from tests.support import hub as hub_server
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


def run_with_hub(address, folder, *arguments, **environment):
  """Runs Python, which reads the hub's address when it starts."""
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
    | environment,
    check=False,
    timeout=250,
  )


def test_a_name_on_the_hub_is_fetched_without_its_code(
  weights, authors_folder, tmp_path
):
  with hub_server.serving(tmp_path / "hub") as address:
    result = run_with_hub(
      address,
      tmp_path,
      *("-m", "marlin_jax.convert", "hf://owner/marlin_tiny"),
      tmp_path / "converted",
    )
  assert result.returncode == 0, result.stderr
  assert_same(formats.read(tmp_path / "converted"), weights)
  assert not list((tmp_path / "cache").rglob("modeling.py"))


_RESOLVE = """
import sys
from marlin_jax.weights import formats
for name in sys.argv[1:]:
  try:
    print(formats.resolve(name))
  except formats.WeightsError as e:
    print(e)
"""


def test_a_revision_on_the_hub_is_fetched_and_unknown_names_are_told(
  weights, authors_folder, tmp_path
):
  owner = tmp_path / "hub" / "owner"
  other = Weights(ENCODER, {k: 2 * v for k, v in weights.arrays.items()})
  safetensors_folder.write(other, owner / "marlin_tiny@v1.0")
  names = ("marlin_tiny", "marlin_tiny@v1.0", "marlin_tiny@v2", "nothing")
  with hub_server.serving(tmp_path / "hub") as address:
    result = run_with_hub(
      address, tmp_path, "-c", _RESOLVE, *(f"owner/{name}" for name in names)
    )
  assert result.returncode == 0, result.stderr
  main, pinned, *problems = result.stdout.splitlines()
  assert_same(formats.read(main), weights)
  assert_same(formats.read(pinned), other)
  for name, problem in zip(names[2:], problems, strict=True):
    assert f"'owner/{name}' is no file or folder here" in problem


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
