"""LaPa label map of a face, in crop coordinates.

Eyes, brows, nose, lips and the face's outline are polygons of the face mesh.
Hair, and the forehead above the mesh, come from a person mask and from the
colours of this very picture.

Axes: S = 224 crop pixels; N landmarks. Points are x, y.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, Self

import numpy as np

from data_prep import faces, mediapipe_tasks
from marlin_jax.records import FRAME_SIZE, REGIONS

_CODE = {name: code for code, name in enumerate(REGIONS)}

# Indices into the mesh, as rings. Right and left are the person's own, as in
# LaPa: in an unmirrored picture the right eye is on the left.
_RIGHT_EYE = (
  33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7,
)  # fmt: skip
_LEFT_EYE = (
  263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390,
  249,
)  # fmt: skip
_RIGHT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
_LEFT_BROW = (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)
# From between the eyes down the sides, round the wings, below the nostrils.
_NOSE = (
  168, 193, 188, 217, 209, 129, 64, 98, 97, 2, 326, 327, 294, 358, 429, 437,
  412, 417,
)  # fmt: skip
_OUTER_LIP_TOP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
_OUTER_LIP_BOTTOM = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
_INNER_LIP_TOP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
_INNER_LIP_BOTTOM = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
_UPPER_LIP = _OUTER_LIP_TOP + _INNER_LIP_TOP[::-1]
_LOWER_LIP = _OUTER_LIP_BOTTOM + _INNER_LIP_BOTTOM[::-1]
_INNER_MOUTH = _INNER_LIP_TOP + _INNER_LIP_BOTTOM[::-1]
_OVAL = (
  10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378,
  400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21,
  54, 103, 67, 109,
)  # fmt: skip
_FOREHEAD_TOP, _CHIN = 10, 152

# In the order they are drawn: a later one covers an earlier one.
_POLYGONS = (
  ("nose", _NOSE),
  ("upper_lip", _UPPER_LIP),
  ("lower_lip", _LOWER_LIP),
  ("inner_mouth", _INNER_MOUTH),
  ("right_eye", _RIGHT_EYE),
  ("left_eye", _LEFT_EYE),
  ("right_brow", _RIGHT_BROW),
  ("left_brow", _LEFT_BROW),
)


class Parser(Protocol):
  """What a face parser offers; a context manager."""

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """Labels one face.

    Args:
      frame: uint8 (H, W, 3), RGB source frame.
      box: float32 (4,), the crop in source pixels.
      landmarks: float32 (478, 2) in source pixels; None or NaN where the mesh
        was not found.

    Returns:
      uint8 (224, 224) of LaPa codes in crop coordinates, or None when no face
      was parsed.
    """
    ...

  def close(self) -> None: ...

  def __enter__(self) -> Self: ...

  def __exit__(self, *exception: object) -> None: ...


class MediaPipeParser:
  """Parses with the mesh's polygons and MediaPipe's person mask.

  It keeps no state between calls.

  Raises:
    assets.AssetError: the model file could not be had.
    RuntimeError: a system library is missing.
  """

  def __init__(self) -> None:
    with contextlib.ExitStack() as stack:
      self._segmenter = stack.enter_context(
        mediapipe_tasks.open_task(
          "ImageSegmenter",
          "selfie_segmenter.tflite",
          output_confidence_masks=True,
          output_category_mask=False,
        )
      )
      self._stack = stack.pop_all()

  def close(self) -> None:
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; None exactly when there are no landmarks."""
    if landmarks is None or not np.isfinite(landmarks).all():
      return None
    hair, forehead, fringe = self._hair(frame, box, landmarks)
    points = (landmarks - box[:2]) * (FRAME_SIZE / (box[2] - box[0]))
    labels = np.zeros((FRAME_SIZE, FRAME_SIZE), np.uint8)
    labels[forehead] = _CODE["skin"]
    labels[hair] = _CODE["hair"]
    _fill(labels, points[list(_OVAL)], _CODE["skin"])
    labels[fringe] = _CODE["hair"]
    for name, ring in _POLYGONS:
      _fill(labels, points[list(ring)], _CODE[name])
    labels[~_inside_frame(frame, box, FRAME_SIZE)] = _CODE["background"]
    return labels

  def _hair(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hair, forehead and fringe, bool (S, S) each, in the crop."""
    import cv2

    # Head and shoulders: that context makes the person mask good.
    context_box = _grown(box, CONTEXT_RATIO / faces.CROP_RATIO)
    scale = CONTEXT_SIZE / (context_box[2] - context_box[0])
    # Black, not the repeated border: the person mask then goes on past it.
    context = _warped(frame, context_box, CONTEXT_SIZE, cv2.BORDER_CONSTANT)
    result = self._segmenter.segment(mediapipe_tasks.as_image(context))
    person = result.confidence_masks[-1].numpy_view().squeeze()

    # The head alone, at the same scale: it holds the hair's colours, of which
    # the crop may show little.
    half = round(HEAD_RATIO / CONTEXT_RATIO * CONTEXT_SIZE / 2)
    low, high = CONTEXT_SIZE // 2 - half, CONTEXT_SIZE // 2 + half
    points = (landmarks - context_box[:2]) * scale - low
    inside = _inside_frame(frame, context_box, CONTEXT_SIZE)
    masks = _hair_forehead_fringe(
      context[low:high, low:high],
      points,
      person[low:high, low:high],
      inside[low:high, low:high],
    )
    stack = np.stack(masks, axis=-1).astype(np.float32)
    stack = cv2.GaussianBlur(stack, (0, 0), 1)
    crop_box = np.concatenate([box[:2], box[2:]]) - np.tile(context_box[:2], 2)
    stack = _warped(
      stack, crop_box * scale - low, FRAME_SIZE, cv2.BORDER_REPLICATE
    )
    hair, forehead, fringe = np.moveaxis(stack > 0.5, -1, 0)
    return hair, forehead, fringe


def _grown(box: np.ndarray, ratio: float) -> np.ndarray:
  """Returns the box (4,) scaled about its centre."""
  centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
  return np.concatenate([centre - ratio * half, centre + ratio * half])


def _warped(
  image: np.ndarray, box: np.ndarray, box_size: int, border: int
) -> np.ndarray:
  """Samples a box of an image (H, W[, C]) as (box_size, box_size[, C])."""
  import cv2

  step = float(box[2] - box[0]) / box_size
  x, y = (float(v) + step / 2 - 0.5 for v in box[:2])
  return cv2.warpAffine(
    image,
    np.array([[step, 0, x], [0, step, y]]),
    (box_size, box_size),
    flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
    borderMode=border,
  )


def _fill(image: np.ndarray, ring: np.ndarray, value: int) -> None:
  """Fills the polygon with points (N, 2) of an image (H, W), in place."""
  import cv2

  # Sixteenths of a pixel; the centre of pixel 0 is at 0.5.
  cv2.fillPoly(
    image, [np.round((ring - 0.5) * 16).astype(np.int32)], value, shift=4
  )


def _inside_frame(
  frame: np.ndarray, box: np.ndarray, box_size: int
) -> np.ndarray:
  """Returns bool (box_size, box_size): does this pixel of a box sampled so
  have its centre within the frame?"""
  at = (np.arange(box_size) + 0.5) * ((box[2] - box[0]) / box_size)
  x, y = at + box[0], at + box[1]
  height, width = frame.shape[:2]
  return ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))


# --- Hair ---------------------------------------------------------------------

# Sides of the pictures that the person mask and the hair are made from, over
# the height of the face.
CONTEXT_RATIO = 3.0
HEAD_RATIO = 1.8
CONTEXT_SIZE = 256
# Mean lightness of the cheeks, of 255, below which colours say nothing.
DARK = 45.0
# Squared distance, in standard deviations, beyond which a colour is not that
# of the cheeks.
NOT_SKIN = 9.0


def _hair_forehead_fringe(
  head: np.ndarray,
  points: np.ndarray,
  person: np.ndarray,
  inside: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Splits what is of the person round the face into hair, forehead and rest.

  Each pixel gets log odds of hair over skin from two colour models of this
  picture and from its place on the head. In the dark the place alone decides.

  Args:
    head: uint8 (H, H, 3), RGB, the head and some of its surroundings.
    points: (478, 2), the mesh in this picture.
    person: float32 (H, H), probability of a person.
    inside: bool (H, H), false where the picture reaches past the frame.

  Returns:
    Three bool (H, H): hair round the oval; forehead, skin above the oval;
    fringe, hair inside the oval. The first two reach a little into the oval,
    so that nothing is left between.
  """
  import cv2

  size = len(head)
  up, across = _face_coordinates(points, size)
  oval = np.zeros((size, size), np.uint8)
  _fill(oval, points[list(_OVAL)], 1)
  inner = cv2.erode(oval, np.ones((5, 5), np.uint8)).astype(bool)
  oval = oval.astype(bool)
  body = (person > 0.5) & inside

  # Log odds: hair above the forehead, less and less down to the chin, where it
  # is the neck in the jaw's shadow.
  prior = np.interp(
    up, [0.1, 0.2, 0.4, 0.8, 1.0, 1.15], [-5.0, -3.5, -1.5, 0.0, 0.5, 2.0]
  ) - 2.0 * np.clip(across - 1.3, 0, 1)
  odds = _hair_colour(head, points, oval, body, up, across)
  score = cv2.GaussianBlur((odds + prior).astype(np.float32), (0, 0), 1.5)

  hair = body & (up > 0) & ~inner & (score > 0)
  hair = _opened(hair) & _joined(_opened(hair), hair & (up > 0.75))
  brows = points[list(_RIGHT_BROW + _LEFT_BROW)].astype(np.int64)
  brows = np.clip(brows, 0, size - 1)
  brow_top = up[brows[:, 1], brows[:, 0]].max()
  fringe = _opened(oval & (up > brow_top + 0.06) & (score > 1.5))
  # The forehead narrows towards the top of the head.
  forehead = body & ~inner & ~hair & (up > 0.75)
  forehead &= np.hypot(across, np.clip(up - 0.75, 0, None) / 0.6) < 1.0
  forehead = _joined(forehead, oval & ~inner)
  return hair, forehead, fringe


def _hair_colour(
  head: np.ndarray,
  points: np.ndarray,
  oval: np.ndarray,
  body: np.ndarray,
  up: np.ndarray,
  across: np.ndarray,
) -> np.ndarray:
  """Returns float32 (H, H), log odds in [-4, 4] of hair by colour alone.

  Skin is what the cheeks show; hair what the upper head shows beside it.
  """
  import cv2

  lab = cv2.cvtColor(cv2.GaussianBlur(head, (3, 3), 0), cv2.COLOR_RGB2LAB)
  lab = lab.astype(np.float32)
  features = np.zeros(oval.shape, np.uint8)
  for name, ring in _POLYGONS:
    if name != "nose":
      _fill(features, points[list(ring)], 1)
  features = cv2.dilate(features, np.ones((5, 5), np.uint8)).astype(bool)
  # Not lower, where a beard may be, nor higher, where a fringe may be.
  cheeks = body & oval & ~features & (up > 0.38) & (up < 0.75) & (across < 0.8)
  if cheeks.sum() < 50 or lab[cheeks, 0].mean() < DARK:
    return np.zeros_like(up)
  from_skin = _distance(lab, lab[cheeks])
  top = body & ~oval & (up > 0.65) & (across < 1.3)
  seeds = top & (from_skin > NOT_SKIN)
  if seeds.sum() < 30:
    # Nothing on the head looks other than skin.
    return np.full_like(up, -4.0)
  from_hair = _distance(lab, lab[seeds])
  return np.clip(0.5 * (from_skin - from_hair), -4.0, 4.0)


def _face_coordinates(
  points: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns two float32 (size, size): height and place across the face.

  Height is 0 at the chin and 1 at the top of the mesh, along the line between
  them; across is 0 on that line and 1 where the mesh is widest on that side.
  """
  chin, top = points[_CHIN], points[_FOREHEAD_TOP]
  axis = top - chin
  length = max(float(np.hypot(*axis)), 1.0)
  axis = axis / length
  normal = np.array([-axis[1], axis[0]])
  ring = (points[list(_OVAL)] - chin) @ normal
  grid = np.arange(size, dtype=np.float32) + 0.5
  x, y = grid[None] - chin[0], grid[:, None] - chin[1]
  up = (x * axis[0] + y * axis[1]) / length
  across = x * normal[0] + y * normal[1]
  low, high = min(float(ring.min()), -1.0), max(float(ring.max()), 1.0)
  across = np.where(across < 0, across / low, across / high)
  return up.astype(np.float32), across.astype(np.float32)


def _distance(lab: np.ndarray, sample: np.ndarray) -> np.ndarray:
  """Returns squared Mahalanobis distances (H, H) of colours (H, H, 3).

  Args:
    lab: the picture.
    sample: (N, 3), colours of the class.
  """
  import cv2

  mean = np.median(sample, axis=0)
  # Noise of the camera and of the codec.
  covariance = np.cov(sample, rowvar=False) + 16.0 * np.eye(3)
  root = np.linalg.cholesky(np.linalg.inv(covariance)).T
  away = cv2.transform(lab, np.column_stack([root, -root @ mean]))
  return np.square(away, out=away).sum(axis=-1)


def _opened(mask: np.ndarray) -> np.ndarray:
  """Removes slivers of up to 4 pixels from a bool mask."""
  import cv2

  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
  opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
  return opened.astype(bool)


def _joined(mask: np.ndarray, to: np.ndarray) -> np.ndarray:
  """Returns the connected parts of a bool mask that touch another."""
  import cv2

  _, parts = cv2.connectedComponents((mask | to).astype(np.uint8))
  touched = np.zeros(parts.max() + 1, bool)
  touched[np.unique(parts[to])] = True
  touched[0] = False
  return mask & touched[parts]
