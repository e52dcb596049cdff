"""Turns one video into records, independent of any engine or file format.

The local process pool calls it; a worker of a cluster engine can do the same:

  with Models() as models:
    outcome = process_video(source, Settings(), models, emit=records.append)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from data_prep.faces import boxes, face_finder, main_face, tracking
from data_prep.regions import parsers, track_labels
from data_prep.sources.files import is_picture
from data_prep.sources.listing import Part
from data_prep.sources.manifest import Source
from data_prep.video import decode
from data_prep.video.tracked import TrackedVideo, VideoFrames
from marlin_jax.records import (
  cgroups,
  cli,
  mel_spectrogram,
  quality_index,
  schema,
)

JPEG_QUALITY = 95
# Longest sound of a record. The times of frames can be anything: a leap of a
# day would be gigabytes of silence.
MAX_SOUND_SECS = 600
# The first pass keeps the frames of a video that needs at most this much
# memory, which spares a second decoding: 12 s of 1280x720 at 30 frames per
# second. Each worker has a core, and leaves most of its share of the memory.
KEPT_BYTES = min(1 << 30, cgroups.usable_memory() // (4 * cli.num_cores()))
# Seconds between two reports of progress.
REPORT_SECS = 0.25

KEPT = "kept"
NO_FACE = "without a face"
QUARANTINED = "quarantined"
FAILED = "failed"
NO_FACE_REASON = "no face found"
NO_PERSON_REASON = "no face where the input says that the person is"

# Whose tracks are kept: those of all faces, or one track of the main face.
ALL, MAIN = "all", "main"
OTHERS_NOTE = "tracks of other faces than the main one are left out"
KEEP, QUARANTINE = ON_DAMAGE = ("keep", "quarantine")

# Called with the share of the video that is done and the number of frames.
Progress = Callable[[float, float], None]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings that decide which records a video gives.

  Attributes:
    segment_frames: longest segment; at least 2 x `schema.CLIP_SPAN`, so that
      each segment of a long track holds a clip.
    limits: what a video may cost.
    has_sound: whether records hold the sound.
    fps: frames per second that every video is brought to; 0 leaves them as
      they are.
    parser: parser that labels the faces.
    record_labels: number of values of each label that records hold too; only
      in data sets of earlier versions.
    faces: ALL, or MAIN for the track with the largest side x length. Where the
      source says where its person is, MAIN keeps all tracks of that person.
    require_sandbox: refuse to decode where the decoder's sandbox is not whole.
    on_damage: `KEEP` what comes before damage, or `QUARANTINE` the video.
    frame_size: height and width of the stored frames, of `schema.STORED_SIZES`.
  """

  segment_frames: int = 64
  limits: decode.Limits = decode.DEFAULT_LIMITS
  has_sound: bool = False
  fps: float = 0.0
  parser: parsers.ParserChoice = parsers.DEFAULT
  record_labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
  faces: str = ALL
  require_sandbox: bool = False
  on_damage: str = QUARANTINE
  frame_size: int = schema.FRAME_SIZE

  def __post_init__(self) -> None:
    if self.segment_frames < 2 * schema.CLIP_SPAN:
      raise ValueError(
        f"segment_frames is {self.segment_frames}, expected at least "
        f"{2 * schema.CLIP_SPAN}: no segment of a longer track is then shorter "
        f"than a clip's span of {schema.CLIP_SPAN} frames"
      )

  def strictness(self) -> dict[str, float | str]:
    """Returns the settings that decide whether a video is quarantined.

    `on_damage` is among them where it is not the default, so that ledgers from
    before it still hold.
    """
    strictness = dataclasses.asdict(self.limits)
    if self.on_damage != QUARANTINE:
      strictness["on_damage"] = self.on_damage
    return strictness


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of processing one video.

  Attributes:
    status: KEPT, NO_FACE, QUARANTINED, or FAILED where not the video is to
      blame but the machine: such as a disk that is full, or a killed process.
    reason: why it was not kept, else ''.
    num_decoded_frames: frames of the video, as decoded.
    num_tracks: face tracks that were kept.
    num_records: records that were emitted.
    num_frames: face crops in these records.
    quality: a row for each record, see `quality_index.row_of`.
    segments: [track_id, number of frames, median side of the crop in pixels]
      of each record.
    notes: what a user should know of the video, e.g. that it is interlaced.
  """

  status: str
  reason: str = ""
  num_decoded_frames: int = 0
  num_tracks: int = 0
  num_records: int = 0
  num_frames: int = 0
  quality: list[list[float]] = dataclasses.field(default_factory=list)
  segments: list[list[float]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)


class Models:
  """Face finder and parser; a context manager that serves many videos.

  Args:
    choice: the parser.

  Raises:
    UserError: a model file or a system library is missing; no video can be
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
  video, and all of its frames where they fit into `KEPT_BYTES`; a larger video
  is decoded twice.

  Args:
    source: the video.
    settings: see `Settings`.
    models: opened once per worker.
    emit: takes one encoded record after the other, in the same order whenever
      the video is processed. They count only if the video is kept: a video can
      turn out to be damaged late.
    progress: called at most every `REPORT_SECS` seconds.

  Raises:
    decode.DecoderSetupError: no video can be decoded on this machine.
    Exception: raised by `emit`. Any other error is the fault of the video or of
      this machine, and becomes the reason of the outcome.
  """
  cutter = _RecordCutter(source, settings, models, progress)
  records = cutter.records()
  while True:
    try:
      data = next(records, None)
    except decode.DecoderSetupError:
      raise
    except decode.DecodeError as e:
      is_hosts = isinstance(e, decode.HostError)
      return Outcome(FAILED if is_hosts else QUARANTINED, str(e))
    except (OSError, MemoryError) as e:
      return Outcome(FAILED, f"{type(e).__name__}: {e}")
    except Exception as e:  # one bad video must not end a run of thousands
      return Outcome(QUARANTINED, f"unexpected error: {type(e).__name__}: {e}")
    if data is None:
      break
    emit(data)
  video = cutter.video
  if not video.tracks:
    return Outcome(
      NO_FACE,
      NO_PERSON_REASON if video.num_others else NO_FACE_REASON,
      num_decoded_frames=video.num_decoded_frames,
      notes=video.notes,
    )
  return Outcome(
    KEPT,
    num_decoded_frames=video.num_decoded_frames,
    num_tracks=len(video.tracks),
    num_records=len(cutter.quality),
    num_frames=sum(map(len, video.tracks)),
    quality=cutter.quality,
    segments=cutter.segments,
    notes=video.notes,
  )


def segment_lengths(num_frames: int, segment_frames: int) -> list[int]:
  """Cuts a track into nearly equal parts of at most `segment_frames` frames.

  Equal parts leave no stub that is shorter than a clip: 120 frames at 64 are
  60 + 60, not 64 + 56; 65 are 33 + 32, not 64 + 1.
  """
  num_segments = math.ceil(num_frames / segment_frames)
  shorter, num_longer = divmod(num_frames, num_segments)
  return [shorter + (i < num_longer) for i in range(num_segments)]


def _version(path: Path) -> tuple[int, int] | None:
  """Returns size and time of a file, which tell it from a replacement."""
  with contextlib.suppress(OSError):
    status = path.stat()
    return status.st_size, status.st_mtime_ns
  return None


def _both_passes(progress: Progress) -> Callable[[float, int], None]:
  """Returns a function that reports progress, at most every `REPORT_SECS`.

  It is called with the share of the first pass that is done, or 1 plus that of
  the second, and with the number of frames in these passes. It holds no
  reference to the video, whose frames are thus freed with it.
  """
  reported_at = time.monotonic()

  def report(num_passes: float, num_frames: int) -> None:
    nonlocal reported_at
    now = time.monotonic()
    if now - reported_at > REPORT_SECS:
      reported_at = now
      progress(num_passes / 2, num_frames / 2)

  return report


class _RecordCutter:
  """Cuts the records of one video.

  Attributes:
    video: the video and its tracks, once the first record was asked for.
    quality: a row for each record so far, see `quality_index.row_of`.
    segments: as in `Outcome`, of each record so far.
  """

  video: TrackedVideo

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
    self._report = _both_passes(progress)
    self.quality: list[list[float]] = []
    self.segments: list[list[float]] = []

  def records(self) -> Iterator[bytes]:
    """Yields each encoded record once its last frame was read."""
    source, settings = self._source, self._settings
    version = _version(source.path)
    sound = _Sound(source, settings) if settings.has_sound else None
    self.video = TrackedVideo(
      VideoFrames(
        source.path,
        0.0 if is_picture(source.path) else settings.fps,
        settings.limits,
        source.frame_rate,
        self._part(),
        require_sandbox=settings.require_sandbox,
        may_change_size=True,
        keep_damaged=settings.on_damage == KEEP,
        stop_secs=math.inf if sound is None else sound.good_secs,
      ),
      self._models.finder,
      keep_bytes=KEPT_BYTES,
      max_track_secs=tracking.MAX_TRACK_SECS,
      progress=self._report,
      finding_share=1.0,
    )
    if sound is not None and sound.good_secs < source.part.end_secs:
      self.video.notes.extend(sound.notes)
    if self.video.tracks:
      self._keep_main_face()
      yield from self._cut(sound)
    if _version(source.path) != version:
      raise decode.HostError("the file was changed while it was read")

  def _part(self) -> Part:
    part = self._source.part
    if self._settings.faces == ALL:
      # Everybody in the video, not only the person that the part names.
      part = dataclasses.replace(part, face_at=())
    return part

  def _keep_main_face(self) -> None:
    video = self.video
    num_tracks = len(video.tracks)
    if self._settings.faces == MAIN and not self._source.part.face_at:
      video.tracks = main_face.numbered(main_face.largest(video.tracks))
    if len(video.tracks) < num_tracks + video.num_others:
      video.notes.append(OTHERS_NOTE)

  def _cut(self, sound: _Sound | None) -> Iterator[bytes]:
    source, video = self._source, self.video
    pending = [
      segment for track in video.tracks for segment in self._segments_of(track)
    ]
    pending.sort(key=lambda segment: segment.first_frame)
    active: list[_Segment] = []
    for i, (frame, secs) in enumerate(video.frames()):
      while pending and pending[0].first_frame == i:
        active.append(pending.pop(0))
      for segment in active:
        segment.add(frame, i, secs)
      for segment in [s for s in active if s.is_full]:
        active.remove(segment)
        record = segment.record(source, video.fps, video.offset)
        if sound is not None:
          record = sound.added_to(record, segment.last_secs)
        self.quality.append(quality_index.row_of(record))
        side = schema.median_side(record)
        self.segments.append([record.track_id, len(record), side])
        yield schema.encode(record)
      num_done = i + 1
      self._report(1 + num_done / video.num_frames, video.num_frames + num_done)

  def _segments_of(self, track: tracking.Track) -> Iterator[_Segment]:
    start = 0
    lengths = segment_lengths(len(track), self._settings.segment_frames)
    for number, length in enumerate(lengths):
      yield _Segment(
        track,
        number,
        start,
        length,
        self._models.parser,
        self._settings.record_labels,
        self._settings.frame_size,
      )
      start += length


class _Segment:
  """Part of a track, which collects its frames one by one."""

  def __init__(
    self,
    track: tracking.Track,
    number: int,
    start: int,
    length: int,
    parser: parsers.Parser,
    record_labels: Mapping[str, int],
    frame_size: int,
  ) -> None:
    self._frame_size = frame_size
    self._track = track
    self._number = number
    self._labeller = track_labels.Labeller(parser, length)
    self._record_labels = record_labels
    self._rows = slice(start, start + length)
    self._length = length
    self._jpegs: list[bytes] = []
    self.first_frame = track.first_frame + start
    self.start_secs = self.last_secs = 0.0

  @property
  def is_full(self) -> bool:
    return len(self._jpegs) == self._length

  def add(self, frame: np.ndarray, i: int, secs: float) -> None:
    """Crops and parses frame number i of the video, shown at `secs`."""
    import cv2
    import simplejpeg

    if not self._jpegs:
      self.start_secs = secs
    self.last_secs = secs

    row = i - self._track.first_frame
    box, landmarks = self._track.boxes[row], self._track.meshes[row]
    crop = boxes.crop_frame(frame, box)
    if self._frame_size < schema.FRAME_SIZE:
      size = (self._frame_size, self._frame_size)
      crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    self._jpegs.append(
      simplejpeg.encode_jpeg(
        np.ascontiguousarray(crop),
        quality=JPEG_QUALITY,
        colorspace="RGB",
        colorsubsampling="420",
      )
    )
    self._labeller.add(frame, box, landmarks)

  def record(
    self, source: Source, fps: float, offset: tuple[int, int]
  ) -> schema.Record:
    """Returns the segment as a record, without sound.

    Args:
      source: the video.
      fps: its frames per second.
      offset: x and y of its frames within those of the file.
    """
    parsed = self._labeller.finish()
    size = schema.FRAME_SIZE
    label_maps = np.zeros((len(parsed), size, size), np.uint8)
    for i, labels in enumerate(parsed):
      if labels is not None:
        label_maps[i] = labels
    bits = schema.region_bits(label_maps)
    # No bit at all, not even background, marks a frame without a parsed face.
    bits[[labels is None for labels in parsed]] = 0
    return schema.Record(
      frames=self._jpegs,
      regions=bits,
      parsing=schema.compress_parsing(label_maps),
      boxes=self._track.boxes[self._rows] + np.float32([*offset, *offset]),
      video_id=source.video_id,
      track_id=self._track.track_id,
      segment=self._number,
      subject_id=source.subject_id,
      fps=fps,
      start_secs=self.start_secs,
      quality=self._track.quality,
      quality_terms=self._track.quality_terms,
      labels={
        name: np.array(
          source.labels.get(name, length * (math.nan,)), np.float32
        )
        for name, length in self._record_labels.items()
      },
    )


class _Sound:
  """Sound of a video, cut into segments.

  Attributes:
    good_secs: time at which it is damaged; inf where it is not.
    notes: what a user should know of it.
  """

  def __init__(self, source: Source, settings: Settings) -> None:
    self.notes: list[str] = []
    self._samples = np.zeros(0, np.int16)
    if not (source.frame_rate or is_picture(source.path)):
      keeps = settings.on_damage == KEEP
      self._samples = decode.read_sound(
        source.path,
        settings.limits,
        settings.require_sandbox,
        source.part.end_secs,
        self.notes.append if keeps else None,
      )
    self.good_secs = math.inf
    if self.notes:
      self.good_secs = len(self._samples) / schema.SAMPLE_RATE
      self.notes = [f"cut before damage: {note}" for note in self.notes]
    # Computed from the whole sound: at a cut, it needs samples beyond the cut.
    self._mel = mel_spectrogram.mel_spectrogram(self._samples)

  def added_to(self, record: schema.Record, last_secs: float) -> schema.Record:
    """Returns the record with its sound, silence where the sound has ended.

    Args:
      record: the segment, without sound.
      last_secs: time of its last frame.

    Raises:
      decode.DecodeError: the times of the frames leap, or go backwards.
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
  """Returns the rows of a span of seconds, padded with silence at its end."""
  start, stop = (max(round(secs * rate), 0) for secs in span)
  rows = values[start:stop]
  num_missing = stop - start - len(rows)
  padding = np.full((num_missing, *values.shape[1:]), silence, values.dtype)
  return np.concatenate([rows, padding])
