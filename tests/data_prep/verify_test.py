"""data_prep.verify names any damage of a data set."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import verify
from data_prep.inspection import record_checks
from data_prep.output import ledger, shards
from marlin_jax.records import folders, quality_index, schema, segment_index
from tests.support import made_dataset
from tests.support.files import read_lines
from tests.support.made_dataset import a_record
from tests.support.processes import run_here, run_prepare

LABELS = made_dataset.some_labels(1, 0, -0.7)
VIDEOS = {
  "a.mp4": [
    a_record("a.mp4", 0, 0, 33, subject_id="Ann", labels=LABELS),
    a_record("a.mp4", 0, 1, 32, subject_id="Ann", labels=LABELS),
    a_record("a.mp4", 1, 0, subject_id="Ann", labels=LABELS),
  ],
  "b.mp4": [a_record("b.mp4", subject_id="Bob", labels=LABELS)],
  "c.mp4": [a_record("c.mp4", subject_id="Cy", labels=LABELS)],
  "d.mp4": [a_record("d.mp4", labels=LABELS)],
}
REFUSED = {"e.mp4": "cannot open", "f.mp4": "no face found"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("whole") / "dataset"
  return made_dataset.make(
    path, VIDEOS, {"c.mp4": "val"}, REFUSED, 2, made_dataset.LABELS
  )


@pytest.fixture
def dataset(whole, tmp_path) -> Path:
  """Returns a copy of the data set that a test may damage."""
  return Path(shutil.copytree(whole, tmp_path / "dataset"))


def shard_of(dataset: Path, video_id: str) -> Path:
  for path in sorted(dataset.glob("*.array_record-*")):
    for _, data in shards.read_each(path, shards.num_records(path)):
      if schema.decode(data).video_id == video_id:
        return path
  raise AssertionError(f"{video_id} is in no shard")


def rewrite(path: Path, change) -> None:
  """Changes the records of a shard, and its hash in hashes.json."""
  found = [
    schema.decode(data)
    for _, data in shards.read_each(path, shards.num_records(path))
  ]
  writer = ArrayRecordWriter(str(path), shards.WRITER_OPTIONS)
  for record in change(found):
    writer.write(schema.encode(record))
  writer.close()
  hashes = json.loads((path.parent / "hashes.json").read_text())
  hashes[path.name] = folders.sha256_of(path)
  (path.parent / "hashes.json").write_text(json.dumps(hashes))


def edit_ledger(dataset: Path, video: str, **changes) -> None:
  path = dataset / "videos.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    if line["video_id"] == video:
      line.update(changes)
  ledger.write_lines(path, (json.dumps(line) + "\n" for line in lines))


def problems(dataset: Path) -> list[tuple[str, str, str]]:
  report = verify.verify(dataset, num_workers=2)
  assert report["is_whole"] == (not report["problems"])
  return [(p["kind"], p["where"], p["what"]) for p in report["problems"]]


def kinds(dataset: Path) -> set[str]:
  return {kind for kind, _, _ in problems(dataset)}


# --- Whole --------------------------------------------------------------------


def test_whole_data_set_has_no_problem(whole):
  report = verify.verify(whole, num_workers=2)
  assert report["problems"] == []
  assert report["is_whole"]
  numbers = [
    report[f"num_{noun}s"] for noun in ("shard", "record", "frame", "video")
  ]
  assert numbers == [3, 6, 77, 4]


def test_sample_data_set_is_whole(sample_dataset):
  assert problems(sample_dataset) == []


def test_report_does_not_replace_a_file_of_the_data_set(dataset, capsys):
  with pytest.raises(SystemExit):
    verify.main([str(dataset), "--json", str(dataset / "settings.json")])
  assert "is in the data set" in capsys.readouterr().err


def test_binary_tells_by_its_exit_code_and_writes_a_report(dataset, tmp_path):
  def run(path):
    report = tmp_path / "new" / "report.json"
    return run_here(lambda: verify.main([str(path), "--json", str(report)]))

  result = run(dataset)
  assert result.returncode == 0, result.stderr
  assert f"{dataset} is whole." in result.stdout
  assert "100%" in result.stderr
  assert json.loads((tmp_path / "new/report.json").read_text())["is_whole"]

  (dataset / "extra.txt").touch()
  result = run(dataset)
  assert result.returncode == 1
  assert "unexpected: extra.txt" in result.stdout
  report = json.loads((tmp_path / "new/report.json").read_text())
  assert report["num_problems"] == {"unexpected": 1}

  for nothing in (tmp_path / "none", tmp_path):
    result = run(nothing)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


# --- Damaged files ------------------------------------------------------------


def test_flipped_bit_is_found_in_its_shard_and_its_record(
  sample_dataset, tmp_path
):
  dataset = Path(shutil.copytree(sample_dataset, tmp_path / "dataset"))
  (path,) = dataset.glob("*.array_record-*")
  data = bytearray(path.read_bytes())
  data[len(data) // 4] ^= 1  # in the first of two
  path.write_bytes(data)
  found = problems(dataset)
  assert [p[:2] for p in found[:2]] == [
    ("damaged", path.name),
    ("damaged", f"{path.name} record 0"),
  ]
  assert f"SHA-256 {folders.sha256_of(path)}, hashes.json says" in found[0][2]
  # Later records are read all the same.
  assert any(
    "num_records 1, videos.jsonl says 2" in what for _, _, what in found
  )


def test_damaged_shard_that_is_removed_is_made_again_with_the_same_bytes(
  sample_dataset, tmp_path
):
  dataset = Path(shutil.copytree(sample_dataset, tmp_path / "dataset"))
  (path,) = dataset.glob("*.array_record-*")
  whole = path.read_bytes()
  path.write_bytes(whole[:1000] + b"x" + whole[1001:])
  assert "damaged" in kinds(dataset)
  path.unlink()
  result = run_prepare("--input", "sample", "--output", dataset)
  assert result.returncode == 0, result.stderr
  assert problems(dataset) == []
  assert path.read_bytes() == whole


@pytest.mark.parametrize("num_bytes", [1, 70_000])
def test_cut_shard_is_damaged(dataset, num_bytes):
  path = shard_of(dataset, "a.mp4")
  path.write_bytes(path.read_bytes()[:-num_bytes])
  found = problems(dataset)
  assert found[0][0] == "damaged"
  assert any("whole ArrayRecord file" in what for _, _, what in found)
  assert any("'a.mp4'" in where for _, where, _ in found)


def test_missing_shard_is_named(dataset):
  path = shard_of(dataset, "c.mp4")
  path.unlink()
  assert problems(dataset)[0] == ("missing", path.name, "no such file")


@pytest.mark.parametrize(
  "name",
  [
    *("videos.jsonl", "quarantine.jsonl", "hashes.json", "features.json"),
    *("faces-train.quality.npy", "faces-val.quality.npy"),
    *("faces-train.segments.npy", "faces-val.segments.npy"),
  ],
)
def test_missing_small_file_is_named(dataset, name):
  (dataset / name).unlink()
  assert ("missing", name, "no such file") in problems(dataset)


@pytest.mark.parametrize(
  "name", ["hashes.json", "metadata.json", "dataset_info.json", "features.json"]
)
def test_small_file_cut_in_half_is_told_of(dataset, name):
  data = (dataset / name).read_bytes()
  (dataset / name).write_bytes(data[: len(data) // 2])
  assert kinds(dataset) & {"damaged", "tfds"}


def test_file_that_does_not_belong_there_is_named(dataset):
  shutil.copy(
    shard_of(dataset, "c.mp4"),
    dataset / "faces-val.array_record-00001-of-00002",
  )
  (dataset / "videos.jsonl.partial").touch()
  assert [(kind, where) for kind, where, _ in problems(dataset)] == [
    ("unexpected", "faces-val.array_record-00001-of-00002"),
    ("unexpected", "videos.jsonl.partial"),
  ]


def test_unfinished_run_comes_first(dataset):
  (dataset / "dataset_info.json").unlink()
  (dataset / "parts").mkdir()
  (dataset / "stray").touch()
  assert [(kind, where) for kind, where, _ in problems(dataset)] == [
    ("unfinished", "dataset_info.json"),
    ("unfinished", "parts"),
    ("unexpected", "stray"),
  ]


def test_other_schema_version_is_told_of(dataset):
  for name in ("metadata.json", "settings.json"):
    content = json.loads((dataset / name).read_text())
    content["schema_version"] += 1
    (dataset / name).write_text(json.dumps(content))
    newer = schema.SCHEMA_VERSION + 1
    what = f"schema_version {newer}, this program reads {newer - 1}"
    assert problems(dataset)[0] == ("schema", name, what)


def test_another_frame_size_than_announced_is_told_of(dataset):
  """In data sets of before the setting it is 224."""
  path = dataset / "metadata.json"
  content = json.loads(path.read_text())
  assert content.pop("frame_size") == 224
  path.write_text(json.dumps(content))
  assert problems(dataset) == []
  path.write_text(json.dumps(content | {"frame_size": 112}))
  what = "frame_size is 112, settings.json has 224"
  assert problems(dataset) == [("counts", "metadata.json", what)]


# --- Wrong parts of records ---------------------------------------------------


def other_labels(record, code=10):
  labels = schema.decode_parsing(record).copy()
  labels[1, 0, 0] = code
  return dataclasses.replace(record, parsing=schema.compress_parsing(labels))


def small_frame(record):
  frame = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
  return dataclasses.replace(record, frames=[*record.frames[:-1], frame])


def all_small(record):
  frame = simplejpeg.encode_jpeg(np.zeros((112, 112, 3), np.uint8))
  return dataclasses.replace(record, frames=len(record) * [frame])


def half_a_frame(record):
  first, second, third = record.frames
  half = second[: len(second) // 2]
  return dataclasses.replace(record, frames=[first, half, third])


def unparsed_frame(record):
  regions = record.regions.copy()
  regions[2] = 0
  return dataclasses.replace(record, regions=regions)


def boxes(*box):
  def change(record):
    return dataclasses.replace(
      record, boxes=np.tile(np.float32(box), (len(record), 1))
    )

  return change


def value(**changes):
  return lambda record: dataclasses.replace(record, **changes)


def label(name, *values):
  return lambda record: dataclasses.replace(
    record, labels={**record.labels, name: np.float32(values)}
  )


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    (other_labels, "region bits of 1 of 3 frames .* first in frame 1"),
    (unparsed_frame, "region bits of 1 of 3 frames .* first in frame 2"),
    (lambda r: other_labels(r, 11), "holds code 11, expected 0 to 10"),
    (small_frame, "64x64 pixels"),
    (all_small, "frames have 112 pixels, expected 224"),
    (half_a_frame, "frame 1 is not a 224x224 JPEG"),
    (value(parsing=b"no zstd"), "label maps cannot be read"),
    (boxes(0, 0, np.nan, 9), "boxes are not finite"),
    (boxes(9, 0, 0, 9), "boxes are not x0 < x1"),
    (boxes(0, 0, 9, 8), "boxes are not square"),
    (value(quality=1.5), "quality is 1.5"),
    (value(fps=float("nan")), "fps is nan"),
    (value(start_secs=float("inf")), "start_secs is inf"),
    (value(quality_terms=np.float32([0, 0, 0, 2])), "quality_terms are"),
    (value(labels={}), "values of labels {}, expected {'attributes': 2, "),
    (label("emotion", 2, 0), "'emotion': 2, .* expected .*'emotion': 1, "),
    (value(audio=b""), "sound is not expected"),
    (value(segment=1), "track 0 holds segments 1, expected 0 to 0"),
    (value(track_id=2), "tracks are numbered 2, expected 0 to 0"),
  ],
)
def test_record_with_a_wrong_part_is_named(dataset, change, problem):
  path = shard_of(dataset, "c.mp4")
  rewrite(path, lambda found: [change(record) for record in found])
  # TFDS, which reads the first record, may report a problem too.
  found, *others = problems(dataset)
  assert {kind for kind, _, _ in others} <= {"tfds", "counts"}
  assert found[0] == "content"
  assert path.name in found[1]
  assert "c.mp4" in found[1]
  assert re.search(problem, found[2])


def test_frame_without_a_face_may_have_no_bits(dataset):
  def without_labels(record):
    labels = schema.decode_parsing(record).copy()
    labels[2] = 0
    return dataclasses.replace(
      unparsed_frame(record), parsing=schema.compress_parsing(labels)
    )

  path = shard_of(dataset, "c.mp4")
  rewrite(path, lambda found: [without_labels(r) for r in found])
  assert problems(dataset) == []


def test_missing_segment_and_uneven_ones_are_told_of(dataset):
  path = shard_of(dataset, "a.mp4")
  name = f"{path.name} 'a.mp4'"

  def without_the_second(found):
    return [r for r in found if (r.track_id, r.segment) != (0, 1)]

  rewrite(path, without_the_second)
  found = problems(dataset)
  assert ("counts", name, "num_records 2, videos.jsonl says 3") in found
  assert ("counts", name, "num_frames 36, videos.jsonl says 68") in found

  def uneven(found):
    return [
      a_record("a.mp4", 0, 0, 60, subject_id="Ann", labels=LABELS),
      a_record("a.mp4", 0, 1, 5, subject_id="Ann", labels=LABELS),
      *(r for r in found if (r.video_id, r.track_id) != ("a.mp4", 0)),
    ]

  rewrite(path, uneven)
  found = problems(dataset)
  ((_, _, what),) = [problem for problem in found if problem[0] == "content"]
  assert "cut into 60, 5 frames, expected 33, 32" in what
  assert ("counts", "faces-train.segments.npy", "differs from the records") in (
    found
  )


def test_labels_that_differ_within_a_video_are_told_of(dataset):
  path = shard_of(dataset, "a.mp4")
  other = made_dataset.some_labels(0, 0, -0.7)

  def change(found):
    return [
      dataclasses.replace(r, labels=other if r.segment else r.labels)
      for r in found
    ]

  rewrite(path, change)
  (found,) = problems(dataset)
  assert "first record" in found[2]
  # Labels may be corrected: those of the ledger hold.
  rewrite(path, lambda found: [value(labels=other)(r) for r in found])
  assert problems(dataset) == []


@pytest.mark.parametrize(
  ("labels", "problem"),
  [
    ({}, r"labels \[\], expected \['attributes', "),
    ({"attributes": [0.5, 1]}, "label attributes is 0.5, 1.0, expected 2"),
    ({"emotion": [2]}, "label emotion is 2.0, expected 1 of kind 'class'"),
    ({"sentiment": [float("inf")]}, "label sentiment is inf, expected 1 of"),
    ({"sentiment": [None, 1]}, "label sentiment is nan, 1.0, expected 1 of"),
  ],
)
def test_wrong_labels_of_the_ledger_are_told_of(dataset, labels, problem):
  before = next(
    line for line in read_lines(dataset / "videos.jsonl") if line["labels"]
  )["labels"]
  after = before | labels if labels else {}
  edit_ledger(dataset, "c.mp4", labels=after)
  (found,) = problems(dataset)
  assert found[0] == "content"
  assert re.search(problem, found[2])


def test_versions_that_are_mixed_are_noted(dataset):
  path = dataset / "settings.json"
  settings = json.loads(path.read_text())
  settings["versions"] = {"av": ["17.0.0", "18.1.0"], "mediapipe": ["1.2.3"]}
  path.write_text(json.dumps(settings))
  report = verify.verify(dataset, num_workers=1)
  assert report["is_whole"]
  (note,) = (n for n in report["notes"] if "records were made" in n)
  assert "av 17.0.0, 18.1.0" in note


def test_sound_and_its_mel_must_fit():
  expected = record_checks.Expected(64, {}, {}, has_sound=True)
  second, mel = bytes(2 * 16_000), np.zeros((80, 80), np.float32)

  def found(**changes):
    record = a_record("a.mp4", **changes)
    return list(record_checks.record_problems(record, expected))

  assert found(audio=second, mel=mel) == []
  assert found(audio=b"") == []  # a video without sound
  assert found() == ["sound is missing"]
  assert found(audio=second) == [
    "mel has 0 rows, expected 80 for 1.00 s of sound"
  ]
  assert found(audio=second + b"x", mel=mel) == [
    "32001 bytes of sound are not 16-bit PCM"
  ]
  assert found(audio=second, mel=mel * np.nan) == ["mel is not finite"]


def test_qualities_for_the_trainer_are_those_of_the_records(dataset):
  path = dataset / "faces-train.quality.npy"
  whole = path.read_bytes()
  rows = quality_index.unpack(whole)
  changed = rows.copy()
  changed["pose"][2] = 0.25
  np.save(path, changed)
  ((kind, where, what),) = problems(dataset)
  assert (kind, where) == ("counts", path.name)
  assert what.startswith("1 of 5 rows")
  assert what.endswith("row 2")
  np.save(path, rows[1:])
  assert problems(dataset) == [("counts", path.name, "4 rows, expected 5")]
  for damage in (whole[:-1], b"", b"PK\3\4", b"text"):
    path.write_bytes(damage)
    assert [p[:2] for p in problems(dataset)] == [("damaged", path.name)]
  np.save(path, np.array([{}]), allow_pickle=True)
  ((kind, _, what),) = problems(dataset)
  assert kind == "damaged"
  assert "pickle" in what


def test_qualities_are_not_compared_with_a_shard_that_cannot_be_read(dataset):
  shard = shard_of(dataset, "c.mp4")
  shard.write_bytes(shard.read_bytes()[:-1])
  assert not any("quality" in where for _, where, _ in problems(dataset))


def test_quality_that_the_ledger_does_not_have_is_told_of(dataset):
  for other in ([[0.4, 0.5, 0.8, 0.9, 1.0]], [], None):
    edit_ledger(dataset, "b.mp4", quality=other)
    ((kind, where, what),) = problems(dataset)
    assert kind == "counts"
    assert "'b.mp4'" in where
    assert "qualities" in what


def test_the_segment_index_is_that_of_the_records(dataset):
  path = dataset / "faces-train.segments.npy"
  whole = path.read_bytes()
  index = segment_index.open_index(path)
  records = [
    schema.decode(data)
    for shard in sorted(dataset.glob("faces-train.array_record-*"))
    for _, data in shards.read_each(shard, shards.num_records(shard))
  ]
  assert index.frames.tolist() == [len(record) for record in records]
  assert index.tracks.tolist() == [record.track_id for record in records]
  assert np.diff(index.first_records).tolist() == [
    len(list(group))
    for _, group in itertools.groupby(r.video_id for r in records)
  ]
  for damage in (whole[:-1], b"", whole.replace(whole[200:204], b"\1\2\3\4")):
    path.write_bytes(damage)
    assert problems(dataset) == [
      ("counts", path.name, "differs from the records")
    ]


def test_a_ledger_that_differs_from_the_segments_is_told_of(dataset):
  edit_ledger(dataset, "b.mp4", segments=[[0, 4]])
  ((kind, where, what),) = problems(dataset)
  assert (kind, what.split()[0]) == ("counts", "tracks")
  assert "'b.mp4'" in where


def test_a_data_set_of_before_names_and_sides_is_whole(dataset):
  for line in read_lines(dataset / "videos.jsonl"):
    segments = [row[:2] for row in line["segments"]]
    edit_ledger(dataset, line["video_id"], segments=segments)
  for path in dataset.glob("*.segments.npy"):
    path.write_bytes(segment_index.without_names(path.read_bytes()))
  assert problems(dataset) == []


def test_a_data_set_of_before_the_segment_index_is_whole(dataset):
  for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
    edit_ledger(dataset, name, segments=[])
  for path in dataset.glob("*.segments.npy"):
    path.unlink()
  assert problems(dataset) == []


# --- Places -------------------------------------------------------------------


def test_changed_ledger_line_is_told_of(dataset):
  edit_ledger(dataset, "b.mp4", num_frames=4)
  found = problems(dataset)
  assert {kind for kind, _, _ in found} == {"counts"}
  assert any(
    "'b.mp4'" in where and what == "num_frames 3, videos.jsonl says 4"
    for _, where, what in found
  )
  assert any(where == "metadata.json" for _, where, _ in found)


def test_video_that_the_ledger_does_not_know_is_told_of(dataset):
  edit_ledger(dataset, "b.mp4", video_id="other.mp4")
  found = [f"{where}: {what}" for _, where, what in problems(dataset)]
  assert any("'b.mp4': not in videos.jsonl" in line for line in found)
  assert any("'other.mp4': none of its 1 records" in line for line in found)


def test_person_in_two_splits_is_told_of_by_ledger_and_records(dataset):
  edit_ledger(dataset, "c.mp4", subject_id="Bob")
  found = [p for p in problems(dataset) if p[0] == "split"]
  assert any(
    what == "subject 'Bob' is in 'val', and in 'train' in 'b.mp4'"
    for _, _, what in found
  )
  assert any("subject ['Cy']" in what for _, _, what in found)


def test_video_in_the_wrong_shard_or_in_two_is_told_of(dataset):
  path, other = shard_of(dataset, "c.mp4"), shard_of(dataset, "b.mp4")
  rewrite(path, lambda found: [*VIDEOS["b.mp4"], *found])
  found = [p for p in problems(dataset) if p[0] == "split"]
  assert ("split", f"{path.name} 'b.mp4'", f"belongs to {other.name}") in found
  assert any(what.startswith("also in ") for _, _, what in found)


def test_damaged_ledger_lines_are_told_of(dataset):
  path = dataset / "videos.jsonl"
  lines = path.read_text().splitlines()
  bad = ["{}", '{"video_id"', "[" * 200_000]
  path.write_text("\n".join([*lines[1:], lines[1], *bad]) + "\n")
  found = problems(dataset)
  assert ("split", "videos.jsonl line 6", "'b.mp4' appears twice") in found
  assert {where for kind, where, _ in found if kind == "damaged"} == {
    "videos.jsonl line 7",
    "videos.jsonl line 8",
    "videos.jsonl line 9",
  }
  edit = json.loads(lines[0]) | {"num_records": "3"}
  path.write_text("\n".join([json.dumps(edit), *lines[1:]]) + "\n")
  assert ("damaged", "videos.jsonl line 1") in [
    p[:2] for p in problems(dataset)
  ]


def test_split_that_the_settings_do_not_know_is_told_of(dataset):
  edit_ledger(dataset, "b.mp4", split="test")
  found = problems(dataset)
  assert any("split 'test'" in what for _, _, what in found)


def test_quarantine_that_does_not_fit_the_ledger_is_told_of(dataset):
  (dataset / "quarantine.jsonl").write_text("")
  assert [p[:2] for p in problems(dataset)] == [("counts", "quarantine.jsonl")]


def test_records_that_tfds_would_not_find_are_told_of(dataset):
  path = dataset / "dataset_info.json"
  info = json.loads(path.read_text())
  for split in info["splits"]:
    if split["name"] == "val":
      split["shardLengths"] = ["7"]
  path.write_text(json.dumps(info))
  assert ("counts", "dataset_info.json", "val: [7] records, found [1]") in (
    problems(dataset)
  )


def test_copies_under_another_name_are_a_note_and_no_damage(dataset):
  for video_id in ("b.mp4", "c.mp4"):
    edit_ledger(dataset, video_id, sha256="0" * 64)
  report = verify.verify(dataset, num_workers=1)
  assert report["is_whole"]
  assert "1 video of equal content" in report["notes"][0]
  assert report["notes"][1] == "'c.mp4' (val) is a copy of 'b.mp4' (train)"


def test_many_problems_are_counted_and_some_are_listed():
  found = record_checks.Problems()
  for i in range(1000):
    found.add("unexpected", f"{i:04d}", "")
  other = record_checks.Problems()
  other.add("missing", "shard", "")
  found.extend(other)
  listed = found.listed()
  assert [p.kind for p in listed[:2]] == ["missing", "unexpected"]
  assert len(listed) == 1 + record_checks.MAX_LISTED
  assert found.counts == {"unexpected": 1000, "missing": 1}


def test_damaged_settings_are_the_one_thing_that_can_be_said(dataset):
  path = dataset / "settings.json"
  settings = json.loads(path.read_text())
  for damage in ({"num_shards": {"train": "two"}}, {"labels": None}):
    path.write_text(json.dumps(settings | damage))
    ((kind, where, what),) = problems(dataset)
    assert (kind, where) == ("damaged", "settings.json")
    assert "missing or damaged" in what
  for write in (lambda: path.write_text("{"), path.unlink):
    write()
    assert [p[:2] for p in problems(dataset)] == [("damaged", "settings.json")]
