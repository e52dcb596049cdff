"""Videos with the tracks of their faces; frames can be read again.

  video = TrackedVideo(VideoFrames("talk.mp4", fps=25.0), finder)
  for track in video.tracks: ...
  for frame, secs in video.frames(): ...      # decoded a second time
  for frame, secs, crop in video.crops(track_boxes): ...

Axes: N frames of the video, H W their pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.decoder.protocol import Span
from data_prep.faces import boxes, main_face, tracking
from data_prep.faces.face_finder import FaceFinder
from data_prep.sources.listing import WHOLE, Part
from data_prep.video import decode, frame_rate

# A shorter track is noise, unless the whole video is no longer: 15 frames at 30
# per second.
MIN_TRACK_SECS = 0.5
# Margin around the box of a part, as a share of its longer side: detectors and
# crops need more than the face.
BOX_MARGIN = 0.25
# Share of the time that finding a face takes; the second decoding and the
# cropping take the rest.
FINDING_SHARE = 0.9

# Called after each frame with the share of the video that is done, in [0, 1],
# and with the number of frames decoded so far in this pass.
Progress = Callable[[float, int], None]


@dataclasses.dataclass(frozen=True)
class VideoFrames:
  """Frames of one video, which can be read any number of times.

  Attributes:
    path: a video file; with `frame_rate`, a folder of pictures.
    fps: constant rate to resample to, by repeating and leaving out frames; 0
      keeps the video's own.
    limits: limits on the cost of the video.
    frame_rate: frames per second of a folder of pictures; 0 for a video.
    part: part of the file that is the video. If it has a box, frames show the
      `region_of` the box.
    max_secs: longest video in seconds; only checked if `fps` is set.
    fill_pauses: repeat a frame through each pause, see `frame_rate.resampled`;
      else tracks end at a pause of more than `frame_rate.MAX_PAUSE_SECS`. Has
      no effect unless `fps` is set.
    require_sandbox: refuse to decode if a layer of the sandbox is missing.
    may_change_size: read frames of another size than the first, too; no effect
      if the part has a box.
    keep_damaged: see `decode.open_video`.
    stop_secs: time at which the last frame that is read ends.
  """

  path: str | os.PathLike
  fps: float = 0.0
  limits: decode.Limits = decode.DEFAULT_LIMITS
  frame_rate: float = 0.0
  part: Part = WHOLE
  max_secs: float = math.inf
  fill_pauses: bool = False
  require_sandbox: bool = False
  may_change_size: bool = False
  keep_damaged: bool = False
  stop_secs: float = math.inf

  @contextlib.contextmanager
  def open(
    self,
  ) -> Iterator[tuple[decode.Video, Iterator[tuple[np.ndarray, float]]]]:
    """Starts a decoder.

    Yields:
      The open video, and an iterator of its frames, uint8 (H, W, 3) RGB, with
      their times in seconds.

    Raises:
      decode.DecodeError: the video is damaged, over a limit or longer than
        `max_secs`; also while frames are read.
      decode.DecoderSetupError: no video can be decoded on this machine.
    """
    with decode.open_video(
      self.path,
      self.limits,
      self.frame_rate,
      self.require_sandbox,
      Span(self.part.start_secs, self.part.end_secs),
      # The pixels of a box, and its offset, are those of one size.
      self.may_change_size and not self.part.box,
      self.keep_damaged,
    ) as video:
      frames = iter(video)
      if self.stop_secs < math.inf:
        frames = _before(frames, self.stop_secs)
      if self.part.box:
        frames = self._cut(video, frames)
      yield video, self._resampled(frames) if self.fps else frames

  def region_of(self, info: decode.VideoInfo) -> tuple[int, int, int, int]:
    """Returns the pixels to keep of the file's frames: x0, y0, x1, y1.

    They are the whole frame, or the part's box with a margin of `BOX_MARGIN`.
    """
    if not self.part.box:
      return 0, 0, info.width, info.height
    scale = np.array([info.width, info.height] * 2)
    x0, y0, x1, y1 = np.array(self.part.box) * scale
    margin = BOX_MARGIN * max(x1 - x0, y1 - y0)
    return (
      max(math.floor(x0 - margin), 0),
      max(math.floor(y0 - margin), 0),
      min(math.ceil(x1 + margin), info.width),
      min(math.ceil(y1 + margin), info.height),
    )

  def _cut(
    self, video: decode.Video, frames: Iterator[tuple[np.ndarray, float]]
  ) -> Iterator[tuple[np.ndarray, float]]:
    x0, y0, x1, y1 = self.region_of(video.info)
    for frame, secs in frames:
      # A copy, so that the whole frame is freed.
      yield np.ascontiguousarray(frame[y0:y1, x0:x1]), secs

  def _resampled(
    self, decoded: Iterator[tuple[np.ndarray, float]]
  ) -> Iterator[tuple[np.ndarray, float]]:
    frames = frame_rate.resampled(decoded, self.fps, self.fill_pauses)
    tally = decode.Tally(self.limits)
    for num_frames, frame in enumerate(frames):
      height, width, _ = frame[0].shape
      if reason := tally.add(width, height):
        raise decode.DecodeError(f"{reason}, at {self.fps:g} frames per second")
      if num_frames == self.max_secs * self.fps:
        raise decode.DecodeError(
          f"it is longer than {self.max_secs:g} s, and its faces would not fit "
          "into memory; cut it into parts"
        )
      yield frame


class TrackedVideo:
  """A video and the tracks of all faces in it.

  The constructor decodes the video to its end to find the tracks; `frames` and
  `crops` decode it again, unless its frames fit into `keep_bytes`.

  Args:
    source: the frames.
    finder: finds faces.
    keep_bytes: bytes of frames to keep at most. A larger video keeps none.
    finding_share: share of the progress that the constructor reports; `crops`
      reports the rest.
    max_track_secs: as for `tracking.find_tracks`.
    progress: called after each frame.

  Attributes:
    num_frames: N, at the rate that `source` brings them to.
    num_decoded_frames: frames of the file.
    size: width and height of the frames in pixels, where they do not change.
    offset: x and y of the frames within those of the file.
    fps: frames per second.
    notes: see `decode.Video`.
    secs: N times of the frames in seconds.
    tracks: the tracks of at least `MIN_TRACK_SECS`, or of all frames of a
      shorter video, numbered from 0; those of the person, where `source`
      says where that is.
    num_others: number of the tracks of others.

  Raises:
    decode.DecodeError, decode.DecoderSetupError: as for `VideoFrames.open`.
  """

  def __init__(
    self,
    source: VideoFrames,
    finder: FaceFinder,
    *,
    keep_bytes: int = 0,
    finding_share: float = FINDING_SHARE,
    max_track_secs: float = math.inf,
    progress: Progress = lambda share, num_frames: None,
  ) -> None:
    self._source = source
    self._finding_share = finding_share
    self._progress = progress
    # Frames and their times; None if they do not fit into `keep_bytes`.
    self._kept: list[tuple[np.ndarray, float]] | None = []
    self._kept_bytes = 0
    self.num_frames = 0
    self.secs: list[float] = []
    # Numbers of frames that follow a pause that is not filled.
    self._after_pauses: list[int] = []
    with source.open() as (video, frames):
      rate = source.fps or video.info.rate
      tracks = tracking.find_tracks(
        self._first_pass(video, frames, keep_bytes),
        finder,
        rate,
        min_frames=1,
        max_track_secs=max_track_secs,
      )
      self.num_decoded_frames = video.num_frames
      self._file_size = video.info.width, video.info.height
      x0, y0, x1, y1 = source.region_of(video.info)
      self.size, self.offset = (x1 - x0, y1 - y0), (x0, y0)
      self.fps = source.fps or video.fps
      self.notes = video.notes
    min_frames = tracking.frames_of(MIN_TRACK_SECS, rate)
    min_frames = min(min_frames, self.num_frames)
    parts = [
      part for track in tracks for part in _split(track, self._after_pauses)
    ]
    parts.sort(key=lambda track: track.first_frame)
    long_enough = [track for track in parts if len(track) >= min_frames]
    of_person = self._of_person(long_enough)
    self.num_others = len(long_enough) - len(of_person)
    self.tracks = main_face.numbered(of_person)

  def _of_person(self, tracks: list[tracking.Track]) -> list[tracking.Track]:
    """Returns the tracks of the person of the part, if it names one."""
    part = self._source.part
    if part.face_at:
      tracks = main_face.at_points(tracks, self.secs, part.face_at)
    if part.box:
      box = np.array(part.box) * np.tile(self._file_size, 2)
      tracks = main_face.in_box(tracks, box - np.tile(self.offset, 2))
    return tracks

  def _first_pass(
    self,
    video: decode.Video,
    frames: Iterator[tuple[np.ndarray, float]],
    keep_bytes: int,
  ) -> Iterator[np.ndarray]:
    """Yields frames, counts them, and keeps them while they fit."""
    rate = self._source.fps or self._source.frame_rate
    for frame, secs in frames:
      # Only videos of a constant rate have pauses: skips of at least a frame.
      if rate and self.secs and (secs - self.secs[-1]) * rate > 1.5:
        self._after_pauses.append(self.num_frames)
      self.secs.append(secs)
      self.num_frames += 1
      self._kept_bytes += frame.nbytes
      if self._kept_bytes > keep_bytes:
        self._kept = None
      if self._kept is not None:
        self._kept.append((frame, secs))
      yield frame
      self._progress(self._finding_share * video.share, video.num_frames)

  def frames(
    self, stop: int | None = None
  ) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 (H, W, 3) RGB frames and their times in seconds.

    Args:
      stop: number of frames to read; all N by default.

    Raises:
      decode.DecodeError: the file has another number of frames than before, or
        can no longer be read.
    """
    stop = self.num_frames if stop is None else stop
    if self._kept is not None:
      yield from self._kept[:stop]
      return
    num_frames = 0
    with self._source.open() as (_, frames):
      for frame, secs in itertools.islice(frames, stop):
        num_frames += 1
        yield frame, secs
      if stop == self.num_frames:
        num_frames += sum(1 for _ in frames)
    if num_frames != stop:
      raise decode.DecodeError(
        f"{self.num_frames} frames in the first pass, {num_frames} in the "
        "second: was the file changed meanwhile?"
      )

  def crops(
    self, crop_boxes: np.ndarray
  ) -> Iterator[tuple[np.ndarray, float, np.ndarray | None]]:
    """Yields the first frames of the video with their face crops.

    Args:
      crop_boxes: float32 (M, 4), the box of each of the first M frames, as
        `Track.boxes`; NaN in frames without a face.

    Yields:
      uint8 (H, W, 3), the frame; its time in seconds; uint8 (224, 224, 3), its
      crop, None without a face.

    Raises:
      decode.DecodeError: as for `frames`.
    """
    total = len(crop_boxes)
    for i, (frame, secs) in enumerate(self.frames(total)):
      has_face = not np.isnan(crop_boxes[i]).any()
      crop = boxes.crop_frame(frame, crop_boxes[i]) if has_face else None
      done = (i + 1) / total
      rest = (1 - self._finding_share) * done
      self._progress(self._finding_share + rest, i + 1)
      yield frame, secs, crop


def _before(
  frames: Iterator[tuple[np.ndarray, float]], stop_secs: float
) -> Iterator[tuple[np.ndarray, float]]:
  """Yields the frames that are shown to their end before a time."""
  shown = None
  for frame, secs in frames:
    if secs > stop_secs:
      return
    if shown is not None:
      yield shown
    shown = frame, secs
  if shown is not None:
    yield shown


def _split(track: tracking.Track, starts: list[int]) -> list[tracking.Track]:
  """Cuts a track before each of the frames `starts` of the video."""
  edges = [start - track.first_frame for start in starts]
  edges = [0, *(edge for edge in edges if 0 < edge < len(track)), len(track)]
  return [
    dataclasses.replace(
      track,
      first_frame=track.first_frame + start,
      boxes=track.boxes[start:stop],
      meshes=track.meshes.part(start, stop),
      continues=track.continues and start == 0,
    )
    for start, stop in itertools.pairwise(edges)
  ]
