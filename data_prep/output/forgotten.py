"""Videos and people that a data set has forgotten: forgotten.json.

It holds hashes of names, not names. A video that it lists is not prepared
again, and any later run finishes a removal that was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Self

from data_prep.output import ledger
from data_prep.sources.listing import fragment_of
from data_prep.sources.manifest import Source
from marlin_jax.records import folders


@dataclasses.dataclass(frozen=True)
class Forgotten:
  """Videos and people that were removed from a data set for good.

  Attributes:
    hashes: hashes of their ids.
    was_complete: True if the data set was complete before a removal that has
      not been finished.
  """

  hashes: frozenset[str] = frozenset()
  was_complete: bool = False

  @classmethod
  def of(cls, path: Path) -> Self:
    """Reads the file in the folder of a data set."""
    content = ledger.read_json(path / folders.FORGOTTEN)
    if not content:
      return cls()
    return cls(frozenset(content["sha256"]), content["was_complete"])

  def write(self, path: Path) -> None:
    """Writes the file in the folder of a data set."""
    if self.hashes:
      content = {
        "was_complete": self.was_complete,
        "sha256": sorted(self.hashes),
      }
      ledger.write_json(path / folders.FORGOTTEN, content, indent=2)

  def __contains__(self, video: Source | ledger.Entry) -> bool:
    if not self.hashes:
      return False
    names = {("video", video.video_id), ("video", _file_of(video.video_id))}
    if video.subject_id:
      names.add(("subject", video.subject_id))
    return any(_hash(*name) in self.hashes for name in names)

  def adding(
    self, names: Sequence[str], video_ids: Iterable[str], was_complete: bool
  ) -> Self:
    """Returns a copy with more names.

    Args:
      names: ids of videos or people, or paths that end with the id of a video.
      video_ids: all videos of the data set, for the paths.
      was_complete: True if the data set is complete.
    """
    known = {name for each in video_ids for name in (each, _file_of(each))}
    added = set()
    for name in names:
      added.add(_hash("subject", name))
      added.add(_hash("video", _id_of(name, known)))
    return dataclasses.replace(
      self,
      hashes=self.hashes | added,
      was_complete=self.was_complete or was_complete,
    )

  def unknown(
    self, names: Sequence[str], videos: Sequence[Source | ledger.Entry]
  ) -> list[str]:
    """Returns the names of no video or person, now or forgotten before.

    Args:
      names: as for `adding`.
      videos: all videos of the data set.
    """
    people = {video.subject_id for video in videos}
    ids = {
      name
      for video in videos
      for name in (video.video_id, _file_of(video.video_id))
    }
    return [
      name
      for name in names
      if not (
        name in people
        or (video_id := _id_of(name, ids)) in ids
        or self.hashes & {_hash("subject", name), _hash("video", video_id)}
      )
    ]


def _id_of(name: str, known: set[str]) -> str:
  """Returns the id of the video that a path ends with, or else the path."""
  path = PurePosixPath(name)
  for i in range(len(path.parts)):
    end = PurePosixPath(*path.parts[i:]).as_posix()
    if end in known:
      return end
  return path.as_posix()


def _file_of(video_id: str) -> str:
  """Returns the id of a video without the part of the file, if it has one."""
  return video_id.removesuffix(fragment_of(video_id))


def _hash(kind: str, name: str) -> str:
  return hashlib.sha256(f"{kind}:{name}".encode()).hexdigest()
