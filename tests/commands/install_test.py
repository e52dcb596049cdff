"""The package, installed: names, extras, and a wheel without the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv

import numpy as np
import pytest
from packaging.requirements import Requirement

import setup
from marlin_jax import __main__, __version__
from marlin_jax.inference.marlin import Marlin
from marlin_jax.records import cli, extras
from marlin_jax.training import config_flags
from marlin_jax.weights import formats, safetensors_folder
from tests.layout_test import COMMANDS, MODULES
from tests.support import training_runs
from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distribution that has a module, where their names differ.
DISTRIBUTIONS = {
  "cv2": "mediapipe",
  "orbax": "orbax-checkpoint",
  "tensorflow_datasets": "tensorflow-datasets",
}
TINY_ENCODER = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}
VIDEO = ["v.mp4", "--checkpoint=runs/b"]
# Runs the rest of the command line where libraries cannot be imported, as if
# they were not installed.
WITHOUT = """
import runpy, sys
for name in {names!r}:
  sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """A folder of random weights."""
  path = tmp_path_factory.mktemp("encoder") / "weights"
  safetensors_folder.write(
    formats.open_encoder(formats.RANDOM, TINY_ENCODER), path
  )
  return path


# --- Names --------------------------------------------------------------------


def test_every_command_has_a_console_script():
  assert {*__main__.COMMANDS.values(), "marlin_jax.__main__"} == set(COMMANDS)
  scripts = {f"marlin-{name}" for name in __main__.COMMANDS}
  assert PROJECT["scripts"].keys() == {"marlin", *scripts}
  assert set(PROJECT["scripts"].values()) == {"marlin_jax.__main__:main"}


def test_a_script_runs_the_command_of_its_name(capsys, monkeypatch):
  monkeypatch.setattr(cli, "prefix", None)
  # As in a new process; runpy warns of modules that are loaded already.
  monkeypatch.delitem(sys.modules, "marlin_jax.features", raising=False)
  monkeypatch.setattr(sys, "argv", ["/bin/marlin-features", "--help"])
  with pytest.raises(SystemExit, match="0"):
    __main__.main()
  by_script = capsys.readouterr().out
  monkeypatch.setattr(sys, "argv", ["marlin", "features", "--help"])
  with pytest.raises(SystemExit, match="0"):
    __main__.main()
  assert capsys.readouterr().out == by_script.replace(
    "marlin-features", "marlin features"
  )
  assert by_script.startswith("usage: marlin-features ")


@pytest.mark.parametrize("name", ["train", "demo"])  # of absl, of argparse
def test_examples_in_the_help_of_a_script_name_the_script(name):
  program = (
    f"import sys; sys.argv = ['/bin/marlin-{name}', '--help']\n"
    "from marlin_jax import __main__; __main__.main()"
  )
  result = run_without(program=program, cwd=ROOT)
  assert f"\n  marlin-{name}" in result.stdout
  assert "python -m" not in result.stdout


def test_messages_name_commands_as_the_user_has_named_one(monkeypatch):
  text = (
    "python -m data_prep.contact_sheet D; python -m marlin_jax.eval.far; "
    "python -m marlin_jax.data_prep.verify D; python -m marlin_jax --version; "
    "python -m data_prep.decoder.process"
  )
  assert str(cli.UserError(text)) == text
  monkeypatch.setattr(cli, "prefix", "marlin-")
  assert str(cli.UserError(text)) == (
    "marlin-contact-sheet D; marlin-eval-far; marlin-verify D; "
    "python -m marlin_jax --version; python -m data_prep.decoder.process"
  )
  monkeypatch.setattr(cli, "prefix", "marlin ")
  assert cli.ArgumentParser("marlin_jax.show", "").prog == "marlin show"


def test_marlin_lists_commands_versions_and_devices(capsys, monkeypatch):
  monkeypatch.setattr(cli, "prefix", None)
  monkeypatch.setattr(sys, "argv", ["marlin"])
  assert __main__.main() == 0
  text = capsys.readouterr().out
  assert all(f"\n  {name} " in text for name in __main__.COMMANDS)
  monkeypatch.setattr(sys, "argv", ["marlin", "--version"])
  monkeypatch.setitem(sys.modules, "mediapipe", None)
  assert __main__.main() == 0
  rows = dict(
    line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()
  )
  assert rows["marlin_jax"] == __version__
  assert rows["devices"].endswith("x cpu")
  assert rows["[features]"] == "lacks mediapipe"
  monkeypatch.setattr(sys, "argv", ["marlin", "trane"])
  assert __main__.main() == 2


def test_a_configuration_is_found_by_its_name_or_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = str(ROOT / "configs" / "pretrain_b.py")
  for argv in (["--config=pretrain_b"], ["--config", "pretrain_b"]):
    found = config_flags.with_path(["train", *argv, "--config.seed=1"])
    assert "=".join(found[1:-1]) == f"--config={path}"
    assert found[-1] == "--config.seed=1"
  for other in ("configs/pretrain_b.py", "pretrain_z", "--config"):
    argv = ["train", f"--config={other}"]
    assert config_flags.with_path(argv) == argv
  # Not the package's in place of a file of one's own.
  (tmp_path / "pretrain_b").touch()
  with pytest.raises(SystemExit, match="expected a Python file"):
    config_flags.with_path(["train", "--config=pretrain_b"])


# --- Extras -------------------------------------------------------------------


@pytest.mark.parametrize("extra", extras.LIBRARIES)
def test_an_extra_installs_its_libraries(extra):
  wanted = list(PROJECT["optional-dependencies"][extra])
  if "marlin-jax[features]" in wanted:
    wanted += PROJECT["optional-dependencies"]["features"]
  names = {
    Requirement(line).name for line in [*wanted, *PROJECT["dependencies"]]
  }
  for module in extras.LIBRARIES[extra]:
    assert DISTRIBUTIONS.get(module, module) in names


def run_without(*names, program, cwd):
  """Runs a program where some libraries are missing."""
  return subprocess.run(
    [sys.executable, "-c", WITHOUT.format(names=names) + program],
    capture_output=True,
    text=True,
    cwd=cwd,
    check=False,
  )


def test_features_of_clips_need_no_extra(encoder, tmp_path):
  program = f"""
import numpy as np
from marlin_jax import Marlin
from marlin_jax.records.cli import UserError
marlin = Marlin.from_pretrained({str(encoder)!r})
print(marlin.extract_features(np.zeros((1, 16, 224, 224, 3), np.uint8)).shape)
def refused(function, *args):
  try:
    function(*args)
  except UserError as e:
    print(type(e).__name__, e)
refused(marlin.extract_video, "clip.mp4")
(run := __import__("pathlib").Path("run/checkpoints")).mkdir(parents=True)
refused(Marlin.from_pretrained, "run")
"""
  names = {*extras.LIBRARIES["train"], *extras.LIBRARIES["prepare"]} - {"scipy"}
  result = run_without(*names, program=program, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  shape, video, run = result.stdout.splitlines()
  assert shape == "(1, 16)"
  assert video.startswith("MissingLibraryError")
  assert "'marlin-jax[features]'" in video
  assert run.startswith("WeightsError")
  assert "'marlin-jax[train]'" in run


def test_training_needs_no_library_of_videos(face_data, tmp_path, monkeypatch):
  names = ("av", "cv2", "mediapipe", "tensorflow_datasets")
  modules = [
    name
    for name in MODULES
    if re.match(r"marlin_jax\.(data|train|pre|eval)", name)
  ]
  program = f"import importlib\nlist(map(importlib.import_module, {modules}))"
  result = run_without(*names, program=program, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  # And imports inside functions.
  for name in names:
    monkeypatch.setitem(sys.modules, name, None)
  result = training_runs.train(
    tmp_path / "run",
    **{"data.path": face_data, "num_steps": 2, "checkpoint_steps": 2},
    picture_steps=2,
    eval_steps=2,
  )
  assert result.returncode == 0, result.stderr
  assert list((tmp_path / "run" / "pictures").iterdir())


@pytest.mark.parametrize(
  ("extra", "module", "arguments"),
  [
    ("train", "marlin_jax.train", ["--config=quickstart"]),
    ("prepare", "data_prep.prepare", ["--input=sample", "--output=data"]),
    ("prepare", "data_prep.verify", ["data"]),
    ("prepare", "data_prep.report", ["data", "--output=report.html"]),
    ("prepare", "data_prep.contact_sheet", ["data", "--output=sheet.png"]),
    ("features", "marlin_jax.features", [*VIDEO, "--output=features"]),
    ("features", "marlin_jax.reconstruct", [*VIDEO, "--output=a.png"]),
    ("features", "marlin_jax.predict", ["v.mp4", "--model=m", "--output=p"]),
    ("demo", "marlin_jax.demo", VIDEO[1:]),
  ],
)
def test_a_command_names_the_extra_that_it_lacks(
  extra, module, arguments, tmp_path
):
  program = (
    f"sys.argv = {[module, *arguments]!r}\n"
    f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
  )
  library = extras.LIBRARIES[extra][0]
  result = run_without(library, program=program, cwd=tmp_path)
  assert result.returncode in (1, 2)
  assert f"needs {library}: pip install 'marlin-jax[{extra}]'" in result.stderr
  assert not result.stdout
  assert not list(tmp_path.iterdir())


# --- The wheel ----------------------------------------------------------------


def test_modules_of_a_wheel_import_each_other():
  configs = {
    f"configs.{path.stem}": path for path in (ROOT / "configs").glob("*.py")
  }
  names = {
    name if name.startswith("marlin_jax") else f"marlin_jax.{name}"
    for name in (*MODULES, *configs)
  }
  names |= {name.removesuffix(".__init__") for name in names}
  for name, path in (MODULES | configs).items():
    text = setup.renamed(path.read_text())
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.ImportFrom):
        assert node.module.partition(".")[0] not in setup.MOVED, name
        if node.module.startswith("marlin_jax"):
          assert node.module in names, f"{name} imports {node.module}"
      elif isinstance(node, ast.Import):
        for alias in node.names:
          assert alias.name.partition(".")[0] not in setup.MOVED, name
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        # Modules that are started, or imported by their names.
        assert not node.value.startswith("data_prep."), name


@pytest.mark.slow
@pytest.mark.timeout(2400)  # it downloads a gigabyte
def test_a_wheel_works_without_the_repository(
  sample_videos, face_models, encoder, tmp_path
):
  # Built from a copy: setuptools writes into the source folder.
  source = tmp_path / "source"
  source.mkdir()
  for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
    shutil.copy(ROOT / name, source)
  for name in ("configs", "data_prep", "marlin_jax"):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  environment = tmp_path / "environment"
  venv.create(environment, with_pip=True)
  folder = tmp_path / "folder"
  folder.mkdir()
  variables = os.environ | {"JAX_PLATFORMS": "cpu"}
  variables.pop("PYTHONPATH")

  def run(script, *arguments):
    result = subprocess.run(
      [environment / "bin" / script, *map(str, arguments)],
      capture_output=True,
      text=True,
      cwd=folder,
      env=variables,
      check=False,
      timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

  run("pip", "wheel", "--no-deps", "--wheel-dir", folder, source)
  (wheel,) = folder.glob("*.whl")
  shutil.rmtree(source)
  run("pip", "install", f"{wheel}[all]")
  (packages,) = environment.glob("lib/python*/site-packages")
  ours = {path.name for path in packages.iterdir()} & {
    *setup.MOVED,
    *("marlin_jax", "tests", "tools"),
  }
  assert ours == {"marlin_jax"}
  assert (packages / "marlin_jax" / "py.typed").exists()

  assert f"marlin_jax           {__version__}\n" in run("marlin", "--version")
  clip = sample_videos / "carphone_pristine.mp4"
  run("marlin-features", clip, f"--checkpoint={encoder}", "--output=features")
  with np.load(folder / "features" / f"{clip.name}.npz") as file:
    features = file["features"]
  expected = Marlin.from_pretrained(encoder).extract_video(clip)
  np.testing.assert_allclose(features, expected, atol=1e-5)
  by_hand = (
    "from marlin_jax import Marlin\n"
    f"marlin = Marlin.from_pretrained({str(encoder)!r})\n"
    f"print(marlin.extract_video({str(clip)!r}, crop_face=True).shape)\n"
  )
  assert run("python", "-c", by_hand).endswith(", 16)\n")

  # The sample data set is prepared anew, from files that are here already.
  shutil.copytree(sample_videos.parent, tmp_path / "home" / "assets")
  variables["MARLIN_HOME"] = str(tmp_path / "home")
  run("marlin-train", "--config=quickstart", "--config.num_steps=5")
  run("marlin-features", clip, "--checkpoint=runs/quickstart", "--output=mine")
  assert (folder / "mine" / f"{clip.name}.npz").exists()


def test_a_wheel_has_no_module_of_an_earlier_build(tmp_path):
  source = tmp_path / "source"
  package = source / "marlin_jax"
  package.mkdir(parents=True)
  shutil.copy(ROOT / "setup.py", source)
  (package / "__init__.py").touch()
  module = package / "old.py"
  module.touch()

  def build() -> set[str]:
    subprocess.run(
      [sys.executable, "setup.py", "--quiet", "build", "--build-base=build"],
      cwd=source,
      check=True,
      capture_output=True,
    )
    return {p.name for p in (source / "build/lib/marlin_jax").iterdir()}

  assert build() == {"__init__.py", "old.py"}
  module.rename(package / "new.py")
  assert build() == {"__init__.py", "new.py"}
