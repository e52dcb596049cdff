"""What lip synchronisation takes of a record: frames and their sound.

Served by `input_pipeline.train_batches`, as pretraining's clips are, from data
sets that are prepared with `--sound --fps=25`. A record that cannot be used
(no sound, nothing but silence, another frame rate, too few frames) is a
DatasetError: it ends the run, or is left out and written down where `bad` is
given to `train_batches`, another record taking its place.

Axes: B clips, T frames, M mel rows of a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.lipsync import mel_windows
from marlin_jax.records import schema
from marlin_jax.records.mel_spectrogram import MAX_VALUE

Batch = dict[str, np.ndarray]

# Sound that is less than SyncNet's own window away is hardly out of sync:
# telling it from sound that is in sync would be noise in the labels. (Wav2Lip
# takes any other start.)
MIN_OFFSET = 5


@dataclasses.dataclass(frozen=True)
class TakePairs:
  """Pictures with their sound or, every other time, with other sound.

  A batch holds `video` uint8 (B, T, 224, 224, 3), `mel` float32 (B, M, 80),
  `offset` int32 (B,), by how many frames the mel is later than the pictures, 0
  where they are in sync, `_id` int32 (B,), the records' numbers, and `start`
  int32 (B,), the first frames of the pictures. The other sound is of the same
  record, so that neither voice nor face tells.

  Attributes:
    num_frames: T.
    min_offset: frames between the sound that is shown and the true one, at
      least, where they differ.
  """

  num_frames: int
  min_offset: int = MIN_OFFSET

  def empty(self, num_clips: int) -> Batch:
    """A batch to be filled."""
    return _empty(num_clips, self.num_frames) | {
      "offset": np.empty(num_clips, np.int32)
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills a part of a batch but for `video`.

    Returns:
      The frames of the record that `video` is to show, of all clips in turn.

    Raises:
      DatasetError: the record cannot be used.
    """
    num_starts = _num_starts(
      index, record, self.num_frames, self.num_frames + self.min_offset
    )
    starts = np.arange(num_starts)
    apart = np.abs(starts[:, None] - starts) >= self.min_offset
    pairs = np.argwhere(apart)  # of pictures and sound
    num_clips = len(clips["start"])
    chosen = pairs[np_rng.integers(len(pairs), size=num_clips)]
    in_sync = np_rng.random(num_clips) < 0.5
    chosen[in_sync, 1] = chosen[in_sync, 0]
    pictures, sound = chosen.T
    clips["offset"][:] = sound - pictures
    clips["mel"][:] = mel_windows.windows(
      record.mel, sound, self.num_frames, record.start_secs
    )
    return _note(clips, index, pictures, self.num_frames)

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills `video` with what `choose` gave; raises DatasetError."""
    _decode(clips["video"], index, record, frames)


@dataclasses.dataclass(frozen=True)
class TakeOffsets:
  """Pictures with their sound and, beside it, earlier and later sound.

  A batch holds `video` uint8 (B, T, 224, 224, 3), `mel` float32 (B, 2K + 1, M,
  80), of which window i is i - K frames later than the pictures, `inside` bool
  (B, 2K + 1), whether the record has that sound at all, `_id` and `start` as in
  TakePairs. Pictures are taken from where all offsets are inside, or, if the
  record is too short for that, from its middle.

  Attributes:
    num_frames: T.
    max_offset: K.
  """

  num_frames: int
  max_offset: int

  def empty(self, num_clips: int) -> Batch:
    """A batch to be filled."""
    batch = _empty(num_clips, self.num_frames)
    num_offsets = 2 * self.max_offset + 1
    return batch | {
      "mel": np.empty(
        (num_clips, num_offsets, *batch["mel"].shape[1:]), np.float32
      ),
      "inside": np.empty((num_clips, num_offsets), bool),
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills a part of a batch but for `video`.

    Returns:
      The frames of the record that `video` is to show, of all clips in turn.

    Raises:
      DatasetError: the record cannot be used.
    """
    num_starts = _num_starts(
      index, record, self.num_frames, self.num_frames + 1
    )
    first = min(self.max_offset, (num_starts - 1) // 2)
    last = max(num_starts - 1 - self.max_offset, first)
    starts = np_rng.integers(first, last + 1, size=len(clips["start"]))
    offsets = np.arange(-self.max_offset, self.max_offset + 1)
    sound = starts[:, None] + offsets
    clips["inside"][:] = (sound >= 0) & (sound < num_starts)
    clips["mel"][:] = mel_windows.windows(
      record.mel, sound.ravel(), self.num_frames, record.start_secs
    ).reshape(clips["mel"].shape)
    return _note(clips, index, starts, self.num_frames)

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills `video` with what `choose` gave; raises DatasetError."""
    _decode(clips["video"], index, record, frames)


@dataclasses.dataclass(frozen=True)
class TakeTargets:
  """Pictures, their sound, and other pictures of the same face.

  A batch holds `video` and `reference`, uint8 (B, T, 224, 224, 3), `mel`
  float32 (B, M, 80) of the whole window, `mels` float32 (B, T, 16, 80) around
  each frame, `_id` and `start` as in TakePairs.

  The reference is a window of the same record that shares no frame with
  `video`; where the record is too short for one, that which shares the fewest.
  (Wav2Lip takes any other start, which may show the mouth that is asked for.)

  Attributes:
    num_frames: T.
  """

  num_frames: int

  def empty(self, num_clips: int) -> Batch:
    """A batch to be filled."""
    batch = _empty(num_clips, self.num_frames)
    mels = (num_clips, self.num_frames, mel_windows.FRAME_ROWS)
    return batch | {
      "reference": np.empty_like(batch["video"]),
      "mels": np.empty((*mels, schema.NUM_MELS), np.float32),
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills a part of a batch but for `video` and `reference`.

    Returns:
      The frames of the record that `video` is to show, of all clips in turn,
      and then those of `reference`.

    Raises:
      DatasetError: the record cannot be used.
    """
    t = self.num_frames
    num_starts = _num_starts(index, record, t, t + 1)
    starts = np_rng.integers(num_starts, size=len(clips["start"]))
    others = np.array([self._other(s, num_starts, np_rng) for s in starts])
    mel, secs = record.mel, record.start_secs
    clips["mel"][:] = mel_windows.windows(mel, starts, t, secs)
    every = (starts[:, None] + np.arange(t)).ravel()
    around = mel_windows.frame_windows(mel, every, secs)
    clips["mels"][:] = around.reshape(clips["mels"].shape)
    frames = _note(clips, index, starts, t)
    return frames + (others[:, None] + np.arange(t)).ravel().tolist()

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills the pictures with what `choose` gave; raises DatasetError."""
    half = len(frames) // 2
    _decode(clips["video"], index, record, frames[:half])
    _decode(clips["reference"], index, record, frames[half:])

  def _other(
    self, start: int, num_starts: int, np_rng: np.random.Generator
  ) -> int:
    """Returns the reference's start."""
    distances = np.abs(np.arange(num_starts) - start)
    needed = min(self.num_frames, int(distances.max()))
    return int(np_rng.choice(np.flatnonzero(distances >= needed)))


# --- Of both ------------------------------------------------------------------


def _empty(num_clips: int, num_frames: int) -> Batch:
  size, rows = schema.FRAME_SIZE, mel_windows.num_rows(num_frames)
  return {
    "video": np.empty((num_clips, num_frames, size, size, 3), np.uint8),
    "mel": np.empty((num_clips, rows, schema.NUM_MELS), np.float32),
    "_id": np.empty(num_clips, np.int32),
    "start": np.empty(num_clips, np.int32),
  }


def _num_starts(
  index: int, record: schema.Record, num_frames: int, least: int
) -> int:
  """Returns where windows can begin in a record of `least` frames or more.

  Raises:
    DatasetError: the record cannot be used.
  """
  if problem := _problem(record, least):
    raise DatasetError(f"record {index} ({record.name}) {problem}")
  return len(record) - num_frames + 1


def _problem(record: schema.Record, least: int) -> str:
  """Says why a record cannot be used and what to do, '' if it can."""
  if record.audio is None:
    return (
      "is of a data set without sound; prepare the videos again, with "
      "data_prep.prepare --sound --fps=25"
    )
  if not len(record.mel):
    return (
      "is of a video without a sound track; leave such videos out when the "
      "data set is prepared, or raise the number of bad records that are "
      "passed over"
    )
  # Not exactly: rates are float32 in records.
  if abs(record.fps - mel_windows.FPS) > 0.01:
    return (
      f"has {record.fps:g} frames per second, expected {mel_windows.FPS}; "
      "prepare the videos again, with data_prep.prepare --sound --fps=25"
    )
  if record.mel.max() <= -MAX_VALUE:
    return (
      "is silent from beginning to end, which cannot be in or out of sync; "
      "leave such videos out when the data set is prepared, or raise the "
      "number of bad records that are passed over"
    )
  if len(record) < least:
    return (
      f"has {len(record)} frames, expected at least {least}; leave out videos "
      "that are so short when the data set is prepared, or raise the number "
      "of bad records that are passed over"
    )
  return ""


def _note(
  clips: Batch, index: int, starts: np.ndarray, num_frames: int
) -> list[int]:
  """Fills number and starts; returns the frames of all clips in turn."""
  clips["_id"][:] = index
  clips["start"][:] = starts
  return (starts[:, None] + np.arange(num_frames)).ravel().tolist()


def _decode(
  pictures: np.ndarray,
  index: int,
  record: schema.Record,
  frames: Sequence[int],
) -> None:
  try:
    flat = pictures.reshape(-1, *pictures.shape[2:])
    schema.decode_frames(record, frames, flat)
  except ValueError as e:
    raise DatasetError(f"record {index} is damaged: {e}") from e
