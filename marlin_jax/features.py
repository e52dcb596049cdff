"""Extracts features from whole folders of videos.

  python -m marlin_jax.features VIDEO_OR_DIR... --checkpoint PATH --output DIR

For each video, named by its path below the input folder, writes
  OUTPUT/<path>.npz, or .parquet   features, with the times of their windows
  OUTPUT/quarantine.jsonl          the videos without features, and why; each
                                   task has one of its own until they are merged
  OUTPUT/settings.json             the settings that all files share

Features are of the video; with --modality=sound of its sound, by the encoder of
a run that was trained with config.sound.weight above 0; or with both of video
and sound, one after the other.

A file has one row per window, or with --reduction one for the whole video:
  features     float32 (D,), or (N, D) with --keep_seq; in parquet a flat list
  first_frame  number of the row's first frame, from 0
  num_frames   number of frames that the row covers
  start_secs   time of the first of them
  end_secs     time of the last of them
and `metadata`, JSON with the video and its hash, the checkpoint, the settings
and the library versions; in parquet it is the schema's metadata `marlin_jax`.

The command can be stopped or killed at any time; run again, it extracts only
the features that are missing. It uses all devices of the machine. Several
machines share the work by --task_index and --task_count.

Axes: N tokens, D width; of both encoders together for --modality=both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_jax.models.options import DTYPES
from marlin_jax.records import cli, extras
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  import jax
  from jax.sharding import Mesh

  from marlin_jax.inference.face_windows import WindowSettings
  from marlin_jax.inference.feature_folder import FeatureFolder
  from marlin_jax.inference.video_folder import EncodedVideo
  from marlin_jax.weights.weights import SoundWeights, Weights


class ExtractionError(UserError):
  """The arguments do not fit the network, or no video gave features."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  return cli.run_command(lambda: _start(args))


def _start(args: argparse.Namespace) -> None:
  """Runs the task that arguments or environment name."""
  extras.require("features", "marlin_jax.features")
  # Imported here, so that --help answers at once.
  from marlin_jax.devices import distributed

  distributed.run_task(cli.task_of(args), functools.partial(_run, args))


def _run(args: argparse.Namespace, task: cli.Task) -> None:
  # Imported here, so that --help answers at once.
  import jax

  from marlin_jax.devices import distributed, sharding
  from marlin_jax.inference import (
    clips,
    feature_folder,
    stream,
    video_folder,
  )
  from marlin_jax.weights import formats, run_checkpoint

  try:
    stream.check_modality(args.modality, args.keep_seq)
  except ValueError as e:
    raise ExtractionError(f"--modality, --keep_seq: {e}") from e
  if args.modality != "video" and args.num_blocks:
    raise ExtractionError(
      f"--num_blocks with --modality={args.modality}: expected video, whose "
      "encoder has the blocks that are counted"
    )

  # --- Inputs -----------------------------------------------------------------
  videos = task.part(video_folder.list_videos(args.videos))
  with distributed.process_0_first():  # which may download it
    weights = formats.read(formats.resolve(args.checkpoint, full=False))
  sound = None
  if args.modality != "video":
    sound = run_checkpoint.read_sound(Path(args.checkpoint).expanduser())
  mesh = sharding.make_mesh(devices=jax.local_devices())
  encode = _encoder(args, weights, sound, mesh)
  try:
    windows = clips.window_settings(
      weights.architecture,
      crop_face=args.crop_face,
      sample_rate=args.sample_rate,
      stride=args.stride,
      window_rule=args.window_rule,
    )
  except ValueError as e:
    raise ExtractionError(f"--stride, --sample_rate: {e}") from e
  if sound:
    windows = dataclasses.replace(windows, sound=sound.patches)
  settings = _settings(args, weights, sound, windows)
  with feature_folder.FeatureFolder(args.output, settings, task) as folder:
    todo = [
      video
      for video in videos
      if not folder.holds(video.name, video.path)
      and (
        args.retry_quarantined or not folder.quarantines(video.name, video.path)
      )
    ]
    num_before = len(videos) - len(todo)
    done = f", {num_before} of them done before" if num_before else ""
    of_task = f" of task {task.index} of {task.count}" if task.suffix else ""
    print(
      f"{counted(len(videos), 'video')}{of_task}{done}; "
      f"{sharding.describe(mesh)}; writing to {args.output}",
      flush=True,
    )

    # --- Extraction -----------------------------------------------------------
    started_at = time.monotonic()
    folder.begin()
    num_windows = 0
    problems: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
      check = None
      if not args.crop_face:
        check = stack.enter_context(video_folder.CropCheck())
      encoded_videos = video_folder.encode_many(
        encode,
        todo,
        windows,
        batch_size=stream.local_batch_size(args.batch_size),
        num_workers=args.num_workers,
        crop_check=check,
      )
      stack.enter_context(contextlib.closing(encoded_videos))
      for encoded in encoded_videos:
        num_windows += len(encoded.windows)
        if encoded.crop_problem:
          problems[encoded.video.name] = encoded.crop_problem
        _write(folder, encoded, args.reduction)
    folder.finish()

    # --- Summary --------------------------------------------------------------
    names = {video.name for video in videos}
    refused = {
      name: reason for name, reason in folder.reasons.items() if name in names
    }
    if len(refused) == len(videos) and not task.suffix:
      raise ExtractionError(_nothing_extracted(folder.path, refused))
    print(
      f"Done in {time.monotonic() - started_at:.0f} s: "
      f"{counted(num_windows, 'window')} of "
      f"{counted(len(todo), 'video')}. "
      f"{args.output} holds the features of {len(videos) - len(refused)} of "
      f"{counted(len(videos), 'video')}."
    )
    if problems:
      name = min(problems)
      print(
        f"  NOTE: {counted(len(problems), 'video')} not as a crop of a face, "
        f"such as {name}: {problems[name]}. The encoder knows crops of faces: "
        "use --crop_face, or prepare them"
      )
    if refused:
      print(
        f"  left out: {len(refused)}; why: "
        f"{folder.path / 'quarantine.jsonl'}{task.suffix}"
      )
    if task.suffix:
      print(
        "After all tasks, run the same command as one process without "
        "--task_index and --task_count: it extracts what is missing and merges "
        "their quarantines"
      )


def _encoder(
  args: argparse.Namespace,
  weights: Weights,
  sound: SoundWeights | None,
  mesh: Mesh,
) -> Callable[[Any], jax.Array]:
  """Returns the function from a batch of `Window.clip` to features."""
  from marlin_jax.inference import clip_features

  if args.num_blocks:
    try:
      clip_features.check_num_blocks(args.num_blocks, weights.architecture)
    except ValueError as e:
      raise ExtractionError(f"--{e}") from e
  options = mesh, args.dtype, "auto"
  of_video = None
  if args.modality != "sound":
    of_video = clip_features.FrozenEncoder(weights, *options)
  if sound:
    of_sound = clip_features.FrozenSoundEncoder(sound, *options)
    return clip_features.with_sound(
      args.modality, of_video, of_sound, keep_seq=args.keep_seq
    )
  return functools.partial(
    of_video, keep_seq=args.keep_seq, num_blocks=args.num_blocks or 0
  )


def _settings(
  args: argparse.Namespace,
  weights: Weights,
  sound: SoundWeights | None,
  windows: WindowSettings,
) -> dict[str, Any]:
  """Returns the settings that the features depend on."""
  from marlin_jax.weights.weights import encoder_sha256

  return {
    "checkpoint": str(args.checkpoint),
    "checkpoint_sha256": encoder_sha256(weights),
    "format": args.format,
    "reduction": args.reduction,
    "keep_seq": args.keep_seq,
    "crop_face": args.crop_face,
    "sample_rate": windows.clip.stride,
    "stride": windows.step // windows.clip.stride,
    "window_rule": args.window_rule,
    # Folders from before there was a choice are float32.
    **({} if args.dtype == "float32" else {"dtype": args.dtype}),
    **(
      {"modality": args.modality, "sound_sha256": sound.sha256} if sound else {}
    ),
    **({"num_blocks": args.num_blocks} if args.num_blocks else {}),
  }


def _write(
  folder: FeatureFolder, encoded: EncodedVideo, reduction: str
) -> None:
  """Writes the features of a video, or quarantines it."""
  import numpy as np

  from marlin_jax.inference import feature_folder, stream

  outcome, name = encoded.outcome, encoded.video.name
  origin = feature_folder.Origin(name, outcome.sha256, outcome.num_bytes)
  if outcome.reason:
    folder.refuse(origin, outcome.reason)
    return
  features = np.stack(encoded.outputs)
  fields = feature_folder.Span._fields
  spans = [
    feature_folder.Span(*(getattr(window, field) for field in fields))
    for window in encoded.windows
  ]
  if reduction != "none":
    features = stream.reduced(features, reduction)[None]
    spans = [spans[0].to(spans[-1])]
  try:
    folder.write(origin, spans, features)
  except OSError as e:
    if e.errno != errno.ENAMETOOLONG:
      raise
    folder.refuse(origin, "its name is too long for a file of features")


def _nothing_extracted(output: Path, refused: dict[str, str]) -> str:
  return "\n".join(
    [
      f"no features extracted from {counted(len(refused), 'video')}:",
      *cli.reasons(refused),
      f"All of them: {output / 'quarantine.jsonl'}",
    ]
  )


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  from marlin_jax.inference import face_windows, feature_folder, stream

  parser = cli.ArgumentParser("marlin_jax.features", __doc__)
  add = parser.add_argument
  add(
    "videos",
    nargs="+",
    metavar="VIDEO_OR_DIR",
    help="a video or picture, a folder of videos (or of pictures, where it has "
    "no video), a manifest of data_prep.prepare, or the "
    "word sample for three sample videos",
  )
  add(
    "--checkpoint",
    required=True,
    help="weights in any format that Marlin.from_pretrained takes, or the name "
    "of a published model",
  )
  add(
    "--output",
    required=True,
    type=Path,
    help="folder for the features; an existing one is completed",
  )
  add(
    "--format",
    choices=feature_folder.FORMATS,
    default="npz",
    help="parquet needs pyarrow: pip install 'marlin-jax[parquet]'",
  )
  add(
    "--reduction",
    choices=stream.REDUCTIONS,
    default="none",
    help="one row for all windows of a video instead of one per window; std is "
    "that of the population, mean_std concatenates both",
  )
  add(
    "--keep_seq",
    action="store_true",
    help="a feature per token of a window (1568) instead of their mean",
  )
  add(
    "--modality",
    choices=stream.MODALITIES,
    default="video",
    help="what the features are of; sound and both need the workdir of a run "
    "with an encoder of sound, such as of configs/hicmae_s.py, and videos with "
    "a sound track; both: those of video, then those of sound, in one row",
  )
  add(
    "--num_blocks",
    type=cli.at_least(1),
    help="run only the first blocks of the encoder; by default all. Linear "
    "probes may find more in the middle",
  )
  add(
    "--crop_face",
    action="store_true",
    help="crop the main face, large and long visible, and follow it; by "
    "default whole frames are taken, which is right for face crops",
  )
  add(
    "--sample_rate",
    type=cli.at_least(1),
    help="distance between the frames of a window; by default as in training "
    "(MARLIN: 2)",
  )
  add(
    "--stride",
    type=cli.at_least(1),
    help="sampled frames from the start of one window to that of the next; by "
    "default the length of a window (MARLIN: 16), so windows do not overlap",
  )
  add(
    "--window_rule",
    choices=face_windows.WINDOW_RULES,
    default="cover",
    help="cover: every frame is in a window, and the last window is moved back "
    "to end with the video; authors: the windows of marlin-pytorch, which "
    "leave out the end, for comparison",
  )
  add(
    "--batch_size",
    type=cli.at_least(1),
    help="windows per batch, across videos and devices; by default for each "
    "device 1 on CPU, else 16",
  )
  add(
    "--dtype",
    choices=DTYPES,
    default="float32",
    help="dtype of matmuls; bfloat16 is several times faster on TPU and GPU, "
    "and accurate to about two digits",
  )
  add(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="worker processes that read videos; does not change the result",
  )
  add(
    "--retry_quarantined",
    action="store_true",
    help="try quarantined videos again",
  )
  cli.add_task_arguments(
    parser, "to extract what is missing and to merge their quarantines"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
