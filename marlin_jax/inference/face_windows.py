"""Reads windows of frames from video files, as the encoder takes them.

Decoder, face tracker and parser are those of data_prep; they load when the
first video is read.

  for window in read_windows("clip.mp4", WindowSettings(crop_face=True)):
    window.frames                  # uint8 (T, S, S, 3)

`read_ahead` does the same in a thread, while the caller computes;
`video_folder` reads many videos in worker processes.

Axes: T frames of a window, S pixels of the model's square picture, H W pixels
of the video, N patches, h w patches of a picture, M R rows of a mel
spectrogram.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.records import extras, mel_spectrogram, schema
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  from data_prep.faces import tracking
  from data_prep.video import tracked, video_to_records

WINDOW_RULES = ("cover", "authors")

# Frame rate of a single frame, and of frames without times, as in data_prep.
DEFAULT_FPS = 25.0

# Called with the share of the video that has been read, once per frame.
Progress = Callable[[float], None]


class FaceVideoError(UserError):
  """A video gives no windows; the message names it and says why.

  Attributes:
    path: the video.
    reason: why, without the path.
  """

  def __init__(self, path: str | os.PathLike, reason: str) -> None:
    super().__init__(f"{os.fspath(path)}: {reason}")
    self.path = path
    self.reason = reason


class NoFaceError(FaceVideoError):
  """A face was to be cropped, and the video shows none."""

  def __init__(self, path: str | os.PathLike) -> None:
    super().__init__(
      path,
      "no face found; if it shows face crops already, read it as it is: "
      "crop_face=False, or no --crop_face",
    )


@contextlib.contextmanager
def video_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns errors of the decoder into FaceVideoErrors that name the video.

  Raises:
    MissingLibraryError: the libraries that read videos are not installed.
  """
  extras.require("features", "reading videos")
  from data_prep.video import decode

  try:
    yield
  except decode.DecodeError as e:
    raise FaceVideoError(path, str(e)) from e


@dataclasses.dataclass(frozen=True)
class Window:
  """Frames of a video, as the encoder takes them.

  Attributes:
    frames: uint8 (T, S, S, 3), RGB.
    first_frame: number of its first frame in the video, from 0.
    num_frames: frames of the video that it stands for, 32 by default, of which
      `frames` shows every second one; fewer where the video is shorter, and the
      last one is then repeated in `frames`.
    start_secs: time of the first of them in the video.
    end_secs: time of the last of them.
    box: float32 (4,), the square shown as x0, y0, x1, y1 in pixels of the
      video, median over the frames; it exceeds them where they are padded.
    regions: uint16 (T/2, h, w) where `WindowSettings.regions` is set, else
      None: bit k is set where LaPa class k touches the patch in the first frame
      of the tubelet; 0 where no face was parsed.
    labels: uint8 (T/2, H, W) where `regions` are: LaPa codes of the pixels of
      those frames, H = W = 224; all background where no face was parsed.
    mel: float32 (R, 80) where `WindowSettings.sound` is set, else None: the
      sound of the frames, see SoundPatches.window.
  """

  frames: np.ndarray
  first_frame: int
  num_frames: int
  start_secs: float
  end_secs: float
  box: np.ndarray
  regions: np.ndarray | None = None
  labels: np.ndarray | None = None
  mel: np.ndarray | None = None

  @property
  def clip(self) -> np.ndarray | dict[str, np.ndarray]:
    """The frames; with sound {"video": frames, "mel": mel}."""
    if self.mel is None:
      return self.frames
    return {"video": self.frames, "mel": self.mel}


@dataclasses.dataclass(frozen=True)
class WindowSettings:
  """Settings that decide which windows a video gives.

  Attributes:
    clip: frames of a window, and the distance between them.
    hop: frames from one window to the next; None places windows side by side.
    image_size: S.
    crop_face: track the face and crop it, as data_prep does; else the whole
      frame is shown, with black bars if it is not square.
    window_rule: 'cover', the rule of `Clip.window_starts`. For comparison only,
      'authors': the rule of MARLIN's code, which leaves out the end of a video
      and the last window where it just fits, and takes consecutive frames where
      the video is no longer than one window.
    regions: parse the face too, which is slow.
    tubelet_size: frames per tubelet; the first of them is parsed.
    patch_size: pixels of a patch, for the regions.
    stop_secs: time in the video at which reading ends.
    sound: rows of the windows' sound; None: it is not read.

  Raises:
    ValueError: the settings contradict each other, or windows would not cover
      the video.
  """

  clip: Clip = Clip()
  hop: int | None = None
  image_size: int = 224
  crop_face: bool = False
  window_rule: str = "cover"
  regions: bool = False
  tubelet_size: int = 2
  patch_size: int = schema.PATCH_SIZE
  stop_secs: float = math.inf
  sound: SoundPatches | None = None

  def __post_init__(self) -> None:
    if self.window_rule not in WINDOW_RULES:
      raise ValueError(
        f"window_rule is {self.window_rule!r}, expected one of "
        f"{', '.join(WINDOW_RULES)}"
      )
    if self.regions and self.image_size > schema.FRAME_SIZE:
      raise ValueError(
        f"regions need pictures of at most {schema.FRAME_SIZE} pixels, and "
        f"image_size is {self.image_size}"
      )
    if self.clip.num_frames < 1 or self.clip.stride < 1 or self.step < 1:
      raise ValueError(
        f"{self.clip} with a hop of {self.hop} frames: all must be at least 1"
      )
    self.starts(1)

  @property
  def grid_size(self) -> int:
    """Patches along a side of a picture."""
    return self.image_size // self.patch_size

  @property
  def step(self) -> int:
    """Frames from one window to the next."""
    return self.clip.extent if self.hop is None else self.hop

  @property
  def lookahead(self) -> int:
    """Frames after a window that must exist for it to count."""
    return 0 if self.window_rule == "cover" else 1

  def starts(self, total: int) -> np.ndarray:
    """Returns int (W,), the starts of windows in a video of `total` frames.

    Raises:
      ValueError: the windows would not cover the video.
    """
    if self.window_rule == "cover":
      return self.clip.window_starts(total, self.step)
    if total <= self.clip.extent:
      return np.zeros(1, int)
    return np.arange(0, total - self.clip.extent, self.step)

  def indices(self, start: int, total: int) -> np.ndarray:
    """Returns int (T,), numbers of the frames that a window shows."""
    return self._clip(total).indices(start, total)

  def extent(self, total: int) -> int:
    """Returns the number of frames that a window spans, if there are as many.

    A video of fewer frames is continued with its last one.
    """
    return self._clip(total).extent

  def num_covered(self, total: int) -> int:
    """Returns the number of frames that a window stands for."""
    return min(self.extent(total), total)

  def _clip(self, total: int) -> Clip:
    if self.window_rule == "authors" and total <= self.clip.extent:
      return dataclasses.replace(self.clip, stride=1)
    return self.clip


# --- One video ----------------------------------------------------------------


def read_windows(
  path: str | os.PathLike,
  settings: WindowSettings | None = None,
  models: video_to_records.Models | None = None,
  progress: Progress = lambda share: None,
) -> Iterator[Window]:
  """Reads a video window by window; memory holds the frames of one window.

  With `crop_face` the video is decoded twice: the first pass tracks all faces,
  the second crops the main one along its smoothed path, and the windows cover
  the frames of its track. The main face is the largest times the longest; see
  `data_prep.faces.main_face`.

  Args:
    path: a video file in any format that FFmpeg decodes; frames are turned as
      its rotation flag says, and counted by decoding them.
    settings: see `WindowSettings`; the defaults if None.
    models: open face models; if None, they are opened if needed.
    progress: see `Progress`.

  Yields:
    Windows in order of their first frames, at least one.

  Raises:
    FaceVideoError: the video is damaged, or over a limit of
      `data_prep.video.decode.Limits`; possibly after some windows. Or it has no
      sound track, and its sound was to be read.
    NoFaceError: a face was to be cropped, and there is none.
    UserError: this machine lacks a model file or a library.
  """
  settings = settings or WindowSettings()
  needs_models = settings.crop_face or settings.regions
  with contextlib.ExitStack() as stack:
    stack.enter_context(video_errors(path))
    if needs_models and models is None:
      from data_prep.video import video_to_records

      models = stack.enter_context(video_to_records.Models())
    yield from _WindowReader(path, settings, models, progress).windows()


@dataclasses.dataclass(slots=True)
class _Frame:
  """Frame of the windows.

  Attributes:
    picture: uint8 (S, S, 3), or at the size of records.
    secs: its time.
    box: float32 (4,), the square in the video; see `Window`.
    parsed: the face's region bits, uint16 (h, w), and LaPa codes, uint8
      (224, 224); None until it is parsed.
  """

  picture: np.ndarray
  secs: float
  box: np.ndarray
  parsed: tuple[np.ndarray, np.ndarray] | None = None


class _WindowReader:
  """Reads the windows of one video."""

  def __init__(
    self,
    path: str | os.PathLike,
    settings: WindowSettings,
    models: video_to_records.Models | None,
    progress: Progress,
  ) -> None:
    self._path = path
    self._settings = settings
    self._models = models
    self._progress = progress

  def windows(self) -> Iterator[Window]:
    self._mel = self._read_sound() if self._settings.sound else None
    if not self._settings.crop_face:
      yield from self._cut(self._whole_frames(), 0)
      return
    video, track = self._main_track()
    yield from self._cut(self._cropped_frames(video, track), track.first_frame)

  def _cut(self, frames: Iterable[_Frame], offset: int) -> Iterator[Window]:
    """Yields each window once its last frame was read."""
    settings = self._settings
    reach = settings.clip.extent + settings.lookahead
    kept: collections.deque[_Frame] = collections.deque(maxlen=reach)
    total = num_done = 0
    for frame in frames:
      kept.append(frame)
      total += 1
      start = num_done * settings.step
      if total == start + reach:
        yield self._window(kept, start, total, offset)
        num_done += 1
    for start in settings.starts(total)[num_done:]:
      yield self._window(kept, int(start), total, offset)

  def _window(
    self,
    kept: collections.deque[_Frame],
    start: int,
    total: int,
    offset: int,
  ) -> Window:
    """Returns the window at `start`; `kept` holds the last of `total` frames.

    Args:
      kept: frames still in memory.
      start: first frame of the window, counted from `offset`.
      total: number of frames read so far.
      offset: number in the video of the first frame read.
    """
    settings = self._settings
    num_dropped = total - len(kept)
    num_frames = settings.num_covered(total)
    shown = [kept[i - num_dropped] for i in settings.indices(start, total)]
    regions = labels = None
    if settings.regions:
      first = shown[:: settings.tubelet_size]
      parsed = [self._parsed(frame) for frame in first]
      regions, labels = map(np.stack, zip(*parsed, strict=True))
    start_secs = kept[start - num_dropped].secs
    end_secs = kept[start + num_frames - 1 - num_dropped].secs
    mel = None
    if self._mel is not None:
      per_frame = (end_secs - start_secs) / max(num_frames - 1, 1)
      secs = settings.extent(total) * (per_frame or 1 / DEFAULT_FPS)
      mel = settings.sound.window(
        self._mel,
        mel_spectrogram.MEL_RATE * start_secs,
        mel_spectrogram.MEL_RATE * secs,
      )
    return Window(
      frames=np.stack(
        [schema.resized(frame.picture, settings.image_size) for frame in shown]
      ),
      first_frame=offset + start,
      num_frames=num_frames,
      start_secs=start_secs,
      end_secs=end_secs,
      regions=regions,
      labels=labels,
      mel=mel,
      box=np.median([frame.box for frame in shown], axis=0),
    )

  def _read_sound(self) -> np.ndarray:
    """Returns the mel spectrogram of the video, float32 (M, 80)."""
    from data_prep.video import decode

    mel = mel_spectrogram.mel_spectrogram(decode.read_sound(self._path))
    if not len(mel):
      raise FaceVideoError(
        self._path, "it has no sound track, and features of sound are wanted"
      )
    return mel

  # --- Whole frames -----------------------------------------------------------

  def _whole_frames(self) -> Iterator[_Frame]:
    # Faces are parsed at the size of records.
    size = self._settings.image_size
    if self._settings.regions:
      size = schema.FRAME_SIZE
    with self._video_frames().open() as (video, frames):
      for frame, secs in frames:
        height, width = frame.shape[:2]
        half, x, y = max(height, width) / 2, width / 2, height / 2
        box = np.float32([x - half, y - half, x + half, y + half])
        yield _Frame(fit_square(frame, size), secs, box)
        self._progress(video.share)

  def _video_frames(self) -> tracked.VideoFrames:
    from data_prep.video import tracked

    return tracked.VideoFrames(
      self._path, may_change_size=True, stop_secs=self._settings.stop_secs
    )

  def _parsed(self, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Returns `_Frame.parsed`; parses the most certain face if needed.

    A cropped face is parsed already: this is a whole frame.
    """
    if frame.parsed is None:
      picture, finder = frame.picture, self._models.finder
      size = schema.FRAME_SIZE
      landmarks = None
      for detection in finder.detect(picture)[:1]:
        landmarks = finder.mesh(picture, detection.box)
      box = np.float32([0, 0, size, size])
      frame.parsed = self._parse(picture, box, landmarks)
    return frame.parsed

  # --- A face -----------------------------------------------------------------

  def _main_track(self) -> tuple[tracked.TrackedVideo, tracking.Track]:
    from data_prep.faces import main_face
    from data_prep.video import tracked

    video = tracked.TrackedVideo(
      self._video_frames(),
      self._models.finder,
      progress=lambda share, _: self._progress(share),
    )
    if not video.tracks:
      raise NoFaceError(self._path)
    return video, main_face.largest(video.tracks)[0]

  def _cropped_frames(
    self, video: tracked.TrackedVideo, track: tracking.Track
  ) -> Iterator[_Frame]:
    first = track.first_frame
    rows_to_parse = self._rows_to_parse(len(track))
    boxes = np.full((first + len(track), 4), np.nan, np.float32)
    boxes[first:] = track.boxes
    for i, (frame, secs, crop) in enumerate(video.crops(boxes)):
      if crop is None:
        continue
      parsed = None
      if i - first in rows_to_parse:
        parsed = self._parse(frame, boxes[i], track.meshes[i - first])
      size = max(self._settings.image_size, schema.FRAME_SIZE)
      yield _Frame(fit_square(crop, size), secs, boxes[i], parsed)

  def _rows_to_parse(self, total: int) -> set[int]:
    """Returns the first frames of all tubelets of all windows.

    They are parsed as they are read: the parser needs the source frame, and a
    whole window of source frames would fill the memory.
    """
    settings = self._settings
    if not settings.regions:
      return set()
    return {
      int(row)
      for start in settings.starts(total)
      for row in settings.indices(start, total)[:: settings.tubelet_size]
    }

  def _parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns `_Frame.parsed`."""
    size = self._settings.grid_size
    labels = self._models.parser.parse(frame, box, landmarks)
    if labels is None:
      # No bit at all, not even background, marks a frame without a parsed face.
      return (
        np.zeros((size, size), np.uint16),
        np.zeros((schema.FRAME_SIZE, schema.FRAME_SIZE), np.uint8),
      )
    return schema.region_bits(labels[None], size)[0], labels


def fit_square(frame: np.ndarray, size: int) -> np.ndarray:
  """Scales a picture into a square, with black bars if it is not square.

  Args:
    frame: uint8 (H, W, 3).
    size: S.

  Returns:
    uint8 (S, S, 3); a frame of that size is returned as it is.
  """
  import cv2

  height, width = frame.shape[:2]
  if height == width == size:
    return frame
  scale = size / max(height, width)
  new_size = max(round(width * scale), 1), max(round(height * scale), 1)
  interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  scaled = cv2.resize(frame, new_size, interpolation=interpolation)
  x, y = (size - new_size[0]) // 2, (size - new_size[1]) // 2
  out = np.zeros((size, size, 3), np.uint8)
  out[y : y + new_size[1], x : x + new_size[0]] = scaled
  return out


def letterboxed(window: Window) -> bool:
  """Returns whether a window of whole frames has black bars."""
  return bool(window.box[:2].min() < 0)


# --- In a thread --------------------------------------------------------------


def read_ahead(
  path: str | os.PathLike,
  settings: WindowSettings | None = None,
  num_ahead: int = 3,
) -> Iterator[Window]:
  """Reads as `read_windows`, in a thread that stays some windows ahead.

  The thread starts with the first window that is taken and ends with the
  iterator. The iterator raises the errors of the thread.

  Args:
    path: see `read_windows`.
    settings: see `read_windows`.
    num_ahead: windows that are read before they are taken.
  """
  stopped = threading.Event()

  def check(_: float) -> None:
    if stopped.is_set():
      raise futures.CancelledError

  windows = read_windows(path, settings, progress=check)
  # One thread for all windows: a decoder ends with the thread that started it.
  with futures.ThreadPoolExecutor(1, "read_ahead") as thread:
    try:
      ahead = collections.deque(
        thread.submit(next, windows, None) for _ in range(num_ahead)
      )
      while (window := ahead.popleft().result()) is not None:
        ahead.append(thread.submit(next, windows, None))
        yield window
    finally:
      stopped.set()
      thread.submit(windows.close)
