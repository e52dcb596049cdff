"""Features of all windows of a split, computed once and kept on disk.

Each encoder, split and set of windows has a folder, named by their hash. It
holds settings.json and the features in parts, each written at once: an
interrupted run resumes at the first missing part.

Axes: W windows, V videos, B clips of a batch, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from marlin_jax.data import loader
from marlin_jax.devices import distributed, sharding
from marlin_jax.downstream import clip_batches
from marlin_jax.downstream.splits import Split, TrackWindow
from marlin_jax.inference import stream
from marlin_jax.inference.clip_features import FrozenEncoder
from marlin_jax.records.cli import counted
from marlin_jax.records.folders import SETTINGS, write_bytes
from marlin_jax.training.skipped_steps import NotFiniteError

# Incremented when the same settings would give other features.
_VERSION = 1
# Windows of a part: 3 MB for B/16.
PART_WINDOWS = 1024


def window_features(
  encoder: FrozenEncoder,
  split: Split,
  windows: list[TrackWindow],
  cache: Path,
  *,
  batch_size: int,
  num_threads: int,
) -> np.ndarray:
  """Returns the features of windows; computes those that are not cached.

  All processes call it together; process 0 writes.

  Args:
    encoder: encoder that computes the features.
    split: split of the windows.
    windows: W windows of its tracks.
    cache: folder of all caches.
    batch_size: clips per batch; changes features by rounding only.
    num_threads: number of reader threads.

  Returns:
    float32 (W, D).

  Raises:
    DatasetError: a record is damaged.
    NotFiniteError: features are not finite.
  """
  folder = _open_folder(encoder, split, windows, cache)
  width = encoder.architecture.width
  starts = range(0, len(windows), PART_WINDOWS)
  parts = {}
  for start in starts:
    num = min(PART_WINDOWS, len(windows) - start)
    parts[start] = _read(folder / _name(start), (num, width))
  are_read = distributed.set_on_all([p is not None for p in parts.values()])
  missing = [
    s for s, is_read in zip(starts, are_read, strict=True) if not is_read
  ]
  if missing:
    architecture = encoder.architecture
    reader = clip_batches.ClipReader(
      split, architecture.clip, architecture.image_size
    )
    todo = {s: windows[s : s + PART_WINDOWS] for s in missing}
    with tqdm(
      desc=f"features of {split.name}",
      total=len(windows),
      initial=len(windows) - sum(map(len, todo.values())),
      unit="window",
      mininterval=1.0,
      disable=jax.process_index() != 0,
    ) as bar:
      for start, part in todo.items():
        batches = clip_batches.window_batches(
          reader,
          part,
          batch_size,
          num_threads,
          loader.own_rows(sharding.batch_sharding(encoder.mesh), batch_size),
        )
        parts[start] = batch_features(encoder, batches, len(part), bar.update)
        if jax.process_index() == 0:
          data = io.BytesIO()
          np.save(data, parts[start])
          write_bytes(folder / _name(start), data.getvalue())
  if not parts:
    return np.zeros((0, width), np.float32)
  features = np.concatenate([parts[start] for start in starts])
  # Neighbours of NaN would be no error, but the mean of all labels.
  if num_bad := int((~np.isfinite(features).all(axis=1)).sum()):
    raise NotFiniteError(
      f"features of {num_bad} of {counted(len(features), 'window')} of "
      f"'{split.name}' are not finite: the encoder has diverged or is damaged, "
      f"or needs another dtype than {encoder.identity['dtype']}"
    )
  return features


def _open_folder(
  encoder: FrozenEncoder, split: Split, windows: list[TrackWindow], cache: Path
) -> Path:
  """Returns the folder of these features, with its settings.json."""
  settings = {
    "version": _VERSION,
    **encoder.identity,
    "split": split.name,
    "fingerprint": split.dataset.fingerprint,
    "windows": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
    "num_frames": encoder.architecture.num_frames,
    "stride": encoder.architecture.stride,
  }
  data = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
  folder = cache / f"features-{hashlib.sha256(data).hexdigest()[:16]}"
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / SETTINGS, data)
  return folder


def _name(start: int) -> str:
  return f"{start:09d}.npy"


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
  """Returns a part, or None if it is missing or damaged."""
  try:
    features = np.load(path, allow_pickle=False)
  except (OSError, EOFError, ValueError):
    return None
  return features if features.shape == shape else None


def batch_features(
  encode: Callable[[np.ndarray], jax.Array],
  batches: Iterable[np.ndarray],
  num_windows: int,
  report: Callable[[int], object] = lambda num: None,
) -> np.ndarray:
  """Computes the features of batches of clips, with one batch in flight.

  Args:
    encode: maps clips to features float32 (B, D), which every process holds
      whole.
    batches: clips, B at a time over all processes.
    num_windows: W, clips that count; the padding of the last batch is dropped.
    report: called with the number of windows computed since the last call.

  Returns:
    float32 (W, D).
  """
  parts: list[np.ndarray] = []
  num_left = num_windows
  for features in stream.encode_batches(encode, batches):
    parts.append(features[:num_left])
    num_left -= len(parts[-1])
    report(len(parts[-1]))
  return np.concatenate(parts)


def pooled(
  values: np.ndarray, owners: np.ndarray, num: int, reduction: str
) -> np.ndarray:
  """Reduces the rows of each owner to one; see `stream.reduced`.

  Args:
    values: (W, D).
    owners: int (W,), in [0, num), ascending; each occurs.
    num: number of owners.
    reduction: 'mean', 'std' or 'mean_std'.

  Returns:
    (num, D), or (num, 2D) for 'mean_std'.
  """
  ends = np.cumsum(np.bincount(owners, minlength=num))
  return np.stack(
    [stream.reduced(rows, reduction) for rows in np.split(values, ends[:-1])]
  )
