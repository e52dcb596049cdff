"""Lists folders of videos, reads their windows in processes and encodes them.

Axes: B clips.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from marlin_jax.inference import stream
from marlin_jax.inference.face_windows import (
  FaceVideoError,
  Window,
  WindowSettings,
  letterboxed,
  read_windows,
)
from marlin_jax.records import extras
from marlin_jax.records.cli import UserError
from marlin_jax.records.folders import sha256_of

if TYPE_CHECKING:
  import jax

  from data_prep.engines.progress import TaskBar

# A worker process is replaced after this many videos, as in data_prep.prepare.
_VIDEOS_PER_WORKER = 50
# Seconds after which a silent worker counts as hung. A decoder may keep its
# reader waiting for less: `data_prep.video.decode.Limits.secs`.
_STALL_SECS = 600.0
_NOT_FINITE = (
  "the network's results are not finite: it is damaged or has diverged, or "
  "needs --dtype=float32"
)
# Seconds between two reports of progress.
_REPORT_SECS = 0.25


class InputError(UserError):
  """The inputs name no videos, or some that must not be read."""


class ReaderError(UserError):
  """No video can be read on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of reading one video.

  Attributes:
    reason: why it has no windows; '' if it was read to its end. Windows yielded
      before an outcome with a reason are void.
    sha256: hash of the file; '' if it cannot be read, or another try may
      succeed.
    num_bytes: size of the file.
  """

  reason: str
  sha256: str
  num_bytes: int


class Video(NamedTuple):
  """A video file.

  Attributes:
    name: path relative to its input, with forward slashes.
    path: path of the file.
    num_bytes: size of the file.
  """

  name: str
  path: Path
  num_bytes: int


def list_videos(inputs: Iterable[str | os.PathLike]) -> list[Video]:
  """Lists videos by name.

  Args:
    inputs: each a folder, a video file or a manifest, see
      `data_prep.sources.manifest.read_sources`.

  Raises:
    InputError: there is no video, a file must not be read, or two videos have
      one name.
  """
  from data_prep import assets
  from data_prep.sources import manifest

  videos: dict[str, Video] = {}
  for input_path in inputs:
    try:
      sources = manifest.read_sources(input_path)
    except (manifest.ManifestError, assets.AssetError) as e:
      raise InputError(str(e)) from e
    for source in sources:
      name, path = source.video_id, source.path
      if source.part.fragment:
        raise InputError(
          f"{input_path} names parts of videos, such as {name!r}, which only "
          "data_prep.prepare reads; give its data set instead"
        )
      video = Video(name, path, path.stat().st_size)
      other = videos.setdefault(name, video)
      if not other.path.samefile(path):
        raise InputError(
          f"{other.path} and {path} are both {name!r} relative to their "
          "inputs, so that their results would have one name; give the folder "
          "above them, or start two runs with an output each"
        )
  return [videos[name] for name in sorted(videos)]


def progress_bar(videos: Sequence[Video]) -> TaskBar:
  """Returns a progress bar of these videos, weighted by their sizes."""
  from data_prep.engines import progress

  return progress.TaskBar([max(video.num_bytes, 1) for video in videos])


def _read_many(
  paths: list[Path], settings: WindowSettings, num_workers: int
) -> Iterator[tuple[int, Window | float | Outcome]]:
  """Reads videos in worker processes; see `encode_many`.

  Yields:
    The number of a video, with the share of it that has been read, its next
    window, or, last, its outcome.
  """
  extras.require("features", "reading videos")
  from data_prep.engines import workers

  with contextlib.closing(
    workers.run_tasks(
      paths,
      _open_work,
      settings,
      num_workers=num_workers,
      tasks_per_worker=_VIDEOS_PER_WORKER,
      stall_secs=_STALL_SECS,
    )
  ) as events:
    try:
      for event in events:
        if event.is_crash:
          yield event.task, _outcome(paths[event.task], event.value)
        elif event.kind == "died":
          yield event.task, _failed(event.value)
        else:
          yield event.task, event.value
    except workers.WorkerError as e:
      raise ReaderError(str(e)) from e


class CropCheck:
  """Checks that whole frames look like face crops; a context manager.

  In the crops that the encoder knows, the detector's box takes about 0.7 of the
  side: 0.67 to 0.82 in 42 tracks of real clips.
  """

  # Smallest share in a crop. Pictures of head and shoulders have 0.5 to 0.6.
  _MIN_SHARE = 0.4
  # Smallest picture for the detectors.
  _MIN_SIZE = 100

  def __init__(self) -> None:
    self._stack = contextlib.ExitStack()
    self._finder = None

  def __enter__(self) -> Self:
    from data_prep.faces import face_finder

    # Without the models, black bars are still noticed.
    with contextlib.suppress(UserError):
      self._finder = self._stack.enter_context(face_finder.FaceFinder())
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  def problem(self, window: Window) -> str:
    """Returns why a window does not look like a face crop, or ''."""
    picture = window.frames[len(window.frames) // 2]
    if self._finder is not None and len(picture) >= self._MIN_SIZE:
      sides = [
        max(np.ptp(d.box[::2]), np.ptp(d.box[1::2]))
        for d in self._finder.detect(picture)
      ]
      share = max(sides, default=0.0) / len(picture)
      if share < self._MIN_SHARE:
        return (
          f"the face takes {share:.0%} of the picture, in a crop about 70%"
          if sides
          else "no face is found"
        )
    return "padded with black bars" if letterboxed(window) else ""


@dataclasses.dataclass
class EncodedVideo:
  """A video that is being read and encoded, or is complete.

  Attributes:
    video: the video.
    crop_problem: result of the `CropCheck` of its first window.
    windows: its windows, without their frames and regions.
    outputs: results for the first windows; the others are being computed.
    outcome: result of reading; None while the video is being read.
  """

  video: Video
  crop_problem: str = ""
  windows: list[Window] = dataclasses.field(default_factory=list)
  outputs: list[np.ndarray] = dataclasses.field(default_factory=list)
  outcome: Outcome | None = None

  @property
  def is_complete(self) -> bool:
    return self.outcome is not None and (
      bool(self.outcome.reason) or len(self.outputs) == len(self.windows)
    )


def encode_many(
  function: Callable[[np.ndarray], jax.Array],
  videos: Sequence[Video],
  settings: WindowSettings,
  *,
  batch_size: int | None,
  num_workers: int,
  crop_check: CropCheck | None = None,
) -> Iterator[EncodedVideo]:
  """Reads videos in worker processes and encodes them, with a progress bar.

  The windows of all videos share batches. No video can end the reading of the
  others: a worker that dies or hangs is replaced. Workers wait while their
  windows are not taken. Closing the iterator stops them.

  Args:
    function: maps clips (B, ...), see `Window.clip`, to an array whose first
      axis is B.
    videos: the videos, started in this order.
    settings: see `WindowSettings`.
    batch_size: B; None: `stream.default_batch_size`.
    num_workers: number of processes.
    crop_check: check to apply to the first window of each video.

  Yields:
    Each video when it is complete: with an output for each window, or with an
    outcome that has a reason, also where an output is not finite.

  Raises:
    ReaderError: no video can be read on this machine.
    MissingLibraryError: the libraries that read videos are not installed.
  """
  paths = [video.path for video in videos]
  with (
    contextlib.closing(_read_many(paths, settings, num_workers)) as events,
    progress_bar(videos) as bar,
  ):
    yield from _encode(
      function,
      videos,
      events,
      batch_size or stream.default_batch_size(),
      bar,
      crop_check,
    )


def _encode(
  function: Callable[[np.ndarray], jax.Array],
  videos: Sequence[Video],
  events: Iterator[tuple[int, Window | float | Outcome]],
  batch_size: int,
  bar: TaskBar,
  crop_check: CropCheck | None,
) -> Iterator[EncodedVideo]:
  """Encodes the windows of `_read_many`; yields as `encode_many`."""
  pending: dict[int, EncodedVideo] = {}
  complete: collections.deque[EncodedVideo] = collections.deque()
  # Number of the video of each window that is being computed.
  owners: collections.deque[int] = collections.deque()
  num_windows = num_refused = 0
  started_at = time.monotonic()

  def show_progress() -> None:
    rate = num_windows / max(time.monotonic() - started_at, 1e-6)
    bar.note(f"{num_windows} windows ({rate:.1f}/s), {num_refused} refused")

  def finish_if_complete(number: int) -> None:
    nonlocal num_refused
    if pending[number].is_complete:
      video = pending.pop(number)
      are_finite = all(np.isfinite(output).all() for output in video.outputs)
      if not (video.outcome.reason or are_finite):
        video.outcome = _failed(_NOT_FINITE)
      num_refused += bool(video.outcome.reason)
      show_progress()
      bar.finish(number)
      complete.append(video)

  def clips() -> Iterator[np.ndarray]:
    for number, event in events:
      video = pending.setdefault(number, EncodedVideo(videos[number]))
      match event:
        case float():  # the share of the video read so far
          bar.advance(number, event)
        case Window():
          if crop_check is not None and not video.windows:
            video.crop_problem = crop_check.problem(event)
          nothing = np.zeros(0, np.uint8)
          video.windows.append(
            dataclasses.replace(event, frames=nothing, regions=None, mel=None)
          )
          owners.append(number)
          yield event.clip
        case Outcome():
          video.outcome = event
          finish_if_complete(number)

  for output in stream.encode(function, clips(), batch_size):
    num_windows += 1
    show_progress()
    number = owners.popleft()
    # A video that turned out to be damaged is no longer pending.
    if number in pending:
      pending[number].outputs.append(output)
      finish_if_complete(number)
    while complete:
      yield complete.popleft()
  yield from complete


@contextlib.contextmanager
def _open_work(settings: WindowSettings) -> Iterator[Callable]:
  """Opens the models in a worker; yields the function that reads a video."""
  import cv2

  from data_prep.video import decode, video_to_records

  # There is a worker for every core already.
  cv2.setNumThreads(1)

  def work(path: Path, report: Callable[[Window | float], None]) -> Outcome:
    reported_at = time.monotonic()

    def progress(share: float) -> None:
      nonlocal reported_at
      if time.monotonic() - reported_at > _REPORT_SECS:
        reported_at = time.monotonic()
        report(share)

    try:
      for window in read_windows(path, settings, models, progress):
        report(window)
    except FaceVideoError as e:
      if isinstance(e.__cause__, decode.HostError):
        return _failed(e.reason)
      return _outcome(path, e.reason)
    except (decode.DecoderSetupError, BrokenPipeError, EOFError):
      raise  # these affect all videos
    except (OSError, MemoryError) as e:
      return _failed(f"{type(e).__name__}: {e}")
    except Exception as e:  # one bad video must not end a run of thousands
      return _outcome(path, f"unexpected error: {type(e).__name__}: {e}")
    return _outcome(path, "")

  if settings.crop_face or settings.regions:
    with video_to_records.Models() as models:
      yield work
  else:
    models = None
    yield work


def _failed(reason: str) -> Outcome:
  """Returns the outcome of a video that another run may read or encode.

  It has no hash, so that the next run tries the video again.
  """
  return Outcome(reason, "", 0)


def _outcome(path: Path, reason: str) -> Outcome:
  try:
    return Outcome(reason, sha256_of(path), path.stat().st_size)
  except OSError as e:
    return Outcome(reason or f"cannot read: {e.strerror}", "", 0)
