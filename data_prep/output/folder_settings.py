"""The settings of a data set: what must agree, and what may change.

settings.json holds them. Settings that the bytes of a record depend on must be
the same for all records of a folder; labels, versions of packages and the
numbers of shards may change as it grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.output import shards
from data_prep.sources.listing import Label
from data_prep.sources.manifest import Source, stable_hash
from marlin_jax.records import folders, schema
from marlin_jax.records.folders import OutputFolderError

# Setting with the version of decoding, tracking and labelling.
ALGORITHM_VERSION = "algorithm_version"
# Setting with the number of values of each label that records hold too. Only
# folders of earlier versions have any: labels are read from the ledger.
RECORD_LABELS = "record_labels"
# Setting with all versions of the packages that have made records.
VERSIONS = "versions"
# Settings that may change as a folder grows.
_FREE = {"num_shards", ALGORITHM_VERSION, RECORD_LABELS, VERSIONS, "labels"}


def shard_index(video_id: str, num_shards: int) -> int:
  """Returns the number of a video's shard in its split."""
  return stable_hash(f"shard:{video_id}") % num_shards


def shard_name(settings: dict[str, Any], split: str, index: int) -> str:
  """Returns the file name of a shard, given the folder's settings."""
  num = settings["num_shards"][split]
  return f"{settings['name']}-{split}.array_record-{index:05d}-of-{num:05d}"


def shards_by_split(settings: dict[str, Any]) -> dict[str, list[str]]:
  """Returns the file names of the shards of each split."""
  return {
    split: [shard_name(settings, split, i) for i in range(num)]
    for split, num in settings["num_shards"].items()
  }


def shard_of(settings: dict[str, Any], split: str, video_id: str) -> str:
  """Returns the file name of the shard that a video belongs to."""
  num = settings["num_shards"][split]
  return shard_name(settings, split, shard_index(video_id, num))


def record_labels(settings: dict[str, Any]) -> dict[str, int]:
  """Returns the number of values of each label that records hold."""
  in_all = {
    name: Label(label["kind"], tuple(label["names"])).length
    for name, label in settings.get("labels", {}).items()
  }
  return settings.get(RECORD_LABELS, in_all)


def version_notes(versions: dict[str, list[str]]) -> list[str]:
  """Returns a note for each package that made records in several versions."""
  return [
    f"records were made by {name} {', '.join(numbers)}: their pixels and crops "
    "may differ slightly"
    for name, numbers in versions.items()
    if len(numbers) > 1
  ]


def with_old_settings(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a folder's settings, with defaults for those of later versions."""
  return {"faces": "all", "frame_size": schema.FRAME_SIZE, **stored}


def agreed(
  path: Path,
  stored: dict[str, Any] | None,
  recipe: dict[str, Any],
  num_shards: int | None,
  sources: Sequence[Source],
) -> dict[str, Any]:
  """Returns the settings of a run.

  Args:
    path: folder of the data set.
    stored: settings on disk; None for a new data set.
    recipe: settings that every record depends on.
    num_shards: see `DatasetFolder`.
    sources: all videos.

  Raises:
    OutputFolderError: the folder was made with other settings.
  """
  if stored is None:
    stored = {**recipe, "num_shards": {}, VERSIONS: {}}
  stored = with_old_settings(stored)
  counts = dict(stored["num_shards"])
  differences = folders.differences(stored, recipe, _FREE)
  if counts and num_shards not in (None, max(counts.values())):
    differences.append(
      f"num_shards was {max(counts.values())} and is now {num_shards}"
    )
  if differences:
    raise OutputFolderError(
      f"{path} was made with other settings: {'; '.join(differences)}. "
      "Use the earlier settings, or another --output"
    )
  numbers = _numbers_of_shards(sources, num_shards, counts)
  for split, number in numbers.items():
    counts.setdefault(split, number)
  settings = {**recipe, "num_shards": dict(sorted(counts.items()))}
  # A folder keeps its version: `DatasetFolder.begin` refuses to mix two.
  settings.pop(ALGORITHM_VERSION, None)
  if ALGORITHM_VERSION in stored:
    settings[ALGORITHM_VERSION] = stored[ALGORITHM_VERSION]
  settings[RECORD_LABELS] = record_labels(stored)
  unknown = {name: ["unknown"] for name in recipe.get(VERSIONS, {})}
  settings.pop(VERSIONS, None)
  if versions := stored.get(VERSIONS, unknown):
    settings[VERSIONS] = versions
  return settings


def _numbers_of_shards(
  sources: Sequence[Source], num_shards: int | None, known: Collection[str]
) -> dict[str, int]:
  """Returns the number of shards of each split.

  Args:
    sources: the videos of all splits.
    num_shards: that of the largest split; None: by the bytes of the videos.
    known: splits to leave out.
  """
  if num_shards is None:
    files_by_split: dict[str, set[Path]] = {}
    for source in sources:
      if source.split not in known:
        files_by_split.setdefault(source.split, set()).add(source.path)
    return shards.default_numbers(files_by_split)
  num_videos = Counter(source.split for source in sources)
  largest = max(num_videos.values(), default=0)
  return {
    split: max(round(num_shards * num / largest), 1)
    for split, num in num_videos.items()
  }


def are_same(stored: Any, others: Iterable[Any]) -> bool:
  """Returns True if settings on disk are one of these, versions aside."""
  if stored is None:
    return True
  return any(
    other is not None and {**stored, VERSIONS: 0} == {**other, VERSIONS: 0}
    for other in others
  )


def merged_versions(*several: dict[str, Any] | None) -> dict[str, list[str]]:
  """Returns all versions of each package."""
  found: dict[str, set[str]] = {}
  for versions in several:
    for name, numbers in (versions or {}).items():
      numbers = [numbers] if isinstance(numbers, str) else numbers
      found.setdefault(name, set()).update(numbers)
  return {name: sorted(numbers) for name, numbers in sorted(found.items())}
