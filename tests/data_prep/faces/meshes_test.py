"""Meshes are kept small, and come back as they were."""

import sys

import numpy as np
import pytest

from data_prep.faces import (
  boxes,
  face_finder,
  main_face,
  meshes,
  quality,
  tracking,
)

RNG = np.random.default_rng(0)


def points(x: float = 3000.0, height: float = 200.0) -> np.ndarray:
  return np.float32([x, 900] + height * RNG.random((478, 2)))


@pytest.mark.parametrize("height", [24, 200, 2000])
def test_packed_mesh_is_exact_to_a_65535th_of_the_face(height):
  mesh = points(height=height)
  packed = meshes.PackedMesh.of(mesh)
  assert np.abs(packed.points() - mesh).max() <= height / 65535 + 1e-3
  np.testing.assert_allclose(packed.bounds, boxes.bounds(mesh), rtol=1e-6)


def test_mesh_of_one_point_does_not_divide_by_zero():
  assert (meshes.PackedMesh.of(np.ones((478, 2))).points() == 1).all()


def test_skipped_frames_are_interpolated_and_gaps_are_not():
  all_points = [points() for _ in range(4)]
  track = meshes.Meshes(
    9,
    [0, 2, 6, 7],
    [meshes.PackedMesh.of(mesh) for mesh in all_points],
    [False, True, False, False],
  )
  landmarks = track.unpacked()
  assert (landmarks.shape, landmarks.dtype) == ((9, 478, 2), np.float32)
  has_mesh = np.isfinite(landmarks).all(axis=(1, 2))
  assert has_mesh.tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False]
  middle = (all_points[0] + all_points[1]) / 2
  np.testing.assert_allclose(landmarks[1], middle, atol=0.02)
  for row in range(9):
    np.testing.assert_array_equal(track[row], landmarks[row])
  np.testing.assert_array_equal(track.picked([5, 7]), landmarks[:, [5, 7]])
  heights = np.ptp(landmarks[..., 1], axis=1)
  np.testing.assert_allclose(track.heights()[[0, 2, 6]], heights[[0, 2, 6]])
  assert (np.isfinite(track.heights()) == has_mesh).all()
  part = track.part(2, 8)
  assert len(part) == 6
  np.testing.assert_array_equal(part.unpacked(), landmarks[2:8])
  # Between two meshes of which one is cut off.
  assert np.isnan(track.part(1, 8).unpacked()[0]).all()


def test_track_without_a_mesh_has_none():
  track = meshes.Meshes(3, [], [], [])
  assert np.isnan(track.unpacked()).all()
  assert np.isnan(track.heights()).all()
  assert np.isnan(track[1]).all()


class StillFaces:
  """Finds the same faces in each frame, side by side."""

  def __init__(self, num_faces: int, distance: float) -> None:
    self._boxes = [
      np.array([10 + distance * k, 60, 40 + distance * k, 90.0])
      for k in range(num_faces)
    ]
    self._mesh = np.float32(30 * RNG.random((478, 3)))
    self._mesh[:2, :2] = [[0, 0], [30, 30]]

  def detect(self, frame):
    return [face_finder.Detection(box, 0.9, True) for box in self._boxes]

  def mesh_3d(self, frame, box):
    best = max(self._boxes, key=lambda face: boxes.overlap(face, box))
    return self._mesh + np.float32([*best[:2], 0])


@pytest.mark.parametrize(("distance", "times"), [(80, 1), (40, 2)])
def test_bytes_of_a_frame_and_face_are_as_stated(distance, times, monkeypatch):
  num_frames, num_faces = 200, 8
  opened = []

  class OpenTrack(tracking.OpenTrack):
    def __init__(self, *args):
      super().__init__(*args)
      opened.append(self)

  monkeypatch.setattr(tracking, "OpenTrack", OpenTrack)
  monkeypatch.setattr(quality, "sharpness", lambda frame, mesh: 0.5)
  frame = RNG.integers(0, 255, (120, 700, 3), np.uint8)
  tracks = tracking.find_tracks(
    (frame for _ in range(num_frames)), StillFaces(num_faces, distance)
  )
  assert [len(track) for track in tracks] == [num_frames] * num_faces
  for track in tracks:
    size = track.meshes.nbytes + track.boxes.nbytes
    assert size / num_frames <= 1.02 * times * meshes.FRAME_BYTES
  for track in opened:
    size = sum(map(size_of, track.observed))
    assert size / num_frames <= times * meshes.OPEN_FRAME_BYTES


def size_of(sighting) -> int:
  """Returns the bytes of a sighting with all that it alone refers to."""
  parts = [sighting.box, sighting.look, sighting.mesh]
  parts += [sighting.mesh.codes, sighting.mesh.bounds, sighting.frontality]
  for array in (sighting.box, sighting.look):
    assert array.base is None, "a view keeps what it is cut from"
  assert sighting.mesh.codes.base is None
  return sys.getsizeof(sighting) + sum(map(sys.getsizeof, parts))


def test_meshes_beyond_the_bytes_of_memory_are_in_a_file():
  points = 100 * RNG.random((20, meshes.NUM_LANDMARKS, 2)).astype(np.float32)
  packed = [meshes.PackedMesh.of(p) for p in points]
  tracks = [
    meshes.Meshes(20, range(20), packed, [False] + [True] * 19)
    for _ in range(3)
  ]
  expected = tracks[0].unpacked()
  store = meshes.MeshStore(tracks[0].nbytes)
  for track in tracks:
    store.take(track)
  kinds = [type(track._codes) for track in tracks]
  assert kinds == [np.ndarray, np.memmap, np.memmap]
  del store
  for track in tracks:
    np.testing.assert_array_equal(track.unpacked(), expected)
    np.testing.assert_array_equal(track.part(3, 9)[2], expected[5])


def test_long_tracks_are_cut_and_lose_no_frame(monkeypatch):
  monkeypatch.setattr(quality, "sharpness", lambda frame, mesh: 0.5)
  frame = RNG.integers(0, 255, (120, 300, 3), np.uint8)
  tracks = tracking.find_tracks(
    (frame for _ in range(155)), StillFaces(2, 80), max_track_secs=2.0
  )
  spans = [(track.first_frame, len(track)) for track in tracks]
  assert spans == [(0, 60)] * 2 + [(60, 60)] * 2 + [(120, 35)] * 2
  assert [track.continues for track in tracks] == [False] * 2 + [True] * 4
  # They are those of one face.
  (_, *rest) = main = main_face.largest(tracks[::-1])
  assert [t.first_frame for t in main] == [0, 60, 120]
  for track in rest:
    np.testing.assert_allclose(track.boxes[0], main[0].boxes[-1], atol=1e-3)
  for track in tracks:
    assert [len(track.meshes), track.quality_terms[1]] == [len(track), 0.5]
    num_missing = int(track.first_frame < 120)  # beside the cut
    assert np.isfinite(track.meshes.heights()).sum() == len(track) - num_missing
