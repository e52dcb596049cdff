"""Renders clips, reconstructions and attention as images and animations.

Axes: V views, B clips, T frames, H W pixels, N tokens (ordered t h w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marlin_jax.records import folders

SUFFIXES = (".png", ".gif", ".mp4")
_MASKED = 128  # grey
_MAX_GIF_FPS = 50
_MARGIN = 4
_CAPTION = 22
# From low to high: black, violet, red, orange, pale yellow.
_HEAT = np.array(
  [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)],
  np.float32,
)
# Opacity of the heat map over the frame, from low to high.
_HEAT_OPACITY = (0.35, 0.75)
# Limits of the colour scale: a few tokens receive far more attention than all
# others, which would otherwise be black.
_HEAT_PERCENTILES = (1, 99)


class Views(NamedTuple):
  """Clips rendered in several ways.

  Attributes:
    names: V captions.
    frames: uint8 (V, B, T, H, W, 3).
  """

  names: tuple[str, ...]
  frames: np.ndarray


def panels(
  video: np.ndarray,
  visible: np.ndarray,
  reconstruction: np.ndarray,
  grid: tuple[int, int, int],
  *,
  norm_pix: bool,
) -> Views:
  """Renders the original, the visible tokens and the reconstruction.

  Args:
    video: uint8 (B, T, H, W, 3).
    visible: bool (B, N).
    reconstruction: float (B, T, H, W, 3); clipped to [0, 1].
    grid: tokens along t, h, w.
    norm_pix: the network predicts normalised tokens, and `reconstruction` uses
      their true mean and deviation; the caption says so.
  """
  _, num_frames, height, width, _ = video.shape
  t, h, w = grid
  is_visible = visible.reshape(-1, t, h, w)
  for axis, times in ((1, num_frames // t), (2, height // h), (3, width // w)):
    is_visible = np.repeat(is_visible, times, axis)
  masked = np.where(is_visible[..., None], video, np.uint8(_MASKED))
  reconstructed = (np.clip(reconstruction, 0, 1) * 255).round().astype(np.uint8)
  # A network that predicts normalised tokens knows neither, and would look
  # better than it is.
  name = "reconstruction (true mean, std)" if norm_pix else "reconstruction"
  return Views(
    ("original", "seen by the encoder", name),
    np.stack([video, masked, reconstructed]),
  )


def heat_map(
  video: np.ndarray, weights: np.ndarray, grid: tuple[int, int, int], name: str
) -> Views:
  """Renders the clips, and the clips with a value per token as a heat map.

  The colour scale runs from black for low to pale yellow for high values. It is
  clipped at the first and last percentile of all values, which the caption
  gives as multiples of the mean.

  Args:
    video: uint8 (B, T, H, W, 3).
    weights: float (B, N), non-negative values.
    grid: tokens along t, h, w.
    name: name of the values in the caption.
  """
  t, h, w = grid
  weights = weights / weights.mean()
  low, high = np.percentile(weights, _HEAT_PERCENTILES)
  level = ((weights - low) / max(high - low, 1e-9)).clip(0, 1)
  heated = [
    _heated(clip, maps)
    for clip, maps in zip(video, level.reshape(-1, t, h, w), strict=True)
  ]
  return Views(
    ("original", f"{name}: {low:.2f}-{high:.3g} x mean"),
    np.stack([video, np.stack(heated)]),
  )


def _heated(clip: np.ndarray, level: np.ndarray) -> np.ndarray:
  """Overlays a clip, uint8 (T, H, W, 3), with float (t, h, w) in [0, 1]."""
  heat = np.stack(
    [_scaled_up(token_map, clip.shape[1:3]) for token_map in level]
  )
  heat = heat.repeat(len(clip) // len(level), axis=0)[..., None]
  place = np.linspace(0, 1, len(_HEAT))
  colours = np.concatenate(
    [np.interp(heat, place, channel) for channel in _HEAT.T], axis=-1
  )
  opacity = np.interp(heat, (0, 1), _HEAT_OPACITY)
  # Over grey, so that all colours are of the scale.
  grey = clip.mean(-1, keepdims=True)
  mixed = (1 - opacity) * grey + opacity * colours
  return mixed.round().astype(np.uint8)


def _scaled_up(token_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Interpolates float (h, w) to (H, W)."""
  image = Image.fromarray(token_map.astype(np.float32))
  return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def join_clips(views: Views, frame_numbers: np.ndarray) -> Views:
  """Joins the clips of one video into a single one.

  Args:
    views: views of B clips.
    frame_numbers: int (B, T), the frames' numbers in the video. Repeated frames
      are left out: the last clip may overlap the previous one, and a clip
      longer than the video repeats its last frame.
  """
  numbers = frame_numbers.reshape(-1)
  before = np.maximum.accumulate(np.append(-1, numbers[:-1]))
  frames = views.frames.reshape(
    len(views.names), 1, -1, *views.frames.shape[3:]
  )
  return views._replace(frames=frames[:, :, numbers > before])


# --- Files --------------------------------------------------------------------


def save(
  views: Views, path: Path, *, frame_numbers: np.ndarray, fps: float
) -> None:
  """Writes the clips of one video, one after another.

  Args:
    views: views of the clips.
    path: the suffix selects a still of six frames (.png) or an animation (.gif,
      .mp4). The folder is created if missing.
    frame_numbers: see `join_clips`.
    fps: frames per second.

  Raises:
    ValueError: the suffix is none of SUFFIXES.
    OSError: the file cannot be written.
  """
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise ValueError(f"{path} ends with none of {', '.join(SUFFIXES)}")
  path.parent.mkdir(parents=True, exist_ok=True)
  joined = join_clips(views, frame_numbers)
  if suffix == ".png":
    with folders.atomic_path(path) as partial:
      Image.fromarray(picture(joined)).save(partial, "png")
  else:
    # Limits that keep time-lapses and videos with broken timestamps watchable.
    save_animation(joined, path, fps=min(max(fps, 1.0), 120.0))


def picture(views: Views, *, num_frames: int = 6) -> np.ndarray:
  """Renders a still: a row per clip and view, frames from left to right.

  Args:
    views: views of the clips.
    num_frames: maximum number of frames per row.

  Returns:
    uint8 (rows, columns, 3).
  """
  total = views.frames.shape[2]
  num_frames = min(num_frames, total)
  chosen = np.linspace(0, total - 1, num_frames).round().astype(int)
  rows = []
  for clip in range(views.frames.shape[1]):
    for name, video in zip(views.names, views.frames[:, clip], strict=True):
      row = side_by_side(list(video[chosen]))
      rows += [caption(name, row.shape[1]), row]
    rows.append(blank(_MARGIN, rows[-1].shape[1]))
  return np.concatenate(rows)


def save_animation(views: Views, path: Path, *, fps: float) -> None:
  """Writes a looping GIF or an MP4: the views side by side, a row per clip.

  Args:
    views: views of the clips.
    path: the suffix selects the format.
    fps: frames per second. A GIF counts hundredths of a second: their times are
      rounded, and above 50 frames per second it shows every second or third.

  Raises:
    OSError: the file cannot be written.
  """
  width = views.frames.shape[4]
  captions = side_by_side([caption(name, width) for name in views.names])
  frames = []
  for time in range(views.frames.shape[2]):
    rows = []
    for clip in range(views.frames.shape[1]):
      rows += [captions, side_by_side(list(views.frames[:, clip, time]))]
    frames.append(np.concatenate(rows))
  save_frames(frames, path, fps=fps)


def save_frames(
  frames: Sequence[np.ndarray], path: Path, *, fps: float
) -> None:
  """Writes uint8 (H, W, 3) frames as a looping GIF or an MP4.

  Args:
    frames: the frames, at least one.
    path, fps: see `save_animation`.

  Raises:
    OSError: the file cannot be written.
  """
  with folders.atomic_path(path) as partial:
    if path.suffix.lower() == ".mp4":
      _save_mp4(frames, partial, fps)
    else:
      _save_gif(frames, partial, fps)


def _save_gif(frames: Sequence[np.ndarray], path: Path, fps: float) -> None:
  # Viewers slow down frames that last less than two hundredths of a second.
  step = math.ceil(fps / _MAX_GIF_FPS)
  first, *others = map(Image.fromarray, frames[::step])
  times = np.round(100 * step / fps * np.arange(len(others) + 2))
  first.save(
    path,
    "gif",
    save_all=True,
    append_images=others,
    duration=(10 * np.diff(times)).astype(int).tolist(),
    loop=0,
  )


def _save_mp4(frames: Sequence[np.ndarray], path: Path, fps: float) -> None:
  """Writes H.264 that all players support: 4:2:0, even sizes, index first."""
  import av

  if "libx264" not in av.codecs_available:
    raise OSError(
      "this build of PyAV has no H.264 encoder (libx264); write a "
      ".gif, or install PyAV from the Python package index"
    )
  height, width = (side + side % 2 for side in frames[0].shape[:2])
  options = {"movflags": "faststart"}
  with av.open(str(path), "w", format="mp4", options=options) as container:
    rate = Fraction(fps).limit_denominator(1000)
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": "18"}
    for pixels in frames:
      frame = blank(height, width)
      frame[: pixels.shape[0], : pixels.shape[1]] = pixels
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
    container.mux(stream.encode())


def blank(height: int, width: int) -> np.ndarray:
  """Returns a white image, uint8 (height, width, 3)."""
  return np.full((height, width, 3), 255, np.uint8)


def side_by_side(images: list[np.ndarray]) -> np.ndarray:
  """Joins images of the same height from left to right."""
  gap = blank(images[0].shape[0], _MARGIN)
  parts = [part for image in images for part in (image, gap)]
  return np.concatenate(parts[:-1], axis=1)


def caption(text: str, width: int) -> np.ndarray:
  """Renders a line of text, uint8 (22, width, 3)."""
  image = Image.fromarray(blank(_CAPTION, width))
  ImageDraw.Draw(image).text(
    (4, 3), text, fill=(40, 40, 40), font=ImageFont.load_default(14)
  )
  return np.asarray(image)
