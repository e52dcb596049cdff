"""Applies a trained model to videos: probabilities per video and window.

  python -m marlin_jax.predict VIDEO_OR_DIR... \\
    --model runs/far/models/appearance-linear-1-0 --output predictions.csv
  python -m marlin_jax.predict --data DATA --split test --model ... --output ...

An evaluation keeps its models in WORKDIR/models. The output has a row for each
video, after the rows of its windows where the model judges windows:
  video        its path below the input
  row          'window' or 'video'
  start_secs   time of the first frame
  end_secs     time of the last frame
  x0 y0 x1 y1  the crop in pixels of the video, median over the frames
  p:NAME       probability of each label or class; of a model of numbers
               value:NAME, the number
  predicted    the class, or the labels above their thresholds, with ';'
  error        why there is no prediction

OUTPUT.jsonl holds the same as JSON, one line per video, written at once: the
command can be stopped or killed at any time, and goes on from there. With
--json that file is the output. All devices of the machine are used. Several
machines share the work by --task_index and --task_count: each writes a log of
its own, OUTPUT.jsonl-00001-of-00004, and a run without these flags joins them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from marlin_jax.records import cli, extras
from marlin_jax.records.cli import UserError, counted

if TYPE_CHECKING:
  import numpy as np

  from marlin_jax.inference.classifier import VideoClassifier
  from marlin_jax.inference.face_windows import Window


# Settings that logs of before they were written lack.
_LATER = ("head_sha256", "split", "dtype")


class PredictionError(UserError):
  """The arguments contradict each other, or nothing could be predicted."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  return cli.run_command(lambda: _start(args))


def _start(args: argparse.Namespace) -> None:
  """Runs the task that arguments or environment name."""
  # Imported here, so that --help answers at once.
  from marlin_jax.devices import distributed

  distributed.run_task(cli.task_of(args), functools.partial(_run, args))


def _run(args: argparse.Namespace, task: cli.Task) -> None:
  # Imported here, so that --help answers at once.
  import jax

  from marlin_jax.devices import distributed, sharding
  from marlin_jax.inference.classifier import VideoClassifier

  if bool(args.videos) == bool(args.data):
    raise PredictionError(
      "expected either videos or --data with a prepared data set"
    )
  if args.data:
    extras.require("train", "--data")
  else:
    extras.require("features", "marlin_jax.predict of videos")
  with distributed.process_0_first():  # which may download the encoder
    classifier = VideoClassifier.load(
      args.model,
      encoder=args.checkpoint,
      dtype=args.dtype,
      mesh=sharding.make_mesh(devices=jax.local_devices()),
    )
  settings = {
    "program": "marlin_jax.predict",
    "model": str(Path(args.model)),
    "head_sha256": classifier.head_sha256,
    "encoder_sha256": classifier.description.encoder_sha256,
    "names": list(classifier.description.names),
    "calibrated": args.calibrated,
    "crop_face": not args.whole_frames,
    "data": args.data,
    "split": args.split if args.data else "",
    "dtype": args.dtype,
  }
  is_value = classifier.description.kind == "value"
  if is_value and args.calibrated:
    raise PredictionError(
      f"--calibrated: {args.model} predicts numbers, and only probabilities "
      "can be calibrated"
    )
  with PredictionLog(
    args.output,
    settings,
    as_json=args.json,
    column="value" if is_value else "p",
    task=task,
  ) as log:
    if args.data:
      _predict_dataset(args, classifier, log)
    else:
      _predict_videos(args, classifier, log)
    num_failed = sum(bool(entry["error"]) for entry in log.entries.values())
    if num_failed == len(log.entries) and not task.suffix:
      reasons = {name: e["error"] for name, e in log.entries.items()}
      raise PredictionError(
        "\n".join(["nothing was predicted:", *cli.reasons(reasons)])
      )
  print(
    f"{log.path if task.suffix else args.output} holds the predictions of "
    f"{counted(len(log.entries) - num_failed, 'video')}"
    + (f"; {num_failed} could not be read, see 'error'" if num_failed else "")
  )
  if task.suffix:
    print(
      "After all tasks, run the same command as one process without "
      "--task_index and --task_count: it joins their predictions in "
      f"{args.output}"
    )


# --- Videos -------------------------------------------------------------------


def _predict_videos(
  args: argparse.Namespace, classifier: VideoClassifier, log: PredictionLog
) -> None:
  import numpy as np

  from marlin_jax.inference import stream, video_folder
  from marlin_jax.records.folders import sha256_of

  videos = log.task.part(video_folder.list_videos(args.videos))
  todo = [
    video
    for video in videos
    if not log.holds(video.name, lambda path=video.path: sha256_of(path))
  ]
  print(
    f"{counted(len(videos), 'video')}, {len(videos) - len(todo)} of them done "
    f"before; writing to {args.output}",
    flush=True,
  )
  windows = classifier.window_settings(
    crop_face=False if args.whole_frames else None
  )
  encoded_videos = video_folder.encode_many(
    classifier.outputs,
    todo,
    windows,
    batch_size=stream.local_batch_size(args.batch_size),
    num_workers=args.num_workers,
  )
  with contextlib.closing(encoded_videos):
    for encoded in encoded_videos:
      outcome = encoded.outcome
      entry = {"sha256": outcome.sha256, "error": outcome.reason}
      if not outcome.reason:
        outputs = np.stack(encoded.outputs)
        entry |= _entry(classifier, outputs, encoded.windows, args.calibrated)
      log.add(encoded.video.name, entry)


def _entry(
  classifier: VideoClassifier,
  outputs: np.ndarray,
  windows: list[Window] | None,
  calibrated: bool,
) -> dict[str, Any]:
  """Returns the prediction of a video, ready for JSON."""
  import numpy as np

  prediction = classifier.prediction(outputs)

  def numbers(probabilities: np.ndarray) -> list[float]:
    if calibrated:
      probabilities = classifier.calibrated(probabilities)
    return [float(f"{p:.6g}") for p in probabilities]

  entry = {
    "probabilities": numbers(prediction.probabilities),
    "predicted": list(prediction.predicted),
  }
  if windows is None:
    return entry

  def rounded(box: np.ndarray) -> list[float]:
    return [round(float(x), 1) for x in box]

  entry |= {
    "start_secs": round(windows[0].start_secs, 3),
    "end_secs": round(windows[-1].end_secs, 3),
    "box": rounded(np.median([window.box for window in windows], axis=0)),
  }
  if prediction.window_probabilities is not None:
    entry["windows"] = [
      {
        "probabilities": numbers(probabilities),
        "start_secs": round(window.start_secs, 3),
        "end_secs": round(window.end_secs, 3),
        "box": rounded(window.box),
      }
      for window, probabilities in zip(
        windows, prediction.window_probabilities, strict=True
      )
    ]
  return entry


# --- Prepared data sets -------------------------------------------------------


def _predict_dataset(
  args: argparse.Namespace, classifier: VideoClassifier, log: PredictionLog
) -> None:
  """Predicts the videos of a split, from the very crops of an evaluation."""
  import itertools

  import numpy as np
  from tqdm import tqdm

  from marlin_jax.downstream import clip_batches, splits
  from marlin_jax.inference import stream

  clip = classifier.weights.architecture.clip
  # The tracks that the evaluation took.
  settings = classifier.description.origin.get("settings", {})
  split = splits.open_split(
    args.data,
    args.split,
    None,
    all_tracks=settings.get("data.all_tracks", False),
  )
  fingerprint = split.dataset.fingerprint
  own = set(log.task.part(range(len(split))))
  windows = [
    window
    for window in split.windows(clip)
    if split.tracks[window.track].video in own
    and not log.holds(
      split.video_ids[split.tracks[window.track].video], lambda: fingerprint
    )
  ]
  batch_size = stream.local_batch_size(args.batch_size)
  image_size = classifier.weights.architecture.image_size
  batches = clip_batches.window_batches(
    clip_batches.ClipReader(split, clip, image_size),
    windows,
    batch_size,
    args.num_workers,
  )
  outputs = itertools.chain.from_iterable(
    stream.encode_batches(classifier.outputs, batches)
  )
  with tqdm(total=len(windows), unit="window", mininterval=1.0) as bar:
    for video, group in itertools.groupby(split.video_of(windows)):
      rows = np.stack(list(itertools.islice(outputs, len(list(group)))))
      bar.update(len(rows))
      entry = _entry(classifier, rows, None, args.calibrated)
      log.add(
        split.video_ids[video], {"sha256": fingerprint, "error": "", **entry}
      )


# --- Output -------------------------------------------------------------------


class PredictionLog:
  """Output that is complete for each video it holds, and locked while open.

  Attributes:
    path: the log.
    task: the part of the videos that it is of.
    entries: predictions by name of the video.
  """

  def __init__(
    self,
    path: Path,
    settings: dict[str, Any],
    *,
    as_json: bool,
    column: str = "p",
    task: cli.Task = cli.WHOLE,
  ):
    """Reads what earlier calls have written.

    Args:
      path: the output.
      settings: values that all predictions share.
      as_json: the output is the log itself, not a table.
      column: begins the names of the table's predictions.
      task: a task writes a log of its own, and no table; the whole work takes
        the predictions of all tasks over.

    Raises:
      OutputFolderError: a log is in use, or of other settings.
    """
    from marlin_jax.records.folders import OutputFolderError, check_local

    check_local(path)
    whole = path if as_json else path.with_name(f"{path.name}.jsonl")
    self._table = None if as_json or task.suffix else path
    self.path = whole.with_name(f"{whole.name}{task.suffix}")
    self.task = task
    self._columns = [f"{column}:{name}" for name in settings["names"]]
    self.entries: dict[str, dict[str, Any]] = {}
    self._of_others: dict[str, dict[str, Any]] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if self._table and path.exists() and not self.path.exists():
      raise OutputFolderError(
        f"{path} exists, and {self.path.name} is not beside it, so it cannot "
        "be completed; choose another --output"
      )
    self._file = self.path.open("a+b")
    try:
      self._lock(self._file)
      self._begin(settings, whole)
    except BaseException:
      self._file.close()
      raise

  def _begin(self, settings: dict[str, Any], whole: Path) -> None:
    """Reads this log and the others; `whole` is that of the whole work."""
    complete = b"".join(self._read(self.path, settings, self.entries))
    # A killed run may leave half a line.
    self._file.truncate(len(complete))
    if not complete:
      self._append(settings)
    # A task that is given other videos than before finds their predictions too.
    others = sorted(whole.parent.glob(f"{glob.escape(whole.name)}-*-of-*"))
    for other in {whole, *others} - {self.path}:
      if other.exists():
        self._take_over(other, settings)

  def _take_over(self, other: Path, settings: dict[str, Any]) -> None:
    """Reads another log; the whole work replaces those of tasks."""
    own = set(self.entries)
    if self.task.suffix:
      self._of_others |= self._entries_of(other, settings)
      return
    with other.open("rb") as file:
      self._lock(file)
      self.entries = self._entries_of(other, settings) | self.entries
      for name in self.entries.keys() - own:
        self._append({"video": name, **self.entries[name]})
      other.unlink()

  def _entries_of(self, path: Path, settings: dict[str, Any]) -> dict:
    entries: dict[str, dict[str, Any]] = {}
    for _ in self._read(path, settings, entries):
      pass
    return entries

  def _lock(self, file: BinaryIO) -> None:
    from marlin_jax.records.folders import OutputFolderError

    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise OutputFolderError(
        f"another run is writing to {file.name}; wait for it or stop it"
      ) from e
    except OSError:
      pass  # a network disk without locks

  def _read(
    self, path: Path, settings: dict[str, Any], entries: dict[str, Any]
  ) -> Iterator[bytes]:
    """Yields the complete lines of a log; adds its predictions to `entries`."""
    from marlin_jax.records.folders import OutputFolderError, differences

    for number, line in enumerate(path.read_bytes().splitlines(True)):
      is_whole = line.endswith(b"\n")
      if not (
        number or is_whole or json.dumps(settings).encode().startswith(line)
      ):
        raise OutputFolderError(
          f"{path} was not begun by this command; choose another --output"
        )
      if not is_whole:
        return
      try:
        entry = dict(json.loads(line))
      except (ValueError, TypeError) as e:
        raise OutputFolderError(
          f"{path} is damaged in line {number + 1}: {e}; choose another "
          "--output"
        ) from e
      if number:
        entries[entry.pop("video")] = entry
      elif changes := differences(
        {k: v for k, v in settings.items() if k in _LATER} | entry, settings
      ):
        raise OutputFolderError(
          f"{path} was made with other settings: {'; '.join(changes)}. "
          "Use those again, or another --output"
        )
      yield line

  def __enter__(self) -> PredictionLog:
    return self

  def __exit__(self, *_) -> None:
    self._file.close()
    if self._table is not None:
      from marlin_jax.records.folders import write_bytes

      write_bytes(self._table, self._as_csv().encode())

  def holds(self, name: str, sha256) -> bool:
    """Returns whether there is a prediction of this very file.

    Args:
      name: name of the video.
      sha256: called for the hash of its bytes.
    """
    entry = self.entries.get(name) or self._of_others.get(name)
    return bool(entry) and entry["sha256"] == sha256()

  def add(self, name: str, entry: dict[str, Any]) -> None:
    """Writes the prediction of a video."""
    self.entries[name] = entry
    self._append({"video": name, **entry})

  def _append(self, content: dict[str, Any]) -> None:
    self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
    self._file.flush()

  def _as_csv(self) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
      ["video", "row", "start_secs", "end_secs", "x0", "y0", "x1", "y1"]
      + [*self._columns, "predicted", "error"]
    )
    for name in sorted(self.entries):
      entry = self.entries[name]
      for kind, part in (
        *(("window", window) for window in entry.get("windows", ())),
        ("video", entry),
      ):
        writer.writerow(
          [name, kind, part.get("start_secs", ""), part.get("end_secs", "")]
          + (part.get("box") or [""] * 4)
          + part.get("probabilities", [""] * len(self._columns))
          + [";".join(part.get("predicted", ())), part.get("error", "")]
        )
    return text.getvalue()


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser("marlin_jax.predict", __doc__)
  add = parser.add_argument
  add(
    "videos",
    nargs="*",
    metavar="VIDEO_OR_DIR",
    help="a video or picture, a folder of videos (or of pictures, where it has "
    "no video), or a manifest of data_prep.prepare",
  )
  add(
    "--model",
    required=True,
    help="a folder in WORKDIR/models of an evaluation, or OWNER/NAME on the "
    "HuggingFace hub",
  )
  add("--output", required=True, type=Path, help="file to write or to complete")
  add(
    "--data",
    default="",
    help="predict the crops of a data set of data_prep.prepare, not videos",
  )
  add("--split", default="test", help="split of --data")
  add(
    "--checkpoint",
    default="",
    help="the frozen encoder, if it is no longer where it was",
  )
  add(
    "--whole_frames",
    action="store_true",
    help="do not crop the face: right for videos of face crops",
  )
  add(
    "--calibrated",
    action="store_true",
    help="divide logits by the temperature fitted on the validation split",
  )
  add("--json", action="store_true", help="write JSON lines, no table")
  add(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="dtype of matmuls",
  )
  add(
    "--batch_size",
    type=cli.at_least(1),
    help="windows per batch, across devices; by default for each device 1 on "
    "CPU, else 16",
  )
  add(
    "--num_workers",
    type=cli.at_least(1),
    default=cli.num_cores(),
    help="worker processes that read videos",
  )
  cli.add_task_arguments(parser, "to join their predictions")
  return parser


if __name__ == "__main__":
  sys.exit(main())
