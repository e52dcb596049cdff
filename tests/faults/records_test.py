"""Faults of records found during training: flipped bits, foreign content.

Other tests cover faults of whole shards and of the order of clips (loader_test,
prepared_dataset_test), preparation that dies (prepare_test), empty region maps
(masking_test) and processes with unequal data (distributed_test).
"""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.reader import BadRecords
from marlin_jax.data.sampling import Draw, RecordDraws, StoredOrder
from marlin_jax.records import schema
from tests.support import made_dataset
from tests.support.training_runs import metrics_of, refused, train

TAKE_CLIP = TakeClip(Clip(4, 2), tubelet_size=2)
BATCH_SIZE = 3


@pytest.fixture(scope="module")
def good(sample_dataset):
  """Returns eight records as on disk, copies of real ones."""
  dataset = prepared_dataset.open_dataset(str(sample_dataset), "train")
  source = prepared_dataset.RecordSource(dataset)
  return [
    dataclasses.replace(source[i % len(source)][1], segment=i) for i in range(8)
  ]


def write(directory, contents):
  """Writes a data set of one shard."""
  path = directory / "faces-train.array_record-00000-of-00001"
  writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
  for content in contents:
    writer.write(content)
  writer.close()
  return prepared_dataset.Dataset(
    path=str(directory),
    split="train",
    shards=(str(path),),
    lengths=(len(contents),),
    num_records=len(contents),
    num_videos=1,
    num_frames=0,
    fingerprint="f" * 64,
  )


def batches(dataset, quarantine, limit, start_step=0, num_clips=1, **k):
  return loader.train_batches(
    RecordDraws(dataset, seed=0, order=StoredOrder, num_clips=num_clips),
    TAKE_CLIP,
    start_step=start_step,
    num_threads=2,
    bad=BadRecords(quarantine, limit),
    **{"batch_size": BATCH_SIZE} | k,
  )


def not_a_jpeg(record):
  frames = [b"no picture"] * len(record)
  return schema.encode(dataclasses.replace(record, frames=frames))


def small_frames(record):
  frame = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
  frames = [frame] * len(record)
  return schema.encode(dataclasses.replace(record, frames=frames))


def regions_of_another_shape(record):
  data = schema.encode(record)
  # One frame more than regions.
  example = schema._Example.FromString(data)
  frames = example.features.feature["frames"].bytes_list.value
  frames.append(frames[0])
  return example.SerializeToString()


def no_record(record):
  return b"\xff" * 100


BAD = {
  not_a_jpeg: "is not a 224x224 JPEG",
  small_frames: "64x64 pixels",
  regions_of_another_shape: "'regions' holds",
  no_record: "not a tf.train.Example",
}


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_record_is_told_of_and_another_takes_its_place(
  good, tmp_path, spoil
):
  contents = [schema.encode(record) for record in good]
  contents[3] = spoil(good[3])
  dataset = write(tmp_path, contents)
  quarantine = tmp_path / "quarantine.jsonl"
  ids = {
    int(i)
    for batch in itertools.islice(batches(dataset, quarantine, 1), 6)
    for i in batch["_id"]
  }
  assert ids == set(range(8)) - {3}
  (row,) = map(json.loads, quarantine.read_text().splitlines())
  assert row["record"] == 3
  assert row["path"] == str(tmp_path)
  assert BAD[spoil] in row["reason"]


class PairsOfRecords:
  """Draws of two records each, as of clips that begin at a record's end."""

  num_clips = 1

  def __init__(self, dataset):
    self.datasets = (dataset,)
    self.clips_per_epoch = self.num_attempts = dataset.num_records - 1

  def __call__(self, position, attempt=0):
    first = (position + attempt) % self.clips_per_epoch
    return Draw((first, first + 1), (position, attempt))


def test_a_record_that_cannot_be_read_is_listed_once_whatever_draw_it_is_in(
  tmp_path,
):
  np_rng = np.random.default_rng(0)
  shape = schema.FRAME_SIZE, schema.FRAME_SIZE, 3
  noise = [
    simplejpeg.encode_jpeg(np_rng.integers(0, 256, shape, np.uint8), 90)
    for _ in range(4)
  ]
  records = [
    made_dataset.a_record("a.mp4", segment=i, num_frames=2, frames=[frame] * 2)
    for i, frame in enumerate(noise)
  ]
  dataset = write(tmp_path, [*map(schema.encode, records)])
  with open(dataset.shards[0], "r+b") as shard:
    place = shard.read().find(noise[2][1000:1020])
    shard.seek(place)
    shard.write(bytes([noise[2][1000] ^ 1]))
  quarantine = tmp_path / "quarantine.jsonl"
  made = loader.train_batches(
    PairsOfRecords(dataset),
    TAKE_CLIP,
    batch_size=3,
    start_step=0,
    num_threads=1,
    bad=BadRecords(quarantine, limit=1),
  )
  assert next(made)["_id"].tolist() == [0, 0, 0]
  (row,) = map(json.loads, quarantine.read_text().splitlines())
  assert row["record"] == 2
  assert "record 2 of split 'train'" in row["reason"]


@pytest.fixture
def spoiled(good, tmp_path):
  """Returns a data set with two bad records of eight, and its quarantine."""
  contents = [schema.encode(record) for record in good]
  contents[2], contents[5] = not_a_jpeg(good[2]), no_record(good[5])
  return write(tmp_path, contents), tmp_path / "quarantine.jsonl"


def test_the_list_of_bad_records_is_never_half_written(tmp_path):
  """A run that is killed while it writes finds the list as it was."""
  quarantine = tmp_path / "quarantine.jsonl"
  bad = BadRecords(quarantine, 2)
  bad.add([{"data": "a", "record": 1}])
  before = quarantine.read_text()
  with quarantine.open() as opened:
    bad.add([{"data": "a", "record": 2}])
    assert opened.read() == before
  assert len(quarantine.read_text().splitlines()) == 2


def test_a_resumed_run_reads_the_same_clips_around_bad_records(spoiled):
  dataset, quarantine = spoiled
  whole = list(itertools.islice(batches(dataset, quarantine, 2), 8))
  told = quarantine.read_text()
  assert len(told.splitlines()) == 2
  # With bad records that are already listed, and with new ones.
  for path in (quarantine, quarantine.with_name("another.jsonl")):
    rest = itertools.islice(batches(dataset, path, 2, start_step=3), 5)
    for got, want in zip(rest, whole[3:], strict=True):
      for key in want:
        np.testing.assert_array_equal(got[key], want[key])
  assert quarantine.read_text() == told


def test_processes_agree_on_what_replaces_a_record_that_is_bad_in_part(
  good, tmp_path
):
  """One process reads only intact clips of the damaged record."""
  num_good = len(good[3]) - 6
  frames = [*good[3].frames[:num_good], *[b"no picture"] * 6]
  contents = [schema.encode(record) for record in good]
  contents[3] = schema.encode(dataclasses.replace(good[3], frames=frames))
  dataset = write(tmp_path, contents)

  def take(name, rows):
    made = batches(
      dataset, tmp_path / name, 1, batch_size=6, num_clips=3, rows=rows
    )
    return list(itertools.islice(made, 40))

  whole = take("whole", range(6))
  first, second = take("first", [0, 1]), take("second", [2, 3, 4, 5])
  for all_rows, *parts in zip(whole, first, second, strict=True):
    for key, value in all_rows.items():
      np.testing.assert_array_equal(
        value, np.concatenate([part[key] for part in parts])
      )
  for batch in whole:
    for i in (0, 3):
      assert len(set(batch["_id"][i : i + 3].tolist())) == 1
  # The record is used only where no clip reaches its damaged end.
  starts = np.concatenate([b["start"][b["_id"] == 3] for b in whole])
  assert len(starts)
  assert starts.max() <= num_good - TAKE_CLIP.clip.span
  for name in ("whole", "first", "second"):
    assert "record 3 is damaged" in (tmp_path / name).read_text()


def test_more_bad_records_than_allowed_end_the_run(spoiled):
  dataset, quarantine = spoiled
  with pytest.raises(prepared_dataset.DatasetError) as error:
    list(itertools.islice(batches(dataset, quarantine, 1), 8))
  message = str(error.value)
  assert "config.data.max_bad_records is 1" in message
  assert str(quarantine) in message
  # A restart does not reset the limit.
  with pytest.raises(prepared_dataset.DatasetError):
    list(itertools.islice(batches(dataset, quarantine, 1), 8))


def test_a_data_set_without_any_good_record_ends_at_once(good, tmp_path):
  dataset = write(tmp_path, [not_a_jpeg(record) for record in good])
  with pytest.raises(prepared_dataset.DatasetError, match="no record that can"):
    next(batches(dataset, tmp_path / "quarantine.jsonl", 1000))
  with pytest.raises(prepared_dataset.DatasetError, match="max_bad_records"):
    next(batches(dataset, tmp_path / "again.jsonl", 0))


def test_flipped_bits_are_named_by_the_trainer_which_goes_on_if_it_may(
  sample_dataset, tmp_path
):
  """A reader thread finds the damage, and the run ends at once."""
  damaged = tmp_path / "dataset"
  shutil.copytree(sample_dataset, damaged)
  (shard,) = damaged.glob("*.array_record-*")
  data = bytearray(shard.read_bytes())
  data[len(data) // 4] ^= 1  # in the first of two
  shard.write_bytes(bytes(data))
  overrides = {"data.path": damaged, "num_steps": 2}
  message = refused(train(tmp_path / "strict", **overrides))
  assert "record 0 of split 'train'" in message
  assert "config.data.max_bad_records" in message
  lenient = tmp_path / "lenient"
  result = train(lenient, **overrides, **{"data.max_bad_records": 1})
  assert result.returncode == 0, result.stderr
  assert list(metrics_of(lenient)) == [1, 2]
  (row,) = map(
    json.loads, (lenient / "quarantine.jsonl").read_text().splitlines()
  )
  assert row["record"] == 0
