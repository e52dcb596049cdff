"""Detect, track, one smoothed square crop per track.

Detectors run on every few frames and wherever a face was lost or a shot
begins; between them a face is followed by its mesh, looked for around its last
place. Nothing is kept from one video to the next.

Axes: T frames of a track, H W source pixels. Boxes are x0, y0, x1, y1 in
source pixels, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from data_prep.faces import boxes, quality, shots
from data_prep.faces.face_finder import FaceFinder

NUM_LANDMARKS = 478

# Detectors run on every such frame of a shot.
DETECT_STEPS = 8
# The mesh model runs on every such frame of a shot, and on its last; between
# them landmarks are interpolated, where a video has MIN_RATE frames a second.
MESH_STEPS = 2
MIN_RATE = 20.0
# A face that is missed for at most so many frames is bridged.
MAX_GAP = 12
MIN_FACE_PIXELS = 24
# A face is compared with that of its last meshes, a few frames apart, over
# about the length of a dissolve.
LOOKS = 3
LOOK_STEPS = 4
# Sharpness is measured at every such frame of a track, and at its first.
SHARPNESS_STEPS = 10
# Faces followed at a time: each costs a run of the mesh model per frame, and a
# crowd shows nobody well.
MAX_FACES = 8
# Share of a track's frames with a mesh, and of its detections that are
# believed, below which it is dropped.
MIN_MESH_RATIO = 0.5
MIN_BELIEVED_RATIO = 0.5
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
    quality: in [0, 1], the one number that `quality.combine` makes of them.
    quality_terms: float32 (4,), each in [0, 1], as `records.QUALITY_TERMS`; see
      the module `quality`.
  """

  track_id: int
  first_frame: int
  boxes: np.ndarray
  landmarks: np.ndarray
  quality: float
  quality_terms: np.ndarray

  def __len__(self) -> int:
    return len(self.boxes)

  @property
  def side(self) -> float:
    """The median side of its crops, in source pixels."""
    return float(np.median(self.boxes[:, 2] - self.boxes[:, 0]))


def find_tracks(
  frames: Iterable[np.ndarray],
  finder: FaceFinder,
  frame_rate: float = 30.0,
  min_frames: int = 15,
  min_face_pixels: int = MIN_FACE_PIXELS,
) -> list[Track]:
  """Follows every face through a video, in one pass that keeps no frame.

  A cut ends all tracks, and so does a face that is not seen for more than
  `MAX_GAP` frames; when it comes back it is a new track. One that turns away
  or is covered is followed by the detectors as long as they see it, without
  landmarks in these frames. Another face in its place, after a dissolve or a
  cut within one room or as people cross, is another track. At most `MAX_FACES`
  are followed at a time. Tracks that are short, small, mostly without a mesh or
  not believed by the detectors are dropped.

  Args:
    frames: uint8 (H, W, 3) RGB frames in order, all of one size.
    finder: the models.
    frame_rate: of the video, in frames per second; 0 where it is not known.
    min_frames: shortest track that is kept.
    min_face_pixels: smallest median height of a face that is kept.
  """
  active: list[_Sightings] = []
  kept: list[_Sightings] = []

  def end(tracks: list[_Sightings]) -> None:
    # At once, so that a long video's false detections do not pile up.
    kept.extend(t for t in tracks if t.is_face(min_frames, min_face_pixels))

  steps = MESH_STEPS if frame_rate >= MIN_RATE else 1
  cuts = shots.CutTest()
  shot_start = 0
  looked = -1  # the last frame that was looked at
  previous: np.ndarray | None = None
  i = -1
  for i, frame in enumerate(frames):
    if cuts(frame):
      if looked < i - 1:
        _follow(active, previous, i - 1, looked, finder)
      end(active)
      active, shot_start, looked = [], i, i - 1
    # Where people cross, every frame tells who is who.
    if (i - shot_start) % steps and not _are_close(active):
      previous = frame
      continue
    _follow(active, frame, i, looked, finder)
    if looked < i - 1:
      # Whoever is gone may have been there until then.
      gone = [track for track in active if track.last_frame == looked]
      _follow(gone, previous, i - 1, looked, finder)
    # What never had a mesh is most likely no face, and can wait.
    known = [track for track in active if track.num_meshes]
    lost = any(track.last_frame < i for track in known)
    if (i - shot_start) % DETECT_STEPS == 0 or lost or not known:
      active += _detect(active, frame, i, looked, steps, finder)
    end([track for track in active if i - track.last_frame > MAX_GAP])
    active = [track for track in active if i - track.last_frame <= MAX_GAP]
    looked, previous = i, frame
  if looked < i:
    _follow(active, previous, i, looked, finder)
  end(active)
  kept.sort(key=lambda track: (track.first_frame, track.observed[0].box[0]))
  return [track.finish(track_id) for track_id, track in enumerate(kept)]


# --- Following faces ----------------------------------------------------------


@dataclasses.dataclass
class _Sighting:
  """A face in one frame: its mesh, or only the detector's box.

  Frontality is known where there is a mesh, sharpness where it was measured.
  """

  frame: int
  box: np.ndarray
  landmarks: np.ndarray | None = None
  frontality: float | None = None
  sharpness: float | None = None


class _Sightings:
  """What is known of one face so far.

  Args:
    steps: frames from one that is looked at to the next.
  """

  def __init__(self, steps: int) -> None:
    self._steps = steps
    self.observed: list[_Sighting] = []
    # One per frame in which the detectors ran.
    self.believed: list[bool] = []
    # (detector's box, mesh bounds) where both are known of one frame.
    self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
    self.num_meshes = 0
    # Of every LOOK_STEPS-th frame, and the last one's number.
    self._looked_at = 0
    self.looks: collections.deque[shots.Look] = collections.deque(maxlen=LOOKS)

  @property
  def first_frame(self) -> int:
    return self.observed[0].frame

  @property
  def last_frame(self) -> int:
    return self.observed[-1].frame

  @property
  def box(self) -> np.ndarray:
    return self.observed[-1].box

  def add(
    self, frame: np.ndarray, i: int, mesh: np.ndarray, goes_on: bool
  ) -> bool:
    """Notes the mesh (478, 3) in frame i; returns whether it is of this face.

    If not, something has come before the face, or taken its place for good.
    `goes_on` says that the face was seen when it was last looked for.
    """
    box = boxes.bounds(mesh[:, :2])
    look = shots.Look(frame, box)
    is_other = (before.is_other_face(frame, look) for before in self.looks)
    # After a gap one that fits is enough: the last may show what hid the face.
    if self.looks and (any(is_other) if goes_on else all(is_other)):
      return False
    if not self.looks or i - self._looked_at >= LOOK_STEPS:
      self.looks.append(look)
      self._looked_at = i
    sighting = _Sighting(i, box, mesh[:, :2].copy())
    sighting.frontality = quality.frontality(mesh)
    if i % SHARPNESS_STEPS == 0 or not self.num_meshes:
      sighting.sharpness = quality.sharpness(frame, mesh)
    self.num_meshes += 1
    self.observed.append(sighting)
    return True

  def mesh_ratio(self) -> float:
    """Share of the frames looked at, bridged ones included, with a mesh."""
    num_looked_at = (self.last_frame - self.first_frame) // self._steps + 1
    return min(self.num_meshes / num_looked_at, 1.0)

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
    x, y = (boxes.smooth(values, CENTRE_SIGMA) for values in (x, y))
    half = boxes.CROP_RATIO / 2 * boxes.smooth(side, SIDE_SIGMA)
    crops = np.stack([x - half, y - half, x + half, y + half], axis=1)

    landmarks = self._landmarks(num_frames)
    terms = quality.terms(
      face_heights=2 * half / boxes.CROP_RATIO,
      sharpnesses=self._known("sharpness"),
      frontalities=self._known("frontality"),
      landmarks=landmarks,
      steps=self._steps,
    )
    return Track(
      track_id=track_id,
      first_frame=self.first_frame,
      boxes=crops.astype(np.float32),
      landmarks=landmarks,
      quality=quality.combine(terms),
      quality_terms=terms,
    )

  def _landmarks(self, num_frames: int) -> np.ndarray:
    """Returns float32 (T, 478, 2), interpolated over what was passed over."""
    landmarks = np.full((num_frames, NUM_LANDMARKS, 2), np.nan, np.float32)
    before: _Sighting | None = None
    for sighting in self.observed:
      if sighting.landmarks is None:
        before = None
        continue
      i = sighting.frame - self.first_frame
      landmarks[i] = sighting.landmarks
      gap = sighting.frame - before.frame if before is not None else 0
      if 1 < gap <= self._steps:
        for back in range(1, gap):
          share = np.float32(back / gap)
          landmarks[i - back] = (
            share * before.landmarks + (1 - share) * sighting.landmarks
          )
      before = sighting
    return landmarks

  def _known(self, name: str) -> np.ndarray:
    """Returns the values of an attribute of the sightings that have it."""
    values = [getattr(sighting, name) for sighting in self.observed]
    return np.array([value for value in values if value is not None])

  def _square_of(self, sighting: _Sighting) -> tuple[float, float, float]:
    """Centre and side; a detector's box is brought to the mesh's measure."""
    x, y, side = boxes.square(sighting.box)
    if sighting.landmarks is not None:
      return x, y, side
    shifts = []
    for box, bounds in self.pairs:
      box_x, box_y, box_side = boxes.square(box)
      mesh_x, mesh_y, mesh_side = boxes.square(bounds)
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


def _are_close(active: list[_Sightings]) -> bool:
  """Says whether two faces are within a face's size of each other."""
  near = [boxes.square_around(track.box, 2.0) for track in active]
  return any(
    boxes.overlap(a, b) > 0 for a, b in itertools.combinations(near, 2)
  )


def _follow(
  active: list[_Sightings],
  frame: np.ndarray,
  i: int,
  looked: int,
  finder: FaceFinder,
) -> None:
  """Adds the mesh of frame i to the tracks that were seen when last looked."""
  taken: list[np.ndarray] = []
  for track in active:
    if track.last_frame < looked:
      continue
    mesh = finder.mesh_3d(frame, track.box)
    if mesh is None:
      continue
    box = boxes.bounds(mesh[:, :2])
    # Two tracks on one face: the older one keeps it.
    if any(boxes.overlap(box, other) > 0.5 for other in taken):
      continue
    if track.add(frame, i, mesh, goes_on=True):
      taken.append(box)


def _detect(
  active: list[_Sightings],
  frame: np.ndarray,
  i: int,
  looked: int,
  steps: int,
  finder: FaceFinder,
) -> list[_Sightings]:
  """Gives detections to the tracks they fit; the others start new tracks."""
  detections = finder.detect(frame)
  pairs = [
    (boxes.overlap(track.box, detection.box), t, d)
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
    track = active[track_of[d]] if d in track_of else _Sightings(steps)
    track.believed.append(detection.believed)
    seen = [t.box for t in active + new if t.last_frame == i and t is not track]
    if track.observed and track.last_frame == i:
      if track.observed[-1].landmarks is not None:
        track.pairs.append((box, track.box))
      continue
    if d not in track_of and len(active) + len(new) >= MAX_FACES:
      continue
    mesh = finder.mesh_3d(frame, box)
    bounds = box if mesh is None else boxes.bounds(mesh[:, :2])
    if any(boxes.overlap(bounds, other) > 0.4 for other in seen):
      continue
    if mesh is None:
      track.observed.append(_Sighting(i, bounds))
    elif not track.add(
      frame,
      i,
      mesh,
      goes_on=bool(track.observed) and track.last_frame >= looked,
    ):
      if len(active) + len(new) >= MAX_FACES:
        continue
      track = _Sightings(steps)
      track.believed.append(detection.believed)
      track.add(frame, i, mesh, goes_on=False)
    if mesh is not None:
      track.pairs.append((box, bounds))
    if track not in active:
      new.append(track)
  return new
