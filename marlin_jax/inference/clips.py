"""Which windows of a video a network takes, and the first ones as a batch.

Axes: B clips, T frames, S pixels of the square picture, h w patches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.inference.face_windows import (
  DEFAULT_FPS,
  Progress,
  Window,
  WindowSettings,
  read_windows,
)

if TYPE_CHECKING:
  from marlin_jax.weights.architecture import Architecture


def window_settings(
  architecture: Architecture,
  *,
  crop_face: bool,
  sample_rate: int | None,
  stride: int | None,
  window_rule: str,
) -> WindowSettings:
  """Returns the windows that a network takes of a video.

  Args:
    architecture: architecture of the network.
    crop_face, sample_rate, stride, window_rule: see `Marlin.extract_video`.

  Raises:
    ValueError: the windows would not cover the video, or there is no such rule.
  """
  if sample_rate is None:
    sample_rate = architecture.stride
  if stride is None:
    stride = architecture.num_frames
  return WindowSettings(
    clip=Clip(architecture.num_frames, sample_rate),
    hop=stride * sample_rate,
    image_size=architecture.image_size,
    crop_face=crop_face,
    window_rule=window_rule,
  )


@dataclasses.dataclass(frozen=True)
class Clips:
  """A batch of clips as the encoder takes them, with their times.

  Attributes:
    video: uint8 (B, T, S, S, 3), RGB.
    frame_numbers: int (B, T), the frames' numbers in the source video.
    fps: frames per second of `video`: half of the source's at a stride of 2.
    regions: uint16 (B, T/2, h, w), or None: bit k is set where LaPa class k
      touches the patch; 0 where no face was parsed.
  """

  video: np.ndarray
  frame_numbers: np.ndarray
  fps: float
  regions: np.ndarray | None = None


def read_clips(
  path: str | os.PathLike,
  architecture: Architecture,
  *,
  crop_face: bool = False,
  regions: bool = False,
  num_clips: int | None = None,
  progress: Progress = lambda share: None,
) -> Clips:
  """Reads the first windows of a video.

  Args:
    path: a video file.
    architecture: architecture of the network that takes the clips.
    crop_face: crop the face, following it over time; else whole frames are
      taken.
    regions: also parse the face regions.
    num_clips: maximum number of clips; None: all, at 2.4 MB each of 224
      pixels.
    progress: called with the share of the video that has been read.

  Raises:
    UserError: as for `face_windows.read_windows`.
    ValueError: regions were asked for at an image size above 224 pixels.
  """
  settings = dataclasses.replace(
    window_settings(
      architecture,
      crop_face=crop_face,
      sample_rate=None,
      stride=None,
      window_rule="cover",
    ),
    regions=regions,
    tubelet_size=architecture.tubelet_size,
    patch_size=architecture.patch_size,
  )
  # Closed at once, so that the rest of the video is not decoded.
  with contextlib.closing(
    read_windows(path, settings, progress=progress)
  ) as windows:
    return of_windows(list(itertools.islice(windows, num_clips)), settings.clip)


def of_windows(windows: Sequence[Window], clip: Clip) -> Clips:
  """Returns windows of one video as a batch.

  Args:
    windows: at least one, in order; all or none with regions.
    clip: frames of a window, and the distance between them.
  """
  offsets = clip.stride * np.arange(clip.num_frames)
  first, last = windows[0], windows[-1]
  num_steps = last.first_frame + last.num_frames - 1 - first.first_frame
  secs = last.end_secs - first.start_secs
  fps = num_steps / secs if num_steps and secs > 0 else DEFAULT_FPS
  return Clips(
    video=np.stack([window.frames for window in windows]),
    frame_numbers=np.stack(
      [
        # A video shorter than a window repeats its last frame.
        window.first_frame + np.minimum(offsets, window.num_frames - 1)
        for window in windows
      ]
    ),
    fps=fps / clip.stride,
    regions=(
      None
      if first.regions is None
      else np.stack([window.regions for window in windows])
    ),
  )


def as_clips(
  video: np.ndarray, regions: np.ndarray | None, stride: int
) -> Clips:
  """Wraps clips held in memory, as if they were consecutive in a video."""
  numbers = stride * np.arange(video.shape[0] * video.shape[1])
  return Clips(
    video=video,
    frame_numbers=numbers.reshape(video.shape[:2]),
    fps=DEFAULT_FPS / stride,
    regions=regions,
  )
