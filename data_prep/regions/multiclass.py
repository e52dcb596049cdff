"""Parser with hair and skin of MediaPipe's selfie_multiclass, rest of the mesh.

The segmenter has the classes background, hair, body skin, face skin, clothes
and others (hats, glasses, held objects). Its face skin counts within the
outline of the mesh, and above it as forehead: LaPa has no ears and no neck. Its
class others before the face is background.

Axes: S = 224 crop pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.faces import mediapipe_tasks
from data_prep.faces.mediapipe_tasks import ModelError
from data_prep.regions import lapa, mediapipe
from marlin_jax.records.schema import FRAME_SIZE

if TYPE_CHECKING:
  from data_prep.regions.parsers import Parser

# Classes of the model in its order.
CLASSES = ("background", "hair", "body_skin", "face_skin", "clothes", "others")


@contextlib.contextmanager
def open_model(model: Path) -> Iterator[Parser]:
  """Opens the parser; see `parsers.open_parser`."""
  with mediapipe.open_segmenter(model) as segmenter:
    yield MulticlassParser(segmenter)


class MulticlassParser:
  """Parses with the mesh's polygons and a segmenter of six classes.

  Args:
    segmenter: MediaPipe's Task.
  """

  def __init__(self, segmenter: Any) -> None:
    self._segmenter = segmenter

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """See `Parser.parse`; returns None exactly when there are no landmarks.

    Raises:
      ModelError: the model has other classes.
    """
    if not lapa.has_mesh(landmarks):
      return None
    context, context_box = mediapipe.head_and_shoulders(frame, box)
    result = self._segmenter.segment(mediapipe_tasks.as_image(context))
    masks = [mask.numpy_view().squeeze() for mask in result.confidence_masks]
    if len(masks) != len(CLASSES):
      raise ModelError(
        f"the model has {len(masks)} classes, expected {len(CLASSES)}: "
        f"{', '.join(CLASSES)}"
      )
    return compose(np.stack(masks), context_box, frame, box, landmarks)


def compose(
  confidences: np.ndarray,
  context_box: np.ndarray,
  frame: np.ndarray,
  box: np.ndarray,
  landmarks: np.ndarray,
) -> np.ndarray:
  """Returns the label map, uint8 (S, S).

  Args:
    confidences: float32 (6, K, K), one per class, of a square of the frame.
    context_box: (4,), that square in source pixels.
    frame: uint8 (H, W, 3), RGB.
    box: (4,), the crop.
    landmarks: float32 (478, 2) in source pixels.
  """
  import cv2

  scale = confidences.shape[-1] / (context_box[2] - context_box[0])
  crop_box = (np.asarray(box) - np.tile(context_box[:2], 2)) * scale
  segments = np.stack(
    [
      lapa.warped(mask, crop_box, FRAME_SIZE, cv2.BORDER_REPLICATE)
      for mask in confidences
    ]
  ).argmax(axis=0)
  points = lapa.in_crop(landmarks, box)
  up, across = lapa.face_coordinates(points, FRAME_SIZE)
  oval = np.zeros((FRAME_SIZE, FRAME_SIZE), np.uint8)
  lapa.fill(oval, lapa.outline(points), 1)
  # The forehead is as wide as the face, and ends at the hair.
  face = (oval > 0) | ((up > 0.75) & (across < 1.05))

  labels = np.zeros((FRAME_SIZE, FRAME_SIZE), np.uint8)
  # Body skin within the outline is a beard that the model mistakes.
  skin = (segments == 3) | ((segments == 2) & (oval > 0))
  labels[face & skin] = lapa.CODE["skin"]
  features = labels.copy()
  lapa.draw_features(features, points)
  visible = ~np.isin(segments, (0, 4, 5))
  labels[visible] = features[visible]
  labels[(segments == 1) & (labels < 2)] = lapa.CODE["hair"]
  lapa.clear_outside(labels, frame, box)
  return labels
