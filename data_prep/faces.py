"""Detect, track, one smoothed square crop per track.

Detectors run on every few frames and wherever a face was lost or a shot
begins; between them a face is followed by its mesh, looked for around its last
place. Nothing is kept from one video to the next.

Axes: T frames of a track, H W source pixels. Boxes are x0, y0, x1, y1 in
source pixels, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import Self

import numpy as np

from data_prep import mediapipe_tasks
from marlin_jax.records import FRAME_SIZE

NUM_LANDMARKS = 478

# Crop side over mesh height: resembles the paper's framing.
CROP_RATIO = 1.25
# Detectors run on every such frame of a shot.
DETECT_STEPS = 5
# A face that is missed for at most so many frames is bridged.
MAX_GAP = 12
MIN_FACE_PIXELS = 24
# Faces followed at a time: each costs a run of the mesh model per frame, and a
# crowd shows nobody well.
MAX_FACES = 8
# Share of a track's frames with a mesh, and of its detections that are
# believed, below which it is dropped.
MIN_MESH_RATIO = 0.5
MIN_BELIEVED_RATIO = 0.5
# Each model and the score from which its detection is believed. The full-range
# model misses faces that fill the frame; the short-range one misses those below
# about 8% of its width, and gives a cartoon animal 0.6 where people have 0.69
# and more.
DETECTORS = (
  ("face_detector.tflite", 0.65),
  ("face_detection_full_range_sparse.tflite", 0.5),
)
# The mesh of a real face is 0.8 to 1.2 times as high as the detector's box.
MESH_HEIGHT_RANGE = (0.65, 1.8)
# Standard deviations in frames of the Gaussians that smooth a track's box. A
# face's size changes slower than its place.
CENTRE_SIGMA = 4.0
SIDE_SIGMA = 12.0


@dataclasses.dataclass(frozen=True)
class Track:
  """One face through one shot.

  Attributes:
    track_id: number within the video, by first frame, then left to right.
    first_frame: number of its first frame in the video.
    boxes: float32 (T, 4), the smoothed square crop; may reach past the frame.
    landmarks: float32 (T, 478, 2), x and y in source pixels; NaN in frames
      where the mesh was not found.
    quality: in [0, 1]: share of frames with a mesh, times the median crop side
      over 224 where that is below 1 (an enlarged crop shows less).
  """

  track_id: int
  first_frame: int
  boxes: np.ndarray
  landmarks: np.ndarray
  quality: float

  def __len__(self) -> int:
    return len(self.boxes)


@dataclasses.dataclass(frozen=True)
class Detection:
  """What a detector reports.

  Attributes:
    box: float64 (4,).
    score: the detector's, in [0.5, 1].
    believed: whether this detector is seldom wrong at that score.
  """

  box: np.ndarray
  score: float
  believed: bool


class FaceFinder:
  """The detectors and the mesh model; use as a context manager.

  It keeps no state between calls, so one finder serves any number of videos.
  Faces below about 5% of the frame's width are not found.

  Raises:
    assets.AssetError: a model file could not be had.
    RuntimeError: a system library is missing.
  """

  def __init__(self) -> None:
    with contextlib.ExitStack() as stack:
      self._detectors = [
        (
          stack.enter_context(
            mediapipe_tasks.open_task("FaceDetector", asset_name)
          ),
          believed_score,
        )
        for asset_name, believed_score in DETECTORS
      ]
      # Two, because a neighbour may stand in the same crop.
      self._landmarker = stack.enter_context(
        mediapipe_tasks.open_task(
          "FaceLandmarker", "face_landmarker.task", num_faces=2
        )
      )
      self._stack = stack.pop_all()

  def close(self) -> None:
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def detect(self, frame: np.ndarray) -> list[Detection]:
    """Finds the faces of a frame, the surest first.

    Args:
      frame: uint8 (H, W, 3), RGB.
    """
    image = mediapipe_tasks.as_image(frame)
    found = []
    for detector, believed_score in self._detectors:
      for detection in detector.detect(image).detections:
        x, y = detection.bounding_box.origin_x, detection.bounding_box.origin_y
        size = detection.bounding_box.width, detection.bounding_box.height
        score = detection.categories[0].score
        box = np.array([x, y, x + size[0], y + size[1]], np.float64)
        found.append(Detection(box, score, score >= believed_score))
    found.sort(key=lambda face: (not face.believed, -face.score))
    faces: list[Detection] = []
    for face in found:
      if all(_overlap(face.box, other.box) < 0.4 for other in faces):
        faces.append(face)
    return faces

  def mesh(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """Returns the landmarks of the face at a place.

    Args:
      frame: uint8 (H, W, 3), RGB.
      box: (4,), roughly where the face is; looked at with a margin.

    Returns:
      float32 (478, 2), x and y in source pixels, or None when there is no face
      or only one elsewhere.
    """
    height, width = frame.shape[:2]
    x, y, side = _square(box)
    x0, y0 = max(int(x - side), 0), max(int(y - side), 0)
    x1 = min(math.ceil(x + side), width)
    y1 = min(math.ceil(y + side), height)
    if x1 - x0 < 8 or y1 - y0 < 8:
      return None
    result = self._landmarker.detect(
      mediapipe_tasks.as_image(frame[y0:y1, x0:x1])
    )
    best, best_overlap = None, 0.25
    for face in result.face_landmarks:
      points = np.array([(point.x, point.y) for point in face], np.float32)
      points = points * np.float32([x1 - x0, y1 - y0]) + np.float32([x0, y0])
      bounds = _bounds(points)
      ratio = (bounds[3] - bounds[1]) / side
      if not MESH_HEIGHT_RANGE[0] < ratio < MESH_HEIGHT_RANGE[1]:
        continue
      overlap = _overlap(bounds, box)
      if overlap > best_overlap:
        best, best_overlap = points, overlap
    return best


def find_tracks(
  frames: Iterable[np.ndarray],
  finder: FaceFinder,
  min_frames: int = 15,
  min_face_pixels: int = MIN_FACE_PIXELS,
) -> list[Track]:
  """Follows every face through a video, in one pass that keeps no frame.

  A cut ends all tracks, and so does a face that is not seen for more than
  `MAX_GAP` frames. At most `MAX_FACES` are followed at a time. Tracks that are
  short, small, mostly without a mesh or not believed by the detectors are
  dropped.

  Args:
    frames: uint8 (H, W, 3) RGB frames in order, all of one size.
    finder: the models.
    min_frames: shortest track that is kept.
    min_face_pixels: smallest median height of a face that is kept.
  """
  active: list[_Sightings] = []
  kept: list[_Sightings] = []

  def end(tracks: list[_Sightings]) -> None:
    # At once, so that a long video's false detections do not pile up.
    kept.extend(t for t in tracks if t.is_face(min_frames, min_face_pixels))

  cuts = _CutTest()
  shot_start = 0
  for i, frame in enumerate(frames):
    if cuts(frame):
      end(active)
      active, shot_start = [], i
    _follow(active, frame, i, finder)
    lost = any(track.last_frame < i for track in active)
    if (i - shot_start) % DETECT_STEPS == 0 or lost or not active:
      active += _detect(active, frame, i, finder)
    end([track for track in active if i - track.last_frame > MAX_GAP])
    active = [track for track in active if i - track.last_frame <= MAX_GAP]
  end(active)
  kept.sort(key=lambda track: (track.first_frame, track.observed[0].box[0]))
  return [track.finish(track_id) for track_id, track in enumerate(kept)]


def crop_frame(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Cuts a square out and scales it, zero where it reaches past the frame.

  Args:
    frame: uint8 (H, W, 3).
    box: (4,), a square in source pixels; fractions are honoured, so that a
      smooth path of boxes gives a steady picture.

  Returns:
    uint8 (224, 224, 3).

  Raises:
    ValueError: the box is empty or not finite.
  """
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  if not (math.isfinite(x0 + y0 + x1 + y1) and x1 > x0 and y1 > y0):
    raise ValueError(f"box {box} is not x0 < x1, y0 < y1 in source pixels")
  # Area averaging at any fraction of a pixel: sample at least once per source
  # pixel, then average whole blocks.
  n = math.ceil(max(x1 - x0, y1 - y0) / FRAME_SIZE - 1e-6)
  n = max(n, 1)
  size = n * FRAME_SIZE
  sx, sy = (x1 - x0) / size, (y1 - y0) / size
  out = cv2.warpAffine(
    frame,
    np.array([[sx, 0, x0 + sx / 2 - 0.5], [0, sy, y0 + sy / 2 - 0.5]]),
    (size, size),
    flags=cv2.WARP_INVERSE_MAP
    | (cv2.INTER_LINEAR if n > 1 else cv2.INTER_CUBIC),
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=0,
  )
  if n > 1:
    out = cv2.resize(
      out, (FRAME_SIZE, FRAME_SIZE), interpolation=cv2.INTER_AREA
    )
  return out


# --- Following faces ----------------------------------------------------------


@dataclasses.dataclass
class _Sighting:
  """A face in one frame: its mesh, or only the detector's box."""

  frame: int
  box: np.ndarray
  landmarks: np.ndarray | None


class _Sightings:
  """What is known of one face so far."""

  def __init__(self) -> None:
    self.observed: list[_Sighting] = []
    # One per frame in which the detectors ran.
    self.believed: list[bool] = []
    # (detector's box, mesh bounds) where both are known of one frame.
    self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

  @property
  def first_frame(self) -> int:
    return self.observed[0].frame

  @property
  def last_frame(self) -> int:
    return self.observed[-1].frame

  @property
  def box(self) -> np.ndarray:
    return self.observed[-1].box

  def mesh_ratio(self) -> float:
    """Share of the frames, bridged ones included, that have a mesh."""
    num_frames = self.last_frame - self.first_frame + 1
    return sum(s.landmarks is not None for s in self.observed) / num_frames

  def is_face(self, min_frames: int, min_face_pixels: int) -> bool:
    heights = [s.box[3] - s.box[1] for s in self.observed]
    return (
      self.last_frame - self.first_frame + 1 >= min_frames
      and float(np.median(heights)) >= min_face_pixels
      and self.mesh_ratio() >= MIN_MESH_RATIO
      and float(np.mean(self.believed)) >= MIN_BELIEVED_RATIO
    )

  def finish(self, track_id: int) -> Track:
    """Bridges the gaps and smooths the box."""
    num_frames = self.last_frame - self.first_frame + 1
    at = np.array([s.frame - self.first_frame for s in self.observed])
    squares = np.array([self._square_of(s) for s in self.observed])
    every = np.arange(num_frames)
    x, y, side = (np.interp(every, at, values) for values in squares.T)
    x, y = (_smooth(values, CENTRE_SIGMA) for values in (x, y))
    half = CROP_RATIO / 2 * _smooth(side, SIDE_SIGMA)
    boxes = np.stack([x - half, y - half, x + half, y + half], axis=1)

    landmarks = np.full((num_frames, NUM_LANDMARKS, 2), np.nan, np.float32)
    for i, sighting in zip(at, self.observed, strict=True):
      if sighting.landmarks is not None:
        landmarks[i] = sighting.landmarks
    sharpness = min(1.0, float(np.median(2 * half)) / FRAME_SIZE)
    return Track(
      track_id=track_id,
      first_frame=self.first_frame,
      boxes=boxes.astype(np.float32),
      landmarks=landmarks,
      quality=self.mesh_ratio() * sharpness,
    )

  def _square_of(self, sighting: _Sighting) -> tuple[float, float, float]:
    """Centre and side; a detector's box is brought to the mesh's measure."""
    x, y, side = _square(sighting.box)
    if sighting.landmarks is not None:
      return x, y, side
    shifts = []
    for box, bounds in self.pairs:
      box_x, box_y, box_side = _square(box)
      mesh_x, mesh_y, mesh_side = _square(bounds)
      shifts.append(
        (
          (mesh_x - box_x) / box_side,
          (mesh_y - box_y) / box_side,
          mesh_side / box_side,
        )
      )
    # The mean of the sample videos, where no frame of this track has both.
    dx, dy, ratio = np.median(shifts, axis=0) if shifts else (0.0, -0.05, 1.1)
    return x + dx * side, y + dy * side, ratio * side


def _follow(
  active: list[_Sightings], frame: np.ndarray, i: int, finder: FaceFinder
) -> None:
  """Adds the mesh of frame i to the tracks that were seen in frame i-1."""
  taken: list[np.ndarray] = []
  for track in active:
    if track.last_frame != i - 1:
      continue
    landmarks = finder.mesh(frame, track.box)
    if landmarks is None:
      continue
    box = _bounds(landmarks)
    # Two tracks on one face: the older one keeps it.
    if any(_overlap(box, other) > 0.5 for other in taken):
      continue
    taken.append(box)
    track.observed.append(_Sighting(i, box, landmarks))


def _detect(
  active: list[_Sightings], frame: np.ndarray, i: int, finder: FaceFinder
) -> list[_Sightings]:
  """Gives detections to the tracks they fit; the others start new tracks."""
  detections = finder.detect(frame)
  pairs = [
    (_overlap(track.box, detection.box), t, d)
    for t, track in enumerate(active)
    for d, detection in enumerate(detections)
  ]
  pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
  track_of: dict[int, int] = {}
  for overlap, t, d in pairs:
    if overlap > 0.2 and d not in track_of and t not in track_of.values():
      track_of[d] = t
  for t, track in enumerate(active):
    if track.last_frame == i and t not in track_of.values():
      track.believed.append(False)

  new = []
  for d, detection in enumerate(detections):
    box = detection.box
    track = active[track_of[d]] if d in track_of else _Sightings()
    track.believed.append(detection.believed)
    seen = [t.box for t in active + new if t.last_frame == i and t is not track]
    if track.observed and track.last_frame == i:
      if track.observed[-1].landmarks is not None:
        track.pairs.append((box, track.box))
      continue
    if d not in track_of and len(active) + len(new) >= MAX_FACES:
      continue
    landmarks = finder.mesh(frame, box)
    bounds = box if landmarks is None else _bounds(landmarks)
    if any(_overlap(bounds, other) > 0.4 for other in seen):
      continue
    if landmarks is not None:
      track.pairs.append((box, bounds))
    track.observed.append(_Sighting(i, bounds, landmarks))
    if d not in track_of:
      new.append(track)
  return new


class _CutTest:
  """Says whether a frame begins a new shot, from small thumbnails."""

  # Mean difference in grey levels, and how many times the usual one, between
  # two frames that do not belong together.
  MIN_DIFFERENCE = 16.0
  MIN_RATIO = 4.0

  def __init__(self) -> None:
    self._previous: np.ndarray | None = None
    self._usual = 0.0

  def __call__(self, frame: np.ndarray) -> bool:
    import cv2

    small = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    previous, self._previous = self._previous, small
    if previous is None:
      return False
    difference = float(np.abs(small - previous).mean())
    cut = difference > max(self.MIN_DIFFERENCE, self.MIN_RATIO * self._usual)
    # A cut says nothing about how much moves within a shot.
    if not cut:
      self._usual += 0.2 * (difference - self._usual)
    return cut


# --- Boxes --------------------------------------------------------------------


def _bounds(points: np.ndarray) -> np.ndarray:
  """Returns the bounding box (4,) of points (N, 2)."""
  return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _square(box: np.ndarray) -> tuple[float, float, float]:
  """Returns centre x, centre y and the longer side."""
  x0, y0, x1, y1 = (float(v) for v in box)
  return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Returns intersection over union of two boxes."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  if width <= 0 or height <= 0:
    return 0.0
  shared = width * height
  area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
  return float(shared / (area - shared))


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
  """Removes outliers, then smooths float64 (T,) with a Gaussian.

  A straight motion stays what it is, also at the ends: the series is continued
  there by its point reflection.
  """
  num = len(values)
  padded = np.pad(values, 2, mode="reflect", reflect_type="odd")
  windows = np.lib.stride_tricks.sliding_window_view(padded, 5)
  values = np.median(windows, axis=1)
  radius = min(math.ceil(3 * sigma), num - 1)
  kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  padded = np.pad(values, radius, mode="reflect", reflect_type="odd")
  return np.convolve(padded, kernel / kernel.sum(), mode="valid")
