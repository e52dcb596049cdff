"""One video in, its records out. Knows of no engine, pool or file format.

The local process pool calls it; a cluster engine's worker can do the same:

  with Models() as models:
    outcome = process_video(source, Settings(), models, emit=records.append)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from data_prep.faces import boxes, face_finder, tracking
from data_prep.regions import parsers, track_labels
from data_prep.sources.manifest import Source
from data_prep.video import decode, frame_rate
from marlin_jax.records import mel_spectrogram, quality_index, schema

# One clip of the trainer: 16 frames, every second one.
CLIP_SPAN = 31
# A shorter track is noise, unless the whole video is no longer.
MIN_TRACK_FRAMES = 15
JPEG_QUALITY = 95
# Of one record. Times of frames can be anything: a leap of a day would be
# gigabytes of silence.
MAX_SOUND_SECS = 600
# The first pass keeps the frames of a video that needs no more than this, which
# spares a second decoding: 12 s of 1280x720 at 30 a second. Each worker has a
# core, and leaves most of its share of the memory.
KEPT_BYTES = min(
  1 << 30,
  os.sysconf("SC_PAGE_SIZE")
  * os.sysconf("SC_PHYS_PAGES")
  // (4 * (os.cpu_count() or 1)),
)

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
    has_sound: whether records hold the sound.
    fps: frames per second that every video is brought to; 0 leaves them as
      they are.
    parser: what labels the faces.
  """

  segment_frames: int = 64
  limits: decode.Limits = decode.DEFAULT_LIMITS
  has_sound: bool = False
  fps: float = 0.0
  parser: parsers.ParserChoice = parsers.DEFAULT

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
    quality: a row for each record, see `quality_index.row_of`.
  """

  status: str
  reason: str = ""
  num_decoded_frames: int = 0
  num_tracks: int = 0
  num_records: int = 0
  num_frames: int = 0
  quality: list[list[float]] = dataclasses.field(default_factory=list)


class Models:
  """Face finder and parser; a context manager, good for many videos.

  Args:
    choice: which parser.

  Raises:
    RuntimeError: a model file or a system library is missing; no video can be
      processed on this machine.
  """

  def __init__(self, choice: parsers.ParserChoice = parsers.DEFAULT) -> None:
    with contextlib.ExitStack() as stack:
      self.finder = stack.enter_context(face_finder.FaceFinder())
      self.parser = stack.enter_context(parsers.open_parser(choice))
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
  """Finds, crops and parses every face of a video, in two passes.

  Memory holds one segment of each face that is visible, the face meshes of the
  video, and all of its frames where they are within `KEPT_BYTES`; a larger
  video is decoded twice.

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
  if not work.tracks:
    return Outcome(NO_FACE, NO_FACE_REASON, num_decoded_frames=work.num_frames)
  return Outcome(
    KEPT,
    num_decoded_frames=work.num_frames,
    num_tracks=len(work.tracks),
    num_records=len(work.quality),
    num_frames=sum(map(len, work.tracks)),
    quality=work.quality,
  )


def segment_lengths(num_frames: int, segment_frames: int) -> list[int]:
  """Cuts a track into nearly equal parts of at most `segment_frames` frames.

  Equal parts leave no stub that is shorter than a clip: 120 frames at 64 are
  60 + 60, not 64 + 56; 65 are 33 + 32, not 64 + 1.
  """
  num = math.ceil(num_frames / segment_frames)
  short, num_longer = divmod(num_frames, num)
  return [short + (i < num_longer) for i in range(num)]


def _version(path: Path) -> tuple[int, int] | None:
  """Returns what tells a file from one put in its place, None without one."""
  with contextlib.suppress(OSError):
    found = path.stat()
    return found.st_size, found.st_mtime_ns
  return None


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
    self.tracks: list[tracking.Track] = []
    self.quality: list[list[float]] = []
    self._fps = 0.0
    self._sound: _Sound | None = None
    # Frames and times; None where they are too large to keep.
    self._kept: list[tuple[np.ndarray, float]] | None = []

  def records(self) -> Iterator[bytes]:
    """Yields encoded records as their last frames come by."""
    before = _version(self._source.path)
    self._find_tracks()
    if self.tracks:
      if self._settings.has_sound:
        self._sound = _Sound(self._source, self._settings.limits)
      yield from self._cut_records()
    if _version(self._source.path) != before:
      raise decode.DecodeError("the file was changed while it was read")

  def _open(self) -> decode.Video:
    source = self._source
    return decode.open_video(
      source.path, self._settings.limits, source.frame_rate
    )

  def _frames(self, video: decode.Video) -> Iterator[tuple[np.ndarray, float]]:
    """Yields frames and times as the records will have them."""
    fps = self._settings.fps
    return frame_rate.resampled(video, fps) if fps else iter(video)

  def _report(self, num_done: int, num_expected: int) -> None:
    """Reports frames done, of both passes together."""
    now = time.monotonic()
    if now - self._reported_at > 0.25:
      self._reported_at = now
      self._progress(min(num_done / (2 * num_expected), 1.0), num_done / 2)

  def _find_tracks(self) -> None:
    num_frames = 0
    with self._open() as video:

      def frames() -> Iterator[np.ndarray]:
        nonlocal num_frames
        for frame, secs in self._frames(video):
          num_frames += 1
          self._keep(frame, secs)
          yield frame
          num_expected = max(video.info.announced_frames, video.num_frames)
          self._report(video.num_frames, num_expected)

      tracks = tracking.find_tracks(
        frames(),
        self._models.finder,
        self._settings.fps or video.info.rate,
        min_frames=1,
      )
      self.num_frames = video.num_frames
      self._fps = self._settings.fps or video.fps
    min_frames = min(MIN_TRACK_FRAMES, num_frames)
    self.tracks = [
      dataclasses.replace(track, track_id=track_id)
      for track_id, track in enumerate(
        track for track in tracks if len(track) >= min_frames
      )
    ]

  def _keep(self, frame: np.ndarray, secs: float) -> None:
    if self._kept is None:
      return
    if (len(self._kept) + 1) * frame.nbytes > KEPT_BYTES:
      self._kept = None
    else:
      self._kept.append((frame, secs))

  def _again(self) -> Iterator[tuple[np.ndarray, float]]:
    """Yields the frames a second time, and reports."""
    if self._kept is not None:
      for i, frame in enumerate(self._kept):
        yield frame
        self._report(len(self._kept) + i, len(self._kept))
      return
    with self._open() as video:
      for frame in self._frames(video):
        yield frame
        self._report(self.num_frames + video.num_frames, self.num_frames)
      if video.num_frames != self.num_frames:
        raise decode.DecodeError(
          f"{self.num_frames} frames in the first pass, {video.num_frames} in "
          "the second: was the file changed meanwhile?"
        )

  def _cut_records(self) -> Iterator[bytes]:
    pending = [
      segment for track in self.tracks for segment in self._segments_of(track)
    ]
    pending.sort(key=lambda segment: segment.first_frame)
    active: list[_Segment] = []
    for i, (frame, secs) in enumerate(self._again()):
      while pending and pending[0].first_frame == i:
        active.append(pending.pop(0))
      for segment in active:
        segment.add(frame, i, secs)
      for segment in [s for s in active if s.is_full]:
        active.remove(segment)
        record = segment.record(self._source, self._fps)
        if self._sound is not None:
          record = self._sound.added_to(record, segment.last_secs)
        self.quality.append(quality_index.row_of(record))
        yield schema.encode(record)

  def _segments_of(self, track: tracking.Track) -> Iterator[_Segment]:
    start = 0
    lengths = segment_lengths(len(track), self._settings.segment_frames)
    for number, length in enumerate(lengths):
      yield _Segment(track, number, start, length, self._models.parser)
      start += length


class _Segment:
  """A part of a track while its frames come by."""

  def __init__(
    self,
    track: tracking.Track,
    number: int,
    start: int,
    length: int,
    parser: parsers.Parser,
  ) -> None:
    self._track = track
    self._number = number
    self._labeller = track_labels.Labeller(parser, length)
    self._rows = slice(start, start + length)
    self._length = length
    self._jpegs: list[bytes] = []
    self.first_frame = track.first_frame + start
    self.start_secs = self.last_secs = 0.0

  @property
  def is_full(self) -> bool:
    return len(self._jpegs) == self._length

  def add(self, frame: np.ndarray, i: int, secs: float) -> None:
    """Crops and parses frame number i of the video, shown at a time."""
    import simplejpeg

    if not self._jpegs:
      self.start_secs = secs
    self.last_secs = secs

    row = i - self._track.first_frame
    box, landmarks = self._track.boxes[row], self._track.landmarks[row]
    crop = boxes.crop_frame(frame, box)
    self._jpegs.append(
      simplejpeg.encode_jpeg(
        np.ascontiguousarray(crop),
        quality=JPEG_QUALITY,
        colorspace="RGB",
        colorsubsampling="420",
      )
    )
    self._labeller.add(frame, box, landmarks)

  def record(self, source: Source, fps: float) -> schema.Record:
    found = self._labeller.finish()
    size = schema.FRAME_SIZE
    label_maps = np.zeros((len(found), size, size), np.uint8)
    for i, labels in enumerate(found):
      if labels is not None:
        label_maps[i] = labels
    bits = schema.region_bits(label_maps)
    # Not even background: the trainer's rule for frames without a face.
    bits[[labels is None for labels in found]] = 0
    return schema.Record(
      frames=self._jpegs,
      regions=bits,
      parsing=schema.compress_parsing(label_maps),
      boxes=self._track.boxes[self._rows],
      video_id=source.video_id,
      track_id=self._track.track_id,
      segment=self._number,
      subject_id=source.subject_id,
      fps=fps,
      start_secs=self.start_secs,
      quality=self._track.quality,
      quality_terms=self._track.quality_terms,
      labels={
        name: np.array(values, np.float32)
        for name, values in source.labels.items()
      },
    )


class _Sound:
  """The sound of a video, cut to its segments."""

  def __init__(self, source: Source, limits: decode.Limits) -> None:
    self._samples = (
      np.zeros(0, np.int16)
      if source.frame_rate
      else decode.read_sound(source.path, limits)
    )
    # Of the whole: at a cut, a spectrogram needs what is beyond it.
    self._mel = mel_spectrogram.mel_spectrogram(self._samples)

  def added_to(self, record: schema.Record, last_secs: float) -> schema.Record:
    """Returns the record with its sound, silent where the track has ended.

    Args:
      record: the segment, without sound.
      last_secs: when its last frame is shown.

    Raises:
      decode.DecodeError: the frames' times leap, or go backwards.
    """
    if not len(self._samples):
      return dataclasses.replace(record, audio=b"")
    stop_secs = last_secs + 1 / (record.fps or 25.0)
    secs = stop_secs - record.start_secs
    if not 0 <= secs <= MAX_SOUND_SECS:
      raise decode.DecodeError(
        f"{len(record)} frames in a row last {secs:.0f} s by their times, and "
        f"a record holds at most {MAX_SOUND_SECS} s of sound"
      )
    span = record.start_secs, stop_secs
    samples = _cut(self._samples, span, schema.SAMPLE_RATE, 0)
    return dataclasses.replace(
      record,
      audio=samples.astype("<i2").tobytes(),
      mel=_cut(
        self._mel, span, mel_spectrogram.MEL_RATE, -mel_spectrogram.MAX_VALUE
      ),
    )


def _cut(
  values: np.ndarray, span: tuple[float, float], rate: int, silence: float
) -> np.ndarray:
  """Returns the rows of a span of seconds, filled up where there are none."""
  start, stop = (max(round(secs * rate), 0) for secs in span)
  found = values[start:stop]
  missing = stop - start - len(found)
  return np.concatenate(
    [found, np.full((missing, *values.shape[1:]), silence, values.dtype)]
  )
