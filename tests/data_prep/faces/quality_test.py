"""Each term of the quality ranks real faces above degraded copies."""

import cv2
import numpy as np
import pytest

from data_prep import assets
from data_prep.faces import boxes, face_finder, meshes, quality, tracking
from tests.support import scenes
from tests.support.videos import shared_video

SIZE, SHARPNESS, POSE, LANDMARKS = range(4)
NUM_FRAMES = 15


@pytest.fixture(
  scope="module",
  params=["carphone_pristine.mp4", "video01.mp4", "cropped04.mp4"],
)
def frames(request, sample_videos) -> list[np.ndarray]:
  """A face of 56, 105 or 195 pixels."""
  if request.param in assets.SAMPLE_VIDEOS:
    path = sample_videos / request.param
  else:
    path = shared_video(request.param)
  return scenes.read(path, NUM_FRAMES)


@pytest.fixture(scope="module")
def track(frames, finder) -> tracking.Track:
  (track,) = tracking.find_tracks(frames, finder)
  return track


def terms(frames, finder) -> np.ndarray:
  (track,) = tracking.find_tracks(frames, finder)
  return track.quality_terms


def height(track) -> float:
  sides = track.boxes[:, 2] - track.boxes[:, 0]
  return float(np.median(sides)) / boxes.CROP_RATIO


def test_terms_are_shares_and_quality_is_their_geometric_mean(track):
  assert track.quality_terms.shape == (4,)
  assert track.quality_terms.dtype == np.float32
  assert (track.quality_terms >= 0).all()
  assert (track.quality_terms <= 1).all()
  assert track.quality == pytest.approx(
    np.exp(np.log(track.quality_terms).mean()), rel=1e-5
  )


def test_one_bad_term_spoils_the_whole_but_ties_are_told_apart():
  good, blurred = np.float32([1, 1, 1, 1]), np.float32([1, 0, 1, 1])
  assert quality.combine(good) == 1
  assert 0 < quality.combine(blurred) < 0.4
  worse = np.float32([0.5, 0, 1, 1])
  assert quality.combine(worse) < quality.combine(blurred)


def test_size_is_the_height_of_the_face_over_that_in_a_full_crop(
  track, frames, finder
):
  expected = min(height(track) / (224 / 1.25), 1)
  assert track.quality_terms[SIZE] == pytest.approx(expected, abs=0.01)
  half = terms([scenes.scaled(f, 0.5) for f in frames], finder)
  assert half[SIZE] == pytest.approx(height(track) / 2 / 179.2, abs=0.03)


def test_sharpness_falls_with_blur_and_with_enlarging(track, frames, finder):
  sharpness = [track.quality_terms[SHARPNESS]]
  for share in (0.015, 0.03):
    sigma = share * height(track)
    blurred = [cv2.GaussianBlur(f, (0, 0), sigma) for f in frames]
    sharpness.append(terms(blurred, finder)[SHARPNESS])
  assert sharpness[0] > 0.4
  assert sharpness[1] < 0.6 * sharpness[0]
  assert sharpness[2] < 0.1
  # An enlarged video has the size, but not the detail.
  factor = 100 / height(track)
  enlarged = [scenes.scaled(scenes.scaled(f, factor / 4), 4) for f in frames]
  native = [scenes.scaled(f, factor) for f in frames]
  if factor < 1:
    small, large = terms(enlarged, finder), terms(native, finder)
    assert small[SIZE] == pytest.approx(large[SIZE], abs=0.03)
    assert small[SHARPNESS] < 0.4 * large[SHARPNESS]


def measured_sharpness(frames, track) -> float:
  return float(
    np.median(
      [
        quality.sharpness(frame, landmarks)
        for frame, landmarks in zip(frames, track.landmarks, strict=True)
      ]
    )
  )


def test_noise_is_not_sharpness(track, frames):
  clean = measured_sharpness(frames, track)
  for sigma in (5, 10, 20):
    noisy = [scenes.noisy(f, sigma, i) for i, f in enumerate(frames)]
    assert measured_sharpness(noisy, track) < clean + 0.03
    blurred = [
      scenes.noisy(cv2.GaussianBlur(f, (0, 0), 0.03 * height(track)), sigma, i)
      for i, f in enumerate(frames)
    ]
    assert measured_sharpness(blurred, track) < 0.15


def test_sharpness_does_not_depend_on_light(track, frames):
  clean = measured_sharpness(frames, track)
  dark = measured_sharpness([frame // 4 for frame in frames], track)
  assert dark == pytest.approx(clean, abs=0.1)


def test_plain_surface_has_no_sharpness(track, frames):
  plain = np.full_like(frames[0], 128)
  assert quality.sharpness(plain, track.landmarks[0]) == 0


def test_pose_falls_as_a_face_turns_away(track, frames, finder):
  mesh = finder.mesh_3d(frames[5], track.boxes[5])

  def pose(degrees: float) -> float:
    both = [
      terms([scenes.turned(frames[5], mesh, d)] * NUM_FRAMES, finder)[POSE]
      for d in (degrees, -degrees)
    ]
    return float(np.mean(both))

  # The mesh of such a picture shows less than the whole turn.
  front, half_way, far = pose(0), pose(30), pose(50)
  assert front > 0.95
  assert far < half_way - 0.03
  assert half_way < front - 0.01


def test_frontality_is_the_cosine_of_the_turn():
  mesh = np.zeros((478, 3))
  mesh[[234, 454]] = [[-50, 0, 0], [50, 0, 0]]
  mesh[[10, 152]] = [[0, -70, 0], [0, 70, 0]]
  for degrees in (0, 20, 60, 90):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    yaw = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    pitch = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    assert quality.frontality(mesh @ yaw) == pytest.approx(c, abs=1e-9)
    assert quality.frontality(mesh @ pitch) == pytest.approx(c, abs=1e-9)
  assert quality.frontality(mesh @ np.diag([-1, 1, -1])) == 0


def test_uprightness_falls_beyond_a_tilt_of_30_degrees():
  expected = {0: 1, 29: 1, 45: 0.816, 60: 0.577, 90: 0, 120: 0, 180: 0}
  for degrees, value in expected.items():
    for turn in (np.deg2rad(degrees), -np.deg2rad(degrees)):
      mesh = np.zeros((478, 3))
      mesh[152, :2] = 70 * np.sin(turn), 70 * np.cos(turn)
      assert quality.uprightness(mesh) == pytest.approx(value, abs=1e-3)
  assert quality.uprightness(np.zeros((478, 3))) == 0


def test_face_on_its_side_is_worse_than_upright(track, frames, finder):
  lying = [np.rot90(frame).copy() for frame in frames]
  tracks = tracking.find_tracks(lying, finder)
  # Or not found at all. The mesh of a large face tilts less than the face.
  assert all(t.quality_terms[POSE] < 0.8 for t in tracks)
  assert all(t.quality < 0.8 * track.quality for t in tracks)


class OneStillFace:
  """Finds one face, in frames that are not black."""

  def __init__(self):
    self._mesh = np.float32(60 * np.random.default_rng(0).random((478, 3)))

  def detect(self, frame):
    box = np.array([20, 20, 80, 80.0])
    return [face_finder.Detection(box, 0.9, True)] if frame.any() else []

  def mesh_3d(self, frame, box):
    return self._mesh + 20 if frame.any() else None


@pytest.mark.parametrize(
  ("rate", "num_frames", "expected"),
  [(30.0, 60, 6), (60.0, 120, 6), (10.0, 20, 6), (30.0, 4, 1), (30.0, 1, 1)],
)
@pytest.mark.parametrize("lead", [0, 20, 21])
def test_sharpness_is_sampled_evenly_wherever_a_shot_begins(
  lead, rate, num_frames, expected, monkeypatch
):
  measured = []

  def sharpness(frame, mesh):
    measured.append(frame[0, 0, 0])
    return 0.2 if frame[0, 0, 0] == 100 else 0.6

  monkeypatch.setattr(quality, "sharpness", sharpness)
  face = np.random.default_rng(0).integers(110, 140, (100, 100, 3), np.uint8)
  frames = [np.zeros_like(face)] * lead
  for i in range(num_frames):
    frames.append(face.copy())
    frames[-1][0, 0, 0] = 100 + i
  (track,) = tracking.find_tracks(
    frames, OneStillFace(), frame_rate=rate, min_frames=1
  )
  # The first frame, which may be blurred, counts only where it is the only one.
  value = 0.2 if num_frames <= 4 else 0.6
  assert track.quality_terms[SHARPNESS] == np.float32(value)
  counted = [number for number in measured if number != 100]
  assert len(counted) == (expected if num_frames > 4 else 0)
  if len(counted) > 1:
    assert np.ptp(np.diff(np.int64(counted))) <= 2


def test_frames_without_a_mesh_count_against_the_landmarks(track):
  packed = [meshes.PackedMesh.of(mesh) for mesh in track.landmarks]
  ones = np.ones(3)

  def term(rows):
    some = meshes.Meshes(15, rows, [packed[i] for i in rows], [False] * 15)
    return quality.terms(ones, ones, ones, some)[LANDMARKS]

  whole, holes = term(range(15)), term([*range(5), *range(9, 15)])
  assert holes == pytest.approx(whole * 11 / 15, abs=0.03)


def test_landmarks_that_shake_count_less(track):
  landmarks = track.landmarks
  assert quality.steadiness(landmarks) > 0.8
  rng = np.random.default_rng(0)
  shaken = [
    quality.steadiness(
      landmarks + rng.normal(0, share * height(track), landmarks.shape)
    )
    for share in (0.01, 0.05)
  ]
  assert quality.steadiness(landmarks) > shaken[0] > shaken[1]
  # A head that moves as a whole does not shake.
  moved = landmarks + 5 * np.float32(rng.normal(size=(len(landmarks), 1, 2)))
  assert quality.steadiness(moved) == pytest.approx(
    quality.steadiness(landmarks), abs=1e-3
  )
  assert quality.steadiness(landmarks[:2]) == 1
