"""A video file in, windows of frames out, ready for the encoder.

Decoder, face tracker and parser are those of data_prep; they load when the
first video is read.

  for window in read_windows("clip.mp4", WindowSettings(crop_face=True)):
    window.frames                  # uint8 (T, S, S, 3)

`read_ahead` does the same in a thread, while the caller computes; video_folder
reads many videos in processes of their own.

Axes: T frames of a window, S pixels of the model's square picture, H W pixels
of the video, N patches.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  from data_prep.faces import tracking
  from data_prep.video import video_to_records

WINDOW_RULES = ("cover", "authors")

# Of the time that a video with a face takes, finding the face takes about so
# much; the rest is the second decoding and the cropping.
_FINDING_SHARE = 0.9

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


@dataclasses.dataclass(frozen=True)
class Window:
  """Some frames of a video, as the encoder takes them.

  Attributes:
    frames: uint8 (T, S, S, 3), RGB.
    first_frame: number of its first frame in the video, from 0.
    num_frames: frames of the video that it stands for, 32 by default, of which
      `frames` shows every second one; fewer where the video is shorter, and the
      last one is then repeated in `frames`.
    start_secs: time of the first of them in the video.
    end_secs: time of the last of them.
    regions: uint16 (T/2, 14, 14) where asked for, else None: bit k is set where
      LaPa class k touches the patch in the first frame of the tubelet; 0 where
      no face was parsed.
  """

  frames: np.ndarray
  first_frame: int
  num_frames: int
  start_secs: float
  end_secs: float
  regions: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class WindowSettings:
  """Which windows are taken of a video.

  Attributes:
    clip: frames of a window, and the distance between them.
    hop: frames from one window to the next; None is side by side.
    image_size: S.
    crop_face: follow the face and cut it out, as data_prep does; else the whole
      frame is shown, with black bars where it is no square.
    window_rule: 'cover', the rule of `Clip.window_starts`. For comparison only,
      'authors': MARLIN's own, which leaves out the end of a video and the last
      window where it just fits, and takes consecutive frames where the video
      is no longer than one window.
    regions: parse the face too, which is slow.
    tubelet_size: frames per parsed one.
  """

  clip: Clip = Clip()
  hop: int | None = None
  image_size: int = 224
  crop_face: bool = False
  window_rule: str = "cover"
  regions: bool = False
  tubelet_size: int = 2

  def __post_init__(self) -> None:
    if self.window_rule not in WINDOW_RULES:
      raise ValueError(
        f"window_rule is {self.window_rule!r}, expected one of "
        f"{', '.join(WINDOW_RULES)}"
      )
    if self.regions and self.image_size != 224:
      raise ValueError(
        f"regions are known for pictures of 224 pixels, and image_size is "
        f"{self.image_size}"
      )
    if self.clip.num_frames < 1 or self.clip.stride < 1 or self.step < 1:
      raise ValueError(
        f"{self.clip} with a hop of {self.hop} frames: all must be at least 1"
      )
    self.starts(1)

  @property
  def step(self) -> int:
    """Frames from one window to the next."""
    return self.clip.extent if self.hop is None else self.hop

  @property
  def lookahead(self) -> int:
    """Frames behind a window that must be there before it counts as one."""
    return 0 if self.window_rule == "cover" else 1

  def starts(self, total: int) -> np.ndarray:
    """Returns int (W,), where windows start in a video of `total` frames.

    Raises:
      ValueError: the windows would not cover the video.
    """
    if self.window_rule == "cover":
      return self.clip.window_starts(total, self.step)
    if total <= self.clip.extent:
      return np.zeros(1, int)
    return np.arange(0, total - self.clip.extent, self.step)

  def indices(self, start: int, total: int) -> np.ndarray:
    """Returns int (T,), the frames that a window shows."""
    return self._shown(total).indices(start, total)

  def num_covered(self, total: int) -> int:
    """Returns for how many frames a window stands."""
    return min(self._shown(total).extent, total)

  def _shown(self, total: int) -> Clip:
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
  """Reads a video window by window, keeping the frames of one in memory.

  With `crop_face` the video is decoded twice: first every face is followed,
  then the main one is cut out along its smoothed path, frame by frame, and the
  windows cover the frames in which it was followed. The main face is the one
  that is there for the most frames; of several, the largest.

  Args:
    path: a video file, in anything that FFmpeg decodes; turned as its rotation
      flag says. Its frames are counted by decoding them.
    settings: which windows; the defaults where None.
    models: face models that are open already; else they are opened where
      needed.
    progress: see `Progress`.

  Yields:
    At least one window, by first frame.

  Raises:
    FaceVideoError: the video is damaged, or over a limit of
      `data_prep.video.decode.Limits`; possibly after some windows.
    NoFaceError: a face was to be cropped, and there is none.
    RuntimeError: this machine lacks a model file or a library; not the video's
      fault.
  """
  from data_prep.video import decode

  settings = settings or WindowSettings()
  needs_models = settings.crop_face or settings.regions
  try:
    with contextlib.ExitStack() as stack:
      if needs_models and models is None:
        from data_prep.video import video_to_records

        models = stack.enter_context(video_to_records.Models())
      yield from _Reading(path, settings, models, progress).windows()
  except decode.DecodeError as e:
    raise FaceVideoError(path, str(e)) from e


class _Frame:
  """A frame as the encoder sees it.

  Attributes:
    picture: uint8 (S, S, 3).
    secs: its time.
    regions: uint16 (14, 14), where known already.
  """

  def __init__(
    self, picture: np.ndarray, secs: float, regions: np.ndarray | None = None
  ) -> None:
    self.picture = picture
    self.secs = secs
    self.regions = regions


class _Reading:
  """One video on its way."""

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
    if not self._settings.crop_face:
      yield from self._cut(self._whole_frames(), 0)
      return
    track = self._main_track()
    yield from self._cut(self._cropped_frames(track), track.first_frame)

  def _cut(self, frames: Iterable[_Frame], offset: int) -> Iterator[Window]:
    """Yields windows as their last frames come by; the total may be unknown."""
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
    """Makes the window at `start`; `kept` are the last of `total` frames."""
    settings = self._settings
    num_gone = total - len(kept)
    num_frames = settings.num_covered(total)
    shown = [kept[i - num_gone] for i in settings.indices(start, total)]
    regions = None
    if settings.regions:
      first = shown[:: settings.tubelet_size]
      regions = np.stack([self._regions_of(frame) for frame in first])
    return Window(
      frames=np.stack([frame.picture for frame in shown]),
      first_frame=offset + start,
      num_frames=num_frames,
      start_secs=kept[start - num_gone].secs,
      end_secs=kept[start + num_frames - 1 - num_gone].secs,
      regions=regions,
    )

  # --- Whole frames -----------------------------------------------------------

  def _whole_frames(self) -> Iterator[_Frame]:
    from data_prep.video import decode

    size = self._settings.image_size
    with decode.open_video(self._path) as video:
      for frame, secs in video:
        yield _Frame(fit_square(frame, size), secs)
        self._progress(_share(video.num_frames, video.info.announced_frames))

  def _regions_of(self, frame: _Frame) -> np.ndarray:
    """Parses the surest face of a picture that is a face crop already."""
    if frame.regions is None:
      picture, finder = frame.picture, self._models.finder
      size = self._settings.image_size
      landmarks = None
      for detection in finder.detect(picture)[:1]:
        landmarks = finder.mesh(picture, detection.box)
      box = np.float32([0, 0, size, size])
      frame.regions = self._parse(picture, box, landmarks)
    return frame.regions

  # --- A face -----------------------------------------------------------------

  def _main_track(self) -> tracking.Track:
    from data_prep.faces import tracking
    from data_prep.video import decode, video_to_records

    with decode.open_video(self._path) as video:

      def frames() -> Iterator[np.ndarray]:
        for frame, _ in video:
          yield frame
          share = _share(video.num_frames, video.info.announced_frames)
          self._progress(_FINDING_SHARE * share)

      tracks = tracking.find_tracks(
        frames(), self._models.finder, video.info.rate, min_frames=1
      )
      num_frames = video.num_frames
    # What is too short to be prepared for training is too short here.
    min_frames = min(video_to_records.MIN_TRACK_FRAMES, num_frames)
    tracks = [track for track in tracks if len(track) >= min_frames]
    if not tracks:
      raise NoFaceError(self._path)
    return max(tracks, key=lambda track: (len(track), track.side))

  def _cropped_frames(self, track: tracking.Track) -> Iterator[_Frame]:
    from data_prep.faces import boxes
    from data_prep.video import decode

    size = self._settings.image_size
    to_parse = self._rows_to_parse(len(track))
    stop = track.first_frame + len(track)
    with decode.open_video(self._path) as video:
      for i, (frame, secs) in enumerate(video):
        share = (i + 1) / stop
        self._progress(_FINDING_SHARE + (1 - _FINDING_SHARE) * share)
        row = i - track.first_frame
        if row < 0:
          continue
        box = track.boxes[row]
        regions = None
        if row in to_parse:
          regions = self._parse(frame, box, track.landmarks[row])
        picture = fit_square(boxes.crop_frame(frame, box), size)
        yield _Frame(picture, secs, regions)
        if i + 1 == stop:
          return
      raise decode.DecodeError(
        f"at least {stop} frames in the first pass, {video.num_frames} in the "
        "second: was the file changed meanwhile?"
      )

  def _rows_to_parse(self, total: int) -> set[int]:
    """Returns the first frames of all tubelets of all windows.

    They are parsed as they come by: the parser looks at the source frame, and a
    window of those would fill the memory.
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
  ) -> np.ndarray:
    """Returns region bits, uint16 (14, 14), 0 where no face was parsed."""
    from marlin_jax.records import schema

    labels = self._models.parser.parse(frame, box, landmarks)
    if labels is None:
      # Not even background: the trainer's rule for frames without a face.
      return np.zeros((schema.GRID_SIZE, schema.GRID_SIZE), np.uint16)
    return schema.region_bits(labels[None])[0]


def fit_square(frame: np.ndarray, size: int) -> np.ndarray:
  """Scales a picture into a square, with black bars where it is none.

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
  new = max(round(width * scale), 1), max(round(height * scale), 1)
  how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  scaled = cv2.resize(frame, new, interpolation=how)
  x, y = (size - new[0]) // 2, (size - new[1]) // 2
  out = np.zeros((size, size, 3), np.uint8)
  out[y : y + new[1], x : x + new[0]] = scaled
  return out


def _share(num_read: int, num_announced: int) -> float:
  """Returns the share that is read, 0 where the container announces nothing."""
  return num_read / max(num_read, num_announced) if num_announced else 0.0


# --- In a thread --------------------------------------------------------------


class _Stopped(Exception):
  """Whoever reads the windows has stopped."""


def read_ahead(
  path: str | os.PathLike,
  settings: WindowSettings | None = None,
  num_ahead: int = 2,
) -> Iterator[Window]:
  """As `read_windows`, in a thread that stays some windows ahead.

  The thread starts with the first window asked for and ends with the iterator,
  however that ends; its errors come out of the iterator.
  """
  stop = threading.Event()
  ready: queue.Queue[Window | BaseException | None] = queue.Queue(num_ahead)

  def hand_over(item: Window | BaseException | None) -> None:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        ready.put(item, timeout=0.1)
        return
    raise _Stopped

  def check(_: float) -> None:
    if stop.is_set():
      raise _Stopped

  def read() -> None:
    with contextlib.suppress(_Stopped):
      try:
        # The decoder dies with the thread that opened it: all of it is here.
        with contextlib.closing(
          read_windows(path, settings, progress=check)
        ) as windows:
          for window in windows:
            hand_over(window)
        hand_over(None)
      except Exception as e:
        hand_over(e)

  thread = threading.Thread(target=read, name="read_ahead", daemon=True)
  thread.start()
  try:
    while (item := ready.get()) is not None:
      if isinstance(item, BaseException):
        raise item
      yield item
  finally:
    stop.set()
    thread.join()
