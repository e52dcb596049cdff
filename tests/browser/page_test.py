"""Values that the page shows, without a browser; see commands/demo_test.py."""

import importlib.util
import json
import subprocess
import sys

import pytest

from marlin_jax.inference.marlin import Marlin
from tests.support.demo_models import make_classifier
from tests.support.processes import ROOT

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("gradio") is None, reason="needs the extra demo"
)


@pytest.mark.slow
def test_numbers_are_told_and_an_encoder_alone_suffices(
  face_models, carphone, tmp_path
):
  model = make_classifier(tmp_path, ("valence", "arousal"), kind="value")
  video = carphone(tmp_path / "face.mp4", 40)
  script = ROOT / "tests" / "support" / "demo_page.py"
  result = subprocess.run(
    [sys.executable, script, model, video],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  shown = json.loads(result.stdout.splitlines()[-1])
  assert "no decoder" in shown["status"]
  expected = Marlin.load_classifier(model).predict(video).as_dict()
  for name, value in expected.items():
    assert f"{name} {value:.3g}" in shown["status"]
  assert shown["scores"] is shown["made"] is None
  assert shown["scores_over_time"] == shown["timeline"] == "DataFrame"
  assert shown["crop"].endswith("crop.mp4")
  assert shown["heat"].endswith("heat.mp4")
