"""Order, resume and refusals of the input pipeline."""

import json
import shutil

import jax
import numpy as np
import pytest

from marlin_jax import input_pipeline, records
from marlin_jax.video import Clip

TAKE_CLIP = input_pipeline.TakeClip(Clip(4, 2), tubelet_size=2)


@pytest.fixture
def dataset(sample_dataset):
  return input_pipeline.open_dataset(str(sample_dataset), "train")


def take(dataset, num_batches, *, start_step=0, seed=0, num_threads=2):
  batches = input_pipeline.train_batches(
    dataset,
    TAKE_CLIP,
    batch_size=3,
    seed=seed,
    start_step=start_step,
    num_threads=num_threads,
  )
  return [next(batches) for _ in range(num_batches)]


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_holds_decoded_frames_and_their_regions(dataset):
  (batch,) = take(dataset, 1)
  assert batch["video"].shape == (3, 4, 224, 224, 3)
  assert batch["video"].dtype == np.uint8
  assert batch["regions"].shape == (3, 2, 14, 14)
  assert batch["regions"].dtype == np.uint16
  source = input_pipeline.RecordSource(dataset)
  _, record = source[int(batch["_id"][1])]
  start = int(batch["start"][1])
  frames = np.arange(start, start + 8, 2)
  np.testing.assert_array_equal(
    batch["video"][1], records.decode_frames(record, frames)
  )
  np.testing.assert_array_equal(
    batch["regions"][1], record.regions[frames[::2]]
  )


def test_resuming_at_a_step_continues_the_same_sequence(dataset):
  whole = take(dataset, 6)
  assert_same(take(dataset, 3, start_step=3), whole[3:])


def test_the_order_does_not_depend_on_the_number_of_threads(dataset):
  assert_same(take(dataset, 3, num_threads=1), take(dataset, 3, num_threads=4))


def test_another_seed_gives_another_order(dataset):
  starts = [
    np.concatenate([b["start"] for b in take(dataset, 4, seed=seed)])
    for seed in (0, 1)
  ]
  assert (starts[0] != starts[1]).any()


def test_every_record_is_seen_once_per_pass(dataset):
  ids = np.concatenate([b["_id"] for b in take(dataset, 10)])
  n = dataset.num_records
  for first in range(0, len(ids) - n, n):
    assert set(ids[first : first + n]) == set(range(n))


def test_evaluation_takes_the_same_clips_every_time(dataset):
  first, again = (
    list(
      input_pipeline.eval_batches(
        dataset, TAKE_CLIP, batch_size=4, num_batches=2
      )
    )
    for _ in range(2)
  )
  assert_same(first, again)
  ids = np.concatenate([b["_id"] for b in first])
  assert set(ids) == set(range(dataset.num_records))


def test_batches_reach_the_devices_unchanged_and_all(dataset):
  host = take(dataset, 4)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  assert_same(list(input_pipeline.to_devices(host, sharding)), host)


# --- refusals -----------------------------------------------------------------


@pytest.fixture
def damaged(sample_dataset, tmp_path):
  """A copy to be damaged, and its first shard."""
  path = tmp_path / "dataset"
  shutil.copytree(sample_dataset, path)
  return path, next(iter(sorted(path.glob("*.array_record-*"))))


def refused(path, split="train"):
  with pytest.raises(input_pipeline.DatasetError) as error:
    input_pipeline.RecordSource(input_pipeline.open_dataset(str(path), split))
  message = str(error.value)
  assert str(path) in message
  return message


def test_a_folder_that_is_no_data_set_names_the_command(tmp_path):
  assert "python -m data_prep.prepare" in refused(tmp_path)


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
  message = refused(path)
  assert "cannot be opened" in message or "hold 0 records" in message


def test_a_shard_too_many_is_refused(damaged):
  path, shard = damaged
  shutil.copy(shard, shard.with_name(shard.name.replace("-00000-", "-00001-")))
  assert "should have 1 shards and has 2" in refused(path)


def test_another_number_of_records_than_announced_is_refused(damaged):
  path, _ = damaged
  info = json.loads((path / "dataset_info.json").read_text())
  info["splits"][0]["shardLengths"] = ["7"]
  (path / "dataset_info.json").write_text(json.dumps(info))
  assert "dataset_info.json says 7" in refused(path)


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
  source = input_pipeline.RecordSource(
    input_pipeline.open_dataset(str(path), "train")
  )
  with pytest.raises(
    input_pipeline.DatasetError, match=r"record \d+ of split 'train'"
  ):
    list(map(source.__getitem__, range(len(source))))
