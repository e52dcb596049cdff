"""Offset between lips and sound, from SyncNet's distances.

As github.com/joonson/syncnet_python, SyncNetInstance.py, and Wav2Lip's
evaluation/scores_LSE: the embedding of each face is compared with those of the
sounds around it. Of the mean distances per offset, LSE-D is the lowest, and
LSE-C is the median minus the lowest.

The sign is theirs: an offset is positive where the sound is too early. Moving
the sound k frames later lowers the offset by k.

Axes: N windows, one frame apart; K offsets in each direction, D embedding size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MAX_OFFSET = 15  # as Wav2Lip scores

_EPS = 1e-6  # of PyTorch's pairwise_distance


@dataclasses.dataclass(frozen=True)
class Sync:
  """Agreement of lips and sound in a video.

  Attributes:
    offset: frames by which the sound is too early.
    distance: LSE-D; lower is better.
    confidence: LSE-C; higher is better.
    curve: float64 (2K + 1,), the mean distance at each offset, from K to -K;
      see `offset_axis`.
    num_windows: windows that `curve` is the mean of.
  """

  offset: int
  distance: float
  confidence: float
  curve: np.ndarray
  num_windows: int


@dataclasses.dataclass(frozen=True)
class VideoScore:
  """Score of a video.

  Attributes:
    name: path of the video below the input.
    sync: agreement of its lips and sound.
    num_frames: number of frames, at 25 per second.
    num_faceless: frames without a face.
    num_unheard: frames after the end of the sound.
  """

  name: str
  sync: Sync
  num_frames: int
  num_faceless: int
  num_unheard: int


def distances(
  faces: np.ndarray, sounds: np.ndarray, max_offset: int = MAX_OFFSET
) -> np.ndarray:
  """Returns the distances between each face and the sounds around it.

  As published, sound embeddings before the first and after the last window are
  zeros.

  Args:
    faces: float (N, D), embeddings of the faces of N windows.
    sounds: float (N, D), embeddings of the sound of the same windows.
    max_offset: largest offset in windows, K.

  Returns:
    float64 (N, 2K + 1), Euclidean; column j is for sound j - K frames later.

  Raises:
    ValueError: the shapes differ.
  """
  if faces.ndim != 2 or faces.shape != sounds.shape:
    raise ValueError(
      f"faces have shape {faces.shape} and sounds {sounds.shape}, expected "
      "(N, D) of both"
    )
  padding = (max_offset, max_offset), (0, 0)
  padded = np.pad(sounds.astype(np.float64), padding)
  n = len(faces)
  return np.stack(
    [
      np.linalg.norm(faces - padded[j : j + n] + _EPS, axis=1)
      for j in range(2 * max_offset + 1)
    ],
    axis=1,
  )


def offset_axis(max_offset: int = MAX_OFFSET) -> np.ndarray:
  """Returns the offset of each column of `distances`, int (2K + 1,)."""
  return np.arange(max_offset, -max_offset - 1, -1)


def measure(stretches: Sequence[np.ndarray]) -> Sync:
  """Measures the agreement of lips and sound in a video.

  Args:
    stretches: `distances` of each run of frames with a face.

  Raises:
    ValueError: there are no windows.
  """
  rows = np.concatenate(list(stretches))
  if not len(rows):
    raise ValueError("no window to measure, expected at least one")
  curve = rows.mean(axis=0)
  best = int(curve.argmin())
  return Sync(
    offset=int(offset_axis(len(curve) // 2)[best]),
    distance=float(curve[best]),
    confidence=float(_lower_median(curve) - curve[best]),
    curve=curve,
    num_windows=len(rows),
  )


def _lower_median(values: np.ndarray) -> float:
  """Returns PyTorch's median: of an even number of values the lower middle."""
  return np.sort(values)[(len(values) - 1) // 2]
