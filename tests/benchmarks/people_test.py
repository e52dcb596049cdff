"""The benchmark on people never seen: labels, probes, scores, resumption."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from data_prep.faces import boxes, tracking
from marlin_jax.data.augmentation import View
from marlin_jax.records import schema
from tests.benchmarks import (
  people,
  people_probes,
  people_report,
  people_supervised,
  people_windows,
)
from tests.benchmarks.people_report import TEACHERS, WITH_STILLS, Encoder
from tests.benchmarks.people_windows import LABELS, Windows
from tests.layout_test import ROOT
from tests.support import made_dataset

# --- Labels -------------------------------------------------------------------


@pytest.fixture(scope="module")
def carphone_crops(carphone_frames, finder) -> np.ndarray:
  """The face crops of frames 20 to 63 of the sample video."""
  frames = carphone_frames[20:64]
  (track,) = tracking.find_tracks(frames, finder)
  return np.stack(
    [
      boxes.crop_frame(frame, box)
      for frame, box in zip(frames, track.boxes, strict=True)
    ]
  )


@pytest.fixture(scope="module")
def landmarks(carphone_crops, finder) -> np.ndarray:
  return people_windows.meshes(finder, carphone_crops)


def test_mirrored_video_turns_the_head_the_other_way(
  carphone_crops, finder, landmarks
):
  mirrored = people_windows.meshes(finder, carphone_crops[:, :, ::-1].copy())
  turn = people_windows.head_turn(landmarks)
  other = people_windows.head_turn(mirrored)
  assert np.ptp(turn) > 0.2
  assert np.corrcoef(turn, -other)[0, 1] > 0.9
  for label in (people_windows.mouth_opening, people_windows.eye_opening):
    assert np.corrcoef(label(landmarks), label(mirrored))[0, 1] > 0.9


def test_mouth_that_opens_and_eyes_that_blink_are_seen(landmarks):
  # Seen by eye: he blinks at frame 42 and says "oh" at frame 60.
  mouth = people_windows.mouth_opening(landmarks)
  assert abs(int(mouth.argmax()) + 20 - 60) <= 2
  assert mouth.max() > 2 * np.median(mouth)
  eyes = people_windows.eye_opening(landmarks)
  assert abs(int(eyes.argmin()) + 20 - 42) <= 1


def test_tilted_or_larger_face_has_the_same_labels(landmarks):
  angle = np.deg2rad(30)
  turned = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  no_hair = np.zeros((len(landmarks), 14, 14), np.uint16)
  np.testing.assert_allclose(
    people_windows.labels_of(1.7 * landmarks @ turned + 20, no_hair),
    people_windows.labels_of(landmarks, no_hair),
    atol=1e-9,
  )


def test_stillness_moves_less_than_speech_and_hair_is_counted(landmarks):
  speech, still = landmarks[36:44], landmarks[[36] * 8]
  regions = np.zeros((8, 14, 14), np.uint16)
  regions[:, :7] = 1 << 10 | 1
  talks = dict(
    zip(LABELS, people_windows.labels_of(speech, regions), strict=True)
  )
  stands = dict(
    zip(LABELS, people_windows.labels_of(still, 0 * regions), strict=True)
  )
  for name in ("mouth moves", "head moves"):
    assert talks[name] > stands[name] + 0.5
  assert (talks["hair"], stands["hair"]) == (0.5, 0.0)


# --- Probes and scores --------------------------------------------------------


def drawn(num_people: int = 30, num_windows: int = 8, noise: float = 0.3):
  """Draws windows whose labels are linear in their features, and features."""
  np_rng = np.random.default_rng(0)
  num = num_people * num_windows
  x = np_rng.normal(size=(num, 20))
  labels = x[:, : len(LABELS)] + noise * np_rng.normal(size=(num, len(LABELS)))
  person = np.repeat([f"p{i:02d}" for i in range(num_people)], num_windows)
  half = np.tile(np.arange(num_windows) // (num_windows // 2), num_people)
  windows = Windows(
    split=np.where(person < "p20", "train", "test"),
    video=np.char.add(person, half.astype(str)),
    person=person,
    track=np.zeros(num, int),
    start=np.tile(np.arange(num_windows) * 16, num_people),
    labels=labels,
    landmarks=x,
  )
  return windows, x


def scored_by(windows, answers):
  scored = people_report.scores(windows, answers)["encoders"]
  return {name: by["0"]["grid"] for name, by in scored.items()}


def test_what_is_in_the_features_is_found_and_what_is_not_is_not():
  windows, x = drawn()
  noise = np.random.default_rng(1).normal(size=x.shape)
  found = scored_by(
    windows,
    {
      Encoder("pixels", 0, 0): people_probes.answers(windows, {"grid": x}),
      Encoder("landmarks", 0, 0): people_probes.answers(
        windows, {"grid": noise}
      ),
    },
  )
  for label in LABELS:
    known, unknown = found["pixels"][label], found["landmarks"][label]
    # The noise of the label is 1 / 1.09 of its variance.
    value, low, high = known["r2"]
    assert 0.7 < low < value < high < 0.98
    assert known["rank"][0] > 0.9
    assert -0.2 < unknown["r2"][0] < 0.1
    assert known["left_out"][0] == pytest.approx(value, abs=0.1)


def test_changes_are_found_where_people_differ_more():
  """Features of few people are mostly who they are; changes are not."""
  windows, x = drawn(num_people=12)
  who = np.unique(windows.person, return_inverse=True)[1]
  windows = dataclasses.replace(
    windows, split=np.where(windows.person < "p08", "train", "test")
  )
  codes = np.random.default_rng(5).normal(size=(12, 20))
  found = scored_by(
    windows,
    {
      Encoder("pixels", 0, 0): people_probes.answers(
        windows, {"grid": x + 10 * codes[who]}
      )
    },
  )
  for label in LABELS:
    scores = found["pixels"][label]
    assert scores["change"][0] > 0.5 > scores["r2"][0] + 0.2


def test_a_person_and_the_order_in_time_are_found():
  windows, x = drawn()
  who = np.unique(windows.person, return_inverse=True)[1]
  codes = np.random.default_rng(2).normal(size=(30, 20))
  both = np.concatenate(
    [3 * codes[who], windows.start[:, None] + x[:, :1]], axis=1
  )
  for features, same, order in ((both, 1.0, 1.0), (x, 0.5, 0.5)):
    answers = {
      Encoder("pixels", 0, 0): people_probes.answers(
        windows, {"grid": features}
      )
    }
    found = scored_by(windows, answers)["pixels"]
    for question, want in (("same person", same), ("order in time", order)):
      # Of few pairs.
      assert found[question]["auc"][0] == pytest.approx(want, abs=0.25)


def test_the_attentive_probe_finds_the_one_token_that_tells():
  windows, x = drawn(noise=0.1)
  tokens = np.random.default_rng(3).normal(size=(len(x), 6, 20))
  tokens[:, 2] = x + 4
  answers = people_probes.answers(windows, {}, tokens, num_heads=2)
  test = windows.rows("test")
  r2 = people_probes.r_squared(
    windows.labels[test], answers["attentive/labels"], np.ones((len(test), 1))
  )
  assert r2.mean() > 0.3


def test_differences_are_of_the_same_people_in_each_draw():
  """A difference has a narrower interval than its two terms."""
  windows, x = drawn(noise=1.0)
  worse = x + 0.3 * np.random.default_rng(4).normal(size=x.shape)
  answers = {
    Encoder("fasking", 0, 10): people_probes.answers(windows, {"grid": x}),
    Encoder("tube", 0, 10): people_probes.answers(windows, {"grid": worse}),
  }
  scored = people_report.scores(windows, answers)

  def width(number):
    return number[2] - number[1]

  for label in LABELS:
    one, other = (
      scored["encoders"][name]["10"]["grid"][label]["r2"]
      for name in ("fasking", "tube")
    )
    difference = scored["differences"]["fasking - tube"]["10"]["grid"][label]
    assert difference["r2"][0] == pytest.approx(one[0] - other[0], abs=2e-3)
    assert width(difference["r2"]) < width(one) + width(other)
  assert people_report.last_steps(scored, "fasking", "tube") == 10
  assert people_report.last_steps(scored, "fasking", "random") == 0


# --- The whole ----------------------------------------------------------------

TINY = (
  *("model.width=16", "model.depth=1", "model.num_heads=2"),
  *("model.mlp_dim=32", "model.dec_width=16", "model.dec_depth=1"),
  *("model.dec_num_heads=2", "model.dec_mlp_dim=32", "batch_size=4"),
  *("eval_batches=1", "optim.warmup_steps=1"),
)


@pytest.fixture(scope="module")
def footage(carphone_frames, tmp_path_factory):
  """Six people, twelve spans of one video."""
  from tests.support.videos import write_video

  folder = tmp_path_factory.mktemp("footage")
  write_video(folder / "man.mp4", carphone_frames, crf="10")
  rows = ["path,subject_id,start_secs,end_secs"]
  for i in range(12):
    start = 0.2 * i
    rows.append(f"man.mp4,p{i // 2},{start:.2f},{start + 1.3:.2f}")
  (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
  return folder


def test_methods_have_the_same_flops(tmp_path):
  study = people.Study(tmp_path, tmp_path, {})
  # Teachers and pictures take minutes to make.
  names = people_report.METHODS.keys() - {*TEACHERS, *WITH_STILLS}
  steps = {name: study.num_steps(name, 1000) for name in names}
  assert steps["tube"] == steps["random"] == steps["motion"] == 1000
  assert steps["region"] == 1000
  # A teacher's pass over all tokens, without a backward one.
  assert 400 < steps["latent"] < 800
  assert abs(steps["guarded"] - steps["latent"]) < 5
  assert 990 < steps["contrast"] < 1000
  assert 700 < steps["sound"] < 1000
  # 300 steps on half of the frames.
  assert 1120 < steps["growing"] < 1200
  assert 200 < steps["wide"] < 400
  # All tokens, forward and backward, where fasking sees a quarter.
  assert 300 < steps["supervised"] < 400


@pytest.fixture
def grey_videos(tmp_path) -> Windows:
  """Each is of one grey level, and all labels are that."""
  levels = np.random.default_rng(0).integers(40, 216, 40)
  names = [f"v{i:02d}" for i in range(len(levels))]
  split = np.array(["train"] * 24 + ["val"] * 8 + ["test"] * 8)
  made_dataset.make(
    tmp_path / "dataset",
    {
      name: [
        made_dataset.showing(
          made_dataset.a_record(name, num_frames=16), [level] * 16
        )
      ]
      for name, level in zip(names, levels, strict=True)
    },
    dict(zip(names, split, strict=True)),
  )
  return Windows(
    split=split,
    video=np.array(names),
    person=np.array(names),
    track=np.r_[:24, :8, :8],
    start=np.zeros(len(levels), int),
    labels=np.tile(levels[:, None] / 255, len(LABELS)),
    landmarks=np.zeros((len(levels), 1), np.float32),
  )


def test_an_encoder_learns_the_labels_of_others(grey_videos, tmp_path):
  overrides = dict(map(people._override, TINY))
  overrides |= {"augment.colour_jitter": 0.0, "data.frame_size": 32}
  overrides |= {"batch_size": 8, "optim.base_lr": 0.3}
  study = people.Study(tmp_path, tmp_path, overrides)
  encoder = Encoder("supervised", 0, 60)
  weights, answers = people_supervised.train(study, encoder, grey_videos)
  truth = grey_videos.labels[grey_videos.rows("test")]
  r2 = people_probes.r_squared(
    truth, answers["head/labels"], np.ones((len(truth), 1))
  )[0]
  # No hair is drawn, and training looks again where it crops.
  others = np.array(LABELS) != "hair"
  assert r2[others].min() > 0.5
  assert answers["head/r2"][others].min() > 0.5
  untrained = study.untrained(0)
  assert weights.architecture == untrained.architecture
  name = "encoder.patch_embedding.kernel"
  assert np.abs(weights.arrays[name] - untrained.arrays[name]).max() > 1e-3
  # A training that has ended is not repeated.
  again, same = people_supervised.train(study, encoder, grey_videos)
  np.testing.assert_array_equal(again.arrays[name], weights.arrays[name])
  np.testing.assert_array_equal(same["head/labels"], answers["head/labels"])


def test_a_crop_shows_the_hair_of_its_part():
  regions = np.zeros((2, 14, 14), np.uint16)
  regions[:, :, :7] = 1 << 10
  for box, share in (
    (schema.WHOLE, 0.5),
    (schema.Box(0, 0, 112, 112), 1.0),
    (schema.Box(112, 0, 112, 224), 0.0),
    (schema.Box(56, 100, 75, 100), 4 / 5),
  ):
    seen = people_supervised.visible(regions, View(box))
    assert people_windows.hair(seen) == pytest.approx(share)


@pytest.mark.slow
def test_more_hours_go_on_where_fewer_ended(
  footage, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(people, "EVAL_STEPS", 2)
  monkeypatch.setattr(people, "TEACHER_STEPS", 2)
  arguments = [f"--footage={footage}", f"--folder={tmp_path / 'run'}"]
  arguments += [f"--output={tmp_path / 'out'}", "--seeds=1"]
  arguments += ["--methods", "random", "latent", "frozen", "stills"]
  arguments += ["supervised", "--set", *TINY]
  steps = []
  for rounds, hours in (((2,), "1e-9"), ((2,), "1"), ((2, 4), "1")):
    monkeypatch.setattr(people, "ROUNDS", rounds)
    people.main([*arguments, "--hours", hours])
    results = json.loads((tmp_path / "out" / "people.json").read_text())
    steps.append(list(results["encoders"].get("random", {})))
  said = capsys.readouterr().out
  assert steps == [[], ["2"], ["2", "4"]]
  assert said.count("minutes are left") == 1
  assert {"random init", "pixels", "landmarks"} < set(results["encoders"])
  assert list(results["encoders"]["latent"]) == ["2", "4"]
  assert "head" in results["encoders"]["supervised"]["4"]
  of = {run["strategy"]: run for run in results["runs"]}
  latent, random = of["latent"], of["random"]
  assert [row[0] for row in random["unseen"]] == [2, 4]
  assert latent["unseen"][-1][0] < 4
  # Its teacher is as tiny as it is.
  assert of["frozen"]["unseen"][-1][0] <= 4
  assert of["stills"]["unseen"][-1][0] == 4
  assert list((tmp_path / "run" / "pictures").glob("man-*.jpg"))
  assert (tmp_path / "out" / "people.png").stat().st_size > 1000
  assert "| random, 4 steps |" in said


def test_a_step_that_was_evaluated_again_counts_once(tmp_path):
  study = people.Study(tmp_path, tmp_path, {})
  rows = [
    {"step": step, "train/loss_rec": 0.5}
    | dict.fromkeys(people._MEASURES, loss)
    for step, loss in ((2, 0.4), (4, 0.3), (4, 0.3), (6, 0.2))
  ]
  for seed in (0, 1):
    workdir = study.workdir("random", seed)
    workdir.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows[seed:]]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
  runs = [
    {"strategy": "random", "seed": seed} | study.losses("random", seed)
    for seed in (0, 1)
  ]
  assert [[row[0] for row in run["unseen"]] for run in runs] == [
    [2, 4, 6],
    [4, 6],
  ]
  # What one of the seeds has not is left out.
  results = {"runs": runs, "encoders": {"random": {"4": {}, "6": {}}}}
  assert list(people_report.mean_losses(results)["random"]) == [4, 6]
  assert people_report.table_of_losses(results).count("| random |") == 2


# --- The documents ------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
  return json.loads((ROOT / "docs" / "people.json").read_text())


@pytest.mark.parametrize(
  "make",
  [
    people_report.table,
    functools.partial(people_report.table, score="change"),
    people_report.table_of_probes,
    people_report.table_of_losses,
  ],
)
def test_the_tables_of_the_results_are_those_of_the_numbers(results, make):
  assert make(results) in (ROOT / "docs" / "RESULTS.md").read_text()


@pytest.mark.parametrize("name", ["docs/RESULTS.md", "README.md"])
def test_documents_tell_the_loss_on_people_never_seen(results, name):
  text = " ".join((ROOT / name).read_text().split())
  assert people_report.headline(results) in text
  assert "people.png)" in text


@pytest.mark.parametrize("score", ["r2", "change"])
def test_the_tables_of_the_objectives_are_those_of_the_numbers(score):
  results = json.loads((ROOT / "docs" / "objectives.json").read_text())
  table = people_report.table(results, score=score, against=("fasking",))
  assert table in (ROOT / "docs" / "OBJECTIVES.md").read_text()


@pytest.mark.parametrize("name", ["people", "objectives"])
def test_the_files_of_numbers_are_written_as_the_command_writes_them(name):
  text = (ROOT / "docs" / f"{name}.json").read_text()
  assert people_report.to_json(json.loads(text)) == text
