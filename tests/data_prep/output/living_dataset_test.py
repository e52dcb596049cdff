"""Data sets that forget videos, outlive their input, and get other labels."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep import verify
from data_prep.output import dataset_folder, folder_settings, ledger, shards
from data_prep.sources.manifest import read_input
from data_prep.video import video_to_records
from marlin_jax.downstream import splits
from marlin_jax.records import schema
from marlin_jax.records.folders import OutputFolderError
from tests.support import made_dataset
from tests.support.files import content, read_lines
from tests.support.made_dataset import a_record
from tests.support.processes import run_prepare

SETTINGS = video_to_records.Settings()
RECIPE = made_dataset.RECIPE | {
  "record_labels": {},
  "versions": {"av": "18.1.0"},
}
# Ann is in two videos; two videos have no record.
PEOPLE = {"a/1.mp4": "Ann", "a/2.mp4": "Ann", "b/3.mp4": "Bob", "4.mp4": ""}
BAD = {"bad.mp4": "Ann", "5.mp4": ""}


@pytest.fixture
def table(tmp_path) -> Path:
  """Returns the table of an input; `prepare` makes records of it."""
  for name in PEOPLE | BAD:
    file = tmp_path / "videos" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(name)
  return write_table(tmp_path, dict.fromkeys(PEOPLE | BAD, "calm"))


def write_table(folder: Path, moods: dict[str, str]) -> Path:
  path = folder / "videos/list.csv"
  rows = [f"{n},{(PEOPLE | BAD)[n]},{mood}" for n, mood in moods.items()]
  path.write_text("\n".join(["path,subject_id,label_mood", *rows]))
  return path


def prepare(table: Path, output: Path, recipe=RECIPE, **options):
  """Runs as data_prep.prepare does, with drawn records; returns the plan."""
  videos = read_input(table)
  recipe = recipe | {
    "labels": {
      name: {"kind": label.kind, "names": list(label.names)}
      for name, label in videos.labels.items()
    }
  }
  with dataset_folder.DatasetFolder(
    output, recipe, 3, videos.sources, **options
  ) as folder:
    settings = dataclasses.replace(SETTINGS, record_labels=folder.record_labels)
    plan = folder.plan(settings, retry_quarantined=False)
    if folder.is_finished and plan.is_empty:
      return plan
    folder.begin(plan)
    for shard in filter(folder.is_complete, plan.shards):
      folder.write_shard(shard)
    for source in plan.todo:
      outcome = video_to_records.Outcome(video_to_records.NO_FACE, "no face")
      record = a_record(source.video_id, subject_id=source.subject_id)
      if source.video_id in PEOPLE:
        row = made_dataset.quality_index.row_of(record)
        outcome = video_to_records.Outcome("kept", "", 3, 1, 1, 3, [row])
      entry = ledger.Entry.of(source, settings, outcome)
      with shards.PartWriter(shards.Part(output, source.video_id)) as part:
        if entry.num_records:
          part.add(schema.encode(record))
        part.commit(entry)
      if shard := folder.add(entry):
        folder.write_shard(shard)
    folder.write_ledgers()
    folder.finish()
  return plan


def records(path: Path) -> dict[str, bytes]:
  """Returns the bytes of each record by video."""
  found = {}
  for shard in path.glob("*.array_record-*"):
    for data in shards.read_records(shard, 0, shards.num_records(shard)):
      found[schema.decode(data).video_id] = data
  return found


def times(path: Path) -> dict[str, int]:
  return {f.name: f.stat().st_mtime_ns for f in path.glob("*.array_record-*")}


def problems(path: Path) -> list[dict]:
  return verify.verify(path, num_workers=1)["problems"]


# --- Videos leave -------------------------------------------------------------


def test_missing_videos_leave_only_when_told_to(table, tmp_path):
  path = tmp_path / "dataset"
  prepare(table, path)
  before, shards_before = records(path), times(path)
  (tmp_path / "videos/b/3.mp4").unlink()
  rest = [name for name in PEOPLE | BAD if name != "b/3.mp4"]
  write_table(tmp_path, dict.fromkeys(rest, "calm"))
  with pytest.raises(OutputFolderError, match="--drop_missing"):
    prepare(table, path)
  plan = prepare(table, path, drop_missing=True)
  assert (plan.todo, plan.num_dropped, len(plan.shards)) == ([], 1, 1)
  found = records(path)
  assert found == {k: v for k, v in before.items() if k != "b/3.mp4"}
  changed = {n for n, t in times(path).items() if t != shards_before[n]}
  assert changed == {*plan.shards}
  assert prepare(table, path).is_empty
  assert problems(path) == []


def test_a_video_that_changes_its_split_does_not_leave(table, tmp_path):
  path = tmp_path / "dataset"
  text = table.read_text().replace("\n", ",train\n") + ",train"
  text = text.replace("label_mood,train", "label_mood,split")
  table.write_text(text)
  prepare(table, path)
  before = records(path)
  table.write_text(text.replace("4.mp4,,calm,train", "4.mp4,,calm,test"))
  plan = prepare(table, path)
  assert ([s.video_id for s in plan.todo], plan.num_dropped) == (["4.mp4"], 0)
  assert records(path) == before
  assert prepare(table, path).is_empty
  assert problems(path) == []


@pytest.mark.parametrize(
  ("name", "gone"),
  [
    ("Ann", {"a/1.mp4", "a/2.mp4", "bad.mp4"}),
    ("b/3.mp4", {"b/3.mp4"}),
    ("/mnt/videos/a/2.mp4", {"a/2.mp4"}),
    ("5.mp4", {"5.mp4"}),
    ("nobody", set()),
  ],
)
def test_forgotten_videos_are_nowhere_and_the_rest_stays(
  table, tmp_path, name, gone
):
  path = tmp_path / "dataset"
  prepare(table, path)
  before, shards_before = records(path), times(path)
  names = tmp_path / "names.txt"
  names.write_text(f"{name}\n\n")
  shutil.rmtree(tmp_path / "videos/a")  # the input is not needed
  result = run_prepare("--output", path, "--forget", names)
  assert result.returncode == 0, result.stderr
  assert f"{len(gone)} video" in result.stdout
  told = f"1 line of {names} found in no video or person"
  assert (told in result.stdout) == (not gone)
  kept = {k: v for k, v in before.items() if k not in gone}
  assert records(path) == kept
  touched = {n for n, t in times(path).items() if t != shards_before[n]}
  assert len(touched) <= len(gone & before.keys())
  lines = read_lines(path / "videos.jsonl")
  assert {line["video_id"] for line in lines} == {*PEOPLE, *BAD} - gone
  for file, data in content(path).items():
    for video_id in gone:
      assert video_id.encode() not in data, file
    if name == "Ann":
      assert b"Ann" not in data, file
  assert problems(path) == []


def test_forgotten_videos_are_not_prepared_again(table, tmp_path):
  path = tmp_path / "dataset"
  prepare(table, path)
  plan = prepare(table, path, forget=["Ann"])
  assert plan.num_dropped == 3
  assert prepare(table, path).is_empty
  assert {*records(path)} == {"b/3.mp4", "4.mp4"}
  # A folder of its own without these videos has the same records.
  write_table(tmp_path, dict.fromkeys(("b/3.mp4", "4.mp4", "5.mp4"), "calm"))
  prepare(table, tmp_path / "other")
  found, expected = content(path), content(tmp_path / "other")
  assert found.pop("forgotten.json")
  assert found == expected


@pytest.mark.parametrize("num_writes", range(9))
def test_forgetting_that_is_interrupted_is_completed(
  table, tmp_path, monkeypatch, num_writes
):
  path = tmp_path / "dataset"
  prepare(table, path)
  shutil.copytree(path, tmp_path / "copy")
  names = tmp_path / "names.txt"
  names.write_text("Ann\n4.mp4\n")
  run_prepare("--output", tmp_path / "copy", "--forget", names)
  left = [num_writes]

  def replace(source, target):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    return rename(source, target)

  rename = os.replace
  monkeypatch.setattr(os, "replace", replace)
  assert run_prepare("--output", path, "--forget", names).returncode == 130
  monkeypatch.undo()
  result = run_prepare("--output", path, "--forget", names)
  assert result.returncode == 0, result.stderr
  assert content(path) == content(tmp_path / "copy")


def test_parts_of_forgotten_videos_go(table, tmp_path):
  path = tmp_path / "dataset"
  prepare(table, path)
  parts = []
  for name, subject in (("new.mp4", "Ann"), ("other.mp4", "Eve")):
    source = dataclasses.replace(
      read_input(table).sources[0], video_id=name, subject_id=subject
    )
    part = shards.Part(path, name)
    parts.append(part)
    part.line.parent.mkdir(exist_ok=True)
    outcome = video_to_records.Outcome("kept", "", 3, 1, 1, 3, [[0.5] * 5])
    with shards.PartWriter(part) as writer:
      writer.add(schema.encode(a_record(name)))
      writer.commit(ledger.Entry.of(source, SETTINGS, outcome))
  (path / "dataset_info.json").unlink()
  names = tmp_path / "names.txt"
  names.write_text("Ann")
  result = run_prepare("--output", path, "--forget", names)
  assert result.returncode == 0, result.stderr
  assert not parts[0].line.exists()
  assert not parts[0].records.exists()
  assert parts[1].entry() is not None
  # It was unfinished before.
  assert not (path / "dataset_info.json").exists()


def test_an_unfinished_data_set_forgets_all_traces(table, tmp_path):
  """Also a video that only parts and notes know, given by its path."""
  path = tmp_path / "dataset"
  prepare(table, path)
  (path / "dataset_info.json").unlink()
  source = dataclasses.replace(
    read_input(table).sources[0], video_id="new/7.mp4"
  )
  outcome = video_to_records.Outcome(video_to_records.NO_FACE, "no face")
  entry = ledger.Entry.of(source, SETTINGS, outcome)
  part, orphan = shards.Part(path, "new/7.mp4"), shards.Part(path, "new/8.mp4")
  part.line.parent.mkdir(exist_ok=True)
  with shards.PartWriter(part) as writer:
    writer.commit(entry)
  orphan.records.write_bytes(b"new/8.mp4")
  (path / "parts/jobs-1.jsonl").write_text("new/7.mp4\n")
  with open(path / "quarantine.jsonl", "a") as file:
    file.write(json.dumps({"video_id": "new/7.mp4"}) + "\n")
  names = tmp_path / "names.txt"
  names.write_text("/mnt/new/7.mp4\n/mnt/new/8.mp4\n")
  result = run_prepare("--output", path, "--forget", names)
  assert result.returncode == 0, result.stderr
  assert "'/mnt/new/8.mp4'" in result.stdout
  assert "'/mnt/new/7.mp4'" not in result.stdout
  for file, data in content(path).items():
    assert b"new/" not in data, file
  # Once more: what was forgotten before is no unknown name.
  result = run_prepare("--output", path, "--forget", names)
  assert "note: " not in result.stdout


def test_forgetting_needs_a_data_set_and_whole_shards(table, tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("Ann")
  result = run_prepare("--output", tmp_path / "none", "--forget", names)
  assert result.returncode == 1
  assert "is not a data set" in result.stderr
  path = tmp_path / "dataset"
  prepare(table, path)
  for shard in path.glob("*.array_record-*"):
    shard.unlink()
  result = run_prepare("--output", path, "--forget", names)
  assert result.returncode == 1
  assert "run again with --input" in result.stderr
  assert run_prepare("--output", path).returncode == 2


# --- Labels -------------------------------------------------------------------


def moods(path: Path) -> dict[str, float]:
  split = splits.open_split(str(path), "train", None)
  return dict(
    zip(split.video_ids, split.labels["mood"][:, 0].tolist(), strict=True)
  )


def test_a_corrected_or_new_label_touches_no_pixels(table, tmp_path):
  path = tmp_path / "dataset"
  calm = dict.fromkeys(PEOPLE | BAD, "calm")
  write_table(tmp_path, calm | {"4.mp4": "sad"})
  prepare(table, path)
  before = times(path)
  assert moods(path) == {"4.mp4": 1, "a/1.mp4": 0, "a/2.mp4": 0, "b/3.mp4": 0}
  # A correction, an unknown one, and a new word, which counts first.
  new = calm | {"4.mp4": "angry", "a/1.mp4": "sad", "a/2.mp4": ""}
  write_table(tmp_path, new)
  plan = prepare(table, path)
  assert (plan.todo, plan.shards) == ([], [])
  assert times(path) == before
  found = moods(path)
  assert str(found.pop("a/2.mp4")) == "nan"
  assert found == {"4.mp4": 0, "a/1.mp4": 2, "b/3.mp4": 1}
  metadata = json.loads((path / "metadata.json").read_text())
  assert metadata["labels"]["mood"]["names"] == ["angry", "calm", "sad"]
  assert prepare(table, path).is_empty
  assert problems(path) == []
  prepare(table, tmp_path / "other")
  assert content(path) == content(tmp_path / "other")


@pytest.mark.parametrize("lost", ["labels", "people"])
def test_labels_and_people_leave_only_when_told_to(table, tmp_path, lost):
  """The folder of a table's videos has none of both."""
  path = tmp_path / "dataset"
  if lost == "labels":
    table.write_text("path,label_mood\n4.mp4,sad\na/1.mp4,calm\n")
  else:
    table.write_text("path,subject_id\n4.mp4,Ann\na/1.mp4,Bob\n")
  prepare(table, path)
  before = content(path)
  table.write_text("path\n4.mp4\na/1.mp4\n")
  named = {"labels": "labels of .*: mood", "people": "names no people"}[lost]
  with pytest.raises(OutputFolderError, match=f"{named}.*drop_missing"):
    prepare(table, path)
  assert content(path) == before
  plan = prepare(table, path, drop_missing=True)
  assert len(plan.todo) == (0 if lost == "labels" else 2)
  prepare(table, tmp_path / "other")
  assert content(path) == content(tmp_path / "other")


def test_records_of_earlier_versions_keep_their_labels(table, tmp_path):
  """They are readable without the ledger, and with it the ledger holds."""
  labels = made_dataset.some_labels(1, 0, -0.7)
  videos = {"a.mp4": [a_record("a.mp4", labels=labels)]}
  path = made_dataset.make(tmp_path / "old", videos, labels=made_dataset.LABELS)
  settings = json.loads((path / "settings.json").read_text())
  assert settings.pop("record_labels") == {
    "attributes": 2,
    "emotion": 1,
    "sentiment": 1,
  }
  (path / "settings.json").write_text(json.dumps(settings))
  assert problems(path) == []
  split = splits.open_split(str(path), "train", tmp_path / "cache")
  assert split.labels["emotion"].tolist() == [[0]]
  line = read_lines(path / "videos.jsonl")[0]
  line["labels"]["emotion"] = [1]
  (path / "videos.jsonl").write_text(json.dumps(line) + "\n")
  # Also where the records have been read before.
  split = splits.open_split(str(path), "train", tmp_path / "cache")
  assert split.labels["emotion"].tolist() == [[1]]
  (path / "videos.jsonl").unlink()
  split = splits.open_split(str(path), "train", None)
  assert split.labels["emotion"].tolist() == [[0]]


# --- Versions -----------------------------------------------------------------


def test_versions_of_packages_are_kept_and_mixed_ones_told(table, tmp_path):
  path = tmp_path / "dataset"
  write_table(tmp_path, {"a/1.mp4": "calm"})
  prepare(table, path)
  newer = RECIPE | {"versions": {"av": "19.0.0"}}

  def versions():
    return json.loads((path / "settings.json").read_text())["versions"]

  # Nothing to decode: nothing is mixed.
  assert prepare(table, path, newer).is_empty
  assert versions() == {"av": ["18.1.0"]}
  write_table(tmp_path, {"a/1.mp4": "calm", "4.mp4": "calm"})
  prepare(table, path, newer)
  assert versions() == {"av": ["18.1.0", "19.0.0"]}
  (note,) = folder_settings.version_notes(versions())
  assert "18.1.0, 19.0.0" in note
  settings = json.loads((path / "settings.json").read_text())
  settings.pop("versions")
  (path / "settings.json").write_text(json.dumps(settings))
  write_table(tmp_path, dict.fromkeys(("a/1.mp4", "4.mp4", "5.mp4"), "calm"))
  prepare(table, path, newer)
  assert versions() == {"av": ["19.0.0", "unknown"]}
