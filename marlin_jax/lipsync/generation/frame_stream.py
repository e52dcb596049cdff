"""A video frame by frame, in full size at a constant rate, and its face.

For whoever changes a face in its video: the first pass finds the face of every
frame, later ones stream the frames, so that memory holds a bounded number of
them however long the video is.

  video = SourceVideo("clip.mp4", fps=25)
  for frame in video.frames(400):       # uint8 (H, W, 3)
    ...
  video.boxes                           # float32 (N, 4), NaN without a face

Axes: N frames of the video at the wanted rate, H W their pixels, S samples.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.inference.face_windows import FaceVideoError, Progress

if TYPE_CHECKING:
  from data_prep.faces import tracking
  from data_prep.video import decode
  from data_prep.video.video_to_records import Models

# Frames that are held to be shown backwards, a GiB.
_HELD_BYTES = 1 << 30


class SourceVideo:
  """A video whose faces are known.

  One face is followed in every frame: that which is there for the most frames
  of those that it shows, of several the largest. So a face that comes back
  after a cut is found again, and where it is away, another is taken.

  Args:
    path: a video file, in anything that FFmpeg decodes; turned as its rotation
      flag says.
    fps: the rate its frames are brought to, repeated or left out.
    models: face models that are open already; else they are opened.
    progress: called with the share of the video that has been searched.

  Attributes:
    num_frames: N.
    size: width and height of the frames.
    boxes: float32 (N, 4), the smoothed square crop of the face, as in records;
      may reach past the frame; NaN where there is no face.
    track: int (N,), which face and shot, -1 where there is none: within a run
      of one number the face is followed without a break.

  Raises:
    FaceVideoError: the video is damaged, or over a limit of
      `data_prep.video.decode.Limits`, or shows no face.
    RuntimeError: this machine lacks a model file or a library.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    fps: float,
    models: Models | None = None,
    progress: Progress = lambda share: None,
  ) -> None:
    from data_prep.video import video_to_records

    self.path = path
    self._fps = fps
    self._progress = progress
    with contextlib.ExitStack() as stack:
      models = models or stack.enter_context(video_to_records.Models())
      tracks = self._find_tracks(models)
    self.boxes = np.full((self.num_frames, 4), np.nan, np.float32)
    self.track = np.full(self.num_frames, -1)
    # The best last, over the others.
    tracks.sort(key=lambda track: (len(track), track.side))
    for number, track in enumerate(tracks):
      span = slice(track.first_frame, track.first_frame + len(track))
      self.boxes[span] = track.boxes
      self.track[span] = number
    if not tracks:
      raise FaceVideoError(path, f"no face found in {self.num_frames} frames")

  def _find_tracks(self, models: Models) -> list[tracking.Track]:
    from data_prep.faces import tracking
    from data_prep.video import video_to_records

    self.num_frames = 0
    with self._open() as (video, frames):

      def counted() -> Iterator[np.ndarray]:
        for frame in frames:
          self.num_frames += 1
          yield frame
          expected = max(video.num_frames, video.info.announced_frames)
          self._progress(video.num_frames / expected)

      tracks = tracking.find_tracks(
        counted(), models.finder, self._fps, min_frames=1
      )
      self.size = video.info.width, video.info.height
    # What is too short to be prepared for training is too short here.
    min_frames = min(video_to_records.MIN_TRACK_FRAMES, self.num_frames)
    return [track for track in tracks if len(track) >= min_frames]

  @contextlib.contextmanager
  def _open(self) -> Iterator[tuple[decode.Video, Iterator[np.ndarray]]]:
    from data_prep.video import decode, frame_rate

    try:
      with decode.open_video(self.path) as video:
        resampled = frame_rate.resampled(video, self._fps)
        yield video, (frame for frame, _ in resampled)
    except decode.DecodeError as e:
      raise FaceVideoError(self.path, str(e)) from e

  def shown(self, total: int) -> np.ndarray:
    """Returns int (total,), see `there_and_back`."""
    return there_and_back(self.num_frames, total)

  def frames(self, total: int) -> Iterator[np.ndarray]:
    """Streams uint8 (H, W, 3) frames, RGB, in the order of `shown`.

    Raises:
      FaceVideoError: the file can no longer be read as before.
    """
    there = range(self.num_frames)
    back = range(self.num_frames - 2, 0, -1)
    for leg in itertools.cycle((there, back)):
      wanted = leg[:total]
      total -= len(wanted)
      yield from (
        self._backward(wanted) if leg is back else self._forward(wanted)
      )
      if not total:
        return

  def _forward(self, wanted: range) -> Iterator[np.ndarray]:
    with self._open() as (_, frames):
      num = 0
      for frame in itertools.islice(frames, wanted.start, wanted.stop):
        yield frame
        num += 1
    if num < len(wanted):
      raise FaceVideoError(
        self.path,
        f"{self.num_frames} frames in the first pass, {wanted.start + num} "
        "later: was the file changed meanwhile?",
      )

  def _backward(self, wanted: range) -> Iterator[np.ndarray]:
    """Decodes from the beginning for every part that is held at a time."""
    num_held = max(_HELD_BYTES // (3 * self.size[0] * self.size[1]), 1)
    for at in range(0, len(wanted), num_held):
      part = wanted[at : at + num_held]
      yield from reversed(list(self._forward(range(part[-1], part[0] + 1))))


def there_and_back(num_frames: int, total: int) -> np.ndarray:
  """Returns int (total,): which of N frames is shown at each of so many times.

  Past the last the video goes backwards, past the first forwards again, so that
  it never jumps; at the turns no frame is shown twice in a row.
  """
  there = np.arange(num_frames)
  turn = np.concatenate([there, there[-2:0:-1]])
  return turn[np.arange(total) % len(turn)]


def crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Cuts a face out as records have it, uint8 (224, 224, 3)."""
  from data_prep.faces import boxes

  return boxes.crop_frame(frame, box)


# --- Sound --------------------------------------------------------------------


def read_sound(path: str | os.PathLike) -> np.ndarray:
  """Reads the sound of a file of sound or video for a network to hear.

  Returns:
    int16 (S,), 16 kHz, mono, from the time on that pictures are counted from.

  Raises:
    FaceVideoError: it cannot be decoded, or there is none.
  """
  from data_prep.video import decode

  try:
    samples = decode.read_sound(path)
  except decode.DecodeError as e:
    raise FaceVideoError(path, str(e)) from e
  if not len(samples):
    raise FaceVideoError(path, "no sound in it")
  return samples


@contextlib.contextmanager
def open_sound(path: str | os.PathLike) -> Iterator[decode.Sound]:
  """Opens the same sound at its own rate and channels, in parts.

  Raises:
    FaceVideoError: as for `read_sound`, also while it is read.
  """
  from data_prep.video import decode

  try:
    with decode.open_sound(path) as sound:
      yield sound
  except decode.DecodeError as e:
    raise FaceVideoError(path, str(e)) from e
