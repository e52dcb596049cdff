"""The house rules that a reader relies on: floors, binaries, configurations."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_jax.eval import configuration
from marlin_jax.lipsync import configuration as lipsync_configuration
from marlin_jax.pretraining.configuration import validate

ROOT = Path(__file__).parents[1]

# A file imports from its own floor or below; binaries never import each other.
FLOORS = {
  0: (
    "records",
    "sound",
    "video",
    "arguments",
    "config_arguments",
    "output_folder",
    "scores",
    "quality_index",
    "xla_flags",
  ),
  1: ("attention", "chips", "masking", "losses", "models"),
  2: (
    "train_step",
    "prepared_dataset",
    "input_pipeline",
    "optim",
    "sharding",
    "hlo",
    "roofline",
    "topology",
    "rendezvous",
    "distributed",
    "flops",
    "memory",
    "checksums",
    "checkpoint",
    "skipped",
    "watchdog",
    "goodput",
    "metrics",
    "profiler",
    "run_files",
    "summaries",
    "sample",
    "validate",
    "formats",
    "published",
  ),
  3: (
    "clip_reconstruction",
    "clips",
    "downstream",
    "evaluators",
    "experiment",
    "face_video",
    "feature_files",
    "lipsync",
    "marlin",
    "source_video",
    "step_plan",
    "talking_video",
    "training_run",
    "video_folder",
    "warm_start",
    "window_features",
  ),
  4: ("train", "convert", "features", "plan", "reconstruct", "eval"),
}
# The only ones that may import data_prep.
VIDEO_READERS = (
  "face_video",
  "sample",
  "source_video",
  "talking_video",
  "video_folder",
)

BINARIES = (
  "marlin_jax.train",
  "marlin_jax.convert",
  "marlin_jax.features",
  "marlin_jax.plan",
  "marlin_jax.reconstruct",
  "marlin_jax.eval.far",
  "marlin_jax.eval.fer",
  "marlin_jax.eval.dfd",
  "marlin_jax.eval.ls",
  "data_prep.prepare",
  "data_prep.compare_parsers",
  "data_prep.contact_sheet",
  "data_prep.verify",
  "data_prep.report",
)


def modules(package):
  for path in sorted((ROOT / package).rglob("*.py")):
    if path.name != "__init__.py":
      yield path


def imports(path):
  """Dotted names that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(name):
  for floor, names in FLOORS.items():
    if name in names:
      return floor
  raise AssertionError(f"{name} has no floor: add it to FLOORS")


def test_files_import_downward_only():
  for path in modules("marlin_jax"):
    own = path.relative_to(ROOT / "marlin_jax").with_suffix("").parts[0]
    for name in imports(path):
      package, _, rest = name.partition(".")
      if own not in VIDEO_READERS:
        assert package != "data_prep", f"{path}: {name}"
      if package == "marlin_jax":
        other = rest.partition(".")[0]
        assert floor_of(other) <= floor_of(own), f"{path}: {name}"
        if floor_of(own) == 4:
          assert floor_of(other) < 4, f"{path}: {name}"


def test_floor_0_needs_no_jax_and_data_prep_stands_on_floor_0_alone():
  for path in modules("data_prep"):
    for name in imports(path):
      package, _, rest = name.partition(".")
      assert package not in ("jax", "flax", "grain"), f"{path}: {name}"
      if path.stem != "farl":  # the paper's parser, on request
        assert package != "torch", f"{path}: {name}"
      if package == "marlin_jax":
        assert floor_of(rest.partition(".")[0]) == 0, f"{path}: {name}"
  for name in FLOORS[0]:
    for found in imports(ROOT / f"marlin_jax/{name}.py"):
      assert found.partition(".")[0] not in ("jax", "flax", "grain", "cv2")


def test_configurations_import_nothing_of_the_package():
  for path in modules("configs"):
    for name in imports(path):
      assert name.partition(".")[0] in ("ml_collections", "configs"), path


@pytest.mark.parametrize("path", list(modules("configs")), ids=lambda p: p.stem)
def test_every_configuration_is_valid(path):
  check = configuration.validate if "eval_" in path.stem else validate
  if path.stem == "eval_ls":
    check = lipsync_configuration.validate
  check(importlib.import_module(f"configs.{path.stem}").get_config())


@pytest.mark.parametrize("binary", BINARIES)
def test_every_binary_explains_itself(binary):
  result = subprocess.run(
    [sys.executable, "-m", binary, "--help"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=60,
  )
  # absl's --help ends with 1, argparse's with 0.
  assert result.returncode in (0, 1), result.stderr
  text = result.stdout + result.stderr
  assert "Traceback" not in text
  assert len(text.splitlines()) > 5


def test_every_file_with_a_main_is_a_known_binary():
  for package in ("marlin_jax", "data_prep"):
    for path in modules(package):
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
      # The decoder's child process is started by its parent alone.
      if (
        name != "data_prep.video.decoder_process"
        and "__main__" in path.read_text()
      ):
        assert name in BINARIES
