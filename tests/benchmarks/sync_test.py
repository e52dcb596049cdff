"""Clips, scores and document of the benchmark of the sync expert."""

import csv
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.data import prepared_dataset
from marlin_jax.records import schema
from tests.benchmarks import sync, sync_data, sync_scores
from tests.support import talking_mouths

DOCS = Path(__file__).parents[2] / "docs"

# --- Clips --------------------------------------------------------------------


def write_index(folder: Path, *rows: dict) -> Path:
  plain = {
    "path": "a.mp4",
    "subject_id": "p1",
    "kind": "real",
    "speech": "yes",
    "alone": "yes",
    "seconds": "8.0",
    "source": "one",
    "lip_loudness": "0.30 within 3 frames; best 0.30 at +1",
  }
  with (folder / "index.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, plain)
    writer.writeheader()
    writer.writerows(plain | row for row in rows)
  return folder


def test_clips_are_real_speech_in_sync_and_capped_per_person(tmp_path):
  footage = write_index(
    tmp_path,
    {"path": "a.mp4"},
    {"path": "b.mp4", "alone": ""},
    {"path": "c.mp4", "seconds": "30"},
    {"path": "d.mp4", "kind": "generated"},
    {"path": "e.mp4", "speech": ""},
    {"path": "f.mp4", "subject_id": "p2", "source": "late"},
    {
      "path": "g.mp4",
      "subject_id": "p3",
      "source": "late",
      "lip_loudness": "0.47 within 3 frames; best 0.55 at +5",
    },
  )
  clips = sync_data.speech_of(footage, max_secs=20)
  # Those alone come first; nothing is left for b.mp4.
  assert [(clip.path, clip.secs) for clip in clips] == [
    ("a.mp4", 8.0),
    ("c.mp4", 12.0),
  ]
  with pytest.raises(sync_data.FootageError, match=r"no .*none/index\.csv"):
    sync_data.speech_of(tmp_path / "none", 20)


def test_groups_share_no_person_and_differ_by_one_at_most(tmp_path):
  clips = [
    sync_data.Clip(f"{i}.mp4", f"p{i % 30}", 5.0, i % 30 < 20)
    for i in range(60)
  ]
  groups = sync_data.groups_of(clips)
  assert groups == sync_data.groups_of(reversed(clips))
  assert {who for who, group in groups.items() if group == "others"} == {
    f"p{i}" for i in range(20, 30)
  }
  sizes = [
    sum(group == f"group{i}" for group in groups.values())
    for i in range(sync_data.NUM_GROUPS)
  ]
  assert (min(sizes), max(sizes)) == (2, 3)
  sync_data.write_manifest(tmp_path / "m.csv", clips)
  with (tmp_path / "m.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["split"] for row in rows] == [groups[c.subject_id] for c in clips]


# --- Scores -------------------------------------------------------------------


def peaked(num: int, late: int = 0) -> np.ndarray:
  """Cosines that are highest for sound `late` frames later."""
  i = np.arange(num)
  return 1 / (1 + np.abs(i[:, None] + late - i))


def means_of(cosines) -> dict[str, float]:
  found = sync_scores.score("p", cosines)
  return {k: found.sums[k] / found.counts[k] for k in sync_scores.CHANCE}


def test_expert_that_knows_scores_1_and_one_that_does_not_scores_chance():
  assert means_of(peaked(90)) == dict.fromkeys(sync_scores.CHANCE, 1.0)
  constant = means_of(np.ones((90, 90)))
  assert constant["window_ranked"] == constant["clip_ranked"] == 0.5
  noise = np.random.default_rng(0).uniform(size=(2000, 2000))
  for metric, chance in sync_scores.CHANCE.items():
    assert means_of(noise)[metric] == pytest.approx(chance, abs=0.12)


def test_offset_counts_up_to_one_frame():
  for late, right in ((-2, 0), (-1, 1), (1, 1), (2, 0)):
    assert means_of(peaked(80, late))["offset_within_1"] == right


def test_talk_shorter_than_a_clip_counts_for_windows_alone():
  found = sync_scores.score("p", peaked(40))
  assert found.counts["window_ranked"] > 0
  assert found.counts["clip_ranked"] == found.counts["offset_within_1"] == 0
  empty = sync_scores.score("p", np.empty((0, 0)))
  assert not any(empty.counts.values())


def test_people_weigh_the_same_and_make_the_interval():
  def clip(person, value, count):
    sums = dict.fromkeys(sync_scores.CHANCE, value * count)
    return sync_scores.ClipScores(
      person, sums, dict.fromkeys(sync_scores.CHANCE, count)
    )

  clips = [clip("a", 1.0, 1000), clip("b", 0.0, 1), clip("c", 0.5, 1)]
  clips += [clip("c", 0.5, 7)]
  result = sync_scores.summary(clips)["clip_ranked"]
  assert result["value"] == pytest.approx(0.5)
  assert result["people"] == 3
  assert 0 <= result["low"] < 0.3 < 0.7 < result["high"] <= 1


class MouthExpert:
  """Knows drawn mouths: how dark the mouth is, and how loud the sound."""

  num_frames = 5

  def faces(self, video):
    dark = 1 - video[..., 34:47, 24:32, :].mean((2, 3, 4))
    return self._unit(dark)

  def sound(self, mel):
    level = mel[:, :15].reshape(len(mel), 5, 3, 80).max(3).mean(2)
    return self._unit(level)

  def _unit(self, x):
    x = x - x.mean(1, keepdims=True)
    return x / jnp.sqrt((x * x).sum(1, keepdims=True) + 1e-6)


def test_talks_join_records_and_keep_frames_and_sound_on_one_clock(tmp_path):
  path = talking_mouths.write_dataset(
    tmp_path / "data", num_train=2, num_val=1, num_frames=150
  )
  dataset = prepared_dataset.open_dataset(str(path), "train")
  talks = list(sync_scores.talks_of(dataset))
  assert [talk.num_frames for talk in talks] == [150, 150]
  assert all(len(talk.records) == 3 for talk in talks)
  embedder = sync_scores.Embedder(MouthExpert(), 56)
  for talk in talks:
    assert means_of(embedder.cosines(talk))["clip_ranked"] > 0.9
    # The other person's sound does not fit.
  swapped = talks[0]._replace(mel=talks[1].mel)
  assert means_of(embedder.cosines(swapped))["clip_ranked"] < 0.9


def test_mouth_that_opens_with_the_voice_needs_no_network():
  spoken = talking_mouths.talk(0, 128)
  records = []
  for record in talking_mouths.records_of(spoken, "a.mp4"):
    first = round(record.start_secs * 25)
    labels = np.zeros((len(record), 224, 224), np.uint8)
    for frame, opening in zip(labels, spoken.opening[first:], strict=False):
      frame[: int(40 * opening), :30] = schema.REGIONS.index("inner_mouth")
    parsing = schema.compress_parsing(labels)
    records.append(dataclasses.replace(record, parsing=parsing))
  mel = np.concatenate([record.mel for record in records])
  talk = sync_scores.Talk("a", tuple(records), mel)
  means = means_of(sync_scores.mouth_and_loudness(talk))
  assert means["clip_ranked"] == means["offset_within_1"] == 1
  late = talk._replace(mel=np.roll(mel, 32, axis=0))  # 10 frames
  assert means_of(sync_scores.mouth_and_loudness(late))["offset_within_1"] == 0


# --- The document -------------------------------------------------------------


def test_document_has_the_numbers_of_the_run():
  results = json.loads((DOCS / "lipsync_people.json").read_text())
  text = (DOCS / "LIPSYNC.md").read_text()
  for line in sync.table(results).splitlines():
    assert line in text
  assert f"{results['judged_people']} people" in text
  assert {run["people"] for run in results["runs"]} == {0, 6, 24, 45}
  regime = {key: json.loads(json.dumps(x)) for key, x in sync.REGIME.items()}
  assert results["regime"] == regime
  assert (DOCS / "lipsync_people.png").exists()
