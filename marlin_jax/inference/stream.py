"""Encodes a stream of clips in batches, and reduces the features of a video.

Axes: B clips, T frames, S pixels of the square picture, W windows of a video,
N tokens, D width.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  import jax

REDUCTIONS = ("none", "mean", "max", "std", "mean_std")
# Features of the frames of windows, of their sound, or of one after the other.
MODALITIES = ("video", "sound", "both")


def default_batch_size() -> int:
  """Returns the clips of a batch on one device: 1 on CPU, 16 elsewhere.

  On CPU one clip keeps all cores busy, and padding the last batch costs time.
  """
  import jax

  return 1 if jax.default_backend() == "cpu" else 16


def local_batch_size(batch_size: int | None) -> int:
  """Returns the clips of a batch that divides over this process's devices.

  Args:
    batch_size: clips per batch, rounded up; None: `default_batch_size` for each
      device.
  """
  import jax

  num_devices = jax.local_device_count()
  if batch_size is None:
    return num_devices * default_batch_size()
  return -(-batch_size // num_devices) * num_devices


def encode_batches(
  function: Callable[[np.ndarray], jax.Array], batches: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
  """Applies a function to batches, with one batch in flight.

  JAX dispatches asynchronously: while the device computes a batch, the next one
  is taken from `batches`.

  Args:
    function: maps a batch to an array, such as a jitted encoder.
    batches: inputs of `function`.

  Yields:
    The result for each batch, in order.
  """
  previous: jax.Array | None = None
  for batch in batches:
    current = function(batch)
    if previous is not None:
      yield np.asarray(previous)
    previous = current
  if previous is not None:
    yield np.asarray(previous)


def encode(
  function: Callable[[np.ndarray], jax.Array],
  clips: Iterable[np.ndarray | dict[str, np.ndarray]],
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Applies a function to a stream of clips, with one batch in flight.

  All batches have the same size, so that one program is compiled: the last one
  is filled up with copies of its last clip. The result for a clip depends
  neither on its place in the batch nor on the other clips of the batch.

  Args:
    function: maps clips (B, ...) to an array whose first axis is B.
    clips: inputs without the batch axis, such as uint8 (T, S, S, 3), or dicts
      of such arrays.
    batch_size: B.

  Yields:
    The result for each clip, in order.
  """
  sizes: collections.deque[int] = collections.deque()

  def batches() -> Iterator[np.ndarray]:
    stream = iter(clips)
    while group := list(itertools.islice(stream, batch_size)):
      sizes.append(len(group))
      yield _stacked(group + group[-1:] * (batch_size - len(group)))

  for results in encode_batches(function, batches()):
    yield from results[: sizes.popleft()]


def _stacked(group: list) -> np.ndarray | dict[str, np.ndarray]:
  if isinstance(group[0], dict):
    return {key: _stacked([x[key] for x in group]) for key in group[0]}
  return np.stack(group)


def reduced(features: np.ndarray, reduction: str) -> np.ndarray:
  """Reduces the features of the windows of a video to one feature.

  Args:
    features: float32 (W, D), or (W, N, D).
    reduction: 'none'; 'mean', 'max' or 'std' over the windows, where the
      standard deviation is that of the population, so 0 for a single window; or
      'mean_std', which concatenates both.

  Returns:
    float32 (W, D) for 'none', (2D,) for 'mean_std', else (D,). With tokens
    (W, N, D), (N, 2D) and (N, D).

  Raises:
    ValueError: `reduction` is none of REDUCTIONS.
  """
  check_reduction(reduction)
  if reduction == "none":
    return features
  if reduction == "mean_std":
    both = [reduced(features, name) for name in ("mean", "std")]
    return np.concatenate(both, axis=-1)
  return getattr(features, reduction)(axis=0)


def check_reduction(reduction: str) -> None:
  """Raises ValueError if `reduction` is none of REDUCTIONS."""
  if reduction not in REDUCTIONS:
    raise ValueError(
      f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}"
    )


def check_modality(modality: str, keep_seq: bool) -> None:
  """Raises ValueError if there are no such features.

  Args:
    modality: one of MODALITIES.
    keep_seq: a feature per token, not one per window.
  """
  if modality not in MODALITIES:
    raise ValueError(
      f"modality is {modality!r}, expected one of {', '.join(MODALITIES)}"
    )
  if modality == "both" and keep_seq:
    raise ValueError(
      "keep_seq with modality both: tokens of video and of sound differ in "
      "number and width; extract video and sound apart"
    )
