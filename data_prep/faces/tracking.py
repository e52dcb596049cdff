"""Tracks the faces of a video, with one smoothed square crop per frame.

Detectors run on every few frames and wherever a face was lost or a shot
begins; between them a face is tracked by its mesh, which the mesh model finds
around the face's last place. Nothing is kept from one video to the next.

Axes: T frames of a track, H W source pixels. Boxes are x0, y0, x1, y1 in
source pixels, where pixel (i, j) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np

from data_prep.faces import boxes, shots
from data_prep.faces.face_finder import Detection, FaceFinder
from data_prep.faces.meshes import NUM_LANDMARKS as NUM_LANDMARKS
from data_prep.faces.meshes import MeshStore
from data_prep.faces.track import OpenTrack, Track, frames_of, plausible_rate

# Times are in seconds: a face moves as fast at any frame rate. In the comments,
# the same in frames at 30 per second.
#
# Detectors run this often in a shot: 8 frames, also at 24 per second.
DETECT_SECS = 0.3
# In videos of at least MIN_RATE frames per second the mesh model runs on every
# second frame of a shot and on its last; between them landmarks are
# interpolated. In slower videos it runs on every frame.
MESH_STEPS = 2
MIN_RATE = 20.0
# Longest gap without the face that is bridged: 12 frames.
MAX_GAP_SECS = 0.4
# data_prep cuts longer tracks, since an open track takes memory for each frame.
MAX_TRACK_SECS = 180.0
# Most bytes of memory for the landmarks of finished tracks, those of one face
# for an hour; a file takes the rest.
MAX_MESH_BYTES = 100 << 20
MIN_FACE_PIXELS = 24
# Faces tracked at a time: each costs a run of the mesh model per frame, and a
# crowd shows nobody well. The largest are tracked.
MAX_FACES = 8


def find_tracks(
  frames: Iterable[np.ndarray],
  finder: FaceFinder,
  frame_rate: float = 30.0,
  min_frames: int = 15,
  min_face_pixels: int = MIN_FACE_PIXELS,
  max_track_secs: float = math.inf,
) -> list[Track]:
  """Tracks every face of a video, in one pass that keeps no frame.

  A cut, or a change of the frame size, ends all tracks. A track also ends when
  its face is not seen for more than `MAX_GAP_SECS`; a face that returns starts
  a new track. A face that turns away or is covered is tracked by the detectors
  as long as they see it, without landmarks in these frames. Another face that
  takes its place (in a dissolve, in a cut within one room, or when people
  cross) starts another track. At most `MAX_FACES` are tracked at a time, the
  largest first. Tracks that are short, small, mostly without a mesh or mostly
  of unsure detections are dropped.

  Args:
    frames: uint8 (H, W, 3) RGB frames in order.
    finder: the models.
    frame_rate: frames per second of the video; 0 where it is unknown.
    min_frames: shortest track that is kept.
    min_face_pixels: smallest median height of a face that is kept.
    max_track_secs: longer tracks are cut into consecutive ones.

  Returns:
    The tracks by first frame, then left to right.
  """
  rate = plausible_rate(frame_rate)
  max_gap = frames_of(MAX_GAP_SECS, rate)
  max_frames = max_track_secs * rate
  active: list[OpenTrack] = []
  store = MeshStore(MAX_MESH_BYTES)
  # Each with the left edge of its first box.
  kept: list[tuple[float, Track]] = []

  def end(tracks: list[OpenTrack]) -> None:
    # Filtered at once, so that a long video's false detections do not pile up.
    for track in tracks:
      _cut_dissolve(track, active, max_gap)
    parts = [part for track in tracks for part in track.split_by_person()]
    kept.extend(
      (float(track.observed[0].box[0]), track.finish(store))
      for track in parts
      if track.is_face(min_frames, min_face_pixels)
    )

  steps = MESH_STEPS if frame_rate >= MIN_RATE else 1
  # A multiple of the frames that are visited.
  detect_steps = steps * max(round(DETECT_SECS * rate / steps), 1)
  is_cut = shots.CutTest()
  shot_start = 0
  # Number of the last frame in which faces were looked for: others are skipped.
  last_visited = -1
  previous: np.ndarray | None = None
  i = -1
  for i, frame in enumerate(frames):
    if is_cut(frame):
      if last_visited < i - 1:
        _follow(active, previous, i - 1, last_visited, finder)
      end(active)
      active, shot_start, last_visited = [], i, i - 1
    # When people cross, only every frame tells their faces apart.
    if (i - shot_start) % steps and not _are_close(active):
      previous = frame
      continue
    _follow(active, frame, i, last_visited, finder)
    if last_visited < i - 1:
      # A face absent now may have been visible in the frame before.
      absent = [track for track in active if track.last_frame == last_visited]
      _follow(absent, previous, i - 1, last_visited, finder)
    # A track without any mesh is most likely no face, and can wait.
    with_mesh = [track for track in active if track.num_meshes]
    is_lost = any(track.last_frame < i for track in with_mesh)
    if (i - shot_start) % detect_steps == 0 or is_lost or not with_mesh:
      active += _detect(active, frame, i, last_visited, steps, rate, finder)
    end([track for track in active if i - track.last_frame > max_gap])
    active = [track for track in active if i - track.last_frame <= max_gap]
    for number, track in enumerate(active):
      if i - track.first_frame >= max_frames and track.last_frame == i:
        active[number] = track.successor()
        end([track])
    last_visited, previous = i, frame
  if last_visited < i:
    _follow(active, previous, i, last_visited, finder)
  end(active)
  kept.sort(key=lambda item: (item[1].first_frame, item[0]))
  return [
    dataclasses.replace(track, track_id=track_id)
    for track_id, (_, track) in enumerate(kept)
  ]


# --- Following faces ----------------------------------------------------------


def _are_close(active: list[OpenTrack]) -> bool:
  """Returns whether two faces are within a face's size of each other."""
  near = [boxes.square_around(track.box, 2.0) for track in active]
  return any(
    boxes.overlap(a, b) > 0 for a, b in itertools.combinations(near, 2)
  )


def _cut_dissolve(
  track: OpenTrack, others: list[OpenTrack], max_gap: int
) -> None:
  """Drops frames of a dissolve into the track that took its place, if any."""
  for other in others:
    gap = other.first_frame - track.last_frame
    if (
      0 < gap <= max_gap
      and track.num_meshes
      and other.num_meshes
      and boxes.overlap(track.box, other.observed[0].box) > 0.2
    ):
      track.cut_dissolve(other)
      return


def _follow(
  active: list[OpenTrack],
  frame: np.ndarray,
  i: int,
  last_visited: int,
  finder: FaceFinder,
) -> None:
  """Adds the mesh in frame i to the tracks seen in the last visited frame."""
  taken: list[np.ndarray] = []
  for track in active:
    if track.last_frame < last_visited:
      continue
    mesh = finder.mesh_3d(frame, track.box)
    if mesh is None:
      continue
    box = boxes.bounds(mesh[:, :2])
    # Two tracks on one face: the older one keeps it.
    if any(boxes.overlap(box, other) > 0.5 for other in taken):
      continue
    if track.add_mesh(frame, i, mesh, goes_on=True):
      taken.append(box)


def _detect(
  active: list[OpenTrack],
  frame: np.ndarray,
  i: int,
  last_visited: int,
  steps: int,
  rate: float,
  finder: FaceFinder,
) -> list[OpenTrack]:
  """Runs the detectors; extends the matching tracks and returns new ones."""
  detections = finder.detect(frame)
  # The largest come first: at most MAX_FACES are tracked.
  detections.sort(key=lambda d: (not d.confident, -boxes.square(d.box)[2]))
  track_of = _match(active, detections, i)
  for track in active:
    if track.last_frame == i and track not in track_of.values():
      track.confident.append(False)

  started: list[OpenTrack] = []
  for number, detection in enumerate(detections):
    track = track_of.get(number)
    has_room = len(active) + len(started) < MAX_FACES
    if track is not None:
      track.confident.append(detection.confident)
      if track.last_frame == i:
        if track.observed[-1].mesh is not None:
          track.pairs.append((detection.box, track.box))
        continue
    elif not has_room:
      continue
    mesh = finder.mesh_3d(frame, detection.box)
    box = detection.box if mesh is None else boxes.bounds(mesh[:, :2])
    visible = [t.box for t in active + started if t.last_frame == i]
    if any(boxes.overlap(box, other) > 0.4 for other in visible):
      continue
    if track is not None and track.add_detection(
      frame, i, detection.box, mesh, goes_on=track.last_frame >= last_visited
    ):
      continue
    # No track fits, or another face has taken the place of the track's.
    if has_room:
      track = OpenTrack(steps, rate)
      track.confident.append(detection.confident)
      track.add_detection(frame, i, detection.box, mesh, goes_on=False)
      started.append(track)
  return started


def _match(
  active: list[OpenTrack], detections: list[Detection], i: int
) -> dict[int, OpenTrack]:
  """Returns matched tracks by the index of their detection.

  Pairs are matched greedily, by falling overlap. Tracks that are seen in frame
  i come first: their face may have taken the place of a lost one. Each track
  and each detection is matched at most once.
  """
  pairs = [
    (
      track.last_frame < i,
      -boxes.overlap(track.box, detection.box),
      t,
      d,
    )
    for t, track in enumerate(active)
    for d, detection in enumerate(detections)
  ]
  pairs.sort()
  track_of: dict[int, OpenTrack] = {}
  for _, overlap, t, d in pairs:
    if (
      -overlap > 0.2
      and d not in track_of
      and active[t] not in track_of.values()
    ):
      track_of[d] = active[t]
  return track_of
