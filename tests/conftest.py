"""Fixtures that several test files share."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from marlin_jax.devices import xla_flags

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

ROOT = Path(__file__).parents[1]
VIDEOS = ROOT.parent / "shared" / "videos"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  order = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def run_prepare(*args: object) -> subprocess.CompletedProcess[str]:
  """Runs the real binary."""
  return subprocess.run(
    [sys.executable, "-m", "data_prep.prepare", *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=250,
  )


def seeing_devices(num_devices: int) -> dict[str, str]:
  """An environment in which a process sees so many CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": flags}


def on_eight_devices(script: str) -> Any:
  """Runs a file of this folder; returns the JSON that it prints."""
  result = subprocess.run(
    [sys.executable, ROOT / "tests" / script],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=seeing_devices(8) | {"PYTHONPATH": str(ROOT)},
    check=False,
    timeout=280,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


def write_video(
  path: Path,
  frames: Sequence[np.ndarray],
  codec: str = "libx264",
  pix_fmt: str = "yuv444p",
  rate: int = 30,
  secs: Sequence[float] | None = None,
  rotation: int = 0,
  audio_first: bool = False,
  **options: str,
) -> Path:
  """Encodes uint8 (H, W, 3) RGB frames.

  Args:
    path: its suffix decides the container.
    frames: the frames.
    codec: name of the encoder.
    pix_fmt: its pixel format.
    rate: frames per second.
    secs: times of the frames, for a variable rate.
    rotation: the player's, in degrees counter-clockwise.
    audio_first: makes stream 0 a second of silence.
    **options: the encoder's.
  """
  height, width = frames[0].shape[:2]
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w") as container:
    if audio_first:
      audio = container.add_stream("pcm_s16le", rate=8000)
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.options = options
    if rotation:
      stream.set_display_rotation(rotation)
    if secs is not None:
      stream.codec_context.time_base = Fraction(1, 1000)
    if audio_first:
      silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16))
      silence.sample_rate = 8000
      container.mux(audio.encode(silence))
    for i, pixels in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
      if secs is not None:
        frame.pts = round(1000 * secs[i])
        frame.time_base = stream.codec_context.time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def moving_noise(
  num_frames: int, width: int = 64, height: int = 48
) -> list[np.ndarray]:
  """Returns uint8 (H, W, 3) frames of noise that scrolls; shows no face."""
  noise = np.random.default_rng(0).integers(
    0, 256, (height, width, 3), np.uint8
  )
  return [np.roll(noise, 3 * i, axis=1) for i in range(num_frames)]


def shared_video(name: str) -> Path:
  """Returns a video of third parties that is not part of this repository."""
  if not (VIDEOS / name).is_file():
    pytest.skip(f"../shared/videos/{name} is not there")
  return VIDEOS / name


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
  import labelled_data

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
