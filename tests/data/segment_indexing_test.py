"""The segment index of a data set, and of one that was made without it."""

import shutil

import pytest

from marlin_jax.data import prepared_dataset, segment_indexing
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.records import folders
from tests.support import made_dataset
from tests.support.made_dataset import a_record


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  videos = {
    "a.mp4": [
      a_record("a.mp4", 0, 0, 5, subject_id="ann"),
      a_record("a.mp4", 1, 0, 3, subject_id="ann"),
      a_record("a.mp4", 0, 1, 4, subject_id="ann"),
    ],
    "b.mp4": [a_record("b.mp4", num_frames=6, quality=0.9)],
    "c.mp4": [a_record("c.mp4", num_frames=7, subject_id="ann", quality=0.1)],
  }
  path = tmp_path_factory.mktemp("made") / "dataset"
  return made_dataset.make(path, videos, num_shards=2)


@pytest.fixture
def folder(made, tmp_path):
  """Returns a copy of the data set that a test may change."""
  return shutil.copytree(made, tmp_path / "dataset")


def opened(folder, cache, **options):
  dataset = prepared_dataset.open_dataset(str(folder), "train", **options)
  return segment_indexing.open_index(dataset, cache)


def test_an_index_that_is_missing_is_made_once_as_data_prep_makes_it(
  folder, tmp_path, monkeypatch
):
  path = folder / "faces-train.segments.npy"
  whole = path.read_bytes()
  path.unlink()
  assert opened(folder, tmp_path / "cache").frames.sum() == 25
  assert path.read_bytes() == whole
  assert not (tmp_path / "cache").exists()
  monkeypatch.setattr(segment_indexing, "_make", None)
  assert opened(folder, tmp_path / "cache").num_subjects == 2


def test_the_index_of_a_read_only_data_set_is_kept_in_the_workdir(
  folder, tmp_path, monkeypatch
):
  path = folder / "faces-train.segments.npy"
  whole = path.read_bytes()
  path.unlink()
  write_bytes = folders.write_bytes

  def read_only(target, data):
    if folder in target.parents:
      raise PermissionError(13, "Permission denied", str(target))
    write_bytes(target, data)

  monkeypatch.setattr(folders, "write_bytes", read_only)
  cache = tmp_path / "run" / "index"
  opened(folder, cache)
  (kept,) = cache.iterdir()
  assert kept.read_bytes() == whole
  monkeypatch.setattr(segment_indexing, "_make", None)
  # A selection is of the same records.
  assert opened(folder, cache, min_quality=0.5).num_records == 5


def test_an_index_of_other_records_is_refused(folder, made, tmp_path):
  path = folder / "faces-train.segments.npy"
  other = made_dataset.make(tmp_path / "other", {"x.mp4": [a_record("x.mp4")]})
  for damage in (
    (other / path.name).read_bytes(),
    path.read_bytes()[:-4],
    b"",
  ):
    path.write_bytes(damage)
    with pytest.raises(DatasetError, match="If you delete it") as error:
      opened(folder, tmp_path)
    assert str(path) in str(error.value)
