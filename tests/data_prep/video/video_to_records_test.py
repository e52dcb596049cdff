"""Tracks become records, independently of the engine."""

import gc
import math
import weakref
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import simplejpeg

from data_prep.faces import boxes
from data_prep.sources.listing import Part
from data_prep.sources.manifest import Source
from data_prep.video import decode, video_to_records
from data_prep.video.video_to_records import segment_lengths
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.records import mel_spectrogram, quality_index, schema
from tests.support import scenes
from tests.support.videos import moving_noise, shared_video, write_video


@pytest.fixture(scope="module")
def models(face_models):
  with video_to_records.Models() as opened:
    yield opened


def run(path, models, emit=None, source=None, **settings):
  """Returns the outcome and the decoded records."""
  encoded = []
  outcome = video_to_records.process_video(
    source or Source("id.mp4", path, "someone", "train"),
    video_to_records.Settings(**settings),
    models,
    emit or encoded.append,
  )
  return outcome, [schema.decode(data) for data in encoded]


def test_segments_are_nearly_equal_and_lose_no_frame():
  assert segment_lengths(64, 64) == [64]
  assert segment_lengths(65, 64) == [33, 32]
  assert segment_lengths(120, 64) == [60, 60]
  for num_frames in range(1, 1000):
    for longest in (62, 64, 100):
      lengths = segment_lengths(num_frames, longest)
      assert sum(lengths) == num_frames
      assert max(lengths) <= longest
      assert max(lengths) - min(lengths) <= 1
      assert len(lengths) == 1 or min(lengths) >= Clip().span


def test_segments_too_short_for_a_clip_are_refused():
  with pytest.raises(ValueError, match="at least 62"):
    video_to_records.Settings(segment_frames=61)


def test_record_tells_where_its_crops_come_from(carphone, models, tmp_path):
  path = carphone(tmp_path / "v.mp4", 70)
  outcome, (first, second) = run(path, models)
  assert outcome == video_to_records.Outcome(
    video_to_records.KEPT,
    num_decoded_frames=70,
    num_tracks=1,
    num_records=2,
    num_frames=70,
    quality=[quality_index.row_of(record) for record in (first, second)],
    segments=[
      [r.track_id, len(r), np.median(r.boxes[:, 2] - r.boxes[:, 0])]
      for r in (first, second)
    ],
  )
  assert (len(first), len(second)) == (35, 35)
  assert [(r.track_id, r.segment) for r in (first, second)] == [(0, 0), (0, 1)]
  assert second.start_secs == pytest.approx(35 / 30)
  for record in (first, second):
    assert (record.video_id, record.subject_id) == ("id.mp4", "someone")
    assert record.fps == 30
    assert 0 < record.quality <= 1
    frames = schema.decode_frames(record, range(len(record)))
    assert frames.std() > 20
    # The crop shows the source at the box.
    x0, y0, x1, y1 = record.boxes[0]
    assert x1 - x0 == pytest.approx(y1 - y0, abs=1e-3)
    assert 40 < x1 - x0 < 144
  with av.open(str(path)) as container:
    frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
  x0, y0, x1, y1 = np.clip(first.boxes[0], 0, 144).astype(int)
  means = frame[y0:y1, x0:x1].mean(axis=(0, 1))
  crop = schema.decode_frames(first, [0])[0]
  inside = crop[crop.sum(axis=-1) > 0]
  np.testing.assert_allclose(inside.mean(axis=0), means, atol=8)


def test_a_video_too_large_to_keep_gives_the_same_records(
  carphone, models, tmp_path, monkeypatch
):
  path = carphone(tmp_path / "v.mp4", 40)
  opened = []
  monkeypatch.setattr(
    video_to_records.decode,
    "open_video",
    lambda *args: opened.append(args) or decode.Video(*args),
  )
  kept = []
  run(path, models, kept.append)
  assert len(opened) == 1
  frame_bytes = 176 * 144 * 3
  monkeypatch.setattr(video_to_records, "KEPT_BYTES", 39 * frame_bytes)
  decoded_again = []
  run(path, models, decoded_again.append)
  assert len(opened) == 3
  assert decoded_again == kept


def test_frames_are_freed_with_the_video(
  carphone, models, tmp_path, monkeypatch
):
  videos = weakref.WeakSet()

  class Watched(video_to_records.TrackedVideo):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      videos.add(self)

  monkeypatch.setattr(video_to_records, "TrackedVideo", Watched)

  def emit(_):
    assert len(videos) == 1

  gc.disable()  # not only once garbage is collected: they may be a GiB
  try:
    run(carphone(tmp_path / "v.mp4", 16), models, emit)
    assert not videos
  finally:
    gc.enable()


def test_regions_are_the_bits_of_the_label_maps(carphone, models, tmp_path):
  _, (record,) = run(carphone(tmp_path / "v.mp4", 20), models)
  label_maps = schema.decode_parsing(record)
  np.testing.assert_array_equal(record.regions, schema.region_bits(label_maps))
  eyes_nose_hair = (1 << 4) | (1 << 5) | (1 << 6) | (1 << 10)
  for bits in record.regions:
    assert np.bitwise_or.reduce(bits, axis=None) & eyes_nose_hair


def test_face_that_leaves_and_returns_keeps_both_tracks(
  carphone, models, tmp_path
):
  with av.open(str(carphone(tmp_path / "v.mp4", 20))) as container:
    face = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  noise = moving_noise(30, 176, 144)
  path = write_video(tmp_path / "w.mp4", face + noise + face, crf="10")
  outcome, records = run(path, models)
  assert outcome.num_decoded_frames == 70
  assert [r.track_id for r in records] == [0, 1]
  assert [len(r) for r in records] == [20, 20]
  assert records[1].start_secs == pytest.approx(50 / 30, abs=0.01)


def test_video_without_a_face_is_told_apart_from_a_bad_one(models, tmp_path):
  outcome, records = run(
    write_video(tmp_path / "v.mp4", moving_noise(9)), models
  )
  assert outcome == video_to_records.Outcome(
    video_to_records.NO_FACE, "no face found", num_decoded_frames=9
  )
  assert records == []
  (tmp_path / "v.mp4").write_bytes(b"")
  outcome, _ = run(tmp_path / "v.mp4", models)
  assert outcome.status == video_to_records.QUARANTINED


def test_decoder_that_does_not_load_is_no_fault_of_the_video(models, tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  with pytest.raises(decode.DecoderSetupError):
    run(path, models, limits=decode.Limits(memory_bytes=64 << 20))


def test_full_disk_is_no_fault_of_the_video(carphone, models, tmp_path):
  def emit(_):
    raise OSError("no space left")

  with pytest.raises(OSError, match="no space left"):
    run(carphone(tmp_path / "v.mp4", 5), models, emit)


def test_records_hold_labels_only_in_data_sets_that_have_them_there(
  carphone, models, tmp_path
):
  path = carphone(tmp_path / "v.mp4", 64)
  labels = {"mood": (2.0,), "face": (1.0, math.nan), "new": (1.0,)}
  source = Source("id.mp4", path, "", "train", labels)
  _, records = run(
    path,
    models,
    source=source,
    segment_frames=62,
    record_labels={"mood": 1, "face": 2, "gone": 1},
  )
  assert len(records) == 2
  for record in records:
    np.testing.assert_equal(
      record.labels,
      {
        "mood": np.float32([2]),
        "face": np.float32([1, np.nan]),
        "gone": np.float32([np.nan]),
      },
    )
    assert record.audio is None
  _, records = run(path, models, source=source)
  assert [record.labels for record in records] == [{}]


def test_a_folder_of_pictures_gives_what_its_video_gives(
  carphone, models, tmp_path
):
  with av.open(str(carphone(tmp_path / "v.mp4", 20))) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  folder = tmp_path / "3"
  folder.mkdir()
  for i, frame in enumerate(frames, 95):  # 95 to 114: numbers, not words
    jpeg = simplejpeg.encode_jpeg(frame, 95, colorsubsampling="444")
    (folder / f"3.{i}.jpg").write_bytes(jpeg)
  (folder / "Thumbs.db").write_bytes(b"no picture")
  source = Source("Ann/3", folder, "Ann", "val", frame_rate=24.0)
  outcome, (record,) = run(folder, models, source=source)
  assert outcome.num_decoded_frames == len(record) == 20
  assert record.fps == 24
  _, (expected,) = run(tmp_path / "v.mp4", models)
  np.testing.assert_allclose(record.boxes, expected.boxes, atol=2)
  crops = [
    schema.decode_frames(r, range(20)).astype(int) for r in (record, expected)
  ]
  assert np.abs(crops[0] - crops[1]).mean() < 4


def test_a_missing_picture_is_a_pause_that_ends_tracks(
  carphone_frames, models, tmp_path
):
  for i, frame in enumerate(carphone_frames[:40]):
    number = 100 + i + 7 * (i >= 20)
    jpeg = simplejpeg.encode_jpeg(frame, 95, colorsubsampling="444")
    (tmp_path / f"3.{number}.jpg").write_bytes(jpeg)
  source = Source("Ann/3", tmp_path, "Ann", "val", frame_rate=24.0)
  outcome, records = run(tmp_path, models, source=source)
  assert outcome.num_tracks == len(records) == 2
  starts = [record.start_secs for record in records]
  assert starts == pytest.approx([0, 27 / 24])
  assert [record.fps for record in records] == [24, 24]
  assert [len(record) for record in records] == [20, 20]


# --- Whose face ---------------------------------------------------------------


@pytest.fixture(scope="module")
def two_faces(carphone_frames, tmp_path_factory):
  """A large and a small face, side by side in 480x240, for 30 frames."""
  frames = []
  for picture in carphone_frames[:30]:
    frame = scenes.room(240, 480)
    scenes.paste(frame, picture, 10, 40)
    scenes.paste(frame, scenes.scaled(picture, 1.5), 210, 10)
    frames.append(frame)
  path = tmp_path_factory.mktemp("two") / "v.mp4"
  return write_video(path, frames, rate=25, crf="10", preset="veryfast")


@pytest.fixture(scope="module")
def all_faces(two_faces, models):
  """The outcome and both records."""
  return run(two_faces, models)


def centres(records):
  """Returns the x of each record's crops."""
  return [float(r.boxes[:, [0, 2]].mean()) for r in records]


def test_the_main_face_is_the_largest_and_others_are_told(
  two_faces, models, all_faces
):
  outcome, records = all_faces
  assert centres(records) == pytest.approx([97, 340], abs=25)
  assert outcome.notes == []
  outcome, (record,) = run(two_faces, models, faces=video_to_records.MAIN)
  np.testing.assert_array_equal(record.boxes, records[1].boxes)
  assert record.frames == records[1].frames
  assert (record.track_id, outcome.num_tracks) == (0, 1)
  assert outcome.notes == [video_to_records.OTHERS_NOTE]


def test_the_main_face_is_where_the_source_says(two_faces, models, all_faces):
  points = Part(face_at=((0.0, 95, 105), (1.0, 95, 105)))
  source = Source("id", two_faces, "Ann", "train", part=points)
  _, (record,) = run(two_faces, models, source=source, faces="main")
  assert record.frames == all_faces[1][0].frames
  # All faces are all.
  _, records = run(two_faces, models, source=source)
  assert len(records) == 2
  nobody = Part(face_at=((0.0, 200, 5),))
  source = Source("id", two_faces, "Ann", "train", part=nobody)
  outcome, _ = run(two_faces, models, source=source, faces="main")
  assert outcome.status == video_to_records.NO_FACE
  assert "no face where the input says" in outcome.reason


@pytest.mark.parametrize("fps", [0.0, 10.0])
def test_a_part_gives_its_frames_of_the_face_in_its_box(two_faces, models, fps):
  _, (left, _) = run(two_faces, models, fps=fps)
  # Around the face of 56 pixels, in fractions of 480x240.
  box = (60 / 480, 70 / 240, 130 / 480, 145 / 240)
  part = Part(0.4, 1.0, box)
  source = Source("id", two_faces, "", "train", part=part)
  outcome, (record,) = run(two_faces, models, source=source, fps=fps)
  rate = fps or 25
  assert len(record) == round(0.6 * rate)
  assert outcome.num_decoded_frames == 15
  assert record.start_secs == pytest.approx(0.4)
  # The same face in pixels of the whole frame.
  rows = slice(round(0.4 * rate), round(1.0 * rate))
  np.testing.assert_allclose(record.boxes, left.boxes[rows], atol=3)
  with decode.open_video(two_faces) as video:
    whole = {round(secs, 2): frame for frame, secs in video}
  # 4 frames at 10 per second are 10 of the file's 25.
  for i in (0, 4):
    frame = whole[round(0.4 + i / rate, 2)]
    expected = boxes.crop_frame(frame, record.boxes[i]).astype(int)
    crop = schema.decode_frames(record, [i])[0]
    assert np.abs(crop - expected).mean() < 3


def test_a_part_has_its_own_sound(models):
  path = shared_video("video01.mp4")
  source = Source("id", path, "", "train", part=Part(2.0, 3.5))
  _, (record,) = run(path, models, source=source, has_sound=True)
  start = round(16_000 * record.start_secs)
  assert record.start_secs == pytest.approx(2.0, abs=1 / 30)
  samples = np.frombuffer(record.audio, "<i2")
  whole = decode.read_sound(path)
  np.testing.assert_array_equal(samples, whole[start:][: len(samples)])
  mel = mel_spectrogram.mel_spectrogram(whole)
  rows = mel[round(80 * record.start_secs) :][: len(record.mel)]
  np.testing.assert_array_equal(record.mel, rows)
  # No more is decoded than that, and a second.
  part = decode.read_sound(path, end_secs=3.5)
  assert 4.5 * 16_000 < len(part) < 4.8 * 16_000 < len(whole)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_over_the_limit_are_refused(models, tmp_path, suffix):
  for i, frame in enumerate(moving_noise(2)):
    path = tmp_path / f"{i}.{suffix}"
    cv2.imwrite(str(path), np.tile(frame, (1 + i, 1, 1)))
  source = Source("x", tmp_path, "", "train", frame_rate=24.0)
  limits = decode.Limits(frame_pixels=64 * 48)
  outcome, _ = run(tmp_path, models, source=source, limits=limits)
  assert "frames of 64x96 are over the limit of 3072 pixels" in outcome.reason
  (tmp_path / f"1.{suffix}").unlink()
  outcome, _ = run(tmp_path, models, source=source, limits=limits)
  assert outcome.num_decoded_frames == 1


def test_damaged_and_missing_pictures_are_refused(models, tmp_path):
  folder = tmp_path / "pictures"
  folder.mkdir()
  source = Source("x", folder, "", "train", frame_rate=24.0)
  outcome, _ = run(folder, models, source=source)
  assert "no picture in the folder" in outcome.reason
  noise = moving_noise(2)
  for i, frame in enumerate(noise):
    jpeg = simplejpeg.encode_jpeg(frame, 95)
    (folder / f"{i}.jpg").write_bytes(jpeg if i == 0 else jpeg[:200])
  outcome, _ = run(folder, models, source=source)
  assert outcome.status == video_to_records.QUARANTINED
  assert "picture 1.jpg is damaged" in outcome.reason
  (folder / "1.jpg").unlink()
  (folder / "1.jpg").symlink_to("0.jpg")
  outcome, _ = run(folder, models, source=source)
  assert outcome.num_decoded_frames == 1


def test_sound_is_cut_at_the_times_of_the_frames(models, tmp_path):
  path = shared_video("video01.mp4")
  outcome, records = run(path, models, has_sound=True)
  assert outcome.status == video_to_records.KEPT
  whole = decode.read_sound(path)
  mel = mel_spectrogram.mel_spectrogram(whole)
  for record in records:
    secs = len(record) / record.fps
    samples = np.frombuffer(record.audio, "<i2")
    assert len(samples) == pytest.approx(16_000 * secs, abs=2)
    start = round(16_000 * record.start_secs)
    np.testing.assert_array_equal(samples, whole[start:][: len(samples)])
    np.testing.assert_array_equal(
      record.mel, mel[round(80 * record.start_secs) :][: len(record.mel)]
    )
    assert len(record.mel) == pytest.approx(80 * secs, abs=1)


def test_a_video_without_sound_has_empty_sound(carphone, models, tmp_path):
  path = carphone(tmp_path / "v.mp4", 16)
  _, (record,) = run(path, models, has_sound=True)
  assert record.audio == b""
  assert record.mel.shape == (0, 80)


def test_segments_before_damage_are_kept_where_asked_for(
  carphone_frames, models, tmp_path
):
  frames = carphone_frames[:80]
  path = write_video(tmp_path / "v.mp4", frames, crf="10", g="8")
  _, whole = run(path, models)
  data = bytearray(path.read_bytes())
  at = len(data) * 3 // 5
  data[at : at + 2048] = bytes(2048)
  path.write_bytes(data)
  outcome, records = run(path, models)
  assert (outcome.status, records) == (video_to_records.QUARANTINED, [])
  outcome, records = run(path, models, on_damage=video_to_records.KEEP)
  assert outcome.status == video_to_records.KEPT
  assert 30 < outcome.num_frames < 70
  number = outcome.num_decoded_frames
  assert outcome.notes[-1].startswith(f"cut before damage: {number} of 80 fra")
  before, kept = (
    np.concatenate([schema.decode_frames(r, range(len(r))) for r in part])
    for part in (whole, records)
  )
  assert len(kept) == outcome.num_frames
  # The box is smoothed: near the end it is another one.
  difference = np.abs(kept.astype(int) - before[: len(kept)])
  assert difference[:20].mean() < 1
  assert difference.mean() < 4


def test_a_video_ends_where_its_sound_is_damaged(carphone, models, tmp_path):
  silent = carphone(tmp_path / "silent.mkv", 60)
  noise = np.random.default_rng(0).integers(-9000, 9000, 32_000)
  path = tmp_path / "v.mkv"
  with av.open(str(silent)) as source, av.open(str(path), "w") as container:
    pictures = container.add_stream_from_template(source.streams.video[0])
    sound = container.add_stream("flac", rate=16_000, layout="mono")
    for packet in source.demux(video=0):
      packet.stream = pictures
      if packet.size:
        container.mux(packet)
    frame = av.AudioFrame.from_ndarray(noise.astype("<i2")[None], "s16", "mono")
    frame.sample_rate = 16_000
    frame.time_base, frame.pts = Fraction(1, 16_000), 0
    container.mux(sound.encode(frame))
    container.mux(sound.encode())
  with av.open(str(path)) as container:
    packets = [p for p in container.demux(audio=0) if p.size]
  data = path.read_bytes()
  victim = bytes(packets[len(packets) // 2])
  path.write_bytes(data.replace(victim[9:], bytes(len(victim) - 9)))
  outcome, _ = run(path, models, has_sound=True)
  assert "damaged sound after" in outcome.reason
  assert run(path, models)[0].num_frames == 60
  outcome, records = run(
    path, models, has_sound=True, on_damage=video_to_records.KEEP
  )
  assert outcome.notes[-1].startswith("cut before damage: decoder reported")
  assert 20 < outcome.num_frames < 40
  for record in records:
    audio = np.frombuffer(record.audio, "<i2")
    start = round(16_000 * record.start_secs)
    heard = min(len(audio), 16_000 - start)
    np.testing.assert_array_equal(audio[:heard], noise[start:][:heard])


def test_tracks_end_where_the_frame_size_changes(
  carphone_frames, models, tmp_path
):
  path = write_video(tmp_path / "a.h264", carphone_frames[:30])
  narrow = [frame[:, :160] for frame in carphone_frames[:30]]
  other = write_video(tmp_path / "b.h264", narrow)
  path.write_bytes(path.read_bytes() + other.read_bytes())
  outcome, records = run(path, models)
  assert [len(record) for record in records] == [30, 30]
  assert outcome.num_tracks == 2
  assert outcome.notes[0].startswith("frame size changes: from 176x144 to 160x")


def test_a_video_is_brought_to_another_rate_with_its_sound(models):
  path = shared_video("video01.mp4")
  _, records = run(path, models, has_sound=True, fps=25.0)
  assert sum(map(len, records)) == 250  # 10 s
  whole = decode.read_sound(path)
  for record in records:
    assert record.fps == 25
    samples = np.frombuffer(record.audio, "<i2")
    assert len(samples) == pytest.approx(640 * len(record), abs=1)
    start = round(16_000 * record.start_secs)
    expected = whole[start:][: len(samples)]
    np.testing.assert_array_equal(samples[: len(expected)], expected)
