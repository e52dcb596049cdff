"""Draws of people: each is heard as often, whatever their footage."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from etils import epath

from marlin_jax.data import prepared_dataset, segment_indexing
from marlin_jax.data.permutation import mix_bits
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.sampling import Draw, HashedOrder

# Numbers of each person's records.
People = Sequence[np.ndarray]

# Purpose of the random numbers, as in data.sampling.
_CLIPS = 1


def people_of(path: str, splits: str, cache: epath.PathLike) -> People:
  """Returns the records of each person, as `open_joined` numbers them.

  A person is a `subject_id`, in whichever of the splits; a video of an unknown
  one is a person of its own. Of several splits, reads a record of each person.

  Args:
    path, splits: arguments of `prepared_dataset.open_joined`.
    cache: folder for indices that a read-only data set lacks.

  Raises:
    DatasetError: a split or its index cannot be used.
  """
  people, num_records = collections.defaultdict(list), 0
  names = prepared_dataset.split_names(splits)
  for split in names:
    dataset = prepared_dataset.open_dataset(path, split)
    index = segment_indexing.open_index(dataset, cache)
    for first, stop in zip(
      index.first_videos[:-1], index.first_videos[1:], strict=True
    ):
      records = [
        np.arange(*index.first_records[video : video + 2])
        for video in index.videos[first:stop]
      ]
      # The index numbers the subjects of its split.
      name = len(names) > 1 and dataset.source[records[0][0]][1].subject_id
      people[name or (split, first)] += [num_records + r for r in records]
    num_records += dataset.num_records
  return [np.concatenate(records) for records in people.values()]


class PersonDraws:
  """Draws people: each once per pass, and one of the person's records.

  It implements `data.sampling.Draws`.
  """

  def __init__(
    self, dataset: Dataset, people: People, seed: int, *, num_clips: int = 1
  ):
    """Shuffles the people.

    Args:
      dataset: data set of the records.
      people: records of each person.
      seed: seed of the order and of the clips.
      num_clips: clips of each record.
    """
    self._people, self._seed = people, seed
    self._order = HashedOrder(len(people), seed)
    sequence = np.random.SeedSequence((seed, _CLIPS))
    (self._key,) = sequence.generate_state(1, np.uint64).tolist()
    self.datasets, self.num_clips = (dataset,), num_clips
    self.clips_per_epoch = len(people)
    # Random: more than there are records are needed to try all.
    self.num_attempts = 8 * dataset.num_records

  def __call__(self, position: int, attempt: int = 0) -> Draw:
    """Returns a draw; see `data.sampling.Draws`."""
    place = (self._order(position) + attempt) % len(self._people)
    records = self._people[place]
    random = mix_bits(mix_bits(self._key ^ position) ^ attempt)
    number = int(records[random % len(records)])
    return Draw((number,), (self._seed, _CLIPS, position, attempt))
