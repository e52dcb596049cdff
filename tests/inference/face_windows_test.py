"""Windows of video files: every frame in one, and the right face in them."""

import signal
import threading
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.faces import face_finder
from data_prep.video import decode, video_to_records
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.inference import face_windows, feature_folder, video_folder
from marlin_jax.inference.face_windows import (
  FaceVideoError,
  NoFaceError,
  WindowSettings,
  fit_square,
  read_ahead,
  read_windows,
)
from marlin_jax.records import schema
from tests.support.videos import moving_noise, shared_video, write_video

SIZE = 32
SHARED = {
  "video01.mp4": (300, 9),
  "video03.mp4": (240, 7),
  "cropped01.mp4": (143, 4),
  "cropped04.mp4": (15, 1),
}


def write_greys(path, num_frames, **options):
  """Writes a lossless video whose frame i has grey level i."""
  frames = [
    np.full((SIZE, SIZE, 3), i % 256, np.uint8) for i in range(num_frames)
  ]
  return write_video(path, frames, "ffv1", "bgr0", **options)


def small(**settings) -> WindowSettings:
  return WindowSettings(image_size=SIZE, **settings)


def greys(window) -> list[int]:
  return window.frames[:, SIZE // 2, SIZE // 2, 0].tolist()


@pytest.fixture(scope="module")
def models(face_models):
  with video_to_records.Models() as models:
    yield models


# --- Which frames -------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 15, 16, 17, 31, 32, 33, 63, 64, 100])
@pytest.mark.parametrize("hop", [None, 12])
def test_windows_of_a_file_are_those_of_the_rule(tmp_path, total, hop):
  path = write_greys(tmp_path / "v.mkv", total)
  clip = Clip(16, 2)
  windows = list(read_windows(path, small(hop=hop)))
  starts = clip.window_starts(total, hop)
  assert [w.first_frame for w in windows] == starts.tolist()
  covered = set()
  for window in windows:
    start = window.first_frame
    assert window.frames.shape == (16, SIZE, SIZE, 3)
    assert window.frames.dtype == np.uint8
    assert greys(window) == clip.indices(start, total).tolist()
    assert window.num_frames == min(32, total)
    last = start + window.num_frames - 1
    assert window.start_secs == pytest.approx(start / 30, abs=2e-3)
    assert window.end_secs == pytest.approx(last / 30, abs=2e-3)
    assert window.regions is None
    covered |= set(range(start, last + 1))
  assert covered == set(range(total))


@pytest.mark.parametrize(
  ("total", "expected"),
  [
    (1, [[0] * 16]),
    (15, [[*range(15), 14]]),
    (16, [[*range(16)]]),
    (17, [[*range(16)]]),
    (32, [[*range(16)]]),
    (33, [[*range(0, 32, 2)]]),
    # The last full window is dropped, and so is the rest.
    (64, [[*range(0, 32, 2)]]),
    (65, [[*range(0, 32, 2)], [*range(32, 64, 2)]]),
  ],
)
def test_the_authors_windows_can_be_had(tmp_path, total, expected):
  path = write_greys(tmp_path / "v.mkv", total)
  windows = list(read_windows(path, small(window_rule="authors")))
  assert [greys(window) for window in windows] == expected
  assert windows[0].num_frames == (min(16, total) if total <= 32 else 32)


@pytest.mark.parametrize("name", SHARED)
def test_counts_on_real_footage(name):
  total, num_theirs = SHARED[name]
  ours = list(read_windows(shared_video(name), small()))
  assert len(ours) == max(-(-total // 32), 1)
  assert ours[-1].first_frame + ours[-1].num_frames == total
  settings = small(window_rule="authors")
  theirs = list(read_windows(shared_video(name), settings))
  assert len(theirs) == num_theirs


def test_gaps_between_windows_are_refused():
  with pytest.raises(ValueError, match="do not cover"):
    WindowSettings(hop=33)
  assert WindowSettings(hop=33, window_rule="authors").step == 33
  with pytest.raises(ValueError, match="expected one of cover, authors"):
    WindowSettings(window_rule="ours")
  with pytest.raises(ValueError, match="at least 1"):
    WindowSettings(hop=0, window_rule="authors")


# --- Which pictures -----------------------------------------------------------


def test_times_of_a_variable_rate_are_the_containers(tmp_path):
  secs = np.cumsum([0.0, *[0.02] * 20, *[0.1] * 15]).tolist()
  path = write_greys(tmp_path / "v.mkv", 36, secs=secs)
  first, last = read_windows(path, small())
  assert (first.first_frame, last.first_frame) == (0, 4)
  secs_of_windows = [
    first.start_secs,
    first.end_secs,
    last.start_secs,
    last.end_secs,
  ]
  expected = [secs[0], secs[31], secs[4], secs[35]]
  np.testing.assert_allclose(secs_of_windows, expected, atol=2e-3)


def test_rotation_flag_turns_the_picture(tmp_path):
  frame = np.zeros((48, 64, 3), np.uint8)
  frame[:8, :8, 0] = 255
  path = write_video(tmp_path / "v.mp4", [frame] * 3, rotation=90, crf="0")
  (window,) = read_windows(path, small())
  picture = window.frames[0].astype(int)
  # A quarter turn counter-clockwise: top left is now bottom left, beside a bar.
  assert picture[-3, 6, 0] > 200
  assert picture[:26].max() < 60


def test_colours_are_rgb(tmp_path):
  frame = np.zeros((SIZE, SIZE, 3), np.uint8)
  frame[..., 0] = 200
  path = write_video(tmp_path / "v.mkv", [frame] * 2, "ffv1", "bgr0")
  (window,) = read_windows(path, small())
  assert np.all(window.frames == [200, 0, 0])


@pytest.mark.parametrize(
  ("name", "codec", "audio_first"),
  [
    ("v.webm", "libvpx", False),
    ("v.mkv", "mpeg4", False),
    ("v.avi", "mpeg4", True),
  ],
)
def test_no_frame_count_and_sound_first(tmp_path, name, codec, audio_first):
  path = write_video(
    tmp_path / name,
    moving_noise(40, 63, 49),
    codec,
    "yuv420p",
    audio_first=audio_first,
  )
  with av.open(str(path)) as container:
    assert container.streams[0].frames == 0 or audio_first
  windows = list(read_windows(path, small()))
  assert [window.first_frame for window in windows] == [0, 8]


@pytest.mark.parametrize(
  "shape", [(48, 64), (65, 31), (1, 200), (200, 1), (2, 2), (300, 301)]
)
def test_frames_keep_their_shape_between_black_bars(shape):
  frame = np.full((*shape, 3), 100, np.uint8)
  out = fit_square(frame, SIZE)
  assert out.shape == (SIZE, SIZE, 3)
  rows, columns = np.nonzero(out.any(axis=2))
  height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
  assert np.all(out[rows, columns] == 100)
  assert max(height, width) == SIZE
  scale = SIZE / max(shape)
  expected = [max(round(side * scale), 1) for side in shape]
  assert [height, width] == expected
  assert abs((SIZE - rows.max() - 1) - rows.min()) <= 1
  assert abs((SIZE - columns.max() - 1) - columns.min()) <= 1


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
  noise = moving_noise(1, SIZE, SIZE)[0]
  assert fit_square(noise, SIZE) is noise
  path = write_video(tmp_path / "v.mkv", [noise] * 2, "ffv1", "bgr0")
  (window,) = read_windows(path, small())
  np.testing.assert_array_equal(window.frames[0], noise)


# --- Faces --------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 15, 33])
def test_short_videos_of_a_face(tmp_path, carphone, models, total):
  path = carphone(tmp_path / "v.mp4", total)
  settings = small(crop_face=True)
  windows = list(read_windows(path, settings, models))
  expected = Clip(16, 2).window_starts(total)
  assert [window.first_frame for window in windows] == expected.tolist()
  assert windows[0].frames.shape == (16, SIZE, SIZE, 3)


@pytest.mark.parametrize("crop_face", [True, False])
def test_a_photograph_is_one_still_window(
  tmp_path, carphone_frames, models, crop_face
):
  path = tmp_path / "photo.jpg"
  Image.fromarray(carphone_frames[0]).save(path, quality=95)
  settings = small(crop_face=crop_face)
  (window,) = read_windows(path, settings, models)
  assert window.num_frames == 1
  assert (window.start_secs, window.end_secs) == (0, 0)
  assert window.frames.shape == (16, SIZE, SIZE, 3)
  assert (window.frames == window.frames[:1]).all()


def nose_is_central(picture, models) -> bool:
  face = models.finder.detect(picture)[0]
  mesh = models.finder.mesh(picture, face.box)
  size = len(picture)
  height = np.ptp(mesh[:, 1]) / size
  return np.all(np.abs(mesh[4] / size - 0.5) < 0.15) and 0.6 < height < 0.95


def test_a_real_face_fills_the_window(models):
  path = shared_video("cropped04.mp4")
  windows = list(read_windows(path, WindowSettings(crop_face=True), models))
  (window,) = windows
  assert nose_is_central(window.frames[0], models)
  assert nose_is_central(window.frames[-1], models)


def test_the_face_that_is_large_and_long_visible_is_taken(
  tmp_path, carphone, models
):
  with av.open(str(carphone(tmp_path / "one.mp4", 24))) as container:
    faces = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  both = np.zeros((24, 288, 528, 3), np.uint8)
  both[:, 72:216, 352:] = faces
  for picture, face in zip(both, faces, strict=True):
    picture[:, :352] = cv2.resize(face, (352, 288))
  # The larger face is recognised by its colour.
  both[:, :, :352, 1] //= 2
  faded = both.copy()
  # Slowly: otherwise it would be a cut.
  light = np.clip((np.arange(24) - 13) / 10, 0, 1)[:, None, None, None]
  faded[:, :, :352] = light * faded[:, :, :352]

  def is_the_larger(name, frames):
    path = write_video(tmp_path / name, list(frames), crf="10")
    settings = WindowSettings(crop_face=True)
    (window,) = read_windows(path, settings, models)
    assert (window.first_frame, window.num_frames) == (0, 24)
    red, green, _ = window.frames.mean(axis=(0, 1, 2))
    return red / green > 1.8

  assert not is_the_larger("longer.mp4", faded)
  assert is_the_larger("tied.mp4", both)


def test_no_face_is_an_error_that_says_what_to_do(tmp_path, models):
  path = write_video(tmp_path / "noise.mp4", moving_noise(3))
  with pytest.raises(NoFaceError, match=r"noise\.mp4: no face found; .*crop_"):
    list(read_windows(path, WindowSettings(crop_face=True), models))


@pytest.mark.parametrize(
  ("crop_face", "image_size", "patch_size"),
  [(False, 224, 16), (True, 224, 16), (False, 112, 16), (True, 160, 8)],
)
def test_regions_of_a_real_face(models, crop_face, image_size, patch_size):
  path = shared_video("cropped04.mp4")
  settings = WindowSettings(
    crop_face=crop_face,
    regions=True,
    image_size=image_size,
    patch_size=patch_size,
  )
  (window,) = read_windows(path, settings, models)
  side = image_size // patch_size
  assert window.frames.shape == (16, image_size, image_size, 3)
  assert window.regions.dtype == np.uint16
  assert window.regions.shape == (8, side, side)
  rows = {}
  for name in ("left_brow", "nose", "lower_lip"):
    bit = np.uint16(1 << schema.REGIONS.index(name))
    where = np.nonzero(window.regions & bit)
    assert set(where[0]) == set(range(8)), name
    rows[name] = where[1].mean()
  assert rows["left_brow"] < rows["nose"] < rows["lower_lip"]


def test_regions_are_zero_without_a_face(tmp_path, models):
  path = write_video(tmp_path / "v.mp4", moving_noise(2, 224, 224))
  (window,) = read_windows(path, WindowSettings(regions=True), models)
  np.testing.assert_array_equal(window.regions, np.zeros((8, 14, 14)))
  with pytest.raises(ValueError, match="regions .* 224 pixels, .* is 256"):
    WindowSettings(image_size=256, regions=True)


# --- Faults and threads -------------------------------------------------------


def truncated_avi(tmp_path):
  path = write_video(tmp_path / "v.avi", moving_noise(90), "mjpeg", "yuvj420p")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  return path


@pytest.mark.parametrize("read", [read_windows, read_ahead])
def test_damage_comes_out_with_path_and_reason(tmp_path, read):
  windows = read(truncated_avi(tmp_path), small())
  assert next(windows).first_frame == 0
  with pytest.raises(FaceVideoError, match=r"v\.avi: .*damage") as error:
    list(windows)
  assert "v.avi" not in error.value.reason
  with pytest.raises(FaceVideoError, match=r"none\.mp4: cannot open"):
    list(read(tmp_path / "none.mp4", small()))


def test_reading_ahead_gives_the_same_windows(tmp_path):
  path = write_greys(tmp_path / "v.mkv", 100)
  result, expected = (
    [(w.first_frame, greys(w)) for w in read(path, small(hop=8))]
    for read in (read_ahead, read_windows)
  )
  assert result == expected


def readers() -> list[threading.Thread]:
  """Returns the threads that read ahead."""
  return [t for t in threading.enumerate() if t.name.startswith("read_ahead")]


def children() -> set[str]:
  """Returns the ids of the child processes of this process."""
  lists = Path("/proc/self/task").glob("*/children")
  return {pid for file in lists for pid in file.read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
@pytest.mark.parametrize("num_taken", [0, 1])
def test_a_reader_that_stops_leaves_no_thread_and_no_decoder(
  tmp_path, num_taken
):
  path = write_greys(tmp_path / "v.mkv", 250)
  before = children()
  windows = read_ahead(path, small(hop=1))
  for _ in range(num_taken):
    next(windows)
  windows.close()
  assert not readers()
  assert children() == before


def test_a_search_for_faces_is_interrupted_at_once(
  tmp_path, face_models, monkeypatch
):
  path = write_greys(tmp_path / "v.mkv", 1000)
  searched = []
  search = face_finder.FaceFinder.detect

  def interrupted_search(finder, picture):
    searched.append(len(searched))
    if len(searched) == 20:
      assert readers()
      signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return search(finder, picture)

  monkeypatch.setattr(face_finder.FaceFinder, "detect", interrupted_search)
  windows = read_ahead(path, small(crop_face=True))
  with pytest.raises(KeyboardInterrupt):
    next(windows)
  assert 20 <= len(searched) < 500
  assert not readers()


# --- Faults of the machine ----------------------------------------------------


@pytest.mark.parametrize(
  ("error", "is_hosts"),
  [
    (decode.HostError("decoder passed its deadline of 300 s"), True),
    (OSError("Stale file handle"), True),
    (decode.DecodeError("decoder died of SIGSEGV"), False),
  ],
)
def test_a_video_is_not_quarantined_for_a_fault_of_the_machine(
  tmp_path, monkeypatch, error, is_hosts
):
  """Without a hash, the next run does not take it for a bad one."""

  def fail(path, *_):
    with face_windows.video_errors(path):
      raise error
    yield

  monkeypatch.setattr(video_folder, "read_windows", fail)
  path = write_greys(tmp_path / "v.mkv", 3)
  with video_folder._open_work(WindowSettings()) as work:
    outcome = work(path, print)
  assert str(error) in outcome.reason
  assert (outcome.sha256 == "") == is_hosts
  settings = {"format": "npz"}
  with feature_folder.FeatureFolder(tmp_path / "out", settings) as folder:
    folder.begin()
    folder.refuse(
      feature_folder.Origin("v.mkv", outcome.sha256, outcome.num_bytes),
      outcome.reason,
    )
    assert folder.quarantines("v.mkv", path) == (not is_hosts)
