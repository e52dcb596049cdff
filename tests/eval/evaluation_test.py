"""Evaluations of a tiny encoder on small labelled data sets, end to end."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from configs import eval_dfd, eval_far, eval_fer
from data_prep.sources.listing import CLASS, Label
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.devices.sharding import MeshError
from marlin_jax.downstream import clip_batches, splits, tasks
from marlin_jax.downstream.tasks import TaskError
from marlin_jax.eval import modes
from marlin_jax.eval.results_folder import ResultsFolder
from marlin_jax.inference.classifier import VideoClassifier
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import formats, safetensors_folder
from marlin_jax.weights import run_checkpoint as orbax
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError
from tests.support import labelled_data
from tests.support.labelled_data import (
  LABELS,
  command,
  draw_face,
  metric,
  renamed,
  run,
  tiny,
  write_random,
)

# --- Commands -----------------------------------------------------------------


@pytest.fixture(scope="module")
def far(face_data, tmp_path_factory):
  """Results, workdir and output of a low-data evaluation with two modes."""
  workdir = tmp_path_factory.mktemp("far")
  result = command(
    "far",
    workdir,
    face_data,
    tasks="appearance",
    modes="linear,knn",
    num_seeds=2,
    plots=True,
    **{"data.ratio": "0.25,1", "knn.k": 3},
  )
  assert result.returncode == 0, result.stderr
  results = json.loads((workdir / "results.json").read_text())
  return results, workdir, result.stdout


def test_far_writes_all_scores_and_prints_a_table(far):
  results, workdir, output = far
  assert (workdir / "results.txt").read_text().strip() in output
  assert "bright" not in output  # the table is of tasks, not of labels
  (train,) = (
    s for role, s in results["data"]["splits"].items() if role == "train"
  )
  assert (train["videos"], train["people"]) == (24, 12)
  assert len(results["checkpoint"]["sha256"]) == 64
  assert len(results["tasks"]["appearance"]["split_sha256"]) == 64
  assert results["config"]["modes"] == "linear,knn"
  names = [cell["name"] for cell in results["cells"]]
  # With all data, deterministic modes run for one seed.
  assert names == ["appearance-constant"] + [
    f"appearance-{mode}-{what}"
    for mode in ("linear", "knn")
    for what in ("0.25-0", "0.25-1", "1-0")
  ]
  test = results["cells"][3]["test"]
  for number in test["metrics"].values():
    assert number["low"] <= number["value"] <= number["high"]
  rows = {row["name"]: row for row in test["per_class"]}
  assert rows["never"]["auc"] is None
  assert rows["bright"]["auc"] > 0.9
  assert metric(results, "linear") > 0.9
  assert metric(results, "constant") == 0.5
  low = next(
    r for r in results["summary"] if (r["mode"], r["ratio"]) == ("knn", 0.25)
  )
  assert (low["num_seeds"], low["num_train"]) == (2, 6)
  assert low["metrics"]["auc"]["std"] is not None


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_windows_by_themselves_have_an_auc(far, face_data, mode):
  """The kept model, applied to each window of the test videos."""
  results, workdir, _ = far
  model = VideoClassifier.load(workdir / "models" / f"appearance-{mode}-1-0")
  split = splits.open_split(str(face_data), "test", None)
  clip = model.weights.architecture.clip
  windows = split.windows(clip)
  assert len(windows) > len(split)
  clips = clip_batches.ClipReader(split, clip).read(windows)
  predicted = model.window_probabilities(np.asarray(model.outputs(clips)))
  labels = split.labels["appearance"][split.video_of(windows)]
  columns = [
    roc_auc_score(labels[:, k], predicted[:, k])
    for k in range(labels.shape[1])
    if len(set(labels[:, k])) == 2
  ]
  assert metric(results, mode, "window_auc") == pytest.approx(
    np.mean(columns), abs=1e-3
  )


def test_far_writes_predictions_and_plots(far, face_data):
  results, workdir, _ = far
  with open(workdir / "predictions" / "appearance-linear-1-0.csv") as file:
    rows = list(csv.DictReader(file))
  assert [row["video_id"] for row in rows] == [
    f"t{i:03d}.mp4" for i in range(16)
  ]
  right = np.mean(
    [
      (float(row[f"p:{name}"]) > 0.5) == (row[f"true:{name}"] == "1")
      for row in rows
      for name in LABELS["appearance"].names
    ]
  )
  assert right == pytest.approx(metric(results, "linear", "accuracy"))
  pictures = {path.name for path in (workdir / "plots").iterdir()}
  assert {
    "appearance-linear-1-0-roc.png",
    "appearance-knn-1-0-classes.png",
    "appearance-ratios.png",
  } <= pictures


def test_finished_cells_are_not_run_again(far, face_data, tmp_path, capsys):
  results, workdir, _ = far
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.np?")}
  again = run(
    eval_far,
    workdir,
    face_data,
    tasks="appearance,mood",
    modes="linear,knn",
    num_seeds=2,
    batch_size=5,
    **{"data.ratio": "0.25,1", "knn.k": 3},
  )
  assert again["cells"][: len(results["cells"])] == results["cells"]
  for path, when in before.items():
    assert path.stat().st_mtime_ns == when
  assert metric({"summary": again["summary"][-5:]}, "linear") > 0.9
  # Results include the cells of earlier calls.
  last = run(
    eval_far,
    workdir,
    face_data,
    tasks="mood",
    modes="knn",
    **{"knn.k": 3},
  )
  assert last["cells"] == again["cells"]
  assert last["summary"] == again["summary"]
  assert set(last["tasks"]) == {"appearance", "mood"}
  with pytest.raises(OutputFolderError, match="knn.k: was 3, is 4"):
    run(eval_far, workdir, face_data, tasks="mood", **{"knn.k": 4})


class Killed(Exception):
  pass


def test_what_a_killed_call_finished_is_in_the_table_of_the_next(
  face_data, tmp_path, monkeypatch
):
  run_mode = modes.ModeRunner.run

  def killed_in_knn(self, mode, job):
    if mode == "knn":
      raise Killed
    return run_mode(self, mode, job)

  with monkeypatch.context() as patch:
    patch.setattr(modes.ModeRunner, "run", killed_in_knn)
    with pytest.raises(Killed):
      run(eval_far, tmp_path, face_data, tasks="mood", modes="linear,knn")
  results = run(
    eval_far, tmp_path, face_data, tasks="appearance", modes="knn", num_seeds=1
  )
  assert [cell["name"] for cell in results["cells"]] == [
    "appearance-constant",
    "appearance-knn-1-0",
    "mood-constant",
    "mood-linear-1-0",
  ]
  assert results["tasks"]["mood"]["kind"] == "class"
  table = (tmp_path / "results.txt").read_text()
  assert table.index("mood\n") < table.index("linear")


def test_labels_that_changed_after_a_kill_are_refused(
  face_data, tmp_path, monkeypatch
):
  """Before a cell was finished; the ledger is not in the hash of the data."""

  def killed(self, mode, job):
    raise Killed

  data = shutil.copytree(face_data, tmp_path / "data")
  with monkeypatch.context() as patch:
    patch.setattr(modes.ModeRunner, "run", killed)
    with pytest.raises(Killed):
      run(eval_far, tmp_path / "w", data, tasks="mood", modes="finetune")
  ledger = data / "videos.jsonl"
  ledger.write_text(ledger.read_text().replace('"mood": [0', '"mood": [1'))
  with pytest.raises(OutputFolderError, match="other videos or labels"):
    run(eval_far, tmp_path / "w", data, tasks="mood", modes="finetune")


def test_a_workdir_of_an_earlier_version_keeps_its_baselines(
  face_data, tmp_path
):
  """They stood in results.json alone, and said no definition."""
  first = run(eval_far, tmp_path, face_data, tasks="mood", modes="knn")
  (tmp_path / "cells" / "mood-constant.json").unlink()
  again = run(eval_far, tmp_path, face_data, tasks="emotion", modes="knn")
  assert [cell["name"] for cell in again["cells"]] == [
    "emotion-constant",
    "emotion-knn-1-0",
    "mood-constant",
    "mood-knn-1-0",
  ]
  assert again["cells"][2:] == first["cells"]
  assert again["tasks"]["mood"] == first["tasks"]["mood"]
  # Another cell that was removed is to be run again. No other file is needed.
  (tmp_path / "cells" / "mood-knn-1-0.json").unlink()
  (tmp_path / "results.json").write_text("{")
  last = run(eval_far, tmp_path, face_data, tasks="emotion", modes="knn")
  assert [cell["name"] for cell in last["cells"]] == [
    "emotion-constant",
    "emotion-knn-1-0",
    "mood-constant",
  ]


def test_fer_derives_sentiment_and_follows_the_papers_protocol(
  face_data, tmp_path
):
  results = run(
    eval_fer,
    tmp_path,
    face_data,
    tasks="emotion,sentiment,sentiment7",
    protocol="paper",
    num_seeds=1,
  )
  cells = {
    cell["task"]: cell for cell in results["cells"] if cell["mode"] == "linear"
  }
  assert cells["sentiment"]["chosen"] == {"num_rounds": 3}
  assert cells["sentiment"]["test"]["num_videos"] == 16
  assert [row["name"] for row in cells["sentiment"]["test"]["per_class"]] == [
    "sentiment>=0"
  ]
  matrix = np.array(cells["sentiment7"]["test"]["confusion"])
  assert matrix.shape == (7, 7)
  # Three of the seven classes occur: -1, 0 and 1.
  np.testing.assert_array_equal(
    matrix.sum(axis=1) > 0, [False, False, True, True, True, False, False]
  )
  assert [
    row["threshold"] for row in cells["emotion"]["test"]["per_class"]
  ] == [
    0.5,
    0.5,
  ]


@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_numbers_of_one(
  face_data, tmp_path
):
  changes = {
    "modes": "linear,finetune",
    "data.pairs": True,
    "num_seeds": 1,
    "num_resamples": 2,
    "finetune.batch_size": 16,
    "finetune.epochs": 0.1,
    "finetune.min_steps": 2,
    "finetune.num_rounds": 1,
  }
  one = run(eval_dfd, tmp_path / "one", face_data, **changes)
  (code, first), (other_code, second) = labelled_data.in_two_processes(
    "dfd",
    tmp_path / "two",
    face_data,
    devices=4,
    **changes | {"clips_per_device": 1},
  )
  assert (code, other_code) == (0, 0), first + second
  assert "8 x cpu in 2 processes" in first
  assert "results.json holds all scores" in first
  assert "results.json" not in second
  two = json.loads((tmp_path / "two" / "results.json").read_text())
  assert len(two["devices"]) == 8
  for mode in ("linear", "finetune"):
    name = f"deepfake-{mode}-1-0"
    a, b = (
      np.load(tmp_path / w / "cells" / f"{name}.npz")["probabilities"]
      for w in ("one", "two")
    )
    np.testing.assert_allclose(a, b, atol=1e-3, err_msg=mode)
    assert (tmp_path / "two" / "models" / name / "model.json").exists()
  parts = one["cells"][1]["test"]["parts"]
  assert set(parts) <= {*eval_dfd.METHODS}
  assert "Deepfakes" in parts


# --- Errors, before any compute -----------------------------------------------


@pytest.mark.parametrize(
  ("changes", "error", "words"),
  [
    ({"data.test": "exam"}, DatasetError, "has no split 'exam', it has"),
    ({"tasks": "action"}, tasks.TaskError, "needs the label 'action', and"),
    ({"modes": "linear,magic"}, ConfigError, "modes='linear,magic'"),
    ({"data.ratio": "0,1"}, ConfigError, r"data.ratio='0,1': expected"),
    ({"mesh.data": 3}, MeshError, "config.mesh.data=3"),
    ({"data.pairs": True}, TaskError, "and task 'mood' has 3: expected"),
    (
      {"data.pairs": True, "light.batch_size": 7},
      ConfigError,
      "light.batch_size=7: expected an even number",
    ),
    (
      {"random.image_size": 100},
      ConfigError,
      "random.image_size=100: expected a multiple of random.patch_size=",
    ),
    (
      {"random.num_heads": 0},
      ConfigError,
      "random.num_heads=0: expected at least 1",
    ),
    (
      {"random.width": 30},
      ConfigError,
      "random.width=30: expected a multiple of twice random.num_heads=2",
    ),
    ({"finetune.b1": 1.5}, ConfigError, "finetune.b1=1.5: expected 0 <= value"),
    ({"light.min_lr": 1.0}, ConfigError, "light.min_lr=1.0: expected at most"),
    (
      {"linear.penalties": (1.0, math.inf)},
      ConfigError,
      "linear.penalties=.*: expected finite numbers",
    ),
    (
      {"protocol": "paper", "pool": "std"},
      ConfigError,
      "pool='std': expected 'mean'",
    ),
  ],
)
def test_impossible_evaluations_fail_before_any_work(
  face_data, tmp_path, changes, error, words
):
  with pytest.raises(error, match=words):
    run(eval_far, tmp_path / "w", face_data, **{"tasks": "mood"} | changes)
  assert not (tmp_path / "w").exists()


def test_wrong_checkpoints_fail_before_any_work(face_data, tmp_path):
  with pytest.raises(WeightsError, match="no weights at"):
    run(eval_far, tmp_path / "w", face_data, tmp_path / "x", tasks="mood")
  config = tiny(eval_far.get_config())
  weights = formats.open_encoder("random", config.random)
  write_random(
    tmp_path / "large",
    dataclasses.replace(weights.architecture, image_size=280),
  )
  with pytest.raises(WeightsError, match="takes frames of 280 pixels"):
    run(eval_far, tmp_path / "w", face_data, tmp_path / "large", tasks="mood")
  assert not (tmp_path / "w").exists()


def test_a_workdir_gives_the_same_scores_as_its_exported_weights(
  face_data, tmp_path
):
  architecture = Architecture(
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=32,
    dec_width=16,
    dec_depth=1,
    dec_num_heads=2,
    dec_mlp_dim=32,
    disc_hidden=16,
    num_frames=4,
  )
  np_rng = np.random.default_rng(0)
  weights = Weights(
    architecture,
    {
      name: np_rng.normal(0, 0.1, shape).astype(np.float32)
      for name, shape in architecture.shapes().items()
    },
  )
  safetensors_folder.write(weights, tmp_path / "folder")
  orbax.write(weights, tmp_path / "workdir")
  runs = [
    run(
      eval_far,
      tmp_path / f"w{i}",
      face_data,
      path,
      tasks="mood",
      modes="knn",
    )
    for i, path in enumerate((tmp_path / "folder", tmp_path / "workdir"))
  ]
  assert runs[0]["checkpoint"]["sha256"] == runs[1]["checkpoint"]["sha256"]
  for result in runs:
    assert result["checkpoint"]["architecture"]["width"] == 16
    for cell in result["cells"]:
      cell.pop("secs", None)
  assert runs[0]["cells"] == runs[1]["cells"]
  assert metric(runs[0], "knn") > 0.9


def test_a_bucket_is_no_workdir(face_data, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for workdir, cache in (("gs://bucket/far", ""), ("far", "gs://bucket/x")):
    with pytest.raises(OutputFolderError, match="local or network disk"):
      run(eval_far, workdir, face_data, tasks="mood", cache=cache)
  assert not (tmp_path / "gs:").exists()


def test_a_folder_of_something_else_is_no_workdir(tmp_path):
  (tmp_path / "results.json").write_text("of the user")
  with pytest.raises(OutputFolderError, match=r"results\.json"):
    ResultsFolder(tmp_path, {"a": 1})
  assert (tmp_path / "results.json").read_text() == "of the user"
  assert not (tmp_path / "settings.json").exists()


def test_a_command_reports_errors_without_a_traceback(face_data, tmp_path):
  result = command("far", tmp_path, face_data, tasks="action")
  assert result.returncode == 1
  assert "error: task 'action' needs the label 'action'" in result.stderr
  assert "mood (class)" in result.stderr
  assert "Traceback" not in result.stderr


# --- Splits -------------------------------------------------------------------


def test_people_in_two_splits_give_a_warning(tmp_path, capsys):
  make = labelled_data.make
  videos = make(8, draw_face)
  path = labelled_data.write(
    tmp_path / "data",
    {"train": videos[:5], "val": videos[5:], "test": renamed(videos, "t")},
    LABELS,
  )
  results = run(eval_far, tmp_path / "w", path, tasks="mood", modes="knn")
  warning, *others = results["data"]["warnings"]
  assert not any("share" in line for line in others)
  assert "'train' and 'val' share 1 person (e.g. 'person 2')" in warning
  assert f"WARNING: {warning}" in capsys.readouterr().out


def test_what_a_split_does_not_show_is_told(tmp_path):
  videos = labelled_data.make(24, draw_face)
  dark = [video for video in videos if video.labels["mood"] == (0,)]
  path = labelled_data.write(
    tmp_path / "data",
    {
      "train": dark,
      "val": renamed(videos, "v"),
      "test": renamed(videos[4:6], "t"),
    },
    LABELS,
  )
  results = run(
    eval_far, tmp_path / "w", path, tasks="mood,appearance", modes="knn"
  )
  lines = results["data"]["warnings"]
  assert "task 'mood': in no video of 'train': grey, bright" in lines
  assert any(
    line.startswith("task 'appearance': alike in all videos of 'train': bright")
    for line in lines
  )
  assert not any("task 'mood'" in line and "'val'" in line for line in lines)
  one_person = "'test' shows one person: scores have no intervals"
  assert f"task 'mood': {one_person}" in lines


def test_folds_are_joined_into_splits(tmp_path):
  videos = labelled_data.make(24, draw_face)
  folds = {f"fold{k}": videos[6 * k - 6 : 6 * k] for k in range(1, 5)}
  path = labelled_data.write(tmp_path / "data", folds, LABELS)
  joined = splits.open_split(str(path), "fold1+fold3", tmp_path)
  assert joined.name == "fold1+fold3"
  assert joined.video_ids == tuple(
    video.video_id for video in videos[:6] + videos[12:18]
  )
  third = splits.open_split(str(path), "fold3", tmp_path)
  np.testing.assert_array_equal(joined.labels["mood"][6:], third.labels["mood"])
  clip = Clip(num_frames=4, stride=1)
  windows = joined.windows(clip)[-2:]
  both = [
    clip_batches.ClipReader(split, clip).read(split.windows(clip)[-2:])
    for split in (joined, third)
  ]
  assert len(windows) == 2
  np.testing.assert_array_equal(*both)
  results = run(
    eval_far,
    tmp_path / "w",
    path,
    tasks="mood",
    modes="knn",
    **{"data.train": "fold2+fold3", "data.val": "fold4", "data.test": "fold1"},
  )
  assert results["data"]["splits"]["train"]["videos"] == 12
  assert results["data"]["warnings"] == []
  for wrong, words in (
    ("fold1+fold1", "a split twice"),
    ("fold1+x", "no split"),
  ):
    with pytest.raises(DatasetError, match=words):
      splits.open_split(str(path), wrong, tmp_path)


def test_the_main_face_of_a_video_is_evaluated(tmp_path):
  """Large and long visible, as in features: not the leftmost or longest."""

  def draw(i, np_rng):
    # Track 1 has 6 frames, track 0 has 10.
    sides = ((80, 140), (120, 80), (100, 100))[i]
    return dataclasses.replace(
      draw_face(i, np_rng), num_tracks=2, sides=sides, cuts=(6,)
    )

  path = labelled_data.write(
    tmp_path / "data", {"train": labelled_data.make(3, draw)}, LABELS
  )
  split = splits.open_split(str(path), "train", tmp_path)
  assert [track.side for track in split.tracks] == [140, 120, 100]
  assert [track.num_frames for track in split.tracks] == [6, 10, 10]
  every = splits.open_split(str(path), "train", tmp_path, all_tracks=True)
  assert len(every.tracks) == 6


def test_windows_cover_the_track_across_records(face_data, tmp_path):
  config = tiny(eval_far.get_config())
  clip = formats.open_encoder("random", config.random).architecture.clip
  split = splits.open_split(str(face_data), "train", tmp_path)
  assert len(split) == len(split.tracks) == 24
  windows = split.windows(clip)
  assert [w.start for w in windows] == [0, 2] * 24
  # Video 1 is cut into two records.
  assert split.tracks[1].lengths == (6, 4)
  (found,) = clip_batches.ClipReader(split, clip).read([windows[3]])
  frames = labelled_data.make(24, draw_face)[1].frames.astype(float)
  expected = frames[[2, 4, 6, 8]].mean(axis=(1, 2))
  np.testing.assert_allclose(found.mean(axis=(1, 2)), expected, atol=1)
  every = splits.open_split(str(face_data), "train", tmp_path, all_tracks=True)
  assert len(every.tracks) == 25
  assert np.isnan(split.labels["emotion"][0, 1])


def test_pictures_are_still_clips(tmp_path):
  def draw(i, np_rng):
    face = draw_face(i, np_rng)
    return dataclasses.replace(
      face, frames=face.frames[:1], cuts=(), num_tracks=1
    )

  path = labelled_data.write(
    tmp_path / "data", {"train": labelled_data.make(3, draw)}, LABELS
  )
  clip = Clip(4, 2)
  split = splits.open_split(str(path), "train", tmp_path)
  windows = split.windows(clip)
  assert [w.start for w in windows] == [0, 0, 0]
  for found in clip_batches.ClipReader(split, clip).read(windows):
    assert found.shape[0] == 4
    assert (found == found[:1]).all()


# --- Other data sets and unseen classes ---------------------------------------


def test_other_data_sets_are_scored_with_the_thresholds_of_this_one(
  face_data, tmp_path
):
  """The same videos as another data set have the same scores."""
  twin = labelled_data.write(
    tmp_path / "twin",
    {"test": renamed(labelled_data.make(16, draw_face, 2), "t")},
    LABELS,
  )
  harder = labelled_data.write(
    tmp_path / "harder",
    {"val": renamed(labelled_data.make(16, draw_face, 5), "x")},
    LABELS | {"manipulation": Label(CLASS, ("original", "new"))},
  )
  workdir = tmp_path / "dfd"
  results = run(
    eval_dfd,
    workdir,
    face_data,
    modes="linear,attentive",
    num_seeds=1,
    **{"data.tests": f"{twin}:test,{harder}:val,{face_data}:val"},
  )
  # Thresholds are chosen on it.
  (told,) = (x for x in results["data"]["warnings"] if "twice" in x)
  assert told.startswith(f"{face_data}:val: split 'val' is used twice")
  for row in results["summary"]:
    if row["mode"] == "constant":
      continue
    assert row["tests"][f"{twin}:test"] == row["metrics"]
    other = row["tests"][f"{harder}:val"]
    assert other["auc"]["low"] <= other["auc"]["mean"] <= other["auc"]["high"]
  cell = results["cells"][1]
  drawn = labelled_data.make(16, draw_face, 5)
  labels = np.array([video.labels["manipulation"][0] for video in drawn])
  (scored,) = cell["tests"][f"{harder}:val"]["per_class"]
  assert scored["positives"] == (labels > 0).sum()
  assert scored["negatives"] == (labels == 0).sum()
  assert set(cell["tests"][f"{harder}:val"]["parts"]) <= {"new"}
  assert (
    f"deepfake, tested on {harder}:val" in (workdir / "results.txt").read_text()
  )
  for wrong, words in (
    (f"{tmp_path / 'none'}:test", "is not a prepared data set"),
    (f"{harder}:test", "no split 'test'"),
  ):
    with pytest.raises(DatasetError, match=words):
      run(eval_dfd, tmp_path / "no", face_data, **{"data.tests": wrong})
  with pytest.raises(TaskError, match="would not compare"):
    run(
      eval_far,
      tmp_path / "far",
      face_data,
      tasks="manipulation",
      **{"data.tests": f"{harder}:val"},
    )


def test_a_class_left_out_of_training_is_scored(face_data, tmp_path):
  results = run(
    eval_dfd,
    tmp_path / "out",
    face_data,
    modes="linear",
    **{"data.train_classes": "Deepfakes"},
  )
  split = splits.open_split(str(face_data), "train", tmp_path)
  classes = split.labels["manipulation"][:, 0]
  cell = results["cells"][1]
  assert cell["num_train"] == np.isin(classes, (0, 1)).sum()
  assert cell["num_train"] < (~np.isnan(classes)).sum()
  test = splits.open_split(str(face_data), "test", tmp_path)
  seen = set(test.labels["manipulation"][:, 0]) - {0, 1}
  assert len(cell["test"]["parts"]) >= len(seen)
  for wrong, words in (
    ({"data.train_classes": "Deepfake"}, "has Deepfakes, Face2Face"),
    ({"data.train_classes": "Deepfakes", "tasks": "FaceSwap"}, "to choose"),
  ):
    with pytest.raises(TaskError, match=words):
      run(eval_dfd, tmp_path / "no", face_data, **wrong)
