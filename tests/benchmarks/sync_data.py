"""Clips of the benchmark of the sync expert: which, of whom, and how much.

The footage is a folder of videos with an index.csv; see `speech_of`.
"""

from __future__ import annotations

import collections
import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from marlin_jax.records.cli import UserError

# Groups of people. Regime and size of the network were chosen on people of the
# first half; those of the second half are judged.
NUM_GROUPS = 8
# People in clips that show others too, or are cut from films.
OTHERS = "others"
# A clip of so many seconds whose lips follow the sound this closely, so many
# frames late, says that its source is out of sync. Beyond that the correlation
# is with other syllables.
LATE_SECS, LATE_CORRELATION, LATE_FRAMES = 5.0, 0.3, (4, 6)
# Shorter clips give no windows.
MIN_SECS = 1.0

COLUMNS = ("path", "subject_id", "split", "start_secs", "end_secs")


class FootageError(UserError):
  """Footage that the benchmark cannot use."""


class Clip(NamedTuple):
  """Part of a video in which one person speaks.

  Attributes:
    path: of the video, relative to the footage.
    subject_id: the person.
    secs: length that is used, from the beginning.
    is_alone: whether the person speaks alone to the camera.
  """

  path: str
  subject_id: str
  secs: float
  is_alone: bool


def speech_of(footage: Path, max_secs: float) -> list[Clip]:
  """Returns the clips with real speech, at most `max_secs` of each person.

  Clips in which the person is alone come first. Sources that were seen out of
  sync are left out.

  Args:
    footage: folder with index.csv, whose columns include path, subject_id,
      kind ('real'), speech and alone ('yes'), seconds, source and
      lip_loudness, such as '0.47 within 3 frames; best 0.55 at +5': the
      correlation of lip gap and loudness.
    max_secs: most seconds of a person.

  Raises:
    FootageError: there is no such file, or it lists no speech.
  """
  index = footage / "index.csv"
  if not index.exists():
    raise FootageError(f"there is no {index}; give the folder that holds it")
  with index.open(newline="") as file:
    rows = list(csv.DictReader(file))
  rows = [r for r in rows if (r["kind"], r["speech"]) == ("real", "yes")]
  late = {row["source"] for row in rows if is_out_of_sync(row)}
  rows = [row for row in rows if row["source"] not in late]
  rows.sort(key=lambda row: (row["alone"] != "yes", row["path"]))
  used: dict[str, float] = collections.defaultdict(float)
  clips = []
  for row in rows:
    person = row["subject_id"]
    secs = min(float(row["seconds"]), max_secs - used[person])
    if secs >= MIN_SECS:
      used[person] += secs
      clips.append(Clip(row["path"], person, secs, row["alone"] == "yes"))
  if not clips:
    raise FootageError(f"{index} lists no real speech in sync")
  return clips


def is_out_of_sync(row: Mapping[str, str]) -> bool:
  """Returns True if a row's lips follow the sound closely, but late."""
  found = re.search(r"best (-?[\d.]+) at ([+-]\d+)", row["lip_loudness"])
  if not found:
    return False
  first, last = LATE_FRAMES
  return (
    float(row["seconds"]) >= LATE_SECS
    and float(found[1]) >= LATE_CORRELATION
    and first <= int(found[2]) <= last
  )


def groups_of(clips: Iterable[Clip]) -> dict[str, str]:
  """Returns the split of each person: group0 to group7, or others.

  People who are never alone are others. The groups are drawn, and differ by one
  person at most.
  """
  clips = list(clips)
  alone = {clip.subject_id for clip in clips if clip.is_alone}
  drawn = sorted(alone, key=lambda who: hashlib.sha256(who.encode()).digest())
  groups = {clip.subject_id: OTHERS for clip in clips}
  return groups | {who: f"group{i % NUM_GROUPS}" for i, who in enumerate(drawn)}


def write_manifest(path: Path, clips: Sequence[Clip]) -> None:
  """Writes a manifest for data_prep.prepare."""
  groups = groups_of(clips)
  with path.open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for clip in clips:
      writer.writerow(
        (clip.path, clip.subject_id, groups[clip.subject_id], 0, clip.secs)
      )
