"""Clips of records: which frames, decoded into which part of a batch.

It imports no jax, since worker processes read with it.

Axes: B batch, T frames, H W pixels, S pixels of a square picture, R rows of a
mel spectrogram.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from marlin_jax.data import augmentation
from marlin_jax.data.augmentation import Augmentation, View
from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.data.prefetch import Batch
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.records import schema
from marlin_jax.records.mel_spectrogram import MAX_VALUE


class ClipTaker(Protocol):
  """Turns records into clips of a batch.

  A batch holds at least `_id` int32 (B,), the numbers of the records (of
  several data sets, see `sampling.first_ids`), and
  `start` int32 (B,), the first frame of each clip in its record. Reading is cut
  into phases, so that frames of all clips are decoded last. Draws that name the
  starts of their clips (`sampling.Draw.starts`) need `place` too, as `TakeClip`
  has it.

  Attributes:
    frame_size: height and width of the clips in pixels.
  """

  frame_size: int

  def empty(self, num_clips: int) -> Batch:
    """Allocates a batch."""

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Draws clips of a record and fills a batch slice, except for the frames.

    Args:
      clips: slice of a batch from `empty`.
      index: number of the record.
      record: the record.
      np_rng: makes all draws.

    Returns:
      Frames of the record to decode, clip by clip.

    Raises:
      DatasetError: the record has no such clips.
    """

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Decodes the frames that `choose` returned into the batch slice.

    Raises:
      DatasetError: the record is damaged.
    """


def decode_video(
  video: np.ndarray, index: int, record: schema.Record, frames: Sequence[int]
) -> None:
  """Decodes frames of a record into an array.

  Args:
    video: uint8 (B, T, H, W, 3), filled in place.
    index: number of the record.
    record: the record.
    frames: B * T frame numbers.

  Raises:
    DatasetError: the record is damaged.
  """
  with damage_named(index):
    schema.decode_frames(record, frames, video.reshape(-1, *video.shape[2:]))


@contextlib.contextmanager
def damage_named(index: int) -> Iterator[None]:
  """Turns ValueErrors into DatasetErrors that name the record."""
  try:
    yield
  except ValueError as e:
    raise DatasetError(f"record {index} is damaged: {e}") from e


@dataclasses.dataclass(frozen=True)
class TakeClip:
  """Takes clips of decoded frames and their regions; a `ClipTaker`.

  A batch also holds `video` uint8 (B, T, S, S, 3), `regions` uint16
  (B, T / tubelet_size, h, w), the region bits of each tubelet's first frame,
  `_view` int32 (B, 11), the view of each clip as a row, and `_subject` int32
  (B,), a number for each person (for each video, if its person is unknown), or
  -1 if records are drawn without an index. With `sound` it holds `mel` float32
  (B, R, 80), the sound of each clip in [-4, 4], and `has_sound` bool (B,),
  False where there is none or only silence; `mel` is silence there.

  Attributes:
    clip: number of frames and stride.
    tubelet_size: frames per token.
    frame_size: S, height and width of a frame in pixels.
    patch_size: height and width of a token in pixels.
    needs_regions: if False, `regions` is 0: label maps need not be read.
    augmentation: random changes of the clips.
    sound: rows of the clips' sound; None: it is left out.
  """

  clip: Clip
  tubelet_size: int
  frame_size: int = schema.FRAME_SIZE
  patch_size: int = schema.PATCH_SIZE
  needs_regions: bool = True
  augmentation: Augmentation = Augmentation()
  sound: SoundPatches | None = None

  def without_augmentation(self) -> TakeClip:
    return dataclasses.replace(self, augmentation=Augmentation())

  @property
  def longest_clip(self) -> Clip:
    """The clip of the greatest stride."""
    stride = self.clip.stride + self.augmentation.stride_jitter
    return dataclasses.replace(self.clip, stride=stride)

  @property
  def grid_size(self) -> int:
    """Patches along a side of a frame."""
    return self.frame_size // self.patch_size

  def empty(self, num_clips: int) -> Batch:
    """Returns an empty batch; see `ClipTaker.empty`."""
    num_frames, grid = self.clip.num_frames, 2 * (self.grid_size,)
    num_tubelets = num_frames // self.tubelet_size
    frame = (self.frame_size, self.frame_size, 3)
    sound = {}
    if self.sound:
      rows = (num_clips, self.sound.num_rows, schema.NUM_MELS)
      sound = {
        "mel": np.empty(rows, np.float32),
        "has_sound": np.empty(num_clips, bool),
      }
    return sound | {
      "video": np.empty((num_clips, num_frames, *frame), np.uint8),
      "regions": np.empty((num_clips, num_tubelets, *grid), np.uint16),
      "_id": np.empty(num_clips, np.int32),
      "_subject": np.full(num_clips, -1, np.int32),
      "start": np.empty(num_clips, np.int32),
      "_view": np.empty((num_clips, len(View().row)), np.int32),
    }

  def choose(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Draws clips from random starts; see `ClipTaker.choose`."""
    clip = self.augmentation.draw_clip(self.clip, np_rng)
    num_clips = len(clips["start"])
    starts = clip.random_starts(len(record), num_clips, np_rng)
    return self._take(clips, index, record, clip, starts, np_rng)

  def place(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    starts: np.ndarray,
    np_rng: np.random.Generator,
  ) -> list[int]:
    """Takes the clips that begin at `starts`; else as `ClipTaker.choose`."""
    clip = self.augmentation.draw_clip(self.clip, np_rng)
    return self._take(clips, index, record, clip, starts, np_rng)

  def _take(self, clips, index, record, clip, starts, np_rng) -> list[int]:
    frames = clip.indices(starts[:, None], len(record))  # (B, T)
    views = [self.augmentation.draw_view(np_rng) for _ in frames]
    if not self.needs_regions:
      clips["regions"][:] = 0
    else:
      with damage_named(index):
        clips["regions"][:] = augmentation.region_bits(
          record, frames[:, :: self.tubelet_size], views, self.grid_size
        )
    clips["_id"][:] = index
    clips["start"][:] = starts
    clips["_view"][:] = [view.row for view in views]
    if self.sound:
      self._take_sound(clips, record, clip, starts)
    return frames.ravel().tolist()

  def _take_sound(self, clips, record, clip, starts) -> None:
    mel, has_sound = clips["mel"], clips["has_sound"]
    mel[:] = -MAX_VALUE
    if len(record.mel):
      # The sound of a record lasts as long as its frames.
      per_frame = len(record.mel) / len(record)
      for rows, start in zip(mel, starts, strict=True):
        rows[:] = self.sound.window(
          record.mel, start * per_frame, clip.extent * per_frame
        )
    has_sound[:] = (mel > -MAX_VALUE).any(axis=(1, 2))

  def decode(
    self,
    clips: Batch,
    index: int,
    record: schema.Record,
    frames: Sequence[int],
  ) -> None:
    """Decodes `video`; see `ClipTaker.decode`."""
    video = clips["video"]
    views = [View.from_row(row) for row in clips["_view"]]
    with damage_named(index):
      augmentation.decode(
        record, np.reshape(frames, video.shape[:2]), views, video
      )
