"""Generation of videos: blending, frames, sound, metadata and errors."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from data_prep.faces import boxes
from data_prep.video import decode, video_to_records
from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.generation import (
  blending,
  drawing,
  feeding,
  frame_stream,
  video_writer,
)
from marlin_jax.lipsync.generation import generate as generation
from marlin_jax.lipsync.generation.drawing import FaceDrawer
from marlin_jax.lipsync.generation.frame_stream import (
  SourceVideo,
  there_and_back,
)
from marlin_jax.lipsync.generation.generate import (
  GenerationError,
  generate,
  load_generator,
)
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import split_network
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import WeightsError
from tests.support.sounds import CLICK_SECS, clicks, write_sound
from tests.support.videos import moving_noise, write_video


@pytest.fixture(scope="module")
def models(face_models):
  with video_to_records.Models() as models:
    yield models


class Copy(nnx.Module):
  """Returns the reference, so that all differences are due to blending."""

  num_frames = 5
  image_size = 224
  mixes_frames = False

  def __call__(self, masked, reference, mels):
    return reference


class Meter(Copy):
  """Shows the loudness of the frame itself, rows 3 to 6 of its 16, as grey."""

  image_size = 32

  def __call__(self, masked, reference, mels):
    level = mels[:, :, 3:7].max((2, 3))[..., None, None, None] / 8 + 0.5
    return jnp.broadcast_to(level, reference.shape)


def textured(height: int, width: int) -> np.ndarray:
  """Returns soft waves, about as detailed as a face, uint8 (H, W, 3)."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)]
  return np.uint8(128 + 100 * np.stack(waves, axis=-1))


def decoded(path: Path) -> np.ndarray:
  with decode.open_video(path) as video:
    return np.stack([frame for frame, _ in video])


def loud_secs(path: Path) -> np.ndarray:
  """Returns the times at which the clicks of a file begin."""
  with decode.open_sound(path) as sound:
    loud = np.abs(np.concatenate(list(sound))[:, 0].astype(int)) > 3000
    secs = np.flatnonzero(loud) / sound.rate
  return secs[np.insert(np.diff(secs) > 0.1, 0, True)]


# --- Blending -----------------------------------------------------------------


def test_only_the_lower_half_of_the_face_changes():
  frame = np.stack(moving_noise(1, 160, 120)[0])
  box = np.float32([30.3, 10.6, 100.9, 81.2])
  white = np.full((96, 96, 3), 255, np.uint8)
  out = blending.paste(frame, white, box)
  y, x = np.mgrid[:120, :160] + 0.5
  ratio_x, ratio_y = (x - box[0]) / 70.6, (y - box[1]) / 70.6
  inside = blending.opacity(ratio_x, ratio_y) > 0
  np.testing.assert_array_equal(out[~inside], frame[~inside])
  assert not inside[: int(box[1] + 70.6 / 2)].any()
  mouth = np.hypot(ratio_x - 0.5, ratio_y - 0.72) < 0.12
  assert (out[mouth] == 255).all()


@pytest.mark.parametrize(
  "shift", [(-40, 0), (70, 0), (0, -40), (0, 60), (-60, 60), (500, 0)]
)
def test_box_that_reaches_past_the_frame_is_cut_off(shift):
  large, margin = textured(320, 360), 100
  frame = large[margin:-margin, margin:-margin]
  picture = moving_noise(1, 96, 96)[0]
  box = np.array([50.5, 40.25, 120.5, 110.25]) + np.tile(shift, 2)
  want = blending.paste(large, picture, box + margin)
  got = blending.paste(frame, picture, box)
  want = want[margin:-margin, margin:-margin]
  # OpenCV rounds positions to 1/32 of a pixel, from the corner of each image.
  assert np.abs(got.astype(int) - want).max() <= 4


@pytest.mark.parametrize("side", [60.7, 224.0, 390.2])
def test_pasting_an_unchanged_face_changes_nothing_visible(side):
  frame = textured(420, 460)
  box = np.float32([31.4, 12.8, 31.4 + side, 12.8 + side])
  out = blending.paste(frame, boxes.crop_frame(frame, box), box)
  assert np.abs(out.astype(int) - frame).max() <= 6


@pytest.mark.parametrize("side", [50.0, 96.0, 250.0])
def test_pasted_pixels_keep_their_position(side):
  picture = np.zeros((96, 96, 3), np.uint8)
  picture[66:72, 40:46] = 255  # centre (43, 69)
  box = np.array([20.3, 30.8, 20.3 + side, 30.8 + side])
  out = blending.paste(np.zeros((320, 320, 3), np.uint8), picture, box)
  weights = out[..., 0] / out[..., 0].sum()
  y, x = np.mgrid[:320, :320] + 0.5
  assert (weights * x).sum() == pytest.approx(20.3 + side * 43 / 96, abs=0.1)
  assert (weights * y).sum() == pytest.approx(30.8 + side * 69 / 96, abs=0.1)


# --- Frames -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("num_frames", "total", "want"),
  [
    (3, 8, [0, 1, 2, 1, 0, 1, 2, 1]),
    (2, 5, [0, 1, 0, 1, 0]),
    (1, 3, [0, 0, 0]),
    (9, 4, [0, 1, 2, 3]),
  ],
)
def test_short_video_goes_back_and_forth_without_jumps(num_frames, total, want):
  assert there_and_back(num_frames, total).tolist() == want


def test_windows_cover_every_frame_with_a_face_and_no_cut():
  track = np.repeat([-1, 2, 0, -1, 0], [3, 12, 4, 1, 5])
  windows = drawing.windows(track, 5)
  assert all(len(set(track[window])) == 1 for window in windows)
  covered = np.unique(np.concatenate(windows))
  np.testing.assert_array_equal(covered, np.flatnonzero(track >= 0))
  assert [int(window[0]) for window in windows] == [3, 8, 10, 15, 20]
  assert windows[3].tolist() == [15, 16, 17, 18, 18]


def test_windows_of_a_generator_that_mixes_frames_overlap():
  track = np.repeat([-1, 0], [2, 38])
  starts = [int(w[0]) for w in drawing.windows(track, 16, overlap=4)]
  assert starts == [2, 14, 24]
  weights = drawing.fade(16, 4)
  # Where two windows share 4 frames, their weights cross.
  np.testing.assert_allclose(weights[-4:] + weights[:4], 1)


class Uneven(Copy):
  """Draws each window in a grey of its own, black and white in turn."""

  num_frames, image_size, mixes_frames = 16, 32, True

  def __call__(self, masked, reference, mels):
    grey = jnp.round(mels[:, :1, 0, 0] / 8 + 0.5)
    return jnp.broadcast_to(grey[..., None, None, None], reference.shape)


def test_no_jump_is_seen_where_windows_meet():
  num, overlap = 64, 4
  # The loudness of rows changes every 12 frames, as windows do.
  mel = np.full((220, 80), -4, np.float32)
  for start in range(0, num, 24):
    mel[int(3.2 * start) - 4 : int(3.2 * (start + 12)) - 8] = 4
  box = np.tile(np.float32([20, 10, 80, 70]), (num, 1))
  faces = drawing.Boxes(box, box, np.zeros(num, int))
  frames = [np.full((90, 100, 3), 128, np.uint8)] * num
  drawn = drawing.Drawing(drawing.FaceDrawer(Uneven()), mel, faces).run(frames)
  levels = np.array([frame[53, 50, 0] for frame in drawn], float)
  assert np.ptp(levels) == 255
  steps = np.abs(np.diff(levels))
  assert steps.max() <= 255 / (overlap + 1) + 1


# --- Published weights --------------------------------------------------------


def test_published_weights_hear_and_see_what_their_script_gives_them():
  published = feeding.PublishedFeeding()
  mel = np.repeat(np.arange(100, dtype=np.float32)[:, None], 80, axis=1)
  heard = published.sound(mel, np.arange(32))[:, :, 0]
  # inference.py: mel[:, int(80 / 25 * i)], and the last 16 rows at the end.
  first = [min(int(80.0 / 25 * i), 100 - 16) for i in range(32)]
  np.testing.assert_array_equal(heard, np.add.outer(first, np.arange(16)))
  # Weights that were trained here hear from the frame before on.
  ours = feeding.Feeding().sound(mel, np.arange(1, 20))[:, 0, 0]
  np.testing.assert_array_equal(ours, first[:19])

  frame = textured(120, 160)
  crops = np.float32([[20.4, -30.2, 120.4, 69.8], [np.nan] * 4])
  seen = published.boxes(crops, (160, 120))
  assert seen[0].tolist() == [38, 0, 102, 63]
  assert np.isnan(seen[1]).all()
  want = cv2.resize(frame[0:63, 38:102], (96, 96))
  np.testing.assert_array_equal(published.picture(frame, seen[0], 96), want)


def test_face_of_a_narrow_box_is_pasted_by_the_mask_of_the_crop():
  frame = np.zeros((240, 260, 3), np.uint8)
  crop = np.array([20.0, 10.0, 220.0, 210.0])
  (box,) = feeding.WAV2LIP_FRAMING.boxes(crop[None])
  white = np.full((96, 96, 3), 255, np.uint8)
  level = blending.paste(frame, white, box, crop)[..., 0].astype(float)
  y, x = np.mgrid[:240, :260] + 0.5
  inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
  assert not level[~inside].any()
  # The chin of an open mouth, at 0.9 of the crop, is drawn anew.
  assert level[10 + int(0.9 * 200) - 2, 120] > 200
  assert level[10 + int(0.74 * 200), 120] == 255
  # It ends softly.
  assert np.abs(np.diff(level, axis=0)).max() < 100
  assert np.abs(np.diff(level, axis=1)).max() < 100


def test_frames_are_streamed_there_and_back(
  carphone, models, tmp_path, monkeypatch
):
  video = SourceVideo(carphone(tmp_path / "v.mkv", 24), 25, models)
  # Backwards in parts of four frames, which do not divide the video.
  monkeypatch.setattr(frame_stream, "_HELD_BYTES", 4 * 3 * 176 * 144)
  n = video.num_frames
  forward = list(video.frames(n))
  for frame, i in zip(
    video.frames(2 * n), there_and_back(n, 2 * n), strict=True
  ):
    np.testing.assert_array_equal(frame, forward[i])


# --- Writing ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rate", "num_channels", "written_rate"),
  [
    (8000, 1, 8000),
    (44_100, 2, 44_100),
    (48_000, 2, 48_000),
    (9999, 1, 48_000),
  ],
)
def test_written_sound_is_on_time(tmp_path, rate, num_channels, written_rate):
  path = tmp_path / "v.mp4"
  wave = np.repeat(clicks(rate)[:, None], num_channels, axis=1)
  with video_writer.VideoWriter(path, (64, 48), 25, rate, num_channels) as w:
    for pixels in moving_noise(50):
      w.add_frame(pixels)
    for part in np.array_split(wave, 7):
      w.add_sound(part)
  with av.open(str(path)) as container:
    (pictures, sound) = container.streams
    assert (pictures.frames, pictures.average_rate) == (50, 25)
    assert pictures.pix_fmt == "yuv420p"
    assert sound.rate == written_rate
    assert sound.codec_context.layout.nb_channels == num_channels
    # The padding of the last AAC frame is not counted.
    assert sound.duration * sound.time_base == pytest.approx(2, abs=1e-3)
  # AAC's 1024 priming samples, 128 ms at 8 kHz, are skipped.
  assert loud_secs(path) == pytest.approx(CLICK_SECS, abs=1e-3)


def test_odd_size_is_made_even_and_colours_are_kept(tmp_path):
  path = tmp_path / "v.mp4"
  colour = np.array([200, 40, 90])
  with video_writer.VideoWriter(path, (65, 47), 25, 8000, 1) as writer:
    for _ in range(5):
      writer.add_frame(np.full((47, 65, 3), colour, np.uint8))
    writer.add_sound(np.zeros((1600, 1), np.int16))
  frames = decoded(path)
  assert frames.shape == (5, 48, 66, 3)
  assert np.abs(frames - colour).max() <= 3


def test_failure_keeps_the_existing_file(tmp_path):
  path = tmp_path / "v.mp4"
  path.write_bytes(b"before")

  def write_half() -> None:
    with video_writer.VideoWriter(path, (64, 48), 25, 8000, 1) as writer:
      writer.add_frame(moving_noise(1)[0])
      raise RuntimeError("the generator has failed")

  with pytest.raises(RuntimeError, match="generator"):
    write_half()
  assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
  assert path.read_bytes() == b"before"


# --- Whole videos -------------------------------------------------------------


@pytest.fixture(scope="module")
def talk(carphone_frames, tmp_path_factory) -> Path:
  """Video of 12 frames of noise, then 30 of a man, 175 x 143; no sound."""
  path = tmp_path_factory.mktemp("talk") / "talk.mkv"
  frames = moving_noise(12, 175, 143)
  frames += [frame[:143, :175] for frame in carphone_frames[:30]]
  return write_video(path, frames, rate=25, crf="10", preset="veryfast")


@pytest.fixture(scope="module")
def voice(tmp_path_factory) -> Path:
  """Audio file of 2 s of clicks, 44.1 kHz, stereo."""
  path = tmp_path_factory.mktemp("voice") / "voice.wav"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
    wave = np.repeat(clicks(44_100), 2)[None]
    frame = av.AudioFrame.from_ndarray(wave, "s16", "stereo")
    frame.sample_rate, frame.time_base = 44_100, Fraction(1, 44_100)
    frame.pts = 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def test_video_is_as_long_as_its_sound_and_keeps_its_faceless_frames(
  talk, voice, models, tmp_path
):
  outcome = generate(
    FaceDrawer(Copy()), talk, voice, tmp_path / "out.mp4", models=models
  )
  assert (outcome.num_frames, outcome.num_source_frames) == (50, 42)
  assert outcome.num_without_face == 12
  notices = "\n".join(outcome.notices())
  assert "12 of these frames show no face" in notices
  assert "backwards and forwards" in notices
  assert "AI-generated" in outcome.notices()[-1]
  want = decoded(talk)[there_and_back(42, 50)]
  got = decoded(outcome.path)
  assert got.shape == (50, 144, 176, 3)
  error = np.abs(got[:, :143, :175].astype(int) - want).mean((1, 2, 3))
  # The remaining error is the encoder's: no other frame is as close.
  assert error[12:].max() < 4
  others = np.abs(got[20, :143, :175].astype(int) - want).mean((1, 2, 3))
  assert others.argmin() == 20
  assert loud_secs(outcome.path) == pytest.approx(CLICK_SECS, abs=1e-3)


def test_drawn_mouth_fits_the_sound_of_its_time(talk, voice, models, tmp_path):
  outcome = generate(
    FaceDrawer(Meter()), talk, voice, tmp_path / "out.mp4", models=models
  )
  source = SourceVideo(talk, 25, models)
  levels = []
  for i, frame in enumerate(decoded(outcome.path)):
    x0, y0, x1, y1 = source.boxes[there_and_back(42, 50)[i]]
    if np.isnan(x0):
      levels.append(0.0)
    else:
      x, y = int(x0 + 0.5 * (x1 - x0)), int(y0 + 0.72 * (y1 - y0))
      levels.append(frame[y - 3 : y + 3, x - 3 : x + 3].mean())
  # Clicks last 20 ms, at 0.5 s, 1.25 s and 1.75 s.
  loud = [secs * 25 for secs in CLICK_SECS]
  peaks = np.flatnonzero(np.array(levels) > 150)
  assert len(peaks)
  assert all(min(abs(peak - frame) for frame in loud) <= 2 for peak in peaks)
  assert all(min(abs(peaks - frame)) <= 1.5 for frame in loud if frame > 12)


def write_run(workdir: Path, frozen=("encoder",)) -> Path:
  """Writes the checkpoint of a tiny generator with random weights."""
  encoder = Architecture(
    width=16, depth=1, num_heads=2, mlp_dim=16, image_size=32
  )
  meta = build.generator_meta("marlin", 0.05, encoder)
  # Shapes only, since initialisation is slow; then values of a similar size.
  _, arrays = split_network(
    nnx.eval_shape(lambda: build.make_generator(meta)), frozen=frozen
  )
  np_rng = np.random.default_rng(0)
  arrays = jax.tree.map(
    lambda x: np_rng.uniform(0, 0.2, x.shape).astype(x.dtype), arrays
  )
  with ocp.CheckpointManager(workdir / "checkpoints") as manager:
    manager.save(
      7,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave({"generator": arrays}),
        meta=ocp.args.JsonSave(meta),
      ),
    )
  return workdir


def test_generator_of_a_run_draws_a_marked_video(talk, voice, models, tmp_path):
  drawer = load_generator(write_run(tmp_path / "run"))
  outcome = generate(drawer, talk, voice, tmp_path / "out.mp4", models=models)
  assert outcome.num_frames == 50
  with av.open(str(outcome.path), options={"export_xmp": "1"}) as container:
    metadata = container.metadata
    assert sum(1 for _ in container.decode(video=0)) == 50
  uri = video_writer.SOURCE_TYPE
  assert metadata["comment"].startswith("AI-generated")
  assert metadata["description"].startswith("AI-generated")
  assert metadata["digital_source_type"] == uri
  assert f"<Iptc4xmpExt:DigitalSourceType>{uri}<" in metadata["xmp"]


def test_a_generator_with_a_trained_encoder_is_read(tmp_path):
  load_generator(write_run(tmp_path / "run", frozen=()))


def test_paths_without_a_generator_are_refused(tmp_path):
  (tmp_path / "wav2lip.pth").write_bytes(b"no weights")
  for path in (tmp_path / "wav2lip.pth", tmp_path, tmp_path / "missing"):
    with pytest.raises(WeightsError, match=str(path)):
      load_generator(path)


def test_silence_is_a_sound_and_a_long_video_ends_with_it(
  talk, face_models, tmp_path, capsys
):
  quiet = write_sound(tmp_path / "q.mkv", np.zeros(8000, np.int16), 8000)
  path = tmp_path / "out.mp4"
  generation.run(FaceDrawer(Copy()), talk, quiet, path)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"{path}: 25 frames, 1.0 s"
  assert "12 of these frames show no face" in lines[1]
  assert "silent" in lines[2]
  assert lines[3] == generation.MARK_NOTICE
  assert len(decoded(path)) == 25


def test_impossible_requests_are_refused(talk, voice, models, tmp_path):
  def refusal(error, video, sound, output="out.mp4") -> str:
    with pytest.raises(error) as caught:
      generate(
        FaceDrawer(Copy()), video, sound, tmp_path / output, models=models
      )
    assert not (tmp_path / "out.mp4").exists()
    return str(caught.value)

  noise = write_sound(tmp_path / "noise.mkv", clicks(8000)[:1600], 8000)
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(bytes(1000))
  missing = tmp_path / "missing.wav"
  assert f"{talk}: it has no sound" in refusal(FaceVideoError, talk, None)
  assert f"{talk}: it has no sound" in refusal(FaceVideoError, noise, talk)
  assert "in 50 frames" in refusal(FaceVideoError, noise, voice)
  assert "the first is at 0.5 s" in refusal(GenerationError, talk, noise)
  assert str(broken) in refusal(FaceVideoError, broken, voice)
  assert str(broken) in refusal(FaceVideoError, talk, broken)
  assert str(missing) in refusal(FaceVideoError, talk, missing)
  assert ".mp4" in refusal(GenerationError, talk, voice, "out.avi")
  folder = str(tmp_path / "none")
  assert folder in refusal(GenerationError, talk, voice, "none/out.mp4")
  assert str(broken) in refusal(GenerationError, broken, voice, "broken.mp4")
  assert broken.read_bytes() == bytes(1000)
