"""Layouts of published data sets: name -> reader of the folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from data_prep.sources import celebvhq, ffpp, files, lrs2, mosei, ytf
from data_prep.sources.listing import Listing


@dataclasses.dataclass(frozen=True)
class Layout:
  """Folder layout of a data set.

  Attributes:
    read: function from folder to listing; raises ManifestError for another
      layout.
    summary: description in one line, for --help.
  """

  read: Callable[[Path], Listing]
  summary: str


LAYOUTS = {
  "class_folders": Layout(
    files.class_folders, "[SPLIT/]CLASS/VIDEO, for your own classes"
  ),
  "ytf": Layout(ytf.read, "YouTube Faces: frame_images_DB/, splits.txt"),
  "celebvhq": Layout(celebvhq.read, "CelebV-HQ: celebvhq_info.json and clips"),
  "mosei": Layout(mosei.read, "CMU-MOSEI: labels (.csd or .csv) and segments"),
  **{
    f"ffpp_{compression}": Layout(
      functools.partial(ffpp.read, compression=compression),
      f"FaceForensics++ at compression {compression}",
    )
    for compression in ffpp.COMPRESSIONS
  },
  "lrs2": Layout(lrs2.read, "LRS2 with its sound: mvlrs_v1/main, pretrain"),
}
