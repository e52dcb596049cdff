"""Pictures of what a network sees, makes and looks at: numpy in, files out.

Axes: V views, B clips, T frames, H W pixels, N tokens (ordered t h w).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUFFIXES = (".png", ".gif", ".mp4")
_HIDDEN = 128  # grey
_MARGIN = 4
_CAPTION = 22
# From none to most: black, violet, red, orange, pale yellow.
_HEAT = np.array(
  [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)],
  np.float32,
)
# Of the heat over the picture, for none and most.
_HEAT_OPACITY = (0.35, 0.75)
# A few tokens draw far more attention than all others: they would leave the
# rest in the dark.
_HEAT_PERCENTILES = (1, 99)


class Views(NamedTuple):
  """The same clips, shown in several ways.

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
  """What is there, what the encoder sees, what the decoder makes of it.

  Args:
    video: uint8 (B, T, H, W, 3).
    visible: bool (B, N).
    reconstruction: float (B, T, H, W, 3); cut off at 0 and 1.
    grid: tokens along t, h, w.
    norm_pix: the network predicts normalised tokens, and `reconstruction` shows
      them with their true mean and deviation; the caption says so.
  """
  _, num_frames, height, width, _ = video.shape
  t, h, w = grid
  seen = visible.reshape(-1, t, h, w)
  for axis, times in ((1, num_frames // t), (2, height // h), (3, width // w)):
    seen = np.repeat(seen, times, axis)
  hidden = np.where(seen[..., None], video, np.uint8(_HIDDEN))
  made = (np.clip(reconstruction, 0, 1) * 255).round().astype(np.uint8)
  # A network that predicts normalised tokens knows neither: without this
  # remark it would look better than it is.
  name = "reconstruction (true mean, std)" if norm_pix else "reconstruction"
  return Views(
    ("original", "seen by the encoder", name), np.stack([video, hidden, made])
  )


def heat_map(
  video: np.ndarray, weights: np.ndarray, grid: tuple[int, int, int], name: str
) -> Views:
  """The clips, and beside them the same with a number per token as heat.

  The scale runs from black for little to pale yellow for much, cut off at the
  first and the last percentile of all numbers, which the caption gives as
  multiples of their mean.

  Args:
    video: uint8 (B, T, H, W, 3).
    weights: float (B, N), not negative.
    grid: tokens along t, h, w.
    name: of what is shown.
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
  """uint8 (T, H, W, 3) under a heat of float (t, h, w) in [0, 1]."""
  heat = np.stack(
    [_scaled_up(token_map, clip.shape[1:3]) for token_map in level]
  )
  heat = heat.repeat(len(clip) // len(level), axis=0)[..., None]
  place = np.linspace(0, 1, len(_HEAT))
  colours = np.concatenate(
    [np.interp(heat, place, channel) for channel in _HEAT.T], axis=-1
  )
  opacity = np.interp(heat, (0, 1), _HEAT_OPACITY)
  # Over grey, so that every colour is the scale's.
  grey = clip.mean(-1, keepdims=True)
  mixed = (1 - opacity) * grey + opacity * colours
  return mixed.round().astype(np.uint8)


def _scaled_up(token_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """float (h, w) -> (H, W), smoothly."""
  image = Image.fromarray(token_map.astype(np.float32))
  return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def one_after_another(views: Views, frame_numbers: np.ndarray) -> Views:
  """Joins the clips of one video into a single one.

  Args:
    views: of B clips.
    frame_numbers: int (B, T), the frames' numbers in the video. What was shown
      before is left out: the last clip may overlap the one before it, and a
      clip longer than the video repeats its last frame.
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
    views: what to show.
    path: where to; its suffix decides: a still of six frames (.png) or an
      animation (.gif, .mp4). Its folder is made where it is missing.
    frame_numbers: see `one_after_another`.
    fps: frames per second.

  Raises:
    ValueError: the suffix is none of SUFFIXES.
    OSError: it cannot be written.
  """
  if path.suffix not in SUFFIXES:
    raise ValueError(f"{path} ends with none of {', '.join(SUFFIXES)}")
  path.parent.mkdir(parents=True, exist_ok=True)
  joined = one_after_another(views, frame_numbers)
  if path.suffix == ".png":
    Image.fromarray(picture(joined)).save(path)
  else:
    # So that time-lapses, and videos with broken times, can be watched.
    save_animation(joined, path, fps=min(max(fps, 1.0), 120.0))


def picture(views: Views, *, num_frames: int = 6) -> np.ndarray:
  """A still: for each clip a row per view, frames from left to right.

  Args:
    views: what to show.
    num_frames: how many of the T frames to show at most.

  Returns:
    uint8 (rows, columns, 3).
  """
  total = views.frames.shape[2]
  num_frames = min(num_frames, total)
  chosen = np.linspace(0, total - 1, num_frames).round().astype(int)
  rows = []
  for clip in range(views.frames.shape[1]):
    for name, video in zip(views.names, views.frames[:, clip], strict=True):
      row = beside(list(video[chosen]))
      rows += [caption(name, row.shape[1]), row]
    rows.append(blank(_MARGIN, rows[-1].shape[1]))
  return np.concatenate(rows)


def save_animation(views: Views, path: Path, *, fps: float) -> None:
  """Writes a looping GIF or an MP4: the views side by side, a row per clip.

  Args:
    views: what to show.
    path: where to; its suffix decides.
    fps: frames per second; a GIF's are rounded to hundredths of a second.

  Raises:
    OSError: it cannot be written.
  """
  width = views.frames.shape[4]
  captions = beside([caption(name, width) for name in views.names])
  frames = []
  for time in range(views.frames.shape[2]):
    rows = []
    for clip in range(views.frames.shape[1]):
      rows += [captions, beside(list(views.frames[:, clip, time]))]
    frames.append(np.concatenate(rows))
  if path.suffix == ".mp4":
    _save_mp4(frames, path, fps)
  else:
    _save_gif(frames, path, fps)


def _save_gif(frames: list[np.ndarray], path: Path, fps: float) -> None:
  first, *others = map(Image.fromarray, frames)
  first.save(
    path,
    save_all=True,
    append_images=others,
    duration=round(1000 / fps),
    loop=0,
  )


def _save_mp4(frames: list[np.ndarray], path: Path, fps: float) -> None:
  """H.264 as every player takes it: 4:2:0, even sizes, index in front."""
  import av

  if "libx264" not in av.codecs_available:
    raise OSError(
      f"{path}: this build of PyAV has no H.264 encoder (libx264); write a "
      ".gif, or install PyAV from the Python package index"
    )
  height, width = (side + side % 2 for side in frames[0].shape[:2])
  options = {"movflags": "faststart"}
  with av.open(str(path), "w", options=options) as container:
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
  """Nothing but white, uint8 (height, width, 3)."""
  return np.full((height, width, 3), 255, np.uint8)


def beside(images: list[np.ndarray]) -> np.ndarray:
  """Pictures of the same height from left to right."""
  gap = blank(images[0].shape[0], _MARGIN)
  parts = [part for image in images for part in (image, gap)]
  return np.concatenate(parts[:-1], axis=1)


def caption(text: str, width: int) -> np.ndarray:
  """A line of text, uint8 (22, width, 3)."""
  image = Image.fromarray(blank(_CAPTION, width))
  ImageDraw.Draw(image).text(
    (4, 3), text, fill=(40, 40, 40), font=ImageFont.load_default(14)
  )
  return np.asarray(image)
