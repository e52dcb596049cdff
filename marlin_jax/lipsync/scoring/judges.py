"""Networks that tell how well lips and sound agree.

  judge = SyncNetJudge(formats.lipsync.read_syncnet("syncnet_v2.model"))
  faces, sounds = judge.embeddings(frames, sound)   # -> offsets.distances

Only distances of SyncNet are LSE-D and LSE-C, as published; those of an expert
of our own bear other names, for they are on another scale.

Axes: F frames of a stretch, S its samples, N windows, T frames of a window, D
numbers of an embedding.
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
from marlin_jax.lipsync.networks import syncnet
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.scoring.mfcc import HOP, mfcc
from marlin_jax.records.mel_spectrogram import mel_spectrogram
from marlin_jax.records.schema import SAMPLE_RATE

_FRAME_SAMPLES = SAMPLE_RATE // mel_windows.FPS


class Judge(Protocol):
  """What scoring asks.

  Attributes:
    name: for people.
    metric_names: of the least distance, and of how far it is below the median.
    num_frames: T.
  """

  name: str
  metric_names: tuple[str, str]
  num_frames: int

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Embeds the windows of a stretch; see `num_windows`.

    Args:
      frames: uint8 (F, 224, 224, 3), RGB face crops, 25 a second.
      sound: int16 (S,), 16 kHz; sample 0 is at the time of frame 0.

    Returns:
      Faces and sounds, float32 (N, D) each.
    """


def num_windows(num_frames: int, num_samples: int, of_window: int) -> int:
  """Windows that a judge looks at: as far as both pictures and sound go.

  SyncNet's authors stop one window early, and so do all who compare with them.
  """
  both = min(num_frames, num_samples // _FRAME_SAMPLES)
  return max(both - of_window, 0)


class SyncNetJudge:
  """The published scorer's network; its distances are LSE-D and LSE-C."""

  name = "SyncNet"
  metric_names = ("lse_d", "lse_c")
  num_frames = syncnet.NUM_FRAMES

  def __init__(self, network: syncnet.SyncNet, batch_size: int = 16):
    """Takes the network, with the published weights in it.

    Args:
      network: see formats.lipsync.read_syncnet.
      batch_size: windows at a time.
    """
    self._batch_size = batch_size
    # As OpenCV, with which it was trained, reads pictures.
    self._faces = _compiled(
      network,
      lambda net, video: net.faces(video[..., ::-1].astype(jnp.float32)),
    )
    self._sound = _compiled(network, lambda net, rows: net.sound(rows))

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Judge`."""
    num = num_windows(len(frames), len(sound), self.num_frames)
    rows = mfcc(sound).astype(np.float32)
    hops = _FRAME_SAMPLES // HOP  # of a frame
    heard = np.arange(num)[:, None] * hops + np.arange(syncnet.MFCC_ROWS)
    seen = _window_rows(num, self.num_frames)
    return (
      _in_batches(self._faces, frames, seen, self._batch_size),
      _in_batches(self._sound, rows, heard, self._batch_size),
    )


class ExpertJudge:
  """An expert trained here, or Wav2Lip's."""

  metric_names = ("expert_d", "expert_c")

  def __init__(
    self, network: SyncExpert, name: str = "expert", batch_size: int = 16
  ):
    """Takes a trained network.

    Args:
      network: in evaluation mode.
      name: for people.
      batch_size: windows at a time.
    """
    self.name = name
    self.num_frames = network.num_frames
    self._batch_size = batch_size
    self._faces = _compiled(
      network, lambda net, video: net.faces(video.astype(jnp.float32) / 255)
    )
    self._sound = _compiled(network, lambda net, mel: net.sound(mel))

  def embeddings(
    self, frames: np.ndarray, sound: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Judge`."""
    num = num_windows(len(frames), len(sound), self.num_frames)
    mel = mel_windows.windows(
      mel_spectrogram(sound), np.arange(num), self.num_frames
    )
    seen = _window_rows(num, self.num_frames)
    each = np.arange(num)
    return (
      _in_batches(self._faces, frames, seen, self._batch_size),
      _in_batches(self._sound, mel, each, self._batch_size),
    )


def _window_rows(num: int, num_frames: int) -> np.ndarray:
  """int (N, T): the frames of the windows that begin at each frame."""
  return np.arange(num)[:, None] + np.arange(num_frames)


def _compiled(
  network: nnx.Module, apply: Callable[[nnx.Module, jax.Array], jax.Array]
) -> Callable[[np.ndarray], jax.Array]:
  graphdef, state = nnx.split(network)

  @jax.jit
  def run(state, x):
    return apply(nnx.merge(graphdef, state), x)

  return functools.partial(run, state)


def _in_batches(
  run: Callable[[np.ndarray], jax.Array],
  values: np.ndarray,
  rows: np.ndarray,
  batch_size: int,
) -> np.ndarray:
  """Returns the embeddings of values[rows], computed in batches."""
  clips = (values[row] for row in rows)
  return np.stack(list(stream.encode(run, clips, batch_size)))
