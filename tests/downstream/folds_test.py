"""Folds take each video once as a test, and no person on both sides."""

import dataclasses

import numpy as np
import pytest

from data_prep.sources.listing import CLASS, Label
from marlin_jax.downstream import folds, splits, tasks
from marlin_jax.downstream.tasks import TaskError
from tests.support import labelled_data
from tests.support.labelled_data import LABELS, draw_face

NUM = 24  # videos of 12 people, in three parts of 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  videos = labelled_data.make(NUM, draw_face)
  return labelled_data.write(
    tmp_path_factory.mktemp("folds") / "data",
    {f"fold{k + 1}": videos[8 * k : 8 * k + 8] for k in range(3)},
    LABELS,
  )


@pytest.fixture(scope="module")
def everything(data):
  return splits.open_split(str(data), "fold3+fold1+fold2", None)


def task_of(data, name, **rule):
  return tasks.make_task(name, tasks.read_labels(str(data)), rule, str(data))


def check(found, num_videos):
  tested = [video for f in found.values() for video in f["test"].video_ids]
  assert len(tested) == len(set(tested)) == num_videos
  for fold in found.values():
    people = [set(videos.people) for videos in fold.values()]
    assert sum(map(len, people)) == len(set.union(*people))
    assert sum(map(len, fold.values())) == num_videos
    assert all(len(videos) for videos in fold.values())


def test_splits_are_folds(data, everything):
  found = folds.of_splits(
    task_of(data, "mood"), everything, ("fold1", "fold2", "fold3"), 0.25
  )
  check(found, NUM)
  for k, (name, fold) in enumerate(found.items()):
    assert name == f"fold{k + 1}"
    assert fold["test"].video_ids == [
      f"{i:03d}.mp4" for i in range(8 * k, 8 * k + 8)
    ]
    assert len(set(fold["val"].people)) == 2  # a quarter of eight


def test_groups_of_people_follow_their_names(data, everything):
  task = task_of(data, "mood")
  found = folds.of_people(task, everything, 5, 0.1)
  check(found, NUM)
  people = sorted(set(everything.people))
  sizes = [len(set(fold["test"].people)) for fold in found.values()]
  assert sizes == [3, 3, 2, 2, 2]
  assert set(found["people1"]["test"].people) == set(people[:3])
  alone = folds.of_people(task, everything, 0, 0.1)
  check(alone, NUM)
  assert list(alone) == [f"people{i:02d}" for i in range(1, 13)]
  with pytest.raises(TaskError, match="people:13.* show 12 people"):
    folds.of_people(task, everything, 13, 0.1)


def test_videos_without_the_label_are_in_no_fold(data, everything):
  task = task_of(data, "manipulation")
  known = len(splits.task_split(task, everything))
  assert known == NUM - 1
  check(folds.of_people(task, everything, 4, 0.1), known)


def test_each_class_is_left_out_or_trained_alone(data):
  names = ("original", "a", "b", "c")
  task = tasks.Task(
    *("fake", "manipulation", "binary", ("fake",)),
    classes=names,
    negative="original",
  )
  number = {name: i for i, name in enumerate(names)}
  by_role = {
    role: dataclasses.replace(
      splits.open_split(str(data), "fold1", None),
      labels={"manipulation": np.arange(8.0)[:, None] % 4},
    )
    for role in ("train", "val", "test")
  }

  def classes_of(videos):
    values = videos.split.labels["manipulation"][videos.rows, 0]
    return set(values.astype(int))

  for single in (False, True):
    found = folds.of_classes(task, by_role, single=single)
    assert list(found) == ["a", "b", "c"]
    for name, fold in found.items():
      one, others = {0, number[name]}, {0, 1, 2, 3} - {number[name]}
      trained, tested = (one, {0, 1, 2, 3}) if single else (others, one)
      assert classes_of(fold["train"]) == classes_of(fold["val"]) == trained
      assert classes_of(fold["test"]) == tested
  with pytest.raises(TaskError, match="no two positive classes"):
    folds.of_classes(task_of(data, "mood"), by_role, single=False)


def test_too_few_people_are_told(tmp_path):
  videos = [
    dataclasses.replace(video, subject_id=f"person {i % 2}")
    for i, video in enumerate(labelled_data.make(4, draw_face))
  ]
  path = labelled_data.write(
    tmp_path / "data",
    {"a": videos[:2], "b": videos[2:]},
    {"mood": Label(CLASS, ("dark", "grey", "bright"))} | LABELS,
  )
  split = splits.open_split(str(path), "a+b", None)
  with pytest.raises(TaskError, match="videos of 1 person"):
    folds.of_people(task_of(path, "mood"), split, 0, 0.1)
  (warning,) = folds.warnings(split)
  assert "'a' and 'b' share 2 people" in warning
