"""Draws the faces of a stream of frames, in windows that overlap.

A generator that mixes the frames of a window may draw one frame differently in
two windows, which shows as a jump where windows meet. So they overlap, and the
frames that they share are cross-faded.

Axes: B windows per batch, T frames of a window, S side of the generator's
images, P side of the pictures it gets, H W pixels of the video, N frames,
R mel rows.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.lipsync.generation import blending
from marlin_jax.lipsync.generation.feeding import Feeding
from marlin_jax.lipsync.networks import inputs

# Frames per batch; about twice as many frames of the video are in memory. A CPU
# gains nothing from more than one window, and shows progress more often.
BATCH_FRAMES, CPU_BATCH_FRAMES = 64, 16
# Share of a window that the next one draws again.
OVERLAP_RATIO = 0.25


def windows(
  track: np.ndarray, num_frames: int, overlap: int = 0
) -> list[np.ndarray]:
  """Returns windows that cover all frames with a face.

  In a run of frames with the same face, each window shares `overlap` frames
  with the next one, the last two may share more. In a run shorter than a window
  the last frame is repeated.

  Args:
    track: int (N,), see `frame_stream.SourceVideo.track`.
    num_frames: frames of a window, T.
    overlap: frames that windows share, less than T.

  Returns:
    Frame numbers, int (T,) for each window, in ascending order of last frames.
  """
  edges = np.flatnonzero(np.diff(track)) + 1
  found = []
  for run in np.split(np.arange(len(track)), edges):
    if track[run[0]] < 0:
      continue
    last = max(len(run) - num_frames, 0)
    for start in (*range(0, last, num_frames - overlap), last):
      rows = np.minimum(start + np.arange(num_frames), len(run) - 1)
      found.append(run[rows])
  return found


def fade(num_frames: int, overlap: int) -> np.ndarray:
  """Returns the weights of a window's frames, float32 (T,) in (0, 1]."""
  from_edge = np.minimum(np.arange(num_frames), np.arange(num_frames)[::-1])
  return np.minimum((from_edge + 1) / (overlap + 1), 1).astype(np.float32)


class FaceDrawer:
  """A generator, compiled once, and how it is fed.

  Attributes:
    num_frames: frames of a window, T.
    image_size: side of the drawn faces in pixels, S.
    overlap: frames that a window shares with the next one.
    feeding: how the generator is fed.
  """

  def __init__(self, generator: nnx.Module, feeding: Feeding | None = None):
    """Compiles nothing yet.

    Args:
      generator: called as networks.marlin_generator.MarlinGenerator, with its
        attributes `num_frames`, `image_size` and `mixes_frames`; put into
        evaluation mode.
      feeding: None: as a generator that was trained here.
    """
    self.num_frames = generator.num_frames
    self.image_size = generator.image_size
    self.feeding = feeding or Feeding()
    self.overlap = 0
    if generator.mixes_frames:
      self.overlap = int(OVERLAP_RATIO * self.num_frames)
    generator.eval()
    graphdef, self._state = nnx.split(generator)

    @jax.jit
    def draw(state, pictures, mels):
      network = nnx.merge(graphdef, state)
      size = network.image_size
      reference = inputs.resize(inputs.as_floats(pictures), size, size)
      drawn = network(inputs.hide_mouth(reference), reference, mels)
      return 255 * jnp.clip(drawn, 0, 1)

    self._draw = draw

  def sha256(self) -> str:
    """Returns a hash of the generator's weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(self._state):
      digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

  def __call__(self, pictures: np.ndarray, mels: np.ndarray) -> np.ndarray:
    """Draws faces.

    Args:
      pictures: uint8 (B, T, P, P, 3).
      mels: float32 (B, T, 16, 80).

    Returns:
      float32 (B, T, S, S, 3) in [0, 255].
    """
    return np.asarray(self._draw(self._state, pictures, mels))


class Boxes(NamedTuple):
  """Faces of a video.

  Attributes:
    crops: float (N, 4), face crops as in records, NaN without a face.
    seen: float (N, 4), what the generator sees, NaN without a face.
    track: int (N,), number of the track in each frame, -1 without a face.
  """

  crops: np.ndarray
  seen: np.ndarray
  track: np.ndarray


class Drawing:
  """Draws the faces of a stream of frames, in batches of windows."""

  def __init__(self, drawer: FaceDrawer, mel: np.ndarray, faces: Boxes) -> None:
    """Plans the windows.

    Args:
      drawer: draws the faces.
      mel: float32 (R, 80), mel spectrogram of the sound.
      faces: faces of the N frames.
    """
    self._drawer, self._num_frames = drawer, drawer.num_frames
    is_cpu = jax.default_backend() == "cpu"
    batch_frames = CPU_BATCH_FRAMES if is_cpu else BATCH_FRAMES
    self._batch_size = max(batch_frames // drawer.num_frames, 1)
    self._mel, self._faces = mel, faces
    self._has_face = faces.track >= 0
    found = windows(faces.track, drawer.num_frames, drawer.overlap)
    self._windows = collections.deque(found)
    self._fade = fade(drawer.num_frames, drawer.overlap)
    # By frame number: windows to be drawn yet, frames not yet yielded, pictures
    # of the last T frames, sums of weighted faces, and of weights.
    self._num_left = collections.Counter(
      number for window in found for number in set(window.tolist())
    )
    self._pending: dict[int, np.ndarray] = {}
    self._pictures: dict[int, np.ndarray] = {}
    self._sums: dict[int, np.ndarray] = {}
    self._weights: collections.Counter = collections.Counter()
    # Frame numbers and pictures of windows that are complete.
    self._batch: list[tuple[np.ndarray, np.ndarray]] = []

  def run(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the frames, uint8 (H, W, 3), with the drawn faces in them."""
    for i, frame in enumerate(frames):
      self._pending[i] = frame
      if self._has_face[i]:
        self._pictures[i] = self._drawer.feeding.picture(
          frame, self._faces.seen[i], self._drawer.image_size
        )
      self._pictures.pop(i - self._num_frames, None)
      while self._windows and self._windows[0][-1] == i:
        numbers = self._windows.popleft()
        pictures = np.stack([self._pictures[number] for number in numbers])
        self._batch.append((numbers, pictures))
        if len(self._batch) == self._batch_size:
          self._run_batch()
      # Bounds the memory: faceless frames complete no windows.
      if len(self._pending) >= 2 * self._batch_size * self._num_frames:
        self._run_batch()
      yield from self._finished()
    self._run_batch()
    yield from self._finished()

  def _run_batch(self) -> None:
    """Draws the faces of `_batch`, padded to B windows."""
    if not self._batch:
      return
    shape = self._batch_size, self._num_frames
    pictures = np.zeros((*shape, *self._batch[0][1].shape[1:]), np.uint8)
    numbers = np.zeros(shape, int)
    for row, (window, window_pictures) in enumerate(self._batch):
      numbers[row], pictures[row] = window, window_pictures
    mels = self._drawer.feeding.sound(self._mel, numbers.ravel())
    drawn = self._drawer(pictures, mels.reshape(*shape, *mels.shape[1:]))
    for row in range(len(self._batch)):
      self._add(numbers[row], drawn[row])
    self._batch.clear()

  def _add(self, numbers: np.ndarray, faces: np.ndarray) -> None:
    """Adds the faces of a window; of a repeated frame the first one."""
    for number, row in zip(*np.unique(numbers, return_index=True), strict=True):
      number, weight = int(number), self._fade[row]
      self._sums[number] = self._sums.get(number, 0) + weight * faces[row]
      self._weights[number] += weight
      self._num_left[number] -= 1

  def _finished(self) -> Iterator[np.ndarray]:
    """Yields pending frames in order, up to the first that is not drawn yet."""
    for i in list(self._pending):
      if not self._has_face[i]:
        yield self._pending.pop(i)
      elif self._num_left[i] == 0:
        face = self._sums.pop(i) / self._weights.pop(i)
        yield blending.paste(
          self._pending.pop(i),
          np.rint(face).astype(np.uint8),
          self._faces.seen[i],
          self._faces.crops[i],
        )
      else:
        return
