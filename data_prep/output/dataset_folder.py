"""The data set folder: a TFDS directory that can be resumed at any moment.

  OUTPUT/NAME-SPLIT.array_record-00000-of-00001   records, by video_id
  OUTPUT/settings.json      settings of every record
  OUTPUT/videos.jsonl       the ledger: outcome of each video
  OUTPUT/quarantine.jsonl   left-out videos, with the reason
  OUTPUT/hashes.json        SHA-256 of each shard
  OUTPUT/NAME-SPLIT.quality.npy  quality of each record, for training
  OUTPUT/NAME-SPLIT.segments.npy  track, video and subject of each, likewise
  OUTPUT/metadata.json, features.json             schema version, counts; TFDS
  OUTPUT/dataset_info.json  TFDS; written last, so it marks a complete data set
  OUTPUT/parts/             only while a run is unfinished:
    HASH.array_record, HASH.json   one processed video: records, ledger line
    SHARD.ready, SHARD.json        a verified shard and its ledger lines
    jobs-NUMBER.jsonl              jobs of Beam

A hash of a video's id selects its shard, so that new videos change only their
own shards. Every file appears by renaming: the ledger line of a part after its
records; the ledger lines of a shard before the shard, which `_recover` moves
into place if a run was killed between the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from data_prep import storage
from data_prep.output import (
  derived_files,
  folder_settings,
  ledger,
  own_files,
  shards,
)
from data_prep.output.forgotten import Forgotten
from data_prep.output.ledger import Entry
from data_prep.output.shard_job import ShardJob, note_path, ready_path
from data_prep.sources.manifest import Source
from data_prep.video import video_to_records
from marlin_jax.records import cli, folders
from marlin_jax.records.folders import Lock, OutputFolderError


@dataclasses.dataclass(frozen=True)
class Plan:
  """Work of a run.

  Attributes:
    todo: videos to process, shard by shard.
    shards: names of the shards to write.
    num_videos: number of videos of this run.
    num_done: number of these that earlier runs finished.
    num_dropped: number of videos that leave the data set.
    has_new_labels: True if labels or their meaning have changed.
  """

  todo: list[Source]
  shards: list[str]
  num_videos: int
  num_done: int
  num_dropped: int
  has_new_labels: bool

  @property
  def is_empty(self) -> bool:
    """True if there is nothing to do."""
    return not (self.shards or self.has_new_labels)


class DatasetFolder:
  """The folder of a data set, locked while open; a context manager."""

  @cli.without_gc
  def __init__(
    self,
    path: Path,
    recipe: dict[str, Any],
    num_shards: int | None,
    videos: Sequence[Source] | None,
    task: tuple[int, int] = (0, 1),
    drop_missing: bool = False,
    forget: Sequence[str] = (),
  ) -> None:
    """Reads the folder; completes or removes what a killed run has left.

    Args:
      path: the folder; created if missing.
      recipe: settings that every record depends on; must equal those of an
        existing folder.
      num_shards: number of shards of the largest split; other splits have
        shards in proportion. None gives `shards.default_numbers`. The numbers
        stay as the folder grows.
      videos: all videos. None: those that the data set holds, with its own
        settings in place of `recipe`.
      task: number of this task and number of tasks; a task plans and changes
        only its own shards.
      drop_missing: remove videos from the data set that are not in `videos`,
        and labels and people that these lack.
      forget: videos and people to remove from the data set for good, see
        `Forgotten.adding`; recorded at once.

    Raises:
      OutputFolderError: the folder is in use, holds something else, or was
        made with another recipe or from videos that are now missing.
    """
    self.path = path
    self._parts = path / folders.PARTS
    index, count = task
    self._is_task = count > 1
    own_files.check_folder(path, ledger.read_json(path / folders.SETTINGS))
    # A bucket has no locks.
    has_locks = not folders.is_remote(path)
    self._locks = [Lock(path, shared=self._is_task)] if has_locks else []
    try:
      if self._is_task and has_locks:
        name = f"task-{index}-of-{count}.lock"
        self._locks.append(Lock(self._parts, name))
      # Settings on disk before this run.
      self._stored = ledger.read_json(path / folders.SETTINGS)
      if videos is None:
        recipe = self._stored_recipe()
      can_differ = not (self._is_task or self._holds_results())
      self._settings = folder_settings.agreed(
        path,
        None if can_differ else self._stored,
        recipe,
        num_shards,
        videos or (),
      )
      self._version = recipe.get(folder_settings.ALGORITHM_VERSION)
      self._versions = recipe.get(folder_settings.VERSIONS, {})
      self._forgotten = Forgotten.of(path)
      # Names to forget that are no video or person.
      self.unknown_names: list[str] = []
      self._sources: dict[str, Source] = {}
      by_split = folder_settings.shards_by_split(self._settings)
      self._shards: dict[str, dict[str, Source]] = {
        name: {} for names in by_split.values() for name in names
      }
      self._hashes: dict[str, str] = {}
      # Ledger lines of each shard on disk.
      self._written: dict[str, dict[str, Entry]] = {}
      # Ledger lines of parts, and videos still to process.
      self._processed: dict[str, Entry] = {}
      self._todo: set[str] = set()
      # Shards on disk that hold what their ledger lines say.
      self._whole: set[str] = set()
      self._own = {*[*self._shards][index::count]}
      self._recover()
      self._assign_videos(videos, forget)
      self._check_missing(drop_missing)
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

  def _stored_recipe(self) -> dict[str, Any]:
    if self._stored is None:
      raise OutputFolderError(f"{self.path} is not a data set of this program")
    others = {"num_shards", folder_settings.VERSIONS}
    stored = folder_settings.with_old_settings(self._stored)
    return {k: v for k, v in stored.items() if k not in others}

  def _holds_results(self) -> bool:
    return (self.path / folders.VIDEOS).exists() or any(
      path.suffix == ".json" for path in storage.listing(self._parts)
    )

  def _shard_of(self, video: Source | Entry) -> str:
    return folder_settings.shard_of(self._settings, video.split, video.video_id)

  # --- State of the folder ----------------------------------------------------

  def _recover(self) -> None:
    """Reads the ledgers; completes or removes leftovers of a killed run."""
    for partial in self._leftovers():
      partial.unlink(missing_ok=True)
    self._hashes = ledger.read_json(self.path / folders.HASHES) or {}
    # One listing: asking a bucket for each of a million parts takes hours.
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

  def _assign_videos(
    self, videos: Sequence[Source] | None, forget: Sequence[str]
  ) -> None:
    """Assigns the videos to their shards, except those to forget."""
    entries = self.entries
    if videos is None:
      videos = [ledger.source_of(entry) for entry in entries]
    if forget:
      known = [*entries, *self._part_entries(), *videos]
      self.unknown_names = self._forgotten.unknown(forget, known)
      self._forgotten = self._forgotten.adding(
        forget,
        (video.video_id for video in known),
        (self.path / folders.DATASET_INFO).exists(),
      )
      self._forgotten.write(self.path)
    for source in videos:
      if source not in self._forgotten:
        self._sources[source.video_id] = source
        self._shards[self._shard_of(source)][source.video_id] = source
    self._remove_forgotten_parts()

  def _remove_forgotten_parts(self) -> None:
    if not self._forgotten.hashes:
      return
    for entry in self._part_entries():
      if entry in self._forgotten:
        shards.Part(self.path, entry.video_id).remove()
    if not self._is_task:
      # Records whose line a killed run did not write, and jobs, may be of
      # forgotten videos; a run makes them anew.
      storage.remove(
        [
          self._parts / name
          for name in self._names
          if own_files.is_job(name) or shards.Part.is_orphan(name, self._names)
        ]
      )

  def _part_entries(self) -> list[Entry]:
    """Returns the ledger lines of the parts."""
    names = sorted(filter(shards.Part.is_line, self._names))
    lines = (ledger.read_json(self._parts / name) for name in names)
    return [Entry(**line) for line in lines if line]

  def _check_missing(self, may_drop: bool) -> None:
    """Refuses an input that lacks what the data set holds.

    Such as the folder of a table's videos, which has no labels and no people.
    """
    lines = itertools.chain(*(e.values() for e in self._written.values()))
    kept = [entry for entry in lines if entry not in self._forgotten]
    if may_drop or not kept:
      return
    advice = "Use the whole input, or another --output; with --drop_missing"
    missing = [e.video_id for e in kept if e.video_id not in self._sources]
    if missing:
      raise OutputFolderError(
        f"{len(missing)} videos of {self.path} are missing in the input, first "
        f"{min(missing)!r}. {advice} these videos leave the data set"
      )
    stored = (self._stored or {}).get("labels", {})
    if labels := sorted(stored.keys() - self._settings.get("labels", {})):
      raise OutputFolderError(
        f"labels of {self.path} are missing in the input: {', '.join(labels)}. "
        f"{advice} these labels leave the data set"
      )
    of_entries, of_input = (
      any(each.subject_id for each in videos)
      for videos in (kept, self._sources.values())
    )
    if of_entries and not of_input:
      raise OutputFolderError(
        f"the input names no people, and {self.path} does. {advice} all of its "
        "videos are prepared again, without their people"
      )

  def _leftovers(self) -> Iterator[Path]:
    """Yields half-written files of a run that was killed."""
    partials = own_files.leftovers(self.path)
    if not self._is_task:
      yield from partials
      return
    # Other tasks are still writing their files.
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
      with path.open(encoding="utf-8") as lines:
        return [Entry.from_line(line) for line in lines]
    except (ValueError, TypeError, KeyError) as e:
      raise OutputFolderError(
        f"{path} is damaged ({e}); restore it, or choose another --output"
      ) from e

  @cli.without_gc
  def plan(
    self, settings: video_to_records.Settings, retry_quarantined: bool
  ) -> Plan:
    """Finds the work that is left; `job`, `add` and `write_shard` rely on it.

    Args:
      settings: settings of this run. Failed videos are always tried again, and
        quarantined ones if their limits were others, see `Settings.strictness`.
      retry_quarantined: try all quarantined videos again.
    """
    limits = settings.strictness()

    def is_valid(entry: Entry | None, source: Source, since: float) -> bool:
      """Returns True if a line, written at `since`, still holds."""
      if entry is None:
        return False
      if entry.status != video_to_records.KEPT:
        if entry.is_failed:
          return False
        if entry.status == video_to_records.QUARANTINED and (
          retry_quarantined or entry.limits != limits
        ):
          return False
      return ledger.is_of(entry, source, since)

    todo: list[Source] = []
    to_write: list[str] = []
    num_dropped = num_relabelled = 0
    ledger_since = ledger.modified(self.path / folders.VIDEOS)
    own = [shard for shard in self._shards if shard in self._own]
    for shard in own:
      videos = self._shards[shard]
      note = note_path(self.path, shard)
      since = ledger_since
      if note.name in self._names:
        since = ledger.modified(note)
      is_current = self._check_shard(shard)
      written = self._written[shard]
      # Others have only changed their split.
      num_dropped += len(written.keys() - self._sources.keys())
      for video_id, source in videos.items():
        entry = written.get(video_id)
        if is_valid(entry, source, since):
          written[video_id] = ledger.relabelled(entry, source)
          num_relabelled += written[video_id] is not entry
          continue
        is_current = False
        part = shards.Part(self.path, video_id)
        entry = part.entry() if part.line.name in self._names else None
        if entry and is_valid(entry, source, ledger.modified(part.line)):
          self._processed[video_id] = ledger.relabelled(entry, source)
        else:
          todo.append(source)
      if not is_current or set(written) != set(videos):
        to_write.append(shard)
    self._todo = {source.video_id for source in todo}
    num_videos = sum(len(self._shards[shard]) for shard in own)
    stored_labels = (self._stored or {}).get("labels")
    return Plan(
      todo,
      to_write,
      num_videos,
      num_videos - len(todo),
      num_dropped,
      num_relabelled > 0 or stored_labels != self._settings.get("labels"),
    )

  def plan_removal(self) -> Plan:
    """Returns the work of removing videos; no other is processed.

    Raises:
      OutputFolderError: a shard is lost, which only a whole run can mend.
    """
    own = [shard for shard in self._shards if shard in self._own]
    lost = {shard: self._written.get(shard, {}).keys() for shard in own}
    lost = {s: ids - self._shards[s].keys() for s, ids in lost.items()}
    to_write = [shard for shard in own if lost[shard]]
    for shard in to_write:
      if not self._check_shard(shard):
        raise OutputFolderError(
          f"{self.path / shard} is missing or damaged; run again with --input"
        )
    num = len(self._sources)
    num_dropped = sum(map(len, lost.values()))
    return Plan([], to_write, num, num, num_dropped, False)

  def _check_shard(self, shard: str) -> bool:
    """Returns True if a shard holds its records; else drops their lines."""
    written = self._written.setdefault(shard, {})
    expected = sum(entry.num_records for entry in written.values())
    if shard in self._hashes and shards.holds(self.path / shard, expected):
      self._whole.add(shard)
      return True
    # Lines of videos without records remain valid.
    self._written[shard] = {k: e for k, e in written.items() if not e.is_kept}
    return False

  @property
  def forgotten(self) -> Forgotten:
    """The videos and people that were removed for good."""
    return self._forgotten

  @property
  def version_notes(self) -> list[str]:
    """Notes on packages of which several versions have made records."""
    versions = self._settings.get(folder_settings.VERSIONS, {})
    return folder_settings.version_notes(versions)

  @property
  def record_labels(self) -> dict[str, int]:
    """Number of values of each label that records hold too."""
    return self._settings[folder_settings.RECORD_LABELS]

  @property
  def is_finished(self) -> bool:
    """True if the data set is complete."""
    return (self.path / folders.DATASET_INFO).exists() and all(
      data is None or (path.exists() and path.read_bytes() == data)
      for path, data in derived_files.index_files(
        self.path, self._settings, self._written
      )
    )

  @property
  def entries(self) -> list[Entry]:
    """The ledger, sorted by video_id."""
    lines = itertools.chain(*(e.values() for e in self._written.values()))
    return sorted(lines, key=lambda entry: entry.video_id)

  @property
  def own_entries(self) -> list[Entry]:
    """The ledger lines of this task's videos."""
    lines = (self._written.get(shard, {}).values() for shard in self._own)
    return [*itertools.chain(*lines)]

  # --- Changes ----------------------------------------------------------------

  def begin(self, plan: Plan) -> None:
    """Marks the data set as unfinished.

    Raises:
      OutputFolderError: another version of the algorithms prepared the folder,
        or another task has just begun it with other settings.
    """
    # Folders that are older than this setting have version 1.
    version = self._settings.get(folder_settings.ALGORITHM_VERSION, 1)
    if plan.todo and self._version not in (None, version):
      raise OutputFolderError(
        f"{self.path} was prepared by version {version} of decoding and "
        f"tracking; this is version {self._version}, whose records differ. "
        "Prepare the whole input into another --output"
      )
    stored = ledger.read_json(self.path / folders.SETTINGS)
    if self._is_task and not folder_settings.are_same(
      stored, (self._stored, self._settings)
    ):
      raise OutputFolderError(
        f"another task has just begun {self.path} with other settings or "
        "another input; run this task again to see the difference"
      )
    if plan.todo:
      name = folder_settings.VERSIONS
      known = [s.get(name, {}) for s in (self._settings, stored or {})]
      if versions := folder_settings.merged_versions(*known, self._versions):
        self._settings[name] = versions
    (self.path / folders.DATASET_INFO).unlink(missing_ok=True)
    ledger.write_json(self.path / folders.SETTINGS, self._settings, indent=2)
    self._parts.mkdir(parents=True, exist_ok=True)
    for source in plan.todo:
      # A job would take an outdated part as done.
      part = shards.Part(self.path, source.video_id)
      if not self._names.isdisjoint((part.line.name, part.records.name)):
        part.remove()

  def add(self, entry: Entry) -> str | None:
    """Adds a processed video, to the quarantine if it is left out.

    Returns:
      Its shard if that can be written now, else None.
    """
    if not folders.is_remote(self.path):  # objects cannot grow
      lines = derived_files.quarantined([entry])
      ledger.append_lines(self.path / folders.QUARANTINE, lines)
    self._processed[entry.video_id] = entry.packed()
    self._todo.discard(entry.video_id)
    shard = self._shard_of(self._sources[entry.video_id])
    return shard if self.is_complete(shard) else None

  def is_complete(self, shard: str) -> bool:
    """Returns True if every video of a shard is processed."""
    return self._todo.isdisjoint(self._shards[shard])

  def job(self, shard: str) -> ShardJob:
    """Returns the job of writing a shard."""
    videos = self._shards[shard]
    return ShardJob(
      job_id=uuid.uuid4().hex,
      output=self.path,
      shard=shard,
      sha256=self._hashes[shard] if shard in self._whole else "",
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
    """Adds shards that other processes have written.

    Raises:
      OutputFolderError: one of them is missing.
    """
    for shard in names:
      note = ledger.read_json(note_path(self.path, shard))
      if not note or not (self.path / shard).exists():
        raise OutputFolderError(
          f"{self.path} lacks {shard}, which a job should have written; run "
          "again"
        )
      self._take(shard, note)

  def _take(self, shard: str, note: dict[str, Any]) -> None:
    self._hashes[shard] = note["sha256"]
    self._written[shard] = {
      line["video_id"]: Entry(**line).packed() for line in note["videos"]
    }

  def write_ledgers(self) -> None:
    """Writes ledger, quarantine and hashes; call it after all shards."""
    entries = self.entries
    lines = (entry.to_line() for entry in entries)
    ledger.write_lines(self.path / folders.VIDEOS, lines)
    lines = ledger.as_lines(derived_files.quarantined(entries))
    ledger.write_lines(self.path / folders.QUARANTINE, [lines])
    hashes = {s: self._hashes[s] for s in self._shards if s in self._hashes}
    ledger.write_json(self.path / folders.HASHES, hashes, indent=2)

  def finish(self) -> None:
    """Writes the indices and the files of TFDS; removes the parts."""
    derived_files.write(self.path, self._settings, self._written)
    dataclasses.replace(self._forgotten, was_complete=False).write(self.path)
    self.remove_parts()

  def remove_parts(self) -> None:
    """Removes the files of an unfinished run."""
    own_files.remove_parts(self.path)
