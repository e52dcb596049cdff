"""Data sets of drawn faces, written by data_prep without face models."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from data_prep.output import dataset_folder, ledger, shards
from data_prep.sources.listing import Label
from data_prep.sources.manifest import Source
from data_prep.video import video_to_records
from marlin_jax.records import quality_index, schema

RECIPE = {
  "name": "faces",
  "schema_version": schema.SCHEMA_VERSION,
  "segment_frames": 64,
  "has_sound": False,
  "faces": "all",
  "frame_size": schema.FRAME_SIZE,
}


# One of each kind.
LABELS = {
  "attributes": Label("binary", ("smiling", "eyeglasses")),
  "emotion": Label("class", ("neutral", "happy")),
  "sentiment": Label("value", ("sentiment",)),
}


def some_labels(
  smiling: float, emotion: float, sentiment: float
) -> dict[str, np.ndarray]:
  """Returns labels of each kind in LABELS; eyeglasses is unknown."""
  return {
    "attributes": np.float32([smiling, np.nan]),
    "emotion": np.float32([emotion]),
    "sentiment": np.float32([sentiment]),
  }


def a_record(
  video_id: str,
  track_id: int = 0,
  segment: int = 0,
  num_frames: int = 3,
  side: float = 300.0,
  **changes,
) -> schema.Record:
  """Returns a record of a nose on skin before a grey wall.

  `side` is the side of the crop in the video, in pixels.
  """
  labels = np.zeros((num_frames, 224, 224), np.uint8)
  labels[:, 60:200, 60:160] = schema.REGIONS.index("skin")
  labels[:, 110:140, 100:120] = schema.REGIONS.index("nose")
  frame = np.full((224, 224, 3), 128, np.uint8)
  frame[labels[0] > 0] = (200, 160, 140)
  frame[labels[0] > 1] = (160, 100, 90)
  box = np.float32([10, 20, 10 + side, 20 + side])
  record = schema.Record(
    frames=[simplejpeg.encode_jpeg(frame, 95)] * num_frames,
    regions=schema.region_bits(labels),
    parsing=schema.compress_parsing(labels),
    boxes=np.tile(box, (num_frames, 1)),
    video_id=video_id,
    track_id=track_id,
    segment=segment,
    subject_id="",
    fps=25.0,
    start_secs=0.0,
    quality=0.5,
    quality_terms=np.float32([0.5, 0.8, 0.9, 1.0]),
  )
  return dataclasses.replace(record, **changes)


def showing(record: schema.Record, numbers: Sequence[int]) -> schema.Record:
  """Returns the record with frames that show numbers, in [0, 255]."""
  frames = [
    simplejpeg.encode_jpeg(np.full((224, 224, 3), number, np.uint8), 95)
    for number in numbers
  ]
  return dataclasses.replace(record, frames=frames)


def shown(video: np.ndarray) -> list[int]:
  """Returns the numbers that frames (T, H, W, 3) show; see `showing`."""
  return np.rint(video.mean((1, 2, 3))).astype(int).tolist()


def make(
  path: Path,
  videos: Mapping[str, Sequence[schema.Record]],
  splits: Mapping[str, str] | None = None,
  refused: Mapping[str, str] | None = None,
  num_shards: int | None = None,
  labels: Mapping[str, Label] | None = None,
  has_sound: bool = False,
) -> Path:
  """Writes a data set.

  Args:
    path: folder of the data set.
    videos: records of each video, by video_id.
    splits: split of each video that is not in 'train'.
    refused: reason for each quarantined video.
    num_shards: number of shards of the largest split.
    labels: meaning of the records' labels.
    has_sound: whether the records have sound.
  """
  splits, refused, labels = splits or {}, refused or {}, labels or {}
  sources = []
  for video_id in (*videos, *refused):
    (first, *_) = [*videos.get(video_id, ()), a_record(video_id)]
    sources.append(
      Source(
        video_id,
        Path(__file__),  # any file that can be read
        first.subject_id,
        splits.get(video_id, "train"),
        {k: tuple(v.tolist()) for k, v in first.labels.items()},
      )
    )
  recipe = RECIPE | {
    "has_sound": has_sound,
    "labels": {
      name: {"kind": label.kind, "names": list(label.names)}
      for name, label in labels.items()
    },
  }
  settings = video_to_records.Settings(has_sound=has_sound)
  with dataset_folder.DatasetFolder(path, recipe, num_shards, sources) as made:
    plan = made.plan(settings, retry_quarantined=False)
    made.begin(plan)
    for shard in filter(made.is_complete, plan.shards):
      made.write_shard(shard)
    for source in sources:
      found = videos.get(source.video_id, ())
      outcome = video_to_records.Outcome(
        video_to_records.KEPT if found else video_to_records.QUARANTINED,
        refused.get(source.video_id, ""),
        num_decoded_frames=sum(map(len, found)),
        num_tracks=len({record.track_id for record in found}),
        num_records=len(found),
        num_frames=sum(map(len, found)),
        quality=[quality_index.row_of(record) for record in found],
        segments=[
          [record.track_id, len(record), schema.median_side(record)]
          for record in found
        ],
      )
      entry = ledger.Entry.of(source, settings, outcome)
      # Equal hashes would make them copies of a video.
      entry = dataclasses.replace(entry, sha256="")
      with shards.PartWriter(shards.Part(path, source.video_id)) as part:
        for record in found:
          part.add(schema.encode(record))
        part.commit(entry)
      if shard := made.add(entry):
        made.write_shard(shard)
    made.write_ledgers()
    made.finish()
  return path
