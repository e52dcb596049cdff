"""Models on a stand-in for the HuggingFace hub: published, and opened again."""

import json
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest

from configs import eval_far
from marlin_jax.inference import classifier
from marlin_jax.records.folders import sha256_of
from marlin_jax.weights import formats, hub
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import WeightsError, encoder_sha256
from tests.support import hub as hub_server
from tests.support.labelled_data import run, write_random
from tests.support.processes import ROOT

ENCODER = Architecture(
  width=32, depth=1, num_heads=2, mlp_dim=64, num_frames=4, patch_size=56
)
CELL = "mood-linear-1-0"
# huggingface_hub reads the address when it is imported.
PUSH = """
import sys
from marlin_jax import Marlin
from marlin_jax.weights.weights import WeightsError
encoder, far, cell = sys.argv[1:]
marlin = Marlin.from_pretrained(encoder)
words = {"license": "cc-by-nc-4.0", "data": "drawn faces", "results": [far]}
print(marlin.push_to_hub("me/encoder", **words))
marlin.push_to_hub("me/encoder", **words)  # a second commit
Marlin.load_classifier(f"{far}/models/{cell}").push_to_hub("me/mood", **words)
Marlin.from_pretrained("me/encoder")
print(Marlin.load_classifier("me/mood").weights.source)
"""


@pytest.fixture(scope="module")
def far(face_data, tmp_path_factory):
  """Workdir of an evaluation, with the encoder beside it."""
  folder = tmp_path_factory.mktemp("far")
  encoder = write_random(folder / "encoder", ENCODER)
  run(
    eval_far,
    folder / "run",
    face_data,
    encoder,
    tasks="mood",
    modes="linear",
    num_seeds=1,
    **{"data.tests": f"{face_data}:val"},
  )
  return folder / "run"


def summary(far):
  return json.loads((far / "results.json").read_text())["summary"]


def push(far, root, address, token):
  return subprocess.run(
    [sys.executable, "-c", PUSH, far.parent / "encoder", far, CELL],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {"HF_ENDPOINT": address, "HF_HOME": str(root / "hf"), "HF_TOKEN": token},
    check=False,
    timeout=250,
  )


def test_a_published_model_has_a_card_and_opens_by_its_name(
  far, face_data, tmp_path
):
  root = tmp_path / "hub"
  with hub_server.serving(root) as address:
    result = push(far, tmp_path, address, hub_server.TOKEN)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith(f"{address}/me/encoder/commit/")
  encoder = formats.read(far.parent / "encoder")
  sha256 = encoder_sha256(encoder)
  assert encoder_sha256(formats.read(root / "me/encoder")) == sha256

  card = huggingface_hub.ModelCard.load(root / "me/encoder/README.md")
  assert card.data.license == "cc-by-nc-4.0"
  assert "| trained on | drawn faces |" in card.text
  assert sha256 in card.text
  assert sha256_of(root / "me/encoder/model.safetensors") in card.text
  results = {
    (r.dataset_name, r.task_name, r.metric_name): r.metric_value
    for r in card.data.eval_results
  }
  (found,) = (
    row["metrics"]["accuracy"]["mean"]
    for row in summary(far)
    if row["mode"] == "linear"
  )
  assert results["labelled:test", "mood", "accuracy (linear)"] == found
  assert ("labelled:val", "mood", "accuracy (linear)") in results
  assert "| mood | linear | labelled:test | accuracy |" in card.text

  # The classifier is whole, and tells nothing of this machine.
  mood = huggingface_hub.ModelCard.load(root / "me/mood/README.md")
  assert "dark, grey, bright" in mood.text
  assert "constant" not in mood.text
  ours = classifier.VideoClassifier.load(far / "models" / CELL)
  theirs = classifier.VideoClassifier.load(root / "me/mood")
  outputs = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
  np.testing.assert_array_equal(
    ours.probabilities(outputs), theirs.probabilities(outputs)
  )
  for file in (root / "me").rglob("*"):
    if file.suffix in (".json", ".md"):
      for folder in (far.parent, face_data.parent):
        assert str(folder) not in file.read_text()


def test_results_of_another_encoder_and_a_refusal_are_told(far, tmp_path):
  with pytest.raises(WeightsError, match="results of the encoder"):
    hub.read_results([far], "0" * 64)
  with pytest.raises(WeightsError, match="expected the workdir"):
    hub.read_results([tmp_path], "0" * 64)
  with pytest.raises(WeightsError, match="expected OWNER/NAME"):
    hub.push(lambda folder: None, "name", None)
  with hub_server.serving(tmp_path / "hub") as address:
    result = push(far, tmp_path, address, "hf_reads")
  assert "cannot be written on the HuggingFace hub" in result.stderr
  assert "hf auth login" in result.stderr
