"""Fixtures that several test files share."""

import fcntl
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from marlin_jax.devices import xla_flags
from tests.support.processes import ROOT, run_prepare
from tests.support.videos import write_video

# Processes that tests start find the checkout, whatever their folder.
os.environ["PYTHONPATH"] = str(ROOT)
# With libtpu installed, which plan_test.py needs, jax looks for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each a few times: quick compiling
# counts. What one process has compiled the next finds here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
xla_flags.set_for_training()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
  # JAX may read an entry while another process is writing it.
  os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# On as many cores as pytest has workers, a second thread of PyTorch's mostly
# waits for the first, and burns its core in doing so: 9 s for 2.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that puts pytest in the background has it ignore Ctrl-C, and with it
# all that it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take minutes: first, so that no worker is left with one at the end.
LONG = (
  "parity_test",
  "prepare_test",
  "sharding_test",
  "distributed_test",
  "train_test",
  "lipsync_training_test",
  "e_numerics_test",
  "train_step_test",
  "downstream_test",
  "verify_test",
  "plan_test",
  "scale_test",
  "evaluation_test",
  "probes_test",
  "video_to_results_test",
  "training_probe_test",
  "a_video_test",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  order = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def sample_videos() -> Path:
  """Folder of the three sample videos."""
  from data_prep import assets

  try:
    return assets.fetch_sample_videos()
  except assets.AssetError as e:
    pytest.skip(f"sample videos could not be fetched: {e}")


@pytest.fixture(scope="session")
def face_models() -> None:
  """Skips a test where the face models cannot be had."""
  from data_prep import assets, prepare
  from data_prep.regions import parsers

  try:
    prepare.fetch_models(parsers.DEFAULT)
  except assets.AssetError as e:
    pytest.skip(f"face models could not be fetched: {e}")


@pytest.fixture(scope="module")
def finder(face_models):
  """Finds faces; open for a file."""
  from data_prep.faces import face_finder

  with face_finder.FaceFinder() as opened:
    yield opened


@pytest.fixture(scope="session")
def sample_dataset(
  sample_videos, face_models, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """The sample videos, prepared once by the real binary, for all workers."""
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  path = root / "sample_dataset"
  with (root / "sample_dataset.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not path.exists():
      result = run_prepare("--input", "sample", "--output", path)
      assert result.returncode == 0, result.stderr
  return path


@pytest.fixture(scope="session")
def face_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A small data set with labels of every kind; see labelled_data.py."""
  from tests.support import labelled_data

  return labelled_data.write_faces(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="session")
def carphone_frames(sample_videos) -> list[np.ndarray]:
  """A man talking, uint8 (144, 176, 3) RGB."""
  with av.open(str(sample_videos / "carphone_pristine.mp4")) as container:
    return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.fixture(scope="session")
def carphone(carphone_frames) -> Callable[[Path, int], Path]:
  """Writes the first frames of a man talking as a video."""

  def write(path: Path, num_frames: int) -> Path:
    frames = carphone_frames[:num_frames]
    return write_video(path, frames, crf="10", preset="veryfast")

  return write
