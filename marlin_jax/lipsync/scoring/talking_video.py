"""Reads a video of a talking person: face crops and sound on one clock.

  video = read("talk.mp4")
  video.frames[f]                       # uint8 (224, 224, 3), 25 a second
  video.sound[640 * f : 640 * (f + 1)]  # int16, the sound during that frame
  for stretch in stretches(video.has_face): ...
  for picture in pictures("talk.mp4"): ...  # the same N frames, uncropped

Frames of any rate become 25 a second by repeating frames or leaving some out;
sound of any rate and number of channels becomes 16 kHz, mono. Sample 640 f is
at the time of frame f, wherever in the file the two tracks begin.

Decoder, face tracker and crop are those of data_prep, as in `face_windows`.

Axes: N frames, S samples, H W pixels of the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.inference.face_windows import (
  FaceVideoError,
  NoFaceError,
  Progress,
  video_errors,
)
from marlin_jax.lipsync.scoring import face_crops
from marlin_jax.records.schema import FRAME_SIZE, SAMPLE_RATE

if TYPE_CHECKING:
  from data_prep.faces import tracking
  from data_prep.video import tracked, video_to_records

FPS = 25
FRAME_SAMPLES = SAMPLE_RATE // FPS
# Longest video: all of its crops are in memory, 2.3 GB.
MAX_SECS = 600


@dataclasses.dataclass(frozen=True)
class TalkingVideo:
  """Face crops and sound of a whole video.

  Attributes:
    frames: uint8 (N, 224, 224, 3), RGB, face crops; black without a face.
    boxes: float32 (N, 4), the crops as x0, y0, x1, y1 in source pixels; may
      reach past the frame; NaN without a face.
    has_face: bool (N,), True where the frame shows the face.
    sound: int16 (S,), 16 kHz, mono, 640 samples a frame and N frames at most;
      less where the sound ends before the pictures, empty where there is no
      sound track.
    frame_size: height and width of the source frames in pixels.
  """

  frames: np.ndarray
  boxes: np.ndarray
  has_face: np.ndarray
  sound: np.ndarray
  frame_size: tuple[int, int]

  def __len__(self) -> int:
    return len(self.frames)


def read(
  path: str | os.PathLike,
  *,
  crop: str = face_crops.RECORD,
  models: video_to_records.Models | None = None,
  progress: Progress = lambda share: None,
) -> TalkingVideo:
  """Reads a whole video and crops the face with the longest track.

  Frames have no face where that face is lost for more than half a second, and
  possibly at both ends. All tracks are assumed to show the same person, except
  those that overlap a longer track (of equally long tracks, the one with the
  larger face), which are left out.

  Args:
    path: a video file in any format that FFmpeg decodes.
    crop: 'record' tracks the face and crops it as in records, 'syncnet' as
      SyncNet's pipeline; 'frame' takes each frame as a face crop, as in LRS2.
    models: open face models; None: opens them.
    progress: called with the share of the video that has been read.

  Raises:
    FaceVideoError: the video or its sound is damaged, over a limit of
      `data_prep.video.decode.Limits`, or longer than MAX_SECS.
    NoFaceError: the video shows no face.
    UserError: this machine lacks a model file or a library.
  """
  from data_prep.video import tracked, video_to_records

  with video_errors(path):
    if crop == face_crops.FRAME:
      return _uncropped(path, progress)
    with contextlib.ExitStack() as stack:
      if models is None:
        models = stack.enter_context(video_to_records.Models())
      video = tracked.TrackedVideo(
        _video_frames(path),
        models.finder,
        progress=lambda share, _: progress(share),
      )
    if not video.tracks:
      raise NoFaceError(path)
    return _cropped(path, video, crop)


def read_many(
  paths: Iterable[str | os.PathLike],
  *,
  crop: str = face_crops.RECORD,
  progress: Callable[[int, float], None] = lambda number, share: None,
) -> Iterator[TalkingVideo | FaceVideoError]:
  """Reads videos one after the other, with models that are opened once.

  Args:
    paths: see `read`.
    crop: see `read`.
    progress: called with the number of a video and the share of it that has
      been read.

  Yields:
    For each video the result of `read`, or the FaceVideoError it raises.

  Raises:
    UserError: this machine lacks a model file or a library.
  """
  with contextlib.ExitStack() as stack:
    models = None
    if crop != face_crops.FRAME:
      from data_prep.video import video_to_records

      models = stack.enter_context(video_to_records.Models())
    for number, path in enumerate(paths):
      try:
        yield read(
          path,
          crop=crop,
          models=models,
          progress=functools.partial(progress, number),
        )
      except FaceVideoError as e:
        yield e


def pictures(path: str | os.PathLike) -> Iterator[np.ndarray]:
  """Yields the whole frames of a video, 25 a second.

  They are those of `read`, one for each of its crops.

  Yields:
    uint8 (H, W, 3), RGB.

  Raises:
    FaceVideoError: the video is damaged or over a limit; possibly late.
  """
  with video_errors(path), _video_frames(path).open() as (_, frames):
    for picture, _ in frames:
      yield picture


def stretches(has_face: np.ndarray) -> list[slice]:
  """Returns the runs of frames with a face, in order.

  Args:
    has_face: bool (N,), True where the frame shows the face.
  """
  edges = np.flatnonzero(np.diff(has_face.astype(int), prepend=0, append=0))
  return [slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


# --- The parts ----------------------------------------------------------------


def _video_frames(path: str | os.PathLike) -> tracked.VideoFrames:
  from data_prep.video import tracked

  return tracked.VideoFrames(path, FPS, max_secs=MAX_SECS, fill_pauses=True)


def _sound(path: str | os.PathLike, start_secs: float) -> np.ndarray:
  """Returns int16 (S,) from the time of the first frame on."""
  from data_prep.video import decode

  samples = decode.read_sound(path)
  first = round(start_secs * SAMPLE_RATE)
  if len(samples) and first < 0:
    return np.pad(samples, (-first, 0))
  return samples[max(first, 0) :]


def _boxes(tracks: list[tracking.Track], num_frames: int) -> np.ndarray:
  """Returns float32 (N, 4), the box of at most one face, NaN without one.

  A track that overlaps a longer one is left out.
  """
  boxes = np.full((num_frames, 4), np.nan, np.float32)
  for track in sorted(tracks, key=lambda t: (len(t), t.side), reverse=True):
    span = slice(track.first_frame, track.first_frame + len(track))
    if np.isnan(boxes[span]).all():
      boxes[span] = track.boxes
  return boxes


def _cropped(
  path: str | os.PathLike, video: tracked.TrackedVideo, crop: str
) -> TalkingVideo:
  boxes = _boxes(video.tracks, video.num_frames)
  judged = boxes
  if crop == face_crops.SYNCNET:
    judged = face_crops.syncnet_boxes(boxes).astype(np.float32)
  crops = np.zeros((len(boxes), FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
  start_secs = math.nan
  for i, (frame, secs, record_crop) in enumerate(video.crops(boxes)):
    if i == 0:
      start_secs = secs
    if record_crop is None:
      continue
    if crop == face_crops.SYNCNET:
      record_crop = face_crops.syncnet_crop(frame, judged[i])
    crops[i] = record_crop
  width, height = video.size
  return _with_sound(path, crops, judged, start_secs, (height, width))


def _uncropped(path: str | os.PathLike, progress: Progress) -> TalkingVideo:
  pictures, start_secs = [], math.nan
  with _video_frames(path).open() as (video, frames):
    for frame, secs in frames:
      if not pictures:
        start_secs = secs
      pictures.append(face_crops.resized(frame))
      progress(video.share)
    width, height = video.info.width, video.info.height
  boxes = np.tile(np.float32([0, 0, width, height]), (len(pictures), 1))
  return _with_sound(
    path, np.stack(pictures), boxes, start_secs, (height, width)
  )


def _with_sound(
  path: str | os.PathLike,
  frames: np.ndarray,
  boxes: np.ndarray,
  start_secs: float,
  frame_size: tuple[int, int],
) -> TalkingVideo:
  return TalkingVideo(
    frames=frames,
    boxes=boxes,
    has_face=~np.isnan(boxes[:, 0]),
    sound=_sound(path, start_secs)[: FRAME_SAMPLES * len(frames)],
    frame_size=frame_size,
  )
