"""Comparison of drawn mouths with the originals."""

import json

import cv2
import numpy as np
import pytest

from data_prep.video import video_to_records
from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.generation import blending
from marlin_jax.lipsync.scoring import mouths, report, score, talking_video
from tests.lipsync.scoring.score_test import MouthJudge
from tests.support import talking_mouths


@pytest.fixture(scope="module")
def models(face_models):
  with video_to_records.Models() as models:
    yield models


@pytest.fixture(scope="module")
def folders(carphone_frames, models, tmp_path_factory):
  """Originals of a man, and videos with other mouths, of the same names."""
  root = tmp_path_factory.mktemp("mouths")
  frames = list(carphone_frames[:24])
  sound = talking_mouths.talk(0, 24).sound
  original = talking_mouths.write_mp4(root / "originals/a.mp4", frames, sound)
  found = talking_video.read(original, models=models)
  # A mouth that is pulled down by a tenth of the face.
  other = []
  for frame, box in zip(frames, found.boxes, strict=True):
    lower = box + (box[3] - box[1]) * np.float32([0, -0.1, 0, -0.1])
    x0, y0, x1, y1 = lower.round().astype(int)
    face = cv2.copyMakeBorder(frame, 200, 200, 200, 200, cv2.BORDER_REPLICATE)
    face = face[200 + y0 : 200 + y1, 200 + x0 : 200 + x1]
    side = max(face.shape[:2])
    other.append(blending.paste(frame, cv2.resize(face, (side, side)), box))
  for name, drawn in (("same", frames), ("other", other)):
    talking_mouths.write_mp4(root / name / "a.mp4", drawn, sound)
  return root


def test_other_mouth_is_further_from_the_original_than_a_copy(folders, models):
  same, other = (
    mouths.compare(
      folders / name / "a.mp4", folders / "originals/a.mp4", models
    )
    for name in ("same", "other")
  )
  assert same.num_frames == other.num_frames == 24
  assert same.mouth_psnr > 35
  assert same.mouth_ssim > 0.97
  assert same.landmark_distance < 0.6
  assert other.mouth_psnr < same.mouth_psnr - 5
  assert other.mouth_ssim < same.mouth_ssim - 0.02
  assert other.landmark_distance > 2 * same.landmark_distance


def test_scores_of_mouths_are_beside_those_of_sync(folders, tmp_path):
  results = score.score(
    [folders / "other"],
    tmp_path / "out",
    MouthJudge(),
    originals=folders / "originals",
    are_face_crops=True,
  )
  written = json.loads((tmp_path / "out/scores.json").read_text())
  (video,) = written["videos"]
  for metric in mouths.METRICS:
    assert video[metric] == written["mean"][metric] == results["mean"][metric]
  header = (tmp_path / "out/scores.txt").read_text().splitlines()[0]
  assert header.split()[2:7] == ["mouth_d", "mouth_c", *mouths.METRICS]


def test_a_mouth_without_a_mesh_has_no_distance(
  folders, carphone_frames, models, tmp_path
):
  black = talking_mouths.write_mp4(
    tmp_path / "a.mp4", np.zeros_like(carphone_frames[:3]), None
  )
  lost = mouths.compare(black, folders / "originals/a.mp4", models)
  assert lost.num_frames == 3
  assert np.isnan(lost.landmark_distance)
  found = lost._replace(landmark_distance=2.0)
  results = {"videos": [{"video": n} for n in "ab"], "metrics": [], "mean": {}}
  report.add_mouths(results, {"a": lost, "b": found}, {})
  assert [v["landmark_distance"] for v in results["videos"]] == [None, 2.0]
  assert results["mean"]["landmark_distance"] == 2.0
  assert results["mean"]["mouth_psnr"] == lost.mouth_psnr


def test_videos_that_are_no_pair_are_told(folders, models, tmp_path):
  with pytest.raises(score.ScoreError, match=r"no original .*a\.mp4"):
    score.score(
      [folders / "other"], tmp_path / "out", MouthJudge(), originals=tmp_path
    )
  small = talking_mouths.write_mp4(
    tmp_path / "a.mp4", np.zeros((3, 64, 64, 3), np.uint8), None
  )
  with pytest.raises(FaceVideoError, match="64 x 64 pixels"):
    mouths.compare(small, folders / "originals/a.mp4", models)


def test_ssim_is_the_published_one():
  """Transcribed with explicit windows."""
  np_rng = np.random.default_rng(0)
  a = np.repeat(np_rng.integers(256, size=(16, 18, 1)), 3, axis=2)
  b = np.clip(a + np_rng.integers(-40, 40, size=(16, 18, 1)), 0, 255)
  a, b = a.astype(np.uint8), b.astype(np.uint8)
  x = np.arange(11) - 5
  w = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
  w /= w.sum()
  values = []
  for i in range(6):
    for j in range(8):
      p, q = (v[i : i + 11, j : j + 11, 0].astype(float) for v in (a, b))
      mp, mq = (w * p).sum(), (w * q).sum()
      vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
      c = (w * (p - mp) * (q - mq)).sum()
      c1, c2 = 6.5025, 58.5225
      values.append(
        (2 * mp * mq + c1)
        * (2 * c + c2)
        / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
      )
  assert mouths.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)
  assert mouths.ssim(a, a) == pytest.approx(1)


def test_psnr_is_of_the_peak_255():
  a = np.zeros((8, 8, 3), np.uint8)
  assert mouths.psnr(a, a + 51) == pytest.approx(20 * np.log10(5))
  assert mouths.psnr(a, a) == pytest.approx(100)
