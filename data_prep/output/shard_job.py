"""Job of one shard: the videos to process, and the shard to write.

A job is self-contained and runs on any machine that sees the output folder. It
is done once: after a possible earlier attempt, ask `is_done`. The pool, an
array of tasks and Beam differ only in who does which job.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from data_prep import storage
from data_prep.output import ledger, shards
from data_prep.output.ledger import Entry
from data_prep.sources.listing import Part
from data_prep.sources.manifest import Source
from marlin_jax.records import folders


@dataclasses.dataclass
class ShardJob:
  """Job of one shard.

  Attributes:
    job_id: unique; another job for the same shard has another id.
    output: folder of the data set.
    shard: file name of the shard.
    sha256: hash of the shard on disk; '' if it is missing or damaged.
    video_ids: all videos of the shard.
    written: ledger lines of the shard on disk.
    processed: ledger lines of videos that have a part.
    todo: videos still to process.
  """

  job_id: str
  output: Path
  shard: str
  sha256: str
  video_ids: list[str]
  written: dict[str, Entry]
  processed: dict[str, Entry]
  todo: list[Source]

  def to_json(self) -> str:
    """Returns one line; `from_json` is the inverse."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name in ("written", "processed"):
      entries = fields[name].items()
      fields[name] = {key: entry.to_fields() for key, entry in entries}
    fields["todo"] = [dataclasses.asdict(source) for source in self.todo]
    return json.dumps(fields, default=os.fspath)

  @classmethod
  def from_json(cls, line: str) -> ShardJob:
    """Parses a line; raises ValueError or TypeError if it is not a job."""
    fields = json.loads(line)
    for name in ("written", "processed"):
      fields[name] = {k: Entry(**entry) for k, entry in fields[name].items()}
    fields["todo"] = [
      Source(
        **source
        | {
          "path": storage.path_of(source["path"]),
          "labels": {k: tuple(v) for k, v in source["labels"].items()},
          "part": Part.from_json(source["part"]),
        }
      )
      for source in fields["todo"]
    ]
    fields["output"] = storage.path_of(fields["output"])
    return cls(**fields)

  def write(self) -> tuple[str, dict[str, Entry]]:
    """Writes the shard from parts and from the old shard.

    A shard whose records stay the same is left alone.

    Returns:
      The shard's SHA-256, and the ledger lines of its videos by id.

    Raises:
      shards.ShardError: what was written does not read back.
    """
    sources: dict[str, tuple[Entry, Path, int]] = {}
    first = 0
    for video_id in sorted(self.written):
      entry = self.written[video_id]
      sources[video_id] = entry, self.output / self.shard, first
      first += entry.num_records
    for video_id, entry in self.processed.items():
      path = shards.Part(self.output, video_id).records
      sources[video_id] = entry, path, 0
    in_order = [sources[video_id] for video_id in sorted(self.video_ids)]
    digest = self.sha256
    if not (digest and self._records_stay(in_order)):
      digest = self._write_ready(in_order)
    entries = {entry.video_id: entry for entry, _, _ in in_order}
    lines = [entry.to_fields() for entry in entries.values()]
    ledger.write_json(
      note_path(self.output, self.shard),
      {"sha256": digest, "job": self.job_id, "videos": lines},
    )
    self._publish()
    return digest, entries

  def _records_stay(self, in_order: list[tuple[Entry, Path, int]]) -> bool:
    """Returns True if the shard holds the records of these videos already."""
    kept = [path for entry, path, _ in in_order if entry.num_records]
    num_before = sum(bool(e.num_records) for e in self.written.values())
    shard = self.output / self.shard
    return len(kept) == num_before and all(path == shard for path in kept)

  def _write_ready(self, in_order: list[tuple[Entry, Path, int]]) -> str:
    """Writes the shard under another name; returns its hash."""
    ready = ready_path(self.output, self.shard)
    partial = storage.partial_path(ready)
    shards.write_shard(partial, in_order)
    digest = folders.sha256_of(partial)
    storage.publish(partial, ready)
    return digest

  def is_done(self) -> bool:
    """Returns True if an earlier attempt at this job has written the shard.

    Its inputs, an older shard and parts, no longer exist then.
    """
    note = ledger.read_json(note_path(self.output, self.shard))
    if not note or note.get("job") != self.job_id:
      return False
    self._publish()
    return True

  def _publish(self) -> None:
    """Moves the verified shard into place and removes its parts."""
    ready = ready_path(self.output, self.shard)
    if ready.exists():
      storage.publish(ready, self.output / self.shard)
    for video_id in self.video_ids:
      shards.Part(self.output, video_id).remove()


def ready_path(output: Path, shard: str) -> Path:
  """Returns the path of a verified shard whose ledger lines are not written."""
  return output / folders.PARTS / f"{shard}.ready"


def note_path(output: Path, shard: str) -> Path:
  """Returns the path of a shard's hash and ledger lines during a run."""
  return output / folders.PARTS / f"{shard}.json"
