"""Parser backends: from a picture to LaPa codes at the right places.

The published weights are not used here. Small models of the same shapes, made
in place, give each colour its class: with a face painted in these colours the
label map is known, whatever a backend does to the picture in between.
"""

import hashlib
import math

import cv2
import numpy as np
import pytest

from data_prep import assets
from data_prep.faces import boxes, face_finder
from data_prep.faces.mediapipe_tasks import ModelError
from data_prep.regions import bisenet, farl, lapa, multiclass, parsers
from data_prep.regions.parsers import ParserChoice
from marlin_jax.records.schema import REGIONS
from tests.support import scenes
from tests.support.colour_models import colours, write_onnx, write_script
from tests.support.processes import run_prepare

SIZE = 1000
SKIN, HAIR = lapa.CODE["skin"], lapa.CODE["hair"]


@pytest.fixture(scope="module")
def mesh(sample_videos, face_models) -> np.ndarray:
  """A real mesh, float32 (478, 2), about 420 pixels high, of a tilted head."""
  frame = scenes.read(sample_videos / "carphone_pristine.mp4", 1)[0]
  with face_finder.FaceFinder() as finder:
    points = finder.mesh(frame, finder.detect(frame)[0].box)
  points = points - points.mean(axis=0)
  points *= 420 / np.ptp(points[:, 1])
  angle = math.radians(12)
  c, s = math.cos(angle), math.sin(angle)
  turned = points @ np.array([[c, s], [-s, c]], np.float32)
  return (turned + [520, 540]).astype(np.float32)


@pytest.fixture(scope="module")
def box(mesh) -> np.ndarray:
  square = boxes.square_around(boxes.bounds(mesh), boxes.CROP_RATIO)
  return square.astype(np.float32)


def painted(mesh, class_of: dict[str, int], num_classes: int, shape=None):
  """Paints hair, face and features in their classes' colours.

  Returns:
    uint8 (SIZE, SIZE, 3).
  """
  labels = np.zeros(shape or (SIZE, SIZE), np.uint8)
  oval = mesh[lapa.OVAL]
  centre = oval.mean(axis=0)
  lapa.fill(labels, centre + 1.3 * (oval - centre), class_of["hair"])
  lapa.fill(labels, oval, class_of["skin"])
  for name, ring in lapa.POLYGONS:
    lapa.fill(labels, mesh[ring], class_of[name])
  return colours(num_classes)[labels], labels


def expected_labels(mesh, box) -> np.ndarray:
  points = lapa.in_crop(mesh, box)
  codes = {name: lapa.CODE[name] for name in REGIONS}
  return painted(points, codes, len(REGIONS), (224, 224))[1]


def assert_agree(labels, expected, but=()):
  assert labels.shape == (224, 224)
  assert labels.dtype == np.uint8
  for name in REGIONS:
    if name in but:
      continue
    a, b = labels == lapa.CODE[name], expected == lapa.CODE[name]
    iou = (a & b).sum() / (a | b).sum()
    # Parts a few pixels high lose a row at their edge, on both sides.
    assert iou > (0.9 if b.sum() > 1000 else 0.6), f"{name}: {iou:.2f}"
    if name in ("background", "hair", "skin"):
      continue
    # Not shifted either. Mixed colours at far edges may look like this part's.
    near = cv2.dilate(b.astype(np.uint8), np.ones((7, 7))).astype(bool)
    shift = np.argwhere(a & near).mean(axis=0) - np.argwhere(b).mean(axis=0)
    assert np.abs(shift).max() < 1, f"{name}: {shift}"


# --- BiSeNet ------------------------------------------------------------------

# Names of the data set, each with its number.
CELEB = {name: i for i, (name, _) in enumerate(bisenet.CLASSES)}
CELEB_PARTS = {
  "background": CELEB["background"],
  "skin": CELEB["skin"],
  "nose": CELEB["nose"],
  "upper_lip": CELEB["u_lip"],
  "lower_lip": CELEB["l_lip"],
  "inner_mouth": CELEB["mouth"],
  "hair": CELEB["hair"],
  "right_brow": CELEB["r_brow"],
  "left_brow": CELEB["l_brow"],
  "right_eye": CELEB["r_eye"],
  "left_eye": CELEB["l_eye"],
}
MIRRORED_PARTS = CELEB_PARTS | {
  "right_brow": CELEB["l_brow"],
  "left_brow": CELEB["r_brow"],
  "right_eye": CELEB["l_eye"],
  "left_eye": CELEB["r_eye"],
}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
  """A model with the shapes of BiSeNet that classifies pixels by colour."""
  path = tmp_path_factory.mktemp("onnx") / "colours.onnx"
  write_onnx(path, len(bisenet.CLASSES))
  return path


@pytest.mark.parametrize("parts", [CELEB_PARTS, MIRRORED_PARTS])
def test_bisenet_finds_every_region_whatever_left_means(
  parts, onnx_file, mesh, box
):
  frame, _ = painted(mesh, parts, len(bisenet.CLASSES))
  with parsers.open_parser(ParserChoice("bisenet", onnx_file)) as parser:
    labels = parser.parse(frame, box, mesh)
  assert_agree(labels, expected_labels(mesh, box))


def test_bisenet_drops_what_lapa_does_not_have(onnx_file, mesh, box):
  others = ("l_ear", "r_ear", "ear_r", "neck", "neck_l", "cloth", "hat")
  with parsers.open_parser(ParserChoice("bisenet", onnx_file)) as parser:
    for name in others:
      parts = CELEB_PARTS | {"hair": CELEB[name]}
      frame, _ = painted(mesh, parts, len(bisenet.CLASSES))
      labels = parser.parse(frame, box, mesh)
      assert not (labels == HAIR).any()
      assert (labels == SKIN).any()


def test_bisenet_behind_glasses_takes_the_eyes_of_the_mesh(
  onnx_file, mesh, box
):
  parts = CELEB_PARTS | {
    "right_eye": CELEB["eye_g"],
    "left_eye": CELEB["eye_g"],
  }
  frame, _ = painted(mesh, parts, len(bisenet.CLASSES))
  with parsers.open_parser(ParserChoice("bisenet", onnx_file)) as parser:
    labels = parser.parse(frame, box, mesh)
    assert_agree(labels, expected_labels(mesh, box))
    # Without a mesh, glasses are skin.
    without = parser.parse(frame, box, None)
  for ring in (lapa.RIGHT_EYE, lapa.LEFT_EYE):
    column, row = lapa.in_crop(mesh, box)[list(ring)].mean(axis=0)
    assert without[int(row), int(column)] == SKIN


def test_bisenet_parses_without_a_mesh_and_gives_none_without_a_face(
  onnx_file, mesh, box
):
  frame, _ = painted(mesh, CELEB_PARTS, len(bisenet.CLASSES))
  nothing = np.full_like(mesh, np.nan)
  with parsers.open_parser(ParserChoice("bisenet", onnx_file)) as parser:
    for landmarks in (None, nothing):
      labels = parser.parse(frame, box, landmarks)
      assert_agree(labels, expected_labels(mesh, box))
    assert parser.parse(np.zeros_like(frame), box, mesh) is None


def test_bisenet_past_the_frame_is_background(onnx_file, mesh, box):
  frame, _ = painted(mesh, CELEB_PARTS, len(bisenet.CLASSES))
  x = int(mesh[:, 0].mean())
  shift = np.float32([x, 0])
  with parsers.open_parser(ParserChoice("bisenet", onnx_file)) as parser:
    labels = parser.parse(
      np.ascontiguousarray(frame[:, x:]),
      box - np.tile(shift, 2),
      mesh - shift,
    )
  edge = round(float((x - box[0]) * 224 / (box[2] - box[0])))
  assert not labels[:, : edge - 1].any()
  assert (labels[:, edge + 1] == SKIN).any()


def test_bisenet_of_other_classes_is_refused(tmp_path, mesh, box):
  write_onnx(tmp_path / "m.onnx", 11)
  frame = np.zeros((SIZE, SIZE, 3), np.uint8)
  choice = ParserChoice("bisenet", tmp_path / "m.onnx")
  with (
    parsers.open_parser(choice) as parser,
    pytest.raises(ModelError, match=r"\(1, 11, 512, 512\), expected \(1, 19"),
  ):
    parser.parse(frame, box, mesh)


# --- FaRL ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def script_file(tmp_path_factory):
  """A TorchScript with the shapes of FaRL that classifies pixels by colour."""
  path = tmp_path_factory.mktemp("script") / "colours.pt"
  write_script(path, len(REGIONS))
  return path


LAPA_PARTS = {name: lapa.CODE[name] for name in REGIONS}


def test_farl_finds_every_region_through_the_warp(script_file, mesh, box):
  frame, _ = painted(mesh, LAPA_PARTS, len(REGIONS))
  with parsers.open_parser(ParserChoice("farl", script_file)) as parser:
    labels = parser.parse(frame, box, mesh)
    assert_agree(labels, expected_labels(mesh, box))
    assert parser.parse(np.zeros_like(frame), box, mesh) is None
    assert parser.parse(frame, box, None) is None
    assert parser.parse(frame, box, np.full_like(mesh, np.nan)) is None


def test_farl_puts_the_five_points_where_the_model_learned_them(mesh):
  matrix = farl.alignment(mesh)
  eyes = np.stack(
    [
      mesh[list(lapa.RIGHT_EYE)].mean(axis=0),
      mesh[list(lapa.LEFT_EYE)].mean(axis=0),
    ]
  )
  aligned = eyes @ matrix[:, :2].T + matrix[:, 2]
  # The published targets, of 512 pixels, scaled to 448.
  np.testing.assert_allclose(
    aligned, np.array([[196, 226], [316, 226]]) * 447 / 512, atol=20
  )
  # Upright: the tilt of the head is removed.
  assert abs(aligned[0, 1] - aligned[1, 1]) < 6
  # A similarity: no stretching, no reflection.
  scale = np.sqrt(np.linalg.det(matrix[:, :2]))
  np.testing.assert_allclose(
    matrix[:, :2] @ matrix[:, :2].T, scale**2 * np.eye(2), atol=1e-9
  )


def test_farl_warp_is_the_published_one_and_its_inverse_brings_back(mesh):
  matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
  # Linear in the middle fifth, tanh beyond it: facer's `tanh_warp_transform`.
  points = np.array([[224.0, 224], [260, 190], [448, 224], [-200, 700]])
  normed = points / 224 - 1
  expected = np.where(
    normed > 0.2,
    np.tanh((normed - 0.2) / 0.8) * 0.8 + 0.2,
    np.where(normed < -0.2, np.tanh((normed + 0.2) / 0.8) * 0.8 - 0.2, normed),
  )
  np.testing.assert_allclose(
    farl.to_model(points, matrix), (expected + 1) * 224
  )
  matrix = farl.alignment(mesh)
  inner = mesh.astype(np.float64)
  np.testing.assert_allclose(
    farl.unwarped(farl.to_model(inner, matrix), matrix), inner, atol=1e-6
  )


def test_farl_of_other_classes_is_refused(tmp_path, mesh, box):
  write_script(tmp_path / "m.pt", 19)
  frame = np.zeros((SIZE, SIZE, 3), np.uint8)
  with (
    parsers.open_parser(ParserChoice("farl", tmp_path / "m.pt")) as parser,
    pytest.raises(ModelError, match="has 19 classes, expected LaPa's 11"),
  ):
    parser.parse(frame, box, mesh)


# --- Multiclass ---------------------------------------------------------------


def confidences(mesh, context_box, **parts: int) -> np.ndarray:
  """Returns float32 (6, 256, 256): hair around a face of face skin."""
  points = (mesh - context_box[:2]) * (256 / (context_box[2] - context_box[0]))
  labels = np.zeros((256, 256), np.uint8)
  oval = points[lapa.OVAL]
  centre = oval.mean(axis=0)
  lapa.fill(labels, centre + 1.3 * (oval - centre), parts.get("hair", 1))
  lapa.fill(labels, oval, parts.get("skin", 3))
  if "mouth" in parts:
    ring = cv2.convexHull(points[[61, 0, 291, 17]].astype(np.float32))
    lapa.fill(labels, ring.squeeze(), parts["mouth"])
  return np.eye(6, dtype=np.float32)[labels].transpose(2, 0, 1)


@pytest.fixture(scope="module")
def context_box(box) -> np.ndarray:
  return lapa.grown(box, 2.4)


def compose(confidence, context_box, box, mesh, frame=None):
  if frame is None:
    frame = np.full((SIZE, SIZE, 3), 90, np.uint8)
  return multiclass.compose(confidence, context_box, frame, box, mesh)


def test_multiclass_gives_hair_and_skin_and_the_features_of_the_mesh(
  mesh, box, context_box
):
  labels = compose(confidences(mesh, context_box), context_box, box, mesh)
  assert_agree(labels, expected_labels(mesh, box))


def test_multiclass_has_no_neck_and_no_ears(mesh, box, context_box):
  for part in (2, 3):  # body skin and face skin around the face
    labels = compose(
      confidences(mesh, context_box, hair=part), context_box, box, mesh
    )
    points = lapa.in_crop(mesh, box)
    up, across = lapa.face_coordinates(points, 224)
    assert (labels == SKIN).any()
    assert not labels[up < -0.05].any()
    assert not labels[(across > 1.1) & (up < 0.7)].any()
  assert not (labels == HAIR).any()


def test_multiclass_labels_nothing_on_what_hides_the_mouth(
  mesh, box, context_box
):
  labels = compose(
    confidences(mesh, context_box, mouth=5), context_box, box, mesh
  )
  points = lapa.in_crop(mesh, box)
  column, row = np.round(points[[61, 291]].mean(axis=0)).astype(int)
  assert labels[row, column] == 0
  assert (labels == lapa.CODE["right_eye"]).any()


def test_multiclass_of_other_classes_is_refused(face_models, mesh, box):
  # The person segmenter in place of the multiclass one.
  other = assets.fetch("selfie_segmenter.tflite")
  frame = np.zeros((SIZE, SIZE, 3), np.uint8)
  with (
    parsers.open_parser(ParserChoice("multiclass", other)) as parser,
    pytest.raises(ModelError, match="expected 6: background, hair"),
  ):
    parser.parse(frame, box, mesh)


# --- Bars, files and errors ---------------------------------------------------


def test_black_bars_are_not_part_of_the_picture():
  frame = np.zeros((100, 200, 3), np.uint8)
  frame[20:90, 40:180] = 8  # as dark as a bar
  frame[20:90, 40:180:4] = 60
  np.testing.assert_array_equal(lapa.picture_area(frame), [40, 20, 177, 90])
  frame[:] = 9
  np.testing.assert_array_equal(lapa.picture_area(frame), [0, 0, 200, 100])


def test_unknown_parser_is_an_error_that_names_them_all():
  with pytest.raises(ValueError, match="mediapipe, multiclass, farl, bisenet"):
    ParserChoice("segment_anything")


@pytest.mark.parametrize("name", ["multiclass", "farl", "bisenet"])
def test_missing_file_is_an_error_that_says_where_to_get_it(name, tmp_path):
  choice = ParserChoice(name, tmp_path / "nothing")
  with pytest.raises(assets.AssetError, match=r"nothing.*https://") as error:
    choice.model_file()
  assert "--parser_path" in str(error.value)


def test_farl_is_taken_from_the_users_folder_and_else_explained(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("MARLIN_ASSETS", str(tmp_path))
  with pytest.raises(assets.AssetError, match=r"MARLIN_ASSETS"):
    ParserChoice("farl").model_file()
  (tmp_path / parsers.FARL_NAME).write_bytes(b"weights")
  assert ParserChoice("farl").model_file() == tmp_path / parsers.FARL_NAME
  assert ParserChoice("farl").model_hash() == {
    parsers.FARL_NAME: hashlib.sha256(b"weights").hexdigest()
  }


def test_recipe_has_the_hash_of_a_file_given_by_hand(tmp_path):
  (tmp_path / "own.onnx").write_bytes(b"own")
  choice = ParserChoice("bisenet", tmp_path / "own.onnx")
  assert choice.model_hash() == {"own.onnx": hashlib.sha256(b"own").hexdigest()}
  pinned = ParserChoice("bisenet").model_hash()
  assert pinned == {"resnet18.onnx": assets.ASSETS["resnet18.onnx"].sha256}


@pytest.mark.parametrize("name", ["farl", "bisenet"])
def test_file_that_is_no_model_is_an_error_that_names_it(name, tmp_path):
  (tmp_path / "text.pt").write_text("no model")
  with (
    pytest.raises(ModelError, match=r"does not open .*text\.pt"),
    parsers.open_parser(ParserChoice(name, tmp_path / "text.pt")),
  ):
    pass


def test_prepare_says_what_to_do_where_a_parser_has_no_file(tmp_path):
  result = run_prepare(
    "--input", "sample", "--output", tmp_path / "out", "--parser", "farl"
  )
  assert result.returncode == 1
  assert parsers.FARL_URL in result.stderr
  assert "Traceback" not in result.stderr


def test_prepare_with_an_onnx_parser_writes_its_labels_and_its_hash(
  onnx_file, sample_videos, face_models, tmp_path
):
  import json

  import grain

  from marlin_jax.records import schema

  result = run_prepare(
    *("--input", sample_videos / "carphone_pristine.mp4"),
    *("--output", tmp_path / "out"),
    *("--parser", "bisenet", "--parser_path", onnx_file),
  )
  assert result.returncode == 0, result.stderr
  settings = json.loads((tmp_path / "out" / "settings.json").read_text())
  assert settings["parser"] == "bisenet"
  digest = hashlib.sha256(onnx_file.read_bytes()).hexdigest()
  assert settings["models"]["colours.onnx"] == digest
  shards = sorted((tmp_path / "out").glob("*.array_record-*"))
  source = grain.sources.ArrayRecordDataSource([str(s) for s in shards])
  record = schema.decode(source[0])
  # The colour rule assigns some class in every picture.
  assert schema.decode_parsing(record).any()
