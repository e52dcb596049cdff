"""Frames of a clip, windows of a video, and tokens of a clip and its sound.

Axes: B batch, T frames, H W pixels, C colours, N tokens (ordered t h w),
P pixels per token (ordered c pt ph pw, as MARLIN; VideoMAE has pt ph pw c),
M R rows of a mel spectrogram. N and P of sound: see SoundPatches.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from marlin_jax.records import schema
from marlin_jax.records.mel_spectrogram import MAX_VALUE, MEL_RATE

# Per-channel statistics (RGB in [0, 1]) of the input of VideoMAE checkpoints.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Clip:
  """Clip of `num_frames` frames, every `stride`-th frame of its source."""

  num_frames: int = schema.CLIP_FRAMES
  stride: int = schema.CLIP_STRIDE

  @property
  def span(self) -> int:
    """Source frames from the clip's first frame to its last, inclusive."""
    return (self.num_frames - 1) * self.stride + 1

  @property
  def extent(self) -> int:
    """Source frames that a window covers; 32 by default."""
    return self.num_frames * self.stride

  def indices(self, start: int | np.ndarray, total: int) -> np.ndarray:
    """Returns the frame numbers of the clip that begins at `start`.

    Training, evaluation and features all pad by this rule: the stride is kept,
    and past the end of the source its last frame is repeated.

    Args:
      start: first frame, in [0, total); or the first frames of several clips,
        (B, 1).
      total: frames in the source, at least 1.

    Returns:
      int (num_frames,), or (B, num_frames).
    """
    frames = start + self.stride * np.arange(self.num_frames)
    return np.minimum(frames, total - 1)

  def random_starts(
    self, total: int, num_clips: int, np_rng: np.random.Generator
  ) -> np.ndarray:
    """Draws starts of clips that fit into the source; 0 if it is too short.

    The first start is random and the others follow at equal distances,
    cyclically: each start is uniformly distributed, and all differ if there are
    at least `num_clips` possible starts. If the source is long enough, the
    starts are multiples of the stride apart, so that overlapping clips share
    frames.

    Args:
      total: frames in the source, at least 1.
      num_clips: number of starts.
      np_rng: generator; one number is drawn.

    Returns:
      int (num_clips,).
    """
    num_starts = self.num_starts(total)
    first = int(np_rng.integers(num_starts))
    return self.spread_starts(first, num_starts, num_clips)

  def num_starts(self, total: int | np.ndarray) -> int | np.ndarray:
    """Returns how many clips fit into `total` frames, at least 1."""
    return np.maximum(total - self.span, 0) + 1

  def spread_starts(
    self, first: int, num_starts: int, num_clips: int
  ) -> np.ndarray:
    """Returns `num_clips` starts: `first`, and others spread cyclically.

    Args:
      first: a start, in [0, num_starts).
      num_starts: number of possible starts.
      num_clips: number of starts.

    Returns:
      int (num_clips,), as described at `random_starts`.
    """
    step = self.stride if num_starts // self.stride >= num_clips else 1
    place, least = divmod(first, step)
    num_places = (num_starts - 1 - least) // step + 1
    places = place + np.arange(num_clips) * num_places // num_clips
    return least + step * (places % num_places)

  def window_starts(self, total: int, hop: int | None = None) -> np.ndarray:
    """Returns the starts of the windows that cover a whole video.

    A window covers `extent` frames, of which its clip shows every `stride`-th.
    Windows start every `hop` frames while they fit. If frames remain at the
    end, one more window ends with the last frame. A video shorter than a window
    is one window, padded as in `indices`. So every frame is in a window, and
    only a video shorter than a window is padded.

    Args:
      total: frames of the video, at least 1.
      hop: frames from one start to the next; `extent` by default, so that
        windows are adjacent.

    Returns:
      int (W,), ascending, at least one.

    Raises:
      ValueError: the hop is not in [1, extent]; frames between windows would be
        left out.
    """
    hop = self.extent if hop is None else hop
    if not 1 <= hop <= self.extent:
      raise ValueError(
        f"windows of {self.extent} frames that start every {hop} frames do not "
        f"cover a video; expected 1 to {self.extent}"
      )
    last = max(total - self.extent, 0)
    starts = np.arange(0, last + 1, hop)
    return starts if starts[-1] == last else np.append(starts, last)


@dataclasses.dataclass(frozen=True)
class Tubelets:
  """Token grid of a clip; a token is a patch in `tubelet_size` frames."""

  num_frames: int = 16
  image_size: int = 224
  tubelet_size: int = 2
  patch_size: int = 16

  @property
  def grid(self) -> tuple[int, int, int]:
    """Tokens along t, h and w; (8, 14, 14) by default."""
    side = self.image_size // self.patch_size
    return (self.num_frames // self.tubelet_size, side, side)

  @property
  def video_shape(self) -> tuple[int, int, int, int]:
    """Shape of a clip, (T, H, W, 3)."""
    return (self.num_frames, self.image_size, self.image_size, 3)

  @property
  def num_tokens(self) -> int:
    return int(np.prod(self.grid))

  @property
  def pixels(self) -> int:
    """Values per token; 1536 by default."""
    return 3 * self.tubelet_size * self.patch_size**2

  def patchify(self, video):
    """Cuts clips into tokens: (B, T, H, W, 3) -> (B, N, P).

    Accepts numpy and jax arrays.
    """
    t, h, w = self.grid
    pt, p = self.tubelet_size, self.patch_size
    x = video.reshape(-1, t, pt, h, p, w, p, 3)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(-1, t * h * w, self.pixels)

  def unpatchify(self, tokens):
    """Joins tokens to clips: (B, N, P) -> (B, T, H, W, 3).

    The inverse of `patchify`.
    """
    t, h, w = self.grid
    pt, p = self.tubelet_size, self.patch_size
    x = tokens.reshape(-1, t, h, w, 3, pt, p, p)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(-1, t * pt, h * p, w * p, 3)


# Frame rate at which a row of `SoundPatches` is a row of the spectrogram.
_FPS = 25


@dataclasses.dataclass(frozen=True)
class SoundPatches:
  """Token grid of a clip's sound: square patches of its mel spectrogram.

  Tokens are ordered by time, then by frequency; the P values of a token
  likewise.

  Attributes:
    num_rows: R, a multiple of the patch size. The rows are spread evenly over
      the frames of a clip, whatever its stride and frame rate: those of a token
      are heard while the same frames are seen.
    patch_size: rows and mel bands of a token, 16 as in Audio-MAE (Huang et al.
      2022) and HiCMAE (Sun et al. 2024); it divides 80.
  """

  num_rows: int
  patch_size: int = 16

  @classmethod
  def of(cls, clip: Clip, patch_size: int = 16) -> SoundPatches:
    """Returns the grid with about 80 rows a second at 25 frames a second."""
    num_patches = clip.extent / _FPS * MEL_RATE / patch_size
    return cls(patch_size * max(round(num_patches), 1), patch_size)

  @property
  def grid(self) -> tuple[int, int]:
    """Tokens along time and frequency."""
    p = self.patch_size
    return self.num_rows // p, schema.NUM_MELS // p

  @property
  def num_tokens(self) -> int:
    return int(np.prod(self.grid))

  @property
  def values(self) -> int:
    """P, values per token."""
    return self.patch_size**2

  def window(
    self, mel: np.ndarray, first_row: float, num_rows: float
  ) -> np.ndarray:
    """Returns the sound of a clip at this grid's number of rows.

    Each row is the mean over its share of time. Beyond the spectrogram its
    first or last row is repeated, as a clip repeats its last frame.

    Args:
      mel: float32 (M, 80), spectrogram of a record or a video; not empty.
      first_row: row of the clip's first frame, which need not be whole.
      num_rows: rows that the clip lasts, likewise.

    Returns:
      float32 (R, 80). Its first row is centred on the first frame's time.
    """
    step = num_rows / self.num_rows
    # Row i of the spectrogram lasts from i to i + 1 on this scale.
    edges = first_row + 0.5 + step * (np.arange(self.num_rows + 1) - 0.5)
    first = int(np.floor(edges[0]))
    rows = np.arange(first, int(np.ceil(edges[-1])) + 1)
    values = mel[np.clip(rows, 0, len(mel) - 1)].astype(float)
    sums = np.cumsum(values, axis=0) - values  # of all rows before each
    whole, part = np.divmod(edges - first, 1)
    whole = whole.astype(int)
    until = sums[whole] + part[:, None] * values[whole]
    return (np.diff(until, axis=0) / step).astype(np.float32)

  def patchify(self, mel):
    """Cuts sound into tokens: (B, R, 80) in [-4, 4] -> (B, N, P) in [-1, 1].

    Accepts numpy and jax arrays.
    """
    (t, f), p = self.grid, self.patch_size
    x = mel.reshape(-1, t, p, f, p).transpose(0, 1, 3, 2, 4)
    return x.reshape(-1, t * f, p * p) / MAX_VALUE


def by_colour(tokens):
  """Splits a token's pixels by colour: (..., P) -> (..., 3, P / 3)."""
  return tokens.reshape(*tokens.shape[:-1], 3, -1)


def imagenet_normalised(tokens):
  """Normalises tokens (..., P) in [0, 1] as VideoMAE checkpoints expect.

  Accepts float32 numpy and jax arrays, like `Tubelets.patchify`.
  """
  mean, std = (
    np.asarray(x, np.float32)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD)
  )
  return ((by_colour(tokens) - mean) / std).reshape(tokens.shape)
