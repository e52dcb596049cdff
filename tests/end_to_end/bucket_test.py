"""Preparation and the files of a run on an emulator of Google's gs://."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from data_prep import report, verify
from marlin_jax.data import prepared_dataset, sampling, segment_indexing
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.training import remote_files
from tests.support import made_dataset
from tests.support.made_dataset import a_record
from tests.support.processes import (
  run_here,
  run_prepare,
  start_module,
  start_prepare,
)

# Otherwise gcsfs asks another Google service for the kind of bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
gcsfs = pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
pytest.importorskip(
  "gcp_storage_emulator", reason="the stand-in for gs:// is not installed"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
  """Starts the emulator with one bucket, faces; returns its address."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  log = tmp_path_factory.mktemp("bucket") / "log"
  with log.open("w") as file:
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "gcp_storage_emulator", "start"),
        *("--in-memory", f"--port={port}", "--default-bucket=faces"),
      ],
      stdout=file,
      stderr=file,
    )
  while True:
    assert process.poll() is None, log.read_text()
    with socket.socket() as probe:
      if probe.connect_ex(("localhost", port)) == 0:
        break
  yield f"http://localhost:{port}"
  process.terminate()
  process.wait()


@pytest.fixture(scope="module")
def bucket(address) -> Iterator[gcsfs.GCSFileSystem]:
  os.environ["STORAGE_EMULATOR_HOST"] = address
  yield gcsfs.GCSFileSystem(token="anon", endpoint_url=address)
  del os.environ["STORAGE_EMULATOR_HOST"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, carphone, face_models) -> Path:
  folder = tmp_path_factory.mktemp("videos")
  carphone(folder / "a/one.mp4", 4)
  carphone(folder / "b/two.mp4", 3)
  (folder / "b/text.mp4").write_text("no video")
  return folder


def content(bucket: gcsfs.GCSFileSystem, folder: str) -> dict[str, bytes]:
  bucket.invalidate_cache()
  return {
    path.removeprefix(f"{folder}/"): bucket.cat_file(path)
    for path in bucket.find(folder)
  }


@pytest.mark.slow
def test_a_bucket_gets_what_a_disk_gets(bucket, videos, tmp_path):
  local = run_prepare("--input", videos, "--output", tmp_path / "out")
  assert local.returncode == 0, local.stderr
  expected = {
    file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()
  }
  for file in videos.rglob("*.mp4"):
    name = file.relative_to(videos).as_posix()
    bucket.pipe_file(f"faces/in/{name}", file.read_bytes())

  # In processes of their own, as gcsfs remembers what a bucket held.
  flags = (
    *("--input", "gs://faces/in", "--output", "gs://faces/out"),
    "--num_workers=1",
  )
  result = start_prepare(*flags)
  assert result.returncode == 0, result.stderr
  assert "2 records, 7 face crops" in result.stdout
  assert content(bucket, "faces/out") == expected

  again = start_prepare(*flags)
  assert "Nothing to do for 3 videos" in again.stdout, again.stderr

  page = tmp_path / "report.html"
  args = ["gs://faces/out", "--output", str(page)]
  assert run_here(lambda: report.main(args)).returncode == 0
  assert page.read_text() == report.make(tmp_path / "out", 2000)

  shard = "faces-train.array_record-00000-of-00001"
  args = ["gs://faces/out", "--num_workers=1"]
  verified = run_here(lambda: verify.main(args))
  assert verified.returncode == 0, verified.stdout + verified.stderr
  assert "Read 1 shard, 2 records, 7 frames, 2 videos" in verified.stdout
  data = bytearray(bucket.cat_file(f"faces/out/{shard}"))
  data[len(data) // 2] ^= 1
  bucket.pipe_file(f"faces/out/{shard}", bytes(data))
  verified = start_module(
    "data_prep.verify", "gs://faces/out", "--num_workers=1"
  )
  assert verified.returncode == 1, verified.stderr
  assert f"damaged: {shard}: SHA-256" in verified.stdout

  bucket.rm(f"faces/out/{shard}")
  mended = start_prepare(*flags)
  assert mended.returncode == 0, mended.stderr
  assert content(bucket, "faces/out") == expected


@pytest.mark.slow
def test_a_manifest_may_name_videos_in_a_bucket(bucket, videos, tmp_path):
  bucket.pipe_file("faces/more/x.mp4", (videos / "a/one.mp4").read_bytes())
  table = tmp_path / "m.csv"
  table.write_text("path,label_mood\nx.mp4,calm\nnone.mp4,\n")
  flags = (
    *("--input", table, "--root", "gs://faces/more"),
    *("--output", tmp_path / "out", "--num_workers=1"),
  )
  result = start_prepare(*flags)
  assert result.returncode == 1
  assert "1 of 2 videos failed" in result.stderr
  assert "cannot fetch" in result.stderr
  assert "none.mp4" in result.stderr
  assert (tmp_path / "out/quarantine.jsonl").read_text() == ""
  assert not (tmp_path / "out/dataset_info.json").exists()
  bucket.pipe_file("faces/more/none.mp4", b"no video")
  result = start_prepare(*flags)
  assert result.returncode == 0, result.stderr
  assert "2 videos, 1 of them already done" in result.stdout
  assert "1 quarantined" in result.stdout


def test_files_of_a_run_grow_in_a_bucket(bucket):
  files = remote_files.RunFiles(
    epath.Path("gs://faces/runs/a"), is_temporary=True
  )
  metrics = files.path / "metrics.jsonl"
  metrics.write_text("one\n")
  files.publish()
  assert content(bucket, "faces/runs/a") == {"metrics.jsonl": b"one\n"}
  # The part that is there is not sent again.
  bucket.pipe_file("faces/runs/a/metrics.jsonl", b"ONE\n")
  for line in ("two", "three"):
    with metrics.open("a") as file:
      file.write(f"{line}\n")
    files.publish()
  files.close()
  assert content(bucket, "faces/runs/a") == {
    "metrics.jsonl": b"ONE\ntwo\nthree\n"
  }


def test_indices_of_a_data_set_in_a_bucket_are_copied_once(
  bucket, tmp_path, monkeypatch
):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path / "home"))
  videos = {
    f"{i}.mp4": [a_record(f"{i}.mp4", num_frames=9, quality=i / 4)] * 2
    for i in range(4)
  }
  made = made_dataset.make(tmp_path / "data", videos)
  for path in made.iterdir():
    bucket.pipe_file(f"faces/data/{path.name}", path.read_bytes())
  for _ in range(2):
    dataset = prepared_dataset.open_dataset("gs://faces/data", "train", 0.5)
    index = segment_indexing.open_index(dataset, "gs://faces/run/index")
    assert (dataset.num_videos, index.num_videos) == (2, 4)
    draws = sampling.VideoDraws(dataset, index, Clip(4, 2), seed=0)
    assert {draws(i).records[0] for i in range(40)} == {4, 5, 6, 7}
    # The second time it reads the copies on this machine.
    for name in ("quality", "segments"):
      bucket.pipe_file(f"faces/data/faces-train.{name}.npy", b"changed")
  assert len(list((tmp_path / "home" / "copies").iterdir())) == 2
