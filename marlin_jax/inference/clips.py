"""The first windows of a video as one batch.

Axes: B clips, T frames, S pixels of the square picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.inference.face_windows import Progress, read_windows
from marlin_jax.inference.window_features import window_settings

if TYPE_CHECKING:
  from marlin_jax.weights.weights import Architecture

_USUAL_FPS = 30.0


@dataclasses.dataclass(frozen=True)
class Clips:
  """Some clips, as the encoder takes them.

  Attributes:
    video: uint8 (B, T, S, S, 3), RGB.
    frame_numbers: int (B, T), each frame's number in the source.
    fps: of the frames shown, so half of the video's where every second one is.
    regions: uint16 (B, T/2, 14, 14) where asked for, else None: bit k is set
      where LaPa class k touches the patch; 0 where no face was parsed.
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
  """Reads windows of a video, from its beginning.

  Args:
    path: a video file.
    architecture: of the network that shall see them.
    crop_face: follow the face and cut it out; else whole frames are shown.
    regions: find the regions of the face too.
    num_clips: how many at most; all of them where None, 2.4 MB each.
    progress: called with the share of the video that has been read.

  Raises:
    FaceVideoError, RuntimeError: as for `face_video.read_windows`.
    ValueError: regions of pictures of another size than 224 pixels.
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
  )
  # Closed at once: what is left of the video need not be decoded.
  with contextlib.closing(
    read_windows(path, settings, progress=progress)
  ) as windows:
    taken = list(itertools.islice(windows, num_clips))
  clip = settings.clip
  shown = clip.stride * np.arange(clip.num_frames)
  first, last = taken[0], taken[-1]
  num_steps = last.first_frame + last.num_frames - 1 - first.first_frame
  secs = last.end_secs - first.start_secs
  fps = num_steps / secs if num_steps and secs > 0 else _USUAL_FPS
  return Clips(
    video=np.stack([window.frames for window in taken]),
    frame_numbers=np.stack(
      [
        # A video that is too short repeats its last frame.
        w.first_frame + np.minimum(shown, w.num_frames - 1)
        for w in taken
      ]
    ),
    fps=fps / clip.stride,
    regions=np.stack([w.regions for w in taken]) if regions else None,
  )


def as_clips(
  video: np.ndarray, regions: np.ndarray | None, stride: int
) -> Clips:
  """Clips that are there already, taken for one after another."""
  numbers = stride * np.arange(video.shape[0] * video.shape[1])
  return Clips(
    video=video,
    frame_numbers=numbers.reshape(video.shape[:2]),
    fps=_USUAL_FPS / stride,
    regions=regions,
  )
