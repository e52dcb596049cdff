"""From videos in published data sets' folders to numbers, by the commands.

Each tree holds a few short videos of one man's face; those with the label are
mirrored and darker, so that even an encoder that has learned nothing tells
them apart.
"""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from configs import eval_dfd, eval_far, eval_fer
from data_prep.sources.manifest import split_of
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.downstream.tasks import TaskError
from tests.support.dataset_trees import (
  MOSEI_SEGMENTS,
  celebvhq_clip,
  ffpp_fake,
  ffpp_real,
  write_celebvhq_info,
  write_ffpp_splits,
  write_mosei_labels,
  write_mosei_transcripts,
)
from tests.support.labelled_data import command, metric, run
from tests.support.processes import run_prepare
from tests.support.videos import write_video

pytestmark = pytest.mark.usefixtures("face_models")

NUM_FRAMES = 8
QUICK = {
  "modes": "linear",
  "linear.penalties": (0.01,),
}


@pytest.fixture(scope="module")
def film(carphone_frames) -> Callable[[Path, bool], None]:
  """Writes a video; each call writes other frames."""
  numbers = itertools.count()

  def write(path: Path, labelled: bool) -> None:
    first = 3 * next(numbers)
    frames = carphone_frames[first : first + NUM_FRAMES]
    if labelled:
      frames = [
        (frame[:, ::-1] * [0.4, 0.7, 0.7]).astype(np.uint8) for frame in frames
      ]
    write_video(path, frames, crf="10", preset="veryfast")

  return write


def prepared(layout: str, tree: Path) -> Path:
  """Returns the data set that data_prep.prepare makes of a tree."""
  output = tree.with_name("data")
  result = run_prepare("--dataset", layout, "--input", tree, "--output", output)
  assert result.returncode == 0, result.stderr
  assert not (output / "quarantine.jsonl").read_text()
  return output


def results_of(evaluation: ModuleType, data: Path, **changes) -> dict:
  """Evaluates an encoder that has learned nothing."""
  workdir = data.with_name("results")
  run(evaluation, workdir, data, **QUICK | changes)
  return json.loads((workdir / "results.json").read_text())


def num_videos(results: dict) -> dict[str, int]:
  splits = results["data"]["splits"]
  return {role: split["videos"] for role, split in splits.items()}


def truth(data: Path, cell: str) -> dict[str, dict[str, str]]:
  """Returns the true labels of each test video, by its id."""
  path = data.with_name("results") / "predictions" / f"{cell}.csv"
  with path.open() as file:
    return {row["video_id"]: row for row in csv.DictReader(file)}


# --- One's own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def class_folders(film, tmp_path_factory) -> Path:
  tree = tmp_path_factory.mktemp("own") / "tree"
  for split, num in (("train", 2), ("val", 1), ("test", 1)):
    for i in range(num):
      film(tree / f"{split}/calm/{split}{i}.mp4", False)
      film(tree / f"{split}/loud/{split}{i}.mp4", True)
  return prepared("class_folders", tree)


def test_a_task_of_ones_own_is_a_folder_for_each_class(class_folders):
  workdir = class_folders.with_name("results")
  result = command("far", workdir, class_folders, **QUICK, tasks="class")
  assert result.returncode == 0, result.stderr
  results = json.loads((workdir / "results.json").read_text())
  assert num_videos(results) == {"train": 4, "val": 2, "test": 2}
  assert results["tasks"]["class"]["names"] == ["calm", "loud"]
  assert metric(results, "linear", "accuracy") == 1.0
  rows = truth(class_folders, "class-linear-1-0")
  assert rows["test/loud/test0.mp4"]["true:loud"] == "1"
  assert rows["test/calm/test0.mp4"]["true:loud"] == "0"
  assert any(
    "unknown in 8 of 8 videos" in line for line in results["data"]["warnings"]
  )


def test_a_split_or_a_label_that_is_missing_is_told_before_any_compute(
  class_folders,
):
  workdir = class_folders.with_name("none")
  for changes, error, words in (
    ({"data.test": "exam"}, DatasetError, "'exam'"),
    ({"tasks": "mood"}, TaskError, "'mood'"),
  ):
    with pytest.raises(error, match=words):
      run(eval_far, workdir, class_folders, **{"tasks": "class"} | changes)
    assert not workdir.exists()


# --- CelebV-HQ ----------------------------------------------------------------


@pytest.fixture(scope="module")
def celebvhq(film, tmp_path_factory) -> Path:
  tree = tmp_path_factory.mktemp("celebvhq") / "tree"
  num_missing = {"train": 2, "val": 1, "test": 1}
  clips = {}
  for i in itertools.count():
    source = f"source{i}"
    split = split_of(source, 0.1, 0.1)  # as the layout has them
    if not num_missing.get(split):
      continue
    num_missing[split] -= 1
    for labelled in (0, 1):
      look = [labelled, 0] * 20
      clips[f"{source}_{labelled}"] = celebvhq_clip(source, look, look[:35])
      film(tree / f"35666/{source}_{labelled}.mp4", bool(labelled))
    if not any(num_missing.values()):
      break
  write_celebvhq_info(tree, clips)
  return prepared("celebvhq", tree)


def test_celebvhq_goes_to_attributes(celebvhq):
  results = results_of(eval_far, celebvhq)
  assert num_videos(results) == {"train": 4, "val": 2, "test": 2}
  # Each split is of one or two sources, whose clips are alike in most labels.
  assert all(
    "alike in all videos" in line or "one person" in line
    for line in results["data"]["warnings"]
  )
  sizes = {name: len(t["names"]) for name, t in results["tasks"].items()}
  assert sizes == {"appearance": 40, "action": 35}
  cells = {c["task"]: c for c in results["cells"] if c["mode"] == "linear"}
  assert cells["appearance"]["test"]["metrics"]["auc"]["value"] == 1.0
  labels = cells["appearance"]["test"]["per_class"]
  assert [row["auc"] for row in labels] == [1.0, None] * 20
  assert labels[0]["name"] == "look_0"


# --- CMU-MOSEI ----------------------------------------------------------------


@pytest.fixture(scope="module")
def mosei(film, tmp_path_factory) -> Path:
  tree = tmp_path_factory.mktemp("mosei") / "tree"
  folds = {"train": ["a", "b"], "valid": ["c"], "test": ["d"]}
  labels, texts = {}, {}
  for video in itertools.chain(*folds.values()):
    labels[video] = [
      (0.0, [1.5, 1, 0, 0, 0, 0, 0]),
      (3.0, [-2.0, 0, 2, 0, 0, 0, 0]),
    ]
    texts[video] = f"{video}___0___0.0___2.0___x\n{video}___1___3.0___4.0___y"
    for segment in (0, 1):
      film(tree / f"{MOSEI_SEGMENTS}/{video}_{segment}.mp4", bool(segment))
  write_mosei_labels(tree, labels)
  write_mosei_transcripts(tree, texts)
  (tree / "cmu_mosei_std_folds.py").write_text(
    "".join(f"standard_{name}_fold = {of}\n" for name, of in folds.items())
  )
  return prepared("mosei", tree)


def test_mosei_goes_to_emotion_and_sentiment(mosei):
  results = results_of(
    eval_fer, mosei, tasks="emotion,sentiment,sentiment7,sentiment_value"
  )
  assert num_videos(results) == {"train": 4, "val": 2, "test": 2}
  assert results["data"]["splits"]["test"]["people"] == 1
  scores = {
    c["task"]: c["test"] for c in results["cells"] if c["mode"] == "linear"
  }
  for task in ("emotion", "sentiment"):
    assert scores[task]["metrics"]["auc"]["value"] == 1.0
  assert scores["sentiment7"]["confusion"][0] == [0] * 7
  assert scores["sentiment_value"]["metrics"]["accuracy_2"]["value"] == 1.0
  numbers = truth(mosei, "sentiment_value-linear-1-0")
  assert numbers[f"{MOSEI_SEGMENTS}/d_0.mp4"]["true:sentiment"] == "1.5"
  assert numbers[f"{MOSEI_SEGMENTS}/d_1.mp4"]["true:sentiment"] == "-2"
  rows = truth(mosei, "sentiment-linear-1-0")
  assert rows[f"{MOSEI_SEGMENTS}/d_0.mp4"]["true:sentiment>=0"] == "1"
  assert rows[f"{MOSEI_SEGMENTS}/d_1.mp4"]["true:sentiment>=0"] == "0"


# --- FaceForensics++ ----------------------------------------------------------


@pytest.fixture(scope="module")
def ffpp(film, tmp_path_factory) -> Path:
  tree = tmp_path_factory.mktemp("ffpp") / "tree"
  pairs = {
    "train": [("071", "054")],
    "val": [("720", "672")],
    "test": [("953", "974")],
  }
  for a, b in itertools.chain(*pairs.values()):
    film(tree / ffpp_real(a), False)
    film(tree / ffpp_fake("Deepfakes", a, b), True)
    film(tree / ffpp_fake("FaceSwap", b, a), True)
  write_ffpp_splits(tree, pairs)
  return prepared("ffpp_c23", tree)


def test_faceforensics_goes_to_all_manipulations_and_each(ffpp):
  results = results_of(eval_dfd, ffpp, tasks="deepfake,FaceSwap")
  assert num_videos(results) == {"train": 3, "val": 3, "test": 3}
  assert results["data"]["splits"]["test"]["people"] == 1
  scores = {
    c["task"]: c["test"] for c in results["cells"] if c["mode"] == "linear"
  }
  together = scores["deepfake"]
  assert together["metrics"]["auc"]["value"] == 1.0
  assert {
    name: part["auc"]["value"]
    for name, part in together["parts"].items()
    if name in ("Deepfakes", "FaceSwap")
  } == {"Deepfakes": 1.0, "FaceSwap": 1.0}
  assert together["num_videos"] == 3
  assert scores["FaceSwap"]["num_videos"] == 2
