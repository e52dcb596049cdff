"""Miniature trees of published layouts give sources with labels."""

import itertools
import json
import math
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.sources.layouts import LAYOUTS
from data_prep.sources.listing import Part
from data_prep.sources.manifest import Input, ManifestError, read_input
from tests.support.dataset_trees import (
  METHODS,
  MOSEI_SEGMENTS,
  celebvhq_clip,
  ffpp_fake,
  ffpp_real,
  touch,
  write_celebvhq_info,
  write_ffpp_splits,
  write_mosei_labels,
  write_mosei_transcripts,
)


def read(root: Path, layout: str, **ratios: float) -> Input:
  return read_input(root, layout=layout, **ratios)


def error(root: Path, layout: str) -> str:
  with pytest.raises(ManifestError) as e:
    read(root, layout)
  return str(e.value)


def splits(found: Input) -> dict[str, str]:
  return {source.video_id: source.split for source in found.sources}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_something_else_is_an_error_that_names_the_layout(
  tmp_path, layout
):
  touch(tmp_path, "notes.txt")
  assert str(tmp_path) in error(tmp_path, layout)
  assert "is not a folder" in error(tmp_path / "notes.txt", layout)


# --- Own data -----------------------------------------------------------------


def test_class_folders_give_classes_and_splits(tmp_path):
  touch(
    tmp_path, "train/calm/a.mp4", "train/loud/b.mp4", "test/calm/deep/c.avi"
  )
  found = read(tmp_path, "class_folders")
  assert found.labels["class"].names == ("calm", "loud")
  assert [(s.video_id, s.split, s.labels["class"]) for s in found.sources] == [
    ("test/calm/deep/c.avi", "test", (0,)),
    ("train/calm/a.mp4", "train", (0,)),
    ("train/loud/b.mp4", "train", (1,)),
  ]


def test_class_folders_without_splits_are_split_by_ratio(tmp_path):
  touch(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(200)))
  found = read(tmp_path, "class_folders", val_ratio=0.2, test_ratio=0.3)
  counts = [*splits(found).values()]
  assert 50 < counts.count("val") < 110
  assert 80 < counts.count("test") < 160
  more = read(tmp_path, "class_folders", val_ratio=0.2, test_ratio=0.1)
  for name, split in splits(found).items():
    assert (split == "val") == (splits(more)[name] == "val")
  with pytest.raises(ManifestError, match="a sum of at most 1"):
    read(tmp_path, "class_folders", val_ratio=0.7, test_ratio=0.7)


def test_a_class_folder_tree_needs_two_classes(tmp_path):
  touch(tmp_path, "only/a.mp4")
  assert "expected two or more folders" in error(tmp_path, "class_folders")
  touch(tmp_path, "loose.mp4", "other/b.mp4")
  assert "'loose.mp4' is not in a folder" in error(tmp_path, "class_folders")


def test_csv_labels_are_words_bits_or_values(tmp_path):
  touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
  table = tmp_path / "m.csv"
  table.write_text(
    "path,label_mood,label_face.glasses,label_face.beard,label_age\n"
    "a.mp4,happy,1,0,31.5\nb.mp4,sad,0,,40\nc.mp4,,1,1,\n"
  )
  found = read_input(table)
  kinds = {name: (of.kind, of.names) for name, of in found.labels.items()}
  assert kinds == {
    "mood": ("class", ("happy", "sad")),
    "face": ("binary", ("glasses", "beard")),
    "age": ("value", ("age",)),
  }
  np.testing.assert_equal(
    [dict(source.labels) for source in found.sources],
    [
      {"mood": (0.0,), "face": (1.0, 0.0), "age": (31.5,)},
      {"mood": (1.0,), "face": (0.0, math.nan), "age": (40.0,)},
      {"mood": (math.nan,), "face": (1.0, 1.0), "age": (math.nan,)},
    ],
  )
  table.write_text("path,label_face.a,label_face.b\na.mp4,yes,no\n")
  with pytest.raises(ManifestError, match="label face has the parts"):
    read_input(table)


def test_csv_labels_that_are_easily_mistaken(tmp_path):
  touch(tmp_path, "a.mp4", "b.mp4")
  table = tmp_path / "m.csv"
  # As pandas writes missing values.
  table.write_text("path,label_age\na.mp4,31\nb.mp4,nan\n")
  found = read_input(table)
  assert (found.labels["age"].kind, found.notes) == ("value", [])
  assert math.isnan(found.sources[1].labels["age"][0])
  table.write_text("path,label_age\na.mp4,31\nb.mp4,n/a\n")
  (note,) = read_input(table).notes
  assert "label age mixes words such as 'n/a' with numbers" in note
  table.write_text("path,label_path\na.mp4,1\nb.mp4,0\n")
  assert read_input(table).labels["path"].kind == "binary"
  table.write_text('path,label_age\na.mp4,"31,5"\nb.mp4,40\n')
  assert "label age has values such as '31,5'" in read_input(table).notes[0]
  # To Python, 1_1 is the number 11.
  table.write_text("path,label_scene\na.mp4,1_1\nb.mp4,2_1\n")
  assert read_input(table).labels["scene"].names == ("1_1", "2_1")


@pytest.mark.parametrize("header", ["label_a,label_a.", "label_a,label_a.a"])
def test_two_columns_of_one_label_are_refused(tmp_path, header):
  touch(tmp_path, "a.mp4")
  table = tmp_path / "m.csv"
  table.write_text(f"path,{header}\na.mp4,1,0\n")
  with pytest.raises(ManifestError, match="the header is"):
    read_input(table)


def test_a_label_that_no_float32_holds_is_refused(tmp_path):
  touch(tmp_path, "a.mp4")
  table = tmp_path / "m.csv"
  table.write_text("path,label_id\na.mp4,1e39\n")
  with pytest.raises(ManifestError, match=r"label id has \[1e\+39\]"):
    read_input(table)


# --- YouTube Faces ------------------------------------------------------------


@pytest.fixture
def ytf(tmp_path) -> Path:
  people = [f"Person_{letter}" for letter in "ABCDEFGHIJ"]
  for person in people:
    for k in (0, 3):
      folder = f"frame_images_DB/{person}/{k}"
      touch(tmp_path, f"{folder}/{k}.9.jpg", f"{folder}/{k}.10.jpg")
    faces = [
      f"{person}\\{k}\\{k}.{frame}.jpg,0,{frame},165,132,132,0.0,1"
      for k in (0, 3)
      for frame in (9, 10)
    ]
    path = tmp_path / f"frame_images_DB/{person}.labeled_faces.txt"
    path.write_text("\r\n".join(faces))
  touch(tmp_path, "frame_images_DB/Nobody_Paired/1/1.1.jpg")
  pairs = [
    f"{fold}, {name}/0, {name}/3, 1" for fold, name in enumerate(people, 1)
  ]
  header = "split number, first name, second name, is same"
  (tmp_path / "splits.txt").write_text("\r\n".join([header, *pairs]))
  return tmp_path


def test_youtube_faces_are_split_by_the_official_folds(ytf):
  found = read(ytf, "ytf")
  assert len(found.sources) == 21
  for source in found.sources:
    person = source.path.parent.name
    assert source.subject_id == person
    last = person in ("Person_I", "Person_J")
    assert source.split == ("val" if last else "train")
    assert source.frame_rate == 24
    points = ((0, 9, 165), (pytest.approx(1 / 24), 10, 165))
    assert source.part.face_at == (() if person == "Nobody_Paired" else points)
  assert found.notes == [
    "NAME.labeled_faces.txt of 1 people are missing: their main face is taken "
    "for them."
  ]


def test_youtube_faces_are_split_as_marlins_authors_did(ytf):
  (ytf / "splits.txt").unlink()
  (ytf / "train_set.csv").write_text("path,len\nPerson_I/0,50\nPerson_I/3,60\n")
  assert "has only train_set.csv" in error(ytf, "ytf")
  (ytf / "val_set.csv").write_text("path,len\nPerson_A/3,99\nGone/1,48\n")
  found = read(ytf, "ytf")
  assert splits(found) == {
    "frame_images_DB/Person_A/3": "val",
    "frame_images_DB/Person_I/0": "train",
    "frame_images_DB/Person_I/3": "train",
  }
  assert found.notes[-1:] == [
    "MARLIN's split: 3 of its 4 videos exist; 18 others are left out."
  ]


def test_youtube_faces_whose_labels_are_malformed_are_refused(ytf):
  path = ytf / "frame_images_DB/Person_B.labeled_faces.txt"
  path.write_text("Person_B\\0\\0.9.jpg,0,x\n")
  assert "Person_B.labeled_faces.txt, line 1 is" in error(ytf, "ytf")


def test_youtube_faces_with_a_person_in_two_folds_are_refused(ytf):
  with (ytf / "splits.txt").open("a") as file:
    file.write("\n10, Person_A/0, Person_J/0, 0\n")
  assert "Person_A is in fold 10 and in fold 1" in error(ytf, "ytf")


# --- CelebV-HQ ----------------------------------------------------------------


def clip(i: int, emotion="neutral") -> dict:
  return celebvhq_clip(
    f"video{i // 2}", [i % 2] * 40, [(i + 1) % 2] * 35, emotion
  )


@pytest.fixture
def celebvhq(tmp_path) -> Path:
  two = [
    {"emotion": e, "start_sec": i, "end_sec": i + 1}
    for i, e in enumerate(("happy", "surprise"))
  ]
  clips = {f"clip_{i}_0": clip(i) for i in range(100)}
  clips["clip_98_0"] = clip(98, two)
  clips["clip_99_0"] = clip(99, two[:1])
  write_celebvhq_info(tmp_path, clips)
  names = [f"35666/clip_{i}_0.mp4" for i in range(10, 100)]
  random.Random(0).shuffle(names)
  touch(tmp_path, *names, "35666/of_something_else.mp4")
  return tmp_path


def test_celebvhq_has_attributes_actions_and_emotions(celebvhq):
  found = read(celebvhq, "celebvhq")
  assert found.notes == ["10 of 100 clips in celebvhq_info.json are missing."]
  labels = found.labels
  assert [labels[n].length for n in ("appearance", "action")] == [40, 35]
  assert labels["emotion"].names == ("happy", "neutral", "surprise")
  by_id = {source.path.stem: source for source in found.sources}
  assert len(by_id) == 90
  assert by_id["clip_51_0"].labels["appearance"] == (1.0,) * 40
  assert by_id["clip_51_0"].labels["action"] == (0.0,) * 35
  assert by_id["clip_51_0"].labels["emotion"] == (1.0,)
  assert by_id["clip_99_0"].labels["emotion"] == (0.0,)
  # Two emotions in sequence.
  assert math.isnan(*by_id["clip_98_0"].labels["emotion"])


def test_celebvhq_splits_keep_a_source_video_together(celebvhq):
  found = read(celebvhq, "celebvhq")
  of_subject: dict[str, set[str]] = {}
  for source in found.sources:
    of_subject.setdefault(source.subject_id, set()).add(source.split)
  assert all(len(of) == 1 for of in of_subject.values())
  assert set.union(*of_subject.values()) == {"train", "val", "test"}


def test_celebvhq_clips_in_two_folders_are_refused(celebvhq):
  touch(celebvhq, "cropped/clip_51_0.mp4")
  message = error(celebvhq, "celebvhq")
  assert "clip_51_0 is in 35666 and in cropped" in message
  assert "give one of the folders as --input" in message
  # The labels are found beside the folder.
  found = read(celebvhq / "cropped", "celebvhq")
  assert [source.video_id for source in found.sources] == ["clip_51_0.mp4"]
  assert len(read(celebvhq / "35666", "celebvhq").sources) == 90


def test_celebvhq_raw_videos_have_their_clips_by_time_and_box(celebvhq):
  assert "expected files such as raw/video0.mp4" in error(
    celebvhq, "celebvhq_raw"
  )
  touch(celebvhq, "raw/video20.mp4", "raw/of_something_else.mp4")
  info = json.loads((celebvhq / "celebvhq_info.json").read_text())
  info["clips"]["clip_41_0"]["duration"] = {"start_sec": 7.5, "end_sec": 8.25}
  info["clips"]["clip_41_0"]["bbox"]["right"] = 1.0000001
  (celebvhq / "celebvhq_info.json").write_text(json.dumps(info))
  found = read(celebvhq, "celebvhq_raw")
  assert found.notes == ["98 of 100 clips in celebvhq_info.json are missing."]
  first, second = found.sources
  assert first.video_id == "video20.mp4#t=1,4.5&box=0.2,0.1,0.7,0.9"
  assert first.path == celebvhq / "raw/video20.mp4"
  assert first.part == Part(1.0, 4.5, (0.2, 0.1, 0.7, 0.9))
  assert second.part == Part(7.5, 8.25, (0.2, 0.1, 1.0, 0.9))
  assert second.labels["appearance"] == (1.0,) * 40
  assert first.subject_id == second.subject_id == "video20"
  assert first.split == second.split


def test_celebvhq_that_nests_too_deeply_is_refused(celebvhq):
  (celebvhq / "celebvhq_info.json").write_text("[" * 200_000)
  assert "is not JSON" in error(celebvhq, "celebvhq")


def test_celebvhq_attributes_are_0_or_1(celebvhq):
  path = celebvhq / "celebvhq_info.json"
  info = json.loads(path.read_text())
  (*_, name) = info["clips"]
  info["clips"][name]["attributes"]["appearance"][0] = 5
  path.write_text(json.dumps(info))
  assert "expected 0, 1 or nan" in error(celebvhq, "celebvhq")


def test_celebvhq_with_another_kind_of_json_is_refused(celebvhq):
  (celebvhq / "celebvhq_info.json").write_text('{"clips": {}}')
  assert "is malformed" in error(celebvhq, "celebvhq")


# --- FaceForensics++ ----------------------------------------------------------


@pytest.fixture
def ffpp(tmp_path) -> Path:
  pairs = {
    "train": [["071", "054"], ["087", "081"]],
    "val": [["720", "672"]],
    "test": [["953", "974"]],
  }
  write_ffpp_splits(tmp_path, pairs)
  for a, b in itertools.chain(*pairs.values()):
    touch(tmp_path, ffpp_real(a), ffpp_real(b))
    for method in (*METHODS, "FaceShifter"):
      touch(tmp_path, ffpp_fake(method, a, b), ffpp_fake(method, b, a))
  return tmp_path


def test_faceforensics_has_official_splits_and_manipulations(ffpp):
  found = read(ffpp, "ffpp_c23")
  assert len(found.sources) == 4 * (2 + 4 * 2)
  assert found.labels["manipulation"].names == ("original", *METHODS)
  by_id = {source.video_id: source for source in found.sources}
  real = by_id["original_sequences/youtube/c23/videos/054.mp4"]
  fake = by_id["manipulated_sequences/FaceSwap/c23/videos/054_071.mp4"]
  assert (real.split, fake.split) == ("train", "train")
  assert real.subject_id == fake.subject_id == "054+071"
  assert real.labels == {"fake": (0.0,), "manipulation": (0.0,)}
  assert fake.labels == {"fake": (1.0,), "manipulation": (3.0,)}
  test = by_id["manipulated_sequences/Deepfakes/c23/videos/974_953.mp4"]
  assert test.split == "test"


@pytest.mark.parametrize("folder", ["raw", "c0"])
@pytest.mark.parametrize("layout", ["ffpp_raw", "ffpp_c0"])
def test_faceforensics_raw_has_two_names(ffpp, folder, layout):
  for path in [*ffpp.rglob("c23")]:
    path.rename(path.with_name(folder))
  found = read(ffpp, layout)
  assert len(found.sources) == 40
  assert f"original_sequences/youtube/{folder}/videos/054.mp4" in splits(found)


def test_faceforensics_says_what_is_not_there(ffpp):
  assert "has no video of FaceForensics++ at c40" in error(ffpp, "ffpp_c40")
  (ffpp / "manipulated_sequences/FaceSwap/c23/videos/054_071.mp4").unlink()
  assert "1 of 40 videos" in read(ffpp, "ffpp_c23").notes[0]
  (ffpp / "splits/val.json").write_text('["720", "672"]')
  assert "val.json is not a list of pairs" in error(ffpp, "ffpp_c23")
  (ffpp / "splits/val.json").write_text('[["../x", "672"]]')
  assert "val.json is not a list of pairs" in error(ffpp, "ffpp_c23")
  (ffpp / "splits/val.json").unlink()
  assert "val.json is missing" in error(ffpp, "ffpp_c23")


# --- CMU-MOSEI ----------------------------------------------------------------


@pytest.fixture
def mosei(tmp_path) -> Path:
  """Writes labels in another order than the segments."""
  videos = {
    "-3g5yACwYnA": [(0.0, [0.5, 0, 0.66, 0, 0, 0, 0])],
    "abc_d": [
      (7.5, [-1.0, 0, 0, 1, 0, 0, 0]),
      (0.02, [2.0, 3, 0, 0, 0, 0, 0]),
    ],
    "gone": [(0.0, [0, 0, 0, 0, 0, 0, 0])],
  }
  write_mosei_labels(tmp_path, videos)
  write_mosei_transcripts(
    tmp_path,
    {
      "-3g5yACwYnA": "-3g5yACwYnA___4___0.0___2.0___hi",
      "abc_d": "abc_d___0___0.0___2.0___one\nabc_d___1___3.0___4.0___two\n"
      "abc_d___2___7.53___9.0___three___with bars\n",
    },
  )
  touch(
    tmp_path,
    f"{MOSEI_SEGMENTS}/-3g5yACwYnA_4.mp4",
    *(f"{MOSEI_SEGMENTS}/abc_d_{i}.mp4" for i in range(3)),
  )
  return tmp_path


def test_mosei_labels_find_their_segments_by_time(mosei):
  found = read(mosei, "mosei")
  numbers = {
    s.path.stem: (s.subject_id, s.labels["sentiment"], s.labels["emotion"])
    for s in found.sources
  }
  assert numbers == {
    "-3g5yACwYnA_4": ("-3g5yACwYnA", (0.5,), (0, 1, 0, 0, 0, 0)),
    "abc_d_0": ("abc_d", (2.0,), (1, 0, 0, 0, 0, 0)),
    "abc_d_2": ("abc_d", (-1.0,), (0, 0, 1, 0, 0, 0)),
  }
  assert found.split_ratios == (0.1, 0.2)


def test_mosei_transcripts_may_be_in_any_encoding(mosei):
  before = read(mosei, "mosei").sources
  path = mosei / "Raw/Transcript/Segmented/Combined/-3g5yACwYnA.txt"
  path.write_bytes("-3g5yACwYnA___4___0.0___2.0___caf\xe9".encode("latin-1"))
  assert read(mosei, "mosei").sources == before


def test_mosei_labels_that_lead_to_other_files_are_refused(mosei):
  with h5py.File(mosei / "CMU_MOSEI_Labels.csd", "a") as file:
    (group,) = file.values()
    group["data/gone"].move("features", "moved")
    group["data/gone/features"] = h5py.ExternalLink("/etc/passwd", "/x")
  assert "'features' is missing, or a link" in error(mosei, "mosei")


def test_mosei_segments_may_be_those_of_mmsa(tmp_path):
  (tmp_path / "label.csv").write_text(
    "video_id,clip_id,text,label,mode\nabc_d,7,a,-0.5,valid\nabc_d,8,a,1,valid\n"
  )
  touch(tmp_path, "Raw/abc_d/7.mp4", "Raw/abc_d/0008.mp4")
  assert splits(read(tmp_path, "mosei")) == {
    "Raw/abc_d/0008.mp4": "val",
    "Raw/abc_d/7.mp4": "val",
  }


def test_mosei_takes_the_official_folds_without_running_them(mosei):
  folds = mosei / "cmu_mosei_std_folds.py"
  folds.write_text(
    "raise SystemExit('run')\n"
    "standard_train_fold=['abc_d', 'other']\n"
    "standard_valid_fold=['-3g5yACwYnA']\nstandard_test_fold=['x']\n"
  )
  assert {s.path.stem: s.split for s in read(mosei, "mosei").sources} == {
    "-3g5yACwYnA_4": "val",
    "abc_d_0": "train",
    "abc_d_2": "train",
  }
  folds.write_text("standard_train_fold=open('x')\n")
  assert "three lists of video ids" in error(mosei, "mosei")
  for text in ("[" * 50, "-" * 100_000 + "1"):
    folds.write_text(f"standard_train_fold={text}\n")
    with pytest.raises(ManifestError, match="three lists"):
      read(mosei, "mosei")


def test_mosei_labels_may_be_a_table(mosei):
  (mosei / "CMU_MOSEI_Labels.csd").unlink()
  (mosei / "label.csv").write_text(
    "video_id,clip_id,text,label,happy,mode\n"
    'abc_d,0001,"a, b",-0.5,,valid\nabc_d,2,c,1,2,train\n'
  )
  message = error(mosei, "mosei")
  assert "subject 'abc_d' is in split" in message
  text = (mosei / "label.csv").read_text().replace("train", "valid")
  (mosei / "label.csv").write_text(text)
  one, two = read(mosei, "mosei").sources
  assert (one.split, one.labels["sentiment"]) == ("val", (-0.5,))
  assert math.isnan(one.labels["emotion"][0])
  assert two.labels["emotion"][0] == 1.0
  (mosei / "label.csv").write_text("label,video_id,clip_id\n1,abc_d\n")
  assert "line 2 has no video_id or clip_id" in error(mosei, "mosei")


def test_mosei_without_transcripts_is_told_what_is_missing(mosei):
  for path in (mosei / "Raw/Transcript/Segmented/Combined").iterdir():
    path.unlink()
  assert "none of the 0 labelled" in error(mosei, "mosei")
  path.parent.rmdir()
  assert "Raw/Transcript/Segmented/Combined is missing" in error(mosei, "mosei")


# --- LRS2 ---------------------------------------------------------------------


def test_lrs2_has_sound_and_the_official_splits(tmp_path):
  root = tmp_path / "mvlrs_v1"
  touch(root, "main/55/00001.mp4", "main/55/00002.mp4", "pretrain/7/00009.mp4")
  (tmp_path / "train.txt").write_text("55/00001\n55/00003\n")
  (tmp_path / "test.txt").write_text("55/00002 NF\n")
  (tmp_path / "pretrain.txt").write_text("7/00009\n")
  found = read(tmp_path, "lrs2")
  assert splits(found) == {
    "main/55/00001.mp4": "train",
    "main/55/00002.mp4": "test",
    "pretrain/7/00009.mp4": "pretrain",
  }
  assert found.has_sound
  assert found.notes == ["1 of 4 listed videos are missing."]


# --- All ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("layout", "name"),
  [
    ("mosei", "label.csv"),
    ("dfew", "EmoLabel_DataSplit/test(single-labeled)/set_1.csv"),
    ("ytf", "train_set.csv"),
  ],
)
def test_a_list_that_is_no_table_is_refused(tmp_path, layout, name):
  touch(tmp_path, name, "val_set.csv", "frame_images_DB/NAME/0/0.1.jpg")
  (tmp_path / name).write_text("path,label\n" + 200_000 * "x")
  assert "field larger than field limit" in error(tmp_path, layout)
