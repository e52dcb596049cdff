"""Label maps of a segment equal those of an analysis of every frame."""

import av
import numpy as np
import pytest

from data_prep.faces import boxes, tracking
from data_prep.regions import track_labels
from data_prep.video import video_to_records
from marlin_jax.records import schema
from marlin_jax.records.schema import FRAME_SIZE

BOX = np.float32([0, 0, FRAME_SIZE, FRAME_SIZE])


class BrightPixels:
  """A parser of bright pixels; the mesh decides their region."""

  ANALYSIS_STEPS = 4

  def __init__(self) -> None:
    self.num_analyses = 0

  def parse(self, frame, box, landmarks):
    if landmarks is None or not np.isfinite(landmarks).all():
      return None
    return self.label(self.analyse(frame, box, landmarks), landmarks)

  def analyse(self, frame, box, landmarks):
    self.num_analyses += 1
    return 255 * (frame[..., :1] > 128).astype(np.uint8)

  def label(self, maps, points):
    return np.where(maps[..., 0] > 127, 10, 0).astype(np.uint8)


class EveryFrame:
  """The same, for a parser without separate analysis of the pixels."""

  def __init__(self) -> None:
    self._inner = BrightPixels()
    self.parse = self._inner.parse


def moving_square(num_frames: int) -> tuple[list[np.ndarray], np.ndarray]:
  """Frames with a bright square, and a mesh that moves with it."""
  frames, meshes = [], []
  mesh = np.random.default_rng(0).uniform(60, 120, (478, 2))
  for i in range(num_frames):
    frame = np.zeros((FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    x = 40 + 3 * i
    frame[50:90, x : x + 40] = 255
    frames.append(frame)
    meshes.append(mesh + [3 * i, 0])
  return frames, np.array(meshes, np.float32)


def run(parser, frames, meshes) -> list[np.ndarray | None]:
  labeller = track_labels.Labeller(parser, len(frames))
  for frame, mesh in zip(frames, meshes, strict=True):
    labeller.add(frame, BOX, mesh)
  return labeller.finish()


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 9, 12])
def test_what_was_seen_moves_with_the_face(num_frames):
  frames, meshes = moving_square(num_frames)
  two_step, plain = BrightPixels(), EveryFrame()
  expected = run(plain, frames, meshes)
  for i, labels in enumerate(run(two_step, frames, meshes)):
    np.testing.assert_array_equal(labels, expected[i])
  # The first, every fourth after it, and the last.
  assert two_step.num_analyses == 1 + -(-(num_frames - 1) // 4)


def test_frames_without_a_mesh_have_no_labels_and_the_others_all():
  frames, meshes = moving_square(12)
  meshes[[0, 1, 4, 5, 11]] = np.nan
  expected = run(EveryFrame(), frames, meshes)
  label_maps = run(BrightPixels(), frames, meshes)
  for i, labels in enumerate(label_maps):
    assert (labels is None) == (i in (0, 1, 4, 5, 11))
    if labels is not None:
      np.testing.assert_array_equal(labels, expected[i])


def test_real_labels_are_nearly_those_of_looking_in_every_frame(
  sample_videos, face_models, monkeypatch
):
  path = sample_videos / "carphone_pristine.mp4"
  with av.open(str(path)) as container:
    every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  every = every[:40]
  with video_to_records.Models() as models:
    (track,) = tracking.find_tracks(every, models.finder)
    assert np.isfinite(track.landmarks).all()
    labeller = track_labels.Labeller(models.parser, len(every))
    slow = []
    for i, frame in enumerate(every):
      box, box_now = track.boxes[i], boxes.bounds(track.landmarks[i])
      labeller.add(frame, box, track.landmarks[i])
      mesh = models.finder.mesh(frame, box_now)
      slow.append(models.parser.parse(frame, box, mesh))
    fast, slow = np.stack(labeller.finish()), np.stack(slow)
  assert (fast == slow).mean() > 0.97
  fast_bits, slow_bits = schema.region_bits(fast), schema.region_bits(slow)
  for code in range(1, len(schema.REGIONS)):
    agree = (fast_bits >> code) & 1 == (slow_bits >> code) & 1
    assert agree.mean() > 0.985, schema.REGIONS[code]
