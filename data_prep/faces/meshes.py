"""Face meshes of a track, packed: a long video has hundreds of thousands.

A packed mesh takes `MESH_BYTES`, 1.9 KB. In videos of 20 frames per second and
more, every second frame has one, so that a face costs `FRAME_BYTES`, 1.0 KB, a
frame once its track has ended, and `OPEN_FRAME_BYTES`, 1.7 KB, while it goes
on. Where two faces are close, and in slower videos, every frame has one and the
numbers double. Tracks go on for a few minutes (see `tracking.MAX_TRACK_SECS`),
and what memory does not hold of the others is in files (`MeshStore`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence

import numpy as np

from data_prep.faces import boxes

NUM_LANDMARKS = 478

# Two coordinates of 16 bits for each landmark, the bounds and the frame.
MESH_BYTES = NUM_LANDMARKS * 2 * 2 + 4 * 4 + 8
# With the box of the crop.
FRAME_BYTES = MESH_BYTES / 2 + 4 * 4
# With a look (see `shots.Look`) of 468 bytes, and what Python needs for the
# objects of a sighting.
OPEN_FRAME_BYTES = (MESH_BYTES + 468 + 1000) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class PackedMesh:
  """One mesh in 16 bits a coordinate: a 65,535th of the face's size.

  Attributes:
    codes: uint16 (478, 2), from 0 at the low bounds to 65,535 at the high ones.
    bounds: float32 (4,), x0, y0, x1, y1 in source pixels.
  """

  __slots__ = ("bounds", "codes")
  codes: np.ndarray
  bounds: np.ndarray

  @classmethod
  def of(cls, points: np.ndarray) -> PackedMesh:
    """Packs landmarks (478, 2) in source pixels."""
    bounds = boxes.bounds(points)
    low, high = np.split(bounds, 2)
    size = np.maximum(high - low, 1e-6)
    codes = np.round((points - low) / size * 65535).astype(np.uint16)
    return cls(codes, bounds.astype(np.float32))

  def points(self) -> np.ndarray:
    """Returns float32 (478, 2), the landmarks in source pixels."""
    return _points(self.codes, self.bounds)


class Meshes:
  """Meshes of the frames of a track, each unpacked when it is asked for.

  Args:
    num_frames: T, frames of the track.
    rows: numbers of the frames that have a mesh, ascending.
    packed: their meshes.
    goes_on: whether each mesh follows directly on the mesh before it, so that
      landmarks are interpolated in between.
  """

  def __init__(
    self,
    num_frames: int,
    rows: Sequence[int],
    packed: Sequence[PackedMesh],
    goes_on: Sequence[bool],
  ) -> None:
    self._num_frames = num_frames
    self._rows = np.array(rows, np.int64)
    self._codes = np.zeros((len(packed), NUM_LANDMARKS, 2), np.uint16)
    self._bounds = np.zeros((len(packed), 4), np.float32)
    for i, mesh in enumerate(packed):
      self._codes[i], self._bounds[i] = mesh.codes, mesh.bounds
    self._goes_on = np.array(goes_on, bool)

  def __len__(self) -> int:
    return self._num_frames

  @property
  def nbytes(self) -> int:
    """Bytes in memory."""
    parts = (self._rows, self._codes, self._bounds, self._goes_on)
    return sum(part.nbytes for part in parts)

  def __getitem__(self, row: int) -> np.ndarray:
    """Returns float32 (478, 2), landmarks in source pixels; NaN without."""
    i = int(np.searchsorted(self._rows, row))
    if i < len(self._rows) and self._rows[i] == row:
      return self._at(i)
    if not 0 < i < len(self._rows) or not self._goes_on[i]:
      return np.full((NUM_LANDMARKS, 2), np.nan, np.float32)
    before, after = self._rows[i - 1], self._rows[i]
    share = np.float32((after - row) / (after - before))
    return share * self._at(i - 1) + (1 - share) * self._at(i)

  def part(self, start: int, stop: int) -> Meshes:
    """Returns the meshes of frames start to stop - 1, without a copy.

    Landmarks before its first mesh and after its last are not interpolated.
    """
    first, last = np.searchsorted(self._rows, (start, stop))
    part = Meshes(stop - start, [], [], [])
    part._rows = self._rows[first:last] - start
    part._codes, part._bounds = (
      self._codes[first:last],
      self._bounds[first:last],
    )
    part._goes_on = self._goes_on[first:last].copy()
    part._goes_on[:1] = False
    return part

  def unpacked(self) -> np.ndarray:
    """Returns float32 (T, 478, 2): 3.8 KB a frame."""
    return self.picked(range(NUM_LANDMARKS))

  def picked(self, points: Sequence[int]) -> np.ndarray:
    """Returns float32 (T, N, 2), some landmarks of all frames."""
    points = list(points)
    out = np.full((self._num_frames, len(points), 2), np.nan, np.float32)
    picked = _points(self._codes[:, points], self._bounds)
    out[self._rows] = picked
    for i in np.flatnonzero(self._goes_on):
      before, after = self._rows[i - 1], self._rows[i]
      for row in range(before + 1, after):
        share = np.float32((after - row) / (after - before))
        out[row] = share * picked[i - 1] + (1 - share) * picked[i]
    return out

  def heights(self) -> np.ndarray:
    """Returns float32 (T,), heights of the meshes; NaN without."""
    rows = np.arange(self._num_frames)
    if not len(self._rows):
      return np.full(self._num_frames, np.nan, np.float32)
    measured = self._bounds[:, 3] - self._bounds[:, 1]
    heights = np.interp(rows, self._rows, measured).astype(np.float32)
    heights[np.isnan(self.picked([0])[:, 0, 0])] = np.nan
    return heights

  def _at(self, i: int) -> np.ndarray:
    return _points(self._codes[i], self._bounds[i])


class MeshStore:
  """Keeps the meshes of a video in memory, from a size on in files.

  The files have no names, and are gone with the meshes.

  Args:
    max_bytes: the most bytes in memory.
  """

  def __init__(self, max_bytes: int) -> None:
    self._num_left = max_bytes

  def take(self, meshes: Meshes) -> None:
    """Moves meshes into a file where memory holds enough others.

    Raises:
      OSError: the disk of temporary files is full.
    """
    codes = meshes._codes
    self._num_left -= meshes.nbytes
    if self._num_left >= 0 or not len(codes):
      return
    with tempfile.TemporaryFile(prefix="meshes-") as file:
      file.write(codes)
      # A full disk is an error here, and would be a signal at a mapped page.
      file.flush()
      meshes._codes = np.memmap(file, codes.dtype, "r", 0, codes.shape)


def _points(codes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
  """Returns float32 (..., N, 2) of uint16 (..., N, 2) and bounds (..., 4)."""
  low, high = bounds[..., None, :2], bounds[..., None, 2:]
  return low + codes.astype(np.float32) * ((high - low) / np.float32(65535))
