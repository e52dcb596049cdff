"""Parser of BiSeNet trained on CelebAMask-HQ, an ONNX file.

Its input is aligned as the pictures it was trained on, those of CelebA-HQ
(Karras et al., "Progressive Growing of GANs", ICLR 2018, appendix C): 512x512,
RGB, with the eyes level and the same margin around the face, normalised with
ImageNet's mean and standard deviation. The 19 classes are in the order of
github.com/yakhyo/face-parsing.

Axes: S = 224 crop pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.faces.mediapipe_tasks import ModelError
from data_prep.regions import lapa
from marlin_jax.records.schema import FRAME_SIZE

if TYPE_CHECKING:
  from data_prep.regions.parsers import Parser

INPUT_SIZE = 512
MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])
# Each class and its region. `_sided` tells left brows and eyes from right ones
# by their side: the data set does not document what it calls left.
CLASSES = (
  ("background", "background"),
  ("skin", "skin"),
  ("l_brow", "right_brow"),
  ("r_brow", "right_brow"),
  ("l_eye", "right_eye"),
  ("r_eye", "right_eye"),
  ("eye_g", "skin"),
  ("l_ear", "background"),
  ("r_ear", "background"),
  ("ear_r", "background"),
  ("nose", "nose"),
  ("mouth", "inner_mouth"),
  ("u_lip", "upper_lip"),
  ("l_lip", "lower_lip"),
  ("neck", "background"),
  ("neck_l", "background"),
  ("cloth", "background"),
  ("hair", "hair"),
  ("hat", "background"),
)
GLASSES = 6
_REGION_OF = np.array([lapa.CODE[region] for _, region in CLASSES], np.uint8)
# Without a mesh: side of the input over that of the crop, and the distance of
# its centre above that of the crop, as a share of that side. Measured on
# aligned pictures of the sample videos.
UNALIGNED_RATIO = 1.18
UNALIGNED_RISE = 0.12


@contextlib.contextmanager
def open_model(model: Path) -> Iterator[Parser]:
  """Opens the parser; see `parsers.open_parser`."""
  try:
    import onnxruntime
  except ImportError as e:
    raise ModelError(
      "the parser bisenet needs onnxruntime: pip install 'marlin-jax[parsers]'"
    ) from e
  options = onnxruntime.SessionOptions()
  # There is a worker for every core already.
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  try:
    session = onnxruntime.InferenceSession(
      str(model), options, providers=["CPUExecutionProvider"]
    )
  except Exception as e:  # onnxruntime does not export its error classes
    raise ModelError(f"onnxruntime does not open {model}: {e}") from e
  yield BiSeNetParser(session)


class BiSeNetParser:
  """Parses with an ONNX session of 19 classes.

  Without a mesh the whole crop is parsed, so that a face in profile may be
  parsed too.

  Args:
    session: takes float32 (1, 3, 512, 512); its first output is
      (1, 19, 512, 512).
  """

  def __init__(self, session: Any) -> None:
    self._session = session
    self._input = session.get_inputs()[0].name
    self._output = session.get_outputs()[0].name

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; returns None where the model finds no skin.

    Raises:
      ModelError: the model has other classes.
    """
    import cv2

    if not lapa.has_mesh(landmarks):
      landmarks = None
    matrix = alignment(box, landmarks)
    aligned = cv2.warpAffine(
      frame,
      # Pixel centres are at halves in boxes, and at integers in OpenCV.
      _between_centres(matrix),
      (INPUT_SIZE, INPUT_SIZE),
      flags=cv2.INTER_LINEAR,
      borderMode=cv2.BORDER_CONSTANT,
    )
    batch = (aligned.astype(np.float32) / 255 - MEAN) / STD
    batch = np.ascontiguousarray(batch.transpose(2, 0, 1))[None]
    (logits,) = self._session.run([self._output], {self._input: batch})
    expected = (1, len(CLASSES), INPUT_SIZE, INPUT_SIZE)
    if logits.shape != expected:
      raise ModelError(
        f"the model gives {logits.shape}, expected {expected}: CelebAMask-HQ's "
        "classes"
      )
    classes = logits[0].argmax(axis=0).astype(np.uint8)
    if not (classes == 1).any():
      return None
    labels = _sided(_REGION_OF[classes])
    labels, classes = (
      _to_crop(values, matrix, box) for values in (labels, classes)
    )
    if landmarks is not None:
      _draw_eyes_behind_glasses(labels, classes, lapa.in_crop(landmarks, box))
    lapa.clear_outside(labels, frame, box)
    return labels


def alignment(box: np.ndarray, landmarks: np.ndarray | None) -> np.ndarray:
  """Returns the matrix (2, 3) from source pixels to those of the model.

  Args:
    box: (4,), the crop.
    landmarks: (478, 2) in source pixels; None for an upright square.
  """
  if landmarks is None:
    box = lapa.grown(np.asarray(box, np.float64), UNALIGNED_RATIO)
    centre, half = (box[:2] + box[2:]) / 2, (box[2] - box[0]) / 2
    centre[1] -= UNALIGNED_RISE * 2 * half
    across = np.array([half, 0.0])
  else:
    landmarks = np.asarray(landmarks, np.float64)
    right, left = (
      landmarks[list(ring)].mean(axis=0)
      for ring in (lapa.RIGHT_EYE, lapa.LEFT_EYE)
    )
    mouth = landmarks[list(lapa.MOUTH_CORNERS)].mean(axis=0)
    eyes, eye_to_eye = (right + left) / 2, left - right
    eye_to_mouth = mouth - eyes
    across = eye_to_eye + np.array([eye_to_mouth[1], -eye_to_mouth[0]])
    across = across / np.hypot(*across)
    across *= max(2.0 * np.hypot(*eye_to_eye), 1.8 * np.hypot(*eye_to_mouth))
    centre = eyes + 0.1 * eye_to_mouth
  # `across` goes from the centre to the middle of the right side.
  scale = INPUT_SIZE / 2 / (across @ across)
  x_row = across * scale
  y_row = np.array([-across[1], across[0]]) * scale
  rotation = np.stack([x_row, y_row])
  shift = INPUT_SIZE / 2 - rotation @ centre
  return np.column_stack([rotation, shift])


def _between_centres(matrix: np.ndarray) -> np.ndarray:
  """Shifts the coordinates of a matrix (2, 3), both sides, by half a pixel."""
  out = matrix.copy()
  out[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
  return out


def _to_crop(
  values: np.ndarray, matrix: np.ndarray, box: np.ndarray
) -> np.ndarray:
  """Warps uint8 (512, 512) codes to (S, S) of the crop at a box (4,)."""
  import cv2

  step = (box[2] - box[0]) / FRAME_SIZE
  from_crop = np.array([[step, 0, box[0]], [0, step, box[1]], [0, 0, 1]])
  return cv2.warpAffine(
    values,
    _between_centres(matrix @ from_crop),
    (FRAME_SIZE, FRAME_SIZE),
    flags=cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST,
    borderMode=cv2.BORDER_CONSTANT,
  )


def _sided(labels: np.ndarray) -> np.ndarray:
  """Renames brows and eyes in the right half of the picture to left ones.

  Changes labels, uint8 (512, 512), in place. Left is the person's own.
  """
  left_half = labels[:, INPUT_SIZE // 2 :]
  for name in ("brow", "eye"):
    is_part = left_half == lapa.CODE[f"right_{name}"]
    left_half[is_part] = lapa.CODE[f"left_{name}"]
  return labels


def _draw_eyes_behind_glasses(
  labels: np.ndarray, classes: np.ndarray, points: np.ndarray
) -> None:
  """Draws the eyes of the mesh where the model finds glasses, in place.

  LaPa labels the eyes behind glasses, CelebAMask-HQ the glasses.
  """
  with_eyes = labels.copy()
  for name, ring in (
    ("right_eye", lapa.RIGHT_EYE),
    ("left_eye", lapa.LEFT_EYE),
  ):
    lapa.fill(with_eyes, points[list(ring)], lapa.CODE[name])
  is_glasses = classes == GLASSES
  labels[is_glasses] = with_eyes[is_glasses]
