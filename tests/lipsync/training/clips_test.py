"""Pairs and targets: the right frames with the right part of the sound."""

import dataclasses
import functools

import numpy as np
import pytest

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.augmentation import Augmentation
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.data.reader import BadRecords
from marlin_jax.data.sampling import RecordDraws, StoredOrder
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.training import clips, person_draws
from marlin_jax.records import mel_spectrogram, schema
from tests.support import made_dataset, talking_mouths


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  path = tmp_path_factory.mktemp("talking") / "data"
  # Two records each, so that some begin within a video.
  talking_mouths.write_dataset(path, num_train=3, num_val=1, num_frames=107)
  return prepared_dataset.open_dataset(str(path), "train")


@pytest.fixture(scope="module")
def record():
  talk = talking_mouths.talk(0, 50)
  (one,) = talking_mouths.records_of(talk, "a.mp4")
  return one


def draws_of(dataset):
  return RecordDraws(dataset, seed=0, order=StoredOrder)


def served(dataset, take, num_batches=3):
  batches = loader.train_batches(
    draws_of(dataset), take, batch_size=8, start_step=0, num_threads=1
  )
  drawn = [next(batches) for _ in range(num_batches)]
  return {key: np.concatenate([b[key] for b in drawn]) for key in drawn[0]}


@functools.cache
def sound_of(dataset, index):
  """The mel of the whole video, the record's first frame in it, the record."""
  _, record = prepared_dataset.RecordSource(dataset)[index]
  talk = talking_mouths.talk(int(record.video_id.split(".")[0]), 107)
  first_frame = round(record.start_secs * 25)
  return mel_spectrogram.mel_spectrogram(talk.sound), first_frame, record


# --- Windows ------------------------------------------------------------------


def test_windows_are_those_of_wav2lip():
  mel = np.repeat(np.arange(400, dtype=np.float32)[:, None], 80, axis=1)
  frames = np.arange(1, 100)
  cut = mel_windows.windows(mel, frames, 5)[..., 0]
  around = mel_windows.frame_windows(mel, frames)[..., 0]
  for f, window, of_frame in zip(frames, cut, around, strict=True):
    # crop_audio_window, and get_segmented_mels which begins a frame earlier.
    first, before = int(80.0 * (f / 25.0)), int(80.0 * ((f - 1) / 25.0))
    np.testing.assert_array_equal(window, np.arange(first, first + 16))
    np.testing.assert_array_equal(of_frame, np.arange(before, before + 16))
  assert [mel_windows.num_rows(t) for t in (5, 16)] == [16, 52]


def test_windows_beyond_the_sound_repeat_its_ends():
  mel = np.repeat(np.arange(32, dtype=np.float32)[:, None], 80, axis=1)
  first, last = mel_windows.frame_windows(mel, np.array([0, 9]))[..., 0]
  np.testing.assert_array_equal(first[:5], [0, 0, 0, 0, 0])
  np.testing.assert_array_equal(first[4:], np.arange(12))
  np.testing.assert_array_equal(last[:7], np.arange(25, 32))
  np.testing.assert_array_equal(last[7:], 9 * [31])


def test_windows_of_no_sound_are_refused():
  with pytest.raises(ValueError, match=r"shape \(0, 80\), expected \(R, 80\)"):
    mel_windows.windows(np.zeros((0, 80), np.float32), np.arange(3), 5)


# --- Pairs --------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [5, 16])
def test_pairs_hold_the_sound_that_the_offset_tells_of(dataset, num_frames):
  batch = served(dataset, clips.TakePairs(num_frames))
  rows = mel_windows.num_rows(num_frames)
  assert batch["video"].shape == (24, num_frames, 224, 224, 3)
  assert batch["mel"].shape == (24, rows, 80)
  for i in range(24):
    mel, first_frame, record = sound_of(dataset, int(batch["_id"][i]))
    start, offset = int(batch["start"][i]), int(batch["offset"][i])
    row = int(80 * ((first_frame + start + offset) / 25))
    # A record begins and ends at whole rows: one may be missing at each end.
    np.testing.assert_array_equal(
      batch["mel"][i][1:-1], mel[row + 1 : row + rows - 1]
    )
    frames = range(start, start + num_frames)
    np.testing.assert_array_equal(
      batch["video"][i], schema.decode_frames(record, frames)
    )


def test_half_of_the_pairs_are_in_sync_and_the_others_clearly_not(dataset):
  offsets = served(dataset, clips.TakePairs(5), num_batches=25)["offset"]
  assert 0.4 < (offsets == 0).mean() < 0.6
  apart = offsets[offsets != 0]
  assert np.abs(apart).min() >= 5
  assert apart.min() < -20
  assert apart.max() > 20


def test_clips_of_a_record_are_apart_and_have_their_own_sound(dataset):
  take = clips.TakeApart(5)
  batches = loader.train_batches(
    RecordDraws(dataset, seed=0, num_clips=4),
    take,
    batch_size=8,
    start_step=0,
    num_threads=1,
  )
  for _ in range(3):
    batch = next(batches)
    records = batch["_id"].reshape(2, 4)
    assert (records == records[:, :1]).all()
    starts = batch["start"].reshape(2, 4)
    assert np.diff(starts, axis=1).min() >= 5
    for i in range(8):
      mel, first_frame, _ = sound_of(dataset, int(batch["_id"][i]))
      row = int(80 * ((first_frame + int(batch["start"][i])) / 25))
      np.testing.assert_array_equal(
        batch["mel"][i][1:-1], mel[row + 1 : row + 15]
      )


def test_clips_of_a_short_record_are_as_far_apart_as_they_can_be(record):
  short = dataclasses.replace(record, frames=record.frames[:20])
  take = clips.TakeApart(5)  # 16 starts
  batch = take.empty(6)
  take.choose(batch, 0, short, np.random.default_rng(0))
  assert np.diff(batch["start"]).min() >= 3


def test_small_and_changed_views_are_those_of_the_record(record):
  plain, changed = (
    clips.TakePairs(5, 56),
    clips.TakePairs(5, 56, Augmentation(flip_ratio=1.0)),
  )
  videos = []
  for take in (plain, changed):
    batch = take.empty(3)
    frames = take.choose(batch, 0, record, np.random.default_rng(0))
    take.decode(batch, 0, record, frames)
    videos.append(batch["video"])
    np.testing.assert_array_equal(
      batch["start"], np.reshape(frames, (3, 5))[:, 0]
    )
  assert videos[0].shape == (3, 5, 56, 56, 3)
  np.testing.assert_array_equal(videos[1], videos[0][..., ::-1, :])


# --- People -------------------------------------------------------------------


def test_people_weigh_the_same_whatever_there_is_of_them(tmp_path):
  """And in how many of the splits, opened as one, they are."""
  frames = {"a.mp4": 250, "b.mp4": 20, "c.mp4": 70, "d.mp4": 20, "e.mp4": 20}
  videos = {
    name: talking_mouths.records_of(talking_mouths.talk(i, num), name)
    for i, (name, num) in enumerate(frames.items())
  }
  # Two videos of one person, in one split and in two.
  for name, person in (("d.mp4", "c.mp4"), ("e.mp4", "a.mp4")):
    videos[name] = [
      dataclasses.replace(record, subject_id=person) for record in videos[name]
    ]
  splits = dict.fromkeys(("c.mp4", "d.mp4", "e.mp4"), "extra")
  path = str(made_dataset.make(tmp_path, videos, splits, has_sound=True))
  dataset = prepared_dataset.open_joined(path, "train+extra")
  people = person_draws.people_of(path, "train+extra", tmp_path)
  draws = person_draws.PersonDraws(dataset, people, seed=3)
  source = dataset.source
  heard, records = [], set()
  for position in range(60):
    (number,) = draws(position).records
    records.add(number)
    heard.append(source[number][1].subject_id)
  for first in range(0, 60, 3):
    assert set(heard[first : first + 3]) == {"a.mp4", "b.mp4", "c.mp4"}
  assert records == set(range(dataset.num_records))
  assert draws(7) == person_draws.PersonDraws(dataset, people, seed=3)(7)


# --- Targets ------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [5, 16])
def test_targets_come_with_sound_and_other_pictures(dataset, num_frames):
  batch = served(dataset, clips.TakeTargets(num_frames), num_batches=2)
  t = num_frames
  assert batch["reference"].shape == batch["video"].shape
  assert batch["mels"].shape == (16, t, 16, 80)
  for i in range(16):
    mel, first_frame, record = sound_of(dataset, int(batch["_id"][i]))
    start = int(batch["start"][i])
    every = schema.decode_frames(record, range(len(record)))
    np.testing.assert_array_equal(batch["video"][i], every[start : start + t])
    (other,) = [
      s
      for s in range(len(record) - t + 1)
      if np.array_equal(every[s : s + t], batch["reference"][i])
    ]
    assert abs(other - start) >= t
    row = int(80 * ((first_frame + start) / 25))
    np.testing.assert_array_equal(
      batch["mel"][i][1:15], mel[row + 1 : row + 15]
    )
    for k in range(3):
      row = int(80 * ((first_frame + start + k - 1) / 25))
      # The sound before the record, four rows of frame 0, is not in it.
      there = slice(0 if start + k > 1 else 5, 15)
      np.testing.assert_array_equal(
        batch["mels"][i, k][there], mel[row : row + 15][there]
      )


def test_a_short_record_gives_the_reference_that_shares_the_fewest(record):
  short = dataclasses.replace(record, frames=record.frames[:18])
  take = clips.TakeTargets(16)
  batch = take.empty(20)
  frames = take.choose(batch, 0, short, np.random.default_rng(0))
  others = np.array(frames[320:]).reshape(20, 16)[:, 0]
  assert {0, 2} >= set(others[batch["start"] == 1])
  assert set(others[batch["start"] == 0]) == {2}


# --- Records that cannot be used ----------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"audio": None}, "without sound; prepare .* --sound --fps=25"),
    ({"audio": b"", "mel": np.zeros((0, 80), np.float32)}, "sound track"),
    ({"mel": np.full((160, 80), -4, np.float32)}, "silent from beginning"),
    ({"fps": 30.0}, "30 frames per second, expected 25; prepare"),
    ({"num_frames": 9}, "9 frames, expected at least 10"),
  ],
)
def test_records_that_cannot_be_used_say_why(record, changes, message):
  changes = dict(changes)
  if num_frames := changes.pop("num_frames", None):
    changes["frames"] = record.frames[:num_frames]
  bad = dataclasses.replace(record, **changes)
  take = clips.TakePairs(5)
  with pytest.raises(
    DatasetError, match=rf"record 7 \(a.mp4#0.0\) .*{message}"
  ):
    take.choose(take.empty(2), 7, bad, np.random.default_rng(0))


def test_unusable_records_are_left_out_and_written_down(tmp_path):
  talk = talking_mouths.talk(0, 40)
  videos = {
    "good.mp4": talking_mouths.records_of(talk, "good.mp4"),
    "mute.mp4": [made_dataset.a_record("mute.mp4", num_frames=40, audio=b"")],
  }
  path = made_dataset.make(tmp_path / "data", videos, has_sound=True)
  dataset = prepared_dataset.open_dataset(str(path), "train")
  bad = BadRecords(tmp_path / "quarantine.jsonl", limit=1)
  batches = loader.train_batches(
    draws_of(dataset),
    clips.TakePairs(5),
    batch_size=4,
    start_step=0,
    num_threads=1,
    bad=bad,
  )
  batch = next(batches)
  assert len(set(batch["_id"])) == 1
  assert "mute.mp4" in (tmp_path / "quarantine.jsonl").read_text()
