"""Checks a prepared data set completely.

  python -m data_prep.verify DATASET_DIR

Hashes every shard, decodes every record, frame and label map, and compares
ledger, metadata and shards. The exit code is 0 for a whole data set, 1 for a
damaged one, 2 if there is no data set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import storage
from data_prep.output import ledger
from marlin_jax.records import cli, extras, folders, schema
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  from data_prep.inspection.record_checks import (
    Expected,
    Problems,
    ShardContent,
  )

# Problems printed; the JSON report lists more.
MAX_SHOWN = 20
# A worker reports nothing while it hashes a shard, GBs on a slow disk.
STALL_SECS = 3600.0
# No leak is known here; workers are replaced as a precaution.
SHARDS_PER_WORKER = 100


class _NothingToVerify(UserError):
  """There is no data set; the message says what is wrong."""

  exit_code = 2


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0 whole, 1 damaged, 2 no data set, 130 Ctrl-C."""
  parser = _parser()
  args = parser.parse_args(argv)
  if args.json and args.json.resolve().parent == args.dataset_dir.resolve():
    parser.error(f"--json={args.json} is in the data set")
  try:
    extras.require("prepare", "data_prep.verify")
    report = verify(args.dataset_dir, args.num_workers)
    if args.json is not None:
      args.json.parent.mkdir(parents=True, exist_ok=True)
      ledger.write_json(args.json, report, indent=2)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except OSError as e:
    print(f"error: {cli.os_error_text(e)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("\nInterrupted. There is no result.", file=sys.stderr)
    return 130
  print(_summary(report))
  return 0 if report["is_whole"] else 1


def verify(dataset_dir: Path, num_workers: int) -> dict[str, Any]:
  """Checks everything that can be checked without the videos.

  Args:
    dataset_dir: folder of the data set.
    num_workers: number of shards read at a time.

  Returns:
    The JSON report: `is_whole`; counts; `problems`, the most important first,
    at most `record_checks.MAX_LISTED` of a kind; `num_problems` of each kind;
    `notes`, which are not damage.

  Raises:
    _NothingToVerify: the folder holds no data set.
    OSError: the folder cannot be read.
  """
  from data_prep.inspection import folder_checks, record_checks

  started_at = time.monotonic()
  problems = record_checks.Problems()

  # --- Settings and ledger ----------------------------------------------------
  settings = _settings(dataset_dir)
  version = settings.get("schema_version")
  if settings and version != schema.SCHEMA_VERSION:
    # The checks below apply to the current version only.
    what = f"schema_version {version}, this program reads "
    problems.add("schema", folders.SETTINGS, f"{what}{schema.SCHEMA_VERSION}")
    return _report(dataset_dir, {}, {}, [], problems, started_at)
  try:
    shard_split, expected = folder_checks.expected(settings)
  except (KeyError, TypeError, AttributeError) as e:
    problems.add(
      "damaged",
      folders.SETTINGS,
      f"missing or damaged ({e!r}), so the expected content is unknown; "
      "restore it, or prepare into a new folder",
    )
    return _report(dataset_dir, {}, {}, [], problems, started_at)
  folder_checks.check_files(dataset_dir, shard_split, problems)
  entries = folder_checks.read_ledger(dataset_dir, problems)
  folder_checks.check_ledger(dataset_dir, entries, expected, problems)

  # --- Shards ---------------------------------------------------------------
  paths = [dataset_dir / name for name in shard_split]
  shards = _read_shards(
    [path for path in paths if path.is_file()], expected, num_workers, problems
  )

  # --- Consistency ------------------------------------------------------------
  folder_checks.check_hashes(dataset_dir, shard_split, shards, problems)
  folder_checks.check_places(settings, entries, shards, problems)
  folder_checks.check_quality(dataset_dir, shard_split, shards, problems)
  folder_checks.check_segments(
    dataset_dir, entries, shard_split, shards, problems
  )
  folder_checks.check_metadata(dataset_dir, settings, entries, problems)
  folder_checks.check_tfds(dataset_dir, expected, shard_split, shards, problems)
  return _report(dataset_dir, settings, entries, shards, problems, started_at)


def _report(
  dataset_dir: Path,
  settings: dict[str, Any],
  entries: dict[str, ledger.Entry],
  shards: list[ShardContent],
  problems: Problems,
  started_at: float,
) -> dict[str, Any]:
  from data_prep.inspection import folder_checks, record_checks

  videos = [video for shard in shards for video in shard.videos.values()]
  return {
    "dataset": str(dataset_dir),
    "is_whole": not problems.counts.total(),
    "num_shards": len(shards),
    "num_records": sum(shard.num_records for shard in shards),
    "num_frames": sum(video.counts["num_frames"] for video in videos),
    "num_videos": len(videos),
    "num_bytes": sum(shard.num_bytes for shard in shards),
    "secs": round(time.monotonic() - started_at, 1),
    "num_problems": {
      kind: problems.counts[kind]
      for kind in record_checks.KINDS
      if problems.counts[kind]
    },
    "problems": [dataclasses.asdict(problem) for problem in problems.listed()],
    "notes": folder_checks.notes(settings, entries),
  }


# --- Steps --------------------------------------------------------------------


def _settings(dataset_dir: Path) -> dict[str, Any]:
  """Returns the settings, {} if the data set has no readable ones."""
  if not dataset_dir.is_dir():
    raise _NothingToVerify(
      f"{dataset_dir} is not a folder; expected a folder written by "
      "data_prep.prepare"
    )
  names = [path.name for path in dataset_dir.iterdir()]
  if not any(
    name in (folders.SETTINGS, folders.VIDEOS, folders.DATASET_INFO)
    or ".array_record" in name
    for name in names
  ):
    raise _NothingToVerify(
      f"{dataset_dir} holds none of the files that data_prep.prepare writes"
    )
  settings = ledger.read_json(dataset_dir / folders.SETTINGS)
  return settings if isinstance(settings, dict) else {}


def _read_shards(
  paths: list[Path],
  expected: Expected,
  num_workers: int,
  problems: Problems,
) -> list[ShardContent]:
  """Returns the content of each shard, in order; adds their problems."""
  from data_prep.engines import progress, workers
  from data_prep.inspection import record_checks

  sizes = [max(storage.size(path), 1) for path in paths]
  num_read = [0] * len(paths)
  shards: dict[int, ShardContent] = {}
  with (
    contextlib.closing(
      workers.run_tasks(
        paths,
        record_checks.open_check,
        expected,
        num_workers=num_workers,
        tasks_per_worker=SHARDS_PER_WORKER,
        stall_secs=STALL_SECS,
      )
    ) as events,
    progress.TaskBar(sizes, "shard") as bar,
  ):
    for event in events:
      if event.kind == "report":
        num_read[event.task] += event.value
        bar.advance(event.task, num_read[event.task] / sizes[event.task])
        continue
      shard = event.value
      if event.kind == "died":
        shard = record_checks.ShardContent(paths[event.task].name)
        problems.add("damaged", shard.name, event.value)
      shards[event.task] = shard
      bar.finish(event.task)
  for shard in shards.values():
    problems.extend(shard.problems)
  return [shards[i] for i in sorted(shards)]


# --- Output -------------------------------------------------------------------


def _summary(report: dict[str, Any]) -> str:
  from data_prep.inspection import record_checks

  read = ", ".join(
    counted(report[f"num_{noun}s"], noun)
    for noun in ("shard", "record", "frame", "video")
  )
  lines = [f"Read {read} in {report['secs']:.0f} s."]
  lines += [f"note: {note}" for note in report["notes"]]
  if report["is_whole"]:
    return "\n".join([*lines, f"{report['dataset']} is whole."])
  num = sum(report["num_problems"].values())
  lines.append(f"{report['dataset']} is damaged, {counted(num, 'problem')}:")
  for kind, number in report["num_problems"].items():
    lines.append(f"  {number} x {kind}: {record_checks.KINDS[kind]}")
  shown = report["problems"][:MAX_SHOWN]
  lines += [f"{p['kind']}: {p['where']}: {p['what']}" for p in shown]
  if num > len(shown):
    lines.append(f"and {num - len(shown)} more; see the report of --json")
  return "\n".join(lines)


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser(
    "data_prep.verify",
    "Checks a prepared data set completely. Exit codes: 0 whole, "
    "1 damaged, 2 no data set or a wrong argument.",
  )
  parser.add_argument(
    "dataset_dir",
    type=storage.path_argument,
    help="folder written by data_prep.prepare, also gs://: its shards are "
    "downloaded one after the other",
  )
  parser.add_argument(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="number of shards read at a time",
  )
  parser.add_argument(
    "--json", type=cli.output_file(), help="JSON report to write"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
