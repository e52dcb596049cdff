"""LRS2 (Son Chung et al., CVPR 2017): spoken sentences of the BBC, with sound.

  main/PROGRAMME/NUMBER.mp4, pretrain/PROGRAMME/NUMBER.mp4
  train.txt, val.txt, test.txt, pretrain.txt     PROGRAMME/NUMBER per line

The folder may be the unpacked mvlrs_v1 or its parent. Speakers are unknown, so
only the official splits are possible.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.files import read_text
from data_prep.sources.listing import Listing, ManifestError, Row, missing_notes

# Split -> folder of its videos.
SPLITS = {
  "train": "main",
  "val": "main",
  "test": "main",
  "pretrain": "pretrain",
}


def read(root: Path) -> Listing:
  """Lists the available videos of the official lists.

  Raises:
    ManifestError: there is no list or no video.
  """
  lists = root
  if not (root / "main").is_dir() and (root / "mvlrs_v1").is_dir():
    root = root / "mvlrs_v1"
  rows, num_missing, num_lists = [], 0, 0
  for split, folder in SPLITS.items():
    paths = [
      path
      for path in (lists / f"{split}.txt", root / f"{split}.txt")
      if path.is_file()
    ]
    for path in paths[:1]:
      num_lists += 1
      for line in read_text(path).split("\n"):
        # test.txt has a second column, the quality of the alignment.
        name = line.split()[:1]
        if not name:
          continue
        video = f"{folder}/{name[0]}.mp4"
        if (root / video).exists():
          rows.append(Row(0, video, split=split))
        else:
          num_missing += 1
  if not num_lists:
    raise ManifestError(
      f"{lists} has none of {', '.join(f'{s}.txt' for s in SPLITS)}; copy the "
      "lists of LRS2 there"
    )
  if not rows:
    raise ManifestError(
      f"{root} has none of the {num_missing} videos of its lists; expected "
      "files such as main/PROGRAMME/00001.mp4"
    )
  num_listed = num_missing + len(rows)
  notes = missing_notes(num_missing, num_listed, "listed videos")
  return Listing(root, rows, notes=notes, has_sound=True)
