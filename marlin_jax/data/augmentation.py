"""Parts of a record that clips show: whole frames, or random changes of them.

Axes: B clips, N frames, T tubelets, S pixels of the network's square picture,
h w patches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.records import schema

# Factors of red, green and blue in 256ths, then what is added to them.
_SAME_COLOURS = (256, 256, 256, 0, 0, 0)
# Largest shift at colour_jitter=1, of 255.
_MAX_SHIFT = 100


class View(NamedTuple):
  """Picture that a clip makes of its frames.

  Attributes:
    box: part of the frames, scaled to the whole picture.
    is_mirrored: left and right are exchanged.
    colours: factors of red, green and blue in 256ths, then what is added.
  """

  box: schema.Box = schema.WHOLE
  is_mirrored: bool = False
  colours: tuple[int, ...] = _SAME_COLOURS

  @classmethod
  def from_row(cls, row: np.ndarray) -> View:
    """Returns the view of a row of a batch; the inverse of `row`."""
    x, y, width, height, is_mirrored, *colours = row.tolist()
    box = schema.Box(x, y, width, height)
    return cls(box, bool(is_mirrored), tuple(colours))

  @property
  def row(self) -> tuple[int, ...]:
    """The view as eleven integers."""
    return (*self.box, self.is_mirrored, *self.colours)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Random changes of clips; none by default.

  A clip changes as a whole: all its frames have the same view. Region bits
  follow the pixels.

  Attributes:
    flip_ratio: share of the clips that are mirrored; the regions of the left
      and the right side are exchanged too.
    min_crop_ratio: least share of the frame's area that a clip shows; the share
      is drawn uniformly from there to 1.
    max_crop_aspect: greatest ratio of the sides of what it shows, drawn from a
      log-uniform distribution; the picture is stretched to a square.
    stride_jitter: greatest change of the stride, which is drawn uniformly.
    colour_jitter: greatest change of the factors of red, green and blue, each
      drawn uniformly around 1; up to 100 times as much, of 255, is added to
      each.
  """

  flip_ratio: float = 0.0
  min_crop_ratio: float = 1.0
  max_crop_aspect: float = 1.0
  stride_jitter: int = 0
  colour_jitter: float = 0.0

  @functools.cached_property
  def changes_view(self) -> bool:
    return dataclasses.replace(self, stride_jitter=0) != Augmentation()

  def draw_clip(self, clip: Clip, np_rng: np.random.Generator) -> Clip:
    """Returns a clip with another stride, at least 1."""
    if not self.stride_jitter:
      return clip
    low = max(clip.stride - self.stride_jitter, 1)
    high = clip.stride + self.stride_jitter
    stride = int(np_rng.integers(low, high, endpoint=True))
    return dataclasses.replace(clip, stride=stride)

  def draw_view(self, np_rng: np.random.Generator) -> View:
    """Draws the view of a clip."""
    if not self.changes_view:
      return View()
    is_mirrored = bool(np_rng.random() < self.flip_ratio)
    area = schema.FRAME_SIZE**2 * np_rng.uniform(self.min_crop_ratio, 1)
    limit = math.log(self.max_crop_aspect)
    aspect = math.exp(np_rng.uniform(-limit, limit))
    width, height = (
      min(max(round(math.sqrt(x)), 1), schema.FRAME_SIZE)
      for x in (area * aspect, area / aspect)
    )
    x, y = (
      int(np_rng.integers(schema.FRAME_SIZE - side, endpoint=True))
      for side in (width, height)
    )
    colours = _SAME_COLOURS
    if self.colour_jitter:
      change = self.colour_jitter * np_rng.uniform(-1, 1, (2, 3))
      factors, shifts = np.rint(256 * (1 + change[0])), _MAX_SHIFT * change[1]
      colours = tuple(np.rint([*factors, *shifts]).astype(int).tolist())
    return View(schema.Box(x, y, width, height), is_mirrored, colours)


def decode(
  record: schema.Record, frames: np.ndarray, views: Sequence[View], out
) -> None:
  """Decodes the frames of clips of one record.

  Args:
    record: the record.
    frames: int (B, N), frame numbers.
    views: B views.
    out: uint8 (B, N, S, S, 3), filled in place.

  Raises:
    ValueError: a frame is damaged.
  """
  if all(view == View() for view in views):
    # At once, so that a frame in several clips is decoded once.
    schema.decode_frames(
      record, frames.ravel().tolist(), out.reshape(-1, *out.shape[2:])
    )
    return
  for clip_frames, view, clip in zip(frames, views, out, strict=True):
    schema.decode_frames(record, clip_frames, clip, view.box)
    if view.is_mirrored:
      clip[:] = clip[:, :, ::-1].copy()
    if view.colours != _SAME_COLOURS:
      _recolour(clip, view.colours)


def _recolour(clip: np.ndarray, colours: Sequence[int]) -> None:
  """Changes the colours of a clip in place; see View."""
  for colour, (factor, shift) in enumerate(
    zip(colours[:3], colours[3:], strict=True)
  ):
    values = np.rint(np.arange(256) * factor / 256 + shift)
    table = values.clip(0, 255).astype(np.uint8)
    clip[..., colour] = table[clip[..., colour]]


def region_bits(
  record: schema.Record,
  frames: np.ndarray,
  views: Sequence[View],
  grid_size: int,
) -> np.ndarray:
  """Returns the region bits of the patches of clips of one record.

  The stored bits are those of 14 x 14 patches, and give those of larger patches
  that are made of them. Other grids and crops are computed from the label maps.

  Args:
    record: the record.
    frames: int (B, T), frame numbers.
    views: B views.
    grid_size: h = w, patches along a side.

  Returns:
    uint16 (B, T, h, w); bit k is set if any pixel of the patch has code k; 0 in
    a frame without a parsed face.

  Raises:
    ValueError: label maps are needed, and the record has none.
  """
  has_crops = any(view.box != schema.WHOLE for view in views)
  joined, rest = divmod(schema.GRID_SIZE, grid_size)
  if not rest and not has_crops:
    bits, parts = record.regions[frames], range(joined)
    # Faster than to reduce short axes.
    bits = functools.reduce(
      np.bitwise_or, (bits[..., i::joined, :] for i in parts)
    )
    bits = functools.reduce(
      np.bitwise_or, (bits[..., i::joined] for i in parts)
    )
  else:
    label_maps = schema.decode_parsing(record)
    bits = np.stack(
      [
        schema.region_bits(view.box.of(label_maps[rows]), grid_size)
        for rows, view in zip(frames, views, strict=True)
      ]
    )
    # Their label maps are of background alone.
    has_face = record.regions.any(axis=(1, 2))[frames]
    bits[~has_face] = 0
  for i, view in enumerate(views):
    if view.is_mirrored:
      bits[i] = schema.mirrored_bits(bits[i])
  return bits
