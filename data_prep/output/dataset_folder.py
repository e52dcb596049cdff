"""From processed videos to a finished TFDS directory, resumable at any moment.

  OUTPUT/NAME-SPLIT.array_record-00000-of-00001   records, by video_id
  OUTPUT/settings.json      what every record was made with
  OUTPUT/videos.jsonl       the ledger: what became of each video
  OUTPUT/quarantine.jsonl   those that were not kept, and why
  OUTPUT/hashes.json        SHA-256 of each shard
  OUTPUT/NAME-SPLIT.quality.npy  quality of each record, for the trainer
  OUTPUT/metadata.json, features.json             schema version, counts; TFDS
  OUTPUT/dataset_info.json  TFDS; written last, so it is there when all else is
  OUTPUT/parts/             only while a run is unfinished:
    HASH.array_record, HASH.json   one processed video: records, ledger line
    SHARD.ready, SHARD.json        a verified shard and its ledger lines
    jobs-NUMBER.jsonl              what Beam is to do

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
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from data_prep import storage
from data_prep.output import ledger, shards
from data_prep.output.ledger import Entry
from data_prep.output.shard_job import ShardJob, note_path, ready_path
from data_prep.sources.manifest import Input, Source, stable_hash
from data_prep.video import video_to_records
from marlin_jax.records import folders, quality_index, schema
from marlin_jax.records.folders import Lock, OutputFolderError

# Some 100 MB of short clips.
VIDEOS_PER_SHARD = 32


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run has to do.

  Attributes:
    todo: videos to process, shard by shard.
    shards: names of the shards to write.
    num_videos: videos of this run.
    num_done: of these, how many were done before.
  """

  todo: list[Source]
  shards: list[str]
  num_videos: int
  num_done: int


def shard_index(video_id: str, num_shards: int) -> int:
  """Returns which of its split's shards a video belongs to."""
  return stable_hash(f"shard:{video_id}") % num_shards


def shard_name(settings: dict[str, Any], split: str, index: int) -> str:
  """Returns the file name of a shard; `settings` are those of the folder."""
  num = settings["num_shards"][split]
  return f"{settings['name']}-{split}.array_record-{index:05d}-of-{num:05d}"


def shard_of(settings: dict[str, Any], split: str, video_id: str) -> str:
  """Returns the file name of the shard that a video belongs to."""
  num = settings["num_shards"][split]
  return shard_name(settings, split, shard_index(video_id, num))


def refused(entries: Iterable[Entry]) -> list[dict[str, str]]:
  """Returns the lines of quarantine.jsonl: videos that were not kept."""
  return [
    {key: getattr(entry, key) for key in ("video_id", "reason", "sha256")}
    for entry in entries
    if not entry.is_kept
  ]


def counts(entries: Iterable[Entry]) -> dict[str, int]:
  """Returns what metadata.json says of a split."""
  kept = [entry for entry in entries if entry.is_kept]
  return {
    "num_videos": len(kept),
    "num_tracks": sum(entry.num_tracks for entry in kept),
    "num_records": sum(entry.num_records for entry in kept),
    "num_frames": sum(entry.num_frames for entry in kept),
  }


class DatasetFolder:
  """An output folder, locked while this object is open; a context manager."""

  def __init__(
    self,
    path: Path,
    recipe: dict[str, Any],
    num_shards: int | None,
    videos: Input,
    task: tuple[int, int] = (0, 1),
  ) -> None:
    """Reads what is there; changes nothing but leftovers of a killed run.

    Args:
      path: made where it is missing.
      recipe: what every record depends on; must be what an existing folder was
        made with.
      num_shards: for the largest split, the others in proportion; None is one
        for every VIDEOS_PER_SHARD videos. Kept as the folder grows.
      videos: all of them, and what their labels mean.
      task: number of this task, and how many there are; each plans and
        changes its own shards only.

    Raises:
      OutputFolderError: the folder is in use, holds something else, was made
        with another recipe or from videos that are now missing.
    """
    self.path = path
    sources = videos.sources
    self._labels, self._has_sound = videos.labels, videos.has_sound
    self._parts = path / folders.PARTS
    index, count = task
    self._is_task = count > 1
    # A bucket has no locks.
    has_locks = not storage.is_remote(path)
    self._locks = [Lock(path, shared=self._is_task)] if has_locks else []
    try:
      if self._is_task and has_locks:
        name = f"task-{index}-of-{count}.lock"
        self._locks.append(Lock(self._parts, name))
      self._found = ledger.read_json(path / folders.SETTINGS)
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
      self._own = {*[*self._shards][index::count]}
      self._recover()
    except BaseException:
      self._close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._close()

  def _close(self) -> None:
    for lock in self._locks:
      lock.close()

  def _agree(
    self,
    recipe: dict[str, Any],
    num_shards: int | None,
    sources: Sequence[Source],
  ) -> dict[str, Any]:
    """Returns the settings, after comparing them with those of the folder."""
    path = self.path / folders.SETTINGS
    found = ledger.read_json(path)
    # Another task may be about to write it.
    strangers = [
      entry
      for entry in storage.listing(self.path)
      if entry != self._parts and entry.suffix != folders.PARTIAL_SUFFIX
    ]
    if found is None and strangers:
      raise OutputFolderError(
        f"{self.path} holds files but no settings.json, so it is no data set "
        "of this program; choose an empty or new folder as --output"
      )
    if found is None or not (self._is_task or self._holds_results()):
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
    return (self.path / folders.VIDEOS).exists() or any(
      path.suffix == ".json" for path in storage.listing(self._parts)
    )

  def _shard_name(self, split: str, index: int) -> str:
    return shard_name(self._settings, split, index)

  def _shard_of(self, video: Source | Entry) -> str:
    return shard_of(self._settings, video.split, video.video_id)

  # --- What is there ----------------------------------------------------------

  def _recover(self) -> None:
    """Reads the ledgers, and completes or clears what a killed run left."""
    for partial in self._leftovers():
      partial.unlink(missing_ok=True)
    self._hashes = ledger.read_json(self.path / folders.HASHES) or {}
    # Asking a bucket for each part of a million videos takes hours.
    self._names = {path.name for path in storage.listing(self._parts)}
    for entry in self._ledger_lines():
      lines = self._written.setdefault(self._shard_of(entry), {})
      lines[entry.video_id] = entry
    for shard in self._shards:
      note_file = note_path(self.path, shard)
      note = note_file.name in self._names and ledger.read_json(note_file)
      ready = ready_path(self.path, shard)
      if shard in self._own and ready.name in self._names:
        if note and folders.sha256_of(ready) == note["sha256"]:
          storage.publish(ready, self.path / shard)
        else:
          ready.unlink()
      if note:
        self._take(shard, note)
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

  def _leftovers(self) -> Iterator[Path]:
    """Yields half-written files of a run that was killed."""
    partials = [
      path
      for folder in (self.path, self._parts)
      for path in storage.listing(folder)
      if path.suffix == folders.PARTIAL_SUFFIX
    ]
    if not self._is_task:
      yield from partials
      return
    # Other tasks are writing theirs.
    own = {ready_path(self.path, shard).name for shard in self._own}
    own |= {
      shards.Part(self.path, video_id).records.name
      for shard in self._own
      for video_id in self._shards[shard]
    }
    for partial in partials:
      if folders.final_name(partial.name) in own:
        yield partial

  def _ledger_lines(self) -> list[Entry]:
    path = self.path / folders.VIDEOS
    if not path.exists():
      return []
    try:
      lines = path.read_text(encoding="utf-8").splitlines()
      return [Entry(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
      raise OutputFolderError(
        f"{path} is damaged ({e}); restore it, or choose another --output"
      ) from e

  def plan(
    self, settings: video_to_records.Settings, retry_quarantined: bool
  ) -> Plan:
    """Compares what is there with what is wanted.

    Args:
      settings: of this run; quarantined videos are tried again under limits
        other than those they were quarantined under.
      retry_quarantined: try them again in any case.
    """
    limits = dataclasses.asdict(settings.limits)

    def holds(entry: Entry | None, source: Source, since: float) -> bool:
      """Says whether the entry, written at a time, is good for a video."""
      if entry is None:
        return False
      if entry.status == video_to_records.QUARANTINED and (
        retry_quarantined or entry.limits != limits
      ):
        return False
      return ledger.is_of(entry, source, since)

    todo: list[Source] = []
    to_write: list[str] = []
    ledger_since = ledger.modified(self.path / folders.VIDEOS)
    own = {name: of for name, of in self._shards.items() if name in self._own}
    for shard, videos in own.items():
      note = note_path(self.path, shard)
      since = ledger_since
      if note.name in self._names:
        since = ledger.modified(note)
      whole = self._is_whole(shard)
      if not whole:
        # Its records are lost; what is known of videos without any is not.
        self._written[shard] = {
          video_id: entry
          for video_id, entry in self._written.get(shard, {}).items()
          if not entry.is_kept
        }
      written = self._written.setdefault(shard, {})
      for video_id, source in videos.items():
        if holds(written.get(video_id), source, since):
          continue
        whole = False
        part = shards.Part(self.path, video_id)
        entry = part.entry() if part.line.name in self._names else None
        if entry and holds(entry, source, ledger.modified(part.line)):
          self._processed[video_id] = entry
        else:
          todo.append(source)
      if not whole or set(written) != set(videos):
        to_write.append(shard)
    self._todo = {source.video_id for source in todo}
    num_videos = sum(map(len, own.values()))
    return Plan(todo, to_write, num_videos, num_videos - len(todo))

  def _is_whole(self, shard: str) -> bool:
    if shard not in self._hashes:
      return False
    lines = self._written.get(shard, {})
    expected = sum(entry.num_records for entry in lines.values())
    return shards.holds(self.path / shard, expected)

  @property
  def is_finished(self) -> bool:
    return (self.path / folders.DATASET_INFO).exists() and all(
      path.exists() and path.read_bytes() == data
      for path, data in self._quality_files()
    )

  @property
  def entries(self) -> list[Entry]:
    """The ledger, by video_id."""
    lines = itertools.chain(*(e.values() for e in self._written.values()))
    return sorted(lines, key=lambda entry: entry.video_id)

  def _quality_files(self) -> Iterator[tuple[Path, bytes]]:
    """Yields the quality file of each split, and what belongs in it."""
    for split, num in self._settings["num_shards"].items():
      names = [self._shard_name(split, i) for i in range(num)]
      data = quality_index.pack(
        entry.quality
        for name in names
        for _, entry in sorted(self._written.get(name, {}).items())
        if entry.num_records
      )
      yield self.path / quality_index.name_for(names[0]), data

  # --- What a run changes -----------------------------------------------------

  def begin(self, plan: Plan) -> None:
    """Marks the data set as unfinished.

    Raises:
      OutputFolderError: another task has begun it otherwise in the meantime.
    """
    found = ledger.read_json(self.path / folders.SETTINGS)
    if self._is_task and found not in (None, self._found, self._settings):
      raise OutputFolderError(
        f"another task has begun {self.path} just now, with other settings or "
        "another input; run this one again to see which"
      )
    (self.path / folders.DATASET_INFO).unlink(missing_ok=True)
    ledger.write_json(self.path / folders.SETTINGS, self._settings, indent=2)
    self._parts.mkdir(parents=True, exist_ok=True)
    for source in plan.todo:
      # Not wanted any more; whoever does a job takes what is there as done.
      part = shards.Part(self.path, source.video_id)
      if not self._names.isdisjoint((part.line.name, part.records.name)):
        part.remove()

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

  def job(self, shard: str) -> ShardJob:
    """Returns what is left to do for a shard."""
    videos = self._shards[shard]
    return ShardJob(
      job_id=uuid.uuid4().hex,
      output=self.path,
      shard=shard,
      video_ids=[*videos],
      written=self._written[shard],
      processed={
        video_id: self._processed[video_id]
        for video_id in videos
        if video_id in self._processed
      },
      todo=[s for s in videos.values() if s.video_id in self._todo],
    )

  def write_shard(self, shard: str) -> None:
    """Writes a shard whose videos are all processed.

    Raises:
      shards.ShardError: what was written does not read back.
    """
    self._hashes[shard], self._written[shard] = self.job(shard).write()
    for video_id in self._written[shard]:
      self._processed.pop(video_id, None)

  def take_shards(self, names: Sequence[str]) -> None:
    """Takes note of shards that others have written.

    Raises:
      OutputFolderError: one of them is not there.
    """
    for shard in names:
      note = ledger.read_json(note_path(self.path, shard))
      if not note or not (self.path / shard).exists():
        raise OutputFolderError(
          f"{self.path} lacks {shard}, which a job was to write; run again"
        )
      self._take(shard, note)

  def _take(self, shard: str, note: dict[str, Any]) -> None:
    self._hashes[shard] = note["sha256"]
    self._written[shard] = {
      line["video_id"]: Entry(**line) for line in note["videos"]
    }

  def write_ledgers(self) -> None:
    """Writes what became of each video, once all shards are there."""
    lines = [dataclasses.asdict(entry) for entry in self.entries]
    ledger.write_lines(self.path / folders.VIDEOS, lines)
    ledger.write_lines(self.path / folders.QUARANTINE, refused(self.entries))
    hashes = {shard: self._hashes[shard] for shard in self._shards}
    ledger.write_json(self.path / folders.HASHES, hashes, indent=2)

  def finish(self) -> None:
    """Writes the trainer's and TFDS's files, and removes the parts."""
    for path, data in self._quality_files():
      ledger.write_if_new(path, data)
    splits: dict[str, dict[str, tuple[int, int]]] = {}
    by_split: dict[str, dict[str, int]] = {}
    for split, num in self._settings["num_shards"].items():
      names = [self._shard_name(split, i) for i in range(num)]
      splits[split] = {
        name: (
          sum(entry.num_records for entry in self._written[name].values()),
          storage.size(self.path / name),
        )
        for name in names
      }
      by_split[split] = counts(e for e in self.entries if e.split == split)
    metadata = {
      "schema_version": schema.SCHEMA_VERSION,
      "splits": by_split,
      "labels": {n: dataclasses.asdict(v) for n, v in self._labels.items()},
    }
    with tempfile.TemporaryDirectory() as staging:
      for name in shards.write_tfds_metadata(
        Path(staging), splits, metadata, self._labels, self._has_sound
      ):
        data = (Path(staging) / name).read_bytes()
        folders.write_bytes(self.path / name, data)
    self.remove_parts()

  def remove_parts(self) -> None:
    """Removes what only an unfinished run needs."""
    storage.remove_folder(self._parts)
