r"""Data sets of facial expressions.

MEAD (Wang et al., ECCV 2020), actors seen from seven sides:

  ACTOR/video/VIEW/EMOTION/level_N/NNN.mp4    M003/video/front/angry/level_1/

RAVDESS (Livingstone and Russo, 2018), speech and song of 24 actors:

  Actor_NN/01-CHANNEL-EMOTION-INTENSITY-STATEMENT-REPETITION-ACTOR.mp4

Files that begin with 02 are the same pictures without sound: they are left out.

CREMA-D (Cao et al., 2014), sentences of 91 actors:

  VideoFlash/ACTOR_SENTENCE_EMOTION_LEVEL.flv    1001_DFA_ANG_XX.flv

None of these has an official split: 10% of the actors go to val, 20% to test.

DFEW (Jiang et al., ACM MM 2020), MAFW (Liu et al., ACM MM 2022) and FERV39k
(Wang et al., CVPR 2022), clips of films and television with official splits:

  Clip/original/1.mp4, or Clip/clip_224x224_avi/00001.avi
  EmoLabel_DataSplit/test(single-labeled)/set_K.csv       video_name,label

  data/clips/00001.mp4
  Train & Test Set/single/no_caption/set_K/test.txt       00025.mp4 anger

  2_ClipsforFaceCrop/SCENE/EMOTION/NUMBER/*.jpg
  4_setups/All_scenes/train_All.csv, test_All.csv         Action/Sad/0010 Sad

The five folds of DFEW and MAFW are the splits fold1 to fold5, named by the test
set that a clip is in: fold 2 is trained on 'fold1+fold3+fold4+fold5' and tested
on 'fold2'. Clips without a single label are not in these lists. People are
unknown in all three. FERV39k is published as pictures, which are taken for 25 a
second.

Names and lists of DFEW, MAFW and FERV39k are those that the preparation of
github.com/sunlicai/MAE-DFER reads, those of RAVDESS of its own description at
zenodo.org/record/1188976, of CREMA-D of its own repository, of MEAD and of
DFEW's videos of loaders of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.sources.files import read_csv, read_text
from data_prep.sources.listing import CLASS, Label, ManifestError
from data_prep.sources.patterns import (
  Classes,
  Listed,
  Official,
  Tree,
  needed,
)

FOLDS = (1, 2, 3, 4, 5)
BY_ACTOR = (0.1, 0.2)

MEAD = Tree(
  "MEAD",
  path=r"(?P<actor>[MW]\d{3})/(?:.*/)?"
  r"(?P<view>front|top|down|left_30|left_60|right_30|right_60)/"
  r"(?P<emotion>[a-z]+)/level_(?P<level>[123])/\d+\.mp4",
  example="M003/video/front/angry/level_1/001.mp4",
  subject="{actor}",
  labels={
    "emotion": Classes(
      "emotion",
      {
        name: name
        for name in (
          *("angry", "contempt", "disgusted", "fear", "happy", "neutral"),
          *("sad", "surprised"),
        )
      },
    ),
    "level": Classes("level", {"1": "low", "2": "medium", "3": "high"}),
    "view": Classes(
      "view",
      {
        name: name
        for name in (
          *("front", "top", "down"),
          *("left_30", "left_60", "right_30", "right_60"),
        )
      },
    ),
  },
  split_ratios=BY_ACTOR,
)

RAVDESS = Tree(
  "RAVDESS",
  path=r"Actor_(?P<actor>\d\d)/(?P<clip>01-(?P<channel>0[12])-"
  r"(?P<emotion>0[1-8])-(?P<intensity>0[12])-0[12]-0[12]-\d\d)\.mp4",
  example="Actor_01/01-01-01-01-01-01-01.mp4",
  key="{clip}",
  subject="{actor}",
  labels={
    "emotion": Classes(
      "emotion",
      {
        "01": "neutral",
        "02": "calm",
        "03": "happy",
        "04": "sad",
        "05": "angry",
        "06": "fearful",
        "07": "disgust",
        "08": "surprised",
      },
    ),
    "intensity": Classes("intensity", {"01": "normal", "02": "strong"}),
    "channel": Classes("channel", {"01": "speech", "02": "song"}),
  },
  split_ratios=BY_ACTOR,
)

CREMAD = Tree(
  "CREMA-D",
  path=r"(?P<clip>(?P<actor>1\d{3})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_"
  r"(?P<level>XX|LO|MD|HI))\.(?:flv|mp4)",
  example="VideoFlash/1001_DFA_ANG_XX.flv",
  key="{clip}",
  subject="{actor}",
  labels={
    "emotion": Classes(
      "emotion",
      {
        "ANG": "anger",
        "DIS": "disgust",
        "FEA": "fear",
        "HAP": "happy",
        "NEU": "neutral",
        "SAD": "sad",
      },
    ),
    # XX is unspecified.
    "level": Classes("level", {"LO": "low", "MD": "medium", "HI": "high"}),
  },
  split_ratios=BY_ACTOR,
)


# --- With official splits -----------------------------------------------------

# Labels 1 to 7 of its lists.
DFEW_EMOTIONS = (
  *("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),
)
MAFW_EMOTIONS = (
  *("anger", "disgust", "fear", "happiness", "neutral", "sadness"),
  *("surprise", "contempt", "anxiety", "helplessness", "disappointment"),
)
FERV39K_EMOTIONS = (
  *("Happy", "Sad", "Neutral", "Angry", "Surprise", "Disgust", "Fear"),
)


def _official(
  lists: Iterable[tuple[str, Path, Iterable[tuple[str, str]]]],
  emotions: Sequence[str],
) -> Official:
  """Returns the clips of lists with their splits and emotions.

  Args:
    lists: split, path, and clip and emotion of each line.
    emotions: names of the classes.

  Raises:
    ManifestError: an emotion is unknown, or a clip is in two splits.
  """
  videos: dict[str, Listed] = {}
  for split, path, lines in lists:
    for clip, emotion in lines:
      if emotion not in emotions:
        raise ManifestError(
          f"{path}: {clip} has the label {emotion!r}, expected one of "
          + ", ".join(emotions)
        )
      number = float(emotions.index(emotion))
      listed = Listed(split, {"emotion": (number,)})
      other = videos.setdefault(clip, listed)
      if other.split != split:
        raise ManifestError(
          f"{path}: {clip} is in {split} and in {other.split}; expected each "
          "clip once"
        )
  return Official(videos, {"emotion": Label(CLASS, tuple(emotions))})


def _dfew_lists(root: Path) -> Official:
  folder = needed(root, "EmoLabel_DataSplit", "DFEW")

  def lines(path: Path) -> Iterable[tuple[str, str]]:
    for _, row in read_csv(path)[1]:
      try:
        emotion = dict(enumerate(DFEW_EMOTIONS, 1))[int(row["label"])]
        yield str(int(row["video_name"])), emotion
      except (KeyError, TypeError, ValueError) as e:
        raise ManifestError(
          f"{path}: {row}, expected video_name and label, 1 to 7"
        ) from e

  lists = []
  for k in FOLDS:
    path = folder / "test(single-labeled)" / f"set_{k}.csv"
    lists.append((f"fold{k}", path, lines(path)))
  return _official(lists, DFEW_EMOTIONS)


def _mafw_lists(root: Path) -> Official:
  folder = needed(root, "Train & Test Set", "MAFW") / "single/no_caption"
  lists = []
  for k in FOLDS:
    path = folder / f"set_{k}" / "test.txt"
    lists.append((f"fold{k}", path, _pairs(path, r"(\d+)\.mp4")))
  return _official(lists, MAFW_EMOTIONS)


def _ferv39k_lists(root: Path) -> Official:
  folder = needed(root, "4_setups", "FERV39k") / "All_scenes"
  lists = []
  for split in ("train", "test"):
    path = folder / f"{split}_All.csv"
    lists.append((split, path, _pairs(path, r"(\w+/\w+/\d+)")))
  return _official(lists, FERV39K_EMOTIONS)


def _pairs(path: Path, clip: str) -> Iterable[tuple[str, str]]:
  """Yields clip and emotion of the lines `CLIP EMOTION`; skips a header."""
  for number, line in enumerate(read_text(path).splitlines(), 1):
    match = re.fullmatch(rf"{clip}\s+(\w+)\s*", line)
    if match is not None:
      yield match[1], match[2]
    elif number > 1 and line.strip():
      raise ManifestError(
        f"{path}, line {number} is {line!r}, expected a clip and its emotion"
      )


DFEW = Tree(
  "DFEW",
  path=r"0*(?P<clip>\d+)\.(?:mp4|avi)",
  example="Clip/original/1.mp4",
  key="{clip}",
  official=_dfew_lists,
)

MAFW = Tree(
  "MAFW",
  path=r"(?P<clip>\d{5})\.mp4",
  example="data/clips/00001.mp4",
  key="{clip}",
  official=_mafw_lists,
)

FERV39K = Tree(
  "FERV39k",
  path=r"2_ClipsforFaceCrop/(?P<clip>\w+/\w+/\d+)",
  example="2_ClipsforFaceCrop/Action/Sad/0010/*.jpg",
  key="{clip}",
  official=_ferv39k_lists,
  frame_rate=25.0,
)
