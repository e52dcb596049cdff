"""Tests whether one shot, or one face, gives way to another between frames."""

from __future__ import annotations

import math

import numpy as np

from data_prep.faces import boxes

# Thumbnails and looks have this standard deviation, whatever the light.
CONTRAST = 40.0


class CutTest:
  """Tests whether each frame of a video begins a new shot.

  Called with the frames, uint8 (H, W, 3), in order. One of another size than
  the frame before begins a shot.
  """

  # At a cut, small thumbnails, normalised for light, differ by more than so
  # many grey levels in the mean, and by more than so many times the usual
  # difference. Within 60 frames of 42 shots they differ by at most 13, except
  # for a flash; two videos differ by 25 and more in 99 of 100 pairs.
  MIN_DIFFERENCE = 18.0
  MIN_RATIO = 4.0
  # Overexposed pixels tell nothing. Where fewer others remain, it is a flash.
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
    is_exposed = (np.maximum(before, after) < self.WHITE).all(axis=-1)
    if is_exposed.mean() < self.MIN_EXPOSED:
      return 0.0
    before, after = (
      CONTRAST * (values - values.mean()) / (values.std() + 1)
      for values in (before[is_exposed], after[is_exposed])
    )
    return float(np.abs(before - after).mean())


# Side of the picture that a look samples, in pixels; the face's longer side
# takes 70 of them.
LOOK_SIZE = 112
LOOK_RATIO = 1.6
# Standard deviations in these pixels of the band of detail that a look keeps.
# Coarser detail is light and shade, finer detail is noise and focus.
FINE_SIGMA, COARSE_SIGMA = 1.0, 8.0
# Points of the mesh without the pupils.
NUM_POINTS = 468
# Contrast of a face, in grey levels, below which it is not amplified.
MIN_CONTRAST = 0.25

# A mesh has moved on to another face if more than 1 - COVERED of its points
# differ by more than OTHER_FACE, and of the thumbnail at its old place by more
# than OTHER_PLACE.
OTHER_FACE = 10.0
OTHER_PLACE = 8.0
COVERED = 0.7

# Two stretches of a track show two people if no two looks of them have a
# median difference of at most OTHER_PERSON. Stretches of 20 frames of two
# people have more in 99.3% of 2,850 pairs, and in a dissolve the clearest of
# all places counts. One person who turns by 30 degrees and stays there has
# more, too. At a fifth of the light the numbers are 5% to 10% lower.
OTHER_PERSON = 13.0
# If any look before a change resembles any after it by so much, both are of one
# person, who turned and came back. Of 1,176 pairs of people in 8 s each, none
# has a pair of looks below 10; of 9 people whom a turn seems to change, 6 have
# one of 9 or less. Looks that are less than a dissolve apart do not count, nor
# the ones beside the change.
SAME_PERSON = 9.0
BLENDED = 4
# The most looks of each that are compared.
MAX_COMPARED = 100
# Least distance in seconds of the looks that are compared, number of looks in a
# stretch (fewer at the ends of a track), and the numbers of looks between two
# stretches: a cut, and dissolves of up to two seconds.
LOOK_SECS = 0.13
STRETCH = 5
MIN_STRETCH = 4
BETWEEN = (0, 2, 6, 11, 15)
# A look belongs to a stretch if it differs from it at most this share of what
# it differs from the other: in a dissolve, at most a third is the other face.
OWN_SHARE = 0.5
# A dissolve of two seconds has at most so many that match neither: where there
# are more, a person turned, and nothing is left out.
MAX_NEITHER_SECS = 1.0


class Look:
  """Brightness of a face at the points of its mesh.

  Points of the mesh follow pose and expression. Only a band of detail (brows,
  eyes, nose, lips, beard) is kept, so that the direction of the light counts
  little.

  Args:
    frame: uint8 (H, W, 3), RGB.
    points: (478, 2), the mesh in source pixels.
  """

  def __init__(self, frame: np.ndarray, points: np.ndarray) -> None:
    self._box = boxes.bounds(points)
    self._detail = _detail(frame, points)
    self._thumbnail = _thumbnail(frame, self._box)

  def normalised(self) -> np.ndarray:
    """Returns the look whatever the strength of the light, int8 (468,)."""
    values = np.round(CONTRAST * _normalised(self._detail))
    return np.clip(values, -127, 127).astype(np.int8)

  def is_other_face(self, frame: np.ndarray, later: Look) -> bool:
    """Returns whether a mesh shows another face than a few frames before.

    A mesh moves on to another face that takes its place: in a cut between two
    shots of one room, or where people cross. A face that moves looks the same
    at its mesh. A face that is mostly covered, which shifts the mesh, looks the
    same at its old place. If neither holds, it is another face.

    Args:
      frame: the frame that `later` was made of.
      later: the look at the face in question.
    """
    if _difference(self._detail, later._detail) <= OTHER_FACE:
      return False
    at_old_place = _thumbnail(frame, self._box)
    return _difference(self._thumbnail, at_old_place) > OTHER_PLACE


def _difference(a: np.ndarray, b: np.ndarray) -> float:
  """Returns what the 1 - COVERED most similar values differ by at most."""
  rank = int((1 - COVERED) * len(a))
  # Either the light has changed, or what covers the face changes its contrast.
  contrast = max(_contrast(a), _contrast(b))
  return CONTRAST * min(
    float(np.partition(np.abs(difference), rank)[rank])
    for difference in (_normalised(a) - _normalised(b), (a - b) / contrast)
  )


def _normalised(values: np.ndarray) -> np.ndarray:
  return (values - values.mean()) / _contrast(values)


def _contrast(values: np.ndarray) -> float:
  return float(values.std()) + MIN_CONTRAST


def _thumbnail(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns float32 (256,): the box (4,) in 16 x 16 grey levels."""
  import cv2

  x0, y0, x1, y1 = (float(v) for v in box)
  sx, sy = (x1 - x0) / 64, (y1 - y0) / 64
  face = boxes.sampled(frame, (sx, x0), (sy, y0), 64, cv2.INTER_LINEAR)
  face = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
  return cv2.resize(face, (16, 16), interpolation=cv2.INTER_AREA).ravel()


def _detail(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Returns float32 (468,), detail in grey levels; see `Look`."""
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
  return _at(detail, places) - _at(shade, (places + 0.5) / 4 - 0.5)


def _at(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Returns float32 (N,), a picture (H, W) at places (N, 2), x and y."""
  import cv2

  x, y = np.ascontiguousarray(places.T)[:, None]
  return cv2.remap(
    picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
  )[0]


def people(
  frames: np.ndarray, looks: np.ndarray, frame_rate: float
) -> list[tuple[int, int]]:
  """Cuts the looks of a track where one person gives way to another.

  Two stretches of looks, before and after a place, are of one person if any
  look of the one resembles any of the other. Stretches with nothing between
  them tell cuts; with up to two seconds between them, dissolves. What is
  between two people and resembles neither is left out.

  Args:
    frames: int (N,), ascending numbers of the frames.
    looks: int8 (N, 468), see `Look.normalised`.
    frame_rate: frames per second.

  Returns:
    First and last + 1 of the looks of each person, in order.
  """
  rows = _sparse(frames, frame_rate)
  reach = max(BETWEEN) + 2 * STRETCH
  distances = _distances(looks[rows], reach)
  spans = []
  waiting = [(0, len(looks))]
  while waiting:
    start, stop = waiting.pop()
    first, last = np.searchsorted(rows, (start, stop))
    found = _change(distances, int(first), int(last))
    if found is None:
      spans.append((start, stop))
      continue
    stretches = [rows[stretch] for stretch in found]
    old, new = _parted(looks, *stretches)
    if frames[new] - frames[old - 1] > MAX_NEITHER_SECS * frame_rate:
      old, _ = _parted(looks, *stretches, own_share=1.0)
      new = old
    waiting += [(start, old), (new, stop)]
  spans.sort()
  people = spans[:1]
  for start, stop in spans[1:]:
    first, end = people[-1]
    if _are_same(looks, rows, (first, end), (start, stop)):
      people[-1] = first, stop
    else:
      people.append((start, stop))
  return people


def _are_same(
  looks: np.ndarray,
  rows: np.ndarray,
  before: tuple[int, int],
  after: tuple[int, int],
) -> bool:
  """Returns whether looks before and after a change are of one person.

  Args:
    looks: int8 (N, 468).
    rows: ascending rows of looks that are LOOK_SECS apart.
    before, after: first and last + 1 of the looks before and after.
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
  """Returns (N, reach): median difference of look i and look i + 1 + j.

  It is inf beyond the last look.
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
  """Returns the two stretches in looks first to last that differ most.

  None if all of them show one person.
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


def parted(
  frames: np.ndarray, looks: np.ndarray, num_old: int, frame_rate: float
) -> tuple[int, int] | None:
  """Parts the looks of two tracks, of which one took the place of the other.

  Args:
    frames: int (N,), ascending numbers of the frames.
    looks: int8 (N, 468), those of the first track before those of the second.
    num_old: number of looks of the first track.
    frame_rate: frames per second.

  Returns:
    The end of the first person's looks, at most `num_old`, and the start of the
    second one's, at least `num_old`; None where both tracks show one person.
  """
  rows = _sparse(frames, frame_rate)
  first = int(np.searchsorted(rows, num_old))
  # Before a dissolve, and as late as there is.
  old_rows = rows[max(first - STRETCH - BETWEEN[-2], 0) : first][:STRETCH]
  new_rows = rows[first:][-STRETCH:]
  if not len(new_rows):
    return None
  between = np.abs(looks[old_rows].astype(np.int16)[:, None] - looks[new_rows])
  if np.median(between, axis=-1).min() <= OTHER_PERSON:
    return None
  if _are_same(looks, rows, (0, num_old), (num_old, len(looks))):
    return None
  end, start = _parted(looks, old_rows, new_rows)
  return min(end, num_old), max(start, num_old)


def _sparse(frames: np.ndarray, frame_rate: float) -> np.ndarray:
  """Returns int (M,), rows of frames that are at least LOOK_SECS apart."""
  step = max(round(LOOK_SECS * frame_rate), 1)
  rows: list[int] = []
  for row, frame in enumerate(frames):
    if not rows or frame - frames[rows[-1]] >= step:
      rows.append(row)
  return np.array(rows, int)


def _parted(
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
