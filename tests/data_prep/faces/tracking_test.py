"""Faces are found, tracked through shots and cropped without jitter."""

import ctypes
from pathlib import Path

import cv2
import numpy as np
import pytest
from mediapipe.tasks.python import vision

from data_prep.faces import boxes, face_finder, mediapipe_tasks, tracking
from tests.support import scenes
from tests.support.videos import shared_video


@pytest.fixture(scope="module")
def carphone_track(carphone_frames, finder) -> tracking.Track:
  (track,) = tracking.find_tracks(carphone_frames, finder)
  return track


def test_talking_man_is_one_track_through_the_whole_video(
  carphone_frames, carphone_track
):
  track = carphone_track
  assert (track.track_id, track.first_frame) == (0, 0)
  assert len(track) >= 0.95 * len(carphone_frames)
  assert track.boxes.shape == (len(track), 4)
  assert track.boxes.dtype == np.float32
  assert track.landmarks.shape == (len(track), 478, 2)
  assert track.landmarks.dtype == np.float32
  has_mesh = np.isfinite(track.landmarks).all(axis=(1, 2))
  assert has_mesh.mean() >= 0.95
  assert 0 < track.quality <= 1


def test_crops_are_square_and_hold_the_face(carphone_track):
  boxes, landmarks = carphone_track.boxes, carphone_track.landmarks
  sides = boxes[:, 2:] - boxes[:, :2]
  np.testing.assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-4)
  assert (landmarks.min(axis=1) > boxes[:, :2]).all()
  assert (landmarks.max(axis=1) < boxes[:, 2:]).all()
  heights = np.ptp(landmarks[..., 1], axis=1)
  assert 1.15 < np.median(sides[:, 0] / heights) < 1.4


def test_crop_path_jitters_less_than_the_mesh_does(carphone_track):
  boxes, landmarks = carphone_track.boxes, carphone_track.landmarks
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  mesh = (landmarks.min(axis=1) + landmarks.max(axis=1)) / 2

  def jitter(path):
    return np.abs(np.diff(path, n=2, axis=0)).mean()

  # Interpolated in every other frame, the mesh hides half of its own jitter.
  assert jitter(centres) < 0.25 * jitter(mesh)
  # Under a 300th of the side between one step and the next.
  sides = boxes[:, 2] - boxes[:, 0]
  assert np.abs(np.diff(centres, n=2, axis=0)).max() < sides.mean() / 300


def test_two_runs_give_the_same_bits_whatever_was_seen_between(
  carphone_frames, sample_videos, finder
):
  first = tracking.find_tracks(carphone_frames[:30], finder)
  tracking.find_tracks(scenes.read(sample_videos / "bikes.mp4", 40), finder)
  second = tracking.find_tracks(carphone_frames[:30], finder)
  assert len(first) == len(second) == 1
  np.testing.assert_array_equal(first[0].boxes, second[0].boxes)
  np.testing.assert_array_equal(first[0].landmarks, second[0].landmarks)
  assert first[0].quality == second[0].quality


def test_another_finder_gives_the_same_bits(carphone_frames, finder):
  first = tracking.find_tracks(carphone_frames[:16], finder)
  with face_finder.FaceFinder() as other:
    second = tracking.find_tracks(carphone_frames[:16], other)
  np.testing.assert_array_equal(first[0].boxes, second[0].boxes)
  np.testing.assert_array_equal(first[0].landmarks, second[0].landmarks)


def test_two_faces_side_by_side_are_two_tracks(carphone_frames, finder):
  double = [np.hstack([frame, frame]) for frame in carphone_frames[:20]]
  left, right = tracking.find_tracks(double, finder)
  assert (left.track_id, right.track_id) == (0, 1)
  shift = right.boxes - left.boxes
  np.testing.assert_allclose(shift[:, 0], carphone_frames[0].shape[1], atol=4)
  np.testing.assert_allclose(shift[:, 1], 0, atol=4)


def test_crowd_costs_a_bounded_number_of_tracks(carphone_frames, finder):
  crowd = [np.tile(frame, (3, 4, 1)) for frame in carphone_frames[:5]]
  tracks = tracking.find_tracks(crowd, finder, min_frames=5)
  assert [t.track_id for t in tracks] == list(range(tracking.MAX_FACES))
  assert all(len(track) == 5 for track in tracks)


def test_of_a_crowd_the_largest_faces_are_tracked(carphone_frames, finder):
  small = np.tile(carphone_frames[0], (3, 4, 1))
  large = cv2.resize(carphone_frames[0], None, fx=2, fy=2)
  crowd = small.copy()
  height, width = large.shape[:2]
  crowd[-height:, -width:] = large
  detected = finder.detect(crowd)
  assert len(detected) > tracking.MAX_FACES
  tracks = tracking.find_tracks([crowd] * 5, finder, min_frames=5)
  assert max(track.side for track in tracks) > 1.6 * np.median(
    [track.side for track in tracks]
  )


@pytest.mark.parametrize(
  ("rate", "secs", "frames"),
  [(30, 0.4, 12), (60, 0.4, 24), (10, 0.4, 4), (1, 0.1, 1), (0, 0.4, 12),
   (1000, 0.4, 12), (90000, 0.4, 12)],
)  # fmt: skip
def test_times_become_frames_at_a_plausible_rate(rate, secs, frames):
  assert tracking.frames_of(secs, rate) == frames


@pytest.mark.parametrize("rate", [15.0, 30.0, 60.0])
def test_path_of_the_crop_is_smoothed_over_the_same_time(rate, finder):
  # A face that shakes 3 times a second, by 4 pixels.
  shakes = 4 * np.sin(2 * np.pi * 3 * np.arange(2 * rate) / rate)

  class Shaken:
    def __init__(self):
      self._mesh = np.float32(60 * np.random.default_rng(0).random((478, 3)))

    def detect(self, frame):
      return [face_finder.Detection(np.array([60, 60, 120, 120.0]), 0.9, True)]

    def mesh_3d(self, frame, box):
      return self._mesh + np.float32([60 + shakes[frame[0, 0, 0]], 60, 0])

  picture = scenes.room(200, 200)
  frames = []
  for i in range(len(shakes)):
    frames.append(cv2.warpAffine(
      picture, np.float32([[1, 0, shakes[i]], [0, 1, 0]]), (200, 200),
      borderMode=cv2.BORDER_REFLECT,
    ))  # fmt: skip
    frames[-1][0, 0] = i
  (track,) = tracking.find_tracks(frames, Shaken(), frame_rate=rate)
  assert len(track) == len(shakes)
  x = (track.boxes[:, 0] + track.boxes[:, 2]) / 2
  left = np.ptp(x[len(x) // 4 : -len(x) // 4]) / np.ptp(shakes)
  # A Gaussian of 4/30 s leaves exp(-(2 pi 3 x 0.133)^2 / 2) = 4%.
  assert left < 0.15


def test_hard_cut_between_two_faces_splits_the_track(carphone_frames, finder):
  # The second shot shows a face in the same place, so overlap would join them.
  other = [255 - frame[:, ::-1] // 2 for frame in carphone_frames[:16]]
  tracks = tracking.find_tracks(carphone_frames[:16] + other, finder)
  assert [(t.first_frame, len(t)) for t in tracks][0] == (0, 16)
  assert all(t.first_frame >= 16 for t in tracks[1:])


def test_cut_to_another_scale_gives_one_track_per_shot(carphone_frames, finder):
  height, width = carphone_frames[0].shape[:2]
  close_up = [
    cv2.resize(frame[20:120, 40:160], (width, height))
    for frame in carphone_frames[:16]
  ]
  tracks = tracking.find_tracks(carphone_frames[:16] + close_up, finder)
  assert [(t.first_frame, len(t)) for t in tracks] == [(0, 16), (16, 16)]


def test_face_missed_for_a_few_frames_is_bridged(carphone_frames, finder):
  frames = [frame.copy() for frame in carphone_frames[:24]]
  for frame in frames[10:14]:  # an object passes in front of the face
    frame[30:110, 40:140] = frames[9][:20, :20].mean()
  (track,) = tracking.find_tracks(frames, finder)
  assert len(track) == 24
  missing = ~np.isfinite(track.landmarks).all(axis=(1, 2))
  assert missing[10:14].all()
  assert missing.sum() == 4
  assert np.isfinite(track.boxes).all()
  assert np.abs(np.diff(track.boxes, axis=0)).max() < 3


def test_face_that_leaves_ends_its_track(carphone_frames, finder):
  empty = np.full_like(carphone_frames[0], 90)
  (track,) = tracking.find_tracks(carphone_frames[:20] + [empty] * 20, finder)
  assert (track.first_frame, len(track)) == (0, 20)


@pytest.mark.slow  # prepare_test.py tells that the sample leaves them out
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_video_without_a_lasting_human_face_gives_no_track(
  name, sample_videos, finder
):
  # Hard cases: a man crosses the street for 14 frames, one less than a track
  # needs, then a cyclist appears in profile; and the face of a cartoon rabbit.
  assert tracking.find_tracks(scenes.read(sample_videos / name), finder) == []


def test_no_frames_and_blank_frames_give_no_track(finder):
  assert tracking.find_tracks([], finder) == []
  blank = [np.zeros((48, 64, 3), np.uint8)] * 16
  assert tracking.find_tracks(blank, finder) == []


def test_short_tracks_and_small_faces_are_dropped(carphone_frames, finder):
  assert tracking.find_tracks(carphone_frames[:10], finder) == []
  assert (
    len(tracking.find_tracks(carphone_frames[:10], finder, min_frames=10)) == 1
  )
  assert (
    tracking.find_tracks(carphone_frames[:15], finder, min_face_pixels=80) == []
  )


def test_single_frame_can_be_a_track(carphone_frames, finder):
  (track,) = tracking.find_tracks(carphone_frames[:1], finder, min_frames=1)
  assert len(track) == 1
  assert np.isfinite(track.boxes).all()


def test_face_crop_of_15_frames_is_kept(finder):
  (track,) = tracking.find_tracks(
    scenes.read(shared_video("cropped04.mp4")), finder
  )
  assert len(track) == 15


def test_small_letterboxed_face_is_followed(finder):
  (track,) = tracking.find_tracks(
    scenes.read(shared_video("video03.mp4"), 40), finder
  )
  assert (track.first_frame, len(track)) == (0, 40)


def test_source_box_of_crop_size_is_copied_exactly():
  frame = np.random.default_rng(0).integers(0, 256, (300, 280, 3), np.uint8)
  crop = boxes.crop_frame(frame, np.float32([20, 30, 244, 254]))
  np.testing.assert_array_equal(crop, frame[30:254, 20:244])


def test_box_past_the_border_is_zero_padded():
  frame = np.full((224, 224, 3), 200, np.uint8)
  crop = boxes.crop_frame(frame, np.float32([-56, -112, 168, 112]))
  assert (crop[:112] == 0).all()
  assert (crop[:, :56] == 0).all()
  assert (crop[112:, 56:] == 200).all()


def test_box_outside_the_frame_is_black():
  frame = np.full((64, 64, 3), 200, np.uint8)
  assert not boxes.crop_frame(frame, np.float32([500, 500, 600, 600])).any()


def test_shrinking_averages_the_area():
  # Stripes of one pixel would alias to stripes if single pixels were picked.
  frame = np.zeros((896, 896, 3), np.uint8)
  frame[:, ::2] = 200
  for shift in (0.0, 0.3):
    box = np.float32([shift, shift, 895 + shift, 895 + shift])
    inner = boxes.crop_frame(frame, box)[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 100).max() <= 40
  exact = boxes.crop_frame(frame, np.float32([0, 0, 896, 896]))
  np.testing.assert_array_equal(exact, 100)


def test_enlarging_keeps_places():
  frame = np.zeros((56, 56, 3), np.uint8)
  frame[14:28, 28:42] = 255
  crop = boxes.crop_frame(frame, np.float32([0, 0, 56, 56]))
  rows, columns = np.nonzero(crop[..., 0] > 127)
  assert (rows.min(), rows.max() + 1) == (56, 112)
  assert (columns.min(), columns.max() + 1) == (112, 168)


@pytest.mark.parametrize(
  "box", [[0, 0, 0, 0], [10, 10, 5, 20], [0, 0, np.nan, 4]]
)
def test_crop_refuses_a_box_without_area(box):
  with pytest.raises(ValueError, match="box"):
    boxes.crop_frame(np.zeros((8, 8, 3), np.uint8), np.float32(box))


def test_missing_system_library_says_what_to_install(monkeypatch):
  monkeypatch.setattr(
    vision.FaceDetector,
    "create_from_options",
    lambda _: ctypes.CDLL("libEGL_not_there.so.1"),
  )
  with (
    pytest.raises(mediapipe_tasks.ModelError) as error,
    mediapipe_tasks.open_task("FaceDetector", Path("any.tflite")),
  ):
    pass
  message = str(error.value)
  assert "libEGL_not_there.so.1" in message
  assert "libegl1 libgles2" in message


def test_opening_and_closing_the_models_prints_nothing(capfd):
  with face_finder.FaceFinder() as other:
    other.detect(np.zeros((64, 64, 3), np.uint8))
  assert capfd.readouterr() == ("", "")
