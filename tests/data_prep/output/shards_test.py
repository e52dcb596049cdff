"""The default number of shards follows the bytes of the videos."""

import pytest

from data_prep.output import shards


@pytest.fixture
def files(tmp_path):
  """Sparse files: 300, 20 and 1100 MiB."""
  paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
  for path, mib in zip(paths, (300, 20, 1100), strict=True):
    with path.open("wb") as file:
      file.truncate(mib << 20)
  return paths


def test_a_shard_for_each_256_mib_of_a_split(files):
  a, b, c = files
  numbers = shards.default_numbers(
    {"train": [a, b, c], "val": [a], "test": [b]}
  )
  assert numbers == {"train": 5, "val": 1, "test": 1}


def test_a_file_counts_once_however_many_spans_it_gives(files):
  numbers = shards.default_numbers({"train": [files[2]] * 40})
  assert numbers == {"train": 4}


def test_what_has_no_size_counts_as_a_usual_video(tmp_path):
  folders = [tmp_path / str(number) for number in range(64)]
  for folder in folders[:32]:
    folder.mkdir()
  assert shards.default_numbers({"train": folders}) == {"train": 2}


def test_there_are_at_most_2048_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "BYTES_PER_SHARD", 10)
  paths = [tmp_path / f"{number}.mp4" for number in range(400)]
  for path in paths:
    path.write_bytes(bytes(100))
  by_split = {"train": paths[:300], "val": paths[300:]}
  assert shards.default_numbers(by_split) == {"train": 1536, "val": 512}
  monkeypatch.setattr(shards, "BYTES_PER_SHARD", 100)
  assert shards.default_numbers(by_split) == {"train": 300, "val": 100}


def test_sizes_of_a_sample_count_for_all(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "BYTES_PER_SHARD", 100)
  monkeypatch.setattr(shards, "MAX_SIZES", 50)
  paths = [tmp_path / f"{number:03d}.mp4" for number in range(500)]
  for path in paths[::10]:
    path.write_bytes(bytes(200))
  asked = []
  status = shards.storage.status
  monkeypatch.setattr(
    shards.storage, "status", lambda path: asked.append(path) or status(path)
  )
  assert shards.default_numbers({"train": paths}) == {"train": 1000}
  assert asked == paths[::10]
