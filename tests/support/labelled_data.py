"""Small labelled data sets, and evaluations on them."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from flax import nnx

from configs import eval_dfd
from data_prep.output import derived_files, ledger, shards
from data_prep.sources.listing import BINARY, CLASS, VALUE, Label
from marlin_jax.eval import configuration
from marlin_jax.eval.evaluation import evaluate
from marlin_jax.records import folders, schema
from marlin_jax.weights import safetensors_folder
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import of_modules
from tests.support.processes import ROOT, seeing_devices
from tests.support.training_runs import free_port, start

SIZE = schema.FRAME_SIZE


@dataclasses.dataclass(frozen=True)
class Video:
  """A video of one face track, or of several.

  Attributes:
    video_id, subject_id: as in records.Record.
    labels: numbers by label.
    frames: uint8 (T, 224, 224, 3).
    cuts: where its track is cut into records.
    num_tracks: copies of the track.
    sides: side of the crop in each track; 0 where it is missing.
  """

  video_id: str
  subject_id: str
  labels: Mapping[str, Sequence[float]]
  frames: np.ndarray
  cuts: Sequence[int] = ()
  num_tracks: int = 1
  sides: Sequence[float] = ()

  def records(self):
    for track_id in range(self.num_tracks):
      parts = np.split(self.frames, self.cuts)
      side = [*self.sides, *[0] * self.num_tracks][track_id]
      for segment, part in enumerate(parts):
        num = len(part) - 2 * track_id  # the first is the longest
        yield schema.Record(
          frames=[
            simplejpeg.encode_jpeg(np.ascontiguousarray(f), quality=95)
            for f in part[:num]
          ],
          regions=np.zeros((num, 14, 14), np.uint16),
          parsing=b"",
          boxes=np.tile(np.float32([0, 0, side, side]), (num, 1)),
          video_id=self.video_id,
          track_id=track_id,
          segment=segment,
          subject_id=self.subject_id,
          fps=30.0,
          start_secs=0.0,
          quality=1.0,
          quality_terms=np.ones(4, np.float32),
          labels={
            name: np.array(values, np.float32)
            for name, values in self.labels.items()
          },
        )


def write(
  path: Path,
  splits: Mapping[str, Sequence[Video]],
  labels: Mapping[str, Label],
) -> Path:
  """Writes a data set in the layout of data_prep.prepare."""
  path.mkdir()
  infos, hashes, counts = {}, {}, {}
  for split, videos in splits.items():
    name = f"faces-{split}.array_record-00000-of-00001"
    parts = []
    for video in videos:
      data = [schema.encode(record) for record in video.records()]
      part = path / f"part-{len(parts)}"
      with_entry = ledger_entry(video, split, len(data))
      with shards.PartWriter(_Part(part)) as writer:
        for encoded in data:
          writer.add(encoded)
        writer.commit(with_entry)
      parts.append((with_entry, part, 0))
    shards.write_shard(path / name, parts)
    for _, part, _ in parts:
      part.unlink()
      part.with_suffix(".json").unlink()
    num = sum(entry.num_records for entry, _, _ in parts)
    infos[split] = {name: (num, (path / name).stat().st_size)}
    hashes[name] = folders.sha256_of(path / name)
    counts[split] = {
      "num_videos": len(videos),
      "num_frames": sum(len(r) for video in videos for r in video.records()),
    }
  staging = path / "staging"
  staging.mkdir()
  metadata = {
    "schema_version": schema.SCHEMA_VERSION,
    "splits": counts,
    "labels": {name: dataclasses.asdict(v) for name, v in labels.items()},
    "frame_size": schema.FRAME_SIZE,
  }
  for name in derived_files.write_tfds_metadata(
    staging, infos, metadata, {n: v.length for n, v in labels.items()}, False
  ):
    (staging / name).rename(path / name)
  (path / "hashes.json").write_text(json.dumps(hashes))
  (path / folders.VIDEOS).write_text(
    "".join(
      ledger_entry(video, split, len(video.cuts) + 1).to_line()
      for split, videos in splits.items()
      for video in videos
    )
  )
  for leftover in staging.iterdir():
    leftover.unlink()
  staging.rmdir()
  return path


class _Part(shards.Part):
  """A part with a free choice of path."""

  def __init__(self, path: Path):
    self.records, self.line = path, path.with_suffix(".json")


def ledger_entry(video: Video, split: str, num_records: int) -> ledger.Entry:
  """Returns the ledger line of a video; what it does not say is None."""
  values = {
    "video_id": video.video_id,
    "split": split,
    "subject_id": video.subject_id,
    "num_records": num_records,
    "labels": {
      name: [None if np.isnan(x) else float(x) for x in values]
      for name, values in video.labels.items()
    },
  }
  empty = {field.name: None for field in dataclasses.fields(ledger.Entry)}
  return ledger.Entry(**empty | values)


def make(
  num: int, draw: Callable[[int, np.random.Generator], Video], seed: int = 0
) -> list[Video]:
  """Returns videos in the order of their ids."""
  np_rng = np.random.default_rng(seed)
  return [draw(i, np_rng) for i in range(num)]


# --- Faces --------------------------------------------------------------------

TINY = {
  "random.width": 32,
  "random.depth": 1,
  "random.num_heads": 2,
  "random.mlp_dim": 64,
  "random.num_frames": 4,
  "random.patch_size": 56,
  "batch_size": 8,
  "num_resamples": 50,
  "plots": False,
  "finetune.batch_size": 8,
  "finetune.epochs": 1.0,
  "finetune.min_steps": 4,
  "finetune.num_rounds": 2,
  "light.batch_size": 8,
  "light.epochs": 1.0,
  "light.min_steps": 4,
  "light.num_rounds": 2,
  "attentive.batch_size": 8,
  "attentive.epochs": 1.0,
  "attentive.min_steps": 4,
  "attentive.num_rounds": 2,
  "paper.max_epochs": 3,
}
LABELS = {
  "appearance": Label(BINARY, ("bright", "red", "never")),
  "emotion": Label(BINARY, ("happy", "sad")),
  "sentiment": Label(VALUE, ("sentiment",)),
  "affect": Label(VALUE, ("valence", "arousal")),
  "manipulation": Label(CLASS, ("original", *eval_dfd.METHODS)),
  "mood": Label(CLASS, ("dark", "grey", "bright")),
}


def draw_face(i: int, np_rng: np.random.Generator) -> Video:
  """Draws a face whose brightness and colour determine all its labels."""
  level = int(np_rng.integers(3))
  red = int(np_rng.integers(2))
  colour = np.array([40 + 60 * level + 30 * red, 40 + 60 * level, 90])
  frames = colour + np_rng.integers(0, 20, (10, SIZE, SIZE, 1))
  return Video(
    video_id=f"{i:03d}.mp4",
    subject_id=f"person {i // 2}",
    labels={
      "appearance": (level == 2, red, 0),
      "emotion": (level > 0, np.nan if i % 3 == 0 else red),
      "sentiment": (level - 1.0,),
      "affect": (level / 2 - red, np.nan if i % 5 == 0 else 50.0 + 9 * red),
      "manipulation": (np.nan if i == 1 else min(level * (1 + red), 4),),
      "mood": (level,),
    },
    frames=frames.clip(0, 255).astype(np.uint8),
    cuts=(6,) if i % 2 else (),
    num_tracks=2 if i == 0 else 1,
  )


def renamed(videos: Sequence[Video], prefix: str) -> list[Video]:
  """Returns the same videos under other ids of videos and people."""
  return [
    dataclasses.replace(
      video,
      video_id=prefix + video.video_id,
      subject_id=prefix + video.subject_id,
    )
    for video in videos
  ]


def write_faces(path: Path) -> Path:
  """Writes 24 videos of 12 people in train, 16 of 8 in each of val and test."""
  return write(
    path,
    {
      "train": make(24, draw_face, 0),
      "val": renamed(make(16, draw_face, 1), "v"),
      "test": renamed(make(16, draw_face, 2), "t"),
    },
    LABELS,
  )


# --- Evaluations --------------------------------------------------------------


def tiny(config, **changes):
  """Returns a configuration with small sizes."""
  config.update_from_flattened_dict(TINY | changes)
  return config


def run(module, workdir, data, checkpoint="random", **changes):
  """Evaluates in this process."""
  config = tiny(module.get_config(), **changes)
  configuration.validate(config)
  return evaluate(config, str(checkpoint), str(data), str(workdir))


def command_line(task, workdir, data, checkpoint="random", **changes):
  """Returns the command line of an evaluation."""
  return [
    *(sys.executable, "-m", f"marlin_jax.eval.{task}"),
    f"--config=configs/eval_{task}.py",
    *(f"--checkpoint={checkpoint}", f"--data={data}"),
    f"--workdir={workdir}",
    *(f"--config.{key}={x}" for key, x in (TINY | changes).items()),
  ]


def command(task, workdir, data, checkpoint="random", *, devices=1, **changes):
  """Runs the command in a process that sees `devices` CPU devices."""
  return subprocess.run(
    command_line(task, workdir, data, checkpoint, **changes),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=seeing_devices(devices),
    check=False,
    timeout=250,
  )


def in_two_processes(task, workdir, data, *, devices, **changes):
  """Runs the command in two processes of one evaluation.

  Returns:
    Exit code and output, stderr with stdout, of each.
  """
  settings = {
    "distributed.coordinator": f"127.0.0.1:{free_port()}",
    "distributed.num_processes": 2,
    "distributed.timeout_secs": 120,
  }
  processes = [
    start(
      command_line(
        task,
        workdir,
        data,
        **changes | settings | {"distributed.process_id": number},
      ),
      devices,
    )
    for number in (0, 1)
  ]
  outputs = [process.communicate(timeout=250)[0] for process in processes]
  codes = [process.returncode for process in processes]
  return list(zip(codes, outputs, strict=True))


def metric(results, mode, name="auc", ratio=1.0):
  """Returns a metric from the summary of a results.json."""
  (row,) = (
    r for r in results["summary"] if (r["mode"], r["ratio"]) == (mode, ratio)
  )
  return row["metrics"][name]["mean"]


def write_random(path: Path, architecture: Architecture) -> Path:
  """Writes an untrained encoder."""
  params = nnx.to_pure_dict(nnx.state(architecture.make_autoencoder()))
  safetensors_folder.write(of_modules(architecture, params), path)
  return path
