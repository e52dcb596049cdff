"""A video of somebody talking: face crops and their sound on one clock.

  video = read("talk.mp4")
  video.frames[f]                       # uint8 (224, 224, 3), 25 a second
  video.sound[640 * f : 640 * (f + 1)]  # int16, what is heard meanwhile
  for stretch in stretches(video.has_face): ...
  for picture in pictures("talk.mp4"): ...  # the same N frames, uncropped

Frames of any rate become 25 a second by repeating pictures or leaving some out;
sound of any rate and number of channels becomes 16 kHz, mono. Sample 640 f is
at the time of frame f, wherever in the file the two tracks begin.

Decoder, face tracker and crop are those of data_prep, as in face_video.

Axes: N frames, S samples, H W pixels of the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.inference.face_windows import (
  FaceVideoError,
  NoFaceError,
  fit_square,
)
from marlin_jax.records.schema import FRAME_SIZE, SAMPLE_RATE

if TYPE_CHECKING:
  from data_prep.faces import tracking
  from data_prep.video import video_to_records

FPS = 25
FRAME_SAMPLES = SAMPLE_RATE // FPS
# All crops are in memory: 2.3 GB.
MAX_SECS = 600

# Of the time that a video takes, as in face_video.
_FINDING_SHARE = 0.9

# Called with the share of the video that has been read.
Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class TalkingVideo:
  """A whole video.

  Attributes:
    frames: uint8 (N, 224, 224, 3), RGB, face crops; black without a face.
    boxes: float32 (N, 4), the crops as x0, y0, x1, y1 in source pixels; may
      reach past the frame; NaN without a face.
    has_face: bool (N,).
    sound: int16 (S,), 16 kHz, mono, 640 samples a frame and N frames at most;
      less where the sound ends before the pictures, empty where there is no
      sound track.
    frame_size: H, W.
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
  crop_face: bool = True,
  models: video_to_records.Models | None = None,
  progress: Progress = lambda share: None,
) -> TalkingVideo:
  """Reads a video whole, following the face that is seen the longest.

  Where that face is lost for more than half a second, frames are without a face
  until it is back; so may be those at both ends. Whoever is seen then is taken
  for the same person: of several faces at a time, that of the longest track,
  of equally long ones the largest.

  Args:
    path: a video file, in anything that FFmpeg decodes.
    crop_face: follow the face and cut it out; else each frame is taken for a
      face crop, as it is in LRS2, with black bars where it is no square.
    models: face models that are open already; else they are opened.
    progress: see `Progress`.

  Raises:
    FaceVideoError: the video or its sound is damaged, over a limit of
      `data_prep.video.decode.Limits`, or longer than MAX_SECS.
    NoFaceError: no face is seen in it.
    RuntimeError: this machine lacks a model file or a library.
  """
  with _as_video_errors(path):
    if not crop_face:
      return _uncropped(path, progress)
    with contextlib.ExitStack() as stack:
      if models is None:
        from data_prep.video import video_to_records

        models = stack.enter_context(video_to_records.Models())
      tracks, num_frames = _find_tracks(path, models, progress)
    boxes = _boxes(tracks, num_frames)
    if np.isnan(boxes).all():
      raise NoFaceError(path)
    return _cropped(path, boxes, progress)


def read_many(
  paths: Iterable[str | os.PathLike],
  *,
  crop_face: bool = True,
  progress: Callable[[int, float], None] = lambda number, share: None,
) -> Iterator[TalkingVideo | FaceVideoError]:
  """Reads videos one after the other, with models that are opened once.

  Args:
    paths: as for `read`.
    crop_face: as for `read`.
    progress: called with the number of a video and the share of it that is
      read.

  Yields:
    Of each video what `read` gives or raises.

  Raises:
    RuntimeError: this machine lacks a model file or a library.
  """
  with contextlib.ExitStack() as stack:
    models = None
    if crop_face:
      from data_prep.video import video_to_records

      models = stack.enter_context(video_to_records.Models())
    for number, path in enumerate(paths):
      try:
        yield read(
          path,
          crop_face=crop_face,
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
  with _as_video_errors(path):
    for picture, _, _ in _frames(path):
      yield picture


def stretches(has_face: np.ndarray) -> list[slice]:
  """Returns the runs of frames with a face, of bool (N,), in order."""
  edges = np.flatnonzero(np.diff(has_face.astype(int), prepend=0, append=0))
  return [slice(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


# --- The parts ----------------------------------------------------------------


@contextlib.contextmanager
def _as_video_errors(path: str | os.PathLike) -> Iterator[None]:
  from data_prep.video import decode

  try:
    yield
  except decode.DecodeError as e:
    raise FaceVideoError(path, str(e)) from e


def _frames(
  path: str | os.PathLike,
) -> Iterator[tuple[np.ndarray, float, float]]:
  """Yields frames, 25 a second, their times, and the share that is read."""
  from data_prep.video import decode, frame_rate

  with decode.open_video(path) as video:
    for num, (frame, secs) in enumerate(frame_rate.resampled(video, FPS)):
      if num == MAX_SECS * FPS:
        raise decode.DecodeError(
          f"it is longer than {MAX_SECS} s, whose faces would not fit into "
          "memory; cut it into parts"
        )
      announced = video.info.announced_frames
      read = video.num_frames
      yield frame, secs, read / max(read, announced) if announced else 0.0


def _sound(path: str | os.PathLike, start_secs: float) -> np.ndarray:
  """Returns int16 (S,) from the time of the first frame on."""
  from data_prep.video import decode

  samples = decode.read_sound(path)
  first = round(start_secs * SAMPLE_RATE)
  if len(samples) and first < 0:
    return np.pad(samples, (-first, 0))
  return samples[max(first, 0) :]


def _find_tracks(
  path: str | os.PathLike, models: video_to_records.Models, progress: Progress
) -> tuple[list[tracking.Track], int]:
  """Returns all tracks, and the number of frames."""
  from data_prep.faces import tracking

  num_frames = 0

  def frames() -> Iterator[np.ndarray]:
    nonlocal num_frames
    for frame, _, share in _frames(path):
      num_frames += 1
      yield frame
      progress(_FINDING_SHARE * share)

  found = tracking.find_tracks(frames(), models.finder, FPS, min_frames=1)
  return found, num_frames


def _boxes(tracks: list[tracking.Track], num_frames: int) -> np.ndarray:
  """Returns float32 (N, 4), one face a frame at most, NaN without one."""
  from data_prep.video import video_to_records

  # What is too short to be prepared for training is too short here.
  least = min(video_to_records.MIN_TRACK_FRAMES, num_frames)
  boxes = np.full((num_frames, 4), np.nan, np.float32)

  def size(track: tracking.Track) -> tuple[int, float]:
    return len(track), track.side

  for track in sorted(tracks, key=size, reverse=True):
    rows = slice(track.first_frame, track.first_frame + len(track))
    if len(track) >= least and np.isnan(boxes[rows]).all():
      boxes[rows] = track.boxes
  return boxes


def _cropped(
  path: str | os.PathLike, boxes: np.ndarray, progress: Progress
) -> TalkingVideo:
  from data_prep.faces import boxes as crops
  from data_prep.video import decode

  total = len(boxes)
  has_face = ~np.isnan(boxes[:, 0])
  frames = np.zeros((total, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
  num, size, start_secs = 0, (0, 0), 0.0
  for picture, secs, _ in _frames(path):
    if not num:
      start_secs = secs
    if num < total and has_face[num]:
      frames[num] = crops.crop_frame(picture, boxes[num])
    num, size = num + 1, picture.shape[:2]
    progress(_FINDING_SHARE + (1 - _FINDING_SHARE) * min(num / total, 1.0))
  if num != total:
    raise decode.DecodeError(
      f"{total} frames in the first pass, {num} in the second: was the file "
      "changed meanwhile?"
    )
  sound = _sound(path, start_secs)
  return _with_sound(frames, boxes, has_face, sound, size)


def _uncropped(path: str | os.PathLike, progress: Progress) -> TalkingVideo:
  frames, size, start_secs = [], (0, 0), 0.0
  for picture, secs, share in _frames(path):
    if not frames:
      start_secs = secs
    frames.append(fit_square(picture, FRAME_SIZE))
    size = picture.shape[:2]
    progress(share)
  height, width = size
  side = max(size)
  x, y = (width - side) / 2, (height - side) / 2
  box = np.float32([x, y, x + side, y + side])
  return _with_sound(
    np.stack(frames),
    np.tile(box, (len(frames), 1)),
    np.ones(len(frames), bool),
    _sound(path, start_secs),
    size,
  )


def _with_sound(
  frames: np.ndarray,
  boxes: np.ndarray,
  has_face: np.ndarray,
  sound: np.ndarray,
  frame_size: tuple[int, int],
) -> TalkingVideo:
  return TalkingVideo(
    frames=frames,
    boxes=boxes,
    has_face=has_face,
    sound=sound[: FRAME_SAMPLES * len(frames)],
    frame_size=frame_size,
  )
