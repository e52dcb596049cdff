"""Features of windows as they come: batches in order, then one of all.

Axes: W windows, T frames, S pixels, N tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.inference.face_windows import WindowSettings

if TYPE_CHECKING:
  import jax

  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.weights.weights import Architecture

REDUCTIONS = ("none", "mean", "max", "std", "mean_std")


def window_settings(
  architecture: Architecture,
  *,
  crop_face: bool,
  sample_rate: int | None,
  stride: int | None,
  window_rule: str,
) -> WindowSettings:
  """The windows of a video that a network takes; see `Marlin.extract_video`.

  Raises:
    ValueError: they would not cover the video, or there is no such rule.
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


def default_batch_size() -> int:
  """1 on CPU, where one clip keeps all cores busy and padding is dear; 16."""
  import jax

  return 1 if jax.default_backend() == "cpu" else 16


def extract(
  marlin: Marlin,
  clips: Iterable[np.ndarray],
  *,
  keep_seq: bool,
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Features of a stream of clips, in its order.

  While a batch is computed the clips of the next one are taken. The last batch
  is filled up with copies, so that one program is compiled; the features of a
  clip do not depend on its place in the batch, nor on what else is in it.

  Args:
    marlin: the network.
    clips: uint8 (T, S, S, 3) each.
    keep_seq: as for `Marlin.extract_features`.
    batch_size: clips per batch.

  Yields:
    float32 (D,) for each clip, or (N, D).
  """
  previous: jax.Array | None = None
  num_previous = 0
  clips = iter(clips)
  while group := list(itertools.islice(clips, batch_size)):
    batch = np.stack(group + group[-1:] * (batch_size - len(group)))
    current = marlin.extract_features(batch, keep_seq=keep_seq)
    if previous is not None:
      yield from np.asarray(previous)[:num_previous]
    previous, num_previous = current, len(group)
  if previous is not None:
    yield from np.asarray(previous)[:num_previous]


def reduced(features: np.ndarray, reduction: str) -> np.ndarray:
  """One feature for all windows of a video.

  Args:
    features: float32 (W, D), or (W, N, D).
    reduction: 'none'; 'mean', 'max' or 'std' over the windows, where the
      deviation is that of the whole population, so 0 for a single window; or
      'mean_std', both side by side.

  Returns:
    float32 (W, D); reduced (D,), for 'mean_std' (2D,). With tokens (W, N, D),
    (N, D) and (N, 2D).

  Raises:
    ValueError: there is no such reduction.
  """
  check_reduction(reduction)
  if reduction == "none":
    return features
  if reduction == "mean_std":
    both = [reduced(features, name) for name in ("mean", "std")]
    return np.concatenate(both, axis=-1)
  return getattr(features, reduction)(axis=0)


def check_reduction(reduction: str) -> None:
  """Raises ValueError where there is no such reduction."""
  if reduction not in REDUCTIONS:
    raise ValueError(
      f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}"
    )
