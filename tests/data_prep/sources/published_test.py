"""Layouts that are tables of patterns: miniature trees as published."""

import math
from pathlib import Path

import pytest

from data_prep.sources.layouts import LAYOUTS
from data_prep.sources.manifest import Input, ManifestError, read_input
from tests.support.dataset_trees import touch


def read(root: Path, layout: str) -> Input:
  return read_input(root, layout=layout)


def error(root: Path, layout: str) -> str:
  with pytest.raises(ManifestError) as e:
    read(root, layout)
  return str(e.value)


def rows(found: Input) -> dict[str, tuple]:
  """Returns subject, split and named labels by id."""
  return {
    source.video_id: (
      source.subject_id,
      source.split,
      {
        name: found.labels[name].names[int(value)]
        if found.labels[name].kind == "class"
        else value
        for name, (value,) in source.labels.items()
        if not math.isnan(value)
      },
    )
    for source in found.sources
  }


def write(root: Path, name: str, *lines: str) -> None:
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n")


# --- Speaking -----------------------------------------------------------------


def test_voxceleb2_has_people_and_their_splits(tmp_path):
  touch(
    tmp_path,
    "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
    "test/mp4/id00017/01dfn2spqyE/00001.mp4",
    "dev/other.mp4",
  )
  found = read(tmp_path, "voxceleb2")
  assert rows(found) == {
    "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4": ("id00012", "train", {}),
    "test/mp4/id00017/01dfn2spqyE/00001.mp4": ("id00017", "test", {}),
  }
  assert found.has_sound
  assert not found.has_main_face
  assert found.notes == [
    f"1 other video of {tmp_path.name} left out: not of VoxCeleb2 by name."
  ]


def test_lrs3_has_the_official_splits(tmp_path):
  touch(
    tmp_path,
    "trainval/0Fi83BHQsMA/00002.mp4",
    "pretrain/0Fi83BHQsMA/00001.mp4",
    "test/0akiEFwtkyA/00001.mp4",
  )
  found = read(tmp_path, "lrs3")
  assert {s.split for s in found.sources} == {"train", "pretrain", "test"}
  assert not any(s.subject_id for s in found.sources)
  assert found.has_sound


def test_hdtf_clips_are_of_people_but_radio_hosts_of_videos(tmp_path):
  names = {
    "RD_Radio11_000.mp4": "Radio11",
    "RD_Radio11_001.mp4": "Radio11",
    "WDA_NancyPelosi2_000.mp4": "NancyPelosi",
    "WRA_AdamKinzinger0_000.mp4": "AdamKinzinger",
    "old/AdamSchiff_0.mp4": "AdamSchiff",
  }
  touch(tmp_path, *names, "_videos_raw/RD_Radio11.mp4")
  found = read(tmp_path, "hdtf")
  assert {s.video_id: s.subject_id for s in found.sources} == names
  assert "1 other video" in found.notes[0]


def test_hdtf_raw_is_cut_by_the_official_times(tmp_path):
  times = "HDTF_dataset/{}_annotion_time.txt"
  write(tmp_path, times.format("RD"), "Radio11.mp4 00:30-01:00 1:01:30-1:02:30")
  write(tmp_path, times.format("WDA"), "NancyPelosi2.mp4 00:05-04:40 ", "")
  write(tmp_path, times.format("WRA"), "AdamKinzinger0.mp4 00:05-02:55")
  touch(tmp_path, "_videos_raw/RD_Radio11.mp4", "NancyPelosi2.mp4", "x.mp4")
  found = read(tmp_path, "hdtf_raw")
  assert {s.video_id: s.subject_id for s in found.sources} == {
    "NancyPelosi2.mp4#t=5,280": "NancyPelosi",
    "_videos_raw/RD_Radio11.mp4#t=30,60": "Radio11",
    "_videos_raw/RD_Radio11.mp4#t=3690,3750": "Radio11",
  }
  assert found.notes == ["1 of 4 listed clips are missing."]
  write(tmp_path, times.format("RD"), "Radio11.mp4 30-60")
  assert "Radio11.mp4 30-60: '30' is not a time" in error(tmp_path, "hdtf_raw")


# --- Expressions --------------------------------------------------------------


def test_mead_has_emotion_level_and_view_in_its_folders(tmp_path):
  touch(
    tmp_path,
    "M003/video/front/angry/level_1/001.mp4",
    "W009/video/left_60/surprised/level_3/030.mp4",
  )
  found = rows(read(tmp_path, "mead"))
  subject, _, labels = found["M003/video/front/angry/level_1/001.mp4"]
  assert subject == "M003"
  assert labels == {"emotion": "angry", "level": "low", "view": "front"}
  subject, _, labels = found["W009/video/left_60/surprised/level_3/030.mp4"]
  assert subject == "W009"
  assert labels == {"emotion": "surprised", "level": "high", "view": "left_60"}


def test_ravdess_has_labels_in_its_names_and_each_picture_once(tmp_path):
  touch(
    tmp_path,
    "Video_Speech_Actor_12/Actor_12/01-01-06-02-02-01-12.mp4",
    "Video_Speech_Actor_12/Actor_12/02-01-06-02-02-01-12.mp4",
    "Actor_01/01-02-01-01-01-01-01.mp4",
  )
  found = read(tmp_path, "ravdess")
  first, second = rows(found).values()
  assert first[::2] == (
    "01",
    {"emotion": "neutral", "intensity": "normal", "channel": "song"},
  )
  assert second[::2] == (
    "12",
    {"emotion": "fearful", "intensity": "strong", "channel": "speech"},
  )
  assert "1 other video" in found.notes[0]


def test_cremad_has_labels_in_its_names(tmp_path):
  touch(
    tmp_path,
    "VideoFlash/1001_DFA_ANG_XX.flv",
    "VideoFlash/1091_IEO_SAD_HI.flv",
    "AudioWAV/1001_DFA_ANG_XX.wav",
  )
  found = rows(read(tmp_path, "cremad"))
  assert [row[::2] for row in found.values()] == [
    ("1001", {"emotion": "anger"}),
    ("1091", {"emotion": "sad", "level": "high"}),
  ]
  touch(tmp_path, "converted/1001_DFA_ANG_XX.mp4")
  message = error(tmp_path, "cremad")
  assert "1001_DFA_ANG_XX is in VideoFlash and in converted" in message
  assert len(read(tmp_path / "converted", "cremad").sources) == 1


@pytest.fixture
def dfew(tmp_path) -> Path:
  """Clips 1 to 5 in their folds; 6 has no single label."""
  for k in range(1, 6):
    for part, clips in (("test", [k]), ("train", {1, 2, 3, 4, 5} - {k})):
      write(
        tmp_path,
        f"EmoLabel_DataSplit/{part}(single-labeled)/set_{k}.csv",
        "video_name,label",
        *(f"{clip},{clip}" for clip in clips),
      )
  touch(tmp_path, *(f"Clip/clip_224x224_avi/0000{i}.avi" for i in (1, 3, 6)))
  return tmp_path


def test_dfew_has_five_folds_as_splits(dfew):
  found = read(dfew, "dfew")
  assert rows(found) == {
    "Clip/clip_224x224_avi/00001.avi": ("", "fold1", {"emotion": "happy"}),
    "Clip/clip_224x224_avi/00003.avi": ("", "fold3", {"emotion": "neutral"}),
  }
  assert found.notes == [
    f"1 other video of {dfew.name} left out: not of DFEW by name or not in its "
    "lists.",
    "3 of 5 listed videos are missing.",
  ]
  touch(dfew, "Clip/original/1.mp4")
  assert "1 is in Clip/clip_224x224_avi and in Clip/original" in error(
    dfew, "dfew"
  )
  assert splits_of(dfew / "Clip/original", "dfew") == {"1.mp4": "fold1"}


def splits_of(root, layout):
  return {s.video_id: s.split for s in read(root, layout).sources}


def test_dfew_with_bad_lists_is_refused(dfew):
  path = dfew / "EmoLabel_DataSplit/test(single-labeled)/set_2.csv"
  path.write_text("video_name,label\n1,1\n")
  assert "1 is in fold2 and in fold1" in error(dfew, "dfew")
  for label in (9, 0, -1):
    path.write_text(f"video_name,label\n2,{label}\n")
    assert "expected video_name and label, 1 to 7" in error(dfew, "dfew")
  path.unlink()
  assert "set_2.csv is missing" in error(dfew, "dfew")


def test_mafw_has_five_folds_as_splits(tmp_path):
  lists = "Train & Test Set/single/no_caption/set_{}/test.txt"
  for k in range(1, 6):
    emotion = ["anger", "disappointment"][k % 2]
    write(tmp_path, lists.format(k), f"0000{k}.mp4 {emotion}")
  touch(tmp_path, *(f"data/clips/0000{k}.mp4" for k in range(1, 6)))
  found = read(tmp_path, "mafw")
  assert [(s.split, s.labels["emotion"]) for s in found.sources] == [
    ("fold1", (10,)),
    ("fold2", (0,)),
    ("fold3", (10,)),
    ("fold4", (0,)),
    ("fold5", (10,)),
  ]
  write(tmp_path, lists.format(3), "00003.mp4 joy")
  assert "00003 has the label 'joy'" in error(tmp_path, "mafw")
  write(tmp_path, lists.format(3), "00003.mp4 anger", "00003.mp4")
  assert "line 2 is '00003.mp4'" in error(tmp_path, "mafw")


def test_ferv39k_is_folders_of_pictures_with_the_official_split(tmp_path):
  lists = "4_setups/All_scenes/{}_All.csv"
  write(tmp_path, lists.format("train"), "Action/Sad/0010 Sad")
  write(
    tmp_path, lists.format("test"), "Crime/Angry/0063 Angry", "War/Fear/1 Fear"
  )
  touch(
    tmp_path,
    "2_ClipsforFaceCrop/Action/Sad/0010/01.jpg",
    "2_ClipsforFaceCrop/Crime/Angry/0063/01.jpg",
  )
  found = read(tmp_path, "ferv39k")
  assert rows(found) == {
    "2_ClipsforFaceCrop/Action/Sad/0010": ("", "train", {"emotion": "Sad"}),
    "2_ClipsforFaceCrop/Crime/Angry/0063": ("", "test", {"emotion": "Angry"}),
  }
  assert {s.frame_rate for s in found.sources} == {25}
  assert found.notes == ["1 of 3 listed videos are missing."]


# --- Forgeries ----------------------------------------------------------------


def test_celebdf_has_the_official_tests(tmp_path):
  write(
    tmp_path,
    "List_of_testing_videos.txt",
    "1 YouTube-real/00170.mp4",
    "0 Celeb-synthesis/id0_id1_0000.mp4",
    "1 Celeb-real/id9_0009.mp4",
  )
  touch(
    tmp_path,
    "Celeb-real/id0_0000.mp4",
    "YouTube-real/00170.mp4",
    "YouTube-real/00001.mp4",
    "Celeb-synthesis/id0_id1_0000.mp4",
    "Celeb-synthesis/id0_id1_0001.mp4",
  )
  found = read(tmp_path, "celebdf")
  assert rows(found) == {
    "Celeb-real/id0_0000.mp4": ("", "train", {"fake": 0}),
    "YouTube-real/00001.mp4": ("", "train", {"fake": 0}),
    "YouTube-real/00170.mp4": ("", "test", {"fake": 0}),
    "Celeb-synthesis/id0_id1_0000.mp4": ("", "test", {"fake": 1}),
    "Celeb-synthesis/id0_id1_0001.mp4": ("", "train", {"fake": 1}),
  }
  assert found.notes == ["1 of 3 listed videos are missing."]
  (tmp_path / "List_of_testing_videos.txt").unlink()
  assert "has no List_of_testing_videos.txt" in error(tmp_path, "celebdf")


def test_dfdc_keeps_a_fake_with_its_original(tmp_path):
  for part in (0, 1):
    touch(
      tmp_path,
      *(f"dfdc_train_part_{part}/{n}{part}.mp4" for n in ("real", "fake")),
    )
    write(
      tmp_path,
      f"dfdc_train_part_{part}/metadata.json",
      f'{{"real{part}.mp4": {{"label": "REAL", "split": "train"}},',
      f'"fake{part}.mp4": {{"label": "FAKE", "split": "train",',
      f'"original": "real{part}.mp4"}},',
      f'"gone{part}.mp4": {{"label": "REAL", "split": "train"}}}}',
    )
  found = read(tmp_path, "dfdc")
  subjects = {
    s.video_id: (s.subject_id, s.labels["fake"]) for s in found.sources
  }
  assert subjects == {
    "dfdc_train_part_0/fake0.mp4": ("real0.mp4", (1,)),
    "dfdc_train_part_0/real0.mp4": ("real0.mp4", (0,)),
    "dfdc_train_part_1/fake1.mp4": ("real1.mp4", (1,)),
    "dfdc_train_part_1/real1.mp4": ("real1.mp4", (0,)),
  }
  assert found.split_ratios == (0.1, 0.1)
  assert found.notes == ["2 of 6 listed videos are missing."]
  write(tmp_path, "dfdc_train_part_0/metadata.json", '{"real0.mp4": "REAL"}')
  assert "expected a label, REAL or FAKE" in error(tmp_path, "dfdc")
  write(tmp_path, "dfdc_train_part_0/metadata.json", "[]")
  assert "is not an object of videos" in error(tmp_path, "dfdc")


# --- All ----------------------------------------------------------------------


def test_links_out_of_a_tree_are_told_or_followed(tmp_path):
  touch(tmp_path, "disk/dev/mp4/id00012/a/00001.mp4", "root/x.txt")
  (tmp_path / "root/dev").symlink_to("../disk/dev")
  assert "'dev' is a link that leads out" in error(
    tmp_path / "root", "voxceleb2"
  )
  found = read_input(tmp_path / "root", layout="voxceleb2", follow_links=True)
  assert [s.split for s in found.sources] == ["train"]


def test_every_layout_is_in_the_documentation():
  text = Path("docs/DATA.md").read_text()
  assert [name for name in LAYOUTS if f"`{name}`" not in text] == []
