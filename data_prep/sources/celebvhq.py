"""CelebV-HQ (Zhu et al., ECCV 2022): clips with attributes.

  celebvhq_info.json         labels of each clip
  .../CLIP.mp4               the clips, in any folder (35666/, processed/, ...)

Labels: appearance (40 attributes), action (35 attributes), emotion (one class;
unknown if it changes within the clip). There is no official split: 80% of the
source videos go to train, 10% to val and 10% to test, as in the paper. A hash
of the source video's id selects the split, so its clips stay together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.files import video_paths
from data_prep.sources.listing import (
  BINARY,
  CLASS,
  Label,
  Listing,
  ManifestError,
  Row,
  missing_notes,
)

INFO = "celebvhq_info.json"


def read(root: Path) -> Listing:
  """Lists the clips in a folder.

  Raises:
    ManifestError: the file of labels is missing or malformed, or the folder
      holds no clip.
  """
  path = root / INFO
  if not path.is_file():
    raise ManifestError(
      f"{root} has no {INFO}; expected the labels of CelebV-HQ, with its "
      "clips below that folder"
    )
  try:
    info = json.loads(path.read_bytes())
    names = {
      "appearance": tuple(info["meta_info"]["appearance_mapping"]),
      "action": tuple(info["meta_info"]["action_mapping"]),
    }
    clips: Mapping[str, Any] = dict(info["clips"])
  except (ValueError, KeyError, TypeError) as e:
    raise ManifestError(
      f"{path} is malformed, expected meta_info and clips: "
      f"{type(e).__name__} {e}"
    ) from e
  labels = {name: Label(BINARY, parts) for name, parts in names.items()}
  rows, problems = [], []
  emotions = _emotions(path, clips)
  labels["emotion"] = Label(CLASS, emotions)
  for video in video_paths(root):
    clip = PurePosixPath(video).stem
    if clip not in clips:
      continue
    try:
      rows.append(_row(video, clips[clip], emotions))
    except (KeyError, TypeError, ValueError) as e:
      problems.append((0, f"{INFO}, clip {clip!r}: {type(e).__name__} {e}"))
  if not rows and not problems:
    raise ManifestError(
      f"none of the {len(clips)} clips in {path} is below {root}; expected "
      "files such as " + ", ".join(f"{clip}.mp4" for clip in [*clips][:2])
    )
  num_missing = max(len(clips) - len(rows), 0)
  notes = missing_notes(num_missing, len(clips), f"clips in {INFO}")
  return Listing(root, rows, labels, problems, notes, split_ratios=(0.1, 0.1))


def _row(video: str, clip: Mapping[str, Any], emotions: Sequence[str]) -> Row:
  attributes = clip["attributes"]
  names = _emotion_names(clip)
  # Several emotions, one after another: the clip has no single class.
  emotion = emotions.index(*names) if len(names) == 1 else math.nan
  return Row(
    0,
    video,
    subject_id=str(clip["ytb_id"]),
    labels={
      "appearance": tuple(map(float, attributes["appearance"])),
      "action": tuple(map(float, attributes["action"])),
      "emotion": (float(emotion),),
    },
  )


def _emotions(path: Path, clips: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the emotions of all listed clips, missing ones included."""
  names: set[str] = set()
  for clip_id, clip in clips.items():
    try:
      names |= _emotion_names(clip)
    except (KeyError, TypeError) as e:
      raise ManifestError(
        f"{path}, clip {clip_id!r}: attributes.emotion is malformed: "
        f"{type(e).__name__} {e}"
      ) from e
  return tuple(sorted(names))


def _emotion_names(clip: Mapping[str, Any]) -> set[str]:
  labels = clip["attributes"]["emotion"]["labels"]
  if isinstance(labels, str):
    return {labels}
  return {part["emotion"] for part in labels}
