"""Quality of a face track: four terms in [0, 1], and their combination.

  size       height of the face in source pixels over its height of 179 pixels
             in a crop, at most 1: an enlarged crop shows less detail
  sharpness  fineness of the sharpest edges of the face at the scale of the
             crop; low where the face is out of focus, blurred by motion,
             enlarged before or compressed too much; noise does not count as an
             edge
  pose       cosine of the angle between the normal of the face and the
             direction to the camera: 1 from the front, 0.5 turned by 60
             degrees, 0 in profile; times how upright it is: 1 up to a tilt of
             30 degrees, 0 for a face that lies on its side
  landmarks  share of the frames that have a mesh, times the steadiness of the
             mesh on the head

Size, sharpness and pose are medians over frames, so that a few bad frames of a
good track count little.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from data_prep.faces import boxes
from data_prep.faces.meshes import Meshes
from marlin_jax.records.schema import FRAME_SIZE

# Standard deviations, in crop pixels, of the Gaussians of the two Laplacians
# that are compared.
FINE_SIGMA, COARSE_SIGMA = 1.0, 3.0
# Ratio of their responses at an edge that is much wider than both, and at an
# edge with a standard deviation of 1.1 crop pixels, which counts as sharp. Real
# faces of 224 pixels have 0.6.
BLURRED_RATIO = (FINE_SIGMA / COARSE_SIGMA) ** 2
SHARP_RATIO = 0.5
# Noise is everywhere in a face and edges are not: this many times the energy
# at the quartile of the plainest pixels is subtracted.
NOISE_FACTOR = 2.5

# Landmarks that talking and frowning do not move: corners of the eyes, and the
# bridge of the nose.
_STEADY = (33, 133, 263, 362, 168, 6)
# Mean jump of these points between frames, over the height of the face, that
# halves the score. Steady meshes have 0.002, those next to a face 0.05.
HALF_JITTER = 0.02

# Tilt in degrees up to which a head is upright: people who talk tilt theirs.
FREE_TILT = 30.0

_RIGHT_SIDE, _LEFT_SIDE, _TOP, _CHIN = 234, 454, 10, 152


def sharpness(frame: np.ndarray, mesh: np.ndarray) -> float:
  """Returns the sharpness of a face at the scale of its crop, in [0, 1].

  It is the energy of a fine Laplacian over that of a coarse one, both where
  they are strongest: contrast and light cancel, and the width of edges remains.

  Args:
    frame: uint8 (H, W, 3), RGB.
    mesh: (N, 2 or 3), landmarks of the face in source pixels.
  """
  import cv2

  box = boxes.square_around(boxes.bounds(mesh[:, :2]), boxes.CROP_RATIO)
  crop = boxes.crop_frame(frame, box)
  grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
  face = _face_ellipse()
  fine, coarse = (
    _edge_energy(grey, sigma)[face] for sigma in (FINE_SIGMA, COARSE_SIGMA)
  )
  plain, strong = np.quantile(fine, (0.25, 0.95))
  reference = float(np.quantile(coarse, 0.95))
  if reference < 1.0:  # no edge of even one grey level
    return 0.0
  energy = max(float(strong - NOISE_FACTOR * plain), 0.0)
  ratio = math.sqrt(energy / reference)
  return float(
    np.clip((ratio - BLURRED_RATIO) / (SHARP_RATIO - BLURRED_RATIO), 0, 1)
  )


def _edge_energy(grey: np.ndarray, sigma: float) -> np.ndarray:
  """Returns the local energy of the scale-normalised Laplacian, (H, W)."""
  import cv2

  smooth = cv2.GaussianBlur(grey, (0, 0), sigma)
  edges = sigma**2 * cv2.Laplacian(smooth, cv2.CV_32F, ksize=1)
  return cv2.GaussianBlur(edges * edges, (0, 0), 3.0)


@functools.cache
def _face_ellipse() -> np.ndarray:
  """Returns bool (224, 224), True in the face, away from the background."""
  offset = np.arange(FRAME_SIZE) + 0.5 - FRAME_SIZE / 2
  half = FRAME_SIZE / 2 / boxes.CROP_RATIO
  x, y = offset[None] / (0.78 * half), offset[:, None] / (0.98 * half)
  return np.hypot(x, y) < 1


def frontality(mesh: np.ndarray) -> float:
  """Returns the cosine of the angle between a face and the camera.

  Args:
    mesh: (478, 3), x, y and depth in one unit; depth is smaller when nearer.
  """
  left, right, chin, top = np.asarray(
    mesh[[_LEFT_SIDE, _RIGHT_SIDE, _CHIN, _TOP]], np.float64
  )
  ax, ay, az = (left - right).tolist()
  bx, by, bz = (chin - top).tolist()
  # The normal of the face; np.cross takes longer than all of this.
  x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
  length = math.hypot(x, y, z)
  return max(z / length, 0.0) if length else 0.0


def uprightness(mesh: np.ndarray) -> float:
  """Returns how upright a face is in the picture, in [0, 1].

  Args:
    mesh: (478, 2 or 3), x and y in source pixels.

  Returns:
    1 up to FREE_TILT degrees; beyond it the cosine of the tilt over that of
    FREE_TILT, and 0 from 90 degrees on.
  """
  x, y = np.asarray(mesh, np.float64)[_CHIN, :2] - mesh[_TOP, :2]
  length = math.hypot(x, y)
  if not length:
    return 0.0
  cosine = y / length / math.cos(math.radians(FREE_TILT))
  return min(max(float(cosine), 0.0), 1.0)


def steadiness(landmarks: np.ndarray) -> float:
  """Returns the steadiness of a mesh on a head.

  It is measured by points that no muscle moves: the distance of each from the
  midpoint of its positions in the frames before and after, less the common
  motion of all.

  Args:
    landmarks: float32 (T, 478, 2) in source pixels; NaN without a mesh.

  Returns:
    A number in (0, 1]; 1 where no three frames in a row have a mesh.
  """
  return _steadiness(
    landmarks[:, list(_STEADY)], np.ptp(landmarks[..., 1], axis=1)
  )


def _steadiness(points: np.ndarray, heights: np.ndarray) -> float:
  """Returns the steadiness of points (T, 6, 2) of faces of heights (T,)."""
  points = points.astype(np.float64)
  bend = points[1:-1] - (points[:-2] + points[2:]) / 2
  bend -= bend.mean(axis=1, keepdims=True)
  jitter = np.linalg.norm(bend, axis=2).mean(axis=1) / heights[1:-1]
  jitter = jitter[np.isfinite(jitter)]
  if not len(jitter):
    return 1.0
  return float(HALF_JITTER / (HALF_JITTER + jitter.mean()))


def terms(
  face_heights: np.ndarray,
  sharpnesses: np.ndarray,
  frontalities: np.ndarray,
  meshes: Meshes,
  steps: int = 1,
) -> np.ndarray:
  """Returns the terms of a track, float32 (4,), in the order of the module.

  Args:
    face_heights: (N,), heights of the mesh in source pixels, estimated where
      there is none.
    sharpnesses: (M,), of some frames; the term is 0 where M is 0.
    frontalities: (K,), frontality times uprightness, of the frames with a
      mesh; the term is 0 where K is 0.
    meshes: landmarks of the T frames.
    steps: distance in frames between meshes that were not interpolated.
  """
  points, heights = meshes.picked(_STEADY), meshes.heights()
  full_height = FRAME_SIZE / boxes.CROP_RATIO
  return np.array(
    [
      min(float(np.median(face_heights)) / full_height, 1.0),
      float(np.median(sharpnesses)) if len(sharpnesses) else 0.0,
      float(np.median(frontalities)) if len(frontalities) else 0.0,
      float(np.isfinite(heights).mean())
      * _steadiness(points[::steps], heights[::steps]),
    ],
    np.float32,
  )


def combine(quality_terms: np.ndarray) -> float:
  """Returns the geometric mean of the terms, each at least 0.01.

  A term near 0 lowers the whole, as in a product, but the scale remains that of
  one term. The floor keeps tracks with a term of 0 comparable.
  """
  floored = np.maximum(np.asarray(quality_terms, np.float64), 0.01)
  return float(np.prod(floored) ** (1 / len(floored)))
