"""How a generator is fed: what it sees of the frames, what it hears of a sound.

A generator that was trained here gets what records hold. Wav2Lip's published
weights get what github.com/Rudrabha/Wav2Lip, inference.py, gives them.

Axes: N frames, H W their pixels, S side of the generator's images.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.generation import frame_stream


class Framing(NamedTuple):
  """Part of a record's face crop; edges as ratios of the sides of the crop."""

  left: float = 0.0
  top: float = 0.0
  right: float = 1.0
  bottom: float = 1.0

  def boxes(self, crops: np.ndarray) -> np.ndarray:
    """Returns the boxes (N, 4) of this part for crops (N, 4)."""
    corner, size = crops[:, :2], crops[:, 2:] - crops[:, :2]
    return np.concatenate(
      [corner + self[:2] * size, corner + self[2:] * size], axis=1
    )


@dataclasses.dataclass(frozen=True)
class Feeding:
  """Feeds a generator that was trained here."""

  def boxes(self, crops: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns what the generator sees of frames.

    Args:
      crops: float (N, 4), face crops as in records; NaN without a face.
      size: width and height of the frames.

    Returns:
      (N, 4), boxes in pixels of the frame; NaN without a face.
    """
    del size
    return crops

  def picture(
    self, frame: np.ndarray, box: np.ndarray, image_size: int
  ) -> np.ndarray:
    """Returns one of the `boxes` of a frame as a picture.

    Args:
      frame: uint8 (H, W, 3).
      box: (4,).
      image_size: S; a larger picture is resized by the generator's program.

    Returns:
      uint8 (P, P, 3), P is S or more.
    """
    del image_size
    return frame_stream.crop(frame, box)

  def sound(self, mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Returns float32 (N, 16, 80), the sound around each frame."""
    return mel_windows.frame_windows(mel, frames)


# Wav2Lip's weights were trained on boxes of the detector S3FD, from brow to
# chin and 10 pixels more (inference.py, --pads), which are not square. A
# record's crop is a square 1.25 times as high as the face mesh. These ratios
# follow from the descriptions of both detectors; they were not measured.
WAV2LIP_FRAMING = Framing(left=0.18, top=0.1, right=0.82, bottom=0.94)


@dataclasses.dataclass(frozen=True)
class PublishedFeeding(Feeding):
  """Feeds Wav2Lip's published weights as its inference.py does.

  Boxes are of whole pixels within the frame, resized as by cv2.resize. A
  frame's sound begins with that frame, 40 ms later than in training.
  """

  def boxes(self, crops: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """See `Feeding.boxes`."""
    boxes = np.trunc(WAV2LIP_FRAMING.boxes(crops))
    inside = np.clip(boxes, 0, np.tile(size, 2))
    # A face that lies beyond the frame keeps its box, which is not pasted.
    is_empty = (inside[:, :2] >= inside[:, 2:]).any(axis=1, keepdims=True)
    return np.where(is_empty, boxes, inside)

  def picture(
    self, frame: np.ndarray, box: np.ndarray, image_size: int
  ) -> np.ndarray:
    """See `Feeding.picture`."""
    import cv2

    x0, y0, x1, y1 = np.maximum(box, 0).astype(int)
    part = frame[y0:y1, x0:x1]
    if not part.size:
      return np.zeros((image_size, image_size, 3), np.uint8)
    return cv2.resize(part, (image_size, image_size))

  def sound(self, mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """See `Feeding.sound`."""
    return mel_windows.inference_windows(mel, frames)
