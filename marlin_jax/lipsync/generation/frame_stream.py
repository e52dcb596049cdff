"""Streams the frames of a video at a constant rate, with the boxes of a face.

The first pass finds the face in every frame; later passes stream the frames, so
that memory holds a bounded number of them however long the video is.

  video = SourceVideo("clip.mp4", fps=25)
  for frame in video.frames(400):       # uint8 (H, W, 3)
    ...
  video.boxes                           # float32 (N, 4), NaN without a face

Axes: N frames of the video at that rate, H W their pixels, S samples.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.inference.face_windows import (
  FaceVideoError,
  Progress,
  video_errors,
)

if TYPE_CHECKING:
  from data_prep.video import decode
  from data_prep.video.video_to_records import Models

# Bytes of frames that are held to be shown backwards.
_HELD_BYTES = 1 << 30


class SourceVideo:
  """A video with one face box per frame.

  Of the faces in a frame, the one with the longest track is chosen; of equally
  long tracks, the largest face. So a face that returns after a cut is chosen
  again, and another one where it is absent.

  Args:
    path: a video file in any format that FFmpeg decodes; frames are turned as
      its rotation flag says.
    fps: rate that frames are repeated or left out to reach.
    models: open face models; where None, they are opened.
    progress: called with the share of the video that has been searched.

  Attributes:
    num_frames: N.
    size: width and height of the frames.
    boxes: float32 (N, 4), the smoothed square crop of the face, as in records;
      may reach past the frame; NaN where there is no face.
    track: int (N,), number of the track, -1 where there is no face: within a
      run of one number the face is tracked without a break.

  Raises:
    FaceVideoError: the video is damaged, or over a limit of
      `data_prep.video.decode.Limits`, or shows no face.
    UserError: this machine lacks a model file or a library.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    fps: float,
    models: Models | None = None,
    progress: Progress = lambda share: None,
  ) -> None:
    from data_prep.video import tracked, video_to_records

    self.path = path
    with contextlib.ExitStack() as stack:
      stack.enter_context(video_errors(path))
      models = models or stack.enter_context(video_to_records.Models())
      self._video = tracked.TrackedVideo(
        tracked.VideoFrames(path, fps, fill_pauses=True),
        models.finder,
        finding_share=1.0,
        progress=lambda share, _: progress(share),
      )
    self.num_frames = self._video.num_frames
    self.size = self._video.size
    self.boxes = np.full((self.num_frames, 4), np.nan, np.float32)
    self.track = np.full(self.num_frames, -1)
    # The best track last: it overwrites the others.
    tracks = sorted(
      self._video.tracks, key=lambda track: (len(track), track.side)
    )
    for number, track in enumerate(tracks):
      span = slice(track.first_frame, track.first_frame + len(track))
      self.boxes[span] = track.boxes
      self.track[span] = number
    if not tracks:
      raise FaceVideoError(path, f"no face found in {self.num_frames} frames")

  def shown(self, total: int) -> np.ndarray:
    """Returns int (total,), the frames to show, see `there_and_back`."""
    return there_and_back(self.num_frames, total)

  def frames(self, total: int) -> Iterator[np.ndarray]:
    """Streams uint8 (H, W, 3) frames, RGB, in the order of `shown`.

    Raises:
      FaceVideoError: the file was changed or can no longer be read.
    """
    forward = range(self.num_frames)
    backward = range(self.num_frames - 2, 0, -1)
    for leg in itertools.cycle((forward, backward)):
      numbers = leg[:total]
      total -= len(numbers)
      if leg is forward:
        yield from self._forward(numbers)
      else:
        yield from self._backward(numbers)
      if not total:
        return

  def _forward(self, numbers: range) -> Iterator[np.ndarray]:
    with video_errors(self.path):
      frames = self._video.frames(numbers.stop)
      for frame, _ in itertools.islice(frames, numbers.start, None):
        yield frame

  def _backward(self, numbers: range) -> Iterator[np.ndarray]:
    """Decodes from the beginning for each part that fits into memory."""
    num_held = max(_HELD_BYTES // (3 * self.size[0] * self.size[1]), 1)
    for start in range(0, len(numbers), num_held):
      part = numbers[start : start + num_held]
      yield from reversed(list(self._forward(range(part[-1], part[0] + 1))))


def there_and_back(num_frames: int, total: int) -> np.ndarray:
  """Returns int (total,), the numbers of N frames, forwards and backwards.

  Past the last frame the video goes backwards, past the first forwards again,
  so that it never jumps; at the turns no frame is shown twice in a row.
  """
  forward = np.arange(num_frames)
  cycle = np.concatenate([forward, forward[-2:0:-1]])
  return cycle[np.arange(total) % len(cycle)]


def crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns the face crop at a box, as in records, uint8 (224, 224, 3)."""
  from data_prep.faces import boxes

  return boxes.crop_frame(frame, box)


# --- Sound --------------------------------------------------------------------


def read_sound(path: str | os.PathLike) -> np.ndarray:
  """Reads the sound of an audio or video file as the networks take it.

  Returns:
    int16 (S,), 16 kHz, mono; sample 0 is at the time 0 of the frames.

  Raises:
    FaceVideoError: the file cannot be decoded, or has no sound.
  """
  from data_prep.video import decode

  with video_errors(path):
    samples = decode.read_sound(path)
  if not len(samples):
    raise FaceVideoError(path, "it has no sound")
  return samples


@contextlib.contextmanager
def open_sound(path: str | os.PathLike) -> Iterator[decode.Sound]:
  """Opens the same sound at its own rate and channels, to be read in parts.

  Raises:
    FaceVideoError: as for `read_sound`, also while it is read.
  """
  from data_prep.video import decode

  with video_errors(path), decode.open_sound(path) as sound:
    yield sound
