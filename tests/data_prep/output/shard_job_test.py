"""Jobs of shards that are repeated or interrupted while a data set grows."""

import copy
import dataclasses
import os
from pathlib import Path

import pytest

from data_prep.output import dataset_folder, ledger, shards
from data_prep.output.shard_job import ShardJob, ready_path
from data_prep.sources.manifest import read_input
from data_prep.video import video_to_records
from marlin_jax.records import folders
from marlin_jax.records.folders import OutputFolderError
from tests.support import made_dataset
from tests.support.files import content, read_lines

SETTINGS = video_to_records.Settings()


def open_folder(path: Path, task: tuple[int, int] = (0, 1), **recipe):
  videos = read_input(path.parent / "videos")
  return dataset_folder.DatasetFolder(
    path, made_dataset.RECIPE | recipe, 1, videos.sources, task
  )


def process_video(output: Path, source, num_records: int = 2) -> None:
  """Writes a part as a worker does."""
  outcome = video_to_records.Outcome(
    video_to_records.KEPT, "", 3, 1, num_records, 3
  )
  entry = ledger.Entry.of(source, SETTINGS, outcome)
  with shards.PartWriter(shards.Part(output, source.video_id)) as part:
    for i in range(num_records):
      record = made_dataset.a_record(source.video_id, segment=i)
      part.add(shards.schema.encode(record))
    part.commit(entry)


def write_all(path: Path) -> None:
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    folder.begin(plan)
    for source in plan.todo:
      process_video(path, source)
  with open_folder(path) as folder:
    for shard in folder.plan(SETTINGS, retry_quarantined=False).shards:
      folder.write_shard(shard)
    folder.write_ledgers()
    folder.finish()


@pytest.fixture
def growing(tmp_path) -> tuple[Path, ShardJob]:
  """Returns a data set of a and c, and the job that adds b."""
  path = tmp_path / "dataset"
  (tmp_path / "videos").mkdir()
  for name in "ac":
    (tmp_path / f"videos/{name}.mp4").write_text(name)
  write_all(path)
  (tmp_path / "videos/b.mp4").write_text("b")
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    assert [source.video_id for source in plan.todo] == ["b.mp4"]
    folder.begin(plan)
    process_video(path, plan.todo[0])
  with open_folder(path) as folder:
    (shard,) = folder.plan(SETTINGS, retry_quarantined=False).shards
    return path, folder.job(shard)


@pytest.fixture
def expected(tmp_path) -> bytes:
  """Returns the shard of a, b and c written in one run."""
  (tmp_path / "new/videos").mkdir(parents=True)
  for name in "abc":
    (tmp_path / f"new/videos/{name}.mp4").write_text(name)
  write_all(tmp_path / "new/dataset")
  (shard,) = (tmp_path / "new/dataset").glob("*.array_record-*")
  return shard.read_bytes()


def test_a_job_that_is_tried_again_after_it_was_done_is_done(growing, expected):
  """Beam repeats a job if the machine is lost before it reports."""
  path, job = growing
  again = copy.deepcopy(job)
  assert not job.is_done()
  job.write()
  assert again.is_done()
  assert (path / job.shard).read_bytes() == expected


def test_a_job_travels_as_json(growing):
  _, job = growing
  (source,) = read_input(job.output.parent / "videos/b.mp4").sources
  labels = {"mood": (1.0,), "ages": (0.1, 31.0)}
  job.todo = [dataclasses.replace(source, labels=labels)]
  assert (job.written, job.processed) != ({}, {})
  line = job.to_json()
  assert "\n" not in line
  assert ShardJob.from_json(line) == job


def test_a_new_job_of_the_same_shard_is_not_done(growing):
  path, job = growing
  job.write()
  with open_folder(path) as folder:
    folder.plan(SETTINGS, retry_quarantined=False)
    assert not folder.job(job.shard).is_done()


@pytest.mark.parametrize("by_job", [True, False])
def test_growth_cut_off_before_the_shard_is_in_place(growing, expected, by_job):
  path, job = growing
  old = (path / job.shard).read_bytes()
  again = copy.deepcopy(job)
  job.write()
  os.replace(path / job.shard, ready_path(path, job.shard))
  (path / job.shard).write_bytes(old)
  if by_job:
    assert again.is_done()
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    assert (plan.todo, plan.shards) == ([], [])
  assert (path / job.shard).read_bytes() == expected


def test_growth_cut_off_before_the_ledger_lines_are_there(growing, expected):
  path, job = growing
  ready_path(path, job.shard).write_bytes(b"of a run that was killed")
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    assert (plan.todo, plan.shards) == ([], [job.shard])
    folder.write_shard(job.shard)
  assert (path / job.shard).read_bytes() == expected


def process_badly(path: Path, status: str) -> None:
  """Runs over all that is left to do, and gets that outcome each time."""
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    folder.begin(plan)
    for source in plan.todo:
      outcome = video_to_records.Outcome(status, "a reason")
      if shard := folder.add(ledger.Entry.of(source, SETTINGS, outcome)):
        lines = read_lines(path / "quarantine.jsonl")
        folder.write_shard(shard)
    folder.write_ledgers()
    folder.finish()
  # The quarantine grows during the run.
  assert [line["video_id"] for line in lines] == (
    [] if status == video_to_records.FAILED else ["b.mp4"]
  )


def test_failed_videos_are_tried_by_every_run_until_there_is_a_result(tmp_path):
  path = tmp_path / "dataset"
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos/a.mp4").write_text("a")
  write_all(path)
  (tmp_path / "videos/b.mp4").write_text("b")
  (shard,) = path.glob("*.array_record-*")
  before = shard.stat().st_mtime_ns, content(path)
  for status in (*2 * [video_to_records.FAILED], video_to_records.QUARANTINED):
    process_badly(path, status)
    # A shard whose records stay the same is not written again.
    assert shard.stat().st_mtime_ns == before[0]
    found = content(path)
    assert found[shard.name] == before[1][shard.name]
    assert found["hashes.json"] == before[1]["hashes.json"]
    assert [line["status"] for line in read_lines(path / "videos.jsonl")] == [
      *("kept", status)
    ]
  with open_folder(path) as folder:
    plan = folder.plan(SETTINGS, retry_quarantined=False)
    assert (plan.todo, plan.shards) == ([], [])


def test_quarantine_goes_on_after_half_a_line(tmp_path):
  path = tmp_path / "quarantine.jsonl"
  path.write_text('{"a": 1}\n{"b"')
  ledger.append_lines(path, [])
  ledger.append_lines(path, [{"c": 3}])
  ledger.append_lines(path, [{"d": 4}])
  assert path.read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n{"d": 4}\n'


def test_tasks_that_begin_at_once_must_agree(tmp_path):
  path = tmp_path / "dataset"
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos/a.mp4").write_text("a")
  with (
    open_folder(path, (0, 2)) as first,
    open_folder(path, (1, 2), name="others") as second,
  ):
    first.begin(first.plan(SETTINGS, retry_quarantined=False))
    with pytest.raises(OutputFolderError, match="just begun"):
      second.begin(second.plan(SETTINGS, retry_quarantined=False))
  with pytest.raises(OutputFolderError, match="was 'faces' and is now 'others"):
    open_folder(path, (1, 2), name="others")


def test_a_picture_that_is_a_link_does_not_count(tmp_path):
  """The decoder skips links: one may lead to an endless file."""
  folder = tmp_path / "frames"
  folder.mkdir()
  (folder / "1.jpg").write_text("1")
  before = folders.sha256_of(folder)
  (folder / "2.jpg").symlink_to(tmp_path / "elsewhere.jpg")
  (tmp_path / "elsewhere.jpg").write_text("2")
  assert folders.sha256_of(folder) == before
