"""Input pipeline: order, resuming, selection of records."""

import dataclasses
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from marlin_jax.data import (
  loader,
  prepared_dataset,
  sampling,
  segment_indexing,
)
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.data.reader import BadRecords
from marlin_jax.records import schema
from tests.support import made_dataset
from tests.support.made_dataset import a_record, showing, shown

TAKE_CLIP = TakeClip(Clip(4, 2), tubelet_size=2)


@pytest.fixture
def dataset(sample_dataset):
  return prepared_dataset.open_dataset(str(sample_dataset), "train")


def take(
  dataset,
  num_batches,
  *,
  start_step=0,
  seed=0,
  num_threads=2,
  batch_size=3,
  num_clips=1,
  order=sampling.StoredOrder,
  **k,
):
  draws = sampling.RecordDraws(dataset, seed, order=order, num_clips=num_clips)
  batches = loader.train_batches(
    draws,
    TAKE_CLIP,
    batch_size=batch_size,
    start_step=start_step,
    num_threads=num_threads,
    **k,
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
  source = prepared_dataset.RecordSource(dataset)
  _, record = source[int(batch["_id"][1])]
  start = int(batch["start"][1])
  frames = np.arange(start, start + 8, 2)
  np.testing.assert_array_equal(
    batch["video"][1], schema.decode_frames(record, frames)
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


def test_a_picture_is_a_still_clip_once_per_pass(tmp_path):
  videos = {
    f"{i}.jpg": [showing(a_record(f"{i}.jpg", num_frames=1), [40 * i])]
    for i in range(5)
  }
  path = made_dataset.make(tmp_path / "pictures", videos)
  pictures = prepared_dataset.open_dataset(str(path), "train")
  assert pictures.is_of_pictures
  index = segment_indexing.open_index(pictures, tmp_path)
  draws = sampling.VideoDraws(pictures, index, TAKE_CLIP.clip, seed=0)
  batches = loader.train_batches(
    draws, TAKE_CLIP, batch_size=5, start_step=0, num_threads=1
  )
  for _ in range(3):
    batch = next(batches)
    assert sorted(batch["_id"]) == [0, 1, 2, 3, 4]
    for i, video, regions in zip(
      batch["_id"], batch["video"], batch["regions"], strict=True
    ):
      np.testing.assert_allclose(shown(video), 40 * i, atol=1)
      assert (video == video[:1]).all()
      assert (regions == regions[:1]).all()
      assert regions.any()


def test_clips_of_one_record_follow_each_other_and_differ(dataset):
  whole = take(dataset, 4, batch_size=6, num_clips=3)
  assert len({int(i) for batch in whole for i in batch["_id"]}) == 2
  source = prepared_dataset.RecordSource(dataset)
  for batch in whole:
    for first in (0, 3):
      three = {key: x[first : first + 3] for key, x in batch.items()}
      assert len(set(three["_id"].tolist())) == 1
      assert len(set(three["start"].tolist())) == 3
      _, record = source[int(three["_id"][0])]
      for start, video in zip(three["start"], three["video"], strict=True):
        frames = range(start, start + 8, 2)
        np.testing.assert_array_equal(
          video, schema.decode_frames(record, frames)
        )
  again = take(dataset, 2, start_step=2, batch_size=6, num_clips=3)
  assert_same(again, whole[2:])


def test_evaluation_takes_the_same_clips_every_time(dataset):
  first, again = (
    list(loader.eval_batches([dataset], TAKE_CLIP, batch_size=4, num_batches=2))
    for _ in range(2)
  )
  assert_same(first, again)
  ids = np.concatenate([b["_id"] for b in first])
  assert set(ids) == set(range(dataset.num_records))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """Returns six videos of alternating quality; a good one is damaged."""
  videos = {
    f"{i}.mp4": [
      made_dataset.a_record(f"{i}.mp4", num_frames=10, quality=0.3 + i % 2 / 2)
    ]
    for i in range(6)
  }
  (third,) = videos["3.mp4"]
  videos["3.mp4"] = [dataclasses.replace(third, frames=[b"no picture"] * 10)]
  path = tmp_path_factory.mktemp("mixed") / "dataset"
  made_dataset.make(path, videos)
  return prepared_dataset.open_dataset(str(path), "train", min_quality=0.5)


def test_only_records_of_the_wanted_quality_are_served(mixed, tmp_path):
  def served(num_batches, **k):
    bad = BadRecords(tmp_path / "bad", limit=1)
    return take(mixed, num_batches, bad=bad, **k)

  whole = served(4)
  ids = [batch["_id"].tolist() for batch in whole]
  # Every pass serves each record once, except the unreadable one, which the
  # next record of sufficient quality replaces.
  assert [sorted(batch) for batch in ids] == [[1, 5, 5]] * 4
  assert len({tuple(batch) for batch in ids}) > 1
  assert_same(served(2, start_step=2), whole[2:])
  rows = (tmp_path / "bad").read_text().splitlines()
  assert [json.loads(row)["record"] for row in rows] == [3]


def test_evaluation_serves_only_records_of_the_wanted_quality(mixed, tmp_path):
  bad = BadRecords(tmp_path / "bad", limit=1)
  batches = loader.eval_batches(
    [mixed], TAKE_CLIP, batch_size=3, num_batches=2, bad=bad
  )
  found = [batch["_id"].tolist() for batch in batches]
  assert found == [[1, 1, 5], [5, 5, 5]]


def test_batches_reach_the_devices_unchanged_and_all(dataset):
  host = take(dataset, 4)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  assert_same(list(loader.to_devices(host, sharding)), host)


# --- who reads ----------------------------------------------------------------


def test_worker_processes_read_what_threads_read(dataset):
  want = take(dataset, 4, start_step=2, batch_size=20)
  got = take(dataset, 4, start_step=2, batch_size=20, num_workers=2)
  assert_same(got, want)


def test_bad_records_that_worker_processes_meet_are_listed(mixed, tmp_path):
  def served(name, limit, **k):
    return take(mixed, 3, bad=BadRecords(tmp_path / name, limit), **k)

  assert_same(served("workers", 1, num_workers=1), served("threads", 1))
  with pytest.raises(DatasetError, match="max_bad_records is 0"):
    served("none", 0, num_workers=1)
  for name in ("workers", "none"):
    (row,) = map(json.loads, (tmp_path / name).read_text().splitlines())
    assert row["record"] == 3
    assert "is not a 224x224 JPEG" in row["reason"]


def test_records_that_other_processes_have_listed_count_too(tmp_path):
  """A run of fewer processes goes on with the lists of all."""
  rows = [{"data": "d", "record": i, "reason": f"bad {i}"} for i in range(3)]
  other = BadRecords(tmp_path / "other", limit=2)
  other.add(rows[:2])
  own = BadRecords(tmp_path / "own", limit=2, others=[tmp_path / "other"])
  own.add(rows[:1])
  assert not (tmp_path / "own").exists()
  with pytest.raises(DatasetError, match=r"bad 2\nUnusable .* so far: 3, and"):
    own.add(rows[2:])


class Device(NamedTuple):
  platform: str
  process_index: int = 0
  slice_index: int | None = None


@pytest.mark.parametrize(
  ("local", "other", "num_cores", "expected"),
  [
    ([Device("cpu")], [], 64, "2 threads"),
    ([Device("gpu")], [], 2, "2 threads"),
    ([Device("gpu")], [], 8, "7 worker processes with 2 threads each"),
    ([Device("gpu")], [], 64, "20 worker processes with 2 threads each"),
    ([Device("tpu")] * 4, [], 64, "63 worker processes with 2 threads each"),
    # Two of four processes are on this machine.
    (
      [Device("gpu", 0, 0)],
      [Device("gpu", 1, 0), Device("gpu", 2, 1), Device("gpu", 3, 1)],
      32,
      "15 worker processes with 2 threads each",
    ),
  ],
)
def test_who_reads_follows_cores_and_devices(
  local, other, num_cores, expected, monkeypatch
):
  monkeypatch.setattr(loader.jax, "local_devices", lambda: local)
  monkeypatch.setattr(loader.jax, "devices", lambda: local + other)
  monkeypatch.setattr(loader.os, "cpu_count", lambda: num_cores)
  monkeypatch.setattr(loader.cli, "num_cores", lambda: num_cores)
  assert str(loader.reading(-1, 0)) == expected
  assert loader.reading(3, 5) == (5, 3)
  # Cores of its own are not shared.
  monkeypatch.setattr(loader.os, "cpu_count", lambda: 2 * num_cores)
  if other:
    assert loader.reading(-1, 0) == (2, 20)
