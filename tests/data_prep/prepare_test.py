"""data_prep.prepare from end to end: resumes, bad videos, splits, errors."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from data_prep import verify
from data_prep.decoder import child
from data_prep.inspection import folder_checks
from data_prep.output import dataset_folder, folder_settings, ledger
from data_prep.sources import manifest
from data_prep.video import decode, video_to_records
from marlin_jax.data import loader, prepared_dataset, sampling
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.records import quality_index, schema, segment_index
from tests.support import attacker
from tests.support.files import content, read_lines
from tests.support.processes import ROOT, run_prepare
from tests.support.videos import moving_noise, shared_video, write_video

LENGTHS = (1, 15, 16, 31, 32, 33)
BAD = {
  "bad/bomb.mp4": "frames of 4096x4096 are over the limit",
  "bad/cut.mp4": "cannot open",
  "bad/damaged.mp4": "decoder reported damage",
  "bad/empty.mp4": "cannot open",
  "bad/half.avi": "decoder reported damage",
  "bad/noise.mp4": "no face found",
  "bad/text.mp4": "cannot open",
}


def make_bad_videos(folder: Path) -> None:
  """Writes one video for each line of BAD."""
  write_video(folder / "noise.mp4", moving_noise(5))
  black = np.zeros((4096, 4096, 3), np.uint8)
  write_video(
    folder / "bomb.mp4", [black], pix_fmt="yuv420p", preset="ultrafast"
  )
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("no video\n" * 100)
  good = write_video(
    folder / "good.mp4", moving_noise(60, 160, 120), "mpeg4", "yuv420p"
  )
  data = bytearray(good.read_bytes())
  good.unlink()
  middle = len(data) // 2
  (folder / "cut.mp4").write_bytes(data[:middle])
  data[middle : middle + 2048] = bytes(2048)
  (folder / "damaged.mp4").write_bytes(data)
  half = write_video(folder / "half.avi", moving_noise(60), "mjpeg", "yuvj420p")
  half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])


def times(path: Path) -> dict[str, int]:
  return {file.name: file.stat().st_mtime_ns for file in path.iterdir()}


def read_records(path: Path, split: str = "train") -> list[schema.Record]:
  shards = sorted(path.glob(f"*-{split}.array_record-*"))
  source = grain.sources.ArrayRecordDataSource([str(s) for s in shards])
  return [schema.decode(source[i]) for i in range(len(source))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, carphone, face_models) -> Path:
  """Returns a folder of short clips of a face and a video for each fault."""
  folder = tmp_path_factory.mktemp("videos")
  for length in LENGTHS:
    carphone(folder / f"{length:02d} frames.mp4", length)
  make_bad_videos(folder / "bad")
  return folder


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory) -> tuple[Path, str]:
  """Returns the data set of `videos` and the output of the command."""
  path = tmp_path_factory.mktemp("prepared") / "dataset"
  result = run_prepare(
    *("--input", videos, "--output", path),
    *("--num_shards", 3, "--num_workers", 2),
  )
  assert result.returncode == 0, result.stderr
  return path, result.stdout


@pytest.fixture
def dataset(prepared, tmp_path) -> Path:
  """Returns a copy of the data set that a test may change."""
  return Path(shutil.copytree(prepared[0], tmp_path / "copy"))


# --- Data set -----------------------------------------------------------------


def test_short_clips_are_one_record_each_with_all_frames(prepared):
  lengths = {r.video_id: len(r) for r in read_records(prepared[0])}
  assert lengths == {f"{length:02d} frames.mp4": length for length in LENGTHS}


def test_bad_videos_are_quarantined_with_reason_and_hash(prepared):
  lines = read_lines(prepared[0] / "quarantine.jsonl")
  assert [line["video_id"] for line in lines] == sorted(BAD)
  for line in lines:
    assert BAD[line["video_id"]] in line["reason"]
    assert len(line["sha256"]) == 64


def test_summary_counts_and_names_the_quarantine(prepared):
  path, stdout = prepared
  assert "6 records, 128 face crops, 6 face tracks" in stdout
  assert "5 videos, 1 picture\n" in stdout  # of one frame
  assert "6 quarantined, 1 without a face" in stdout
  assert str(path / "quarantine.jsonl") in stdout


def test_layers_of_the_sandbox_are_told(prepared):
  layers = decode.sandbox_layers()
  assert decode.sandbox_summary(layers) in prepared[1]


def test_a_missing_layer_is_refused_where_the_sandbox_is_required(
  tmp_path, face_models, monkeypatch
):
  program = ("-P", attacker.__file__, "--without=seccomp")
  monkeypatch.setattr(child, "PROGRAM", program)
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  output = tmp_path / "dataset"
  result = run_prepare("--input", path, "--output", output, "--require_sandbox")
  assert result.returncode == 1
  assert "seccomp (left out)" in result.stderr
  assert not list(output.glob("*.jsonl"))


def test_notes_on_videos_are_counted_and_kept(tmp_path, face_models):
  for name in "ab":
    write_video(
      tmp_path / "videos" / f"{name}.mp4",
      moving_noise(6),
      pix_fmt="yuv420p",
      flags="+ildct+ilme",
      **{"x264-params": "interlaced=1:tff=1"},
    )
  output = tmp_path / "dataset"
  run_prepare("--input", tmp_path / "videos", "--output", output)
  lines = read_lines(output / "videos.jsonl")
  assert [line["notes"][0].split(":")[0] for line in lines] == 2 * [
    "interlaced"
  ]


def test_metadata_counts_what_the_shards_hold(prepared):
  path, _ = prepared
  metadata = json.loads((path / "metadata.json").read_text())
  assert metadata == {
    "schema_version": schema.SCHEMA_VERSION,
    "splits": {
      "train": {
        "num_videos": 6,
        "num_tracks": 6,
        "num_records": 6,
        "num_frames": 128,
      }
    },
    "labels": {},
    "frame_size": 224,
  }
  shards = sorted(path.glob("*.array_record-*"))
  assert [shard.name for shard in shards] == [
    f"faces-train.array_record-{i:05d}-of-00003" for i in range(3)
  ]
  info = json.loads((path / "dataset_info.json").read_text())
  lengths = [int(n) for n in info["splits"][0]["shardLengths"]]
  assert lengths == [
    len(grain.sources.ArrayRecordDataSource([str(s)])) for s in shards
  ]
  assert not (path / "parts").exists()


def test_qualities_for_the_trainer_are_those_of_the_records(prepared):
  path, _ = prepared
  rows = quality_index.unpack((path / "faces-train.quality.npy").read_bytes())
  records = read_records(path)
  assert rows["video"].tolist() == [*range(len(records))]
  for row, record in zip(rows, records, strict=True):
    assert row["quality"] == record.quality
    terms = [row[name] for name in schema.QUALITY_TERMS]
    np.testing.assert_array_equal(terms, record.quality_terms)
  assert len({*rows["quality"].tolist()}) > 1


def test_ledger_has_a_line_for_every_video(prepared, videos):
  lines = read_lines(prepared[0] / "videos.jsonl")
  files = [f for f in videos.rglob("*") if f.is_file()]
  assert len(lines) == len(files)
  for line in lines:
    assert line["num_bytes"] == (videos / line["video_id"]).stat().st_size
  frames = {line["video_id"]: line["num_decoded_frames"] for line in lines}
  assert frames["bad/noise.mp4"] == 5
  assert frames["33 frames.mp4"] == 33


def test_tfds_reads_the_same_as_our_own_reader(sample_dataset):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(sample_dataset)
  source = builder.as_data_source(split="train")
  own = read_records(sample_dataset)
  assert len(source) == len(own) == builder.info.splits["train"].num_examples
  for theirs, ours in zip(source, own, strict=True):
    frames = schema.decode_frames(ours, range(len(ours)))
    difference = np.abs(np.stack(theirs["frames"]).astype(int) - frames)
    # Two JPEG decoders may round differently.
    assert difference.max() <= 4
    assert theirs["frames"][0].shape == (224, 224, 3)
    for name in ("regions", "boxes"):
      expected = getattr(ours, name)
      np.testing.assert_array_equal(theirs[name], expected)
      assert theirs[name].dtype == expected.dtype
    for name in ("track_id", "segment", "fps", "start_secs", "quality"):
      assert theirs[name] == np.float32(getattr(ours, name))
    assert theirs["parsing"] == ours.parsing
    assert theirs["video_id"].decode() == ours.video_id
    assert theirs["subject_id"].decode() == ours.subject_id
  assert "tensorflow" not in sys.modules


def test_sample_keeps_the_man_and_leaves_out_bikes_and_bunny(sample_dataset):
  records = read_records(sample_dataset)
  assert [(r.video_id, len(r)) for r in records] == [
    ("carphone_pristine.mp4", 60),
    ("carphone_pristine.mp4", 60),
  ]
  lines = read_lines(sample_dataset / "quarantine.jsonl")
  assert [(line["video_id"], line["reason"]) for line in lines] == [
    ("bigbuckbunny.mp4", "no face found"),
    ("bikes.mp4", "no face found"),
  ]


def test_shared_footage_gives_nearly_all_frames(face_models, tmp_path):
  num_frames = {"video01.mp4": 300, "video03.mp4": 240, "cropped04.mp4": 15}
  for name in num_frames:
    (tmp_path / "in").mkdir(exist_ok=True)
    shutil.copy(shared_video(name), tmp_path / "in")
  result = run_prepare("--input", tmp_path / "in", "--output", tmp_path / "out")
  assert result.returncode == 0, result.stderr
  lengths = collections.defaultdict(list)
  for record in read_records(tmp_path / "out"):
    lengths[record.video_id].append(len(record))
  for name, num in num_frames.items():
    assert sum(lengths[name]) >= 0.95 * num
  assert lengths["cropped04.mp4"] == [15]


# --- Repeated runs ------------------------------------------------------------


def test_second_run_changes_nothing(dataset, videos):
  before = times(dataset)
  result = run_prepare("--input", videos, "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert "Nothing to do for 13 videos" in result.stdout
  assert times(dataset) == before


def test_killed_runs_worker_count_and_folder_order_leave_no_trace(
  prepared, videos, tmp_path
):
  folder, output = tmp_path / "in", tmp_path / "out"
  for file in sorted(videos.rglob("*"), reverse=True):
    if file.is_file():
      copy = folder / file.relative_to(videos)
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(file, copy)
  args = [*("--input", folder, "--output", output, "--num_shards", 3)]
  args += ["--num_workers", 1]
  command = [sys.executable, "-m", "data_prep.prepare", *map(str, args)]
  # Killed once during the first videos, once after the first shards.
  for num_files in (1, 6):
    with subprocess.Popen(
      command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
      while run.poll() is None:
        if len(list(output.glob("parts/*.json"))) >= num_files:
          break
        time.sleep(0.01)
      run.kill()
    assert run.returncode == -signal.SIGKILL
    assert not (output / "dataset_info.json").exists()
  result = run_prepare(*args)
  assert result.returncode == 0, result.stderr
  assert "of them already done" in result.stdout
  assert content(output) == content(prepared[0])


def test_run_that_is_interrupted_says_how_to_go_on(videos, prepared, tmp_path):
  output = tmp_path / "out"
  with subprocess.Popen(
    [sys.executable, "-m", "data_prep.prepare"]
    + ["--input", str(videos), "--output", str(output)],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as run:
    while run.poll() is None and not list(output.glob("parts/*.json")):
      time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, stderr = run.communicate(timeout=60)
  assert run.returncode == 130
  assert "run the same command to resume" in stderr
  assert "Traceback" not in stderr


def test_kill_between_ledger_and_shard_is_completed_without_work(
  dataset, videos
):
  expected = content(dataset)
  hashes = json.loads((dataset / "hashes.json").read_text())
  parts = dataset / "parts"
  parts.mkdir()
  for name, digest in hashes.items():
    index = int(name[-14:-9])
    lines = [
      line
      for line in read_lines(dataset / "videos.jsonl")
      if folder_settings.shard_index(line["video_id"], 3) == index
    ]
    note = {"sha256": digest, "videos": lines}
    (parts / f"{name}.json").write_text(json.dumps(note))
    (dataset / name).rename(parts / f"{name}.ready")
  (parts / f"{0:032x}.json.0123abcd.partial").write_bytes(b"half a part")
  for name in ("videos.jsonl", "hashes.json", "dataset_info.json"):
    (dataset / name).unlink()
  result = run_prepare("--input", videos, "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert "13 videos, 13 of them already done" in result.stdout
  assert content(dataset) == expected


def test_lost_and_cut_shards_are_made_again(dataset, videos):
  expected = content(dataset)
  lost, cut, _ = sorted(dataset.glob("*.array_record-*"))
  lost.unlink()
  cut.write_bytes(cut.read_bytes()[:-1])
  result = run_prepare("--input", videos, "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert content(dataset) == expected


@pytest.mark.parametrize("damage", [b"", None], ids=["empty", "missing"])
@pytest.mark.parametrize("index", ["quality", "segments"])
def test_an_index_that_is_lost_is_written_again_without_work(
  dataset, videos, damage, index
):
  expected, path = content(dataset), dataset / f"faces-train.{index}.npy"
  path.unlink()
  if damage is not None:
    path.write_bytes(damage)
  result = run_prepare("--input", videos, "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert "13 videos, 13 of them already done" in result.stdout
  assert content(dataset) == expected


def test_new_video_touches_only_its_shard(dataset, videos, carphone, tmp_path):
  folder = Path(shutil.copytree(videos, tmp_path / "in"))
  carphone(folder / "new.mp4", 20)
  before, before_times = content(dataset), times(dataset)
  result = run_prepare("--input", folder, "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert "14 videos, 13 of them already done" in result.stdout
  index = folder_settings.shard_index("new.mp4", 3)
  for shard in dataset.glob("*.array_record-*"):
    untouched = before_times[shard.name] == shard.stat().st_mtime_ns
    assert untouched == (int(shard.name[-14:-9]) != index)
  for name in ("settings.json", "quarantine.jsonl", "features.json"):
    assert (dataset / name).read_bytes() == before[name]
  lengths = {r.video_id: len(r) for r in read_records(dataset)}
  assert lengths.pop("new.mp4") == 20
  assert lengths == {f"{length:02d} frames.mp4": length for length in LENGTHS}
  rows = quality_index.unpack(
    (dataset / "faces-train.quality.npy").read_bytes()
  )
  qualities = [record.quality for record in read_records(dataset)]
  assert rows["quality"].tolist() == qualities
  index = segment_index.open_index(dataset / "faces-train.segments.npy")
  assert index.frames.tolist() == [len(r) for r in read_records(dataset)]


def test_changed_video_is_processed_again(dataset, videos, carphone, tmp_path):
  folder = Path(shutil.copytree(videos, tmp_path / "in"))
  carphone(folder / "16 frames.mp4", 17)
  result = run_prepare("--input", folder, "--output", dataset)
  assert result.returncode == 0, result.stderr
  lengths = {r.video_id: len(r) for r in read_records(dataset)}
  assert lengths["16 frames.mp4"] == 17
  assert len(lengths) == len(LENGTHS)


def test_quarantined_videos_are_tried_again_under_other_limits(dataset, videos):
  result = run_prepare(
    *("--input", videos, "--output", dataset),
    *("--max_frame_pixels", 4096 * 4096),
  )
  assert result.returncode == 0, result.stderr
  assert "13 videos, 7 of them already done" in result.stdout
  reasons = {
    line["video_id"]: line["reason"]
    for line in read_lines(dataset / "quarantine.jsonl")
  }
  assert reasons["bad/bomb.mp4"] == "no face found"
  assert "cannot open" in reasons["bad/empty.mp4"]


def test_damaged_videos_are_tried_again_where_they_are_kept(dataset, videos):
  sources = manifest.read_input(videos).sources
  recipe = json.loads((dataset / "settings.json").read_text())
  del recipe["num_shards"]
  strict = video_to_records.Settings()
  keep = video_to_records.Settings(on_damage=video_to_records.KEEP)
  with dataset_folder.DatasetFolder(dataset, recipe, None, sources) as folder:
    assert folder.plan(strict, retry_quarantined=False).todo == []
    todo = folder.plan(keep, retry_quarantined=False).todo
    reasons = {entry.video_id: entry.reason for entry in folder.entries}
  assert {s.video_id for s in todo} == {
    name for name in BAD if reasons[name] != "no face found"
  }


def test_quarantined_videos_can_be_tried_again_in_any_case(dataset, videos):
  recipe = json.loads((dataset / "settings.json").read_text())
  recipe.pop("num_shards")
  sources = manifest.read_input(videos).sources
  settings = video_to_records.Settings()
  with dataset_folder.DatasetFolder(dataset, recipe, None, sources) as folder:
    assert folder.plan(settings, retry_quarantined=False).todo == []
    todo = folder.plan(settings, retry_quarantined=True).todo
  # A video without a face is not tried again: the result would be the same.
  assert {s.video_id for s in todo} == set(BAD) - {"bad/noise.mp4"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_that_is_killed_costs_no_video(videos, prepared, tmp_path):
  paths = tmp_path / "m.txt"
  paths.write_text("31 frames.mp4\n32 frames.mp4\n33 frames.mp4\n")
  output = tmp_path / "out"
  with subprocess.Popen(
    [sys.executable, "-m", "data_prep.prepare", "--num_workers", "1"]
    + ["--input", str(paths), "--root", str(videos), "--output", str(output)],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as run:
    while run.poll() is None and not list(output.glob("parts/*.json")):
      time.sleep(0.01)
    (worker,) = [
      int(pid)
      for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children")
      .read_text()
      .split()
      if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
  assert run.returncode == 0
  assert read_lines(output / "quarantine.jsonl") == []
  frames_of = {r.video_id: r.frames for r in read_records(output)}
  assert len(frames_of) == 3
  for record in read_records(prepared[0]):
    if record.video_id in frames_of:
      assert record.frames == frames_of[record.video_id]


# --- Splits -------------------------------------------------------------------


def test_manifest_gives_subjects_and_splits(videos, tmp_path):
  table = tmp_path / "m.csv"
  table.write_text(
    "path,subject_id,split\n"
    "15 frames.mp4,Anna,train\n16 frames.mp4,Bob,val\nbad/noise.mp4,Eve,test\n"
  )
  output = tmp_path / "out"
  result = run_prepare(
    *("--input", table, "--root", videos),
    *("--output", output, "--name", "people"),
  )
  assert result.returncode == 0, result.stderr
  for split, subject in (("train", "Anna"), ("val", "Bob")):
    (record,) = read_records(output, split)
    assert record.subject_id == subject
  # A split without a kept video is empty, not missing.
  assert read_records(output, "test") == []
  info = json.loads((output / "dataset_info.json").read_text())
  assert info["name"] == "people"
  assert {s["name"]: s["shardLengths"] for s in info["splits"]} == {
    "test": ["0"],
    "train": ["1"],
    "val": ["1"],
  }


# --- Parts, and whose face ----------------------------------------------------


def test_parts_of_a_file_are_videos_and_labels_are_of_the_main_face(
  videos, tmp_path
):
  table, output = tmp_path / "m.csv", tmp_path / "out"
  table.write_text(
    "path,start_secs,end_secs,label_mood\n"
    "16 frames.mp4,0,0.2,calm\n16 frames.mp4,0.2,,loud\n"
  )
  args = ("--input", table, "--root", videos, "--output", output)
  result = run_prepare(*args)
  assert result.returncode == 0, result.stderr
  records = read_records(output)
  assert [(r.video_id, len(r)) for r in records] == [
    ("16 frames.mp4#t=0,0.2", 6),
    ("16 frames.mp4#t=0.2", 10),
  ]
  lines = read_lines(output / "videos.jsonl")
  assert [line["labels"] for line in lines] == [{"mood": [0]}, {"mood": [1]}]
  assert json.loads((output / "settings.json").read_text())["faces"] == "main"
  assert "Nothing to do" in run_prepare(*args).stdout
  # They are no copies of each other.
  lines = read_lines(output / "videos.jsonl")
  assert lines[0]["sha256"] == lines[1]["sha256"]
  entries = {line["video_id"]: ledger.Entry(**line) for line in lines}
  assert folder_checks.notes({}, entries) == []


def test_data_sets_older_than_the_choice_of_faces_keep_all(
  dataset, videos, tmp_path
):
  path = dataset / "settings.json"
  settings = json.loads(path.read_text())
  assert settings.pop("faces") == "all"
  assert settings.pop("frame_size") == 224
  path.write_text(json.dumps(settings))
  before = content(dataset)
  result = run_prepare("--input", videos, "--output", dataset)
  assert "is complete" in result.stdout
  assert content(dataset) == before
  message = failure("--input", videos, "--output", dataset, "--faces", "main")
  assert "faces was 'all' and is now 'main'" in message


# --- Smaller frames -----------------------------------------------------------


def test_smaller_frames_serve_clips_of_their_size(videos, tmp_path):
  import tensorflow_datasets as tfds

  table, path = tmp_path / "m.csv", tmp_path / "out"
  table.write_text("path\n33 frames.mp4\n")
  args = ("--input", table, "--root", videos, "--output", path)
  result = run_prepare(*args, "--frame_size", 112)
  assert result.returncode == 0, result.stderr
  (record,) = read_records(path)
  assert record.stored_size == 112
  assert schema.decode_parsing(record).shape == (33, 224, 224)
  assert record.regions.any()
  assert verify.verify(path, num_workers=1)["is_whole"]
  builder = tfds.builder_from_directory(path)
  assert builder.info.features["frames"].shape == (None, 112, 112, 3)

  def batch(size):
    draws = sampling.RecordDraws(opened, seed=0)
    return next(
      loader.train_batches(
        draws,
        TakeClip(Clip(16, 2), tubelet_size=2, frame_size=size),
        batch_size=1,
        start_step=0,
        num_threads=1,
      )
    )

  opened = prepared_dataset.open_dataset(path, "train")
  assert batch(112)["video"].std() > 20
  with pytest.raises(
    prepared_dataset.DatasetError, match=r"112 pixels, and frames of 224"
  ):
    batch(224)
  assert "frame_size was 112 and is now 224" in failure(*args)


# --- Errors -------------------------------------------------------------------


def failure(*args) -> str:
  result = run_prepare(*args)
  assert result.returncode == 1
  assert result.stderr.startswith("error: ")
  assert "Traceback" not in result.stderr
  return result.stderr


def test_no_record_at_all_is_an_error_that_says_why(
  videos, face_models, tmp_path
):
  output = tmp_path / "out"
  result = run_prepare("--input", videos / "bad", "--output", output)
  assert result.returncode == 1
  assert "error: no face track in 7 videos" in result.stderr
  assert "3 x cannot open" in result.stderr
  assert "1 x no face found (e.g. 'noise.mp4')" in result.stderr
  assert not (output / "dataset_info.json").exists()
  assert len(read_lines(output / "quarantine.jsonl")) == 7


def test_bad_input_is_one_error_before_anything_is_made(videos, tmp_path):
  paths = tmp_path / "m.txt"
  paths.write_text("../../etc/passwd\nhttp://host/x.mp4\n")
  output = tmp_path / "out"
  assert "2 bad rows" in failure("--input", paths, "--output", output)
  assert "no such file" in failure(
    "--input", tmp_path / "none", "--output", output
  )
  assert not output.exists()


def test_other_settings_are_refused_with_the_difference(dataset, videos):
  before = times(dataset)
  message = failure(
    *("--input", videos, "--output", dataset),
    *("--segment_frames", 96, "--num_shards", 4),
  )
  assert "segment_frames was 64 and is now 96" in message
  assert "num_shards was 3 and is now 4" in message
  assert "another --output" in message
  assert times(dataset) == before


def test_records_of_two_algorithm_versions_are_not_mixed(
  dataset, videos, tmp_path
):
  path = dataset / "settings.json"
  settings = json.loads(path.read_text())
  assert settings.pop("algorithm_version") == schema.ALGORITHM_VERSION
  old, more = tmp_path / "old", tmp_path / "more"
  shutil.copytree(dataset, old)
  (old / "settings.json").write_text(json.dumps(settings))
  before = content(old)
  # A complete data set of version 1 needs nothing.
  result = run_prepare("--input", videos, "--output", old)
  assert result.returncode == 0
  assert "is complete" in result.stdout
  assert content(old) == before
  shutil.copytree(videos, more)
  shutil.copy(more / "01 frames.mp4", more / "new.mp4")
  message = failure("--input", more, "--output", old)
  assert "version 1" in message
  assert f"version {schema.ALGORITHM_VERSION}" in message
  assert content(old) == before


def test_input_that_lost_videos_is_refused(dataset, videos):
  message = failure("--input", videos / "01 frames.mp4", "--output", dataset)
  assert "12 videos of" in message
  assert "missing in the input" in message


def test_folder_of_the_input_is_not_written_to(videos):
  before = content(videos)
  message = failure("--input", videos, "--output", videos)
  assert "is or lies in the input" in message
  assert content(videos) == before


def test_two_runs_into_one_folder_do_not_mix(dataset, videos):
  settings = json.loads((dataset / "settings.json").read_text())
  settings.pop("num_shards")
  sources = manifest.read_input(videos).sources
  with dataset_folder.DatasetFolder(dataset, settings, None, sources):
    message = failure("--input", videos, "--output", dataset)
  assert "another run is writing" in message


def test_missing_model_is_one_error_and_no_quarantine(videos, tmp_path):
  (tmp_path / "face_landmarker.task").write_bytes(b"no model")
  result = subprocess.run(
    [sys.executable, "-m", "data_prep.prepare"]
    + ["--input", str(videos), "--output", str(tmp_path / "out")],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "MARLIN_ASSETS": str(tmp_path)},
  )
  assert result.returncode == 1
  assert "has SHA-256" in result.stderr
  assert not (tmp_path / "out" / "videos.jsonl").exists()


@pytest.mark.parametrize(
  ("args", "problem"),
  [
    (["--segment_frames", "61"], "61 is less than 62"),
    (["--frame_size", "120"], "120 is not a multiple of 16 in [32, 224]"),
    (["--val_ratio", "1"], "1 is not in [0, 1)"),
    (["--name", "My-Faces"], "'My-Faces': expected a-z"),
    (["--num_workers", "x"], "invalid int value: 'x'"),
    (["--num_worker", "2"], "unrecognized arguments"),
  ],
)
def test_bad_flag_is_a_usage_error(tmp_path, args, problem):
  result = run_prepare("--input", "x", "--output", tmp_path / "o", *args)
  assert result.returncode == 2
  assert problem in result.stderr


def test_help_answers_without_heavy_imports():
  code = (
    "import sys\n"
    "from data_prep import prepare\n"
    "try: prepare.main(['--help'])\n"
    "except SystemExit: pass\n"
    "heavy = {'mediapipe', 'cv2', 'av', 'tensorflow_datasets', 'jax'}\n"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
  )
  assert result.returncode == 0, result.stderr
  for flag in ("--input", "--output", "--segment_frames", "--val_ratio"):
    assert flag in result.stdout
