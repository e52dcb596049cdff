r"""Data sets of speaking people: LRS2, LRS3, VoxCeleb2, HDTF.

LRS2 (Son Chung et al., CVPR 2017), sentences of the BBC, with sound:

  mvlrs_v1/main/PROGRAMME/NUMBER.mp4, mvlrs_v1/pretrain/PROGRAMME/NUMBER.mp4
  train.txt, val.txt, test.txt, pretrain.txt     PROGRAMME/NUMBER per line

LRS3 (Afouras et al., 2018), sentences of TED talks, with sound:

  trainval/ID/NUMBER.mp4, pretrain/ID/NUMBER.mp4, test/ID/NUMBER.mp4

The speakers of both are unknown: only the official splits are possible. Names
are those that the preparation of github.com/mpc001/auto_avsr reads.

VoxCeleb2 (Chung et al., Interspeech 2018), interviews, with sound:

  dev/mp4/idNNNNN/VIDEO/NUMBER.mp4               5,994 people: split train
  test/mp4/idNNNNN/VIDEO/NUMBER.mp4              118 others: split test

The names are those that github.com/sunlicai/MAE-DFER and other loaders read.

HDTF (Zhang et al., CVPR 2021), politicians and radio hosts of YouTube. The
clips that its authors describe (NAME_INDEX.mp4) or that the script of
github.com/universome/HDTF makes (SUBSET_NAME_INDEX.mp4):

  RD_Radio11_000.mp4, WDA_AdamSchiff_000.mp4, WRA_..., or Radio11_0.mp4

or the downloaded videos, cut by the official times:

  _videos_raw/RD_Radio11.mp4, or Radio11.mp4
  HDTF_dataset/RD_annotion_time.txt              Radio11.mp4 00:30-01:00 ...

Their boxes (crop_wh.txt) hold for one resolution only. For others the authors
find the faces anew, as `prepare` does. A name without its number is a person,
except for radio hosts, whose names are not given.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from data_prep.sources import files
from data_prep.sources.files import read_text
from data_prep.sources.listing import (
  Listing,
  ManifestError,
  Part,
  Row,
  missing_notes,
)
from data_prep.sources.patterns import (
  Listed,
  Official,
  Tree,
  above,
  needed,
  only_once,
)

# Split of LRS2 -> folder of its videos.
LRS2_FOLDERS = {
  "train": "main",
  "val": "main",
  "test": "main",
  "pretrain": "pretrain",
}
HDTF_SUBSETS = ("RD", "WDA", "WRA")


def _lrs2_lists(root: Path) -> Official:
  videos = {}
  for split, folder in LRS2_FOLDERS.items():
    path = above(root, f"{split}.txt")
    for line in read_text(path).split("\n") if path else ():
      # test.txt has a second column, the quality of the alignment.
      for name in line.split()[:1]:
        videos[f"{folder}/{name}"] = Listed(split)
  if not videos:
    lists = ", ".join(f"{split}.txt" for split in LRS2_FOLDERS)
    raise ManifestError(
      f"{root} has none of {lists}; copy the lists of LRS2 there"
    )
  return Official(videos)


LRS2 = Tree(
  "LRS2",
  path=r"(?P<key>(?:main|pretrain)/\d+/\d+)\.mp4",
  example="main/PROGRAMME/00001.mp4",
  key="{key}",
  official=_lrs2_lists,
  has_sound=True,
)


def read_lrs2(root: Path, follow_links: bool = False) -> Listing:
  """Lists the videos of mvlrs_v1, given that folder or its parent."""
  if not (root / "main").is_dir() and (root / "mvlrs_v1").is_dir():
    root = root / "mvlrs_v1"
  return LRS2.read(root, follow_links)


LRS3 = Tree(
  "LRS3",
  path=r"(?P<split>trainval|pretrain|test)/[\w-]+/\d+\.mp4",
  example="trainval/0Fi83BHQsMA/00002.mp4",
  splits={"trainval": "train", "pretrain": "pretrain", "test": "test"},
  has_sound=True,
)

VOXCELEB2 = Tree(
  "VoxCeleb2",
  path=r"(?P<split>dev|test)/mp4/(?P<id>id\d+)/[^/]+/\d+\.mp4",
  example="dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
  subject="{id}",
  splits={"dev": "train", "test": "test"},
  has_sound=True,
)

HDTF = Tree(
  "HDTF",
  path=r"(?P<clip>(?:(?:RD|WDA|WRA)_)?"
  r"(?P<person>Radio\d+|[^/_]+?)\d*_(?P<index>\d+))\.mp4",
  example="RD_Radio11_000.mp4",
  key="{clip}",
  subject="{person}",
  split_ratios=(0.1, 0.1),
)


def read_hdtf_raw(root: Path, follow_links: bool = False) -> Listing:
  """Lists the clips of downloaded videos by the official times.

  Raises:
    ManifestError: there is no file of times, one is malformed, or there is no
      video.
  """
  times = needed(root, "HDTF_dataset", "github.com/MRzzm/HDTF")
  listed = [
    (subset, *line.split())
    for subset in HDTF_SUBSETS
    for line in read_text(times / f"{subset}_annotion_time.txt").splitlines()
    if line.strip()
  ]
  names = {PurePosixPath(name).stem for _, name, *_ in listed}
  paths = only_once(
    (stem, path)
    for path in files.video_paths(root, follow_links)
    if (stem := _without_subset(PurePosixPath(path).stem)) in names
  )
  rows, num_listed = [], 0
  for subset, file, *spans in listed:
    name = PurePosixPath(file).stem
    num_listed += len(spans)
    person = name if subset == "RD" else name.rstrip("0123456789")
    for span in spans if name in paths else ():
      try:
        start, end = map(_seconds, span.split("-"))
      except ValueError as e:
        raise ManifestError(f"{times}: {file} {span}: {e}") from e
      rows.append(Row(0, paths[name], person, part=Part(start, end)))
  if not rows:
    raise ManifestError(
      f"{root} has none of the videos of HDTF; expected files such as "
      "_videos_raw/RD_Radio11.mp4 or Radio11.mp4"
    )
  notes = missing_notes(num_listed - len(rows), num_listed, "listed clips")
  return Listing(root, rows, notes=notes, split_ratios=HDTF.split_ratios)


def _without_subset(name: str) -> str:
  subset, _, rest = name.partition("_")
  return rest if subset in HDTF_SUBSETS else name


def _seconds(text: str) -> float:
  """Returns the seconds of '01:30' or '1:02:03'."""
  if not re.fullmatch(r"\d+(:\d\d){1,2}", text):
    raise ValueError(f"{text!r} is not a time such as 01:30")
  secs = 0
  for part in text.split(":"):
    secs = 60 * secs + int(part)
  return float(secs)
