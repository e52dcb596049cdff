"""Chooses the tracks of one person among those of a video."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data_prep.faces import boxes
from data_prep.faces.tracking import Track


def largest(tracks: Sequence[Track]) -> list[Track]:
  """Returns the track with the largest side x length, as a list.

  A track that was cut for its length is returned, and counts, as all its parts.
  The list is empty if there is no track.
  """
  faces: list[list[Track]] = []
  for track in sorted(tracks, key=lambda track: track.first_frame):
    before = [face for face in faces if _goes_on(face[-1], track)]
    if before:
      max(before, key=lambda face: _overlap(face[-1], track)).append(track)
    else:
      faces.append([track])
  return max(
    faces,
    key=lambda face: sum(track.side * len(track) for track in face),
    default=[],
  )


def _goes_on(track: Track, later: Track) -> bool:
  end = track.first_frame + len(track)
  return (
    later.continues and end == later.first_frame and _overlap(track, later) > 0
  )


def _overlap(track: Track, later: Track) -> float:
  return boxes.overlap(track.boxes[-1], later.boxes[0])


def in_box(tracks: Iterable[Track], box: np.ndarray) -> list[Track]:
  """Returns the tracks whose crop has its centre in a box in most frames.

  Args:
    tracks: the tracks.
    box: (4,), in pixels of the frames.
  """
  return [
    track
    for track in tracks
    if np.mean([_holds(box, *boxes.square(at)[:2]) for at in track.boxes]) > 0.5
  ]


def at_points(
  tracks: Iterable[Track],
  secs: Sequence[float],
  points: Iterable[tuple[float, float, float]],
) -> list[Track]:
  """Returns the tracks that hold most of the points which fall on their frames.

  Args:
    tracks: the tracks.
    secs: times of all frames of the video, in order.
    points: times in seconds, x and y in pixels.
  """
  of_frame = {}
  for at, x, y in points:
    # The last frame shown by then; times are rounded.
    of_frame[max(bisect.bisect_right(secs, at + 1e-3) - 1, 0)] = x, y
  kept = []
  for track in tracks:
    end = track.first_frame + len(track)
    hits = [
      _holds(track.boxes[i - track.first_frame], *point)
      for i, point in of_frame.items()
      if track.first_frame <= i < end
    ]
    if hits and np.mean(hits) > 0.5:
      kept.append(track)
  return kept


def numbered(tracks: Iterable[Track]) -> list[Track]:
  """Returns the tracks with numbers from 0 on."""
  return [
    dataclasses.replace(track, track_id=number)
    for number, track in enumerate(tracks)
  ]


def _holds(box: np.ndarray, x: float, y: float) -> bool:
  return bool(box[0] <= x <= box[2] and box[1] <= y <= box[3])
