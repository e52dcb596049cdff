"""Reading from buckets."""

import dataclasses
import threading

import numpy as np
import pytest

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.sampling import RecordDraws
from tests.support.slow_bucket import SlowBucket

ANSWER_SECS = 0.05


@pytest.fixture
def bucket(sample_dataset, monkeypatch):
  with SlowBucket(sample_dataset, ANSWER_SECS) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.address)
    yield server
    server.shutdown()


def first_batch(dataset, **reading):
  batches = loader.train_batches(
    RecordDraws(dataset, seed=0),
    TakeClip(Clip(4, 2), tubelet_size=2),
    batch_size=8,
    start_step=0,
    **{"num_threads": 1} | reading,
  )
  return next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_records_of_a_bucket_are_read_at_the_same_time(
  bucket, sample_dataset, num_workers
):
  local = prepared_dataset.open_dataset(str(sample_dataset), "train")
  remote = dataclasses.replace(
    local,
    path="gs://faces/data",
    shards=tuple(
      f"gs://faces/data/{shard.rpartition('/')[2]}" for shard in local.shards
    ),
  )
  assert len(remote.source) == local.num_records
  bucket.most_at_once = 0
  batch = first_batch(remote, num_workers=num_workers)
  assert bucket.most_at_once >= 4  # 8 on an idle machine
  for key, value in first_batch(local).items():
    np.testing.assert_array_equal(batch[key], value)
