"""Which tracks of a video are those of its person."""

import numpy as np
import pytest

from data_prep.faces import main_face, meshes, tracking


def track(first_frame, centres, side=10.0):
  """Returns a track with these centres, (T, 2)."""
  half = side / 2
  boxes = np.float32(
    [[x - half, y - half, x + half, y + half] for x, y in centres]
  )
  return tracking.Track(
    track_id=7,
    first_frame=first_frame,
    boxes=boxes,
    meshes=meshes.Meshes(len(boxes), [], [], []),
    quality=1.0,
    quality_terms=np.ones(4, np.float32),
  )


def test_the_largest_is_by_side_times_length():
  short = track(0, [(50, 50)] * 10, side=30)
  long = track(0, [(9, 9)] * 40, side=10)
  small = track(3, [(9, 9)] * 40, side=9)
  assert main_face.largest([short, small, long]) == [long]
  assert main_face.largest([]) == []


def test_a_track_is_in_a_box_by_the_centre_of_most_crops():
  inside = track(0, [(20, 20)] * 6 + [(90, 20)] * 4)
  outside = track(0, [(20, 20)] * 4 + [(90, 20)] * 6)
  box = np.array([10, 10, 40, 40])
  assert main_face.in_box([outside, inside], box) == [inside]


def test_points_find_all_tracks_of_a_person_and_none_of_another():
  secs = [i / 24 for i in range(100)]
  left = [(20 + i, 30) for i in range(100)]
  person = [track(0, left[:40]), track(60, left[60:])]
  other = track(0, [(150, 30)] * 100)
  passing = track(40, left[40:50])
  points = [(secs[i], *left[i]) for i in (5, 30, 70, 99)]
  tracks = [person[0], other, passing, person[1]]
  assert main_face.at_points(tracks, secs, points) == person
  # Between two frames the earlier one is shown.
  points = [(secs[5] + 0.02, 25, 30)]
  assert main_face.at_points(tracks, secs, points) == person[:1]


def test_numbers_are_from_0_on():
  tracks = [track(0, [(1, 1)]), track(5, [(1, 1)])]
  assert [t.track_id for t in main_face.numbered(tracks)] == [0, 1]
  assert pytest.approx(tracks[0].side) == 10
