"""Talking videos: faces and sound on one clock, for files of any format."""

import numpy as np
import pytest

from data_prep.faces import meshes, tracking
from data_prep.sources.manifest import Source
from data_prep.video import video_to_records
from marlin_jax.inference.face_windows import FaceVideoError, NoFaceError
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.scoring import talking_video
from marlin_jax.records import schema
from tests.support import talking_mouths
from tests.support.videos import moving_noise, write_video

CLAP = 30  # number of the frame


@pytest.fixture(scope="module")
def models(face_models):
  with video_to_records.Models() as models:
    yield models


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
  """An mp4 of a face, beside which a light turns on at a click."""
  frames = list(talking_mouths.talk(0, 50).frames)
  for frame in frames[CLAP:]:
    frame[10:60, 5:40] = 255
  click = np.zeros(50 * 640, np.int16)
  click[CLAP * 640] = 30_000
  path = tmp_path_factory.mktemp("clap") / "clap.mp4"
  return talking_mouths.write_mp4(path, frames, click)


def first_flash(frames) -> int:
  """Returns the first frame in which the light is on."""
  light = np.array([f[:80, :60].mean() for f in frames])
  return int(np.argmax(np.diff(light))) + 1


# --- A clap: a flash and a click at once --------------------------------------


def test_a_clap_is_seen_and_heard_at_the_same_sample(clap, models):
  video = talking_video.read(clap, models=models)
  assert len(video) == 50
  assert video.has_face.all()
  assert first_flash(video.frames) == CLAP
  np.testing.assert_array_equal(np.flatnonzero(video.sound), [CLAP * 640])


def test_a_clap_stays_one_in_a_prepared_record(clap, models):
  encoded = []
  video_to_records.process_video(
    Source("clap.mp4", clap, "", "train"),
    video_to_records.Settings(has_sound=True, fps=25.0),
    models,
    encoded.append,
  )
  (record,) = map(schema.decode, encoded)
  assert first_flash(schema.decode_frames(record, range(50))) == CLAP
  samples = np.frombuffer(record.audio, "<i2")
  np.testing.assert_array_equal(np.flatnonzero(samples), [CLAP * 640])
  # A click is loudest in the row around its own sample.
  heard = mel_windows.windows(record.mel, np.array([CLAP]), 5)[0]
  loudness = record.mel.mean(axis=1)
  np.testing.assert_array_equal(heard[0], record.mel[int(np.argmax(loudness))])


@pytest.mark.parametrize(
  ("rate", "num_channels"), [(8000, 1), (44_100, 2), (48_000, 1)]
)
def test_sound_of_any_format_is_on_time(tmp_path, rate, num_channels):
  frames = np.zeros((50, 64, 64, 3), np.uint8)
  frames[CLAP:] = 255
  samples = np.zeros(2 * rate, np.int16)
  tone = 16_000 * np.sin(2 * np.pi * 500 * np.arange(rate // 10) / rate)
  samples[CLAP * rate // 25 :][: len(tone)] = tone
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", frames, samples, rate=rate, num_channels=num_channels
  )
  video = talking_video.read(path, crop="frame")
  assert first_flash(video.frames) == CLAP
  loud = np.flatnonzero(np.abs(video.sound.astype(int)) > 3000)
  assert loud[0] / 640 == pytest.approx(CLAP, abs=0.1)


def test_pictures_that_begin_after_the_sound_keep_their_time(tmp_path):
  frames = np.zeros((40, 64, 64, 3), np.uint8)
  frames[CLAP:] = 255
  samples = np.zeros(50 * 640, np.int16)
  samples[(CLAP + 10) * 640] = 30_000
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", frames, samples, num_late=10
  )
  video = talking_video.read(path, crop="frame")
  assert first_flash(video.frames) == CLAP
  np.testing.assert_array_equal(np.flatnonzero(video.sound), [CLAP * 640])


@pytest.mark.parametrize("fps", [15, 30, 50])
def test_other_frame_rates_become_25(tmp_path, fps):
  frames = np.zeros((2 * fps, 64, 64, 3), np.uint8)
  frames[fps:] = 255
  samples = np.zeros(32_000, np.int16)
  samples[16_000] = 30_000
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", frames, samples, fps=fps)
  video = talking_video.read(path, crop="frame")
  assert len(video) == 50
  assert first_flash(video.frames) == 25
  np.testing.assert_array_equal(np.flatnonzero(video.sound), [25 * 640])


# --- Sound that is not as long as the pictures --------------------------------


@pytest.mark.parametrize(
  ("num_samples", "expected"),
  [(None, 0), (10_000, 10_000), (16_000, 12_800)],
  ids=["none", "shorter", "longer"],
)
def test_sound_is_never_longer_than_the_pictures_nor_filled_up(
  tmp_path, num_samples, expected
):
  samples = None if num_samples is None else np.ones(num_samples, np.int16)
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", np.zeros((20, 64, 64, 3), np.uint8), samples
  )
  assert talking_video.read(path, crop="frame").sound.shape == (expected,)


# --- Faces --------------------------------------------------------------------


def test_frames_without_a_face_are_told_and_black(tmp_path, models):
  said = talking_mouths.talk(1, 90)
  frames = said.frames.copy()
  frames[30:60] = frames[0, 0, 0]
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", frames, said.sound)
  video = talking_video.read(path, models=models)
  first, second = talking_video.stretches(video.has_face)
  assert (first.start, second.stop) == (0, 90)
  # At most the last frames of the face may count as frames without one.
  assert 28 <= first.stop <= 30
  assert 60 <= second.start <= 62
  np.testing.assert_array_equal(video.frames[~video.has_face], 0)
  np.testing.assert_array_equal(
    np.isnan(video.boxes).any(axis=1), ~video.has_face
  )
  assert len(video.sound) == 90 * 640
  whole = list(talking_video.pictures(path))
  assert len(whole) == 90
  assert whole[0].shape[:2] == video.frame_size == (224, 224)


def test_of_several_faces_the_longest_track_is_followed():
  def track(first_frame, num_frames, side):
    box = np.float32([0, 0, side, side])
    return tracking.Track(
      track_id=0,
      first_frame=first_frame,
      boxes=np.tile(box, (num_frames, 1)),
      meshes=meshes.Meshes(num_frames, [], [], []),
      quality=1.0,
      quality_terms=np.ones(4, np.float32),
    )

  others = [track(0, 40, 30), track(30, 50, 200)]
  boxes = talking_video._boxes([*others, track(60, 20, 60)], 100)
  # The longest; the others, which overlap it, are left out.
  assert np.isnan(boxes[:30]).all()
  np.testing.assert_array_equal(boxes[30:80, 2], 200)
  assert np.isnan(boxes[80:]).all()
  boxes = talking_video._boxes([*others[:1], track(45, 20, 60)], 100)
  np.testing.assert_array_equal(boxes[:40, 2], 30)
  np.testing.assert_array_equal(boxes[45:65, 2], 60)


def test_face_crops_are_taken_as_they_are(tmp_path):
  frames = np.full((5, 60, 80, 3), 200, np.uint8)
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", frames, None)
  video = talking_video.read(path, crop="frame")
  assert video.frames.shape == (5, 224, 224, 3)
  np.testing.assert_array_equal(video.boxes, np.tile([0, 0, 80, 60], (5, 1)))
  # As the scorers read them, without bars.
  assert video.frames.min() > 190


# --- Refusals -----------------------------------------------------------------


def test_a_video_without_a_face_is_refused(tmp_path, models):
  path = write_video(tmp_path / "v.mp4", moving_noise(20))
  with pytest.raises(NoFaceError, match=r"v\.mp4: no face found"):
    talking_video.read(path, models=models)


def test_damage_and_what_is_no_video_are_named(tmp_path):
  path = tmp_path / "v.mp4"
  path.write_text("no video")
  with pytest.raises(FaceVideoError, match=r"v\.mp4: cannot open"):
    talking_video.read(path, crop="frame")
  with pytest.raises(FaceVideoError, match=r"v\.mp4: cannot open"):
    list(talking_video.pictures(path))


def test_a_video_too_long_for_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(talking_video, "MAX_SECS", 1)
  path = write_video(tmp_path / "v.mp4", moving_noise(26), rate=25)
  with pytest.raises(FaceVideoError, match="longer than 1 s.*cut it"):
    talking_video.read(path, crop="frame")
