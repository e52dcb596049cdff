"""Draws what a prepared data set holds: crops and their face regions.

python -m data_prep.contact_sheet DATASET_DIR --output sheet.png
"""

from __future__ import annotations

import numpy as np

# One per region, background first (not drawn).
COLOURS = np.array(
  [
    (0, 0, 0),
    (246, 189, 140),
    (200, 0, 0),
    (0, 40, 220),
    (255, 140, 0),
    (0, 200, 255),
    (0, 190, 60),
    (255, 60, 180),
    (255, 255, 255),
    (140, 0, 200),
    (240, 230, 0),
  ],
  np.uint8,
)


def overlay(
  frame: np.ndarray, labels: np.ndarray, opacity: float = 0.4
) -> np.ndarray:
  """Draws the regions over a crop, tinted and outlined.

  Args:
    frame: uint8 (H, W, 3), RGB.
    labels: uint8 (H, W), LaPa codes.
    opacity: of the tint, in [0, 1]; outlines are opaque.

  Returns:
    uint8 (H, W, 3), RGB; the background is left as it is.
  """
  colours = COLOURS[labels]
  mixed = (1 - opacity) * frame + opacity * colours
  out = np.where(labels[..., None] > 0, mixed, frame).round().astype(np.uint8)
  edge = np.zeros(labels.shape, bool)
  edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
  edge[1:] |= labels[1:] != labels[:-1]
  edge &= labels > 0
  out[edge] = colours[edge]
  return out
