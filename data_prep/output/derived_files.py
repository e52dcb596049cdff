"""Files that follow from the ledger and the shards; readers open them.

Quarantine, indices of the records of a split, and the files of TFDS.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep import storage
from data_prep.output import folder_settings, ledger
from data_prep.output.ledger import Entry
from data_prep.video import video_to_records
from marlin_jax.records import folders, quality_index, schema, segment_index

# Ledger lines by shard and video_id.
Written = Mapping[str, Mapping[str, Entry]]


def quarantined(entries: Iterable[Entry]) -> list[dict[str, str]]:
  """Returns the lines of quarantine.jsonl: the left-out videos.

  Failed videos are not among them, since the next run tries them again.
  """
  return [
    {key: getattr(entry, key) for key in ("video_id", "reason", "sha256")}
    for entry in entries
    if entry.status not in (video_to_records.KEPT, video_to_records.FAILED)
  ]


def counts(entries: Iterable[Entry]) -> dict[str, int]:
  """Returns the counts of a split in metadata.json, from its ledger lines."""
  kept = [entry for entry in entries if entry.is_kept]
  return {
    "num_videos": len(kept),
    "num_tracks": sum(entry.num_tracks for entry in kept),
    "num_records": sum(entry.num_records for entry in kept),
    "num_frames": sum(entry.num_frames for entry in kept),
  }


def index_files(
  path: Path, settings: dict[str, Any], written: Written
) -> Iterator[tuple[Path, bytes | None]]:
  """Yields path and content of the index files of each split.

  The content of a segment index is None if ledger lines of an earlier version
  lack the segments of a video; training then makes the index.

  Args:
    path: folder of the data set.
    settings: its settings.
    written: the ledger.
  """
  for names in folder_settings.shards_by_split(settings).values():
    entries = [
      entry
      for name in names
      for _, entry in sorted(written.get(name, {}).items())
      if entry.num_records
    ]
    data = quality_index.pack_rows(*ledger.quality_rows(entries))
    yield path / quality_index.name_for(names[0]), data
    data = ledger.packed_segments(entries)
    yield path / segment_index.name_for(names[0]), data


def write(path: Path, settings: dict[str, Any], written: Written) -> None:
  """Writes the indices, then the files of TFDS, dataset_info.json last.

  Args:
    path: folder of the data set.
    settings: its settings.
    written: the ledger; every shard is on disk.
  """
  for index, data in index_files(path, settings, written):
    if data is None:
      index.unlink(missing_ok=True)
    else:
      ledger.write_if_new(index, data)
  splits: dict[str, dict[str, tuple[int, int]]] = {}
  by_split: dict[str, dict[str, int]] = {}
  for split, names in folder_settings.shards_by_split(settings).items():
    splits[split] = {
      name: (
        sum(entry.num_records for entry in written[name].values()),
        storage.size(path / name),
      )
      for name in names
    }
    by_split[split] = counts(
      entry for name in names for entry in written[name].values()
    )
  metadata = {
    "schema_version": schema.SCHEMA_VERSION,
    "splits": by_split,
    "labels": settings.get("labels", {}),
    "frame_size": settings["frame_size"],
  }
  record_labels = settings[folder_settings.RECORD_LABELS]
  try:
    with tempfile.TemporaryDirectory(dir=storage.scratch_folder()) as staging:
      names = write_tfds_metadata(
        Path(staging), splits, metadata, record_labels, settings["has_sound"]
      )
      files = [(name, (Path(staging) / name).read_bytes()) for name in names]
  except OSError as e:
    raise storage.no_space(e) if e.errno == errno.ENOSPC else e from e
  for name, data in files:
    folders.write_bytes(path / name, data)


# --- TFDS ---------------------------------------------------------------------


def features(
  labels: Mapping[str, int],
  has_sound: bool,
  frame_size: int = schema.FRAME_SIZE,
):
  """Returns the TFDS features that match `schema.encode`.

  Args:
    labels: number of values of each label that records hold.
    has_sound: True if records hold sound.
    frame_size: height and width of their frames in pixels.
  """
  import numpy as np
  from tensorflow_datasets import features

  frame = (frame_size, frame_size, 3)
  sound = {
    "audio": features.Text(),
    "mel": features.Tensor(
      shape=(None, schema.NUM_MELS), dtype=np.float32, encoding="bytes"
    ),
  }
  grid = (None, schema.GRID_SIZE, schema.GRID_SIZE)
  return features.FeaturesDict(
    {
      "frames": features.Sequence(
        features.Image(shape=frame, encoding_format="jpeg")
      ),
      "regions": features.Tensor(shape=grid, dtype=np.uint16, encoding="bytes"),
      "parsing": features.Text(),  # any bytes; TFDS has no type for them
      "boxes": features.Tensor(
        shape=(None, 4), dtype=np.float32, encoding="bytes"
      ),
      "video_id": features.Text(),
      "track_id": np.int64,
      "segment": np.int64,
      "subject_id": features.Text(),
      "fps": np.float32,
      "start_secs": np.float32,
      "quality": np.float32,
      "quality_terms": features.Tensor(
        shape=(len(schema.QUALITY_TERMS),), dtype=np.float32
      ),
      **{
        f"label_{name}": features.Tensor(shape=(length,), dtype=np.float32)
        for name, length in labels.items()
      },
      **(sound if has_sound else {}),
    }
  )


def write_tfds_metadata(
  folder: Path,
  splits: Mapping[str, Mapping[str, tuple[int, int]]],
  metadata: Mapping[str, Any],
  labels: Mapping[str, int],
  has_sound: bool,
) -> list[str]:
  """Writes features.json, metadata.json and dataset_info.json.

  Args:
    folder: empty folder to write to; the shards are elsewhere.
    splits: for each split and shard name, the numbers of records and bytes.
    metadata: content of metadata.json; `frame_size` is as for `features`.
    labels, has_sound: as for `features`.

  Returns:
    The names of the files, in the order in which to publish them.
  """
  import tensorflow_datasets as tfds

  for name in (name for split in splits.values() for name in split):
    # TFDS looks for the shards' names, not at their content.
    (folder / name).touch()
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features(labels, has_sound, metadata["frame_size"]),
    split_infos=[
      tfds.core.SplitInfo(
        name=name,
        shard_lengths=[num for num, _ in split.values()],
        num_bytes=sum(num_bytes for _, num_bytes in split.values()),
      )
      for name, split in splits.items()
    ],
    version="1.0.0",
    check_data=False,
    description="Face tracks for masked autoencoder pretraining.",
    metadata=tfds.core.MetadataDict(metadata),
  )
  return [folders.FEATURES, folders.METADATA, folders.DATASET_INFO]
