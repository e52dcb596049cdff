"""Networks that embed lips and sound, for scoring how well they agree.

  syncnet = published.read(published.SYNCNET, "syncnet_v2.model")
  judge = SyncNetJudge(syncnet)
  faces, sounds = judge.embeddings(frames, sound)
  distances = offsets.distances(faces, sounds)

Only SyncNet's distances are the published LSE-D and LSE-C. Those of an expert
are on another scale and have other names.

Axes: F frames of a stretch (a run of frames with a face), S its samples, N
windows, T frames of a window, D embedding size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.inference import stream
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.networks import inputs, syncnet
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.scoring import face_crops
from marlin_jax.lipsync.scoring.mfcc import HOP, mfcc
from marlin_jax.lipsync.scoring.talking_video import FRAME_SAMPLES
from marlin_jax.records.mel_spectrogram import mel_spectrogram


class Judge(Protocol):
  """Network by which scoring compares lips and sound.

  Attributes:
    name: shown in results.
    metric_names: keys of the lowest mean distance, and of the median minus the
      lowest, in results.
    num_frames: frames of a window, T.
    crop: face crop that it was trained on, see `face_crops`.
  """

  name: str
  metric_names: tuple[str, str]
  num_frames: int
  crop: str

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Embeds all windows of a stretch; see `num_windows`.

    Args:
      frames: uint8 (F, 224, 224, 3), RGB face crops, 25 per second.
      sound: int16 (S,), 16 kHz; sample 0 is at the time of frame 0.

    Returns:
      Embeddings of faces and sounds, float32 (N, D) each.
    """


def num_windows(num_frames: int, num_samples: int, window_frames: int) -> int:
  """Returns the number of windows for which there are both frames and sound.

  It is one less than fit, as in SyncNet's published code, so that scores are
  comparable.

  Args:
    num_frames: number of frames, F.
    num_samples: number of samples of sound, S.
    window_frames: frames of a window, T.
  """
  num_common = min(num_frames, num_samples // FRAME_SAMPLES)
  return max(num_common - window_frames, 0)


class SyncNetJudge:
  """SyncNet with published weights.

  Its distances are LSE-D and LSE-C, on its own crops and on videos that are
  face crops already.
  """

  name = "SyncNet"
  metric_names = ("lse_d", "lse_c")
  num_frames = syncnet.NUM_FRAMES
  crop = face_crops.SYNCNET

  def __init__(self, network: syncnet.SyncNet, batch_size: int = 16):
    """Initialises the judge.

    Args:
      network: SyncNet with published weights; see networks.published.
      batch_size: windows per batch.
    """
    self._batch_size = batch_size
    # BGR: SyncNet was trained on images read by OpenCV.
    self._embed_faces = _compiled(
      network,
      lambda net, video: net.faces(video[..., ::-1].astype(jnp.float32)),
    )
    self._embed_sound = _compiled(network, lambda net, rows: net.sound(rows))

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Judge`."""
    num = num_windows(len(frames), len(sound), self.num_frames)
    frame_rows = FRAME_SAMPLES // HOP  # MFCC rows per frame
    mfcc_windows = _windows(num, syncnet.MFCC_ROWS, step=frame_rows)
    rows = mfcc(sound).astype(np.float32)
    return (
      _embed(
        self._embed_faces,
        frames,
        _windows(num, self.num_frames),
        self._batch_size,
      ),
      _embed(self._embed_sound, rows, mfcc_windows, self._batch_size),
    )


class ExpertJudge:
  """Sync expert, trained by `--mode=train_expert` or Wav2Lip's."""

  metric_names = ("expert_d", "expert_c")
  crop = face_crops.RECORD

  def __init__(
    self, network: SyncExpert, name: str = "expert", batch_size: int = 16
  ):
    """Initialises the judge.

    Args:
      network: expert in evaluation mode.
      name: shown in results.
      batch_size: windows per batch.
    """
    self.name = name
    self.num_frames = network.num_frames
    self._batch_size = batch_size
    self._embed_faces = _compiled(
      network, lambda net, video: net.faces(inputs.as_floats(video))
    )
    self._embed_sound = _compiled(network, lambda net, mel: net.sound(mel))

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Judge`."""
    num = num_windows(len(frames), len(sound), self.num_frames)
    starts = np.arange(num)
    mel = mel_windows.windows(mel_spectrogram(sound), starts, self.num_frames)
    return (
      _embed(
        self._embed_faces,
        frames,
        _windows(num, self.num_frames),
        self._batch_size,
      ),
      _embed(self._embed_sound, mel, starts, self._batch_size),
    )


def _windows(num: int, length: int, step: int = 1) -> np.ndarray:
  """Returns the rows of windows `step` rows apart, int (num, length)."""
  return step * np.arange(num)[:, None] + np.arange(length)


def _compiled(
  network: nnx.Module, apply: Callable[[nnx.Module, jax.Array], jax.Array]
) -> Callable[[np.ndarray], jax.Array]:
  graphdef, state = nnx.split(network)

  @jax.jit
  def run(state, x):
    return apply(nnx.merge(graphdef, state), x)

  return functools.partial(run, state)


def _embed(
  function: Callable[[np.ndarray], jax.Array],
  values: np.ndarray,
  windows: np.ndarray,
  batch_size: int,
) -> np.ndarray:
  """Returns the embeddings of values[windows], float32 (N, D)."""
  clips = (values[window] for window in windows)
  return np.stack(list(stream.encode(function, clips, batch_size)))
