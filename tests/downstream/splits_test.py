"""Splits opened by ledger and segment index equal those read from records."""

import dataclasses
import json
import shutil

import pytest

from marlin_jax.downstream import splits
from marlin_jax.records import segment_index
from tests.support import made_dataset
from tests.support.made_dataset import a_record, some_labels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Videos in several shards, so not in the order of their names."""
  videos = {}
  for i in range(12):
    name = f"{i:02d}.mp4"
    labels = some_labels(i % 2, i % 2, i / 7)
    videos[name] = [
      a_record(name, *track, side=side, subject_id=f"p{i // 3}", labels=labels)
      for *track, side in (
        (0, 0, 5, 80.5),
        (1, 0, 9, 100.1),
        (0, 1, 5 + 2 * (i % 3), 80.0),
      )
    ]
  return made_dataset.make(
    tmp_path_factory.mktemp("made") / "data",
    videos,
    splits={f"{i:02d}.mp4": "val" for i in (9, 10, 11)},
    refused={"03x.mp4": "no face"},
    num_shards=3,
    labels=made_dataset.LABELS,
  )


def described(path, split, **options):
  opened = splits.open_split(str(path), split, None, **options)
  return {
    field.name: getattr(opened, field.name)
    for field in dataclasses.fields(opened)
    if field.name not in ("dataset", "labels")
  } | {name: str(values) for name, values in opened.labels.items()}


def read_alone(monkeypatch):
  """Makes any reading of records fail."""
  monkeypatch.setattr(splits, "_read_records", None)


@pytest.mark.parametrize("split", ["train", "val", "train+val"])
@pytest.mark.parametrize("all_tracks", [False, True])
def test_no_record_is_read(made, tmp_path, monkeypatch, split, all_tracks):
  old = shutil.copytree(made, tmp_path / "old")
  for path in old.glob("*.segments.npy"):
    path.unlink()
  expected = described(old, split, all_tracks=all_tracks)
  assert len({track.side for track in expected["tracks"]}) > 1
  read_alone(monkeypatch)
  assert described(made, split, all_tracks=all_tracks) == expected


def test_labels_are_those_of_the_ledger(made, tmp_path, monkeypatch):
  path = shutil.copytree(made, tmp_path / "data")
  ledger = path / "videos.jsonl"
  ledger.write_text(
    ledger.read_text().replace('"emotion": [0', '"emotion": [1')
  )
  read_alone(monkeypatch)
  assert splits.open_split(str(path), "val", None).labels["emotion"].all()


def test_splits_of_one_name_in_two_data_sets_are_compared(made, tmp_path):
  """A person in both is told; that the names are equal is no fault."""
  other = made_dataset.make(
    tmp_path / "other",
    {"new.mp4": [a_record("new.mp4", 0, 0, 5, subject_id="p1")]},
  )
  ours, theirs = (
    splits.open_split(str(path), "train", None) for path in (made, other)
  )
  (line,) = splits.split_warnings([ours, theirs])
  assert "share 1 person (e.g. 'p1')" in line
  assert line.endswith("if they are the same in both data sets")
  (line,) = splits.split_warnings([ours, ours])
  assert "used twice" in line


def test_videos_without_a_record_are_told(made):
  split = splits.open_split(str(made), "train", None)
  assert "03x.mp4" not in split.video_ids
  (line,) = splits.record_warnings(split)
  assert line.startswith("left out: 1 video of 'train' without a record")
  assert not [
    *splits.record_warnings(splits.open_split(str(made), "val", None))
  ]


@pytest.mark.parametrize("change", ["sides", "names", "other records"])
def test_records_are_read_where_not_all_is_noted(made, tmp_path, change):
  expected = described(made, "train")
  path = shutil.copytree(made, tmp_path / "data")
  ledger = path / "videos.jsonl"
  if change == "names":
    index = path / "faces-train.segments.npy"
    index.write_bytes(segment_index.without_names(index.read_bytes()))
  else:
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
      for row in line["segments"]:
        if change == "sides":
          row.pop()
        else:
          row[1] += 1
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert described(path, "train") == expected
