"""YouTube Faces (Wolf, Hassner and Maoz, CVPR 2011): folders of frames.

  frame_images_DB/NAME/K/K.FRAME.jpg     the frames of video K of a person
  frame_images_DB/NAME.labeled_faces.txt where the person's face is (optional)
  splits.txt                             ten folds of pairs, no person in two
  train_set.csv, val_set.csv             MARLIN's split (optional): path,len

MARLIN pretrains on this data set. The authors' split has 2,593 videos in train
and 633 in val, no person in both, and no video shorter than 48 frames. It is in
github.com/ControlNet/MARLIN, dataset/misc/youtube_face/. If both files lie
beside the frames, they give the split, and unlisted videos are left out.
Otherwise the official folds give a split of the same kind and nearly the same
size: people of the last two folds go to val, all others to train.

Frames have the numbers that they have in the video; at a gap tracks end.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from data_prep.sources.files import read_csv, read_text
from data_prep.sources.listing import Listing, ManifestError, Part, Row

FRAMES = "frame_images_DB"
FRAME_RATE = 24.0  # the videos' own, as the paper says
VAL_FOLDS = (9, 10)
LABELLED_FACES = ".labeled_faces.txt"
# Points of a face that are kept: enough to tell it from others.
MAX_POINTS = 16
MARLINS_SPLIT = {"train": "train_set.csv", "val": "val_set.csv"}


def read(root: Path, follow_links: bool = False) -> Listing:
  """Lists every folder of frames.

  Raises:
    ManifestError: there is no folder of frames, splits.txt is missing, or a
      person is in two folds.
  """
  folder_of_frames = root / FRAMES
  if not folder_of_frames.is_dir():
    raise ManifestError(
      f"{root} has no folder {FRAMES}; expected the unpacked YouTube Faces, "
      f"{FRAMES}/NAME/K/K.FRAME.jpg and splits.txt"
    )
  marlins = _marlins_split(root)
  folds = {} if marlins else _folds(root / "splits.txt")

  def split_of(person: str, video: str) -> str:
    if marlins:
      return marlins.get(f"{person}/{video}", "")
    return "val" if folds.get(person) in VAL_FOLDS else "train"

  rows = []
  num_unlabelled = 0
  for person in filter(Path.is_dir, folder_of_frames.iterdir()):
    faces = _labelled_faces(person.with_name(person.name + LABELLED_FACES))
    num_unlabelled += not faces
    rows += [
      Row(
        0,
        video.relative_to(root).as_posix(),
        subject_id=person.name,
        split=split_of(person.name, video.name),
        frame_rate=FRAME_RATE,
        part=Part(face_at=faces.get(video.name, ())),
      )
      for video in person.iterdir()
      if video.is_dir()
    ]
  if not rows:
    raise ManifestError(
      f"{folder_of_frames} has no folder NAME/K; unpack YouTube Faces there"
    )
  notes = []
  if num_unlabelled:
    notes.append(
      f"NAME{LABELLED_FACES} of {num_unlabelled} people are missing: their "
      "main face is taken for them."
    )
  if marlins:
    listed = [row for row in rows if row.split]
    notes.append(
      f"MARLIN's split: {len(listed)} of its {len(marlins)} videos exist; "
      f"{len(rows) - len(listed)} others are left out."
    )
    rows = listed
  return Listing(root, rows, notes=notes)


def _labelled_faces(path: Path) -> dict[str, tuple[tuple[float, ...], ...]]:
  """Returns the points of `Part.face_at` of each video; {} without the file.

  A line is `NAME\\K\\K.FRAME.jpg,0,x,y,width,height,0.0,1`, x and y the centre.
  """
  if not path.is_file():
    return {}
  centres: dict[str, dict[int, tuple[float, float]]] = {}
  for number, line in enumerate(read_text(path).splitlines(), 1):
    try:
      name, _, x, y, *_ = line.split(",")
      _, video, picture = PurePosixPath(name.replace("\\", "/")).parts
      frame = int(picture.split(".")[-2])
      centres.setdefault(video, {})[frame] = float(x), float(y)
    except (ValueError, IndexError) as e:
      raise ManifestError(
        f"{path}, line {number} is {line!r}, expected "
        "'NAME\\K\\K.FRAME.jpg,0,x,y,width,height,0.0,1'"
      ) from e
  return {
    video: tuple(
      ((frame - min(of)) / FRAME_RATE, *of[frame])
      for frame in sorted(of)[:: -(-len(of) // MAX_POINTS)]
    )
    for video, of in centres.items()
  }


def _marlins_split(root: Path) -> dict[str, str]:
  """Returns the split of each NAME/K; {} if both files are missing."""
  paths = {split: root / name for split, name in MARLINS_SPLIT.items()}
  existing = [path for path in paths.values() if path.is_file()]
  if not existing:
    return {}
  if len(existing) < len(paths):
    raise ManifestError(
      f"{root} has only {existing[0].name}; expected both of "
      + ", ".join(MARLINS_SPLIT.values())
    )
  splits: dict[str, str] = {}
  for split, path in paths.items():
    for _, row in read_csv(path)[1]:
      if not row.get("path"):
        raise ManifestError(f"{path} has no column 'path' with NAME/K")
      splits[row["path"]] = split
  return splits


def _folds(path: Path) -> dict[str, int]:
  """Returns the fold of each person in a pair.

  A line is `fold, NAME/K, NAME/K, ...`; further fields describe the pair.
  """
  if not path.is_file():
    raise ManifestError(
      f"{path} is missing; copy the official folds of YouTube Faces there"
    )
  folds: dict[str, int] = {}
  for number, line in enumerate(read_text(path).splitlines(), 1):
    fields = [field.strip() for field in line.split(",")]
    if not re.fullmatch("[0-9]{1,4}", fields[0]):
      continue  # the header
    for video in fields[1:3]:
      name = video.partition("/")[0]
      fold = folds.setdefault(name, int(fields[0]))
      if fold != int(fields[0]):
        raise ManifestError(
          f"{path}, line {number}: {name} is in fold {fields[0]} and in fold "
          f"{fold}; a person must be in one fold"
        )
  if not folds:
    raise ManifestError(f"{path} has no line such as '1, NAME/0, NAME/1, 1'")
  return folds
