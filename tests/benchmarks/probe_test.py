"""Labels and scores of the probe benchmark."""

import dataclasses

import numpy as np
import pytest

from data_prep.faces import boxes, tracking
from tests.benchmarks import probe_data, probe_questions
from tests.benchmarks.probe_questions import Question, Windows
from tests.support import made_dataset


@pytest.fixture(scope="module")
def carphone(carphone_frames, finder) -> np.ndarray:
  """The face crops of frames 20 to 63 of the sample video."""
  frames = carphone_frames[20:64]
  (track,) = tracking.find_tracks(frames, finder)
  return np.stack(
    [
      boxes.crop_frame(frame, box)
      for frame, box in zip(frames, track.boxes, strict=True)
    ]
  )


@pytest.fixture(scope="module")
def landmarks(carphone, finder) -> np.ndarray:
  return probe_data.meshes(finder, carphone)


def test_mirrored_video_turns_the_head_the_other_way(
  carphone, finder, landmarks
):
  mirrored = probe_data.meshes(finder, carphone[:, :, ::-1].copy())
  turn = probe_data.head_turn(landmarks)
  other = probe_data.head_turn(mirrored)
  assert np.ptp(turn) > 0.2
  assert np.corrcoef(turn, -other)[0, 1] > 0.9
  for label in (probe_data.mouth_opening, probe_data.eye_opening):
    assert np.corrcoef(label(landmarks), label(mirrored))[0, 1] > 0.9


def test_mouth_that_opens_and_eyes_that_blink_are_seen(landmarks):
  # Seen by eye: he blinks at frame 42 and says "oh" at frame 60.
  mouth = probe_data.mouth_opening(landmarks)
  assert abs(int(mouth.argmax()) + 20 - 60) <= 2
  assert mouth.max() > 2 * np.median(mouth)
  eyes = probe_data.eye_opening(landmarks)
  assert abs(int(eyes.argmin()) + 20 - 42) <= 1
  assert eyes.min() < probe_questions.BLINK * np.percentile(eyes, 90)


def test_tilted_or_larger_face_has_the_same_labels(landmarks):
  angle = np.deg2rad(30)
  turned = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  other = 1.7 * landmarks @ turned + 20
  for label in (
    probe_data.head_turn,
    probe_data.mouth_opening,
    probe_data.eye_opening,
  ):
    np.testing.assert_allclose(label(other), label(landmarks), atol=1e-9)


def test_no_window_shows_a_frame_of_both_parts_and_pretraining_sees_one():
  num, cut = 100, 60
  record = made_dataset.a_record("video01", num_frames=num)
  record = dataclasses.replace(record, frames=[b"%d" % i for i in range(num)])
  footage = probe_data.Footage(
    "video01",
    record,
    np.zeros((num, 224, 224), np.uint8),
    np.random.default_rng(0).normal(size=(num, 478, 2)),
  )
  seen = {"early": set(), "late": set()}
  for name, (window,) in probe_data.windows_of(footage).items():
    assert len(window) == probe_data.WINDOW
    seen[name.split("/")[1]] |= {int(frame) for frame in window.frames}
  assert max(seen["early"]) < cut <= min(seen["late"])
  pretraining = [
    int(frame)
    for record in probe_data.pretraining_of(footage)
    for frame in record.frames
  ]
  assert pretraining == list(range(cut))


# --- Scores -------------------------------------------------------------------


def some_windows(labels: np.ndarray) -> Windows:
  """Half of carphone's and half of video01's, all of a late part."""
  num = len(labels) // 2
  return Windows(
    video=np.repeat(["carphone_pristine", "video01"], num),
    part=np.repeat(["late"], 2 * num),
    block=np.array([f"{i}" for i in range(2 * num)]),
    start=np.tile(np.arange(num) * probe_data.WINDOW, 2),
    labels=dict.fromkeys(probe_data.LABELS, labels),
  )


def ask(windows: Windows, targets: np.ndarray | None) -> Question:
  rows = np.arange(len(windows.video))
  return Question("it", 0.5, rows, rows, targets)


def score_of(question, windows, predictions) -> float:
  weights = np.ones((len(windows.video), 1))
  return float(
    probe_questions.score(question, windows, predictions, weights)[0]
  )


def test_knowing_the_video_alone_scores_chance():
  labels = np.arange(12.0)  # all of the second video's are higher
  windows = some_windows(labels)
  question = ask(windows, windows.above_own_median("head_turn"))
  of_video = (windows.video == "video01").astype(float)
  assert score_of(question, windows, of_video) == 0.5
  assert score_of(question, windows, labels) == 1.0
  # Scores that are shifted from video to video rank as well.
  assert score_of(question, windows, labels - 100 * of_video) == 1.0


def test_probe_tells_the_order_of_features_that_grow_with_time():
  windows = some_windows(np.zeros(12))
  np_rng = np.random.default_rng(0)
  grows = windows.start[:, None] + np_rng.normal(size=(12, 3))
  question = ask(windows, None)
  predictions = probe_questions.answers(question, windows, grows, [0.1])[0.1]
  assert score_of(question, windows, predictions) == 1.0
  noise = np_rng.normal(size=(12, 1))
  swapped = probe_questions.answers(question, windows, -noise, [0.1])[0.1]
  straight = probe_questions.answers(question, windows, noise, [0.1])[0.1]
  np.testing.assert_allclose(swapped, straight, atol=1e-5)


def test_windows_drawn_twice_count_twice():
  windows = some_windows(np.arange(4.0))
  question = ask(windows, np.array([0, 1, 0, 1.0]))
  predictions = np.array([0, 1, 1, 0.0])  # right, then wrong
  weights = np.array([[1, 1, 1, 1], [2, 2, 1, 1], [0, 2, 1, 1.0]]).T
  found = probe_questions.score(question, windows, predictions, weights)
  np.testing.assert_allclose(found, [1 / 2, 4 / 5, 0])


def test_nobody_new_is_asked_for_where_one_video_is_there():
  windows = dataclasses.replace(
    some_windows(np.arange(12.0)),
    video=np.repeat(["carphone_pristine"], 12),
    part=np.repeat(["early", "late"], 6),
  )
  names = [q.name for q in probe_questions.questions(windows)]
  assert names == [
    f"{what}, later"
    for what in ("head turn", "mouth open", "eyes closed", "order")
  ]
