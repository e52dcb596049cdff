"""Windows of people's videos, with labels from face landmarks and regions.

Axes: W windows, V videos, T frames of a window, L landmarks, K labels.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.downstream import splits
from marlin_jax.records import schema

# Encoders are trained on `train`, and probes on both of FIT: on `val` settings
# may be compared. UNSEEN is for the scores alone.
FIT, UNSEEN = ("train", "val"), "test"
# Frames that labels are measured on: 8 of the 16 that a window covers.
LABELLED = Clip(num_frames=8, stride=2)
# Windows of a person at most, evenly spread, so that none dominates.
MAX_WINDOWS = 32
LABELS = (
  "mouth open",
  "mouth moves",
  "eyes open",
  "head turn",
  "head moves",
  "hair",
)

# MediaPipe's landmark numbers. Right and left are the person's own.
NOSE_TIP = 1
RIGHT_EDGE, LEFT_EDGE = 234, 454
UPPER_LIP, LOWER_LIP, RIGHT_CORNER, LEFT_CORNER = 13, 14, 78, 308
# Corner, corner, then pairs of points on the upper and the lower lid.
EYES = (
  (33, 133, (160, 144), (158, 153)),
  (362, 263, (385, 380), (387, 373)),
)
_NUM_LANDMARKS = 478
_HAIR = 10


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of several splits.

  Attributes:
    split: name of the split of each window, (W,).
    video, person: names, (W,).
    track, start: int (W,), see `splits.TrackWindow`.
    labels: float64 (W, K), in the order of LABELS.
    landmarks: float32 (W, D), mean and deviation over time of face landmarks.
  """

  split: np.ndarray
  video: np.ndarray
  person: np.ndarray
  track: np.ndarray
  start: np.ndarray
  labels: np.ndarray
  landmarks: np.ndarray

  def rows(self, *names: str) -> np.ndarray:
    """Returns the numbers of the windows of some splits."""
    return np.flatnonzero(np.isin(self.split, names))


# --- Labels -------------------------------------------------------------------


def head_turn(landmarks: np.ndarray) -> np.ndarray:
  """Returns the position of the nose between the sides, (T, L, 2) -> (T,).

  It is 0 in the middle, 1 at the person's left edge and -1 at the right edge,
  measured along the line between both, so that it is invariant to roll.
  """
  across = landmarks[:, LEFT_EDGE] - landmarks[:, RIGHT_EDGE]
  nose = landmarks[:, NOSE_TIP] - landmarks[:, RIGHT_EDGE]
  return 2 * (nose * across).sum(-1) / np.square(across).sum(-1) - 1


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
  """Returns height over width of the lips' gap, (T, L, 2) -> (T,)."""
  return _distance(landmarks, UPPER_LIP, LOWER_LIP) / _distance(
    landmarks, RIGHT_CORNER, LEFT_CORNER
  )


def eye_opening(landmarks: np.ndarray) -> np.ndarray:
  """Returns the eye aspect ratio, averaged over both eyes, (T, L, 2) -> (T,).

  Source: Soukupova and Cech, "Real-Time Eye Blink Detection using Facial
  Landmarks", CVWW 2016.
  """
  ratios = [
    sum(_distance(landmarks, *lids) for lids in pairs)
    / (2 * _distance(landmarks, *corners))
    for *corners, pairs in ((a, b, rest) for a, b, *rest in EYES)
  ]
  return np.mean(ratios, axis=0)


def _distance(landmarks, one: int, other: int) -> np.ndarray:
  return np.linalg.norm(landmarks[:, one] - landmarks[:, other], axis=-1)


def labels_of(landmarks: np.ndarray, regions: np.ndarray) -> np.ndarray:
  """Returns the labels of a window.

  Args:
    landmarks: (T, L, 2), in pixels of the crop.
    regions: uint16 (T, 14, 14), see `schema.Record.regions`.

  Returns:
    float64 (K,). Movements are logarithms of standard deviations: few windows
    have large ones. `hair` is the share of the patches that hair touches.
  """
  mouth, turn = mouth_opening(landmarks), head_turn(landmarks)
  width = _distance(landmarks, RIGHT_EDGE, LEFT_EDGE).mean()
  nose = landmarks[:, NOSE_TIP] / width
  return np.array(
    [
      mouth.mean(),
      np.log(mouth.std() + 0.005),
      eye_opening(landmarks).mean(),
      turn.mean(),
      np.log(np.sqrt(nose.var(axis=0).sum()) + 0.005),
      hair(regions),
    ]
  )


def hair(regions: np.ndarray) -> float:
  """Returns the share of region bits, uint16 of any shape, that have hair."""
  return ((regions >> _HAIR) & 1).mean()


# --- Windows ------------------------------------------------------------------


def meshes(finder, crops: np.ndarray) -> np.ndarray:
  """Finds landmarks in face crops, uint8 (T, S, S, 3) -> float64 (T, L, 2).

  NaN where there is no face.
  """
  from data_prep.faces import boxes

  size = crops.shape[1]
  margin = size * (1 - 1 / boxes.CROP_RATIO) / 2
  box = np.array([margin, margin, size - margin, size - margin])
  landmarks = np.full((len(crops), _NUM_LANDMARKS, 2), np.nan)
  for out, crop in zip(landmarks, crops, strict=True):
    mesh = finder.mesh(crop, box)
    if mesh is not None:
      out[:] = mesh
  return landmarks


def chosen_windows(split: splits.Split) -> list[splits.TrackWindow]:
  """Returns windows without common frames, at most MAX_WINDOWS of a person."""
  own: dict[str, list[splits.TrackWindow]] = {}
  for number, track in enumerate(split.tracks):
    starts = range(0, track.num_frames - LABELLED.extent + 1, LABELLED.extent)
    windows = (splits.TrackWindow(number, start) for start in starts)
    own.setdefault(split.people[track.video], []).extend(windows)
  chosen = []
  for windows in own.values():
    num = min(MAX_WINDOWS, len(windows))
    places = (2 * np.arange(num) + 1) * len(windows) // (2 * num)
    chosen += [windows[place] for place in places]
  return sorted(chosen)


def moments(values: np.ndarray) -> np.ndarray:
  """Returns mean and deviation over the first axis, flat: (T, ...) -> (D,)."""
  values = values.astype(np.float32)
  return np.stack([values.mean(axis=0), values.std(axis=0)]).ravel()


def measure(dataset: Path) -> Windows:
  """Measures the windows of all splits of a data set; takes minutes.

  Windows in whose frames the landmark model does not find the face are left
  out.
  """
  from data_prep.faces.face_finder import FaceFinder

  opened = [
    splits.open_split(str(dataset), name, None) for name in (*FIT, UNSEEN)
  ]
  rows = []
  with FaceFinder() as finder, tqdm(unit="window", desc="labels") as bar:
    for split in opened:
      windows = chosen_windows(split)
      bar.total = (bar.total or 0) + len(windows)
      for number, group in itertools.groupby(windows, lambda w: w.track):
        track = split.tracks[number]
        record = schema.joined(
          [split.dataset.source[i][1] for i in track.records]
        )
        for window in group:
          bar.update()
          frames = LABELLED.indices(window.start, track.num_frames)
          crops = schema.decode_frames(record, frames)
          landmarks = meshes(finder, crops)
          if not np.isfinite(landmarks).all():
            continue
          rows.append(
            Windows(
              split.name,
              split.video_ids[track.video],
              split.people[track.video],
              *window,
              labels_of(landmarks, record.regions[frames]),
              moments(landmarks / crops.shape[1]),
            )
          )
  fields = [field.name for field in dataclasses.fields(Windows)]
  return Windows(*(np.stack([getattr(row, f) for row in rows]) for f in fields))
