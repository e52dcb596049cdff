"""The sound of clips: heard while their frames are seen."""

import dataclasses
import itertools

import numpy as np
import pytest

from marlin_jax.data import loader, prepared_dataset
from marlin_jax.data.augmentation import Augmentation
from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.sampling import RecordDraws
from marlin_jax.records import mel_spectrogram, schema
from tests.support import made_dataset

NUM_FRAMES = 100
CLICK_FRAME = 50


def clicking(fps: float, starts=(0, NUM_FRAMES)) -> list[schema.Record]:
  """Returns records, cut at `starts`, with a click as CLICK_FRAME begins."""
  rate = schema.SAMPLE_RATE
  sound = np.zeros(int(NUM_FRAMES / fps * rate) + 1, np.int16)
  sound[round(CLICK_FRAME / fps * rate)] = 20_000
  mel = mel_spectrogram.mel_spectrogram(sound)
  records = []
  for first, stop in itertools.pairwise(starts):
    rows = slice(
      *(round(f / fps * mel_spectrogram.MEL_RATE) for f in (first, stop))
    )
    record = made_dataset.a_record(
      "a.mp4", segment=len(records), num_frames=stop - first
    )
    records.append(
      dataclasses.replace(
        record, fps=fps, start_secs=first / fps, audio=b"..", mel=mel[rows]
      )
    )
  return records


def taken(take: TakeClip, record: schema.Record, starts, seed=0):
  """Returns a batch of clips that begin at `starts`, and their frames."""
  clips = take.empty(len(starts))
  np_rng = np.random.default_rng(seed)
  frames = take.place(clips, 0, record, np.array(starts), np_rng)
  return clips, np.reshape(frames, (len(starts), -1))


def click_frame(mel: np.ndarray, clip: Clip, start: int) -> float:
  """Returns the frame of the record at which the sound is loudest."""
  energy = (mel + 4).sum(-1)
  row = np.average(np.arange(len(mel)), weights=energy)
  return start + row / len(mel) * clip.extent


@pytest.mark.parametrize("fps", [15.0, 25.0, 30000 / 1001, 50.0])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_click_is_heard_while_its_frame_is_seen(stride, fps):
  clip = Clip(16, stride)
  sound = SoundPatches.of(clip)
  (record,) = clicking(fps)
  starts = [CLICK_FRAME - stride * k for k in (3, 8, 12)]
  clips, _ = taken(TakeClip(clip, 2, sound=sound), record, starts)
  assert clips["has_sound"].all()
  rows_per_frame = sound.num_rows / clip.extent
  for start, mel in zip(starts, clips["mel"], strict=True):
    # Half a row of the record's spectrogram, of 1/80 s.
    tolerance = 0.75 * fps / 80 + 0.5 / rows_per_frame
    assert abs(click_frame(mel, clip, start) - CLICK_FRAME) < tolerance
    tokens = sound.patchify(mel)[0]
    loudest = np.argmax(tokens.sum(-1)) // sound.grid[1]
    seen = (CLICK_FRAME - start) * rows_per_frame / sound.patch_size
    assert seen - 0.6 < loudest + 0.5 < seen + 0.6


def test_the_sound_follows_the_drawn_stride():
  clip = Clip(16, 2)
  take = TakeClip(
    clip,
    2,
    augmentation=Augmentation(stride_jitter=1),
    sound=SoundPatches.of(clip),
  )
  (record,) = clicking(25.0)
  strides = set()
  for seed in range(20):
    clips, frames = taken(take, record, [40], seed)
    stride = int(frames[0, 1] - frames[0, 0])
    strides.add(stride)
    found = click_frame(clips["mel"][0], Clip(16, stride), 40)
    assert abs(found - CLICK_FRAME) < 0.5
  assert strides == {1, 2, 3}


def test_a_clip_in_two_records_has_the_sound_of_both():
  clip = Clip(16, 2)
  take = TakeClip(clip, 2, sound=SoundPatches.of(clip))
  (whole,) = clicking(25.0)
  joined = schema.joined(clicking(25.0, (0, 48, NUM_FRAMES)))
  expected, _ = taken(take, whole, [30, 40])
  clips, _ = taken(take, joined, [30, 40])
  np.testing.assert_allclose(clips["mel"], expected["mel"], atol=0.05)


def test_rows_of_the_record_are_copied_where_the_rates_agree():
  (record,) = clicking(25.0)
  mel = np.random.default_rng(0).uniform(-4, 4, (320, 80)).astype(np.float32)
  record = dataclasses.replace(record, mel=mel)
  take = TakeClip(Clip(15, 2), 3, sound=SoundPatches(96))
  clips, _ = taken(take, record, [10, 90])
  np.testing.assert_array_equal(clips["mel"][0], mel[32:128])
  # Past the end the last row is repeated, as the last frame is.
  np.testing.assert_array_equal(clips["mel"][1][:32], mel[288:])
  np.testing.assert_array_equal(clips["mel"][1][32:], mel[-1:].repeat(64, 0))


def test_no_sound_and_silence_are_told_from_sound():
  (record,) = clicking(25.0)
  take = TakeClip(Clip(16, 2), 2, sound=SoundPatches(96))
  nothing = np.zeros((0, 80), np.float32)
  for changes in ({"mel": nothing, "audio": None}, {"mel": nothing}):
    clips, _ = taken(take, dataclasses.replace(record, **changes), [0, 3])
    assert not clips["has_sound"].any()
    assert (clips["mel"] == -4).all()
  clips, _ = taken(take, record, [0, 40])
  assert clips["has_sound"].tolist() == [False, True]


def test_tokens_of_sound_go_by_time_then_frequency():
  sound = SoundPatches(32)
  mel = 4 * np.random.default_rng(0).uniform(-1, 1, (2, 32, 80))
  tokens = sound.patchify(mel)
  assert tokens.shape == (2, sound.num_tokens, sound.values) == (2, 10, 256)
  np.testing.assert_allclose(
    4 * tokens[1, 5 + 3].reshape(16, 16), mel[1, 16:, 48:64]
  )


@pytest.mark.parametrize(("stride", "rows"), [(1, 48), (2, 96), (4, 208)])
def test_a_grid_has_about_the_rows_of_the_spectrogram(stride, rows):
  assert SoundPatches.of(Clip(16, stride)).num_rows == rows
  assert abs(rows - 80 * 16 * stride / 25) <= 8


def test_batches_hold_sound_only_where_it_is_asked_for(tmp_path):
  (record,) = clicking(25.0)
  mute = made_dataset.a_record("mute.mp4", num_frames=40, audio=b"")
  path = made_dataset.make(
    tmp_path / "data",
    {"a.mp4": [record], "mute.mp4": [mute]},
    has_sound=True,
  )
  dataset = prepared_dataset.open_dataset(str(path), "train")
  assert dataset.has_sound
  for sound in (None, SoundPatches(96)):
    batch = next(
      loader.train_batches(
        RecordDraws(dataset, seed=0),
        TakeClip(Clip(16, 2), 2, sound=sound),
        batch_size=2,
        start_step=0,
        num_threads=1,
      )
    )
    assert ("mel" in batch) == ("has_sound" in batch) == bool(sound)
  assert batch["mel"].shape == (2, 96, 80)
  assert not batch["has_sound"][batch["_id"] == 1].any()


def test_a_data_set_says_whether_it_has_sound(tmp_path):
  record = made_dataset.a_record("a.mp4")
  path = made_dataset.make(tmp_path / "data", {"a.mp4": [record]})
  assert not prepared_dataset.open_dataset(str(path), "train").has_sound
