"""Fixtures that several test files share."""

import contextlib
import ctypes
import fcntl
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from marlin_jax.devices import xla_flags
from tests.support import compile_cache
from tests.support.processes import ROOT, run_prepare
from tests.support.videos import write_video

# Processes that tests start find the checkout, whatever their folder.
os.environ["PYTHONPATH"] = str(ROOT)
# With libtpu installed, which plan_test.py needs, jax looks for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each a few times, so compilation
# should be quick. Fusions written by way of MLIR take half of it.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
xla_flags.set_for_training()
compile_cache.set_up()

# With as many workers as cores, a second PyTorch thread mostly waits for the
# first and keeps a core busy meanwhile: 9 s instead of 2.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts pytest in the background makes it and its children ignore
# Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
  """Keeps the garbage collector from looking at all modules again and again.

  They stay until the end. And what is traced and compiled makes so many objects
  that it would look after every few operations.
  """
  gc.freeze()
  gc.set_threshold(10_000)


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back() -> Iterator[None]:
  """Returns to the system what the tests of a file no longer use.

  Under the settings of malloc in the Makefile a process keeps all it ever had,
  for the largest networks 8 GB, until it ends.
  """
  yield
  with contextlib.suppress(AttributeError):  # another C library
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def made_once(
  tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
  """Returns `get(name, make)`: a path that `make` fills once for all workers.

  Tests that change what is there copy it first.
  """
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent

  def get(name: str, make: Callable[[Path], object]) -> Path:
    path, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not done.exists():
        make(path)
        done.touch()
    return path

  return get


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
  """Skips a test if the face models cannot be fetched."""
  from data_prep import assets, prepare
  from data_prep.regions import parsers

  try:
    prepare.fetch_models(parsers.DEFAULT)
  except assets.AssetError as e:
    pytest.skip(f"face models could not be fetched: {e}")


@pytest.fixture(scope="module")
def finder(face_models):
  """Face finder that stays open for the tests of a file."""
  from data_prep.faces import face_finder

  with face_finder.FaceFinder() as opened:
    yield opened


@pytest.fixture(scope="session")
def sample_dataset(sample_videos, face_models, made_once) -> Path:
  """The sample videos, prepared."""

  def make(path: Path) -> None:
    result = run_prepare("--input", "sample", "--output", path)
    assert result.returncode == 0, result.stderr

  return made_once("sample_dataset", make)


@pytest.fixture(scope="session")
def face_data(made_once) -> Path:
  """A small data set with labels of every kind; see labelled_data.py."""
  from tests.support import labelled_data

  return made_once("labelled", labelled_data.write_faces)


@pytest.fixture(scope="session")
def talking_person(made_once) -> Path:
  """A data set with sound, of one person; see talking_mouths.py."""
  from tests.support import talking_mouths

  return made_once(
    "talking_person",
    lambda path: talking_mouths.write_dataset(path, num_train=1, num_val=0),
  )


@pytest.fixture(scope="session")
def talking_people(made_once) -> Path:
  """72 people to learn from (24 are too few for some seeds), and 8 others."""
  from tests.support import talking_mouths

  return made_once("talking_people", talking_mouths.write_dataset)


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
