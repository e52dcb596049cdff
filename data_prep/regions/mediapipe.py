"""The default parser: polygons of the mesh, hair from a person mask.

Eyes, brows, nose, lips and the outline of the face are polygons of the face
mesh. Hair, and the forehead above the mesh, come from a person mask and from
colour models of each picture. Objects before the face are not detected: labels
are those of the face behind them.

Axes: S = 224 crop pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.faces import boxes, mediapipe_tasks
from data_prep.regions import lapa
from marlin_jax.records.schema import FRAME_SIZE

if TYPE_CHECKING:
  from data_prep.regions.parsers import Parser


@contextlib.contextmanager
def open_model(model: Path) -> Iterator[Parser]:
  """Opens the parser; see `parsers.open_parser`."""
  with open_segmenter(model) as segmenter:
    yield MediaPipeParser(segmenter)


def open_segmenter(model: Path) -> contextlib.AbstractContextManager[Any]:
  """Opens a segmenter that returns the confidence of each class."""
  return mediapipe_tasks.open_task(
    "ImageSegmenter",
    model,
    output_confidence_masks=True,
    output_category_mask=False,
  )


class MediaPipeParser:
  """Parses with the mesh's polygons and MediaPipe's person mask.

  Args:
    segmenter: MediaPipe's Task.
  """

  ANALYSIS_STEPS = 6

  def __init__(self, segmenter: Any) -> None:
    self._segmenter = segmenter

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; returns None exactly when there are no landmarks."""
    if not lapa.has_mesh(landmarks):
      return None
    maps = self.analyse(frame, box, landmarks)
    return self.label(maps, lapa.in_crop(landmarks, box))

  def label(self, maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """See `TwoStepParser.label`."""
    import cv2

    _, masks = cv2.threshold(maps, 127, 255, cv2.THRESH_BINARY)
    hair, forehead, fringe, inside = cv2.split(masks)
    labels = np.zeros((FRAME_SIZE, FRAME_SIZE), np.uint8)
    _paint(labels, forehead, "skin")
    _paint(labels, hair, "hair")
    lapa.fill(labels, lapa.outline(points), lapa.CODE["skin"])
    _paint(labels, fringe, "hair")
    lapa.draw_features(labels, points)
    _paint(labels, cv2.bitwise_not(inside), "background")
    return labels

  def analyse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray
  ) -> np.ndarray:
    """See `TwoStepParser.analyse`.

    Returns:
      uint8 (S, S, 4), in [0, 255]: confidence that a pixel is hair, forehead,
      fringe, and inside the frame.
    """
    import cv2

    area = lapa.picture_area(frame)
    context, context_box = head_and_shoulders(frame, box)
    scale = CONTEXT_SIZE / (context_box[2] - context_box[0])
    result = self._segmenter.segment(mediapipe_tasks.as_image(context))
    person = result.confidence_masks[-1].numpy_view().squeeze()

    # The head alone, at the same scale: it shows the colours of the hair, of
    # which the crop may show little.
    half = round(HEAD_RATIO / CONTEXT_RATIO * CONTEXT_SIZE / 2)
    low, high = CONTEXT_SIZE // 2 - half, CONTEXT_SIZE // 2 + half
    points = (landmarks - context_box[:2]) * scale - low
    inside = lapa.inside(area, context_box, CONTEXT_SIZE)
    masks = _hair_forehead_fringe(
      context[low:high, low:high],
      points,
      person[low:high, low:high],
      inside[low:high, low:high],
    )
    # Not with numpy, which is slow over a short last axis.
    stack = cv2.merge([255 * mask.astype(np.uint8) for mask in masks])
    stack = cv2.GaussianBlur(stack, (0, 0), 1)
    crop_box = np.concatenate([box[:2], box[2:]]) - np.tile(context_box[:2], 2)
    stack = lapa.warped(
      stack, crop_box * scale - low, FRAME_SIZE, cv2.BORDER_REPLICATE
    )
    inside = lapa.inside(area, box, FRAME_SIZE)
    return cv2.merge([*cv2.split(stack), 255 * inside.astype(np.uint8)])


def _paint(labels: np.ndarray, mask: np.ndarray, region: str) -> None:
  """Labels the pixels of a mask, in place.

  Args:
    labels: uint8 (S, S).
    mask: uint8 (S, S), not 0 in the region.
    region: its name.
  """
  import cv2

  cv2.copyTo(np.full_like(labels, lapa.CODE[region]), mask, labels)


def head_and_shoulders(
  frame: np.ndarray, box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns uint8 (256, 256, 3) around a crop, and its box (4,).

  The person mask needs this context.
  """
  import cv2

  context_box = lapa.grown(box, CONTEXT_RATIO / boxes.CROP_RATIO)
  # Black: with a repeated border the person mask would continue past it.
  context = lapa.warped(frame, context_box, CONTEXT_SIZE, cv2.BORDER_CONSTANT)
  return context, context_box


# --- Hair ---------------------------------------------------------------------

# Sides of the pictures for the person mask and for the hair, over the height of
# the face.
CONTEXT_RATIO = 3.0
HEAD_RATIO = 1.8
CONTEXT_SIZE = 256
# Mean lightness of the cheeks, of 255, below which colours are not used.
DARK = 45.0
# Squared distance, in standard deviations, beyond which a colour differs from
# that of the cheeks.
NOT_SKIN = 9.0


def _hair_forehead_fringe(
  head: np.ndarray,
  points: np.ndarray,
  person: np.ndarray,
  inside: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Splits the person around the face into hair, forehead and the rest.

  Each pixel gets log odds of hair over skin from two colour models of this
  picture and from its position on the head. In the dark only the position
  counts.

  Args:
    head: uint8 (H, H, 3), RGB, the head and some of its surroundings.
    points: (478, 2), the mesh in this picture.
    person: float32 (H, H), probability of a person.
    inside: bool (H, H), False where the picture reaches past the frame.

  Returns:
    Three bool (H, H): hair around the oval; forehead, skin above the oval;
    fringe, hair inside the oval. The first two reach a little into the oval,
    so that no gap is left between them and it.
  """
  import cv2

  size = len(head)
  up, across = lapa.face_coordinates(points, size)
  oval = np.zeros((size, size), np.uint8)
  lapa.fill(oval, points[lapa.OVAL], 1)
  inner = cv2.erode(oval, np.ones((5, 5), np.uint8)).astype(bool)
  oval = oval.astype(bool)
  body = (person > 0.5) & inside

  # Log odds: high above the forehead, falling down to the chin, where dark
  # pixels are the neck in the shadow of the jaw. Beside the face, above the
  # ears, there is little but hair, and colours mislead: grey hair in bright
  # light has the colour of skin.
  prior = np.interp(
    up, [0.1, 0.2, 0.4, 0.8, 1.0, 1.15], [-5.0, -3.5, -1.5, 0.0, 0.5, 2.0]
  ) - 2.0 * np.clip(across - 1.5, 0, 1)
  beside = np.clip((across - 1.0) / 0.1, 0, 1)
  prior = prior + 4.0 * beside * np.clip((up - 0.6) / 0.2, 0, 1)
  odds = _hair_colour(head, points, oval, body, up, across)
  score = cv2.GaussianBlur((odds + prior).astype(np.float32), (0, 0), 1.5)

  hair = body & (up > 0) & ~inner & (score > 0)
  opened = _opened(hair)
  hair = opened & _joined(opened, hair & (up > 0.75))
  brows = points[list(lapa.RIGHT_BROW + lapa.LEFT_BROW)].astype(np.int64)
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

  The model of skin is fitted to the cheeks, that of hair to pixels of the upper
  head that do not fit the model of skin.
  """
  import cv2

  lab = cv2.cvtColor(cv2.GaussianBlur(head, (3, 3), 0), cv2.COLOR_RGB2LAB)
  lab = lab.astype(np.float32)
  features = np.zeros(oval.shape, np.uint8)
  for name, ring in lapa.POLYGONS:
    if name != "nose":
      lapa.fill(features, points[ring], 1)
  features = cv2.dilate(features, np.ones((5, 5), np.uint8)).astype(bool)
  # Neither lower, where a beard may be, nor higher, where a fringe may be.
  cheeks = body & oval & ~features & (up > 0.38) & (up < 0.75) & (across < 0.8)
  skin = lab[cheeks]
  if len(skin) < 50 or skin[:, 0].mean() < DARK:
    return np.zeros_like(up)
  from_skin = _distance(lab, skin)
  top = body & ~oval & (up > 0.65) & (across < 1.3)
  seeds = top & (from_skin > NOT_SKIN)
  if seeds.sum() < 30:
    # No part of the head differs from skin.
    return np.full_like(up, -4.0)
  from_hair = _distance(lab, lab[seeds])
  return np.clip(0.5 * (from_skin - from_hair), -4.0, 4.0)


def _distance(lab: np.ndarray, sample: np.ndarray) -> np.ndarray:
  """Returns squared Mahalanobis distances (H, H) of colours (H, H, 3).

  Args:
    lab: picture in Lab colours.
    sample: (N, 3), colours that the distribution is fitted to.
  """
  import cv2

  by_channel = np.ascontiguousarray(sample.T)
  mean = np.median(by_channel, axis=1)
  # The diagonal is noise of the camera and of the codec.
  covariance = np.cov(by_channel) + 16.0 * np.eye(3)
  root = np.linalg.cholesky(np.linalg.inv(covariance)).T
  away = cv2.transform(lab, np.column_stack([root, -root @ mean]))
  # Sum over colours; numpy takes ten times as long over a short last axis.
  return cv2.transform(np.square(away, out=away), np.ones((1, 3)))


def _opened(mask: np.ndarray) -> np.ndarray:
  """Removes slivers of up to 4 pixels from a bool mask."""
  import cv2

  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
  opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
  return opened.astype(bool)


def _joined(mask: np.ndarray, to: np.ndarray) -> np.ndarray:
  """Returns the connected parts of a bool mask that touch the mask `to`."""
  import cv2

  _, parts = cv2.connectedComponents((mask | to).astype(np.uint8))
  touched = np.zeros(parts.max() + 1, bool)
  touched[parts[to]] = True
  touched[0] = False
  return mask & touched[parts]
