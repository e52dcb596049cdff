"""Prepares a data set of face tracks from videos or pictures.

  python -m data_prep.prepare --input DIR_OR_MANIFEST --output DIR

A run may be stopped or killed at any moment: the same command resumes it, and
does nothing if the data set is complete. A video that cannot be used never ends
a run; OUTPUT/quarantine.jsonl lists it with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_jax.records import cli, extras, folders
from marlin_jax.records.cli import counted

if TYPE_CHECKING:
  from data_prep.output.dataset_folder import DatasetFolder, Plan
  from data_prep.regions.parsers import ParserChoice
  from data_prep.sources.manifest import Input
  from data_prep.video import video_to_records


# Packages whose versions the bytes of records may depend on.
_VERSIONED = ("av", "mediapipe", "opencv-contrib-python", "simplejpeg")


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 after an error, 130 when interrupted."""
  parser = _parser()
  args = parser.parse_args(argv)
  if args.task_index >= args.task_count:
    parser.error(
      f"--task_index is {args.task_index}, expected less than --task_count, "
      f"{args.task_count}"
    )
  if args.beam_flags and args.engine != "beam":
    parser.error(f"{args.beam_flags[0]} needs --engine=beam")
  if args.engine == "beam" and not importlib.util.find_spec("apache_beam"):
    parser.error(
      "--engine=beam needs Apache Beam: pip install 'marlin-jax[beam]'"
    )
  if not (args.input or args.forget):
    parser.error("--input is needed, unless videos are only to be forgotten")
  if args.forget and args.task_count > 1:
    parser.error("--forget is the work of one run, without --task_count")

  def work() -> None:
    extras.require("prepare", "data_prep.prepare")
    _run(args) if args.input else _forget(args)

  return cli.run_command(work)


def _run(args: argparse.Namespace) -> None:
  from data_prep import storage
  from data_prep.output import dataset_folder, own_files, summary

  if args.engine == "beam":
    from data_prep.engines import beam

    beam.options_of(args.beam_flags)  # refuses a misspelled flag
  videos = _read_input(args)
  output = storage.path_of(args.output)
  own_files.check_apart(
    output, storage.path_of(args.input), (v.path for v in videos.sources)
  )
  settings = _settings(args, videos)
  for note in videos.notes:
    print(f"note: {note}")
  with dataset_folder.DatasetFolder(
    output,
    _recipe(args, videos),
    args.num_shards,
    videos.sources,
    (args.task_index, args.task_count),
    args.drop_missing,
    _names_of(args.forget),
  ) as folder:
    storage.remove_scratch()
    _tell_unknown(folder, args.forget)
    settings = dataclasses.replace(settings, record_labels=folder.record_labels)
    plan = folder.plan(settings, args.retry_quarantined)
    if not _is_work_left(folder, plan, args):
      return
    if plan.todo:
      fetch_models(settings.parser)
      print(_sandbox_line(settings), flush=True)
    started_at = time.monotonic()
    _write_shards(folder, plan, settings, args)
    if args.task_count > 1:
      summary.check_failed(folder.own_entries, args.max_failed_ratio)
      print(
        f"Task {args.task_index} of {args.task_count} is done. After all "
        f"tasks, complete {args.output} with the same command without "
        "--task_index and --task_count"
        + (" (and --retry_quarantined)" if args.retry_quarantined else "")
        + "."
      )
      return
    _complete(folder, args.max_failed_ratio)
    todo = {source.video_id for source in plan.todo}
    entries = folder.entries
    num_frames = sum(
      entry.num_decoded_frames for entry in entries if entry.video_id in todo
    )
    secs = time.monotonic() - started_at
    print(summary.text(entries, folder.path, num_frames, secs))


def _read_input(args: argparse.Namespace) -> Input:
  from data_prep.sources import manifest

  videos = manifest.read_input(
    args.input,
    args.root,
    args.dataset,
    args.val_ratio,
    args.test_ratio,
    follow_links=args.follow_links,
    skip_missing=args.skip_missing,
  )
  return dataclasses.replace(videos, has_sound=videos.has_sound or args.sound)


def _is_work_left(
  folder: DatasetFolder, plan: Plan, args: argparse.Namespace
) -> bool:
  """Prints the work of a run; returns False if there is none."""
  num_videos = counted(plan.num_videos, "video")
  if args.task_count > 1:
    num_videos += f" of task {args.task_index} of {args.task_count}"
  if not plan.shards and args.task_count > 1:
    # Parts stay: other tasks may still need them.
    print(f"Nothing to do for {num_videos}.")
    return False
  if folder.is_finished and plan.is_empty:
    folder.remove_parts()
    print(f"Nothing to do for {num_videos}: {args.output} is complete.")
    return False
  done = f", {plan.num_done} of them already done" if plan.num_done else ""
  print(f"{num_videos}{done}; writing to {args.output}", flush=True)
  if plan.num_dropped:
    print(f"note: {counted(plan.num_dropped, 'video')} will leave the data set")
  return True


def _write_shards(
  folder: DatasetFolder,
  plan: Plan,
  settings: video_to_records.Settings,
  args: argparse.Namespace,
) -> None:
  """Processes the videos of a plan and writes its shards."""
  folder.begin(plan)
  for note in folder.version_notes:
    print(f"note: {note}")
  if args.engine == "beam":
    from data_prep.engines import beam

    jobs = [folder.job(shard) for shard in plan.shards]
    beam.run(jobs, settings, args.num_workers, args.beam_flags)
    folder.take_shards(plan.shards)
    return

  from data_prep.engines import pool, progress

  for shard in filter(folder.is_complete, plan.shards):
    folder.write_shard(shard)
  bar = progress.ProgressBar(plan.todo)
  for entry in pool.run(
    folder.path, plan.todo, settings, args.num_workers, bar
  ):
    shard = folder.add(entry)
    if shard is not None:
      folder.write_shard(shard)


def _complete(folder: DatasetFolder, max_failed_ratio: float) -> None:
  """Writes ledgers, indices and the files of TFDS.

  Raises:
    summary.TooManyFailedError: too many videos failed.
    summary.NothingKeptError: there are no records.
  """
  from data_prep.output import summary

  folder.write_ledgers()
  entries = folder.entries
  summary.check_failed(entries, max_failed_ratio)
  if not any(entry.num_records for entry in entries):
    folder.remove_parts()
    raise summary.NothingKeptError(entries, folder.path)
  folder.finish()


def _forget(args: argparse.Namespace) -> None:
  """Removes videos from a data set without the input."""
  from tqdm import tqdm

  from data_prep import storage
  from data_prep.output import dataset_folder

  names = _names_of(args.forget)
  output = storage.path_of(args.output)
  with dataset_folder.DatasetFolder(
    output, {}, None, None, forget=names
  ) as folder:
    _tell_unknown(folder, args.forget)
    plan = folder.plan_removal()
    # An unfinished run has noted left-out videos, too.
    has_notes = (output / folders.QUARANTINE).exists()
    if plan.shards or has_notes or folder.forgotten.was_complete:
      folder.begin(plan)
      for shard in tqdm(plan.shards, desc="writing", unit="shard"):
        folder.write_shard(shard)
      folder.write_ledgers()
      if folder.forgotten.was_complete:
        folder.finish()
    print(
      f"{counted(plan.num_dropped, 'video')} left {args.output}, which holds "
      f"{counted(plan.num_videos, 'video')}."
    )


def _tell_unknown(folder: DatasetFolder, file: str | None) -> None:
  """Prints the names to forget that are no video or person."""
  if names := folder.unknown_names:
    shown = ", ".join(map(ascii, names[:5])) + ", ..." * (len(names) > 5)
    print(
      f"note: {counted(len(names), 'line')} of {file} found in no video or "
      f"person of {folder.path}: {shown}"
    )


def _names_of(path: str | None) -> list[str]:
  """Returns the lines of a file of names."""
  from data_prep import storage
  from data_prep.sources import files

  if path is None:
    return []
  lines = files.read_text(storage.path_of(path)).splitlines()
  return [line.strip() for line in lines if line.strip()]


def _sandbox_line(settings: video_to_records.Settings) -> str:
  """Returns a line that says which layers of the decoder's sandbox hold here.

  Raises:
    DecoderSetupError: a layer is missing that `settings` requires.
  """
  from data_prep.video import decode

  layers = decode.sandbox_layers(settings.require_sandbox)
  return decode.sandbox_summary(layers)


def fetch_models(choice: ParserChoice) -> None:
  """Downloads models before the workers start, so an error is shown once."""
  from data_prep import assets
  from data_prep.faces import face_finder

  for name in face_finder.MODELS:
    assets.fetch(name)
  choice.model_file()


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  from data_prep.regions.parsers import PARSERS
  from data_prep.sources.layouts import LAYOUTS

  parser = cli.ArgumentParser(
    "data_prep.prepare",
    "Prepares a data set of face tracks from videos or pictures. A run may be "
    "stopped at any moment; the same command resumes it and does only what is "
    "missing.",
    epilog="published data sets, see docs/DATA.md:\n"
    + "\n".join(f"  {n:14}{of.summary}" for n, of in LAYOUTS.items()),
  )
  add = parser.add_argument
  add(
    "--input",
    help="a folder of videos (or of pictures, where it has no video: each "
    "becomes a record of one frame), a manifest (.csv with the column path and "
    "optionally subject_id, split, label_NAME, start_secs, end_secs and the "
    "box x0 y0 x1 y1 in fractions of the frame, or .txt with one path per "
    "line), one video or picture, or the word sample for three sample videos; "
    "with --dataset the folder of that data set",
  )
  add(
    "--dataset",
    choices=LAYOUTS,
    metavar="NAME",
    help="layout of a published data set, one of the list below",
  )
  add(
    "--output",
    required=True,
    type=_output,
    help="folder of the data set, also gs://; an existing one is completed",
  )
  add(
    "--root",
    help="folder that a manifest's paths are relative to; by default the "
    "manifest's own folder",
  )
  add(
    "--follow_links",
    action="store_true",
    help="read links that lead out of the input, too, such as those of a "
    "snapshot of the Hugging Face hub; only for an input that you trust",
  )
  add(
    "--skip_missing",
    action="store_true",
    help="leave out rows of a manifest whose file is missing, and print their "
    "number; else a missing file is an error",
  )
  add(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="number of videos processed at a time; does not change the result",
  )
  add(
    "--segment_frames",
    type=cli.at_least(62),
    default=64,
    help="length of the longest record; longer tracks are cut into equal parts",
  )
  add(
    "--frame_size",
    type=_stored_size,
    default=224,
    help="height and width of the stored frames, a multiple of 16; small ones "
    "are read faster, but only for clips of at most this size. Regions stay "
    "those of 224 pixels",
  )
  add(
    "--val_ratio",
    type=_number(1, inclusive=False),
    help="share of people (of videos, if people are unknown) in the split val, "
    "if the input has no splits; by default that of --dataset, or 0",
  )
  add(
    "--test_ratio",
    type=_number(1, inclusive=False),
    help="share of people (or videos) in the split test; see --val_ratio",
  )
  add(
    "--num_shards",
    type=cli.at_least(1),
    help="number of shards of the largest split; by default one per 256 MiB of "
    "video files, at most 2048 in all",
  )
  add(
    "--sound",
    action="store_true",
    help="store the sound, 16 kHz, and its mel spectrogram; always on with the "
    "data sets that the list below calls with sound",
  )
  add(
    "--faces",
    choices=("main", "all"),
    help="main: one track of each video, that of the largest side x length, or "
    "all of the person where the input says where that is; all: every track. "
    "By default main where the input has labels, which are of one person, or "
    "says where that person is, else all",
  )
  add(
    "--parser",
    choices=tuple(PARSERS),
    default="mediapipe",
    help="parser of face regions: mediapipe: mesh and person mask; multiclass: "
    "MediaPipe's hair and skin segmenter; farl: the paper's parser, needs "
    "PyTorch; bisenet: needs onnxruntime",
  )
  add(
    "--parser_path",
    type=Path,
    help="the parser's model file; by default it is downloaded, and farl's is "
    "taken from the folder named by MARLIN_ASSETS",
  )
  add(
    "--fps",
    type=_number(240),
    default=0.0,
    help="resample every video to this number of frames per second, by "
    "repeating or dropping frames; 0 keeps the video's own rate (lip "
    "synchronisation needs 25)",
  )
  add("--name", type=_name, default="faces", help="prefix of file names")
  add(
    "--retry_quarantined",
    action="store_true",
    help="process quarantined videos again",
  )
  add(
    "--drop_missing",
    action="store_true",
    help="let videos, labels and the names of people leave the data set that "
    "are no longer in the input",
  )
  add(
    "--forget",
    metavar="FILE",
    help="remove all traces of the videos and people in this file: a line for "
    "each, the video_id or path of a video, or a subject_id. They are not "
    "prepared again. Needs no --input",
  )
  add(
    "--max_failed_ratio",
    type=_number(1),
    default=0.05,
    help="share of videos that may fail because of this machine (a full disk, "
    "a killed process, a network), after two more tries; beyond it the exit "
    "code is 1 and the data set stays unfinished. Every run tries them again",
  )
  _add_many_machines(parser)
  _add_limits(parser)
  return parser


def _add_many_machines(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group(
    "many machines",
    "All machines must see --input and --output at the same paths.",
  )
  add = group.add_argument
  add(
    "--task_index",
    type=cli.at_least(0),
    default=0,
    help="index of this task, from 0; each task writes its share of the shards",
  )
  add(
    "--task_count",
    type=cli.at_least(1),
    default=1,
    help="number of tasks; after all tasks, run the same command without "
    "these two flags to complete the data set",
  )
  add(
    "--engine",
    choices=("pool", "beam"),
    default="pool",
    help="pool: processes on this machine; beam: Apache Beam, which the extra "
    "marlin-jax[beam] installs",
  )
  add(
    "beam_flags",
    nargs="*",
    metavar="-- BEAM_FLAG",
    help="flags of Apache Beam after --, such as --runner=DataflowRunner",
  )


def _add_limits(parser: argparse.ArgumentParser) -> None:
  from data_prep.video.decode import DEFAULT_LIMITS as limits
  from data_prep.video.video_to_records import ON_DAMAGE, QUARANTINE

  group = parser.add_argument_group(
    "limits", "A video that exceeds a limit is quarantined."
  )
  add = group.add_argument
  add(
    "--on_damage",
    choices=ON_DAMAGE,
    default=QUARANTINE,
    help="a damaged video is quarantined, or the frames before the damage are "
    "kept; a note tells how many are lost. Quarantined videos are then tried "
    "again",
  )
  add(
    "--max_frame_pixels",
    type=cli.at_least(1),
    default=limits.frame_pixels,
    help="width x height of a frame; a picture may have eight times as many",
  )
  add(
    "--max_frames",
    type=cli.at_least(1),
    default=limits.frames,
    help="number of frames of a video",
  )
  add(
    "--max_video_pixels",
    type=cli.at_least(1),
    default=limits.video_pixels,
    help="width x height x frames of a video",
  )
  add(
    "--max_decode_secs",
    type=cli.at_least(1),
    default=int(limits.secs),
    help="seconds to wait for the decoder, per pass",
  )
  add(
    "--max_decode_mib",
    type=cli.at_least(256),
    default=limits.memory_bytes >> 20,
    help="memory of the decoder in MiB",
  )
  add(
    "--require_sandbox",
    action="store_true",
    help="decode nothing on a machine where a layer of the decoder's sandbox "
    "is missing; the first lines of a run say which layers hold",
  )


def _number(most: float, *, inclusive: bool = True) -> Callable[[str], float]:
  """Returns an argument type: numbers in [0, most], or in [0, most)."""

  def parse(text: str) -> float:
    value = float(text)
    if not 0 <= value <= most or (value == most and not inclusive):
      end = "]" if inclusive else ")"
      raise argparse.ArgumentTypeError(f"{text} is not in [0, {most:g}{end}")
    return value

  parse.__name__ = "float"  # shown in argparse's error message
  return parse


def _stored_size(text: str) -> int:
  from marlin_jax.records import schema

  if (size := int(text)) not in (sizes := schema.STORED_SIZES):
    raise argparse.ArgumentTypeError(
      f"{text} is not a multiple of {sizes.step} in [{sizes[0]}, {sizes[-1]}]"
    )
  return size


_stored_size.__name__ = "int"  # shown in argparse's error message


def _output(text: str) -> str:
  # Removing a file in a bucket expands these characters.
  if folders.is_remote(text) and set(text) & set("*?["):
    raise argparse.ArgumentTypeError(f"{text!r} contains one of * ? [")
  return text


def _name(text: str) -> str:
  if not (text.isascii() and text.isidentifier() and text.islower()):
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected a-z, 0-9 and _, beginning with a letter"
    )
  return text


def _settings(
  args: argparse.Namespace, videos: Input
) -> video_to_records.Settings:
  from data_prep.video import decode, video_to_records

  limits = decode.Limits(
    frame_pixels=args.max_frame_pixels,
    frames=args.max_frames,
    video_pixels=args.max_video_pixels,
    secs=float(args.max_decode_secs),
    memory_bytes=args.max_decode_mib << 20,
  )
  return video_to_records.Settings(
    segment_frames=args.segment_frames,
    limits=limits,
    require_sandbox=args.require_sandbox,
    has_sound=videos.has_sound,
    fps=args.fps,
    frame_size=args.frame_size,
    parser=_parser_choice(args),
    faces=_faces(args, videos),
    on_damage=args.on_damage,
  )


def _faces(args: argparse.Namespace, videos: Input) -> str:
  """Returns whose tracks are kept: as asked, as in the folder, or default."""
  from data_prep import storage
  from data_prep.output import folder_settings, ledger

  if args.faces:
    return args.faces
  stored = ledger.read_json(storage.path_of(args.output) / folders.SETTINGS)
  if isinstance(stored, dict):
    return folder_settings.with_old_settings(stored)["faces"]
  return "main" if videos.has_main_face else "all"


def _parser_choice(args: argparse.Namespace) -> ParserChoice:
  from data_prep.regions.parsers import ParserChoice

  return ParserChoice(args.parser, args.parser_path)


def _versions() -> dict[str, str]:
  versions = {}
  for name in _VERSIONED:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def _recipe(args: argparse.Namespace, videos: Input) -> dict[str, Any]:
  """Returns all settings that the bytes of a record and its shard depend on."""
  from data_prep import assets
  from data_prep.faces import face_finder
  from data_prep.output import folder_settings
  from data_prep.video import video_to_records
  from marlin_jax.records import schema

  return {
    "name": args.name,
    "schema_version": schema.SCHEMA_VERSION,
    folder_settings.ALGORITHM_VERSION: schema.ALGORITHM_VERSION,
    "segment_frames": args.segment_frames,
    "frame_size": args.frame_size,
    "jpeg_quality": video_to_records.JPEG_QUALITY,
    "dataset": args.dataset,
    "split_ratios": list(videos.split_ratios),
    "labels": {
      name: {"kind": label.kind, "names": list(label.names)}
      for name, label in videos.labels.items()
    },
    folder_settings.RECORD_LABELS: {},
    folder_settings.VERSIONS: _versions(),
    "has_sound": videos.has_sound,
    "fps": args.fps,
    "faces": _faces(args, videos),
    "parser": args.parser,
    "models": {name: assets.ASSETS[name].sha256 for name in face_finder.MODELS}
    | _parser_choice(args).model_hash(),
  }


if __name__ == "__main__":
  sys.exit(main())
