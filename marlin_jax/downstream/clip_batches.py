"""Clips of labelled videos in batches, read and decoded by threads.

Axes: B clips, T frames, S pixels of the square picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import DatasetError, RecordSource
from marlin_jax.downstream.labelled import Split, Track, Window
from marlin_jax.records import schema


class ClipReader:
  """Windows -> pixels."""

  def __init__(self, split: Split, clip: Clip):
    """Opens the shards; raises DatasetError where that fails."""
    self._split, self._clip = split, clip
    self._source = RecordSource(split.dataset)

  def read(self, windows: Sequence[Window]) -> np.ndarray:
    """Decodes clips.

    Args:
      windows: B of them.

    Returns:
      uint8 (B, T, S, S, 3), RGB.

    Raises:
      DatasetError: a record is damaged.
    """
    size = schema.FRAME_SIZE
    shape = (len(windows), self._clip.num_frames, size, size, 3)
    video = np.empty(shape, np.uint8)
    for out, window in zip(video, windows, strict=True):
      self._read(self._split.tracks[window.track], window.start, out)
    return video

  def _read(self, track: Track, start: int, out: np.ndarray) -> None:
    frames = self._clip.indices(start, track.num_frames)
    first = 0
    for number, length in zip(track.records, track.lengths, strict=True):
      # Frames ascend: those of one record lie side by side.
      here = (frames >= first) & (frames < first + length)
      if here.any():
        _, record = self._source[number]
        rows = np.flatnonzero(here)
        part = out[rows[0] : rows[-1] + 1]
        try:
          schema.decode_frames(record, (frames[here] - first).tolist(), part)
        except ValueError as e:
          raise DatasetError(f"record {number} is damaged: {e}") from e
      first += length


class _Groups:
  """Windows in groups of a fixed size; a grain source."""

  def __init__(self, reader, groups):
    self._reader, self._groups = reader, groups

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index: int) -> np.ndarray:
    return self._reader.read(self._groups[index])


class _Drawn:
  """The training batch of each step; a grain source."""

  def __init__(self, reader, split, clip, order, batch_size, seed, num_steps):
    self._reader, self._split, self._clip = reader, split, clip
    self._order, self._batch_size, self._seed = order, batch_size, seed
    self._num_steps = num_steps
    self._tracks: dict[int, list[int]] = {}
    for number, track in enumerate(split.tracks):
      self._tracks.setdefault(track.video, []).append(number)

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    videos = self._order.rows(step, self._batch_size)
    windows = []
    for place, video in enumerate(videos):
      np_rng = np.random.default_rng((self._seed, 1, step, place))
      track = int(np_rng.choice(self._tracks[int(video)]))
      total = self._split.tracks[track].num_frames
      start = self._clip.random_starts(total, 1, np_rng)[0]
      windows.append(Window(track, int(start)))
    return videos, self._reader.read(windows)


class Order:
  """Examples for ever, every pass over them in an order of its own."""

  def __init__(self, examples: np.ndarray, seed: int):
    """Takes the numbers of the examples."""
    self._examples, self._seed = examples, seed

  def rows(self, step: int, batch_size: int) -> np.ndarray:
    """int (B,): the examples of a step; they follow from it alone."""
    places = step * batch_size + np.arange(batch_size)
    passes, at = np.divmod(places, len(self._examples))
    orders = {
      p: np.random.default_rng((self._seed, 0, int(p))).permutation(
        self._examples
      )
      for p in np.unique(passes)
    }
    return np.array([orders[p][i] for p, i in zip(passes, at, strict=True)])


def window_batches(
  reader: ClipReader,
  windows: Sequence[Window],
  batch_size: int,
  num_threads: int,
  rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
  """Clips in the order of their windows.

  Args:
    reader: what reads them.
    windows: of the clips.
    batch_size: B, over all processes.
    num_threads: that read.
    rows: this process's share of each batch, from input_pipeline.own_rows;
      None: all.

  Yields:
    uint8 (B, T, S, S, 3), or as many as there are rows; the last batch ends
    with copies of a clip.
  """
  groups = [
    list(windows[i : i + batch_size])
    for i in range(0, len(windows), batch_size)
  ]
  if groups:
    groups[-1] += groups[-1][-1:] * (batch_size - len(groups[-1]))
  if rows is not None:
    groups = [[group[row] for row in rows] for group in groups]
  return _read_ahead(_Groups(reader, groups), 0, num_threads)


def drawn_batches(
  reader: ClipReader,
  split: Split,
  clip: Clip,
  order: Order,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_steps: int,
  num_threads: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields for each step the videos, int (B,), and a random clip of each."""
  source = _Drawn(reader, split, clip, order, batch_size, seed, num_steps)
  return _read_ahead(source, start_step, num_threads)


def _read_ahead(source, start: int, num_threads: int) -> Iterator:
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  made = grain.MapDataset.source(source)[start:]
  return iter(made.to_iter_dataset(options))
