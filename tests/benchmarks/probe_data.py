"""Windows of real footage, with labels that landmarks give; for probe.py.

Run as a program it writes FOLDER/dataset, by data_prep, in a process of its
own. Split `pretrain` holds the first part of each video but one, in records of
at most 64 frames; split `windows` holds short windows of all of it, each a
video of its own, `VIDEO/early|late/START`. None lies across the cut. One video
is held out whole.

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
# Video -> who is in it; cropped01 shows the man of video01 at another time.
MEN = {
  "carphone_pristine": "carphone",
  "video01": "video01",
  "cropped01": "video01",
  "video03": "video03",
}
HELD_OUT = "video03"
EARLY = 0.6  # share of a video that pretraining and the probes' fit may see
WINDOW, HOP = 16, 8  # frames; half a second, and half of that
BLOCK = 32  # frames that the bootstrap takes or leaves together
SEGMENT = 64

LABELS = ("head_turn", "mouth_opening", "eye_opening")

# MediaPipe's numbers. Right and left are the person's own.
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
  """Where the nose is between the sides of the face, (T, L, 2) -> (T,).

  0 in the middle, 1 over the person's left edge, -1 over the right one; taken
  along the line between both, so that tilting the head changes nothing.
  """
  across = landmarks[:, LEFT_EDGE] - landmarks[:, RIGHT_EDGE]
  nose = landmarks[:, NOSE_TIP] - landmarks[:, RIGHT_EDGE]
  return 2 * (nose * across).sum(-1) / np.square(across).sum(-1) - 1


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
  """Height of the gap between the lips over its width, (T, L, 2) -> (T,)."""
  return _distance(landmarks, UPPER_LIP, LOWER_LIP) / _distance(
    landmarks, RIGHT_CORNER, LEFT_CORNER
  )


def eye_opening(landmarks: np.ndarray) -> np.ndarray:
  """Eye aspect ratio, the mean of both eyes, (T, L, 2) -> (T,).

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
  """The longest face track of a video, as data_prep cuts it out.

  Attributes:
    name: of the video.
    record: all of its frames in one, without label maps.
    label_maps: uint8 (T, 224, 224).
    landmarks: float64 (T, L, 2), in the crop; NaN where there is no mesh.
  """

  name: str
  record: "records.Record"  # noqa: F821
  label_maps: np.ndarray
  landmarks: np.ndarray

  def cut(self, start: int, stop: int, **changes):
    """The record of some frames."""
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
  """Reads a prepared data set, and finds the mesh of each face in it."""
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
  found = []
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
      found.append(Footage(name, record, maps, meshes(finder, frames)))
  return found


def meshes(finder, crops: np.ndarray) -> np.ndarray:
  """Landmarks in face crops, uint8 (T, S, S, 3) -> float64 (T, L, 2)."""
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
  """What is true of a window: means of turn and mouth, the eyes' least opening.

  Args:
    landmarks: (T, L, 2).
    usual_eyes: opening of the person's open eyes, which a blink is relative to.

  Returns:
    float32 (1,) by label; NaN where less than half of the frames have a mesh.
  """
  known = np.isfinite(landmarks[:, 0, 0])
  if known.mean() < 0.5:
    values = [np.nan] * len(LABELS)
  else:
    seen = landmarks[known]
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
  """The records of all windows of a video, by id."""
  num, cut = len(footage.record), round(EARLY * len(footage.record))
  usual_eyes = np.nanpercentile(eye_opening(footage.landmarks), 90)
  found = {}
  for part, first, end in (("early", 0, cut), ("late", cut, num)):
    for start in range(first, end - WINDOW + 1, HOP):
      stop = start + WINDOW
      name = f"{footage.name}/{part}/{start:04d}"
      found[name] = [
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
  return found


def pretraining_of(footage: Footage) -> list:
  """The records of a video's first part."""
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
  """Writes FOLDER/dataset, and FOLDER/windows.png, which shows what is in it.

  Raises:
    SystemExit: data_prep could not prepare the videos; it has said why.
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
  """A row of windows of each video, with their labels."""
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
