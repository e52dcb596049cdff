"""Features of video files by `Marlin`, and of folders by the command."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from marlin_jax import features
from marlin_jax.inference.face_windows import (
  FaceVideoError,
  NoFaceError,
  WindowSettings,
)
from marlin_jax.inference.face_windows import read_windows as windows_of
from marlin_jax.inference.feature_folder import FeatureFolder, Origin, Span
from marlin_jax.inference.marlin import Marlin
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.weights import safetensors_folder
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights
from tests.support import authors, compile_cache, training_runs
from tests.support.files import content, read_lines
from tests.support.processes import ROOT
from tests.support.videos import moving_noise, shared_video, write_video

TINY = Architecture(width=32, depth=1, num_heads=2, mlp_dim=64, image_size=32)
SHARED = {
  "video01.mp4": 10,
  "video03.mp4": 8,
  "cropped01.mp4": 5,
  "cropped04.mp4": 1,
}


def random_weights(architecture: Architecture, seed: int = 0) -> Weights:
  np_rng = np.random.default_rng(seed)
  return Weights(
    architecture,
    {
      name: np_rng.normal(0, 0.3, shape).astype(np.float32)
      for name, shape in architecture.shapes().items()
    },
  )


@pytest.fixture(scope="module")
def marlin() -> Marlin:
  return Marlin(random_weights(TINY))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("weights") / "tiny"
  safetensors_folder.write(random_weights(TINY), path)
  return path


def noise_video(path: Path, num_frames: int) -> Path:
  return write_video(path, moving_noise(num_frames), "mpeg4", "yuv420p")


# --- extract_video ------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 15, 16, 17, 31, 32, 33, 70])
def test_features_are_those_of_the_windows(tmp_path, marlin, total):
  path = noise_video(tmp_path / "v.mp4", total)
  found = marlin.extract_video(path)
  windows = list(windows_of(path, WindowSettings(image_size=32)))
  expected = [marlin.extract_features(w.frames[None])[0] for w in windows]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, np.stack(expected))


def test_batch_size_changes_features_by_rounding_only(tmp_path, marlin):
  path = noise_video(tmp_path / "v.mp4", 70)
  one = marlin.extract_video(path, stride=2, batch_size=1)
  assert one.shape == (11, 32)
  for batch_size in (4, 11):
    found = marlin.extract_video(path, stride=2, batch_size=batch_size)
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-5)


def test_features_do_not_depend_on_the_place_in_the_batch(marlin):
  np_rng = np.random.default_rng(0)
  clips = np_rng.integers(0, 256, (4, 16, 32, 32, 3), np.uint8)
  here = np.asarray(marlin.extract_features(clips))
  there = np.asarray(marlin.extract_features(clips[::-1]))
  np.testing.assert_array_equal(here, there[::-1])


def test_reductions_are_over_windows(tmp_path, marlin):
  path = noise_video(tmp_path / "v.mp4", 70)
  every = marlin.extract_video(path)
  assert every.shape == (3, 32)
  mean, std = every.mean(axis=0), every.std(axis=0)
  expected = {
    "mean": mean,
    "max": every.max(axis=0),
    "std": std,
    "mean_std": np.concatenate([mean, std]),
  }
  for reduction, values in expected.items():
    found = marlin.extract_video(path, reduction=reduction)
    np.testing.assert_array_equal(found, values)
  tokens = marlin.extract_video(path, keep_seq=True)
  assert tokens.shape == (3, 32, 32)
  found = marlin.extract_video(path, keep_seq=True, reduction="mean_std")
  assert found.shape == (32, 64)
  short = noise_video(tmp_path / "short.mp4", 3)
  np.testing.assert_array_equal(
    marlin.extract_video(short, reduction="std"), np.zeros(32)
  )


def test_options_select_windows_and_wrong_ones_are_refused(tmp_path, marlin):
  path = noise_video(tmp_path / "v.mp4", 70)
  assert len(marlin.extract_video(path, sample_rate=1)) == 5
  assert len(marlin.extract_video(path, sample_rate=1, stride=8)) == 8
  assert len(marlin.extract_video(path, window_rule="authors")) == 2
  with pytest.raises(ValueError, match="expected one of none, mean"):
    marlin.extract_video(path, reduction="median")
  with pytest.raises(ValueError, match="do not cover a video"):
    marlin.extract_video(path, stride=17)
  with pytest.raises(FaceVideoError, match="none.mp4: cannot open"):
    marlin.extract_video(tmp_path / "none.mp4")


@pytest.mark.parametrize(
  "name",
  [
    # As video03, and longer.
    pytest.param("video01.mp4", marks=pytest.mark.slow),
    *("video03.mp4", "cropped01.mp4", "cropped04.mp4"),
  ],
)
def test_real_footage_with_and_without_cropping(marlin, face_models, name):
  path = shared_video(name)
  padded = pytest.warns(UserWarning, match="is not square.*crop_face=True")
  is_square = name.startswith("cropped")
  with contextlib.nullcontext() if is_square else padded:
    whole = marlin.extract_video(path)
  face = marlin.extract_video(path, crop_face=True)
  assert whole.shape == face.shape == (SHARED[name], 32)
  assert np.isfinite(whole).all()
  assert np.abs(whole - face).max() > 0.01


def test_windows_and_features_equal_the_authors_under_their_rule(monkeypatch):
  path = shared_video("cropped01.mp4")
  weights = random_weights(dataclasses.replace(TINY, image_size=224))
  theirs = authors.network(weights)
  # The authors' code gets the frame count from ffprobe, which may be missing.
  streams = [{"nb_frames": "143"}]
  monkeypatch.setattr("ffmpeg.probe", lambda _: {"streams": streams})
  expected = theirs.extract_video(str(path)).numpy()
  found = Marlin(weights).extract_video(path, window_rule="authors")
  assert found.shape == expected.shape == (4, 32)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_no_face_is_an_error(tmp_path, marlin, face_models):
  path = noise_video(tmp_path / "v.mp4", 3)
  with pytest.raises(NoFaceError, match="no face found"):
    marlin.extract_video(path, crop_face=True)


# --- Command ------------------------------------------------------------------


def make_videos(folder: Path) -> Path:
  for i, total in enumerate((1, 33, 100, 16)):
    noise_video(folder / f"{'ab'[i % 2]}/{total}.mp4", total)
  (folder / "a/text.mp4").write_text("no video\n" * 100)
  half = write_video(folder / "half.avi", moving_noise(90), "mjpeg", "yuvj420p")
  half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
  return folder


GOOD = ("a/1.mp4", "a/100.mp4", "b/16.mp4", "b/33.mp4")
BAD = {"a/text.mp4": "cannot open", "half.avi": "decoder reported damage"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
  return make_videos(tmp_path_factory.mktemp("videos"))


def run(*args: object) -> int:
  """Runs the command in this process, which has loaded JAX."""
  return features.main([*map(str, args), "--num_workers", "1"])


@pytest.fixture(scope="module")
def extracted(videos, checkpoint, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("extracted") / "out"
  code = run(
    videos, "--checkpoint", checkpoint, "--output", path, "--batch_size", 4
  )
  assert code == 0
  return path


def test_every_good_video_has_a_file_in_its_place(extracted, videos, marlin):
  assert sorted(content(extracted)) == sorted(
    [*(f"{name}.npz" for name in GOOD), "settings.json", "quarantine.jsonl"]
  )
  for name in GOOD:
    windows = list(windows_of(videos / name, WindowSettings(image_size=32)))
    with np.load(extracted / f"{name}.npz") as file:
      expected = marlin.extract_video(videos / name, batch_size=4)
      np.testing.assert_array_equal(file["features"], expected)
      for key in ("first_frame", "num_frames", "start_secs", "end_secs"):
        expected = [getattr(window, key) for window in windows]
        np.testing.assert_array_equal(file[key], expected)
      metadata = json.loads(file["metadata"].item())
    assert metadata["source"] == name
    assert metadata["settings"]["stride"] == 16
    assert len(metadata["settings"]["checkpoint_sha256"]) == 64
    assert metadata["versions"]["jax"]


def test_bad_videos_are_quarantined_with_reason_and_hash(extracted):
  lines = read_lines(extracted / "quarantine.jsonl")
  assert [line["source"] for line in lines] == sorted(BAD)
  for line in lines:
    assert line["reason"].startswith(BAD[line["source"]])
    assert len(line["sha256"]) == 64


def test_a_second_run_changes_nothing(extracted, videos, checkpoint, capsys):
  before = {
    name: (extracted / f"{name}.npz").stat().st_mtime_ns for name in GOOD
  }
  assert run(videos, "--checkpoint", checkpoint, "--output", extracted) == 0
  assert "6 videos, 6 of them done before" in capsys.readouterr().out
  for name, when in before.items():
    assert (extracted / f"{name}.npz").stat().st_mtime_ns == when


def test_other_settings_are_refused(
  extracted, videos, checkpoint, tmp_path, capsys
):
  same = (videos, "--output", extracted)
  before = content(extracted)
  assert run(*same, "--checkpoint", checkpoint, "--reduction", "mean") == 1
  assert "reduction was 'none' and is now 'mean'" in capsys.readouterr().err
  safetensors_folder.write(random_weights(TINY, seed=1), tmp_path / "other")
  assert run(*same, "--checkpoint", tmp_path / "other") == 1
  assert "checkpoint_sha256 was '" in capsys.readouterr().err
  assert run(*same, "--checkpoint", tmp_path / "none") == 1
  assert "no weights at" in capsys.readouterr().err
  assert run(*same, "--checkpoint", checkpoint, "--stride", 20) == 1
  assert "--stride" in capsys.readouterr().err
  assert run(*same, "--checkpoint", checkpoint, "--num_blocks", 1) == 1
  assert "num_blocks" in capsys.readouterr().err
  assert run(*same, "--checkpoint", checkpoint, "--num_blocks", 99) == 1
  assert "--num_blocks=99: expected 1 to" in capsys.readouterr().err
  assert content(extracted) == before
  # The same weights at another path are the same checkpoint.
  shutil.copytree(checkpoint, tmp_path / "copy")
  assert run(*same, "--checkpoint", tmp_path / "copy") == 0


def test_only_changed_videos_are_extracted_again(
  extracted, videos, checkpoint, tmp_path, capsys
):
  mine = shutil.copytree(videos, tmp_path / "videos")
  out = shutil.copytree(extracted, tmp_path / "out")
  noise_video(mine / "half.avi", 5)  # repaired
  shutil.copy(mine / "a/text.mp4", mine / "b/33.mp4")  # damaged
  (out / "a/1.mp4.npz").write_bytes(b"")  # half a file
  os.utime(mine / "b/16.mp4")  # touched: the hash is what counts
  assert run(mine, "--checkpoint", checkpoint, "--output", out) == 0
  assert "6 videos, 3 of them done before" in capsys.readouterr().out
  lines = read_lines(out / "quarantine.jsonl")
  assert [line["source"] for line in lines] == ["a/text.mp4", "b/33.mp4"]
  assert (out / "half.avi.npz").exists()
  assert not (out / "b/33.mp4.npz").exists()


def test_a_killed_run_is_completed_to_the_same_bytes(
  extracted, videos, checkpoint, tmp_path
):
  out = tmp_path / "out"
  args = [videos, "--checkpoint", checkpoint, "--output", out]
  args += ["--batch_size", "4"]
  process = subprocess.Popen(
    [sys.executable, "-m", "marlin_jax.features", *map(str, args)],
    cwd=ROOT,
    env=compile_cache.private_copy(tmp_path / "cache"),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  while process.poll() is None and not list(out.rglob("*.npz")):
    time.sleep(0.001)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert len(list(out.rglob("*.npz"))) < len(GOOD)
  assert run(*args) == 0
  assert content(out) == content(extracted)


def test_parquet_holds_the_same_features(
  extracted, videos, checkpoint, tmp_path
):
  out = tmp_path / "out"
  args = ("--checkpoint", checkpoint, "--output", out, "--batch_size", 4)
  assert run(videos / "a", *args, "--format", "parquet") == 0
  table = pyarrow.parquet.read_table(out / "100.mp4.parquet")
  with np.load(extracted / "a/100.mp4.npz") as file:
    found = np.stack(table["features"].to_numpy())
    np.testing.assert_array_equal(found, file["features"])
    for key in ("first_frame", "num_frames", "start_secs", "end_secs"):
      np.testing.assert_array_equal(table[key].to_numpy(), file[key])
  metadata = json.loads(table.schema.metadata[b"marlin_jax"])
  assert metadata["settings"]["format"] == "parquet"
  with FeatureFolder(
    out,
    {
      k: v
      for k, v in metadata["settings"].items()
      if k not in ("program", "schema_version")
    },
  ) as folder:
    assert folder.holds("100.mp4", videos / "a/100.mp4")
    assert not folder.holds("1.mp4", videos / "a/100.mp4")


def test_features_of_tokens_are_flat_in_parquet(tmp_path):
  tokens = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  with FeatureFolder(tmp_path, {"format": "parquet"}) as folder:
    origin = Origin("v.mp4", "", 0)
    folder.write(origin, [Span(0, 32, 0.0, 1.0)] * 2, tokens)
  table = pyarrow.parquet.read_table(tmp_path / "v.mp4.parquet")
  metadata = json.loads(table.schema.metadata[b"marlin_jax"])
  rows = np.stack(table["features"].to_numpy())
  found = rows.reshape(-1, *metadata["feature_shape"])
  np.testing.assert_array_equal(found, tokens)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(
    OutputFolderError, match=r"pip install 'marlin-jax\[parquet\]'"
  ):
    FeatureFolder(tmp_path, {"format": "parquet"})


def test_a_reduced_video_is_one_row(videos, checkpoint, marlin, tmp_path):
  out = tmp_path / "out"
  args = ("--checkpoint", checkpoint, "--output", out)
  code = run(videos / "a/100.mp4", *args, "--reduction", "mean_std")
  assert code == 0
  with np.load(out / "100.mp4.npz") as file:
    expected = marlin.extract_video(videos / "a/100.mp4", reduction="mean_std")
    np.testing.assert_array_equal(file["features"], expected[None])
    assert (file["first_frame"].item(), file["num_frames"].item()) == (0, 100)
    assert file["end_secs"].item() == pytest.approx(3.3, abs=0.01)


def test_whole_frames_that_are_no_crops_of_a_face_are_told(
  face_models, carphone_frames, tmp_path, capsys
):
  weights = random_weights(dataclasses.replace(TINY, image_size=224))
  safetensors_folder.write(weights, tmp_path / "weights")
  square = [frame[:, 16:160] for frame in carphone_frames[:2]]
  far = [np.full((432, 432, 3), 90, np.uint8) for _ in square]
  for i, frame in enumerate(square):
    far[i][144:288, 144:288] = frame
  near = [frame[20:116, 40:136] for frame in square]
  videos = tmp_path / "videos"
  for name, frames in (("near", near), ("far", far), ("wall", moving_noise(2))):
    write_video(videos / f"{name}.mp4", frames, qp="10")
  arguments = [videos, "--checkpoint", tmp_path / "weights", "--output"]
  assert run(*arguments, tmp_path / "whole") == 0
  note = capsys.readouterr().out.partition("NOTE: ")[2]
  assert note.startswith("2 videos not as a crop of a face")
  assert re.search(r"far.mp4: the face takes \d\d% of the picture", note)
  shutil.rmtree(tmp_path / "whole")
  (videos / "far.mp4").unlink()
  assert run(*arguments, tmp_path / "whole") == 0
  assert "wall.mp4: no face is found" in capsys.readouterr().out


def test_two_videos_without_a_face_are_a_failure(
  checkpoint, tmp_path, face_models, capsys
):
  for name in ("one.mp4", "two.mp4"):
    noise_video(tmp_path / "videos" / name, 4)
  out = tmp_path / "out"
  args = (tmp_path / "videos", "--checkpoint", checkpoint, "--output", out)
  assert run(*args, "--crop_face") == 1
  text = capsys.readouterr().err
  assert "no features extracted from 2 videos" in text
  assert "2 x no face found" in text
  lines = read_lines(out / "quarantine.jsonl")
  assert [line["source"] for line in lines] == ["one.mp4", "two.mp4"]


@pytest.mark.parametrize("length", [236, 250])
def test_a_name_too_long_for_its_features_is_quarantined(
  checkpoint, tmp_path, length
):
  long_name = f"{'x' * length}.mp4"
  for name in (long_name, "z.mp4"):
    noise_video(tmp_path / "videos" / name, 2)
  out = tmp_path / "out"
  args = (tmp_path / "videos", "--checkpoint", checkpoint, "--output", out)
  for _ in range(2):
    assert run(*args) == 0
    assert (out / "z.mp4.npz").exists()
    (line,) = read_lines(out / "quarantine.jsonl")
    assert line["source"] == long_name
    assert "too long" in line["reason"]


def test_bad_inputs_and_outputs_are_refused(
  videos, checkpoint, tmp_path, capsys
):
  shutil.copytree(videos / "a", tmp_path / "a")
  args = ("--checkpoint", checkpoint, "--output", tmp_path / "out")
  assert run(tmp_path / "a", noise_video(tmp_path / "1.mp4", 2), *args) == 1
  assert "are both '1.mp4' relative" in capsys.readouterr().err
  assert run(tmp_path / "none", *args) == 1
  assert "no such file or folder" in capsys.readouterr().err
  args = ("--checkpoint", checkpoint, "--output", tmp_path)
  assert run(videos, *args) == 1
  assert "was not made by this program" in capsys.readouterr().err
  data = tmp_path / "data"
  data.mkdir()
  (data / "settings.json").write_text('{"name": "faces", "schema_version": 2}')
  assert run(videos, "--checkpoint", checkpoint, "--output", data) == 1
  assert "was not made by marlin_jax.features;" in capsys.readouterr().err


def test_one_run_at_a_time(tmp_path):
  with (
    FeatureFolder(tmp_path, {"format": "npz"}),
    pytest.raises(OutputFolderError, match="another run is writing"),
  ):
    FeatureFolder(tmp_path, {"format": "npz"})


def test_tasks_share_the_videos_and_a_run_of_all_joins_them(
  extracted, videos, checkpoint, tmp_path, capsys
):
  out = tmp_path / "out"
  args = (videos, "--checkpoint", checkpoint, "--output", out)
  args += ("--batch_size", 4)
  assert run(*args, "--task_index", 2, "--task_count", 2) == 1
  assert "an index below the count" in capsys.readouterr().err
  for index in (1, 0):
    assert run(*args, "--task_index", index, "--task_count", 2) == 0
    assert "3 videos of task" in capsys.readouterr().out
    # Its own are done, whatever the others do.
    assert run(*args, "--task_index", index, "--task_count", 2) == 0
    assert "3 of them done before" in capsys.readouterr().out
  parts = [
    read_lines(out / f"quarantine.jsonl-0000{index}-of-00002")
    for index in (0, 1)
  ]
  assert sorted(line["source"] for part in parts for line in part) == [*BAD]
  assert run(*args) == 0
  assert "6 videos, 6 of them done before" in capsys.readouterr().out
  assert content(out) == content(extracted)


@pytest.mark.slow
def test_processes_started_together_use_all_their_devices(
  extracted, videos, checkpoint, tmp_path
):
  out = tmp_path / "out"
  args = [videos, "--checkpoint", checkpoint, "--output", out]
  args += ["--batch_size", "3", "--num_workers", "1"]
  together = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{training_runs.free_port()}",
    "JAX_NUM_PROCESSES": "2",
  }
  processes = [
    training_runs.start(
      [sys.executable, "-m", "marlin_jax.features", *map(str, args)],
      4,
      JAX_PROCESS_ID=str(number),
      **together,
    )
    for number in (0, 1)
  ]
  outputs = [training_runs.finish(process) for process in processes]
  for number, output in enumerate(outputs):
    assert f"3 videos of task {number} of 2; 4 x cpu" in output
  assert run(*args[:-2]) == 0
  assert sorted(content(out)) == sorted(content(extracted))
  for name in GOOD:
    with (
      np.load(out / f"{name}.npz") as ours,
      np.load(extracted / f"{name}.npz") as theirs,
    ):
      np.testing.assert_allclose(
        ours["features"], theirs["features"], rtol=0, atol=1e-5
      )


def test_bfloat16_is_another_setting(extracted, videos, checkpoint, tmp_path):
  same = (videos / "a", "--checkpoint", checkpoint)
  assert run(*same, "--output", extracted, "--dtype", "bfloat16") == 1
  assert run(*same, "--output", tmp_path / "o", "--dtype", "bfloat16") == 0
  with (
    np.load(tmp_path / "o" / "100.mp4.npz") as rounded,
    np.load(extracted / "a" / "100.mp4.npz") as exact,
  ):
    difference = np.abs(rounded["features"] - exact["features"]).max()
  assert 1e-5 < difference < 0.1
