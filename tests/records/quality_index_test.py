"""Qualities stay exact from the record to the selection in training."""

import json

import numpy as np
import pytest

from marlin_jax.records import quality_index, schema
from tests.support.made_dataset import a_record


def test_quality_goes_through_records_and_json_unchanged():
  np_rng = np.random.default_rng(0)
  for _ in range(200):
    record = a_record(
      "a",
      quality=float(np_rng.random()),  # of more digits than float32 has
      quality_terms=np_rng.random(4, np.float32) ** 8,
    )
    row = quality_index.row_of(record)
    again = schema.decode(schema.encode(record))
    assert quality_index.row_of(again) == row
    assert json.loads(json.dumps(row)) == row
    (packed,) = quality_index.unpack(quality_index.pack([[row]]))
    assert packed["quality"] == np.float32(record.quality)
    for name, value in zip(
      schema.QUALITY_TERMS, record.quality_terms, strict=True
    ):
      assert packed[name] == value


def test_rows_are_in_order_and_tell_their_video():
  good, bad = [0.9, 1.0, 0.8, 0.9, 0.9], [0.1, 0.0, 0.1, 0.9, 0.9]
  rows = quality_index.unpack(quality_index.pack([[good, bad], [], [bad]]))
  assert rows["video"].tolist() == [0, 0, 2]
  np.testing.assert_array_equal(rows["size"], np.float32([1, 0, 0]))
  found = quality_index.select(rows, 0.5)
  assert [*found.records] == [0]
  assert [*found.videos] == [0]
  assert found.num_videos_left_out == 1
  assert found.num_left_out == 2


def test_a_split_without_records_has_no_rows():
  assert len(quality_index.unpack(quality_index.pack([]))) == 0


def test_a_file_of_other_rows_is_refused(tmp_path):
  np.save(tmp_path / "x.npy", np.zeros((3, 5), np.float32))
  with pytest.raises(ValueError, match=r"holds float32 \(3, 5\), expected"):
    quality_index.unpack((tmp_path / "x.npy").read_bytes())
