"""Checks across the files of a data set, for data_prep.verify.

No file is trusted: a damaged one gives a problem, not an exception.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.inspection import record_checks
from data_prep.inspection.record_checks import Expected, Problems, ShardContent
from data_prep.output import derived_files, folder_settings, ledger
from data_prep.output.derived_files import features as tfds_features
from data_prep.sources import listing
from data_prep.sources.listing import Label
from marlin_jax.records import (
  folders,
  quality_index,
  schema,
  segment_index,
)
from marlin_jax.records.cli import counted

_FILES = (
  *(folders.SETTINGS, folders.VIDEOS, folders.QUARANTINE, folders.HASHES),
  *(folders.METADATA, folders.FEATURES, folders.DATASET_INFO),
)
# More copies would hide the other notes.
_MAX_NOTES = 20


def expected(settings: dict[str, Any]) -> tuple[dict[str, str], Expected]:
  """Returns the split of each shard, and the expected properties of records.

  Args:
    settings: content of settings.json.

  Raises:
    KeyError, TypeError, AttributeError: the settings are damaged.
  """
  shard_split = {
    name: split
    for split, names in folder_settings.shards_by_split(settings).items()
    for name in names
  }
  labels = {
    name: Label(label["kind"], tuple(label["names"]))
    for name, label in settings["labels"].items()
  }
  return shard_split, Expected(
    int(settings["segment_frames"]),
    labels,
    folder_settings.record_labels(settings),
    bool(settings["has_sound"]),
    int(folder_settings.with_old_settings(settings)["frame_size"]),
  )


def check_files(
  dataset_dir: Path, shard_split: dict[str, str], problems: Problems
) -> None:
  """Checks which files exist."""
  if (dataset_dir / folders.PARTS).exists():
    problems.add(
      "unfinished",
      folders.PARTS,
      "belongs to a run that was stopped or is still going",
    )
  if not (dataset_dir / folders.DATASET_INFO).exists():
    problems.add(
      "unfinished", folders.DATASET_INFO, "missing; it is written last"
    )
  expected = {*_FILES, *shard_split, *map(quality_index.name_for, shard_split)}
  # Data sets of earlier versions lack it: see `check_segments`.
  optional = {*map(segment_index.name_for, shard_split)}
  for name in sorted(expected - {folders.DATASET_INFO}):
    if not (dataset_dir / name).is_file():
      problems.add("missing", name, "no such file")
  present = {path.name for path in dataset_dir.iterdir()}
  optional |= {folders.PARTS, folders.FORGOTTEN}
  for name in sorted(present - expected - optional):
    problems.add("unexpected", name, "not written by data_prep.prepare")


def read_ledger(
  dataset_dir: Path, problems: Problems
) -> dict[str, ledger.Entry]:
  """Returns the ledger by video_id; adds problems of its lines."""
  path = dataset_dir / folders.VIDEOS
  entries: dict[str, ledger.Entry] = {}
  if not path.exists():
    return entries
  with path.open("rb") as lines:
    for number, line in enumerate(lines, 1):
      where = f"{path.name} line {number}"
      try:
        entry = ledger.Entry(**ledger.parse_json(line))
        _check_types(entry)
      except (ValueError, TypeError) as e:
        problems.add("damaged", where, f"not a line of the ledger: {e}")
        continue
      if entry.video_id in entries:
        problems.add("split", where, f"{entry.video_id!r} appears twice")
      entries[entry.video_id] = entry
  return entries


def _check_types(entry: ledger.Entry) -> None:
  for field in dataclasses.fields(entry):
    kind = {"str": str, "int": int}.get(field.type, object)
    if not isinstance(getattr(entry, field.name), kind):
      raise TypeError(f"{field.name} is {getattr(entry, field.name)!r}")


def check_ledger(
  dataset_dir: Path,
  entries: dict[str, ledger.Entry],
  expected: Expected,
  problems: Problems,
) -> None:
  """Checks that lines of the ledger agree with each other and quarantine."""
  splits: dict[str, ledger.Entry] = {}
  for entry in entries.values():
    where = f"videos.jsonl {entry.video_id!r}"
    other = splits.setdefault(entry.subject_id, entry)
    if entry.subject_id and other.split != entry.split:
      problems.add(
        "split",
        where,
        f"subject {entry.subject_id!r} is in {entry.split!r}, and in "
        f"{other.split!r} in {other.video_id!r}",
      )
    if entry.is_kept != bool(entry.num_records):
      what = f"status {entry.status!r} with {entry.num_records} records"
      problems.add("counts", where, what)
    if entry.is_kept:
      for what in record_checks.label_problems(entry.labels, expected.labels):
        problems.add("content", where, what)
  path = dataset_dir / folders.QUARANTINE
  lines = ledger.as_lines(derived_files.quarantined(entries.values()))
  if path.exists() and path.read_bytes() != lines.encode():
    what = "differs from the left-out videos of videos.jsonl"
    problems.add("counts", path.name, what)


def notes(
  settings: dict[str, Any], entries: dict[str, ledger.Entry]
) -> list[str]:
  """Returns remarks that are not damage, such as copies of a video."""
  notes = folder_settings.version_notes(
    settings.get(folder_settings.VERSIONS, {})
  )
  if num_failed := sum(entry.is_failed for entry in entries.values()):
    notes.append(
      f"{counted(num_failed, 'video')} failed because of the machine that "
      "prepared the data set; prepare again to try them again"
    )
  # With the part of the file: others are no copies.
  by_content: dict[tuple[str, str], ledger.Entry] = {}
  num_copies = num_across_splits = 0
  for entry in entries.values():
    if entry.num_records and entry.sha256:
      part = listing.fragment_of(entry.video_id)
      other = by_content.setdefault((entry.sha256, part), entry)
      if other is not entry:
        num_copies += 1
        num_across_splits += other.split != entry.split
        if num_copies <= _MAX_NOTES:
          notes.append(
            f"{entry.video_id!r} ({entry.split}) is a copy of "
            f"{other.video_id!r} ({other.split})"
          )
  if num_copies:
    notes.insert(
      len(notes) - min(num_copies, _MAX_NOTES),
      f"{counted(num_copies, 'video')} of equal content under another "
      f"name, {num_across_splits} of them in another split",
    )
  return notes


# --- Shards -------------------------------------------------------------------


def check_hashes(
  dataset_dir: Path,
  shard_split: dict[str, str],
  shards: list[ShardContent],
  problems: Problems,
) -> None:
  """Compares the shards with hashes.json."""
  hashes = _json(dataset_dir / folders.HASHES, problems)
  for shard in shards:
    expected = hashes.get(shard.name)
    if expected != shard.sha256 and shard.sha256:
      what = f"SHA-256 {shard.sha256}, hashes.json says {expected}"
      problems.add("damaged", shard.name, what)
  for name in sorted(set(hashes) - set(shard_split)):
    problems.add(
      "counts", folders.HASHES, f"names {name!r}, which is not a shard"
    )


def check_places(
  settings: dict[str, Any],
  entries: dict[str, ledger.Entry],
  shards: list[ShardContent],
  problems: Problems,
) -> None:
  """Checks that each video is in its shard and agrees with the ledger."""
  seen: dict[str, str] = {}
  for shard in shards:
    for video_id, video in shard.videos.items():
      where = f"{shard.name} {video_id!r}"
      if video_id in seen:
        problems.add("split", where, f"also in {seen[video_id]}")
      seen[video_id] = shard.name
      entry = entries.get(video_id)
      if entry is None:
        problems.add("counts", where, "not in videos.jsonl")
        continue
      if entry.split not in settings["num_shards"]:
        what = f"split {entry.split!r}, which is not in settings.json"
        problems.add("split", where, what)
        continue
      place = folder_settings.shard_of(settings, entry.split, video_id)
      if place != shard.name:
        problems.add("split", where, f"belongs to {place}")
      if video.subject_ids != {entry.subject_id}:
        problems.add(
          "split",
          where,
          f"its records have subject {sorted(video.subject_ids)}, videos.jsonl "
          f"{entry.subject_id!r}",
        )
      if video.quality != entry.quality:
        what = "qualities of its records differ from videos.jsonl"
        problems.add("counts", where, what)
      # Earlier versions noted no sides, or no segments at all.
      noted = ledger.lists_of(entry.segments)
      if any(
        row[: len(of_ledger)] != of_ledger
        for row, of_ledger in itertools.zip_longest(
          video.lengths, noted or video.lengths, fillvalue=[None]
        )
      ):
        what = "tracks and lengths of its records differ from videos.jsonl"
        problems.add("counts", where, what)
      for name, number in video.counts.items():
        if number != getattr(entry, name):
          what = f"{name} {number}, videos.jsonl says {getattr(entry, name)}"
          problems.add("counts", where, what)
  for entry in entries.values():
    if entry.num_records and entry.video_id not in seen:
      where = f"videos.jsonl {entry.video_id!r}"
      what = f"none of its {entry.num_records} records is in a shard"
      problems.add("counts", where, what)


def check_quality(
  dataset_dir: Path,
  shard_split: dict[str, str],
  shards: list[ShardContent],
  problems: Problems,
) -> None:
  """Compares the quality index with the records."""
  by_index = _by_index(quality_index.name_for, shard_split, shards)
  for name, in_split in by_index:
    path = dataset_dir / name
    if not path.exists():
      continue  # other checks report it
    expected = quality_index.pack(
      video.quality for shard in in_split for video in shard.videos.values()
    )
    data = path.read_bytes()
    if data == expected:
      continue
    try:
      rows, expected_rows = map(quality_index.unpack, (data, expected))
    except ValueError as e:
      problems.add("damaged", name, str(e))
      continue
    what = f"{len(rows)} rows, expected {len(expected_rows)}"
    if len(rows) == len(expected_rows):
      wrong = rows != expected_rows
      what = (
        f"{wrong.sum()} of {len(rows)} rows differ from the records, first row "
        f"{int(wrong.argmax())}"
      )
    problems.add("counts", name, what)


def check_segments(
  dataset_dir: Path,
  entries: dict[str, ledger.Entry],
  shard_split: dict[str, str],
  shards: list[ShardContent],
  problems: Problems,
) -> None:
  """Compares the segment index with the records.

  It may be missing if the ledger is of a version that did not note segments.
  """
  by_index = _by_index(segment_index.name_for, shard_split, shards)
  for name, in_split in by_index:
    path = dataset_dir / name
    videos = [pair for shard in in_split for pair in shard.videos.items()]
    if not path.exists():
      if all(i in entries and entries[i].segments for i, _ in videos):
        problems.add("missing", name, "no such file")
      continue
    expected = segment_index.pack(
      segment_index.Video(min(video.subject_ids), video.lengths, video_id)
      for video_id, video in videos
    )
    wanted = (expected, segment_index.without_names(expected))
    if path.read_bytes() not in wanted:
      problems.add("counts", name, "differs from the records")


def _by_index(
  name_for: Callable[[str], str],
  shard_split: dict[str, str],
  shards: list[ShardContent],
) -> Iterator[tuple[str, list[ShardContent]]]:
  """Yields the name of each split's index, and its shards, if all are read."""
  by_name = {shard.name: shard for shard in shards}
  split_shards: dict[str, list[ShardContent]] = {}
  for name in shard_split:
    shard = by_name.get(name, ShardContent(name))
    split_shards.setdefault(name_for(name), []).append(shard)
  for name, in_split in split_shards.items():
    if all(shard.is_read for shard in in_split):
      yield name, in_split


def check_metadata(
  dataset_dir: Path,
  settings: dict[str, Any],
  entries: dict[str, ledger.Entry],
  problems: Problems,
) -> None:
  """Compares metadata.json with the settings and the ledger."""
  metadata = _json(dataset_dir / folders.METADATA, problems)
  if not metadata:
    return
  version = metadata.get("schema_version")
  if version != schema.SCHEMA_VERSION:
    problems.add(
      "schema",
      folders.METADATA,
      f"schema_version {version}, this program reads {schema.SCHEMA_VERSION}",
    )
  if metadata.get("labels") != settings["labels"]:
    what = "labels differ from settings.json"
    problems.add("counts", folders.METADATA, what)
  size = metadata.get("frame_size", schema.FRAME_SIZE)
  wanted = folder_settings.with_old_settings(settings)["frame_size"]
  if size != wanted:
    what = f"frame_size is {size}, settings.json has {wanted}"
    problems.add("counts", folders.METADATA, what)
  splits = metadata.get("splits", {})
  for split in sorted({*splits, *(e.split for e in entries.values())}):
    expected = derived_files.counts(
      entry for entry in entries.values() if entry.split == split
    )
    if splits.get(split) != expected:
      what = f"{split}: {splits.get(split)}, videos.jsonl gives {expected}"
      problems.add("counts", folders.METADATA, what)


def check_tfds(
  dataset_dir: Path,
  expected: Expected,
  shard_split: dict[str, str],
  shards: list[ShardContent],
  problems: Problems,
) -> None:
  """Opens the data set with TFDS, reads a record per split, compares counts.

  Of a data set in a bucket, whose shards TFDS cannot open, no record is read.
  """
  if not (dataset_dir / folders.DATASET_INFO).exists():
    return
  import tensorflow_datasets as tfds

  by_name = {shard.name: shard for shard in shards}
  is_remote = folders.is_remote(dataset_dir)
  try:
    builder = tfds.builder_from_directory(dataset_dir)
    features = set(builder.info.features)
    expected_features = set(
      tfds_features(expected.record_labels, expected.has_sound)
    )
    if features != expected_features:
      what = (
        f"features {sorted(features)}, expected {sorted(expected_features)}"
      )
      problems.add("tfds", folders.FEATURES, what)
    infos = builder.info.splits
    if set(infos) != set(shard_split.values()):
      what = f"splits {sorted(infos)}, settings.json has "
      what += str(sorted(set(shard_split.values())))
      problems.add("counts", folders.DATASET_INFO, what)
    for split, info in infos.items():
      names = [name for name in shard_split if shard_split[name] == split]
      lengths = [
        by_name[name].num_records if name in by_name else 0 for name in names
      ]
      if list(info.shard_lengths) != lengths:
        what = f"{split}: {list(info.shard_lengths)} records, found {lengths}"
        problems.add("counts", folders.DATASET_INFO, what)
      elif info.num_examples and not is_remote:
        builder.as_data_source(split=split)[0]
  except Exception as e:  # whatever TFDS raises, it cannot read the data set
    problems.add("tfds", str(dataset_dir), f"{type(e).__name__}: {e}")


def _json(path: Path, problems: Problems) -> dict[str, Any]:
  """Returns the content of a file; {} and a problem if it is damaged."""
  content = ledger.read_json(path)
  if isinstance(content, dict):
    return content
  if path.exists():  # `check_files` reports a missing one
    problems.add("damaged", path.name, "not a JSON object")
  return {}
