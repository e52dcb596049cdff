"""From processed videos to a finished TFDS directory, resumable at any moment.

  OUTPUT/NAME-SPLIT.array_record-00000-of-00001   records, by video_id
  OUTPUT/settings.json      what every record was made with
  OUTPUT/videos.jsonl       the ledger: what became of each video
  OUTPUT/quarantine.jsonl   those that were not kept, and why
  OUTPUT/hashes.json        SHA-256 of each shard
  OUTPUT/metadata.json, features.json             schema version, counts; TFDS
  OUTPUT/dataset_info.json  TFDS; written last, so it is there when all else is
  OUTPUT/parts/             only while a run is unfinished:
    HASH.array_record, HASH.json   one processed video: records, ledger line
    SHARD.ready, SHARD.json        a verified shard and its ledger lines

A video's shard follows from a hash of its id, so that new videos touch only
the shards they fall in. Every file appears by renaming: a part's ledger line
after its records; a shard's ledger lines before the shard, which `_recover`
moves into place where a run was killed between the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from data_prep import ledger, process, shards
from data_prep.ledger import Entry
from data_prep.manifest import Source, stable_hash
from marlin_jax import records
from marlin_jax.output_folder import Lock, OutputFolderError

# Some 100 MB of short clips.
VIDEOS_PER_SHARD = 32


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run has to do.

  Attributes:
    todo: videos to process, shard by shard.
    shards: names of the shards to write.
    num_done: videos that were done before.
  """

  todo: list[Source]
  shards: list[str]
  num_done: int


def shard_index(video_id: str, num_shards: int) -> int:
  """Returns which of its split's shards a video belongs to."""
  return stable_hash(f"shard:{video_id}") % num_shards


class DatasetFolder:
  """An output folder, locked while this object is open; a context manager."""

  def __init__(
    self,
    path: Path,
    recipe: dict[str, Any],
    num_shards: int | None,
    sources: Sequence[Source],
  ) -> None:
    """Reads what is there; changes nothing but leftovers of a killed run.

    Args:
      path: made where it is missing.
      recipe: what every record depends on; must be what an existing folder was
        made with.
      num_shards: for the largest split, the others in proportion; None is one
        for every VIDEOS_PER_SHARD videos. Kept as the folder grows.
      sources: all videos.

    Raises:
      OutputFolderError: the folder is in use, holds something else, was made
        with another recipe or from videos that are now missing.
    """
    self.path = path
    self._parts = path / "parts"
    self._lock = Lock(path)
    try:
      self._settings = self._agree(recipe, num_shards, sources)
      self._sources = {source.video_id: source for source in sources}
      self._shards: dict[str, dict[str, Source]] = {
        self._shard_name(split, i): {}
        for split, num in self._settings["num_shards"].items()
        for i in range(num)
      }
      for source in sources:
        self._shards[self._shard_of(source)][source.video_id] = source
      self._hashes: dict[str, str] = {}
      # Ledger lines of each shard as it lies there.
      self._written: dict[str, dict[str, Entry]] = {}
      # Ledger lines of parts, and videos that are still to be processed.
      self._processed: dict[str, Entry] = {}
      self._todo: set[str] = set()
      self._recover()
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._lock.close()

  def _agree(
    self,
    recipe: dict[str, Any],
    num_shards: int | None,
    sources: Sequence[Source],
  ) -> dict[str, Any]:
    """Returns the settings, after comparing them with those of the folder."""
    path = self.path / "settings.json"
    found = ledger.read_json(path)
    if found is None and any(self.path.iterdir()):
      raise OutputFolderError(
        f"{self.path} holds files but no settings.json, so it is no data set "
        "of this program; choose an empty or new folder as --output"
      )
    if found is None or not self._holds_results():
      found = {**recipe, "num_shards": {}}
    counts = found["num_shards"]
    differences = [
      f"{key} was {found.get(key)!r} and is now {recipe.get(key)!r}"
      for key in sorted({*recipe, *found} - {"num_shards"})
      if found.get(key) != recipe.get(key)
    ]
    if counts and num_shards not in (None, max(counts.values())):
      differences.append(
        f"num_shards was {max(counts.values())} and is now {num_shards}"
      )
    if differences:
      raise OutputFolderError(
        f"{self.path} was made with other settings: {'; '.join(differences)}. "
        "Use those settings again, or another --output"
      )
    num_videos = Counter(source.split for source in sources)
    for split, num in num_videos.items():
      wanted = math.ceil(num / VIDEOS_PER_SHARD)
      if num_shards is not None:
        wanted = round(num_shards * num / max(num_videos.values()))
      counts.setdefault(split, max(1, wanted))
    return {**recipe, "num_shards": dict(sorted(counts.items()))}

  def _holds_results(self) -> bool:
    return (self.path / "videos.jsonl").exists() or any(
      self._parts.glob("*.json")
    )

  def _shard_name(self, split: str, index: int) -> str:
    num = self._settings["num_shards"][split]
    name = self._settings["name"]
    return f"{name}-{split}.array_record-{index:05d}-of-{num:05d}"

  def _shard_of(self, video: Source | Entry) -> str:
    num = self._settings["num_shards"][video.split]
    return self._shard_name(video.split, shard_index(video.video_id, num))

  # --- What is there ----------------------------------------------------------

  def _recover(self) -> None:
    """Reads the ledgers, and completes or clears what a killed run left."""
    for folder in (self.path, self._parts):
      for partial in folder.glob("*.partial"):
        partial.unlink()
    self._hashes = ledger.read_json(self.path / "hashes.json") or {}
    for entry in self._ledger_lines():
      lines = self._written.setdefault(self._shard_of(entry), {})
      lines[entry.video_id] = entry
    for shard in self._shards:
      note = ledger.read_json(self._parts / f"{shard}.json")
      ready = self._parts / f"{shard}.ready"
      if ready.exists():
        if note and ledger.sha256_of(ready) == note["sha256"]:
          os.replace(ready, self.path / shard)
        else:
          ready.unlink()
      if note:
        self._hashes[shard] = note["sha256"]
        self._written[shard] = {
          line["video_id"]: Entry(**line) for line in note["videos"]
        }
    missing = sorted(
      video_id
      for lines in self._written.values()
      for video_id in lines
      if video_id not in self._sources
    )
    if missing:
      raise OutputFolderError(
        f"{len(missing)} videos of {self.path} are not in the input any more, "
        f"the first is {missing[0]!r}. Give the whole input, or another "
        "--output"
      )

  def _ledger_lines(self) -> list[Entry]:
    path = self.path / "videos.jsonl"
    if not path.exists():
      return []
    try:
      lines = path.read_text(encoding="utf-8").splitlines()
      return [Entry(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
      raise OutputFolderError(
        f"{path} is damaged ({e}); restore it, or choose another --output"
      ) from e

  def plan(self, settings: process.Settings, retry_quarantined: bool) -> Plan:
    """Compares what is there with what is wanted.

    Args:
      settings: of this run; quarantined videos are tried again under limits
        other than those they were quarantined under.
      retry_quarantined: try them again in any case.
    """
    limits = dataclasses.asdict(settings.limits)

    def holds(entry: Entry | None, source: Source, line: Path) -> bool:
      """Says whether the entry, last written to `line`, is good for a video."""
      if entry is None:
        return False
      if entry.status == process.QUARANTINED and (
        retry_quarantined or entry.limits != limits
      ):
        return False
      return ledger.is_of(entry, source, since=ledger.modified(line))

    todo: list[Source] = []
    to_write: list[str] = []
    for shard, videos in self._shards.items():
      line = self._parts / f"{shard}.json"
      if not line.exists():
        line = self.path / "videos.jsonl"
      whole = self._is_whole(shard)
      if not whole:
        # Its records are lost; what is known of videos without any is not.
        self._written[shard] = {
          video_id: entry
          for video_id, entry in self._written.get(shard, {}).items()
          if entry.status != process.KEPT
        }
      written = self._written.setdefault(shard, {})
      for video_id, source in videos.items():
        if holds(written.get(video_id), source, line):
          continue
        whole = False
        part = shards.Part(self.path, video_id)
        entry = part.entry()
        if entry is not None and holds(entry, source, part.line):
          self._processed[video_id] = entry
        else:
          todo.append(source)
      if not whole or set(written) != set(videos):
        to_write.append(shard)
    self._todo = {source.video_id for source in todo}
    return Plan(todo, to_write, len(self._sources) - len(todo))

  def _is_whole(self, shard: str) -> bool:
    if shard not in self._hashes:
      return False
    lines = self._written.get(shard, {})
    expected = sum(entry.num_records for entry in lines.values())
    return shards.num_records(self.path / shard) == expected

  @property
  def is_finished(self) -> bool:
    return (self.path / "dataset_info.json").exists()

  @property
  def entries(self) -> list[Entry]:
    """The ledger, by video_id."""
    lines = itertools.chain(*(e.values() for e in self._written.values()))
    return sorted(lines, key=lambda entry: entry.video_id)

  # --- What a run changes -----------------------------------------------------

  def begin(self) -> None:
    """Marks the data set as unfinished."""
    (self.path / "dataset_info.json").unlink(missing_ok=True)
    ledger.write_json(self.path / "settings.json", self._settings, indent=2)
    self._parts.mkdir(exist_ok=True)

  def add(self, entry: Entry) -> str | None:
    """Notes that a video's part is there.

    Returns:
      Its shard, if that can now be written.
    """
    self._processed[entry.video_id] = entry
    self._todo.discard(entry.video_id)
    shard = self._shard_of(self._sources[entry.video_id])
    return shard if self.is_complete(shard) else None

  def is_complete(self, shard: str) -> bool:
    """Says whether every video of a shard is processed."""
    return self._todo.isdisjoint(self._shards[shard])

  def write_shard(self, shard: str) -> None:
    """Writes a shard from parts and from what the old shard holds.

    Raises:
      shards.ShardError: what was written does not read back.
    """
    old = self._written[shard]
    parts: dict[str, tuple[Entry, Path, int]] = {}
    first = 0
    for video_id in sorted(old):
      parts[video_id] = old[video_id], self.path / shard, first
      first += old[video_id].num_records
    for video_id in self._shards[shard]:
      if video_id in self._processed:
        path = shards.Part(self.path, video_id).records
        parts[video_id] = self._processed[video_id], path, 0
    in_order = [parts[video_id] for video_id in sorted(self._shards[shard])]

    partial = self._parts / f"{shard}.partial"
    shards.write_shard(partial, in_order)
    digest = ledger.sha256_of(partial)
    ready = self._parts / f"{shard}.ready"
    os.replace(partial, ready)
    entries = {entry.video_id: entry for entry, _, _ in in_order}
    lines = [dataclasses.asdict(entry) for entry in entries.values()]
    ledger.write_json(
      self._parts / f"{shard}.json", {"sha256": digest, "videos": lines}
    )
    os.replace(ready, self.path / shard)
    self._hashes[shard] = digest
    self._written[shard] = entries
    for video_id in entries:
      shards.Part(self.path, video_id).remove()
      self._processed.pop(video_id, None)

  def write_ledgers(self) -> None:
    """Writes what became of each video, once all shards are there."""
    lines = [dataclasses.asdict(entry) for entry in self.entries]
    ledger.write_lines(self.path / "videos.jsonl", lines)
    refused = [
      {key: line[key] for key in ("video_id", "reason", "sha256")}
      for line in lines
      if line["status"] != process.KEPT
    ]
    ledger.write_lines(self.path / "quarantine.jsonl", refused)
    hashes = {shard: self._hashes[shard] for shard in self._shards}
    ledger.write_json(self.path / "hashes.json", hashes, indent=2)

  def finish(self) -> None:
    """Writes TFDS's files, dataset_info.json last, and removes the parts."""
    staging = self._parts / "tfds"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    splits: dict[str, dict[str, tuple[int, int]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, num in self._settings["num_shards"].items():
      names = [self._shard_name(split, i) for i in range(num)]
      splits[split] = {
        name: (
          sum(entry.num_records for entry in self._written[name].values()),
          (self.path / name).stat().st_size,
        )
        for name in names
      }
      entries = [entry for entry in self.entries if entry.split == split]
      counts[split] = {
        "num_videos": sum(e.status == process.KEPT for e in entries),
        "num_tracks": sum(e.num_tracks for e in entries),
        "num_records": sum(e.num_records for e in entries),
        "num_frames": sum(e.num_frames for e in entries),
      }
    metadata = {"schema_version": records.SCHEMA_VERSION, "splits": counts}
    for name in shards.write_tfds_metadata(staging, splits, metadata):
      os.replace(staging / name, self.path / name)
    self.remove_parts()

  def remove_parts(self) -> None:
    """Removes what only an unfinished run needs."""
    shutil.rmtree(self._parts, ignore_errors=True)
