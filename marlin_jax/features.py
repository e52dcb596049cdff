"""Features of whole folders of videos.

  python -m marlin_jax.features VIDEO_OR_DIR... --checkpoint PATH --output DIR

writes for each video, named by its path below the folder given:
  OUTPUT/<path>.npz, or .parquet   features, with the times of their windows
  OUTPUT/quarantine.jsonl          the videos without, and why
  OUTPUT/settings.json             what all files were made with

A file has one row per window, or with a reduction one for the whole video:
  features     float32 (D,), with keep_seq (N, D); in parquet a flat list
  first_frame  number of the first frame it stands for, from 0
  num_frames   how many frames it stands for
  start_secs   time of the first of them
  end_secs     time of the last of them
and `metadata`, JSON: the video and its hash, checkpoint, settings, versions; in
parquet the schema's metadata `marlin_jax`.

Safe to stop at any moment, also by force: the same command does what is
missing.

Axes: N tokens, D width.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_jax.records import cli
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  import numpy as np

  from marlin_jax.inference.face_windows import Window, WindowSettings
  from marlin_jax.inference.feature_folder import FeatureFolder, Span
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.inference.video_folder import Outcome, Video, VideoBar


class _Failure(UserError):
  """The run is of no use; the message says why."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  # Imported here, so that --help answers at once.
  return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
  from marlin_jax.inference import feature_folder, video_folder, window_features
  from marlin_jax.inference.marlin import Marlin

  # --- What to do -------------------------------------------------------------
  videos = video_folder.list_videos(args.videos)
  marlin = Marlin.from_pretrained(args.checkpoint)
  try:
    windows = window_features.window_settings(
      marlin.architecture,
      crop_face=args.crop_face,
      sample_rate=args.sample_rate,
      stride=args.stride,
      window_rule=args.window_rule,
    )
  except ValueError as e:
    raise _Failure(f"--stride, --sample_rate: {e}") from e
  settings = _settings(args, marlin, windows)
  with feature_folder.FeatureFolder(args.output, settings) as folder:
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
    print(
      f"{counted(len(videos), 'video')}{done}; writing to {args.output}",
      flush=True,
    )

    # --- Videos to features ---------------------------------------------------
    started_at = time.monotonic()
    folder.begin()
    with (
      contextlib.closing(
        video_folder.read_many(
          [video.path for video in todo], windows, args.num_workers
        )
      ) as events,
      video_folder.progress_bar(todo) as bar,
    ):
      extraction = _Extraction(todo, args.reduction, folder, bar)
      extraction.run(marlin, events, args.keep_seq, args.batch_size)
    folder.finish()

    # --- What came of it ------------------------------------------------------
    names = {video.name for video in videos}
    refused = {n: r for n, r in folder.reasons.items() if n in names}
    if len(refused) == len(videos):
      raise _Failure(_nothing_extracted(folder.path, refused))
    print(
      f"Done in {time.monotonic() - started_at:.0f} s: "
      f"{counted(extraction.num_windows, 'window')} of "
      f"{counted(len(todo), 'video')}. "
      f"{args.output} holds the features of {len(videos) - len(refused)} of "
      f"{counted(len(videos), 'video')}."
    )
    if refused:
      print(
        f"  left out: {len(refused)}; why: {folder.path / 'quarantine.jsonl'}"
      )


def _settings(
  args: argparse.Namespace, marlin: Marlin, windows: WindowSettings
) -> dict[str, Any]:
  """Returns what the features depend on."""
  from marlin_jax.weights.weights import encoder_sha256

  return {
    "checkpoint": str(args.checkpoint),
    "checkpoint_sha256": encoder_sha256(marlin.weights),
    "format": args.format,
    "reduction": args.reduction,
    "keep_seq": args.keep_seq,
    "crop_face": args.crop_face,
    "sample_rate": windows.clip.stride,
    "stride": windows.step // windows.clip.stride,
    "window_rule": args.window_rule,
  }


# --- Extracting ---------------------------------------------------------------


@dataclasses.dataclass
class _Result:
  """What is known of one video so far.

  Attributes:
    spans: of its windows.
    features: of the first of them.
    outcome: how reading it ended, None while it goes on.
  """

  spans: list[Span] = dataclasses.field(default_factory=list)
  features: list[np.ndarray] = dataclasses.field(default_factory=list)
  outcome: Outcome | None = None

  @property
  def is_complete(self) -> bool:
    return self.outcome is not None and (
      bool(self.outcome.reason) or len(self.features) == len(self.spans)
    )


class _Extraction:
  """Videos on their way to files; windows of several share a batch.

  Attributes:
    num_windows: whose features are there.
  """

  def __init__(
    self,
    todo: Sequence[Video],
    reduction: str,
    folder: FeatureFolder,
    bar: VideoBar,
  ) -> None:
    self._todo = todo
    self._reduction = reduction
    self._folder = folder
    self._bar = bar
    self._results: dict[int, _Result] = {}
    # The videos of the windows whose features are still to come.
    self._owners: collections.deque[int] = collections.deque()
    self.num_windows = self._num_refused = 0
    self._started_at = time.monotonic()

  def run(
    self,
    marlin: Marlin,
    events: Iterator[tuple[int, Window | float | Outcome]],
    keep_seq: bool,
    batch_size: int | None,
  ) -> None:
    """Takes what comes of the videos, until all are finished."""
    from marlin_jax.inference import window_features

    for features in window_features.extract(
      marlin,
      self._clips(events),
      keep_seq=keep_seq,
      batch_size=batch_size or window_features.default_batch_size(),
    ):
      self.num_windows += 1
      self._note()
      number = self._owners.popleft()
      # A video that turned out to be bad is not known any more.
      if number in self._results:
        self._results[number].features.append(features)
        self._finish_if_complete(number)

  def _clips(
    self, events: Iterator[tuple[int, Window | float | Outcome]]
  ) -> Iterator[np.ndarray]:
    from marlin_jax.inference.face_windows import Window
    from marlin_jax.inference.feature_folder import Span

    for number, event in events:
      if isinstance(event, float):
        self._bar.advance(number, event)
        continue
      result = self._results.setdefault(number, _Result())
      if isinstance(event, Window):
        result.spans.append(
          Span(*(getattr(event, field) for field in Span._fields))
        )
        self._owners.append(number)
        yield event.frames
      else:
        result.outcome = event
        self._finish_if_complete(number)

  def _finish_if_complete(self, number: int) -> None:
    import numpy as np

    from marlin_jax.inference import feature_folder, window_features

    result = self._results[number]
    if not result.is_complete:
      return
    del self._results[number]
    outcome = result.outcome
    origin = feature_folder.Origin(
      self._todo[number].name, outcome.sha256, outcome.num_bytes
    )
    if outcome.reason:
      self._folder.refuse(origin, outcome.reason)
    else:
      features, spans = np.stack(result.features), result.spans
      if self._reduction != "none":
        features = window_features.reduced(features, self._reduction)[None]
        spans = [spans[0].to(spans[-1])]
      self._folder.write(origin, spans, features)
    self._num_refused += bool(outcome.reason)
    self._note()
    self._bar.finish(number)

  def _note(self) -> None:
    rate = self.num_windows / max(time.monotonic() - self._started_at, 1e-6)
    self._bar.note(
      f"{self.num_windows} windows ({rate:.1f}/s), "
      f"{self._num_refused} quarantined"
    )


# --- Words --------------------------------------------------------------------


def _nothing_extracted(output: Path, refused: dict[str, str]) -> str:
  return "\n".join(
    [
      f"no features came of {counted(len(refused), 'video')}:",
      *cli.reasons(refused),
      f"All of them: {output / 'quarantine.jsonl'}",
    ]
  )


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  from marlin_jax.inference import face_windows, feature_folder, window_features

  parser = argparse.ArgumentParser(
    prog="python -m marlin_jax.features",
    description="Extracts features of videos, one file each with the times of "
    "its windows. Stop it when you like; the same command goes on where it "
    "was, and does only what is missing.",
    formatter_class=cli.HelpFormatter,
    allow_abbrev=False,  # a misspelled flag is an error
  )
  add = parser.add_argument
  add(
    "videos",
    nargs="+",
    metavar="VIDEO_OR_DIR",
    help="a video, a folder of videos, a manifest of data_prep.prepare, or the "
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
    help="folder of the features; an existing one is completed",
  )
  add(
    "--format",
    choices=feature_folder.FORMATS,
    default="npz",
    help="parquet needs pyarrow: pip install 'marlin-jax[parquet]'",
  )
  add(
    "--reduction",
    choices=window_features.REDUCTIONS,
    default="none",
    help="one row for all windows of a video instead of one for each; std is "
    "the population's, mean_std both side by side",
  )
  add(
    "--keep_seq",
    action="store_true",
    help="a feature for each token of a window (1568) instead of their mean",
  )
  add(
    "--crop_face",
    action="store_true",
    help="find the face that is there longest, follow it and cut it out; "
    "without, whole frames are taken, which is right for face crops",
  )
  add(
    "--sample_rate",
    type=cli.at_least(1),
    help="every such frame is seen; without it, as in training (MARLIN: 2)",
  )
  add(
    "--stride",
    type=cli.at_least(1),
    help="seen frames from the start of one window to that of the next; "
    "without it those of a window (MARLIN: 16), side by side",
  )
  add(
    "--window_rule",
    choices=face_windows.WINDOW_RULES,
    default="cover",
    help="cover: every frame is in a window, the last of which is moved back "
    "to end with the video; authors: the windows of marlin-pytorch, which "
    "leave out the end, for comparison",
  )
  add(
    "--batch_size",
    type=cli.at_least(1),
    help="windows computed at a time, of whatever videos; without it 1 on CPU, "
    "else 16",
  )
  add(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="videos read at a time; the result does not depend on it",
  )
  add(
    "--retry_quarantined",
    action="store_true",
    help="try videos again that gave nothing before",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
