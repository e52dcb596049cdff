"""One video seen through an encoder: crop, reconstruction, attention, features.

The steps are apart, so that a page can show each as soon as it is done:

  reading = analyser.read("clip.mp4", crop_face=True)
  analyser.reconstruct(reading, Masking(ratio=0.9)).views()
  analyser.attend(reading)
  analyser.features(reading)

Axes: B clips, W windows, T frames, S pixels of the square picture, N tokens,
D width, C components, R regions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from marlin_jax.inference import (
  attention_maps,
  face_windows,
  pictures,
  reconstruction,
  stream,
)
from marlin_jax.inference.classifier import VideoClassifier
from marlin_jax.inference.clips import Clips, of_windows
from marlin_jax.inference.face_windows import (
  Progress,
  Window,
  WindowSettings,
)
from marlin_jax.inference.marlin import Marlin
from marlin_jax.pretraining.configuration import MASKING_STRATEGIES
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.records.schema import FRAME_SIZE

# Pictures show the first clips; features and scores cover all windows.
NUM_CLIPS = 4
NUM_COMPONENTS = 3


@dataclasses.dataclass(frozen=True)
class Reading:
  """Windows of a video, and its first clips.

  Attributes:
    path: the video.
    crop_face: the face is cropped.
    windows: windows that overlap by half, where the number of frames is even.
    clips: the first NUM_CLIPS windows side by side.
    labels: uint8 (B, T/2, 224, 224), LaPa codes of the clips, or None.
  """

  path: str | os.PathLike
  crop_face: bool
  windows: list[Window]
  clips: Clips
  labels: np.ndarray | None

  @property
  def has_face(self) -> bool:
    """True if a face was parsed in some frame of the clips."""
    return self.clips.regions is not None and bool(self.clips.regions.any())


class Masking(NamedTuple):
  """Choice of the masked tokens; see `pretraining.masking.Masking`."""

  strategy: str = "fasking"
  ratio: float = 0.9
  seed: int = 0


class Attention(NamedTuple):
  """Attention by rollout over all layers.

  Attributes:
    views: the clips as a heat map.
    ratios: share of the attention over share of the patches by region; of
      regions that are in the picture.
  """

  views: pictures.Views
  ratios: dict[str, float]


class Timeline(NamedTuple):
  """Principal components of the features over time.

  Attributes:
    secs: float (W,), the middle of each window.
    values: float (W, C).
    variances: float (C,), shares of the variance, descending.
  """

  secs: np.ndarray
  values: np.ndarray
  variances: np.ndarray


class Scores(NamedTuple):
  """Prediction of a kept model.

  Attributes:
    values: probability by label or class, or the numbers of a model of numbers.
    predicted: the class, or all labels above their thresholds; () for numbers.
    secs: float (W,), the middle of each window.
    by_window: float (W, K), or None if the model judges whole videos only.
  """

  values: dict[str, float]
  predicted: tuple[str, ...]
  secs: np.ndarray
  by_window: np.ndarray | None


class Analyser:
  """An encoder, with a kept model of an evaluation if there is one.

  Attributes:
    marlin: the encoder.
    classifier: the kept model, or None.
    max_secs: time in a video at which reading ends.
  """

  def __init__(
    self,
    marlin: Marlin,
    classifier: VideoClassifier | None = None,
    *,
    max_secs: float,
  ) -> None:
    self.marlin = marlin
    self.classifier = classifier
    self.max_secs = max_secs

  @property
  def has_regions(self) -> bool:
    """True if faces are parsed, which pictures above 224 pixels are not."""
    return self.marlin.architecture.image_size <= FRAME_SIZE

  @property
  def strategies(self) -> list[str]:
    """Masking strategies; without regions those that need none."""
    return [
      name
      for name in MASKING_STRATEGIES
      if self.has_regions or not self._task(name).masking.needs_regions
    ]

  def _task(self, strategy: str, ratio: float = 0.5) -> PretextTask:
    return PretextTask.from_architecture(
      self.marlin.architecture, strategy, ratio
    )

  def read(
    self,
    path: str | os.PathLike,
    *,
    crop_face: bool,
    progress: Progress = lambda share: None,
  ) -> Reading:
    """Reads a video.

    Args:
      path: a video file that FFmpeg decodes.
      crop_face: see `Marlin.extract_video`.
      progress: see `face_windows.Progress`.

    Raises:
      FaceVideoError: the video is damaged or over a limit.
      NoFaceError: the video shows no face, with `crop_face`.
    """
    architecture = self.marlin.architecture
    clip = architecture.clip
    settings = WindowSettings(
      clip=clip,
      # Side-by-side windows, which `scores` needs, must be among them.
      hop=clip.extent if clip.extent % 2 else clip.extent // 2,
      image_size=architecture.image_size,
      crop_face=crop_face,
      regions=self.has_regions,
      tubelet_size=architecture.tubelet_size,
      patch_size=architecture.patch_size,
      stop_secs=self.max_secs,
    )
    windows = list(face_windows.read_windows(path, settings, progress=progress))
    first = _adjacent(windows, clip.extent)[:NUM_CLIPS]
    labels = None
    if self.has_regions:
      labels = np.stack([window.labels for window in first])
    return Reading(path, crop_face, windows, of_windows(first, clip), labels)

  def reconstruct(
    self, reading: Reading, masking: Masking
  ) -> reconstruction.ReconstructedClips:
    """Masks the clips and reconstructs them.

    Raises:
      WeightsError: the weights have no decoder.
      ValueError: no token would be visible, or regions are missing.
    """
    strategy, ratio, seed = masking
    task = self._task(strategy, ratio)
    return reconstruction.reconstruct(
      self.marlin.mae, reading.clips, task, seed
    )

  def attend(self, reading: Reading) -> Attention:
    """Returns where the encoder looks in the clips."""
    clips = reading.clips
    rollout = np.asarray(self.marlin.attention_maps(clips.video).rollout)
    grid = self.marlin.architecture.tubelets.grid
    views = pictures.heat_map(clips.video, rollout, grid, "attention")
    ratios = {}
    if reading.has_face:
      areas = attention_maps.area_shares(clips.regions).mean(0)
      shares = attention_maps.region_shares(rollout, clips.regions).mean(0)
      ratios = {
        region: float(share / area)
        for region, share, area in zip(
          attention_maps.SHARES, shares, areas, strict=True
        )
        if area
      }
    return Attention(views, ratios)

  def features(
    self, reading: Reading, progress: Progress = lambda share: None
  ) -> Timeline | None:
    """Returns how the features of the windows change; None of one window."""
    windows = reading.windows
    if len(windows) < 2:
      return None
    features = self._encoded(self.marlin.extract_features, windows, progress)
    centred = features.astype(np.float64) - features.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return Timeline(
      _middles(windows),
      (u * s)[:, :NUM_COMPONENTS],
      (s**2 / max((s**2).sum(), 1e-30))[:NUM_COMPONENTS],
    )

  def scores(self, reading: Reading) -> Scores:
    """Returns the prediction of the kept model, as `marlin_jax.predict` does.

    Windows are side by side; they are read again where the model takes others
    than the encoder.
    """
    classifier = self.classifier
    settings = dataclasses.replace(
      classifier.window_settings(crop_face=reading.crop_face),
      stop_secs=self.max_secs,
    )
    architecture = self.marlin.architecture
    if (settings.clip, settings.image_size) == (
      architecture.clip,
      architecture.image_size,
    ):
      windows = _adjacent(reading.windows, settings.clip.extent)
    else:
      windows = list(face_windows.read_windows(reading.path, settings))
    prediction = classifier.prediction(
      self._encoded(classifier.outputs, windows)
    )
    return Scores(
      prediction.as_dict(),
      prediction.predicted,
      _middles(windows),
      prediction.window_probabilities,
    )

  def _encoded(self, function, windows, progress=lambda share: None):
    """Applies a function of clips to windows; returns an array (W, ...)."""

    def frames() -> Iterator[np.ndarray]:
      for number, window in enumerate(windows):
        progress(number / len(windows))
        yield window.frames

    batch_size = stream.default_batch_size()
    return np.stack(list(stream.encode(function, frames(), batch_size)))


def _adjacent(windows: list[Window], extent: int) -> list[Window]:
  """Returns those windows that side-by-side ones would be.

  Args:
    windows: all windows of a video, as `Analyser.read` places them.
    extent: frames that a window covers.
  """
  first, last = windows[0].first_frame, windows[-1].first_frame
  return [
    window
    for window in windows
    if (window.first_frame - first) % extent == 0 or window.first_frame == last
  ]


def _middles(windows: list[Window]) -> np.ndarray:
  return np.array([(w.start_secs + w.end_secs) / 2 for w in windows])
