"""One face through one shot: an open track while it lasts, then a `Track`.

Axes: T frames of a track, H W source pixels. Boxes are x0, y0, x1, y1 in
source pixels, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools

import numpy as np

from data_prep.faces import boxes, quality, shots
from data_prep.faces.meshes import Meshes, MeshStore, PackedMesh

# Times are in seconds: a face moves as fast at any frame rate. In the comments,
# the same in frames at 30 per second.
#
# Rate assumed for unknown and implausible ones, and the plausible range: files
# of a variable rate may announce 1,000 or 90,000.
USUAL_RATE = 30.0
RATE_RANGE = (1.0, 240.0)
# A mesh is compared with the last looks at its face, LOOK_SECS apart: 4 frames.
LOOKS = 3
LOOK_SECS = 0.13
# Sharpness is measured this often in a track: 10 frames. The first time is half
# of it after the first mesh, which a cut or a dissolve may blur.
SHARPNESS_SECS = 0.33
# A track is dropped if fewer of its frames have a mesh, or if fewer of its
# detections are confident.
MIN_MESH_RATIO = 0.5
MIN_CONFIDENT_RATIO = 0.5
# Standard deviations of the Gaussians that smooth a track's box: 4 and 12
# frames. A face's size changes slower than its place.
CENTRE_SECS = 4 / 30
SIDE_SECS = 12 / 30


def frames_of(secs: float, frame_rate: float) -> int:
  """Returns the whole number of frames nearest to a time, at least 1.

  Args:
    secs: the time in seconds.
    frame_rate: frames per second; 30 is used instead of an implausible one.
  """
  return max(round(secs * plausible_rate(frame_rate)), 1)


def plausible_rate(frame_rate: float) -> float:
  """Returns a frame rate, or 30 if it is outside RATE_RANGE."""
  least, most = RATE_RANGE
  return frame_rate if least <= frame_rate <= most else USUAL_RATE


@dataclasses.dataclass(frozen=True)
class Track:
  """One face through one shot.

  Attributes:
    track_id: number within the video, by first frame, then left to right.
    first_frame: number of its first frame in the video.
    boxes: float32 (T, 4), the smoothed square crop; may reach past the frame.
    meshes: landmarks of each frame, float32 (478, 2), x and y in source pixels;
      NaN in frames where the mesh was not found.
    quality: in [0, 1], see `quality.combine`.
    quality_terms: float32 (4,), each in [0, 1], as `schema.QUALITY_TERMS`; see
      the module `quality`.
    continues: True if this track is the rest of one that was cut for its
      length; that one ends in the frame before.
  """

  track_id: int
  first_frame: int
  boxes: np.ndarray
  meshes: Meshes
  quality: float
  quality_terms: np.ndarray
  continues: bool = False

  def __len__(self) -> int:
    return len(self.boxes)

  @property
  def landmarks(self) -> np.ndarray:
    """All of `meshes`, unpacked: float32 (T, 478, 2), 3.8 KB a frame."""
    return self.meshes.unpacked()

  @property
  def side(self) -> float:
    """Median side of the crops in source pixels."""
    return float(np.median(self.boxes[:, 2] - self.boxes[:, 0]))


@dataclasses.dataclass(slots=True)
class Sighting:
  """A face in one frame: its mesh, or only the box of the detector.

  Attributes:
    frame: number of the frame.
    box: (4,), bounds of the mesh, else the box of the detector.
    mesh: its landmarks; None without a mesh.
    look: int8 (468,), see `shots.Look`; None without a mesh.
    frontality: `quality.frontality` times `quality.uprightness`; None without
      a mesh.
    sharpness: see `quality.sharpness`; None where it was not measured.
    first_sharpness: of the first mesh, which may be blurred.
  """

  frame: int
  box: np.ndarray
  mesh: PackedMesh | None = None
  look: np.ndarray | None = None
  frontality: float | None = None
  sharpness: float | None = None
  first_sharpness: float | None = None


class OpenTrack:
  """A track while its video is read.

  Args:
    steps: distance in frames between runs of the mesh model.
    rate: frames per second.
  """

  def __init__(self, steps: int, rate: float) -> None:
    self._steps = steps
    self._rate = rate
    self.observed: list[Sighting] = []
    # For each frame in which the detectors ran.
    self.confident: list[bool] = []
    # Box of the detector and bounds of the mesh, of frames that have both.
    self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
    self.num_meshes = 0
    # The last looks, LOOK_SECS apart, and the frame of the latest.
    self._looks: collections.deque[shots.Look] = collections.deque(maxlen=LOOKS)
    self._look_frame = 0
    self._sharpness_frame: int | None = None
    # Both tracks of a cut share the frame at the cut: the first frame here is
    # the last of the predecessor, or the last frame the first of the successor.
    self.continues = self.has_successor = False

  @property
  def first_frame(self) -> int:
    return self.observed[0].frame

  @property
  def last_frame(self) -> int:
    return self.observed[-1].frame

  @property
  def box(self) -> np.ndarray:
    return self.observed[-1].box

  def add_mesh(
    self, frame: np.ndarray, i: int, mesh: np.ndarray, goes_on: bool
  ) -> bool:
    """Adds the mesh in frame i, unless it is that of another face.

    Args:
      frame: uint8 (H, W, 3), RGB.
      i: number of the frame.
      mesh: (478, 3).
      goes_on: True if the face was seen in the last visited frame.

    Returns:
      True if the mesh was added; False if something covers the face or another
      face has taken its place.
    """
    box = boxes.bounds(mesh[:, :2])
    look = shots.Look(frame, mesh[:, :2])
    # After frames without a mesh one matching look is enough: the latest may
    # show what hid the face, or the face half turned.
    goes_on = goes_on and self._looks and self.observed[-1].look is not None
    num_looks = len(self._looks)
    needed = num_looks - num_looks // 2 if goes_on else min(num_looks, 1)
    # The latest first; no more are compared than needed.
    matches = (
      not before.is_other_face(frame, look) for before in reversed(self._looks)
    )
    if sum(itertools.islice(filter(None, matches), needed)) < needed:
      return False
    look_steps = frames_of(LOOK_SECS, self._rate)
    if not self._looks or i - self._look_frame >= look_steps:
      self._looks.append(look)
      self._look_frame = i
    sighting = Sighting(i, box, PackedMesh.of(mesh[:, :2]), look.normalised())
    sighting.frontality = quality.frontality(mesh) * quality.uprightness(mesh)
    sharpness_steps = frames_of(SHARPNESS_SECS, self._rate)
    if self._sharpness_frame is None:
      self._sharpness_frame = i - sharpness_steps // 2
    if i - self._sharpness_frame >= sharpness_steps:
      sighting.sharpness = quality.sharpness(frame, mesh)
      self._sharpness_frame = i
    elif not self.num_meshes:
      # Used only if no other is measured.
      sighting.first_sharpness = quality.sharpness(frame, mesh)
    self.num_meshes += 1
    self.observed.append(sighting)
    return True

  def add_detection(
    self,
    frame: np.ndarray,
    i: int,
    box: np.ndarray,
    mesh: np.ndarray | None,
    goes_on: bool,
  ) -> bool:
    """Adds a detection: its mesh, see `add_mesh`, or else its box."""
    if mesh is None:
      self.observed.append(Sighting(i, box))
      return True
    is_added = self.add_mesh(frame, i, mesh, goes_on)
    if is_added:
      self.pairs.append((box, boxes.bounds(mesh[:, :2])))
    return is_added

  def split_by_person(self) -> list[OpenTrack]:
    """Returns a track for each person that the mesh followed, in order.

    A person's track ends at the last frame that shows the person; frames of a
    dissolve that match neither person are in no track.
    """
    rows = self._rows_with_look()
    if not rows:
      return [self]
    spans = shots.person_spans(
      np.array([self.observed[row].frame for row in rows]),
      np.array([self.observed[row].look for row in rows]),
      self._rate,
    )
    if len(spans) == 1:
      return [self]
    parts = []
    for start, stop in spans:
      part = copy.copy(self)
      # The first and the last person keep frames without a mesh.
      first = rows[start] if start else 0
      last = rows[stop - 1] + 1 if stop < len(rows) else len(self.observed)
      part.observed = self.observed[first:last]
      part.num_meshes = stop - start
      part.continues = self.continues and not parts
      part.has_successor = self.has_successor and stop == len(rows)
      parts.append(part)
    return parts

  def cut_dissolve(self, later: OpenTrack) -> None:
    """Drops the frames of a dissolve from this track and from the next one.

    In a dissolve, the last frames of this track and the first of the one that
    takes its place show both faces.
    """
    mine, its = self._rows_with_look(), later._rows_with_look()
    sightings = [self.observed[row] for row in mine]
    sightings += [later.observed[row] for row in its]
    transition = shots.find_transition(
      np.array([sighting.frame for sighting in sightings]),
      np.array([sighting.look for sighting in sightings]),
      len(mine),
      self._rate,
    )
    if transition is None:
      return
    end, start = transition
    self.observed = self.observed[: mine[end - 1] + 1]
    self.num_meshes = end
    later.observed = later.observed[its[start - len(mine)] :]
    later.num_meshes = len(its) + len(mine) - start

  def successor(self) -> OpenTrack:
    """Returns a track that continues from the last frame of this one."""
    successor = copy.copy(self)
    successor.observed = self.observed[-1:]
    successor.num_meshes = int(self.observed[-1].mesh is not None)
    successor.confident = self.confident[-1:]
    successor._looks = self._looks.copy()
    successor.continues = self.has_successor = True
    return successor

  def _rows_with_look(self) -> list[int]:
    return [n for n, s in enumerate(self.observed) if s.look is not None]

  def mesh_ratio(self) -> float:
    """Returns the share of visited frames, gaps included, with a mesh."""
    num_visited = (self.last_frame - self.first_frame) // self._steps + 1
    return min(self.num_meshes / num_visited, 1.0)

  def is_face(self, min_frames: int, min_face_pixels: int) -> bool:
    """Returns True if the track is long, large and certain enough to keep."""
    heights = [s.box[3] - s.box[1] for s in self.observed]
    return (
      self.last_frame - self.first_frame + 1 >= min_frames
      and float(np.median(heights)) >= min_face_pixels
      and self.mesh_ratio() >= MIN_MESH_RATIO
      and float(np.mean(self.confident)) >= MIN_CONFIDENT_RATIO
    )

  def finish(self, store: MeshStore) -> Track:
    """Returns the finished track, its gaps bridged and its boxes smoothed.

    Its `track_id` is 0; `tracking.find_tracks` numbers the tracks.

    Args:
      store: stores the landmarks.
    """
    num_frames = self.last_frame - self.first_frame + 1
    rows = np.array([s.frame - self.first_frame for s in self.observed])
    squares = np.array([self._square_of(s) for s in self.observed])
    all_rows = np.arange(num_frames)
    x, y, side = (np.interp(all_rows, rows, values) for values in squares.T)
    x, y = (boxes.smooth(values, CENTRE_SECS * self._rate) for values in (x, y))
    half = boxes.CROP_RATIO / 2 * boxes.smooth(side, SIDE_SECS * self._rate)
    crops = np.stack([x - half, y - half, x + half, y + half], axis=1)

    meshes = self._meshes(num_frames)
    sharpnesses = self._values("sharpness")
    if not len(sharpnesses):
      sharpnesses = self._values("first_sharpness")
    terms = quality.terms(
      face_heights=2 * half / boxes.CROP_RATIO,
      sharpnesses=sharpnesses,
      frontalities=self._values("frontality"),
      meshes=meshes,
      steps=self._steps,
    )
    if self.has_successor:
      crops, meshes = crops[:-1], meshes.part(0, num_frames - 1)
    store.take(meshes)
    return Track(
      track_id=0,
      first_frame=self.first_frame,
      boxes=crops.astype(np.float32),
      meshes=meshes,
      quality=quality.combine(terms),
      quality_terms=terms,
      continues=self.continues,
    )

  def _meshes(self, num_frames: int) -> Meshes:
    """Returns the meshes; those of skipped frames are interpolated."""
    rows, packed, goes_on = [], [], []
    before: Sighting | None = None
    for sighting in self.observed:
      if sighting.mesh is not None:
        gap = sighting.frame - before.frame if before is not None else 0
        rows.append(sighting.frame - self.first_frame)
        packed.append(sighting.mesh)
        goes_on.append(1 < gap <= self._steps)
      before = sighting if sighting.mesh is not None else None
    return Meshes(num_frames, rows, packed, goes_on)

  def _values(self, name: str) -> np.ndarray:
    """Returns the values of a Sighting's attribute that are not None."""
    values = [getattr(sighting, name) for sighting in self.observed]
    return np.array([value for value in values if value is not None])

  def _square_of(self, sighting: Sighting) -> tuple[float, float, float]:
    """Returns centre x, centre y and side of the square around a mesh.

    Without a mesh they are estimated from the detector's box: by the median
    offset and ratio between the two in other frames of the track.
    """
    x, y, side = boxes.square(sighting.box)
    if sighting.mesh is not None:
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
    # If no frame of this track has both: the mean of the sample videos.
    dx, dy, ratio = np.median(shifts, axis=0) if shifts else (0.0, -0.05, 1.1)
    return x + dx * side, y + dy * side, ratio * side
