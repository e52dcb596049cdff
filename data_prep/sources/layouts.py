"""Layouts of published data sets: name -> reader of the folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from data_prep.sources import (
  celebvhq,
  expressions,
  files,
  forgeries,
  mosei,
  speaking,
  ytf,
)
from data_prep.sources.listing import Listing


@dataclasses.dataclass(frozen=True)
class Layout:
  """Folder layout of a data set.

  Attributes:
    read: function from folder to listing, which may be told to follow links;
      raises ManifestError for another layout.
    summary: description in one line, for --help.
  """

  read: Callable[[Path, bool], Listing]
  summary: str


LAYOUTS = {
  "class_folders": Layout(
    files.class_folders, "[SPLIT/]CLASS/VIDEO, for your own classes"
  ),
  "ytf": Layout(ytf.read, "YouTube Faces: frame_images_DB/, splits.txt"),
  "celebvhq": Layout(celebvhq.read, "CelebV-HQ: celebvhq_info.json and clips"),
  "celebvhq_raw": Layout(
    celebvhq.read_raw, "CelebV-HQ: celebvhq_info.json and raw/, as downloaded"
  ),
  "mosei": Layout(mosei.read, "CMU-MOSEI: labels (.csd or .csv) and segments"),
  **{
    f"ffpp_{compression}": Layout(
      functools.partial(forgeries.read_ffpp, compression=compression),
      f"FaceForensics++ at compression {compression}",
    )
    for compression in forgeries.COMPRESSIONS
  },
  # The name of raw before its folder was called so.
  "ffpp_c0": Layout(
    functools.partial(forgeries.read_ffpp, compression="raw"),
    "the same as ffpp_raw",
  ),
  "celebdf": Layout(
    forgeries.CELEBDF.read, "Celeb-DF v2: List_of_testing_videos.txt"
  ),
  "dfdc": Layout(forgeries.read_dfdc, "DFDC: dfdc_train_part_N/metadata.json"),
  "lrs2": Layout(
    speaking.read_lrs2, "LRS2 with its sound: mvlrs_v1/main, pretrain"
  ),
  "lrs3": Layout(
    speaking.LRS3.read, "LRS3 with its sound: trainval, pretrain, test"
  ),
  "voxceleb2": Layout(
    speaking.VOXCELEB2.read, "VoxCeleb2 with its sound: dev/mp4, test/mp4"
  ),
  "hdtf": Layout(speaking.HDTF.read, "HDTF: clips such as RD_Radio11_000.mp4"),
  "hdtf_raw": Layout(
    speaking.read_hdtf_raw, "HDTF: downloaded videos and HDTF_dataset/"
  ),
  "mead": Layout(
    expressions.MEAD.read, "MEAD: M003/video/front/angry/level_1/001.mp4"
  ),
  "ravdess": Layout(
    expressions.RAVDESS.read, "RAVDESS: Actor_01/01-01-01-01-01-01-01.mp4"
  ),
  "cremad": Layout(
    expressions.CREMAD.read, "CREMA-D: VideoFlash/1001_DFA_ANG_XX.flv"
  ),
  "dfew": Layout(
    expressions.DFEW.read, "DFEW: EmoLabel_DataSplit/ and clips; five folds"
  ),
  "mafw": Layout(
    expressions.MAFW.read,
    "MAFW: 'Train & Test Set'/ and data/clips; five folds",
  ),
  "ferv39k": Layout(
    expressions.FERV39K.read, "FERV39k: 4_setups/ and 2_ClipsforFaceCrop/"
  ),
}
