"""Real faces in scenes as in videos from the web."""

import cv2
import numpy as np
import pytest

from data_prep.faces import tracking
from data_prep.faces.track import frames_of
from data_prep.sources.manifest import Source
from data_prep.video import tracked, video_to_records
from marlin_jax.records import schema
from tests.support import scenes
from tests.support.videos import shared_video, write_video

HEIGHT, WIDTH = 288, 512
# At 30 frames per second.
MAX_GAP = 12


@pytest.fixture(scope="module")
def car(sample_videos) -> list[np.ndarray]:
  """A man in a car, 176x144, his face 56 pixels high."""
  return scenes.read(sample_videos / "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def man() -> list[np.ndarray]:
  """A man before a wall, 480x360, his face 105 pixels high."""
  return scenes.read(shared_video("video01.mp4"), 60)


@pytest.fixture(scope="module")
def close_up() -> list[np.ndarray]:
  """Another man's face alone, 224x224, played forwards and backwards."""
  frames = scenes.read(shared_video("cropped04.mp4"))
  return (frames + frames[-2:0:-1]) * 4


def spans(tracks: list[tracking.Track]) -> list[tuple[int, int]]:
  return [(t.first_frame, len(t)) for t in tracks]


def centres(track: tracking.Track) -> np.ndarray:
  return (track.boxes[:, :2] + track.boxes[:, 2:]) / 2


def sides(track: tracking.Track) -> np.ndarray:
  return track.boxes[:, 2] - track.boxes[:, 0]


# --- Several people -----------------------------------------------------------


def test_each_of_three_people_has_a_track(car, man, close_up, finder):
  frames = []
  for i in range(20):
    frame = scenes.room(360, 900)
    scenes.paste(frame, scenes.scaled(car[i], 1.5), 10, 100)
    scenes.paste(frame, man[i][:, 150:360], 330, 0)
    scenes.paste(frame, scenes.scaled(close_up[i], 0.6), 700, 80)
    frames.append(frame)
  tracks = tracking.find_tracks(frames, finder)
  assert spans(tracks) == [(0, 20)] * 3
  x = [centres(track)[:, 0].mean() for track in tracks]
  assert x == sorted(x)
  np.testing.assert_allclose(x, [140, 440, 765], atol=30)


def test_who_passes_before_another_does_not_take_over_his_track(
  man, close_up, finder
):
  frames = []
  for i in range(60):
    frame = scenes.room(360, 640)
    scenes.paste(frame, man[i], 80, 0)
    scenes.paste(frame, scenes.scaled(close_up[i], 0.5), 13 * i - 110, 120)
    frames.append(frame)
  tracks = tracking.find_tracks(frames, finder)
  by_length = sorted(tracks, key=len)
  (passing, staying) = by_length[-2:]
  assert len(staying) == 60
  assert np.ptp(centres(staying)[:, 0]) < 20
  # The person who passes moves with the scene and never stands still.
  steps = np.diff(centres(passing)[:, 0])
  assert len(passing) >= 30
  np.testing.assert_allclose(steps[10:-10], 13, atol=3)


# --- Shots --------------------------------------------------------------------


def test_shots_and_counter_shots_are_a_track_each(car, man, finder):
  car_shot = [cv2.resize(f, (352, 288)) for f in car]
  man_shot = [cv2.resize(f, (352, 288)) for f in man]
  frames = man_shot[:20] + car_shot[:20] + man_shot[20:40] + car_shot[20:40]
  tracks = tracking.find_tracks(frames, finder)
  assert spans(tracks) == [(0, 20), (20, 20), (40, 20), (60, 20)]


def test_cut_that_changes_only_the_face_splits_the_track(man, close_up, finder):
  # One room, with the second person in the place of the first: little of the
  # picture changes.
  frames = []
  for i in range(40):
    frame = scenes.room(360, 640)
    face = man[i][95:215, 195:320] if i < 20 else close_up[i][::2, ::2]
    scenes.paste(frame, face, 260, 120)
    frames.append(frame)
  tracks = tracking.find_tracks(frames, finder)
  assert spans(tracks) == [(0, 20), (20, 20)]


@pytest.mark.parametrize("length", [4, 10])
def test_dissolve_splits_the_track(length, car, man, finder):
  before = [cv2.resize(f, (352, 288)) for f in man]
  after = [cv2.resize(f, (352, 288)) for f in car]
  blend = [
    cv2.addWeighted(before[20 + i], 1 - share, after[i], share, 0)
    for i, share in enumerate(np.linspace(0, 1, length + 2)[1:-1])
  ]
  frames = before[:20] + blend + after[length : length + 20]
  first, second = tracking.find_tracks(frames, finder)
  assert first.first_frame == 0
  assert 20 <= len(first) <= 20 + length
  assert 20 <= second.first_frame <= 20 + length
  assert second.first_frame + len(second) == len(frames)


# --- Leaving and coming back --------------------------------------------------


def test_face_that_leaves_by_the_side_comes_back_as_a_new_track(
  close_up, finder
):
  frames = []
  for i in range(100):
    frame = scenes.room(300, 400)
    # 0 at both ends, 20 while the face is absent.
    away = min(max(35 - abs(i - 50), 0), 20)
    scenes.paste(frame, close_up[i], 120 + 19 * away, 40)
    frames.append(frame)
  first, second = tracking.find_tracks(frames, finder)
  assert first.first_frame == 0
  assert second.first_frame + len(second) == 100
  # While the edge cuts the face, the crop reaches past the frame and stays on
  # the face.
  for track in (first, second):
    seen = np.isfinite(track.landmarks[:, 4]).all(axis=-1)
    nose = track.landmarks[seen, 4]
    away = np.abs(nose - centres(track)[seen]) / sides(track)[seen, None]
    assert away.max() < 0.25


def test_gap_longer_than_the_limit_ends_a_track_and_a_shorter_one_does_not(
  car, finder
):
  def with_gap(num_frames):
    frames = []
    for i in range(32 + num_frames):
      frame = scenes.room(HEIGHT, WIDTH)
      scenes.paste(frame, car[i], 200, 80)
      if 16 <= i < 16 + num_frames:  # a person passes, seen from behind
        frame[100:195, 235:345] = (90, 100, 110)
      frames.append(frame)
    return tracking.find_tracks(frames, finder)

  assert spans(with_gap(MAX_GAP - 2)) == [(0, 30 + MAX_GAP)]
  longer = MAX_GAP + 4
  assert spans(with_gap(longer)) == [(0, 16), (16 + longer, 16)]


# --- Turned and covered -------------------------------------------------------


def test_face_that_turns_to_profile_and_back_is_one_track(man, finder):
  (track,) = tracking.find_tracks(man[:15], finder)
  mesh = finder.mesh_3d(man[5], track.boxes[5])
  angles = np.concatenate(
    [np.linspace(0, 85, 20), np.full(8, 85), np.linspace(85, 0, 20)]
  )
  frames = [scenes.turned(man[5], mesh, angle) for angle in angles]
  (track,) = tracking.find_tracks(frames, finder)
  assert len(track) == len(frames)
  has_mesh = np.isfinite(track.landmarks[:, 0, 0])
  # No mesh is invented where only half a face is visible.
  assert not has_mesh[22:26].any()
  assert has_mesh[:12].all()
  assert has_mesh[-12:].all()
  assert np.abs(np.diff(track.boxes, axis=0)).max() < 0.05 * sides(track).max()
  assert track.quality_terms[3] < 0.8


# Parts of the face's square that are covered.
COVERS = {
  "a hand over the mouth": (0.2, 0.6, 0.8, 0.95),
  "below the eyes": (0.0, 0.55, 1.0, 1.0),
  "above the nose": (0.0, 0.0, 1.0, 0.45),
  "one side": (0.0, 0.0, 0.42, 1.0),
  "a bar over the eyes": (0.0, 0.3, 1.0, 0.5),
}


@pytest.mark.parametrize("cover", COVERS)
def test_half_covered_face_stays_one_track_with_a_steady_crop(
  cover, man, finder
):
  x0, y0, x1, y1 = COVERS[cover]
  (free,) = tracking.find_tracks(man[:45], finder)
  x, y = free.boxes[20, :2]
  side = free.boxes[20, 2] - x
  frames = [frame.copy() for frame in man[:45]]
  for frame in frames[16:32]:
    frame[
      int(y + y0 * side) : int(y + y1 * side),
      int(x + x0 * side) : int(x + x1 * side),
    ] = (200, 150, 130)
  (track,) = tracking.find_tracks(frames, finder)
  assert spans([track]) == [(0, 45)]
  shift = np.abs(centres(track) - centres(free)) / side
  assert shift.max() < 0.15
  assert np.abs(sides(track) / sides(free) - 1).max() < 0.2


# --- Small --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("height", "width", "face"),
  [(360, 640, 30), (720, 1280, 60), (1080, 1920, 90)],
)
def test_small_face_in_a_large_picture_is_found(
  height, width, face, car, finder
):
  frames = []
  for i in range(15):
    frame = scenes.room(height, width)
    scenes.paste(
      frame, scenes.scaled(car[i], face / 56), width // 2, height // 3
    )
    frames.append(frame)
  (track,) = tracking.find_tracks(frames, finder)
  assert len(track) == 15
  assert np.isfinite(track.landmarks).all()
  assert track.quality_terms[0] == pytest.approx(face / 179, abs=0.05)


def test_face_below_the_limit_is_dropped(car, finder):
  frames = []
  for i in range(15):
    frame = scenes.room(180, 320)
    scenes.paste(frame, scenes.scaled(car[i], 20 / 56), 160, 60)
    frames.append(frame)
  assert tracking.find_tracks(frames, finder) == []


# --- Black bars ---------------------------------------------------------------

# Height and width of the frame, then the place of the picture in it.
BARS = {
  "letterbox": (500, 352, 0, 106),
  "pillarbox": (288, 900, 274, 0),
  "picture at the side": (288, 900, 548, 0),
  "postage stamp": (600, 900, 20, 300),
}


@pytest.mark.parametrize("bars", BARS)
def test_bars_change_nothing_but_the_place(bars, car, finder):
  height, width, x, y = BARS[bars]
  pictures = [scenes.scaled(frame, 2) for frame in car[:20]]
  frames = []
  for picture in pictures:
    frame = np.zeros((height, width, 3), np.uint8)
    scenes.paste(frame, picture, x, y)
    frames.append(frame)
  (plain,) = tracking.find_tracks(pictures, finder)
  (track,) = tracking.find_tracks(frames, finder)
  assert spans([track]) == spans([plain]) == [(0, 20)]
  moved = plain.boxes + np.tile(np.float32([x, y]), 2)
  assert np.abs(track.boxes - moved).max() < 0.05 * sides(plain).mean()


def test_upright_video_before_a_blurred_copy_of_itself_is_one_face(car, finder):
  frames = []
  for frame in car[:20]:
    picture = scenes.scaled(frame, 2)[:, 40:200]
    whole = cv2.GaussianBlur(cv2.resize(picture, (900, 1620)), (0, 0), 20)
    whole = whole[666:954].copy()
    scenes.paste(whole, picture, 370, 0)
    frames.append(whole)
  (track,) = tracking.find_tracks(frames, finder)
  assert spans([track]) == [(0, 20)]
  assert 130 < sides(track).mean() < 150


# --- Short --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("num_frames", "lengths"), [(1, [1]), (14, [14]), (15, [15]), (30, [30])]
)
def test_whole_video_shorter_than_a_clip_is_kept(
  num_frames, lengths, car, face_models, tmp_path
):
  path = write_video(tmp_path / "v.mp4", car[:num_frames], crf="10")
  assert record_lengths(path) == lengths


def test_glimpse_of_a_face_in_a_longer_video_is_not_kept(
  car, man, face_models, tmp_path
):
  wall = [cv2.resize(man[0][:100, :140], (176, 144))] * 20
  shortest = frames_of(tracked.MIN_TRACK_SECS, 30)
  frames = wall + car[: shortest - 1] + wall
  path = write_video(tmp_path / "v.mp4", frames, crf="10")
  assert record_lengths(path) == []
  frames = wall + car[:shortest] + wall
  path = write_video(tmp_path / "w.mp4", frames, crf="10")
  assert record_lengths(path) == [shortest]


def record_lengths(path) -> list[int]:
  encoded = []
  with video_to_records.Models() as models:
    video_to_records.process_video(
      Source("v.mp4", path, "", "train"),
      video_to_records.Settings(),
      models,
      encoded.append,
    )
  return [len(schema.decode(data)) for data in encoded]


# --- Jitter -------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0, 3, 8])
def test_crop_of_a_face_that_does_not_move_does_not_move(sigma, car, finder):
  frames = [scenes.noisy(car[5], sigma, seed=i) for i in range(45)]
  (track,) = tracking.find_tracks(frames, finder)
  side = sides(track).mean()
  # In pixels of the crop.
  steps = np.abs(np.diff(centres(track), axis=0)) * 224 / side
  zoom = np.abs(np.diff(sides(track))) * 224 / side
  assert steps.max() < 0.3
  assert zoom.max() < 0.3
  assert np.ptp(centres(track), axis=0).max() * 224 / side < 2


def test_crop_follows_a_steady_motion_without_lag(car, finder):
  frames = []
  for i in range(45):
    frame = scenes.room(HEIGHT, WIDTH)
    scenes.paste(frame, car[5], 20 + 4 * i, 60 + i)
    frames.append(frame)
  (track,) = tracking.find_tracks(frames, finder)
  relative = centres(track) - np.outer(np.arange(45), [4, 1])
  assert np.ptp(relative, axis=0).max() * 224 / sides(track).mean() < 4
