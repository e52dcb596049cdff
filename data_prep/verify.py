"""Reads a prepared data set whole and says whether it can be trusted.

  python -m data_prep.verify DATASET_DIR

Every shard is hashed, every record, frame and label map decoded, and what the
ledger, the metadata and the shards say is compared. The exit code is 0 where
all of it holds, 1 where something does not, 2 where there is nothing to judge.
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
from marlin_jax.records import cli, folders, schema
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  from data_prep.inspection.record_checks import Expected, FoundShard, Problems

# Lines on the terminal; the JSON report holds more.
MAX_SHOWN = 20
# Hashing a shard of some GB on a slow disk reports nothing.
STALL_SECS = 3600.0
# Nothing leaks here: a worker is replaced for the sake of what might.
SHARDS_PER_WORKER = 100


class _NothingToVerify(UserError):
  """There is no data set; the message says what is there instead."""

  exit_code = 2


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0 whole, 1 damaged, 2 usage, 130 interrupted."""
  args = _parser().parse_args(argv)
  try:
    report = verify(args.dataset_dir, args.num_workers)
    if args.json is not None:
      args.json.parent.mkdir(parents=True, exist_ok=True)
      ledger.write_json(args.json, report, indent=2)
  except (UserError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("\nInterrupted: nothing is said of the data set.", file=sys.stderr)
    return 130
  print(_words(report))
  return 0 if report["is_whole"] else 1


def verify(dataset_dir: Path, num_workers: int) -> dict[str, Any]:
  """Checks everything that can be checked without the videos.

  Returns:
    What the JSON report holds: `is_whole`; counts; `problems`, the most
    important first, at most `integrity.MAX_LISTED` of a kind; `num_problems`
    of each kind; `notes`, which are no damage.

  Raises:
    _NothingToVerify: the folder holds no data set.
    OSError: the folder cannot be read.
  """
  from data_prep.inspection import folder_checks, record_checks

  started_at = time.monotonic()
  problems = record_checks.Problems()

  # --- What the small files say -----------------------------------------------
  settings = _settings(dataset_dir)
  version = settings.get("schema_version")
  if settings and version != schema.SCHEMA_VERSION:
    # Nothing else can be judged by this program's rules.
    what = f"schema_version {version}, this program reads "
    problems.add("schema", folders.SETTINGS, f"{what}{schema.SCHEMA_VERSION}")
    return _report(dataset_dir, {}, [], problems, started_at)
  try:
    shard_split, expected = folder_checks.expected(settings)
  except (KeyError, TypeError, AttributeError) as e:
    problems.add(
      "damaged",
      folders.SETTINGS,
      f"missing or damaged ({e!r}), so it is not known what should be here; "
      "restore it, or prepare into a new folder",
    )
    return _report(dataset_dir, {}, [], problems, started_at)
  folder_checks.check_files(dataset_dir, shard_split, problems)
  entries = folder_checks.read_ledger(dataset_dir, problems)
  folder_checks.check_ledger(dataset_dir, entries, problems)

  # --- What the shards hold ---------------------------------------------------
  paths = [dataset_dir / name for name in shard_split]
  found = _read_shards(
    [path for path in paths if path.is_file()], expected, num_workers, problems
  )

  # --- Whether they agree -----------------------------------------------------
  folder_checks.check_hashes(dataset_dir, shard_split, found, problems)
  folder_checks.check_places(settings, entries, found, problems)
  folder_checks.check_quality(dataset_dir, shard_split, found, problems)
  folder_checks.check_metadata(dataset_dir, settings, entries, problems)
  folder_checks.check_tfds(dataset_dir, expected, shard_split, found, problems)
  return _report(dataset_dir, entries, found, problems, started_at)


def _report(
  dataset_dir: Path,
  entries: dict[str, ledger.Entry],
  found: list[FoundShard],
  problems: Problems,
  started_at: float,
) -> dict[str, Any]:
  from data_prep.inspection import folder_checks, record_checks

  videos = [video for shard in found for video in shard.videos.values()]
  return {
    "dataset": str(dataset_dir),
    "is_whole": not problems.counts.total(),
    "num_shards": len(found),
    "num_records": sum(shard.num_records for shard in found),
    "num_frames": sum(video.counts["num_frames"] for video in videos),
    "num_videos": len(videos),
    "num_bytes": sum(shard.num_bytes for shard in found),
    "secs": round(time.monotonic() - started_at, 1),
    "num_problems": {
      kind: problems.counts[kind]
      for kind in record_checks.KINDS
      if problems.counts[kind]
    },
    "problems": [dataclasses.asdict(problem) for problem in problems.listed()],
    "notes": folder_checks.notes(entries),
  }


# --- The small files ----------------------------------------------------------


def _settings(dataset_dir: Path) -> dict[str, Any]:
  """Returns the settings, {} where a data set has none that can be read."""
  if not dataset_dir.is_dir():
    raise _NothingToVerify(f"{dataset_dir} is no folder")
  names = [path.name for path in dataset_dir.iterdir()]
  if not any(
    name in (folders.SETTINGS, folders.VIDEOS, folders.DATASET_INFO)
    or ".array_record" in name
    for name in names
  ):
    raise _NothingToVerify(
      f"{dataset_dir} holds none of the files that data_prep.prepare writes"
    )
  found = ledger.read_json(dataset_dir / folders.SETTINGS)
  return found if isinstance(found, dict) else {}


# --- The shards ---------------------------------------------------------------


def _read_shards(
  paths: list[Path],
  expected: Expected,
  num_workers: int,
  problems: Problems,
) -> list[FoundShard]:
  """Returns what each shard holds, in order; adds their problems."""
  from tqdm import tqdm

  from data_prep.engines import workers
  from data_prep.inspection import record_checks

  sizes = [path.stat().st_size for path in paths]
  read = [0] * len(paths)
  found: dict[int, record_checks.FoundShard] = {}
  terminal = sys.stderr.isatty()
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
    tqdm(
      desc="verifying",
      total=sum(sizes),
      unit="B",
      unit_scale=True,
      dynamic_ncols=terminal,
      mininterval=0.2 if terminal else 30.0,
    ) as bar,
  ):
    for event in events:
      # A shard is a little longer than its records.
      size = event.value if event.kind == "report" else sizes[event.task]
      step = min(size, sizes[event.task] - read[event.task])
      read[event.task] += step
      bar.update(step)
      if event.kind == "done":
        found[event.task] = event.value
      elif event.kind == "died":
        problems.add("damaged", paths[event.task].name, event.value)
        found[event.task] = record_checks.FoundShard(paths[event.task].name)
  for shard in found.values():
    problems.extend(shard.problems)
  return [found[i] for i in sorted(found)]


# --- What describes them ------------------------------------------------------


# --- Words --------------------------------------------------------------------


def _words(report: dict[str, Any]) -> str:
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
    lines.append(f"and {num - len(shown)} more; --json lists them")
  return "\n".join(lines)


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.verify",
    description="Reads a prepared data set whole and says whether it can be "
    "trusted. Exit code 0: whole; 1: damaged; 2: no data set, or usage.",
    formatter_class=cli.HelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "dataset_dir",
    type=storage.disk_path,
    help="folder on a disk that data_prep.prepare wrote",
  )
  parser.add_argument(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="shards read at a time",
  )
  parser.add_argument("--json", type=Path, help="report to write")
  return parser


if __name__ == "__main__":
  sys.exit(main())
