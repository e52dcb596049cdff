"""Scores of a sync expert on people: are lips and sound in sync?

Axes: N windows of a clip, one frame apart; K offsets in each direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.networks import inputs
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.records import schema
from marlin_jax.scores import bootstrap

# Sound is shifted by so many frames: nearer is nearly in sync, further is other
# syllables.
MIN_SHIFT, MAX_SHIFT = 5, 15
# A clip of 2 s, whose best offset is within so many frames of the true one.
CLIP_FRAMES, CLIP_STEP, TOLERANCE = 50, 25, 1
NUM_RESAMPLES = 2000
_BATCH = 32

# Shares of pairs and of clips, and what a coin would give.
CHANCE = {
  "window_ranked": 0.5,
  "clip_ranked": 0.5,
  "offset_within_1": (2 * TOLERANCE + 1) / (2 * MAX_SHIFT + 1),
}


class Talk(NamedTuple):
  """Frames and sound of one track of a video.

  Attributes:
    person: who speaks.
    records: the records, in the order of time.
    mel: float32 (R, 80), of all of them.
  """

  person: str
  records: tuple[schema.Record, ...]
  mel: np.ndarray

  @property
  def num_frames(self) -> int:
    return sum(map(len, self.records))

  @property
  def start_secs(self) -> float:
    return self.records[0].start_secs


def talks_of(dataset: Dataset) -> Iterator[Talk]:
  """Yields the tracks of a data set that have sound."""
  by_track: dict[tuple, list[schema.Record]] = {}
  for number in range(dataset.num_records):
    _, record = dataset.source[dataset.record_number(number)]
    by_track.setdefault((record.video_id, record.track_id), []).append(record)
  for records in by_track.values():
    records.sort(key=lambda record: record.start_secs)
    if all(record.audio is not None and len(record.mel) for record in records):
      mel = np.concatenate([record.mel for record in records])
      yield Talk(records[0].subject_id, tuple(records), mel)


class Embedder:
  """Embeds all windows of talks with an expert, compiled once."""

  def __init__(self, expert: SyncExpert, frame_size: int):
    """Compiles nothing yet.

    Args:
      expert: in evaluation mode.
      frame_size: side of the face crops that it was trained on, in pixels.
    """
    self._expert, self._frame_size = expert, frame_size
    self._faces = jax.jit(lambda video: expert.faces(inputs.as_floats(video)))
    self._sound = jax.jit(expert.sound)

  def cosines(self, talk: Talk) -> np.ndarray:
    """Returns float32 (N, N), of the frames of a row and the sound of a column.

    Empty if the talk is shorter than a window.
    """
    size, length = self._frame_size, self._expert.num_frames
    frames = np.concatenate(
      [
        schema.decode_frames(
          record,
          range(len(record)),
          np.empty((len(record), size, size, 3), np.uint8),
        )
        for record in talk.records
      ]
    )
    num = max(len(frames) - length + 1, 0)
    starts = np.arange(num)
    mel = mel_windows.windows(talk.mel, starts, length, talk.start_secs)
    faces, sound = [], []
    for first in range(0, num, _BATCH):
      # The last batch is filled up, so that one shape is compiled.
      rows = np.minimum(np.arange(first, first + _BATCH), num - 1)
      faces.append(self._faces(frames[rows[:, None] + np.arange(length)]))
      sound.append(self._sound(mel[rows]))
    if not num:
      return np.empty((0, 0), np.float32)
    return np.concatenate(faces)[:num] @ np.concatenate(sound)[:num].T


_WINDOW = 5
_INNER_MOUTH = schema.REGIONS.index("inner_mouth")


def mouth_and_loudness(talk: Talk) -> np.ndarray:
  """Returns what can be known without a network, float64 (N, N).

  The product of how far the mouth is open and how loud the sound is, both as
  means over windows of 5 frames in units of their deviation over the talk: its
  mean over a clip is their correlation. Takes the place of cosines.
  """
  opening = np.concatenate(
    [
      (schema.decode_parsing(record) == _INNER_MOUTH).mean(axis=(1, 2))
      for record in talk.records
    ]
  )
  frames = np.arange(len(opening))
  rows = mel_windows.windows(talk.mel, frames, 1, talk.start_secs)
  loudness = rows.mean(axis=(1, 2))
  if len(frames) < _WINDOW:
    return np.empty((0, 0))

  def windowed(values: np.ndarray) -> np.ndarray:
    means = np.convolve(values, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
    return (means - means.mean()) / (means.std() + 1e-9)

  return np.outer(windowed(opening), windowed(loudness))


class ClipScores(NamedTuple):
  """Scores of one talk: value and weight of each metric of CHANCE.

  Attributes:
    person: who speaks.
    sums: sum over pairs or clips, by metric.
    counts: number of pairs or clips, by metric.
  """

  person: str
  sums: dict[str, float]
  counts: dict[str, int]


def score(person: str, cosines: np.ndarray) -> ClipScores:
  """Scores the windows of a talk.

  Args:
    person: who speaks.
    cosines: float (N, N), see `Embedder.cosines`.

  Returns:
    window_ranked: of all windows and all sounds MIN_SHIFT to MAX_SHIFT frames
      away, the pairs in which the own sound has the higher cosine; ties count
      half.
    clip_ranked: the same with means over CLIP_FRAMES windows, for shifts of 5,
      10 and 15 frames.
    offset_within_1: clips of CLIP_FRAMES windows whose mean is highest within
      TOLERANCE frames of no shift, of -MAX_SHIFT to MAX_SHIFT.
  """
  num = len(cosines)
  sums, counts = dict.fromkeys(CHANCE, 0.0), dict.fromkeys(CHANCE, 0)
  distance = np.abs(np.arange(num)[:, None] - np.arange(num))
  is_shifted = (distance >= MIN_SHIFT) & (distance <= MAX_SHIFT)
  own = np.diagonal(cosines)[:, None]
  sums["window_ranked"] = float(_won(own, cosines)[is_shifted].sum())
  counts["window_ranked"] = int(is_shifted.sum())
  for first in range(0, num - CLIP_FRAMES + 1, CLIP_STEP):
    curve = _curve(cosines, first)
    middle = curve[MAX_SHIFT]
    shifts = np.array([-15, -10, -5, 5, 10, 15])
    others = curve[MAX_SHIFT + shifts]
    others = others[np.isfinite(others)]
    if not len(others):
      continue
    sums["clip_ranked"] += float(_won(middle, others).sum())
    counts["clip_ranked"] += len(others)
    best = int(np.nanargmax(curve)) - MAX_SHIFT
    sums["offset_within_1"] += float(abs(best) <= TOLERANCE)
    counts["offset_within_1"] += 1
  return ClipScores(person, sums, counts)


def _won(own: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns 1 where `own` is higher, 0.5 where equal."""
  return (own > others) + 0.5 * (own == others)


def _curve(cosines: np.ndarray, first: int) -> np.ndarray:
  """Returns the mean cosine of a clip at each offset, float (2K + 1,).

  NaN where less than half of the clip has such sound.
  """
  rows = np.arange(first, first + CLIP_FRAMES)
  means = []
  for offset in range(-MAX_SHIFT, MAX_SHIFT + 1):
    sound = rows + offset
    there = (sound >= 0) & (sound < len(cosines))
    enough = there.sum() >= CLIP_FRAMES // 2
    means.append(
      cosines[rows[there], sound[there]].mean() if enough else np.nan
    )
  return np.array(means)


def summary(
  scores: Sequence[ClipScores], seed: int = 0
) -> dict[str, Mapping[str, float]]:
  """Returns each metric with its 95% interval over people.

  A person's score is the mean over their pairs or clips; people weigh the same.

  Returns:
    By metric: value, low, high, people and chance.
  """
  results = {}
  for metric, chance in CHANCE.items():
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for clip in scores:
      sums[clip.person] = sums.get(clip.person, 0) + clip.sums[metric]
      counts[clip.person] = counts.get(clip.person, 0) + clip.counts[metric]
    people = [person for person in sums if counts[person]]
    means = np.array([sums[person] / counts[person] for person in people])

    def mean(weights, means=means):
      return {"mean": (weights * means[:, None]).sum(0) / weights.sum(0)}

    drawn = bootstrap.draws(
      mean, people, num_resamples=NUM_RESAMPLES, seed=seed
    )
    low, high = bootstrap.interval(drawn["mean"])
    results[metric] = {
      "value": float(means.mean()),
      "low": low,
      "high": high,
      "people": len(people),
      "chance": chance,
    }
  return results
