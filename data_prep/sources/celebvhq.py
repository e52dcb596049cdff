"""CelebV-HQ (Zhu et al., ECCV 2022): clips with attributes.

  celebvhq_info.json     labels of each clip
  .../CLIP.mp4           the clips, in any folder (35666/, processed/, ...)
  raw/YTB_ID.mp4         or the downloaded videos: a clip is a span and a box

The official download_and_process.py makes raw/ and, on request, the clips:
boxes widened by 0.02 of the frame and cut to a square. For raw videos, a part
(`listing.Part`) has the box itself, and the tracker crops a square.

Labels: appearance (40 attributes), action (35 attributes), emotion (one class;
unknown if it changes within the clip). There is no official split: 80% of the
source videos go to train, 10% to val and 10% to test, as in the paper. A hash
of the source video's id selects the split, so its clips stay together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.files import read_json, video_paths
from data_prep.sources.listing import (
  BINARY,
  CLASS,
  WHOLE,
  Label,
  Listing,
  ManifestError,
  Part,
  Row,
  missing_notes,
)
from data_prep.sources.patterns import needed, only_once

INFO = "celebvhq_info.json"
RAW = "raw"


def read(root: Path, follow_links: bool = False) -> Listing:
  """Lists the clips in a folder.

  Raises:
    ManifestError: the file of labels is missing or malformed, two folders hold
      the same clip, or the folder holds none.
  """
  info = _Info(root)
  paths = _by_stem(root, info.clips, follow_links)
  return info.listing(
    root,
    ((clip, path, WHOLE) for clip, path in paths.items()),
    [f"{clip}.mp4" for clip in [*info.clips][:2]],
  )


def read_raw(root: Path, follow_links: bool = False) -> Listing:
  """Lists the clips in the downloaded videos, raw/YTB_ID.mp4.

  Raises:
    ManifestError: as for `read`.
  """
  info = _Info(root)
  folder = root / RAW if (root / RAW).is_dir() else root
  ids = {str(clip.get("ytb_id")) for clip in info.clips.values()}
  paths = _by_stem(folder, ids, follow_links)
  try:
    found = [
      (name, paths[clip["ytb_id"]], _part(clip))
      for name, clip in info.clips.items()
      if clip["ytb_id"] in paths
    ]
  except (KeyError, TypeError, ValueError) as e:
    raise ManifestError(
      f"{info.path}: duration or bbox of a clip is malformed: "
      f"{type(e).__name__} {e}"
    ) from e
  return info.listing(
    folder, found, [f"{RAW}/{ytb_id}.mp4" for ytb_id in sorted(ids)[:2]]
  )


def _by_stem(
  root: Path, names: Collection[str], follow_links: bool
) -> dict[str, str]:
  """Returns {stem: path} of the videos below `root` with a stem in `names`."""
  return only_once(
    (stem, path)
    for path in video_paths(root, follow_links)
    if (stem := PurePosixPath(path).stem) in names
  )


def _part(clip: Mapping[str, Any]) -> Part:
  box, duration = clip["bbox"], clip["duration"]
  sides = (
    min(max(float(box[side]), 0.0), 1.0)
    for side in ("left", "top", "right", "bottom")
  )
  return Part(
    float(duration["start_sec"]), float(duration["end_sec"]), (*sides,)
  )


class _Info:
  """The label file, in a folder or one of its parents.

  Attributes:
    path: the file.
    clips: entry of each clip.
  """

  def __init__(self, root: Path) -> None:
    self.path = needed(root, INFO, "github.com/CelebV-HQ/CelebV-HQ")
    info = read_json(self.path)
    try:
      names = {
        "appearance": tuple(info["meta_info"]["appearance_mapping"]),
        "action": tuple(info["meta_info"]["action_mapping"]),
      }
      self.clips: Mapping[str, Any] = dict(info["clips"])
    except (ValueError, KeyError, TypeError) as e:
      raise ManifestError(
        f"{self.path} is malformed, expected meta_info and clips: "
        f"{type(e).__name__} {e}"
      ) from e
    self._emotions = _emotions(self.path, self.clips)
    self._labels = {n: Label(BINARY, parts) for n, parts in names.items()}
    self._labels["emotion"] = Label(CLASS, self._emotions)

  def listing(
    self,
    root: Path,
    found: Iterable[tuple[str, str, Part]],
    examples: Sequence[str],
  ) -> Listing:
    """Returns the listing of clips, each with its path and part."""
    rows, problems = [], []
    for clip, path, part in found:
      try:
        rows.append(_row(path, self.clips[clip], self._emotions, part))
      except (KeyError, TypeError, ValueError) as e:
        problems.append((0, f"{INFO}, clip {clip!r}: {type(e).__name__} {e}"))
    if not rows and not problems:
      raise ManifestError(
        f"none of the {len(self.clips)} clips in {self.path} is below {root}; "
        "expected files such as " + ", ".join(examples)
      )
    notes = missing_notes(
      max(len(self.clips) - len(rows), 0), len(self.clips), f"clips in {INFO}"
    )
    return Listing(
      root, rows, self._labels, problems, notes, split_ratios=(0.1, 0.1)
    )


def _row(
  video: str, clip: Mapping[str, Any], emotions: Sequence[str], part: Part
) -> Row:
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
    part=part,
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
