"""The segment index: from videos to a mapped file and back."""

import numpy as np
import pytest

from marlin_jax.records import segment_index
from marlin_jax.records.segment_index import Video


def test_a_packed_index_has_records_videos_and_subjects(tmp_path):
  path = tmp_path / "x.segments.npy"
  path.write_bytes(
    segment_index.pack(
      [
        Video("ann", [(0, 40), (1, 20), (0, 39)], "c.mp4"),
        Video("", [(0, 5)], "e.mp4"),
        Video("bob", [(2, 7, 130.5)], "a.mp4"),
        Video("", [(0, 6)], "b.mp4"),
        Video("ann", [(0, 8), (0, 9)], "d.mp4"),
      ]
    )
  )
  index = segment_index.open_index(path)
  assert (index.num_records, index.num_videos, index.num_subjects) == (8, 5, 4)
  assert index.tracks.tolist() == [0, 1, 0, 0, 2, 0, 0, 0]
  assert index.frames.tolist() == [40, 20, 39, 5, 7, 6, 8, 9]
  assert index.first_records.tolist() == [0, 3, 4, 5, 6, 8]
  # Of ann, unknown, bob, unknown.
  assert index.videos.tolist() == [0, 4, 1, 2, 3]
  assert index.first_videos.tolist() == [0, 2, 3, 4, 5]
  assert index.by_name.tolist() == [2, 3, 0, 4, 1]
  # Nothing was read into memory.
  assert not index.frames.flags.owndata
  with open(path, "rb") as file:
    assert np.load(file).tolist() == index.tracks.tolist()
    assert np.load(file).tolist() == index.frames.tolist()


def test_an_index_of_before_names_is_read(tmp_path):
  data = segment_index.pack(
    [Video("", [(0, 5)], "b"), Video("", [(0, 6)], "a")]
  )
  (tmp_path / "x").write_bytes(segment_index.without_names(data))
  index = segment_index.open_index(tmp_path / "x")
  assert index.by_name is None
  assert index.frames.tolist() == [5, 6]


def test_a_split_without_records_has_an_empty_index(tmp_path):
  (tmp_path / "x").write_bytes(segment_index.pack([]))
  index = segment_index.open_index(tmp_path / "x")
  assert (index.num_records, index.num_videos, index.num_subjects) == (0, 0, 0)


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: data[:-1],
    lambda data: data[:300],
    lambda data: b"text" * 100,
    lambda data: data[len(data) // 5 :],
  ],
)
def test_a_damaged_index_is_refused(tmp_path, damage):
  data = segment_index.pack([Video("", [(0, 64)] * 9)] * 3)
  (tmp_path / "x").write_bytes(damage(data))
  with pytest.raises(ValueError):  # noqa: PT011
    segment_index.open_index(tmp_path / "x")


def test_records_of_a_track_are_found_among_those_of_others():
  tracks = np.array([3, 0, 3, 1, 0, 3])
  frames = np.array([10, 20, 30, 40, 50, 60])
  first, total = segment_index.places_in_tracks(tracks, frames)
  assert first.tolist() == [0, 0, 10, 0, 20, 40]
  assert total.tolist() == [100, 70, 100, 40, 70, 100]
