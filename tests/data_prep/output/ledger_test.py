"""Lines of the ledger keep their bytes, whatever their form in memory."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from data_prep.output import ledger
from data_prep.output.ledger import Entry
from marlin_jax.records import quality_index

ROWS = [[0.5, 0.25, 1.0, 1e-07, 0.123456], [0.75, 0.0, 1.0, 0.3, 0.1]]


def an_entry(**changes) -> Entry:
  fields = {
    "video_id": 'a "quality": [[1]], "limits": é.mp4',
    "split": "train",
    "subject_id": "",
    "labels": {"mood": [1.0, None], "quality": [2.0], "segments": [None]},
    "num_bytes": 3,
    "sha256": "0" * 64,
    "status": "kept",
    "reason": 'a "quality": 1, "limits": 2',
    "num_decoded_frames": 9,
    "num_tracks": 1,
    "num_records": 2,
    "num_frames": 9,
    "quality": ROWS,
    "limits": {"secs": 300.0},
    "segments": [[0, 5], [0, 4]],
    "notes": ["interlaced"],
  }
  return Entry(**fields | changes)


def test_lines_keep_their_bytes_and_values():
  for entry in (
    an_entry(),
    an_entry(quality=[], limits=None, segments=[], notes=[], labels={}),
  ):
    fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(Entry)}
    line = json.dumps(fields) + "\n"
    assert entry.to_line() == line
    read = Entry.from_line(line)
    assert read == entry
    assert entry.packed() == entry
    for each in (read, entry.packed(), pickle.loads(pickle.dumps(read))):
      assert each.to_line() == line
      assert each.to_fields() == fields
      assert [*each.quality] == fields["quality"]
      assert bool(each.segments) == bool(fields["segments"])
    assert read != an_entry(quality=[[1.0] * 5])


def test_lines_of_earlier_versions_are_read():
  entry = an_entry()
  fields = entry.to_fields()
  del fields["notes"], fields["segments"]
  expected = dataclasses.replace(entry, notes=[], segments=[])
  assert Entry.from_line(json.dumps(fields)) == expected
  in_another_order = dict(sorted(fields.items()))
  assert Entry.from_line(json.dumps(in_another_order)) == expected
  for damaged in ("{", "{}", '{"quality": [], "limits": 1}'):
    with pytest.raises((ValueError, TypeError, KeyError)):
      Entry.from_line(damaged)


def test_the_quality_index_is_the_same_from_packed_lines():
  entries = [an_entry(), an_entry(quality=ROWS[:1], num_records=1)]
  expected = quality_index.pack(entry.quality for entry in entries)
  rows = np.fromiter(
    [(0, *ROWS[0]), (0, *ROWS[1]), (1, *ROWS[0])], quality_index.DTYPE
  )
  np.testing.assert_array_equal(quality_index.unpack(expected), rows)
  for some in (entries, [entry.packed() for entry in entries], []):
    data = quality_index.pack_rows(*ledger.quality_rows(some))
    assert data == quality_index.pack(entry.quality for entry in some)


def test_equal_lines_are_left_alone_and_others_replaced(tmp_path):
  path = tmp_path / "videos.jsonl"
  ledger.write_lines(path, ["a\n", "b\n"])
  before = path.stat().st_mtime_ns
  ledger.write_lines(path, iter(["a\n", "b\n"]))
  assert path.stat().st_mtime_ns == before
  ledger.write_lines(path, ["c\n"])
  assert path.read_text() == "c\n"
  assert [*tmp_path.iterdir()] == [path]
