"""Served records of a data set, and reasons to refuse one."""

import contextlib
import gc
import json
import os
import pickle
import resource
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.reader import BadRecords
from marlin_jax.records import quality_index
from tests.support import made_dataset
from tests.support.made_dataset import a_record


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """Five records of four videos in three shards, of different quality."""
  videos = {
    "a.mp4": [
      a_record("a.mp4", 0, quality=0.9),
      a_record("a.mp4", 1, quality=0.2),
    ],
    "b.mp4": [a_record("b.mp4", quality=0.1)],
    "c.mp4": [a_record("c.mp4", quality=0.7)],
    "d.mp4": [a_record("d.mp4", quality=0.3)],
  }
  path = tmp_path_factory.mktemp("mixed") / "dataset"
  return made_dataset.make(path, videos, num_shards=3)


def qualities(dataset):
  """Returns the quality of each served record by number."""
  source = prepared_dataset.RecordSource(dataset)
  numbers = map(dataset.record_number, range(dataset.num_records))
  return {number: source[number][1].quality for number in numbers}


def test_records_below_the_threshold_are_left_out_and_counted(mixed):
  whole = prepared_dataset.open_dataset(str(mixed), "train")
  assert (whole.num_records, whole.num_videos) == (5, 4)
  assert whole.selection is None
  everything = qualities(whole)
  for threshold, num_records, num_videos in ((0.15, 4, 3), (0.5, 2, 2)):
    found = prepared_dataset.open_dataset(str(mixed), "train", threshold)
    assert qualities(found) == {
      number: quality
      for number, quality in everything.items()
      if quality >= threshold
    }
    assert (found.num_records, found.num_videos) == (num_records, num_videos)
    left_out = found.selection
    assert left_out.num_left_out == 5 - num_records
    assert left_out.num_videos_left_out == 4 - num_videos
    assert found.stored.num_records == 5


def test_a_record_at_the_threshold_is_served(mixed):
  # 0.7 is 0.699999988 as float32.
  found = prepared_dataset.open_dataset(str(mixed), "train", 0.7)
  assert found.num_records == 2


def test_the_fingerprint_tells_which_records_are_served(mixed):
  whole, low, same, high = (
    prepared_dataset.open_dataset(str(mixed), "train", threshold).fingerprint
    for threshold in (0.0, 0.5, 0.6, 0.8)
  )
  assert low == same
  assert len({whole, low, high}) == 3


def test_a_restart_maps_the_selection_and_reads_no_quality(
  mixed, tmp_path, monkeypatch
):
  def opened(threshold, path=mixed, cache=tmp_path / "cache"):
    return prepared_dataset.open_dataset(str(path), "train", threshold, cache)

  plain, first = opened(0.5, cache=None), opened(0.5)
  monkeypatch.setattr(quality_index, "open_rows", None)
  again = opened(0.5)
  copy = pickle.loads(pickle.dumps(again))
  assert copy.selection.path == str(next((tmp_path / "cache").iterdir()))
  for found in (first, again, copy):
    assert found.fingerprint == plain.fingerprint
    assert qualities(found) == qualities(plain)
    for name in ("min_quality", "num_left_out", "num_videos_left_out"):
      assert getattr(found.selection, name) == getattr(plain.selection, name)
    assert list(found.selection.videos) == list(plain.selection.videos)
  # Another threshold, or another file of qualities, is selected anew.
  monkeypatch.undo()
  assert opened(0.8).num_records == 1
  path = Path(shutil.copytree(mixed, tmp_path / "dataset"))
  file = path / "faces-train.quality.npy"
  rows = quality_index.unpack(file.read_bytes())
  rows["quality"] = 1
  np.save(file, rows)
  os.utime(file, (0, 0))
  assert opened(0.5, path).num_records == 5
  # A file that was cut is named.
  (*_, made) = sorted((tmp_path / "cache").iterdir(), key=os.path.getmtime)
  made.write_bytes(made.read_bytes()[:-1])
  with pytest.raises(prepared_dataset.DatasetError, match=f"{made} cannot"):
    opened(0.5, path)


def test_a_threshold_above_all_names_the_best(mixed):
  with pytest.raises(prepared_dataset.DatasetError) as error:
    prepared_dataset.open_dataset(str(mixed), "train", 0.95)
  message = str(error.value)
  assert "config.data.min_quality=0.95 leaves no record" in message
  assert "the best of 5 has a quality of 0.9000" in message
  assert str(mixed) in message


def test_qualities_must_be_there_and_fit_only_where_they_are_asked_for(
  mixed, tmp_path
):
  path = shutil.copytree(mixed, tmp_path / "dataset")
  index = path / "faces-train.quality.npy"

  def message():
    with pytest.raises(prepared_dataset.DatasetError) as error:
      prepared_dataset.open_dataset(str(path), "train", 0.5)
    assert prepared_dataset.open_dataset(str(path), "train").num_records == 5
    assert str(index) in str(error.value)
    return str(error.value)

  rows = quality_index.unpack(index.read_bytes())
  np.save(index, rows[1:])
  assert "4 records, the split has 5" in message()
  index.write_bytes(index.read_bytes()[:-1])
  message()
  index.unlink()
  assert "data_prep.prepare" in message()


# --- refusals -----------------------------------------------------------------


@pytest.fixture
def damaged(sample_dataset, tmp_path):
  """Returns a copy to damage, and its first shard."""
  path = tmp_path / "dataset"
  shutil.copytree(sample_dataset, path)
  return path, next(iter(sorted(path.glob("*.array_record-*"))))


def refused(path, split="train"):
  with pytest.raises(prepared_dataset.DatasetError) as error:
    prepared_dataset.open_dataset(str(path), split)
  message = str(error.value)
  assert str(path) in message
  return message


def test_a_folder_that_is_no_data_set_names_the_command(tmp_path):
  assert "python -m data_prep.prepare" in refused(tmp_path)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("dataset_info.json", "{}"),
    ("metadata.json", "{}"),  # another data set of TFDS
    ("metadata.json", '{"schema_ver'),
    ("metadata.json", None),
    ("hashes.json", "{}"),
  ],
)
def test_descriptions_of_another_program_or_damaged_ones_are_refused(
  damaged, name, text
):
  path, _ = damaged
  (path / name).unlink()
  if text is not None:
    (path / name).write_text(text)
  message = refused(path)
  assert "was not written by data_prep.prepare" in message
  assert f"python -m data_prep.verify {path}" in message


def test_no_data_set_has_no_splits(tmp_path):
  with pytest.raises(prepared_dataset.DatasetError, match="is not a prepared"):
    prepared_dataset.has_split(str(tmp_path), "val")


def test_an_unfinished_data_set_says_so(damaged):
  path, _ = damaged
  (path / "dataset_info.json").unlink()
  (path / "parts").mkdir(exist_ok=True)
  assert "has not finished" in refused(path)


def test_a_split_that_is_not_there_names_those_that_are(damaged):
  assert "it has ['train']" in refused(damaged[0], "val")


def test_a_data_set_without_records_is_refused(damaged):
  path, _ = damaged
  info = json.loads((path / "dataset_info.json").read_text())
  info["splits"][0]["shardLengths"] = ["0"]
  (path / "dataset_info.json").write_text(json.dumps(info))
  assert "holds no records" in refused(path)


def test_a_missing_shard_is_named(damaged):
  path, shard = damaged
  shard.unlink()
  assert "-00000-of-00001" in refused(path)


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: data[:1000],
    lambda data: data[:-1],
    lambda data: data[:-70_000],
    lambda data: b"this is text\n" * 10_000,
    lambda data: data + b"x",
    lambda data: data + bytes(1 << 16),
  ],
  ids=["empty", "head", "cut", "cut by a block", "text", "longer", "zeros"],
)
def test_a_damaged_shard_is_refused_before_training(damaged, damage):
  path, shard = damaged
  shard.write_bytes(damage(shard.read_bytes()))
  assert "bytes, dataset_info.json says" in refused(path)


def test_a_shard_too_many_is_refused(damaged):
  path, shard = damaged
  shutil.copy(shard, shard.with_name(shard.name.replace("-00000-", "-00001-")))
  assert "should have 1 shards and has 2" in refused(path)


def test_another_number_of_records_than_announced_is_refused(damaged):
  path, shard = damaged
  info = json.loads((path / "dataset_info.json").read_text())
  info["splits"][0]["shardLengths"] = ["7"]
  (path / "dataset_info.json").write_text(json.dumps(info))
  dataset = prepared_dataset.open_dataset(str(path), "train")
  with pytest.raises(prepared_dataset.DatasetError) as error:
    dataset.source[0]
  assert f"{shard} holds 2 records, dataset_info.json says 7" in str(
    error.value
  )


def test_a_shard_of_the_right_size_that_is_none_is_refused(damaged):
  path, shard = damaged
  shard.write_bytes(b"x" * shard.stat().st_size)
  dataset = prepared_dataset.open_dataset(str(path), "train")
  with pytest.raises(prepared_dataset.DatasetError, match="record 1 of split"):
    dataset.source[1]


def test_a_newer_schema_is_refused(damaged):
  path, _ = damaged
  meta = json.loads((path / "metadata.json").read_text())
  meta["schema_version"] = 99
  (path / "metadata.json").write_text(json.dumps(meta))
  assert "schema 99" in refused(path)


def test_a_flipped_bit_names_the_record(damaged):
  path, shard = damaged
  data = bytearray(shard.read_bytes())
  data[len(data) // 3] ^= 4
  shard.write_bytes(bytes(data))
  source = prepared_dataset.RecordSource(
    prepared_dataset.open_dataset(str(path), "train")
  )
  with pytest.raises(
    prepared_dataset.DatasetError, match=r"record \d+ of split 'train'"
  ):
    list(map(source.__getitem__, range(len(source))))


# --- many shards --------------------------------------------------------------


def test_twenty_thousand_shards_are_listed_in_no_time():
  """A comparison of each with each would take 20 s."""
  names = [f"faces-train.array_record-{i:05d}-of-20000" for i in range(20_000)]

  class Root(type(epath.Path())):
    def iterdir(self):
      return iter([epath.Path(name) for name in names])

  start = time.perf_counter()
  shards = prepared_dataset._shards(Root("/data"), "train", 20_000)
  assert time.perf_counter() - start < 5
  assert len(shards) == 20_000
  del names[-1]
  with pytest.raises(prepared_dataset.DatasetError, match="-19999-of-20000"):
    prepared_dataset._shards(Root("/data"), "train", 20_000)


def test_the_shards_are_opened_once_for_all_that_read(
  sample_dataset, monkeypatch
):
  opened = []
  real = prepared_dataset.ArrayRecordReader

  def noted(path, **options):
    opened.append(path)
    return real(path, **options)

  monkeypatch.setattr(prepared_dataset, "ArrayRecordReader", noted)
  monkeypatch.setattr(
    prepared_dataset, "_readers", weakref.WeakValueDictionary()
  )
  take_clip = TakeClip(Clip(2, 1), tubelet_size=2)
  # As two splits that are the same.
  for _ in range(2):
    dataset = prepared_dataset.open_dataset(str(sample_dataset), "train")
    read = dataset.source
    assert len(read) == dataset.num_records
    assert opened == opened[:1]
    for _ in range(2):
      list(
        loader.eval_batches([dataset], take_clip, batch_size=1, num_batches=1)
      )
  assert len(opened) == 1


def test_records_of_many_shards_are_looked_up_in_the_files(mixed, monkeypatch):
  """Readers that keep no index in memory give the same records."""
  expected = qualities(prepared_dataset.open_dataset(str(mixed), "train"))
  options = []
  real = prepared_dataset.ArrayRecordReader

  def noted(path, **kwargs):
    options.append(kwargs["options"])
    return real(path, **kwargs)

  monkeypatch.setattr(prepared_dataset, "ArrayRecordReader", noted)
  monkeypatch.setattr(prepared_dataset, "_MAX_INDEXED", 4)
  monkeypatch.setattr(
    prepared_dataset, "_readers", weakref.WeakValueDictionary()
  )
  found = prepared_dataset.open_dataset(str(mixed), "train")
  assert qualities(found) == expected
  assert all("offloaded" in given for given in options)
  copy = pickle.loads(pickle.dumps(found))
  assert qualities(copy) == expected


@pytest.fixture
def file_limit():
  """Restores the limit of open files."""
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  yield limits
  resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_of_open_files_is_raised(sample_dataset, file_limit):
  _, hard = file_limit
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024) - 1, hard))
  prepared_dataset.open_dataset(str(sample_dataset), "train")
  assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_more_shards_than_open_files_are_refused(monkeypatch):
  monkeypatch.setattr(
    prepared_dataset.resource, "getrlimit", lambda _: (1024, 1024)
  )
  prepared_dataset.allow_open_files(500)
  with pytest.raises(prepared_dataset.OpenFilesError, match="ulimit -n"):
    prepared_dataset.allow_open_files(1000)


def test_too_many_open_files_are_no_damage(
  sample_dataset, file_limit, tmp_path, monkeypatch
):
  shutil.copytree(sample_dataset, tmp_path / "data")
  dataset = prepared_dataset.open_dataset(str(tmp_path / "data"), "train")
  bad = BadRecords(tmp_path / "quarantine.jsonl", limit=100)

  def first_batch():
    batches = loader.eval_batches(
      [dataset],
      TakeClip(Clip(2, 1), tubelet_size=2),
      batch_size=1,
      num_batches=1,
      bad=bad,
    )
    return next(batches)

  monkeypatch.setattr(
    prepared_dataset, "_readers", weakref.WeakValueDictionary()
  )
  gc.collect()  # closes files of earlier tests now, not while none may be open
  _, hard = file_limit
  resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
  taken = []
  try:
    with contextlib.suppress(OSError):
      while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(prepared_dataset.OpenFilesError, match="1 shard,"):
      first_batch()
  finally:
    for descriptor in taken:
      os.close(descriptor)
  assert not (tmp_path / "quarantine.jsonl").exists()
