"""Turns videos into a data set of face tracks.

  python -m data_prep.prepare --input DIR_OR_MANIFEST --output DIR

Safe to stop at any moment, also by force: the same command goes on where the
last run ended, and does nothing where nothing is missing. A video that cannot
be used never ends a run; OUTPUT/quarantine.jsonl says why it was left out.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_jax import arguments
from marlin_jax.arguments import counted
from marlin_jax.output_folder import OutputFolderError

if TYPE_CHECKING:
  from data_prep import ledger, process
  from data_prep.manifest import Source

# A worker is replaced after so many videos: what native libraries leak stays
# bounded, and opening the models anew costs a few hundredths of a second each.
VIDEOS_PER_WORKER = 50
# Longer than the decoder may keep a worker waiting.
EXTRA_STALL_SECS = 300.0


class _NothingKept(Exception):
  """No video gave a record; the message says what happened to them."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  # Imported here, so that --help answers at once.
  from data_prep import assets, manifest, shards, workers

  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    _run(args)
  except KeyboardInterrupt:
    print(
      "\nInterrupted. What is done is kept: the same command goes on from "
      "there.",
      file=sys.stderr,
    )
    return 130
  except (
    assets.AssetError,
    OutputFolderError,
    manifest.ManifestError,
    shards.ShardError,
    workers.WorkerError,
    _NothingKept,
    OSError,
  ) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0


def _run(args: argparse.Namespace) -> None:
  from data_prep import dataset_folder, manifest

  # --- What to do -------------------------------------------------------------
  settings = _settings(args)
  sources = manifest.read_sources(args.input, args.root, args.val_ratio)
  with dataset_folder.DatasetFolder(
    args.output, _recipe(args), args.num_shards, sources
  ) as folder:
    plan = folder.plan(settings, args.retry_quarantined)
    num_videos = counted(len(sources), "video")
    if folder.is_finished and not plan.shards:
      folder.remove_parts()
      print(f"Nothing to do for {num_videos}: {args.output} is complete.")
      return
    done = f", {plan.num_done} of them done before" if plan.num_done else ""
    print(f"{num_videos}{done}; writing to {args.output}", flush=True)
    _fetch_models()

    # --- Videos to shards -----------------------------------------------------
    started_at = time.monotonic()
    folder.begin()
    for shard in filter(folder.is_complete, plan.shards):
      folder.write_shard(shard)
    num_frames = 0
    for entry in _entries(folder.path, plan.todo, settings, args.num_workers):
      num_frames += entry.num_decoded_frames
      shard = folder.add(entry)
      if shard is not None:
        folder.write_shard(shard)

    # --- What describes them --------------------------------------------------
    folder.write_ledgers()
    entries = folder.entries
    if not any(entry.num_records for entry in entries):
      folder.remove_parts()
      raise _NothingKept(_nothing_kept(folder.path, entries))
    folder.finish()
    print(
      _summary(folder.path, entries, num_frames, time.monotonic() - started_at)
    )


# --- Processing ---------------------------------------------------------------


def _entries(
  output: Path,
  todo: list[Source],
  settings: process.Settings,
  num_workers: int,
) -> Iterator[ledger.Entry]:
  """Processes videos, showing progress; yields as each one's part is there."""
  from data_prep import ledger, process, shards, workers

  with (
    contextlib.closing(
      workers.run_tasks(
        todo,
        open_work,
        (output, settings),
        num_workers=num_workers,
        tasks_per_worker=VIDEOS_PER_WORKER,
        stall_secs=settings.limits.secs + EXTRA_STALL_SECS,
      )
    ) as events,
    _ProgressBar(todo) as bar,
  ):
    for event in events:
      if event.kind == "report":
        bar.report(event.task, *event.value)
        continue
      entry = event.value
      if event.kind == "died":
        source = todo[event.task]
        outcome = process.Outcome(process.QUARANTINED, event.value)
        entry = ledger.Entry.of(source, settings, outcome)
        with shards.PartWriter(shards.Part(output, entry.video_id)) as part:
          part.commit(entry)
      bar.done(event.task, entry)
      yield entry


@contextlib.contextmanager
def open_work(task_settings: tuple[Path, process.Settings]) -> Iterator[Any]:
  """Opens the models in a worker; yields what turns a source into a part."""
  import cv2

  from data_prep import ledger, process, shards

  # There is a worker for every core already.
  cv2.setNumThreads(1)
  output, settings = task_settings

  def work(source: Source, report: Callable[[Any], None]) -> ledger.Entry:
    with shards.PartWriter(shards.Part(output, source.video_id)) as part:
      outcome = process.process_video(
        source,
        settings,
        models,
        emit=part.add,
        progress=lambda share, num_frames: report((share, num_frames)),
      )
      entry = ledger.Entry.of(source, settings, outcome)
      part.commit(entry)
    return entry

  with process.Models() as models:
    yield work


def _fetch_models() -> None:
  """Downloads before the workers start, so that an error comes once."""
  from data_prep import assets

  for name in model_names():
    assets.fetch(name)


def model_names() -> list[str]:
  """Returns the assets that a worker opens."""
  from data_prep import assets

  return [name for name in assets.ASSETS if name not in assets.SAMPLE_VIDEOS]


class _ProgressBar:
  """Shows videos, frames and time left; a context manager.

  The bar counts bytes of video files: unlike frames they are known at once,
  and unlike videos they tell a long one from a short one.
  """

  def __init__(self, todo: list[Source]) -> None:
    from tqdm import tqdm

    self._sizes = [_size(source) for source in todo]
    self._shares = [0.0] * len(todo)
    self._frames = [0.0] * len(todo)
    self._statuses: Counter[str] = Counter()
    self._started_at = time.monotonic()
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      desc=f"0/{len(todo)} videos",
      total=sum(self._sizes),
      bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
      "{postfix}",
      dynamic_ncols=terminal,
      # A log file gets a line now and then, not ten a second.
      mininterval=0.2 if terminal else 30.0,
      disable=not todo,
    )
    self._show()

  def report(self, task: int, share: float, num_frames: float) -> None:
    """Notes the share of a video, and its frames, that are done."""
    self._frames[task] = num_frames
    self._advance(task, share)

  def done(self, task: int, entry: ledger.Entry) -> None:
    self._frames[task] = entry.num_decoded_frames
    self._statuses[entry.status] += 1
    self._advance(task, 1.0)

  def _advance(self, task: int, share: float) -> None:
    # A container that announced too few frames must not turn the bar back.
    gained = max(share - self._shares[task], 0.0)
    self._shares[task] += gained
    self._show()
    self._bar.update(gained * self._sizes[task])

  def _show(self) -> None:
    from data_prep import process

    num_done = self._statuses.total()
    self._bar.set_description_str(
      f"{num_done}/{len(self._sizes)} videos", refresh=False
    )
    rate = sum(self._frames) / max(time.monotonic() - self._started_at, 1e-6)
    counts = ", ".join(
      f"{self._statuses[status]} {status}"
      for status in (process.KEPT, process.QUARANTINED, process.NO_FACE)
    )
    self._bar.set_postfix_str(f"{rate:.0f} frames/s, {counts}", refresh=False)

  def __enter__(self) -> _ProgressBar:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      # Shares were added up in floating point.
      self._bar.update(self._bar.total - self._bar.n)
    self._bar.close()


def _size(source: Source) -> int:
  try:
    return max(source.path.stat().st_size, 1)
  except OSError:
    return 1


# --- Words --------------------------------------------------------------------


def _summary(
  output: Path, entries: list[ledger.Entry], num_frames: int, secs: float
) -> str:
  from data_prep import process

  statuses = Counter(entry.status for entry in entries)
  rate = f" ({num_frames / secs:.0f} frames/s)" if num_frames else ""
  lines = [f"Done in {secs:.0f} s{rate}. {output} holds:"]
  for split in sorted({entry.split for entry in entries}):
    kept = [e for e in entries if e.split == split and e.num_records]
    counts = {
      "record": sum(e.num_records for e in kept),
      "face crop": sum(e.num_frames for e in kept),
      "face track": sum(e.num_tracks for e in kept),
      "video": len(kept),
    }
    lines.append(
      f"  {split}: "
      + ", ".join(counted(number, noun) for noun, number in counts.items())
    )
  refused = len(entries) - statuses[process.KEPT]
  if refused:
    lines.append(
      f"  left out: {statuses[process.QUARANTINED]} quarantined, "
      f"{statuses[process.NO_FACE]} without a face; why: "
      f"{output / 'quarantine.jsonl'}"
    )
  return "\n".join(lines)


def _nothing_kept(output: Path, entries: list[ledger.Entry]) -> str:
  return "\n".join(
    [
      f"no face track came of {counted(len(entries), 'video')}:",
      *arguments.reasons({entry.video_id: entry.reason for entry in entries}),
      f"All of them: {output / 'quarantine.jsonl'}",
    ]
  )


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  from data_prep import decode

  limits = decode.DEFAULT_LIMITS
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.prepare",
    description="Turns videos into a data set of face tracks. Stop it when you "
    "like; the same command goes on where it was, and does only what is "
    "missing.",
    formatter_class=arguments.HelpFormatter,
    allow_abbrev=False,  # a misspelled flag is an error
  )
  add = parser.add_argument
  add(
    "--input",
    required=True,
    help="a folder of videos, a manifest (.csv with a header of path and "
    "optionally subject_id and split, or .txt with one path a line), one "
    "video, or the word sample for three sample videos",
  )
  add(
    "--output",
    required=True,
    type=Path,
    help="folder of the data set; an existing one is completed",
  )
  add(
    "--root",
    type=Path,
    help="folder that a manifest's paths are relative to; without it, the "
    "manifest's own",
  )
  add(
    "--num_workers",
    type=arguments.at_least(1),
    default=arguments.num_cores(),
    help="videos processed at a time; the result does not depend on it",
  )
  add(
    "--segment_frames",
    type=arguments.at_least(62),
    default=64,
    help="longest record; longer tracks are cut into equal parts",
  )
  add(
    "--val_ratio",
    type=_ratio,
    default=0.0,
    help="share of people (of videos, where people are unknown) that go to "
    "the split val, where a manifest gives no splits",
  )
  add(
    "--num_shards",
    type=arguments.at_least(1),
    help="files of the largest split; without it, one for every 32 videos",
  )
  add("--name", type=_name, default="faces", help="first part of file names")
  add(
    "--retry_quarantined",
    action="store_true",
    help="try quarantined videos again",
  )
  limits_group = parser.add_argument_group(
    "limits", "A video that is over one of them is quarantined."
  )
  add = limits_group.add_argument
  add(
    "--max_frame_pixels",
    type=arguments.at_least(1),
    default=limits.frame_pixels,
    help="width x height of a frame",
  )
  add(
    "--max_frames",
    type=arguments.at_least(1),
    default=limits.frames,
    help="frames of a video",
  )
  add(
    "--max_video_pixels",
    type=arguments.at_least(1),
    default=limits.video_pixels,
    help="width x height x frames of a video",
  )
  add(
    "--max_decode_secs",
    type=arguments.at_least(1),
    default=int(limits.secs),
    help="seconds of waiting for the decoder, per pass",
  )
  add(
    "--max_decode_mib",
    type=arguments.at_least(256),
    default=limits.memory_bytes >> 20,
    help="memory of the decoder in MiB",
  )
  return parser


def _ratio(text: str) -> float:
  value = float(text)
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
  return value


def _name(text: str) -> str:
  if not (text.isascii() and text.isidentifier() and text.islower()):
    raise argparse.ArgumentTypeError(
      f"{text!r} is not made of a-z, 0-9 and _, beginning with a letter"
    )
  return text


def _settings(args: argparse.Namespace) -> process.Settings:
  from data_prep import decode, process

  limits = decode.Limits(
    frame_pixels=args.max_frame_pixels,
    frames=args.max_frames,
    video_pixels=args.max_video_pixels,
    secs=float(args.max_decode_secs),
    memory_bytes=args.max_decode_mib << 20,
  )
  return process.Settings(args.segment_frames, limits)


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
  """Returns what the bytes of a record, and its place, depend on."""
  from data_prep import assets, process
  from marlin_jax import records

  return {
    "name": args.name,
    "schema_version": records.SCHEMA_VERSION,
    "segment_frames": args.segment_frames,
    "jpeg_quality": process.JPEG_QUALITY,
    "val_ratio": args.val_ratio,
    "models": {name: assets.ASSETS[name].sha256 for name in model_names()},
  }


if __name__ == "__main__":
  sys.exit(main())
