"""Steps of the demo: what they return equals what the library does."""

import numpy as np
import pytest

from marlin_jax.browser.analysis import NUM_CLIPS, Analyser, Masking
from marlin_jax.inference import classifier
from marlin_jax.inference.clips import read_clips
from marlin_jax.inference.face_windows import FaceVideoError, NoFaceError
from marlin_jax.inference.marlin import Marlin
from tests.support.demo_models import make_classifier, make_weights
from tests.support.videos import moving_noise, write_video

NAMES = ("calm", "glad", "sad")


@pytest.fixture(scope="module")
def marlin():
  return Marlin(make_weights())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  return make_classifier(tmp_path_factory.mktemp("kept"), NAMES)


@pytest.fixture(scope="module")
def analyser(marlin, kept):
  return Analyser(marlin, classifier.VideoClassifier.load(kept), max_secs=20.0)


@pytest.fixture(scope="module")
def clip(face_models, carphone, tmp_path_factory):
  return carphone(tmp_path_factory.mktemp("video") / "face.mp4", 45)


@pytest.fixture(scope="module")
def reading(analyser, clip):
  shares = []
  result = analyser.read(clip, crop_face=True, progress=shares.append)
  assert shares[-1] == pytest.approx(1, abs=0.05)
  return result


def test_clips_are_those_that_the_library_reads(analyser, reading, clip):
  expected = read_clips(
    clip,
    analyser.marlin.architecture,
    crop_face=True,
    regions=True,
    num_clips=NUM_CLIPS,
  )
  for name in ("video", "frame_numbers", "regions"):
    np.testing.assert_array_equal(
      getattr(reading.clips, name), getattr(expected, name)
    )
  assert reading.has_face
  # The labels are of the very frames that the regions describe.
  from marlin_jax.records.schema import region_bits

  for labels, regions in zip(reading.labels, expected.regions, strict=True):
    np.testing.assert_array_equal(region_bits(labels), regions)


def test_large_pictures_have_the_strategies_that_need_no_regions(analyser):
  large = Analyser(Marlin(make_weights(image_size=256)), max_secs=20.0)
  assert large.strategies == ["random", "tube", "frame"]
  assert {"fasking", "crfr_p"} < set(analyser.strategies)


def test_features_are_those_of_the_overlapping_windows(
  analyser, reading, clip, marlin
):
  timeline = analyser.features(reading)
  features = marlin.extract_video(clip, crop_face=True, stride=2)
  assert timeline.values.shape == (len(features), 3)
  assert (np.diff(timeline.secs) > 0).all()
  centred = features - features.mean(0)
  total = (centred**2).sum()
  np.testing.assert_allclose(
    (timeline.values**2).sum(0) / total, timeline.variances, rtol=1e-3
  )
  # The best approximation by three components, whatever their signs.
  squares, vectors = np.linalg.eigh(centred @ centred.T)
  best = vectors[:, -3:] * squares[-3:] @ vectors[:, -3:].T
  np.testing.assert_allclose(
    timeline.values @ timeline.values.T, best, atol=1e-4 * total
  )


def test_scores_are_those_of_the_kept_model(analyser, reading, clip, kept):
  expected = Marlin.load_classifier(kept).predict(clip, crop_face=True)
  scores = analyser.scores(reading)
  assert tuple(scores.values) == NAMES
  np.testing.assert_allclose(
    list(scores.values.values()), expected.probabilities, atol=1e-6
  )
  assert scores.predicted == expected.predicted
  np.testing.assert_allclose(
    scores.by_window, expected.window_probabilities, atol=1e-6
  )


def test_a_model_of_other_windows_reads_the_video_itself(
  marlin, reading, clip, tmp_path
):
  path = make_classifier(tmp_path, NAMES, num_frames=2, stride=1)
  kept = Marlin.load_classifier(path)
  expected = kept.predict(clip, crop_face=True)
  scores = Analyser(marlin, kept, max_secs=20.0).scores(reading)
  np.testing.assert_allclose(
    scores.by_window, expected.window_probabilities, atol=1e-6
  )


def test_attention_and_reconstruction_are_those_of_the_clips(
  analyser, reading, marlin
):
  attention = analyser.attend(reading)
  assert {"skin", "nose", "background"} <= attention.ratios.keys()
  assert all(ratio > 0 for ratio in attention.ratios.values())
  assert attention.views.frames.shape[1:] == reading.clips.video.shape
  result = analyser.reconstruct(reading, Masking("fasking", 0.5, 3))
  expected = marlin.reconstruct(
    reading.clips.video, regions=reading.clips.regions, ratio=0.5, seed=3
  )
  np.testing.assert_array_equal(result.visible, expected.visible)
  assert result.loss_pixels == pytest.approx(expected.loss_pixels)


def test_reading_ends_at_the_time_given(marlin, clip):
  analyser = Analyser(marlin, max_secs=0.6)
  for crop_face in (True, False):
    reading = analyser.read(clip, crop_face=crop_face)
    assert 0.5 < reading.windows[-1].end_secs <= 0.6


def test_one_window_has_no_timeline(marlin, clip):
  reading = Analyser(marlin, max_secs=0.2).read(clip, crop_face=False)
  assert len(reading.windows) == 1
  assert Analyser(marlin, max_secs=0.2).features(reading) is None


def test_videos_without_a_face_and_no_videos_are_errors(
  face_models, analyser, tmp_path
):
  noise = write_video(tmp_path / "noise.mp4", moving_noise(20))
  with pytest.raises(NoFaceError):
    analyser.read(noise, crop_face=True)
  assert not analyser.read(noise, crop_face=False).has_face
  text = tmp_path / "text.mp4"
  text.write_text("no video")
  with pytest.raises(FaceVideoError):
    analyser.read(text, crop_face=True)
