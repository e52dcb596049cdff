"""Writes the data set of probe.py: windows of footage with landmark labels.

  python -m tests.benchmarks.probe_data FOLDER

writes FOLDER/dataset with data_prep. Its split `pretrain` holds the first part
of each video except one, in records of at most 64 frames. Its split `windows`
holds short windows of all videos, each as a video of its own, named
`VIDEO/early|late/START`; no window crosses the boundary of the parts.

Axes: T frames, W windows, L landmarks.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]

SHARED = TESTS.parents[1] / "shared" / "videos"
# Video -> the man in it; cropped01 shows the man of video01 at another time.
MEN = {
  "carphone_pristine": "carphone",
  "video01": "video01",
  "cropped01": "video01",
  "video03": "video03",
}
HELD_OUT = "video03"
EARLY = 0.6  # fraction of a video for pretraining and for fitting probes
WINDOW, HOP = 16, 8  # frames; half and a quarter of a second
BLOCK = 32  # frames that the bootstrap resamples together
SEGMENT = 64

LABELS = ("head_turn", "mouth_opening", "eye_opening")

# MediaPipe's landmark numbers. Right and left are the person's own.
NOSE_TIP = 1
RIGHT_EDGE, LEFT_EDGE = 234, 454
UPPER_LIP, LOWER_LIP, RIGHT_CORNER, LEFT_CORNER = 13, 14, 78, 308
# Corner, corner, then pairs of points on the upper and the lower lid.
EYES = (
  (33, 133, (160, 144), (158, 153)),
  (362, 263, (385, 380), (387, 373)),
)


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


# --- Footage ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Footage:
  """The longest face track of a video, as data_prep crops it.

  Attributes:
    name: of the video.
    record: all frames of the track as one record, without label maps.
    label_maps: uint8 (T, 224, 224).
    landmarks: float64 (T, L, 2), in pixels of the crop; NaN without a mesh.
  """

  name: str
  record: "schema.Record"  # noqa: F821
  label_maps: np.ndarray
  landmarks: np.ndarray

  def cut(self, start: int, stop: int, **changes):
    """Returns the record of frames `start` to `stop`, with changed fields."""
    from marlin_jax.records import schema

    part = slice(start, stop)
    return dataclasses.replace(
      self.record,
      frames=list(self.record.frames[part]),
      regions=self.record.regions[part],
      parsing=schema.compress_parsing(self.label_maps[part]),
      boxes=self.record.boxes[part],
      start_secs=start / self.record.fps,
      **changes,
    )


def read_footage(dataset: Path) -> list[Footage]:
  """Reads the longest tracks of a prepared data set, and finds landmarks."""
  from data_prep.faces.face_finder import FaceFinder
  from marlin_jax.data import prepared_dataset
  from marlin_jax.records import schema

  source = prepared_dataset.RecordSource(
    prepared_dataset.open_dataset(str(dataset), "train")
  )
  tracks: dict[tuple, list] = {}
  for i in range(len(source)):
    record = source[i][1]
    tracks.setdefault((record.video_id, record.track_id), []).append(record)
  longest: dict[str, list] = {}
  for (video_id, _), track in tracks.items():
    other = longest.get(video_id, ())
    if sum(map(len, track)) > sum(map(len, other)):
      longest[video_id] = sorted(track, key=lambda record: record.segment)
  footage = []
  with FaceFinder() as finder:
    for video_id, track in sorted(longest.items()):
      frames = np.concatenate(
        [schema.decode_frames(r, range(len(r))) for r in track]
      )
      print(f"landmarks of {len(frames)} frames of {video_id}", flush=True)
      record = dataclasses.replace(
        track[0],
        frames=[jpeg for r in track for jpeg in r.frames],
        regions=np.concatenate([r.regions for r in track]),
        boxes=np.concatenate([r.boxes for r in track]),
        parsing=b"",
      )
      maps = np.concatenate([schema.decode_parsing(r) for r in track])
      name = Path(video_id).stem
      footage.append(Footage(name, record, maps, meshes(finder, frames)))
  return footage


def meshes(finder, crops: np.ndarray) -> np.ndarray:
  """Finds landmarks in face crops, uint8 (T, S, S, 3) -> float64 (T, L, 2)."""
  from data_prep.faces import boxes, tracking

  size = crops.shape[1]
  margin = size * (1 - 1 / boxes.CROP_RATIO) / 2
  box = np.array([margin, margin, size - margin, size - margin])
  landmarks = np.full((len(crops), tracking.NUM_LANDMARKS, 2), np.nan)
  for out, crop in zip(landmarks, crops, strict=True):
    mesh = finder.mesh(crop, box)
    if mesh is not None:
      out[:] = mesh
  return landmarks


# --- Data set -----------------------------------------------------------------


def window_labels(landmarks: np.ndarray, usual_eyes: float) -> dict:
  """Returns the labels of a window.

  These are mean head turn, mean mouth opening, and lowest eye opening.

  Args:
    landmarks: (T, L, 2).
    usual_eyes: opening of the open eyes, which the label is relative to.

  Returns:
    Label -> float32 (1,); NaN if less than half of the frames have a mesh.
  """
  has_mesh = np.isfinite(landmarks[:, 0, 0])
  if has_mesh.mean() < 0.5:
    values = [np.nan] * len(LABELS)
  else:
    seen = landmarks[has_mesh]
    values = [
      head_turn(seen).mean(),
      mouth_opening(seen).mean(),
      eye_opening(seen).min() / usual_eyes,
    ]
  return {
    name: np.float32([value])
    for name, value in zip(LABELS, values, strict=True)
  }


def windows_of(footage: Footage) -> dict[str, list]:
  """Returns the records of all windows of a video, by id."""
  num, cut = len(footage.record), round(EARLY * len(footage.record))
  usual_eyes = np.nanpercentile(eye_opening(footage.landmarks), 90)
  windows = {}
  for part, first, end in (("early", 0, cut), ("late", cut, num)):
    for start in range(first, end - WINDOW + 1, HOP):
      stop = start + WINDOW
      name = f"{footage.name}/{part}/{start:04d}"
      windows[name] = [
        footage.cut(
          start,
          stop,
          video_id=name,
          track_id=0,
          segment=0,
          subject_id=f"{footage.name}/{part}/{(start - first) // BLOCK}",
          labels=window_labels(footage.landmarks[start:stop], usual_eyes),
        )
      ]
  return windows


def pretraining_of(footage: Footage) -> list:
  """Returns the pretraining records of a video, of its first part."""
  end = round(EARLY * len(footage.record))
  bounds = np.linspace(0, end, -(-end // SEGMENT) + 1).astype(int)
  return [
    footage.cut(
      *span,
      video_id=footage.name,
      track_id=0,
      segment=segment,
      subject_id=footage.name,
      labels=dict.fromkeys(LABELS, np.float32([np.nan])),
    )
    for segment, span in enumerate(zip(bounds, bounds[1:], strict=False))
  ]


def write(folder: Path) -> None:
  """Writes FOLDER/dataset, and FOLDER/windows.png, which shows windows of it.

  Raises:
    SystemExit: data_prep failed; it has printed the reason.
  """
  from data_prep import assets, prepare
  from data_prep.sources.listing import VALUE, Label
  from tests.support import made_dataset

  videos = folder / "videos"
  videos.mkdir(parents=True, exist_ok=True)
  sources = [assets.fetch("carphone_pristine.mp4")]
  sources += [SHARED / f"{name}.mp4" for name in MEN]
  for path in sources:
    if path.exists():
      shutil.copyfile(path, videos / path.name)
  code = prepare.main(["--input", str(videos), "--output", str(folder / "all")])
  if code:
    sys.exit(code)
  records, splits = {}, {}
  footage = read_footage(folder / "all")
  for one in footage:
    if one.name != HELD_OUT:
      records[one.name] = pretraining_of(one)
      splits[one.name] = "pretrain"
    windows = windows_of(one)
    records |= windows
    splits |= dict.fromkeys(windows, "windows")
  draw(footage, records, folder / "windows.png")
  shutil.rmtree(folder / "making", ignore_errors=True)
  made_dataset.make(
    folder / "making",
    records,
    splits,
    labels={name: Label(VALUE, (name,)) for name in LABELS},
  )
  (folder / "making").rename(folder / "dataset")


def draw(footage: list[Footage], windows: dict[str, list], path: Path) -> None:
  """Draws windows with their labels, a row per video."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  from marlin_jax.records.schema import decode_frames

  columns = 8
  figure, axes = pyplot.subplots(
    len(footage), columns, figsize=(16, 1.2 * len(footage)), squeeze=False
  )
  for row, one in zip(axes, footage, strict=True):
    own = [name for name in windows if name.startswith(f"{one.name}/")]
    places = np.linspace(0, len(own) - 1, columns).astype(int)
    for axis, place in zip(row, places, strict=True):
      (record,) = windows[own[place]]
      picture = np.concatenate(
        decode_frames(record, (0, WINDOW // 2, WINDOW - 1))[:, ::2, ::2], axis=1
      )
      values = [float(value[0]) for value in record.labels.values()]
      axis.imshow(picture)
      axis.set_title(
        f"{own[place]}\nturn {values[0]:.2f} mouth {values[1]:.2f} eyes "
        f"{values[2]:.2f}",
        fontsize=7,
      )
      axis.set_axis_off()
  figure.tight_layout()
  figure.savefig(path, dpi=100)
  pyplot.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path)
  write(parser.parse_args().folder)


if __name__ == "__main__":
  main()
