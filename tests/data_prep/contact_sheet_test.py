"""The contact sheet shows evenly spread crops with their regions."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from array_record.python import array_record_module
from PIL import Image

from data_prep import contact_sheet
from data_prep.inspection import region_pictures
from data_prep.inspection.dataset_statistics import (
  DecodedFrame,
  InspectionError,
)
from marlin_jax.records import schema


def a_record(segment: int, grey: int, code: int, t: int = 4) -> schema.Record:
  """Returns grey frames with one region in the upper left quarter."""
  frame = np.full((224, 224, 3), grey, np.uint8)
  labels = np.zeros((t, 224, 224), np.uint8)
  labels[:, :112, :112] = code
  return schema.Record(
    frames=[simplejpeg.encode_jpeg(frame, 95)] * t,
    regions=schema.region_bits(labels),
    parsing=schema.compress_parsing(labels),
    boxes=np.zeros((t, 4), np.float32),
    video_id="people/ann.mp4",
    track_id=0,
    segment=segment,
    subject_id="",
    fps=30.0,
    start_secs=0.0,
    quality=1.0,
    quality_terms=np.ones(4, np.float32),
  )


def write_shard(path: Path, some_records: list[schema.Record]) -> None:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in some_records:
    writer.write(schema.encode(record))
  writer.close()


@pytest.fixture
def dataset_dir(tmp_path) -> Path:
  folder = tmp_path / "ds"
  folder.mkdir()
  for shard in range(2):
    write_shard(
      folder / f"faces-train.array_record-0000{shard}-of-00002",
      [
        a_record(i, grey=40 * (i + 1), code=i + 1)
        for i in range(2 * shard, 2 * shard + 2)
      ],
    )
  return folder


def test_sheet_shows_every_shard_evenly(dataset_dir):
  sheet = contact_sheet.contact_sheet(dataset_dir, num_frames=4, num_columns=2)
  top = len(region_pictures.legend(sheet.shape[1]))
  height, width = contact_sheet.CELL_HEIGHT, contact_sheet.CELL_WIDTH
  assert sheet.shape == (top + 2 * height, 2 * width, 3)
  greys = [
    int(sheet[top + r * height + 180, c * width + 180, 0])
    for r in range(2)
    for c in range(2)
  ]
  np.testing.assert_allclose(greys, [40, 80, 120, 160], atol=2)


def test_cell_shows_the_crop_beside_the_same_crop_with_regions():
  record = a_record(0, grey=120, code=6)
  pixels = schema.decode_frames(record, [2])[0]
  labels = schema.decode_parsing(record)[2]
  cell = contact_sheet.cell(DecodedFrame(record, 2, pixels, labels))
  assert np.abs(cell[20, 20].astype(int) - 120).max() <= 2
  tinted = cell[20, 224 + 20].astype(int)
  assert tinted[1] > tinted[0] + 20  # the nose is green
  assert cell[224:].min() < 128  # the name is written below


def test_more_frames_than_records_are_drawn_from_the_same_records(dataset_dir):
  sheet = contact_sheet.contact_sheet(dataset_dir, num_frames=10)
  assert sheet.shape[1] == 3 * contact_sheet.CELL_WIDTH


def test_pictures_are_drawn_once(tmp_path):
  pictures = [a_record(i, grey=40 * (i + 1), code=i + 1, t=1) for i in range(3)]
  write_shard(tmp_path / "faces-train.array_record-00000-of-00001", pictures)
  sheet = contact_sheet.contact_sheet(tmp_path, 12)
  assert sheet.shape == contact_sheet.contact_sheet(tmp_path, 3).shape


def test_binary_writes_the_picture(dataset_dir, tmp_path, capsys):
  output = tmp_path / "new" / "sheet.png"
  argv = [str(dataset_dir), "--output", str(output), "--num_frames", "2"]
  assert contact_sheet.main(argv) == 0
  assert str(output) in capsys.readouterr().out
  with Image.open(output) as picture:
    assert picture.size[0] == 3 * contact_sheet.CELL_WIDTH


def test_folder_without_shards_is_an_error(tmp_path, capsys):
  argv = [str(tmp_path), "--output", str(tmp_path / "a.png")]
  assert contact_sheet.main(argv) == 1
  assert f"file in {tmp_path}" in capsys.readouterr().err


def test_damaged_shard_is_named(dataset_dir):
  shard = dataset_dir / "faces-train.array_record-00001-of-00002"
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(InspectionError, match="00001-of-00002"):
    contact_sheet.contact_sheet(dataset_dir)


def test_record_of_something_else_is_named(dataset_dir):
  shard = dataset_dir / "faces-train.array_record-00001-of-00002"
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  writer.write(b"something else")
  writer.close()
  with pytest.raises(InspectionError, match="00001-of-00002.*record 0"):
    contact_sheet.contact_sheet(dataset_dir)
