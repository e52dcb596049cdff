"""How far lips and sound are apart: SyncNet's distances over offsets.

As github.com/joonson/syncnet_python, SyncNetInstance.py, and Wav2Lip's
evaluation/scores_LSE: each face is compared with the sounds around it; of the
mean distance at each offset, LSE-D is the least, and LSE-C how far that is
below the median.

The sign is theirs: an offset is positive where the sound comes too early. Sound
that is moved k frames later makes the offset k less.

Axes: N windows of a stretch, in order, one frame apart; K offsets each way,
D numbers of an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MAX_OFFSET = 15  # as Wav2Lip scores

_EPS = 1e-6  # of PyTorch's pairwise_distance


@dataclasses.dataclass(frozen=True)
class Sync:
  """What the distances of a video say.

  Attributes:
    offset: frames by which the sound is too early.
    distance: LSE-D; lower is better.
    confidence: LSE-C; higher is better.
    curve: float64 (2K + 1,), the mean distance at each offset, from K to -K;
      see `offset_axis`.
    num_windows: what they are means of.
  """

  offset: int
  distance: float
  confidence: float
  curve: np.ndarray
  num_windows: int


def distances(
  faces: np.ndarray, sounds: np.ndarray, max_offset: int = MAX_OFFSET
) -> np.ndarray:
  """Compares each face with the sounds around it.

  Sound before the first window and after the last is all zeros, as published.

  Args:
    faces: float (N, D).
    sounds: float (N, D), of the same windows.
    max_offset: K.

  Returns:
    float64 (N, 2K + 1), Euclidean; column j is of the sound j - K frames later.

  Raises:
    ValueError: the shapes do not agree.
  """
  if faces.ndim != 2 or faces.shape != sounds.shape:
    raise ValueError(
      f"faces have shape {faces.shape} and sounds {sounds.shape}, expected "
      "(N, D) of both"
    )
  ends = (max_offset, max_offset), (0, 0)
  padded = np.pad(sounds.astype(np.float64), ends)
  n = len(faces)
  return np.stack(
    [
      np.linalg.norm(faces - padded[j : j + n] + _EPS, axis=1)
      for j in range(2 * max_offset + 1)
    ],
    axis=1,
  )


def offset_axis(max_offset: int = MAX_OFFSET) -> np.ndarray:
  """Returns int (2K + 1,), the offsets that the columns stand for: K to -K."""
  return np.arange(max_offset, -max_offset - 1, -1)


def measure(of_stretches: Sequence[np.ndarray]) -> Sync:
  """Sums up a video.

  Args:
    of_stretches: `distances` of each of its stretches; usually one.

  Raises:
    ValueError: there is no window.
  """
  found = np.concatenate(list(of_stretches))
  if not len(found):
    raise ValueError("no window to measure, expected at least one")
  curve = found.mean(axis=0)
  best = int(curve.argmin())
  return Sync(
    offset=int(offset_axis(len(curve) // 2)[best]),
    distance=float(curve[best]),
    confidence=float(_lower_median(curve) - curve[best]),
    curve=curve,
    num_windows=len(found),
  )


def _lower_median(values: np.ndarray) -> float:
  """PyTorch's median; of an odd number, as published, everyone's."""
  return np.sort(values)[(len(values) - 1) // 2]
