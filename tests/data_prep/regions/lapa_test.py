"""Label maps agree with anatomy and with the picture."""

import numpy as np
import pytest

from data_prep import assets
from data_prep.faces import tracking
from data_prep.regions import parsers
from marlin_jax.records.schema import REGIONS, region_bits
from tests.support import scenes
from tests.support.videos import shared_video

CODE = {name: code for code, name in enumerate(REGIONS)}
# Number of frames of each video that are parsed.
PARSED = (0, 8, 15)


@pytest.fixture(scope="module")
def models(finder):
  with parsers.open_parser() as parser:
    yield finder, parser


@pytest.fixture(
  scope="module",
  params=[
    "carphone_pristine.mp4",
    "video01.mp4",
    "video03.mp4",
    "cropped01.mp4",
    "cropped04.mp4",
  ],
)
def clip(
  request, models, sample_videos
) -> tuple[list[np.ndarray], tracking.Track]:
  """The first frames of a video of one face, and its track."""
  if request.param in assets.SAMPLE_VIDEOS:
    path = sample_videos / request.param
  else:
    path = shared_video(request.param)
  frames = scenes.read(path, PARSED[-1] + 1)
  (track,) = tracking.find_tracks(frames, models[0], min_frames=10)
  return frames, track


@pytest.fixture(scope="module")
def label_maps(clip, models) -> np.ndarray:
  frames, track = clip
  return np.stack(
    [
      models[1].parse(frames[i], track.boxes[i], track.landmarks[i])
      for i in PARSED
      if i < len(frames)
    ]
  )


def centre(labels: np.ndarray, *names: str) -> np.ndarray:
  """Returns the mean row and column of regions."""
  return np.argwhere(np.isin(labels, [CODE[name] for name in names])).mean(0)


def share(labels: np.ndarray, name: str) -> float:
  return float((labels == CODE[name]).mean())


def test_label_maps_are_codes_in_crop_coordinates(label_maps):
  assert label_maps.shape[1:] == (224, 224)
  assert label_maps.dtype == np.uint8
  assert label_maps.max() < len(REGIONS)
  assert region_bits(label_maps).any(axis=(1, 2)).all()


def test_eyes_above_nose_above_mouth(label_maps):
  for labels in label_maps:
    brows = centre(labels, "right_brow", "left_brow")[0]
    eyes = centre(labels, "right_eye", "left_eye")[0]
    nose = centre(labels, "nose")[0]
    upper_lip = centre(labels, "upper_lip")[0]
    lower_lip = centre(labels, "lower_lip")[0]
    assert brows < eyes < nose < upper_lip < lower_lip


def test_right_eye_and_brow_are_on_the_left_of_the_picture(label_maps):
  for labels in label_maps:
    assert centre(labels, "right_eye")[1] < centre(labels, "nose")[1]
    assert centre(labels, "nose")[1] < centre(labels, "left_eye")[1]
    assert centre(labels, "right_brow")[1] < centre(labels, "left_brow")[1]


def test_every_part_has_a_likely_size(label_maps):
  for labels in label_maps:
    assert 0.2 < share(labels, "skin") < 0.7
    assert 0.01 < share(labels, "nose") < 0.08
    for side in ("right", "left"):
      assert 0.0005 < share(labels, f"{side}_eye") < 0.02
      assert 0.002 < share(labels, f"{side}_brow") < 0.02
    assert 0.003 < share(labels, "upper_lip") < 0.03
    assert 0.003 < share(labels, "lower_lip") < 0.04


def test_hair_is_there_and_mostly_above_the_eyes(label_maps):
  for labels in label_maps:
    eyes = centre(labels, "right_eye", "left_eye")[0]
    rows = np.nonzero(labels == CODE["hair"])[0]
    assert len(rows) > 0.01 * labels.size
    assert (rows < eyes).mean() > 0.75


def test_inner_mouth_lies_between_the_lips(label_maps):
  for labels in label_maps:
    inner = centre(labels, "inner_mouth")[0]
    assert centre(labels, "upper_lip")[0] < inner
    assert inner < centre(labels, "lower_lip")[0]


def test_chin_is_skin_and_what_lies_below_is_background(clip, models):
  frames, track = clip
  labels = models[1].parse(frames[0], track.boxes[0], track.landmarks[0])
  chin = (track.landmarks[0, 152] - track.boxes[0, :2]) * (
    224 / (track.boxes[0, 2] - track.boxes[0, 0])
  )
  column, row = np.round(chin).astype(int)
  assert labels[row - 8, column] == CODE["skin"]
  assert (labels[min(row + 16, 223) :, column] == CODE["background"]).all()


def test_black_padding_is_background(clip, models):
  frames, track = clip
  # As if the frame ended at the middle of the face: only its right is shown.
  x = int((track.boxes[0, 0] + track.boxes[0, 2]) / 2)
  shift = np.float32([x, 0])
  labels = models[1].parse(
    np.ascontiguousarray(frames[0][:, x:]),
    track.boxes[0] - np.tile(shift, 2),
    track.landmarks[0] - shift,
  )
  x0, x1 = track.boxes[0, [0, 2]]
  edge = round(float((x - x0) * 224 / (x1 - x0)))
  assert (labels[:, : edge - 1] == CODE["background"]).all()
  assert (labels[:, edge + 1] == CODE["skin"]).any()


@pytest.mark.parametrize("bars", [(0, 60), (60, 0)])
def test_black_bars_in_the_video_are_background(bars, clip, models):
  # The bar cuts the head, and the person mask would continue in it.
  frames, track = clip
  box, side = track.boxes[0], track.boxes[0, 2] - track.boxes[0, 0]
  x = max(int(box[0] + 0.2 * side), 0)
  y = max(int(box[1] + 0.15 * side), 0)
  frame = frames[0].copy()
  if bars[0]:
    frame[:y] = 0
  else:
    frame[:, :x] = 0
  labels = models[1].parse(frame, box, track.landmarks[0])
  row, column = (
    int((v - o) * 224 / side) for v, o in ((y, box[1]), (x, box[0]))
  )
  bar = (
    labels[: max(row - 1, 0)] if bars[0] else labels[:, : max(column - 1, 0)]
  )
  assert (bar == CODE["background"]).all()
  assert (labels == CODE["skin"]).any()


def test_same_frame_gives_the_same_labels_later(clip, label_maps, models):
  frames, track = clip
  again = models[1].parse(frames[0], track.boxes[0], track.landmarks[0])
  np.testing.assert_array_equal(again, label_maps[0])


def test_mirrored_picture_mirrors_right_and_left(clip, models):
  frames, track = clip
  mirrored = np.ascontiguousarray(frames[0][:, ::-1])
  box = track.boxes[0]
  landmarks = models[0].mesh(mirrored, _mirrored(box, mirrored.shape[1]))
  labels = models[1].parse(
    mirrored, _mirrored(box, mirrored.shape[1]), landmarks
  )
  # The mirror image of a right eye looks like a left eye.
  assert centre(labels, "right_eye")[1] < centre(labels, "left_eye")[1]


def _mirrored(box: np.ndarray, width: int) -> np.ndarray:
  return np.float32([width - box[2], box[1], width - box[0], box[3]])


def test_dark_frame_still_has_hair_and_skin(clip, models):
  frames, track = clip
  dark = frames[0] // 8
  labels = models[1].parse(dark, track.boxes[0], track.landmarks[0])
  assert share(labels, "skin") > 0.2
  eyes = centre(labels, "right_eye", "left_eye")[0]
  rows = np.nonzero(labels == CODE["hair"])[0]
  assert (rows < eyes).mean() > 0.8


def test_without_a_mesh_nothing_is_parsed(clip, models):
  frames, track = clip
  nothing = np.full((478, 2), np.nan, np.float32)
  assert models[1].parse(frames[0], track.boxes[0], None) is None
  assert models[1].parse(frames[0], track.boxes[0], nothing) is None
