"""Scoring of video files with sound of any format."""

import csv
import json

import cv2
import jax
import numpy as np
import pytest
from flax import nnx

from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.networks.syncnet import SyncNet
from marlin_jax.lipsync.scoring import (
  face_crops,
  frame_features,
  judges,
  mfcc,
  offsets,
  score,
  talking_video,
)
from marlin_jax.records import mel_spectrogram
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.weights.architecture import Architecture
from tests.support import labelled_data, talking_mouths

NUM_FRAMES = 60


class MouthJudge:
  """Compares the darkness of the mouth with the loudness of the sound.

  Correct for the videos of talking_mouths.
  """

  name = "mouths"
  metric_names = ("mouth_d", "mouth_c")
  num_frames = 5
  crop = face_crops.RECORD

  def embeddings(self, frames, sound):
    num = judges.num_windows(len(frames), len(sound), self.num_frames)
    mouths = frames[:, 158:190, 96:128].astype(float)
    mel = mel_spectrogram.mel_spectrogram(sound)
    frame_mels = mel_windows.windows(mel, np.arange(len(frames)), 1)
    windows = np.arange(num)[:, None] + np.arange(self.num_frames)
    return (
      _standard(-mouths.mean(axis=(1, 2, 3)))[windows],
      _standard(10 ** (frame_mels.mean(axis=(1, 2)) / 4))[windows],
    )


def _standard(values):
  return (values - values.mean()) / values.std()


def talk(person=0, num_frames=NUM_FRAMES):
  return talking_mouths.talk(person, num_frames)


def shifted(samples, num_frames):
  """Returns the sound moved by `num_frames`, padded with silence."""
  moved = np.roll(samples, 640 * num_frames)
  if num_frames > 0:
    moved[: 640 * num_frames] = 0
  elif num_frames < 0:
    moved[640 * num_frames :] = 0
  return moved


def score_videos(videos, output, **options):
  options = {"are_face_crops": True} | options
  return score.score([videos], output, MouthJudge(), **options)


def test_files_of_others_are_not_replaced(tmp_path):
  (tmp_path / "scores.csv").write_text("of the user")
  with pytest.raises(OutputFolderError, match=r"scores\.csv"):
    score_videos(tmp_path / "none", tmp_path)
  (tmp_path / "scores.json").write_text('{"goals": 3}')
  with pytest.raises(OutputFolderError, match=r"scores\.json"):
    score_videos(tmp_path / "none", tmp_path)


# --- Offsets of files ---------------------------------------------------------


def test_sound_that_is_moved_by_k_frames_moves_the_offset_by_k(tmp_path):
  shifts = {"early": -6, "late": 9, "true": 0}
  for name, shift in shifts.items():
    talking_mouths.write_mp4(
      tmp_path / f"videos/{name}.mp4",
      talk().frames,
      shifted(talk().sound, shift),
    )
  results = score_videos(tmp_path / "videos", tmp_path / "out")
  assert {v["video"]: v["offset"] for v in results["videos"]} == {
    f"{name}.mp4": -shift for name, shift in shifts.items()
  }
  assert results["share_in_sync"] == pytest.approx(1 / 3)
  # The offset is where the curve of the video is lowest.
  for video in results["videos"]:
    lowest = results["offsets"][int(np.argmin(video["curve"]))]
    assert lowest == video["offset"]
    assert min(video["curve"]) == video["mouth_d"]


@pytest.mark.parametrize(
  ("rate", "num_channels"), [(8000, 1), (44_100, 2), (48_000, 1)]
)
def test_sound_of_any_format_gives_the_same_offset(
  tmp_path, rate, num_channels
):
  wave = shifted(talk().sound, 4)
  times = np.arange(len(wave) * rate // 16_000) / rate
  resampled = np.interp(times, np.arange(len(wave)) / 16_000, wave)
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4",
    talk().frames,
    resampled.astype(np.int16),
    rate=rate,
    num_channels=num_channels,
  )
  (video,) = score_videos(path, tmp_path / "out")["videos"]
  assert video["offset"] == -4
  assert video["num_unheard"] <= 1


def test_frames_without_the_tracked_face_are_not_scored(tmp_path, face_models):
  frames = talk(1, 90).frames.copy()
  frames[35:60] = frames[0, 0, 0]
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", frames, shifted(talk(1, 90).sound, 3)
  )
  (video,) = score_videos(path, tmp_path / "out", are_face_crops=False)[
    "videos"
  ]
  assert 25 <= video["num_faceless"] <= 30
  # Two stretches; none of the windows is partly without a face.
  assert video["num_windows"] == 90 - video["num_faceless"] - 2 * 5


def test_sound_that_ends_early_is_scored_as_far_as_it_goes(tmp_path):
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", talk().frames, talk().sound[: 40 * 640]
  )
  (video,) = score_videos(path, tmp_path / "out")["videos"]
  assert (video["num_unheard"], video["num_windows"]) == (20, 35)
  assert video["offset"] == 0


# --- Videos that cannot be scored ---------------------------------------------


def test_videos_that_cannot_be_scored_are_left_out_with_a_reason(tmp_path):
  frames, samples = talk().frames, talk().sound
  for name, own_frames, sound in (
    ("good", frames, samples),
    ("mute", frames, None),
    ("silent", frames, np.zeros_like(samples)),
    ("short", frames[:5], samples[: 5 * 640]),
    ("briefly heard", frames, samples[: 5 * 640]),
  ):
    talking_mouths.write_mp4(tmp_path / f"videos/{name}.mp4", own_frames, sound)
  (tmp_path / "videos/broken.mp4").write_text("no video")
  results = score_videos(tmp_path / "videos", tmp_path / "out")
  assert [v["video"] for v in results["videos"]] == ["good.mp4"]
  reasons = results["left_out"]
  assert "cannot open" in reasons.pop("broken.mp4")
  assert reasons == {
    "mute.mp4": "it has no sound track",
    "silent.mp4": "its sound is silent from beginning to end",
    "short.mp4": "it has no 6 consecutive frames with a face and sound: of 5 "
    "frames, 5 have a face and 5 have sound",
    "briefly heard.mp4": "it has no 6 consecutive frames with a face and "
    "sound: of 60 frames, 60 have a face and 5 have sound",
  }
  table = (tmp_path / "out/scores.txt").read_text()
  assert "left out: 5 videos" in table
  assert "1 x it has no sound track (e.g. 'mute.mp4')" in table


def test_an_error_has_the_reasons_if_no_video_can_be_scored(tmp_path):
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", talk().frames, None)
  with pytest.raises(score.ScoreError, match="it has no sound track.*v.mp4"):
    score_videos(path, tmp_path / "out")


# --- Files --------------------------------------------------------------------


def test_scores_are_written_as_json_csv_table_and_chart(tmp_path):
  for person in range(2):
    spoken = talk(person)
    talking_mouths.write_mp4(
      tmp_path / f"videos/{person}.mp4", spoken.frames, spoken.sound
    )
  results = score_videos(tmp_path / "videos", tmp_path / "out", max_offset=8)
  written = json.loads((tmp_path / "out/scores.json").read_text())
  assert written == json.loads(json.dumps(results))
  assert written["offsets"] == list(range(8, -9, -1))
  with (tmp_path / "out/scores.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["video"] for row in rows] == ["0.mp4", "1.mp4"]
  mean = np.mean([float(row["mouth_d"]) for row in rows])
  assert results["mean"]["mouth_d"] == pytest.approx(mean)
  table = (tmp_path / "out/scores.txt").read_text()
  assert "100% of 2 videos are within a frame of sync, by mouths" in table
  assert (tmp_path / "out/offsets.png").read_bytes()[:4] == b"\x89PNG"


def test_lse_keeps_its_published_name_on_syncnets_own_crops_alone(
  tmp_path, face_models
):
  """By default SyncNet sees its own crops, and an expert those of records."""
  spoken = talk(0, 30)
  path = talking_mouths.write_mp4(
    tmp_path / "v.mp4", spoken.frames, spoken.sound
  )
  seen = {}

  class Looks(MouthJudge):
    def embeddings(self, frames, sound):
      seen[self.crop] = frames
      return super().embeddings(frames, sound)

  class LooksAsSyncNet(Looks):
    crop = judges.SyncNetJudge.crop
    metric_names = judges.SyncNetJudge.metric_names

  for judge in (Looks(), LooksAsSyncNet()):
    results = score.score([path], tmp_path / judge.crop, judge)
    assert results["crop"] == judge.crop
    assert ("lse_d" in results["mean"]) == (judge.crop == face_crops.SYNCNET)
  table = (tmp_path / face_crops.SYNCNET / "scores.txt").read_text()
  assert "LSE-D" in table
  assert "as of SyncNet's pipeline" in table
  # Its crop is larger, with grey beyond the frame, and the mouth is higher.
  assert (seen[face_crops.SYNCNET] == 110).all(axis=-1).mean() > 0.1
  assert not np.array_equal(seen["syncnet"], seen["record"])


def test_syncnets_crop_is_that_of_its_pipeline():
  side, shift = 200.0, 3.0
  crops = np.array([[40 + shift * i, 30, 0, 0] for i in range(30)])
  crops[:, 2:] = crops[:, :2] + side
  crops[12:14] = np.nan
  boxes = face_crops.syncnet_boxes(crops)
  assert np.isnan(boxes[12:14]).all()
  # run_pipeline.py: from y - s to y + 1.8 s, x -+ 1.4 s, where s is half the
  # longer side of the face, 0.4 of the record's crop.
  s, x, y = 0.4 * side, 40 + shift * 5 + side / 2, 30 + side / 2
  want = [x - 1.4 * s, y - s, x + 1.4 * s, y + 1.8 * s]
  np.testing.assert_allclose(boxes[5], want)

  frame = np.zeros((260, 300, 3), np.uint8)
  frame[..., 0] = np.arange(300) * 255 // 300
  crop = face_crops.syncnet_crop(frame, boxes[5])
  top, left, wide = int(y - s), int(x - 1.4 * s), int(2.8 * s)
  padded = np.pad(frame, ((300, 300), (300, 300), (0, 0)), constant_values=110)
  part = padded[300 + top :, 300 + left :][:wide, :wide]
  error = np.abs(crop.astype(int) - cv2.resize(part, (224, 224)))
  assert error.mean() < 1
  assert (crop == 110).all(axis=-1).any()


# --- Judges -------------------------------------------------------------------


def with_random_weights(make):
  """Returns a network in evaluation mode, faster than initialised by nnx."""
  np_rng = np.random.default_rng(0)

  def draw(x):
    if len(x.shape) < 2:  # norms and biases
      return np.ones(x.shape, np.float32)
    return np_rng.normal(0, 0.05, x.shape).astype(np.float32)

  graphdef, state = nnx.split(nnx.eval_shape(make))
  network = nnx.merge(graphdef, jax.tree.map(draw, state))
  network.eval()
  return network


@nnx.jit
def embed_faces(network, x):
  return network.faces(x)


@nnx.jit
def embed_sound(network, x):
  return network.sound(x)


def test_syncnet_gets_bgr_frames_and_the_coefficients_from_each_frame_on():
  network = with_random_weights(lambda: SyncNet(rngs=nnx.Rngs(0)))
  spoken = talk(0, 7)
  faces, sounds = judges.SyncNetJudge(network, batch_size=1).embeddings(
    spoken.frames, spoken.sound
  )
  assert faces.shape == sounds.shape == (2, 1024)
  window = spoken.frames[1:6, :, :, ::-1].astype(np.float32)
  np.testing.assert_allclose(
    faces[1], embed_faces(network, window[None])[0], rtol=1e-4, atol=1e-4
  )
  rows = mfcc.mfcc(spoken.sound)[4:24].astype(np.float32)
  np.testing.assert_allclose(
    sounds[1], embed_sound(network, rows[None])[0], rtol=1e-4, atol=1e-4
  )


def test_an_expert_gets_windows_like_those_of_its_training():
  num_frames = 16
  network = with_random_weights(
    lambda: SyncExpert(num_frames, width=0.125, rngs=nnx.Rngs(0))
  )
  judge = judges.ExpertJudge(network, batch_size=1)
  spoken = talk(0, num_frames + 2)
  faces, sounds = judge.embeddings(spoken.frames, spoken.sound)
  assert len(faces) == len(sounds) == 2
  video = spoken.frames[1 : 1 + num_frames][None] / np.float32(255)
  mel = mel_windows.windows(
    mel_spectrogram.mel_spectrogram(spoken.sound), np.array([1]), num_frames
  )
  np.testing.assert_allclose(
    faces[1], embed_faces(network, video)[0], atol=1e-5
  )
  np.testing.assert_allclose(sounds[1], embed_sound(network, mel)[0], atol=1e-5)
  assert not {"lse_d", "lse_c"} & set(judge.metric_names)
  assert np.isfinite(
    offsets.measure([offsets.distances(faces, sounds)]).curve
  ).all()


# --- Frechet distances --------------------------------------------------------


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
  """Folders with a video of one person, and of another one without sound."""
  path = tmp_path_factory.mktemp("sets")
  made, real = talk(0, 20), talk(1, 20)
  talking_mouths.write_mp4(path / "made/v.mp4", made.frames, made.sound)
  talking_mouths.write_mp4(path / "real/v.mp4", real.frames, None)
  return path / "made", path / "real"


def write_inception(path, size=frame_features.INCEPTION_SIZE):
  """Writes a network that projects mean colours to 2048 features."""
  import onnx
  from onnx import TensorProto, helper, numpy_helper

  weights = np.random.default_rng(0).normal(size=(2048, 3, 1, 1)) / 50
  graph = helper.make_graph(
    [
      helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
      helper.make_node("Conv", ["mean", "w"], ["wide"]),
      helper.make_node("Flatten", ["wide"], ["out"], axis=1),
    ],
    "inception",
    [
      helper.make_tensor_value_info(
        "x", TensorProto.FLOAT, ["N", 3, size, size]
      )
    ],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 2048])],
    [numpy_helper.from_array(weights.astype(np.float32), "w")],
  )
  opsets = [helper.make_opsetid("", 17)]
  onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
  return path


def test_without_a_network_the_distance_is_not_called_fid(two_sets, tmp_path):
  made, real = two_sets
  results = score_videos(made, tmp_path, reals=[real])["frechet"]
  assert (results["metric"], results["size"]) == ("frechet_pixels", 192)
  assert (results["num_features"], results["num_real_features"]) == (20, 20)
  text = (tmp_path / "scores.txt").read_text()
  assert "frechet_pixels" in text
  assert "FID" not in text
  same = score_videos(made, tmp_path, reals=[made])["frechet"]
  assert same["value"] < 1e-9 < results["value"]


def test_fid_uses_the_given_network(two_sets, tmp_path):
  made, real = two_sets
  features = frame_features.InceptionFeatures(
    write_inception(tmp_path / "inception.onnx")
  )
  results = score_videos(made, tmp_path, reals=[real], features=features)[
    "frechet"
  ]
  assert (results["metric"], results["size"]) == ("fid", 2048)
  text = (tmp_path / "scores.txt").read_text()
  assert f"FID {results['value']:.4g}, of 20 and 20" in text
  assert "it comes out too high" in text
  # Images are enlarged, and colours are in [0, 1].
  white = features(np.full((1, 224, 224, 3), 255, np.uint8))
  half = features(np.full((1, 224, 224, 3), 51, np.uint8))
  np.testing.assert_allclose(half, white / 5, rtol=1e-4, atol=1e-6)


def test_marlin_features_are_per_clip_and_not_called_fid(tmp_path):
  tiny = Architecture(
    width=32,
    depth=1,
    num_heads=2,
    mlp_dim=64,
    num_frames=4,
    image_size=224,
    patch_size=56,
    tubelet_size=2,
  )
  weights = labelled_data.write_random(tmp_path / "marlin", tiny)
  features = frame_features.open_features(str(weights))
  assert features.metric_name == "frechet_marlin"
  assert features(talk(0, 11).frames).shape == (2, 32)
  assert features(talk(0, 3).frames).shape == (0, 32)


def test_files_that_are_no_feature_network_are_refused(tmp_path):
  (tmp_path / "bad.onnx").write_text("no network")
  write_inception(tmp_path / "small.onnx", size=224)
  for name, reason in (
    ("none.onnx", "there is no feature network"),
    ("bad.onnx", "onnxruntime does not open"),
    ("small.onnx", "'N', 3, 224, 224"),
  ):
    with pytest.raises(frame_features.FeatureError) as e:
      frame_features.open_features(str(tmp_path / name))
    assert str(tmp_path / name) in str(e.value)
    assert reason in str(e.value)


def test_a_single_real_face_is_an_error(two_sets, tmp_path):
  made, _ = two_sets
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", talk().frames[:1], None)
  assert len(talking_video.read(path, crop="frame")) == 1
  with pytest.raises(score.ScoreError, match="20 of the videos and 1 of"):
    score_videos(made, tmp_path / "out", reals=[path])
  # What the videos took to read and judge is kept.
  written = json.loads((tmp_path / "out" / "scores.json").read_text())
  assert written["videos"]
  assert "frechet" not in written
