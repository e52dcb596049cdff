"""Detects cuts between shots, and places where a track changes its person.

A *look* is the appearance of a face in one frame: its brightness at the points
of the mesh, see `Look`. Looks are compared by their median difference.
"""

from __future__ import annotations

import math

import numpy as np

from data_prep.faces import boxes

# Thumbnails and looks are scaled to this standard deviation, in grey levels.
CONTRAST = 40.0


class CutTest:
  """Function of each frame of a video in order: True if it begins a new shot.

  Frames are uint8 (H, W, 3). A frame of a new size begins a shot.
  """

  # At a cut, the mean difference of small thumbnails, normalised for light,
  # exceeds MIN_DIFFERENCE grey levels and MIN_RATIO times the usual difference.
  # Within 60 frames of 42 shots it is at most 13, except for a flash; between
  # two videos it is 25 or more in 99 of 100 pairs.
  MIN_DIFFERENCE = 18.0
  MIN_RATIO = 4.0
  # Pixels above WHITE are overexposed and not compared. If the share of others
  # is below MIN_EXPOSED, the frame is a flash, not a cut.
  WHITE = 250.0
  MIN_EXPOSED = 0.2

  def __init__(self) -> None:
    self._previous: np.ndarray | None = None
    self._usual = 0.0
    self._shape: tuple[int, ...] = ()

  def __call__(self, frame: np.ndarray) -> bool:
    import cv2

    is_resized = self._shape not in ((), frame.shape)
    self._shape = frame.shape
    # Averaging all pixels of a large frame would cost more than a detector.
    small = cv2.resize(frame, (160, 160), interpolation=cv2.INTER_NEAREST)
    small = cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    previous, self._previous = self._previous, small
    if previous is None:
      return False
    difference = self._difference(previous, small)
    threshold = max(self.MIN_DIFFERENCE, self.MIN_RATIO * self._usual)
    is_cut = is_resized or difference > threshold
    # A cut says nothing about the motion within a shot.
    if not is_cut:
      self._usual += 0.2 * (difference - self._usual)
    return is_cut

  def _difference(self, before: np.ndarray, after: np.ndarray) -> float:
    if max(before.max(), after.max()) >= self.WHITE:
      is_exposed = (np.maximum(before, after) < self.WHITE).all(axis=-1)
      if is_exposed.mean() < self.MIN_EXPOSED:
        return 0.0
      before, after = before[is_exposed], after[is_exposed]
    before, after = (
      CONTRAST * (values - values.mean()) / (values.std() + 1)
      for values in (before, after)
    )
    return float(np.abs(before - after).mean())


# A look samples a square picture of LOOK_SIZE pixels, whose side is LOOK_RATIO
# times the longer side of the face: 70 pixels.
LOOK_SIZE = 112
LOOK_RATIO = 1.6
# Standard deviations, in these pixels, of the band-pass filter of a look.
# Coarser detail is light and shade, finer detail is noise and focus.
FINE_SIGMA, COARSE_SIGMA = 1.0, 8.0
# Points of the mesh without the pupils.
NUM_POINTS = 468
# Added to a face's contrast, in grey levels, so that noise is not amplified.
MIN_CONTRAST = 0.25

# A mesh has jumped to another face if more than COVERED of the look differs by
# more than OTHER_FACE, and more than COVERED of the thumbnail at the face's old
# place by more than OTHER_PLACE.
OTHER_FACE = 10.0
OTHER_PLACE = 8.0
COVERED = 0.7

# Two stretches of a track show two people if every look of the one differs from
# every look of the other by more than OTHER_PERSON. So do 99.3% of 2,850 pairs
# of people in stretches of 20 frames; a dissolve has several places to test, of
# which the clearest counts. So does one person who turns by 30 degrees and
# stays there. At a fifth of the light the differences are 5% to 10% smaller.
OTHER_PERSON = 13.0
# If any look before a change differs from any after it by SAME_PERSON or less,
# one person turned and came back. Of 1,176 pairs of people in 8 s each, none
# has two looks that differ by less than 10; of 9 people whom a turn seems to
# change, 6 have two that differ by 9 or less. The BLENDED looks next to the
# change are not compared, nor looks that are less than a dissolve apart.
SAME_PERSON = 9.0
BLENDED = 4
# Most looks on each side of a change that are compared.
MAX_COMPARED = 100
# Distance in seconds of the looks that are compared, number of looks in a
# stretch (MIN_STRETCH at the ends of a track), and numbers of looks between two
# stretches: none at a cut, more for dissolves of up to two seconds.
LOOK_SECS = 0.13
STRETCH = 5
MIN_STRETCH = 4
BETWEEN = (0, 2, 6, 11, 15)
# A look belongs to a stretch if its difference from it is at most this share of
# that from the other: in a dissolve, at most a third is the other face.
OWN_SHARE = 0.5
# Longest time in which looks match neither stretch in a dissolve of two
# seconds. If it is longer, a person turned, and nothing is left out.
MAX_NEITHER_SECS = 1.0


class Look:
  """Brightness of a face at the points of its mesh, band-pass filtered.

  The points follow pose and expression. The filter keeps brows, eyes, nose,
  lips and beard, and removes most of what the direction of the light changes.

  Args:
    frame: uint8 (H, W, 3), RGB.
    points: (478, 2), the mesh in source pixels.
  """

  def __init__(self, frame: np.ndarray, points: np.ndarray) -> None:
    self._box = boxes.bounds(points)
    self._detail = _detail(frame, points)
    self._thumbnail = _thumbnail(frame, self._box)

  def normalised(self) -> np.ndarray:
    """Returns the look, normalised for strength of light, int8 (468,)."""
    values = np.round(CONTRAST * self._detail.normalised)
    return np.clip(values, -127, 127).astype(np.int8)

  def is_other_face(self, frame: np.ndarray, later: Look) -> bool:
    """Returns True if the mesh has jumped to another face since this look.

    That happens in a cut between two shots of one room, or when people cross.
    A face that moves keeps its look. A face that is mostly covered, which
    shifts the mesh, keeps the thumbnail at its old place. If both differ, it is
    another face.

    Args:
      frame: frame of `later`.
      later: look of the mesh, a few frames after this one.
    """
    if self._detail.difference(later._detail) <= OTHER_FACE:
      return False
    at_old_place = _thumbnail(frame, self._box)
    return self._thumbnail.difference(at_old_place) > OTHER_PLACE


class _Brightness:
  """Grey levels, float32 (N,), to be compared whatever the light.

  Attributes:
    values: the grey levels.
    normalised: float32 (N,), less their mean, over their contrast.
  """

  def __init__(self, values: np.ndarray) -> None:
    self.values = values
    self._contrast = float(values.std()) + MIN_CONTRAST
    self.normalised = (values - values.mean()) / self._contrast

  def difference(self, other: _Brightness) -> float:
    """Returns the largest difference of the 1 - COVERED most similar values."""
    rank = int((1 - COVERED) * len(self.values))
    # Either the light has changed, or what covers the face, and the contrast.
    contrast = max(self._contrast, other._contrast)
    return CONTRAST * min(
      float(np.partition(np.abs(difference), rank)[rank])
      for difference in (
        self.normalised - other.normalised,
        (self.values - other.values) / contrast,
      )
    )


def _thumbnail(frame: np.ndarray, box: np.ndarray) -> _Brightness:
  """Returns the picture in a box (4,), 16 x 16 grey levels."""
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  sx, sy = (x1 - x0) / 64, (y1 - y0) / 64
  face = boxes.sampled(frame, (sx, x0), (sy, y0), 64, cv2.INTER_LINEAR)
  face = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
  face = cv2.resize(face, (16, 16), interpolation=cv2.INTER_AREA)
  return _Brightness(face.ravel())


def _detail(frame: np.ndarray, points: np.ndarray) -> _Brightness:
  """Returns the detail at each of 468 points; see `Look`."""
  import cv2

  points = np.asarray(points[:NUM_POINTS], np.float32)
  x0, y0, x1, _ = boxes.square_around(boxes.bounds(points), LOOK_RATIO)
  scale = (x1 - x0) / (2 * LOOK_SIZE)
  # Averaging blocks of 2 x 2: sampling alone picks single pixels.
  face = boxes.sampled(
    frame,
    (scale, x0),
    (scale, y0),
    2 * LOOK_SIZE,
    cv2.INTER_LINEAR,
    cv2.BORDER_REPLICATE,
  )
  # Float before the average, so that dark faces keep their detail.
  face = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
  face = cv2.resize(face, (LOOK_SIZE, LOOK_SIZE), interpolation=cv2.INTER_AREA)
  detail = cv2.GaussianBlur(face, (0, 0), FINE_SIGMA)
  # A quarter of the size: a wide Gaussian is slow.
  shade = cv2.resize(face, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
  shade = cv2.GaussianBlur(shade, (0, 0), COARSE_SIGMA / 4)
  places = (points - np.float32([x0, y0])) / np.float32(2 * scale) - 0.5
  shade = _sample(shade, (places + 0.5) / 4 - 0.5)
  return _Brightness(_sample(detail, places) - shade)


def _sample(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Interpolates a picture (H, W) at places (N, 2), x and y: float32 (N,)."""
  import cv2

  x, y = np.ascontiguousarray(places.T)[:, None]
  return cv2.remap(
    picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
  )[0]


def person_spans(
  frames: np.ndarray, looks: np.ndarray, frame_rate: float
) -> list[tuple[int, int]]:
  """Splits the looks of a track by person.

  The stretches of looks before and after a place show one person if any look of
  the one resembles any of the other. Adjacent stretches reveal cuts; stretches
  up to two seconds apart reveal dissolves. Looks between two people that
  resemble neither are left out.

  Args:
    frames: int (N,), ascending numbers of the frames.
    looks: int8 (N, 468), see `Look.normalised`.
    frame_rate: frames per second.

  Returns:
    (start, stop) of the looks of each person, in order.
  """
  rows = _sparse(frames, frame_rate)
  reach = max(BETWEEN) + 2 * STRETCH
  distances = _distances(looks[rows], reach)
  spans = []
  waiting = [(0, len(looks))]
  while waiting:
    start, stop = waiting.pop()
    first, last = np.searchsorted(rows, (start, stop))
    change = _change(distances, int(first), int(last))
    if change is None:
      spans.append((start, stop))
      continue
    stretches = [rows[stretch] for stretch in change]
    old, new = _boundary(looks, *stretches)
    if frames[new] - frames[old - 1] > MAX_NEITHER_SECS * frame_rate:
      old, _ = _boundary(looks, *stretches, own_share=1.0)
      new = old
    waiting += [(start, old), (new, stop)]
  spans.sort()
  merged = spans[:1]
  for start, stop in spans[1:]:
    first, end = merged[-1]
    if _are_same(looks, rows, (first, end), (start, stop)):
      merged[-1] = first, stop
    else:
      merged.append((start, stop))
  return merged


def _are_same(
  looks: np.ndarray,
  rows: np.ndarray,
  before: tuple[int, int],
  after: tuple[int, int],
) -> bool:
  """Returns True if the looks before and after a change are of one person.

  Args:
    looks: int8 (N, 468).
    rows: ascending rows of looks that are LOOK_SECS apart.
    before, after: (start, stop) of the looks before and after.
  """
  first, end, start, stop = np.searchsorted(rows, [*before, *after])
  old, new = np.arange(first, end - BLENDED), np.arange(start + BLENDED, stop)
  if not (len(old) and len(new)):
    return False
  old, new = (i[:: math.ceil(len(i) / MAX_COMPARED)] for i in (old, new))
  new_looks = looks[rows[new]].astype(np.int16)
  for i in old:
    later = new_looks[new - i > max(BETWEEN)]
    differences = np.median(np.abs(later - looks[rows[i]]), axis=1)
    if differences.min(initial=np.inf) <= SAME_PERSON:
      return True
  return False


def _distances(looks: np.ndarray, reach: int) -> np.ndarray:
  """Returns the median difference of looks i and i + 1 + j: (N, reach).

  Beyond the last look it is inf.
  """
  looks = looks.astype(np.int16)
  distances = np.full((len(looks), reach), np.inf, np.float32)
  for i in range(len(looks) - 1):
    others = looks[i + 1 : i + 1 + reach]
    distances[i, : len(others)] = np.median(np.abs(others - looks[i]), axis=1)
  return distances


def _change(
  distances: np.ndarray, first: int, last: int
) -> tuple[slice, slice] | None:
  """Returns the two stretches that differ most among looks[first:last].

  Returns None if they all show one person.
  """
  best, strongest = None, OTHER_PERSON
  for between in BETWEEN:
    for i in range(first + MIN_STRETCH, last - between - MIN_STRETCH + 1):
      before = slice(max(i - STRETCH, first), i)
      after = slice(i + between, min(i + between + STRETCH, last))
      least = min(
        distances[row, after.start - row - 1 : after.stop - row - 1].min()
        for row in range(before.start, before.stop)
      )
      if least > strongest:
        best, strongest = (before, after), least
  return best


def find_transition(
  frames: np.ndarray, looks: np.ndarray, num_old: int, frame_rate: float
) -> tuple[int, int] | None:
  """Finds the transition between two tracks, of which one replaced the other.

  Args:
    frames: int (N,), ascending numbers of the frames.
    looks: int8 (N, 468), the first track's, then the second's.
    num_old: number of looks of the first track.
    frame_rate: frames per second.

  Returns:
    The end of the first person's looks, at most `num_old`, and the start of the
    second one's, at least `num_old`; None if both tracks show one person.
  """
  rows = _sparse(frames, frame_rate)
  first = int(np.searchsorted(rows, num_old))
  # From before a dissolve, and from the end of the second track.
  old_rows = rows[max(first - STRETCH - BETWEEN[-2], 0) : first][:STRETCH]
  new_rows = rows[first:][-STRETCH:]
  if not len(new_rows):
    return None
  between = np.abs(looks[old_rows].astype(np.int16)[:, None] - looks[new_rows])
  if np.median(between, axis=-1).min() <= OTHER_PERSON:
    return None
  if _are_same(looks, rows, (0, num_old), (num_old, len(looks))):
    return None
  end, start = _boundary(looks, old_rows, new_rows)
  return min(end, num_old), max(start, num_old)


def _sparse(frames: np.ndarray, frame_rate: float) -> np.ndarray:
  """Returns rows of frames that are at least LOOK_SECS apart, int (M,)."""
  step = max(round(LOOK_SECS * frame_rate), 1)
  rows: list[int] = []
  for row, frame in enumerate(frames):
    if not rows or frame - frames[rows[-1]] >= step:
      rows.append(row)
  return np.array(rows, int)


def _boundary(
  looks: np.ndarray,
  old_rows: np.ndarray,
  new_rows: np.ndarray,
  own_share: float = OWN_SHARE,
) -> tuple[int, int]:
  """Returns the end of one person's looks and the start of the next one's.

  Args:
    looks: int8 (N, 468).
    old_rows: ascending rows of looks of the first person.
    new_rows: ascending rows of looks of the second.
    own_share: see OWN_SHARE.
  """
  start, stop = old_rows[0], new_rows[-1] + 1
  span = looks[start:stop].astype(np.int16)
  old, new = (
    np.min(
      [np.median(np.abs(span - looks[row]), axis=1) for row in rows], axis=0
    )
    for rows in (old_rows, new_rows)
  )
  not_old = np.flatnonzero(old > own_share * new)
  not_new = np.flatnonzero(new > own_share * old)
  end = int(start + not_old[0])
  return end, max(int(start + not_new[-1]) + 1, end)
