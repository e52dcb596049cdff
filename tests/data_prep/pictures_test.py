"""Single pictures become records of one frame."""

import io
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from data_prep import report, verify
from data_prep.sources import files, manifest
from data_prep.video import decode
from marlin_jax.records import schema
from tests.support import scenes
from tests.support.files import read_lines
from tests.support.processes import run_prepare

ORIENTATION = 0x0112  # EXIF


def encoded(pixels: np.ndarray, form: str, **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, form, **options)
  return file.getvalue()


def read(path: Path) -> np.ndarray:
  """Returns the picture, uint8 (H, W, 3)."""
  with decode.open_video(path) as video:
    ((pixels, secs),) = video
    assert (secs, video.fps) == (0, 0)
  return pixels


@pytest.fixture
def quarters() -> np.ndarray:
  """A picture that no turn keeps, of more than 720 rows as photographs are."""
  picture = np.zeros((736, 752, 3), np.uint8)
  picture[:368, :376] = 255, 0, 0
  picture[:368, 376:] = 0, 255, 0
  picture[368:, :376] = 0, 0, 255
  return picture


# --- Decoding -----------------------------------------------------------------


SHOWN = {
  1: lambda p: p,
  2: lambda p: p[:, ::-1],
  3: lambda p: p[::-1, ::-1],
  4: lambda p: p[::-1],
  5: lambda p: p.swapaxes(0, 1),
  6: lambda p: p.swapaxes(0, 1)[:, ::-1],
  7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
  8: lambda p: p.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_formats_are_read_as_a_viewer_shows_them(tmp_path, quarters, form):
  # Names are often wrong: the bytes decide.
  path = tmp_path / "a.jpg"
  for code, shown in SHOWN.items():
    exif = Image.Exif()
    exif[0x010F], exif[ORIENTATION] = "camera", code
    path.write_bytes(encoded(quarters, form, quality=95, exif=exif))
    difference = read(path).astype(int) - shown(quarters)
    assert np.abs(difference).mean() < 2, code


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_damaged_exif_does_no_harm(tmp_path, quarters, at):
  exif = Image.Exif()
  exif[0x010F], exif[ORIENTATION] = "camera", 5
  data = bytearray(encoded(quarters, "JPEG", quality=95, exif=exif))
  start = data.index(b"Exif\0\0") + 6
  data[start + at : start + at + 4] = b"\xff\xff\xff\xff"
  (tmp_path / "a.jpg").write_bytes(data)
  assert set(read(tmp_path / "a.jpg").shape) == {736, 752, 3}


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_density_for_print_does_not_stretch(tmp_path, quarters, form):
  path = tmp_path / f"p.{form.lower()}"
  path.write_bytes(encoded(quarters, form, dpi=(72, 144)))
  assert read(path).shape == quarters.shape


@pytest.mark.parametrize("more", ["picture", "video"])
def test_what_cameras_append_to_a_picture_is_left_out(tmp_path, quarters, more):
  path = tmp_path / "a.jpg"
  added = (
    encoded(quarters[:64, :64], "JPEG")
    if more == "picture"
    else b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(20_000)
  )
  path.write_bytes(encoded(quarters, "JPEG", quality=95) + added)
  assert np.abs(read(path).astype(int) - quarters).mean() < 2


def test_a_picture_may_be_larger_than_a_frame(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(encoded(np.zeros((80, 100, 3), np.uint8), "PNG"))
  limits = decode.Limits(frame_pixels=1000)
  with decode.open_video(path, limits) as video:
    assert len(list(video)) == 1
  with pytest.raises(decode.DecodeError, match="over the limit of 7992"):
    decode.open_video(path, decode.Limits(frame_pixels=999))


@pytest.mark.parametrize("content", ["cut", "text", "video"])
def test_what_is_no_picture_is_refused(tmp_path, quarters, carphone, content):
  path = tmp_path / "a.jpg"
  data = {
    "cut": encoded(quarters, "JPEG", quality=95)[:5000],
    "text": b"no picture\n" * 100,
    "video": carphone(tmp_path / "v.mp4", 3).read_bytes(),
  }[content]
  path.write_bytes(data)
  with pytest.raises(decode.DecodeError):
    read(path)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused_as_such(tmp_path, quarters, form):
  path = tmp_path / f"a.{form.lower()}"
  first = quarters[::16, ::16]
  more = [Image.fromarray(np.flip(first, axis)) for axis in (0, 1)]
  path.write_bytes(encoded(first, form, save_all=True, append_images=more))
  with pytest.raises(decode.DecodeError, match="an animated picture; convert"):
    read(path)


# --- Inputs -------------------------------------------------------------------


def test_a_folder_without_videos_gives_its_pictures(tmp_path):
  for name in ("b.JPG", "one/a.jpeg", "one/c.png", "d.webp", "notes.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  found = manifest.read_input(tmp_path)
  names = ["b.JPG", "d.webp", "one/a.jpeg", "one/c.png"]
  assert [source.video_id for source in found.sources] == names
  assert "4 pictures" in found.notes[0]
  assert "1 .txt" in found.notes[1]
  (source,) = manifest.read_sources(tmp_path / "d.webp")
  assert source.video_id == "d.webp"


def test_beside_videos_pictures_are_left_out_and_told(tmp_path):
  for name in ("a.jpg", "a.mp4"):
    (tmp_path / name).touch()
  found = manifest.read_input(tmp_path)
  assert [source.video_id for source in found.sources] == ["a.mp4"]
  assert "1 .jpg" in found.notes[0]
  assert ".txt" in found.notes[1]
  (tmp_path / "list.txt").write_text("a.jpg\n")
  (source,) = manifest.read_sources(tmp_path / "list.txt")
  assert source.video_id == "a.jpg"


def test_class_folders_may_hold_pictures(tmp_path):
  for name in ("happy/a.jpg", "sad/b.jpg"):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
  listing = files.class_folders(tmp_path)
  assert listing.labels["class"].names == ("happy", "sad")
  assert [row.path for row in listing.rows] == ["happy/a.jpg", "sad/b.jpg"]


def test_a_row_gives_the_person_in_a_picture_but_no_times(tmp_path):
  (tmp_path / "a.jpg").touch()
  table = tmp_path / "t.csv"
  table.write_text("path,subject_id,x0,y0,x1,y1\na.jpg,Ann,0,0,0.5,1\n")
  (source,) = manifest.read_sources(table)
  assert (source.subject_id, source.part.box) == ("Ann", (0, 0, 0.5, 1))
  table.write_text("path,start_secs\na.jpg,1\n")
  with pytest.raises(manifest.ManifestError, match=r"a\.jpg.*no times"):
    manifest.read_sources(table)


# --- Records ------------------------------------------------------------------


def test_pictures_are_prepared_verified_and_reported(
  tmp_path, carphone_frames, face_models
):
  photos = tmp_path / "photos"
  photos.mkdir()
  first, second = carphone_frames[0], carphone_frames[40]
  (photos / "one.jpg").write_bytes(encoded(first, "JPEG", quality=95))
  large = scenes.scaled(np.concatenate([first, second], axis=1), 2)
  (photos / "two.png").write_bytes(encoded(large, "PNG"))
  noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
  (photos / "none.png").write_bytes(encoded(noise, "PNG"))
  (photos / "cut.jpg").write_bytes(encoded(first, "JPEG")[:2000])
  path = tmp_path / "faces"
  # Neither a rate nor sound is asked of a picture.
  result = run_prepare(
    *("--input", photos, "--output", path, "--fps", 25, "--sound"),
  )
  assert result.returncode == 0, result.stderr
  assert "3 face tracks, 2 pictures" in result.stdout
  assert [row["video_id"] for row in read_lines(path / "quarantine.jsonl")] == [
    "cut.jpg",
    "none.png",
  ]
  assert verify.main([str(path), "--num_workers", "1"]) == 0
  (shard,) = path.glob("*.array_record-*")
  reader = ArrayRecordReader(str(shard))
  records = [schema.decode(data) for data in reader.read_all()]
  assert [(r.video_id, r.track_id, len(r)) for r in records] == [
    ("one.jpg", 0, 1),
    ("two.png", 0, 1),
    ("two.png", 1, 1),
  ]
  for record in records:
    assert (record.fps, record.start_secs) == (0, 0)
    assert record.quality > 0.3
    shown = np.bitwise_or.reduce(record.regions, axis=None)
    for name in ("skin", "right_brow", "left_eye", "nose", "upper_lip", "hair"):
      assert shown >> schema.REGIONS.index(name) & 1
  sides = [schema.median_side(record) for record in records]
  np.testing.assert_allclose(sides[1], 2 * sides[0], rtol=0.1)
  page = report.make(path, 100)
  assert "pictures" in page
  assert "track 1, picture" in page
