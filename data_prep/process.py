"""One video in, its records out. Knows of no engine, pool or file format.

The local process pool calls it; a cluster engine's worker can do the same:

  with Models() as models:
    outcome = process_video(source, Settings(), models, emit=records.append)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from data_prep import decode, faces, regions
from data_prep.manifest import Source
from marlin_jax import records

# One clip of the trainer: 16 frames, every second one.
CLIP_SPAN = 31
# A shorter track is noise, unless the whole video is no longer.
MIN_TRACK_FRAMES = 15
JPEG_QUALITY = 95

KEPT = "kept"
NO_FACE = "without a face"
QUARANTINED = "quarantined"
NO_FACE_REASON = "no face found"

# Called with the share of the video that is done and the number of frames.
Progress = Callable[[float, float], None]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides how a video is processed.

  Attributes:
    segment_frames: longest segment; at least 2 x CLIP_SPAN, so that the
      segments of a long track hold a clip each.
    limits: what a video may cost.
  """

  segment_frames: int = 64
  limits: decode.Limits = decode.DEFAULT_LIMITS

  def __post_init__(self) -> None:
    if self.segment_frames < 2 * CLIP_SPAN:
      raise ValueError(
        f"segment_frames is {self.segment_frames}, expected at least "
        f"{2 * CLIP_SPAN}: no segment of a longer track is then shorter than "
        f"a clip's span of {CLIP_SPAN} frames"
      )


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one video.

  Attributes:
    status: KEPT, NO_FACE or QUARANTINED.
    reason: why it was not kept, else ''.
    num_decoded_frames: frames of the video, as decoded.
    num_tracks: face tracks that were kept.
    num_records: records that were emitted.
    num_frames: face crops in these records.
  """

  status: str
  reason: str = ""
  num_decoded_frames: int = 0
  num_tracks: int = 0
  num_records: int = 0
  num_frames: int = 0


class Models:
  """Face finder and parser; a context manager, good for many videos.

  Raises:
    RuntimeError: a model file or a system library is missing; no video can be
      processed on this machine.
  """

  def __init__(self) -> None:
    with contextlib.ExitStack() as stack:
      self.finder = stack.enter_context(faces.FaceFinder())
      self.parser: regions.Parser = stack.enter_context(
        regions.MediaPipeParser()
      )
      self._stack = stack.pop_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()


def process_video(
  source: Source,
  settings: Settings,
  models: Models,
  emit: Callable[[bytes], None],
  progress: Progress = lambda share, num_frames: None,
) -> Outcome:
  """Finds, crops and parses every face of a video, in two decoding passes.

  Memory holds one segment of each face that is visible, and the face meshes
  of the video.

  Args:
    source: the video.
    settings: see there.
    models: opened once per worker.
    emit: takes one encoded record after the other, in the same order whenever
      the video is processed. They count only if the video is kept: a video can
      turn out to be damaged late.
    progress: called now and then.

  Raises:
    decode.DecoderSetupError: no video can be decoded on this machine.
    Exception: whatever `emit` raises. Everything else is the video's fault and
      becomes its reason.
  """
  work = _Work(source, settings, models, progress)
  encoded = work.records()
  num_records = 0
  while True:
    try:
      data = next(encoded, None)
    except decode.DecoderSetupError:
      raise
    except decode.DecodeError as e:
      return Outcome(QUARANTINED, str(e))
    except Exception as e:  # one bad video must not end a run of thousands
      return Outcome(QUARANTINED, f"unexpected error: {type(e).__name__}: {e}")
    if data is None:
      break
    emit(data)
    num_records += 1
  if not work.tracks:
    return Outcome(NO_FACE, NO_FACE_REASON, num_decoded_frames=work.num_frames)
  return Outcome(
    KEPT,
    num_decoded_frames=work.num_frames,
    num_tracks=len(work.tracks),
    num_records=num_records,
    num_frames=sum(map(len, work.tracks)),
  )


def segment_lengths(num_frames: int, segment_frames: int) -> list[int]:
  """Cuts a track into nearly equal parts of at most `segment_frames` frames.

  Equal parts leave no stub that is shorter than a clip: 120 frames at 64 are
  60 + 60, not 64 + 56; 65 are 33 + 32, not 64 + 1.
  """
  num = math.ceil(num_frames / segment_frames)
  short, num_longer = divmod(num_frames, num)
  return [short + (i < num_longer) for i in range(num)]


class _Work:
  """One video on its way through the two passes."""

  def __init__(
    self,
    source: Source,
    settings: Settings,
    models: Models,
    progress: Progress,
  ) -> None:
    self._source = source
    self._settings = settings
    self._models = models
    self._progress = progress
    self._reported_at = time.monotonic()
    self.num_frames = 0
    self.tracks: list[faces.Track] = []
    self._fps = 0.0

  def records(self) -> Iterator[bytes]:
    """Yields encoded records as their last frames come by."""
    self._find_tracks()
    if self.tracks:
      yield from self._cut_records()

  def _open(self) -> decode.Video:
    return decode.open_video(self._source.path, self._settings.limits)

  def _report(self, num_done: int, num_expected: int) -> None:
    """Reports frames done, of both passes together."""
    now = time.monotonic()
    if now - self._reported_at > 0.25:
      self._reported_at = now
      self._progress(min(num_done / (2 * num_expected), 1.0), num_done / 2)

  def _find_tracks(self) -> None:
    with self._open() as video:

      def frames() -> Iterator[np.ndarray]:
        for frame, _ in video:
          yield frame
          num_expected = max(video.info.announced_frames, video.num_frames)
          self._report(video.num_frames, num_expected)

      tracks = faces.find_tracks(frames(), self._models.finder, min_frames=1)
      self.num_frames, self._fps = video.num_frames, video.fps
    min_frames = min(MIN_TRACK_FRAMES, self.num_frames)
    self.tracks = [
      dataclasses.replace(track, track_id=track_id)
      for track_id, track in enumerate(
        track for track in tracks if len(track) >= min_frames
      )
    ]

  def _cut_records(self) -> Iterator[bytes]:
    pending = [
      segment for track in self.tracks for segment in self._segments_of(track)
    ]
    pending.sort(key=lambda segment: segment.first_frame)
    active: list[_Segment] = []
    with self._open() as video:
      for i, (frame, secs) in enumerate(video):
        while pending and pending[0].first_frame == i:
          active.append(pending.pop(0))
          active[-1].start_secs = secs
        for segment in active:
          segment.add(frame, i)
        for segment in [s for s in active if s.is_full]:
          active.remove(segment)
          yield records.encode(segment.record(self._source, self._fps))
        self._report(self.num_frames + i + 1, self.num_frames)
      if video.num_frames != self.num_frames:
        raise decode.DecodeError(
          f"{self.num_frames} frames in the first pass, {video.num_frames} in "
          "the second: was the file changed meanwhile?"
        )

  def _segments_of(self, track: faces.Track) -> Iterator[_Segment]:
    start = 0
    lengths = segment_lengths(len(track), self._settings.segment_frames)
    for number, length in enumerate(lengths):
      yield _Segment(track, number, start, length, self._models.parser)
      start += length


class _Segment:
  """A part of a track while its frames come by."""

  def __init__(
    self,
    track: faces.Track,
    number: int,
    start: int,
    length: int,
    parser: regions.Parser,
  ) -> None:
    self._track = track
    self._number = number
    self._parser = parser
    self._rows = slice(start, start + length)
    self._length = length
    self._jpegs: list[bytes] = []
    self._label_maps: list[np.ndarray] = []
    self._parsed: list[bool] = []
    self.first_frame = track.first_frame + start
    self.start_secs = 0.0

  @property
  def is_full(self) -> bool:
    return len(self._jpegs) == self._length

  def add(self, frame: np.ndarray, i: int) -> None:
    """Crops and parses frame number i of the video."""
    import simplejpeg

    row = i - self._track.first_frame
    box, landmarks = self._track.boxes[row], self._track.landmarks[row]
    crop = faces.crop_frame(frame, box)
    self._jpegs.append(
      simplejpeg.encode_jpeg(
        np.ascontiguousarray(crop),
        quality=JPEG_QUALITY,
        colorspace="RGB",
        colorsubsampling="420",
      )
    )
    labels = self._parser.parse(frame, box, landmarks)
    self._parsed.append(labels is not None)
    if labels is None:
      labels = np.zeros((records.FRAME_SIZE, records.FRAME_SIZE), np.uint8)
    self._label_maps.append(labels)

  def record(self, source: Source, fps: float) -> records.Record:
    label_maps = np.stack(self._label_maps)
    bits = records.region_bits(label_maps)
    # Not even background: the trainer's rule for frames without a face.
    bits[~np.array(self._parsed)] = 0
    return records.Record(
      frames=self._jpegs,
      regions=bits,
      parsing=records.compress_parsing(label_maps),
      boxes=self._track.boxes[self._rows],
      video_id=source.video_id,
      track_id=self._track.track_id,
      segment=self._number,
      subject_id=source.subject_id,
      fps=fps,
      start_secs=self.start_secs,
      quality=self._track.quality,
    )
