"""Training clips of lip synchronisation: frames of a record and their sound.

`data.loader.train_batches` serves them, as it serves the clips of pretraining,
from data sets prepared with `--sound --fps=25`. A record that cannot be used
(no sound, only silence, another frame rate, too few frames) is a DatasetError:
it ends the run or, if `bad` is given to `train_batches`, is listed there and
replaced by another record.

Axes: B clips, T frames, M mel rows of a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from marlin_jax.data import augmentation
from marlin_jax.data.augmentation import Augmentation, View
from marlin_jax.data.clips import damage_named, decode_video
from marlin_jax.data.prefetch import Batch
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.lipsync import mel_windows
from marlin_jax.records import schema
from marlin_jax.records.mel_spectrogram import MAX_VALUE

# Sound that is shifted by less than SyncNet's own window is hardly out of sync:
# to tell it from sound in sync would be label noise. (Wav2Lip takes any other
# start.)
MIN_OFFSET = 5


@dataclasses.dataclass(frozen=True)
class _TakeFrames:
  """Base class: takes windows of frames.

  A batch holds `video` uint8 (B, T, S, S, 3), `mel` float32 (B, M, 80), `_id`
  int32 (B,), the records' numbers, `start` int32 (B,), the first frames of
  `video`, and `_view` int32 (B, 5), the view of each clip as a row.

  Attributes:
    num_frames: T.
    frame_size: height and width of a frame in pixels, S.
    augmentation: random views of the clips.
  """

  num_frames: int
  frame_size: int = schema.FRAME_SIZE
  augmentation: Augmentation = Augmentation()

  def empty(self, num_clips: int) -> Batch:
    """Returns an uninitialised batch."""
    size, rows = self.frame_size, mel_windows.num_rows(self.num_frames)
    video = (num_clips, self.num_frames, size, size, 3)
    return {
      "video": np.empty(video, np.uint8),
      "mel": np.empty((num_clips, rows, schema.NUM_MELS), np.float32),
      "_id": np.empty(num_clips, np.int32),
      "start": np.empty(num_clips, np.int32),
      "_view": np.empty((num_clips, len(View().row)), np.int32),
    }

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills `video` with the frames that `choose` returned.

    Raises:
      DatasetError: a frame cannot be decoded.
    """
    video = clips["video"]
    views = [View.from_row(row) for row in clips["_view"]]
    with damage_named(index):
      augmentation.decode(
        record, np.reshape(frames, video.shape[:2]), views, video
      )

  def note(
    self,
    clips: Batch,
    index: int,
    starts: np.ndarray,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills `_id`, `start` and `_view`; returns the frames of all clips."""
    clips["_id"][:] = index
    clips["start"][:] = starts
    clips["_view"][:] = [
      self.augmentation.draw_view(np_rng).row for _ in starts
    ]
    return self.frames_from(starts)

  def frames_from(self, starts: np.ndarray) -> list[int]:
    """Returns the frames of the windows at `starts`, window after window."""
    return (starts[:, None] + np.arange(self.num_frames)).ravel().tolist()


@dataclasses.dataclass(frozen=True)
class TakePairs(_TakeFrames):
  """Frames with their own sound or, every other time, with shifted sound.

  Beside the base class, a batch holds `offset` int32 (B,): the number of frames
  by which the sound is later than the frames, 0 in sync. Shifted sound is of
  the same record, so that neither voice nor face tells the two apart.

  Attributes:
    num_frames: T.
    min_offset: least shift of shifted sound, in frames.
  """

  min_offset: int = MIN_OFFSET

  def empty(self, num_clips: int) -> Batch:
    """Returns an uninitialised batch."""
    offset = np.empty(num_clips, np.int32)
    return super().empty(num_clips) | {"offset": offset}

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills clips of one record except for `video`.

    Returns:
      The frames of the record to decode into `video`, of all clips in turn.

    Raises:
      DatasetError: the record cannot be used.
    """
    num_starts = _num_starts(
      index, record, self.num_frames, self.num_frames + self.min_offset
    )
    starts = np.arange(num_starts)
    apart = np.abs(starts[:, None] - starts) >= self.min_offset
    pairs = np.argwhere(apart)  # starts of frames and of sound
    num_clips = len(clips["start"])
    chosen = pairs[np_rng.integers(len(pairs), size=num_clips)]
    in_sync = np_rng.random(num_clips) < 0.5
    chosen[in_sync, 1] = chosen[in_sync, 0]
    frames, sound = chosen.T
    clips["offset"][:] = sound - frames
    clips["mel"][:] = mel_windows.windows(
      record.mel, sound, self.num_frames, record.start_secs
    )
    return self.note(clips, index, frames, np_rng)


@dataclasses.dataclass(frozen=True)
class TakeApart(_TakeFrames):
  """Frames with their own sound, the clips of a record apart in time.

  The sound of one clip is thus out of sync with the frames of the others, and
  neither voice nor face tells the two apart.

  Attributes:
    min_offset: least distance of two clips in frames; less where a record is
      too short.
  """

  min_offset: int = MIN_OFFSET

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills clips of one record except for `video`; see `TakePairs.choose`."""
    num_starts = _num_starts(
      index, record, self.num_frames, self.num_frames + self.min_offset
    )
    num_gaps = len(clips["start"]) - 1
    gap = min(self.min_offset, (num_starts - 1) // max(num_gaps, 1))
    free = num_starts - 1 - gap * num_gaps
    starts = np.sort(np_rng.integers(free + 1, size=num_gaps + 1))
    starts += gap * np.arange(num_gaps + 1)
    clips["mel"][:] = mel_windows.windows(
      record.mel, starts, self.num_frames, record.start_secs
    )
    return self.note(clips, index, starts, np_rng)


@dataclasses.dataclass(frozen=True)
class TakeOffsets(_TakeFrames):
  """Frames with their own sound and with the sound at each offset.

  Unlike the base class, a batch holds `mel` float32 (B, 2K + 1, M, 80), whose
  window i is i - K frames later than the frames, and `inside` bool (B, 2K + 1),
  true if the record has that sound. Frames are taken from where all offsets are
  inside, or from the middle of a record too short for that.

  Attributes:
    num_frames: T.
    max_offset: K.
  """

  max_offset: int = dataclasses.field(kw_only=True)

  def empty(self, num_clips: int) -> Batch:
    """Returns an uninitialised batch."""
    batch = super().empty(num_clips)
    shape = (num_clips, 2 * self.max_offset + 1)
    mel = np.empty((*shape, *batch["mel"].shape[1:]), np.float32)
    return batch | {"mel": mel, "inside": np.empty(shape, bool)}

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills clips of one record except for `video`; see `TakePairs.choose`."""
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
    return self.note(clips, index, starts, np_rng)


@dataclasses.dataclass(frozen=True)
class TakeTargets(_TakeFrames):
  """Frames, their sound, and a reference: other frames of the same face.

  Beside the base class, a batch holds `reference` uint8 (B, T, 224, 224, 3) and
  `mels` float32 (B, T, 16, 80), the sound around each frame.

  The reference is a window of the same record that shares no frame with
  `video`; in a record too short for one, a window that shares the fewest.
  (Wav2Lip takes any other start, which may show the mouth to be generated.)
  """

  def empty(self, num_clips: int) -> Batch:
    """Returns an uninitialised batch."""
    batch = super().empty(num_clips)
    mels = (num_clips, self.num_frames, mel_windows.FRAME_ROWS, schema.NUM_MELS)
    return batch | {
      "reference": np.empty_like(batch["video"]),
      "mels": np.empty(mels, np.float32),
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Fills clips of one record except for `video` and `reference`.

    Returns:
      The frames of the record to decode into `video`, of all clips in turn,
      then those to decode into `reference`.

    Raises:
      DatasetError: the record cannot be used.
    """
    num_starts = _num_starts(
      index, record, self.num_frames, self.num_frames + 1
    )
    starts = np_rng.integers(num_starts, size=len(clips["start"]))
    references = np.array(
      [self._reference_start(start, num_starts, np_rng) for start in starts]
    )
    frames = self.note(clips, index, starts, np_rng)
    clips["mel"][:] = mel_windows.windows(
      record.mel, starts, self.num_frames, record.start_secs
    )
    clips["mels"][:] = mel_windows.frame_windows(
      record.mel, np.array(frames), record.start_secs
    ).reshape(clips["mels"].shape)
    return frames + self.frames_from(references)

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Fills `video` and `reference` with the frames of `choose`.

    Raises:
      DatasetError: a frame cannot be decoded.
    """
    half = len(frames) // 2
    decode_video(clips["video"], index, record, frames[:half])
    decode_video(clips["reference"], index, record, frames[half:])

  def _reference_start(
    self, start: int, num_starts: int, np_rng: np.random.Generator
  ) -> int:
    distances = np.abs(np.arange(num_starts) - start)
    least = min(self.num_frames, int(distances.max()))
    return int(np_rng.choice(np.flatnonzero(distances >= least)))


def _num_starts(
  index: int, record: schema.Record, num_frames: int, least: int
) -> int:
  """Returns the number of windows of a record with at least `least` frames.

  Raises:
    DatasetError: the record cannot be used.
  """
  if problem := _problem(record, least):
    raise DatasetError(f"record {index} ({record.name}) {problem}")
  return len(record) - num_frames + 1


def _problem(record: schema.Record, least: int) -> str:
  """Returns why a record cannot be used and what to do; '' if it can."""
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
