"""Parsers are compared with each other and with hand-drawn masks."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.faces import face_finder
from data_prep.regions import bisenet, drawings, parsers
from data_prep.sources import manifest
from marlin_jax.records.schema import REGIONS
from tests.support.colour_models import write_onnx
from tests.support.processes import ROOT
from tests.support.videos import VIDEOS
from tools import compare_parsers

MASKS = ROOT / "tests" / "data" / "masks"
# Below the values measured on all eleven masks, and on the three masks of the
# sample video alone (docs/DATA.md).
LEAST_IOU = {
  "skin": 0.79,
  "hair": 0.70,
  "nose": 0.66,
  "right_eye": 0.50,
  "left_eye": 0.52,
}


def test_at_least_ten_real_frames_are_drawn_with_all_that_counts():
  drawn = drawings.read_folder(MASKS)
  assert len(drawn) >= 10
  assert len({drawing.video for drawing in drawn}) >= 5
  for drawing in drawn:
    assert drawing.labels.shape == (224, 224)
    assert set(np.unique(drawing.labels)) == set(range(len(REGIONS)))
    # Right and left are those of the person.
    columns = {
      name: np.nonzero(drawing.labels == REGIONS.index(name))[1].mean()
      for name in ("right_eye", "left_eye", "right_brow", "left_brow")
    }
    assert columns["right_eye"] < columns["left_eye"]
    assert columns["right_brow"] < columns["left_brow"]


@pytest.fixture(scope="module")
def drawn_faces(sample_videos, face_models) -> list[compare_parsers.Face]:
  sources = manifest.read_sources(sample_videos)
  if VIDEOS.is_dir():
    sources += manifest.read_sources(VIDEOS)
  with face_finder.FaceFinder() as finder:
    return list(compare_parsers.drawn_faces(sources, MASKS, finder))


def test_default_parser_agrees_with_the_masks(drawn_faces):
  found = compare_parsers.label_maps(drawn_faces, parsers.DEFAULT)
  expected = np.stack([face.mask for face in drawn_faces])
  iou = compare_parsers.iou_per_region(found, expected)
  for region, least in LEAST_IOU.items():
    assert iou[region] > least, iou
  # Each single face, grey hair in bright light included.
  for i, face in enumerate(drawn_faces):
    own = compare_parsers.iou_per_region(found[i : i + 1], expected[i : i + 1])
    assert own["skin"] > 0.7, face.name
    assert own["hair"] > 0.45, face.name


def test_iou_counts_pixels_of_all_faces_together():
  skin, hair = REGIONS.index("skin"), REGIONS.index("hair")
  found = np.zeros((2, 4, 4), np.uint8)
  expected = found.copy()
  found[0, :2], expected[0, 1:3] = skin, skin
  found[1, 0] = hair
  iou = compare_parsers.iou_per_region(found, expected)
  assert iou["skin"] == pytest.approx(4 / 12)
  assert iou["hair"] == 0
  assert iou["nose"] is None
  assert "nose                   -" in compare_parsers.table("a", {"b": iou})


def test_two_parsers_side_by_side(sample_videos, face_models, tmp_path, capsys):
  write_onnx(tmp_path / "colours.onnx", len(bisenet.CLASSES))
  code = compare_parsers.main(
    [
      str(sample_videos / "carphone_pristine.mp4"),
      "--parsers=mediapipe,bisenet,mediapipe",
      f"--parser_path=bisenet={tmp_path / 'colours.onnx'}",
      f"--output={tmp_path / 'out' / 'sheet.png'}",
      "--num_faces=3",
    ]
  )
  assert code == 0
  assert "IoU with mediapipe" in capsys.readouterr().out
  report = json.loads((tmp_path / "out" / "sheet.json").read_text())
  assert (report["reference"], report["num_faces"]) == ("mediapipe", 3)
  # The parser agrees with itself but not with a map from colours.
  assert report["iou"]["mediapipe"]["skin"] == 1
  assert report["iou"]["bisenet"]["skin"] < 0.5
  with Image.open(tmp_path / "out" / "sheet.png") as sheet:
    assert sheet.width == 4 * 224
    assert sheet.height > 3 * 224


def test_masks_are_compared_where_their_video_is(
  sample_videos, face_models, tmp_path, capsys
):
  code = compare_parsers.main(
    [
      str(sample_videos / "carphone_pristine.mp4"),
      f"--masks={MASKS}",
      f"--output={tmp_path / 'sheet.png'}",
    ]
  )
  assert code == 0
  assert "note: video01.mp4" in capsys.readouterr().out
  report = json.loads((tmp_path / "sheet.json").read_text())
  assert (report["reference"], report["num_faces"]) == ("drawn", 3)
  assert report["iou"]["mediapipe"]["hair"] > 0.75


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("no json", "JSONDecodeError"),
    ('{"video": "a", "frame": 0}', "box"),
    ('{"video": "a", "frame": 0, "box": [4, 0, 2, 2], "polygons": []}', "x0 <"),
    (
      '{"video": "a", "frame": 0, "box": [0, 0, 2, 2], '
      '"polygons": [{"region": "ear", "points": [[0, 0]]}]}',
      "ear",
    ),
  ],
)
def test_file_that_is_no_drawing_is_an_error_that_names_it(
  text, reason, tmp_path
):
  (tmp_path / "bad.json").write_text(text)
  with pytest.raises(drawings.DrawingError, match=rf"bad\.json.*{reason}"):
    drawings.read_folder(tmp_path)


def test_errors_come_without_a_traceback(tmp_path, capsys):
  output = f"--output={tmp_path / 's.png'}"
  assert compare_parsers.main([str(tmp_path / "none.mp4"), output]) == 1
  assert "none.mp4: no such file" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    compare_parsers.main(["sample", output, "--parsers=mediapipe,other"])
  assert "expected some of mediapipe" in capsys.readouterr().err


def test_help_describes_the_tool(capsys):
  with pytest.raises(SystemExit) as stopped:
    compare_parsers.main(["--help"])
  assert stopped.value.code == 0
  assert "--masks" in capsys.readouterr().out
