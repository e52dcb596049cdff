"""Cross-validations: one command, a cell for each fold, and their total."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from sklearn import metrics

from configs import eval_dfd, eval_far
from data_prep.sources.listing import CLASS, Label
from marlin_jax import compare, predict
from marlin_jax.downstream import clip_batches, splits, tasks
from marlin_jax.downstream.feature_table import FeatureTableError
from marlin_jax.downstream.folds import of_classes
from marlin_jax.downstream.tasks import TaskError
from marlin_jax.eval import configuration, modes
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import hub
from tests.support import labelled_data
from tests.support.labelled_data import LABELS, draw_face, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Four official folds of three people each."""
  videos = labelled_data.make(24, draw_face)
  return labelled_data.write(
    tmp_path_factory.mktemp("folds") / "data",
    {f"fold{k + 1}": videos[6 * k : 6 * k + 6] for k in range(4)},
    LABELS,
  )


FOLDS = "fold1,fold2,fold3,fold4"


def cross_validated(workdir, data, **changes):
  return run(
    eval_far,
    workdir,
    data,
    **{
      "modes": "linear,knn",
      "data.folds": FOLDS,
      "knn.k": 3,
    }
    | changes,
  )


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("results")
  cross_validated(workdir, data, tasks="mood,appearance,affect", plots=True)
  return workdir


def cell_of(workdir, name):
  results = json.loads((workdir / "results.json").read_text())
  (cell,) = (cell for cell in results["cells"] if cell["name"] == name)
  return cell


def rows_of(workdir, name):
  with (workdir / "predictions" / f"{name}.csv").open() as file:
    return list(csv.DictReader(file))


def test_the_total_is_of_the_pooled_predictions(workdir):
  rows = rows_of(workdir, "mood-knn-1-0")
  assert len({row["video_id"] for row in rows}) == 24
  names = LABELS["mood"].names
  true = [[row[f"true:{n}"] for n in names].index("1") for row in rows]
  p = np.array([[float(row[f"p:{n}"]) for n in names] for row in rows])
  total = cell_of(workdir, "mood-knn-1-0")
  scored = {k: v["value"] for k, v in total["test"]["metrics"].items()}
  assert scored["war"] == pytest.approx(
    metrics.accuracy_score(true, p.argmax(1))
  )
  assert scored["uar"] == pytest.approx(
    metrics.balanced_accuracy_score(true, p.argmax(1))
  )
  for number in total["test"]["metrics"].values():
    assert number["low"] <= number["value"] <= number["high"]
  assert [fold["fold"] for fold in total["folds"]] == FOLDS.split(",")
  assert sum(fold["test"]["num_videos"] for fold in total["folds"]) == 24


def test_the_mean_over_folds_is_reported_too(workdir):
  results = json.loads((workdir / "results.json").read_text())
  (row,) = (
    r
    for r in results["summary"]
    if (r["task"], r["mode"]) == ("affect", "linear")
  )
  each = [fold["metrics"]["mae"]["mean"] for fold in row["folds"].values()]
  mean = row["mean_of_folds"]["mae"]
  assert len(each) == 4
  assert mean["mean"] == pytest.approx(np.mean(each))
  assert mean["std"] == pytest.approx(np.std(each, ddof=1))
  table = (workdir / "results.txt").read_text()
  assert "affect, by fold" in table
  assert "fold3" in table


def test_decisions_of_a_video_are_by_the_threshold_of_its_fold(workdir):
  total = cell_of(workdir, "appearance-linear-1-0")
  decided = []
  for fold in total["folds"]:
    for row in rows_of(workdir, fold["name"]):
      decided += [
        (float(row[f"true:{name}"]), float(row[f"p:{name}"]) > threshold)
        for name, threshold in zip(
          ("bright", "red"), fold["thresholds"], strict=False
        )
      ]
  per_label = [decided[k::2] for k in range(2)]
  expected = np.mean(
    [metrics.balanced_accuracy_score(*zip(*x, strict=True)) for x in per_label]
  )
  found = total["test"]["metrics"]["balanced_accuracy"]["value"]
  assert found == pytest.approx(expected)


def test_the_baseline_knows_the_training_folds_only(workdir):
  results = json.loads((workdir / "results.json").read_text())
  constant = next(c for c in results["cells"] if c["mode"] == "constant")
  assert constant["test"]["num_videos"] == 24


def test_each_fold_keeps_its_model_and_totals_compare(
  workdir, data, tmp_path, capsys
):
  output = tmp_path / "predictions.csv"
  model = workdir / "models" / "mood-linear-1-0-fold2"
  assert (
    predict.main(
      [
        *("--model", str(model), "--data", str(data)),
        *("--split", "fold2", "--output", str(output)),
      ]
    )
    == 0
  )
  with output.open() as file:
    found = [row["p:dark"] for row in csv.DictReader(file)]
  expected = [r["p:dark"] for r in rows_of(workdir, "mood-linear-1-0-fold2")]
  np.testing.assert_allclose(
    np.array(found, float), np.array(expected, float), atol=2e-6
  )
  results = json.loads((workdir / "results.json").read_text())
  sha256 = results["checkpoint"]["sha256"]
  card = hub.read_results([workdir], sha256, "mood-linear-1-0-fold2")
  total = cell_of(workdir, "mood-linear-1-0")
  assert {r.metric: r.value for r in card} == {
    name: number["value"]
    for name, number in total["folds"][1]["test"]["metrics"].items()
  }
  assert {r.data for r in card} == {"data:fold1+fold2+fold3+fold4 (fold2)"}
  assert hub.read_results([workdir], sha256)
  assert compare.main([str(workdir), str(workdir)]) == 0
  assert "(+0.0000 [+0.000, +0.000])" in capsys.readouterr().out


class Stopped(Exception):
  pass


def test_a_stopped_cross_validation_resumes_at_its_fold(
  workdir, data, tmp_path, monkeypatch
):
  ran = []
  run_mode = modes.ModeRunner.run

  def stop_at_the_third(self, mode, job):
    if len(ran) == 2:
      raise Stopped
    ran.append(job.name)
    return run_mode(self, mode, job)

  with monkeypatch.context() as patch:
    patch.setattr(modes.ModeRunner, "run", stop_at_the_third)
    with pytest.raises(Stopped):
      cross_validated(tmp_path, data, tasks="mood", modes="knn")

  def count(self, mode, job):
    ran.append(job.name)
    return run_mode(self, mode, job)

  monkeypatch.setattr(modes.ModeRunner, "run", count)
  results = cross_validated(tmp_path, data, tasks="mood", modes="knn")
  assert ran == [f"mood-knn-1-0-fold{k}" for k in range(1, 5)]
  (row,) = (r for r in results["summary"] if r["mode"] == "knn")
  whole = cell_of(workdir, "mood-knn-1-0")["test"]["metrics"]["auc"]
  assert row["metrics"]["auc"]["mean"] == whole["value"]


def test_people_are_left_out_one_by_one(data, tmp_path):
  results = cross_validated(
    tmp_path,
    data,
    tasks="mood",
    modes="knn",
    **{
      "data.folds": "leave_person_out",
      "data.train": "fold1+fold2",
      "data.val": "fold4",
      "data.test": "fold3",
    },
  )
  (split,) = results["data"]["splits"].values()
  assert split["name"] == "fold1+fold2+fold4+fold3"
  (row,) = (r for r in results["summary"] if r["mode"] == "knn")
  assert len(row["folds"]) == split["people"] == 12
  assert row["metrics"]["war"]["mean"] > 0.8


@pytest.mark.parametrize("folds", ["leave_class_out", "single_class"])
def test_manipulations_are_left_out_or_trained_alone(
  tmp_path, folds, deepfakes
):
  results = run(
    eval_dfd,
    tmp_path,
    deepfakes,
    modes="linear",
    **{"data.folds": folds},
  )
  (row,) = (r for r in results["summary"] if r["mode"] == "linear")
  assert list(row["folds"]) == list(eval_dfd.METHODS)
  for name, fold in row["folds"].items():
    tested = eval_dfd.METHODS if folds == "single_class" else (name,)
    assert set(fold["parts"]) == set(tested)
  # A model card does not pass them for scores of all manipulations alike.
  card = hub.read_results([tmp_path], results["checkpoint"]["sha256"])
  assert {r.data for r in card} == {f"data:test, folds={folds}"}
  table = (tmp_path / "results.txt").read_text()
  assert "deepfake, by fold" in table
  assert "deepfake, auc of each part" in table


@pytest.fixture(scope="module")
def deepfakes(tmp_path_factory):
  """All manipulations in each split; their colours tell them apart."""

  def draw(i, np_rng):
    video = draw_face(i, np_rng)
    number = i % 5
    frames = np.full_like(video.frames, 90) + np.uint8(
      [20 * number, 10 * (number > 0), 0]
    )
    return labelled_data.Video(
      video.video_id, "", {"manipulation": (number,)}, frames
    )

  return labelled_data.write(
    tmp_path_factory.mktemp("deepfakes") / "data",
    {
      split: labelled_data.renamed(labelled_data.make(15, draw, k), split)
      for k, split in enumerate(("train", "val", "test"))
    },
    {"manipulation": LABELS["manipulation"]},
  )


@pytest.fixture(scope="module")
def swaps(tmp_path_factory):
  """A video of each person, and features of it, as changes of `run`."""
  folder = tmp_path_factory.mktemp("swaps")
  frames = np.zeros((2, 224, 224, 3), np.uint8)
  parts = {
    split: [
      labelled_data.Video(f"{split}{i}.mp4", "", {"kind": (i % 3,)}, frames)
      for i in range(6)
    ]
    for split in ("train", "val", "test")
  }
  kinds = {"kind": Label(CLASS, ("real", "gan", "face/swap"))}
  data = labelled_data.write(folder / "data", parts, kinds)
  videos = [video for split in parts.values() for video in split]
  np.savez(
    folder / "features.npz",
    video_id=[video.video_id for video in videos],
    features=np.eye(3)[[video.labels["kind"][0] for video in videos]],
  )
  return {
    "module": eval_far,
    "data": data,
    "checkpoint": "",
    "features": str(folder / "features.npz"),
    "modes": "knn",
    "knn.k": 1,
  }


def test_a_fold_of_one_video_has_no_auc_and_the_total_has(swaps, tmp_path):
  changes = {"tasks": "kind", "data.folds": "leave_person_out"}
  results = run(workdir=tmp_path, **swaps, **changes)
  (row,) = (r for r in results["summary"] if r["mode"] == "knn")
  assert len(row["folds"]) == 18
  assert row["mean_of_folds"]["auc"]["mean"] is None
  assert row["mean_of_folds"]["accuracy"]["mean"] == 1.0
  assert row["metrics"]["auc"]["mean"] == 1.0
  # Two people are set apart to choose on, of three classes.
  (warning,) = (w for w in results["data"]["warnings"] if "'kind'" in w)
  assert "in no video of 'val' of fold 'people01': " in warning
  assert "such folds: 18 of 18" in warning


@pytest.mark.parametrize("fold", ["leave_person_out", "train,val,test"])
def test_pooled_scores_below_chance_are_told(swaps, tmp_path, capsys, fold):
  results = run(
    workdir=tmp_path, **swaps, **{"tasks": "kind", "data.folds": fold}
  )
  constant = next(r for r in results["summary"] if r["mode"] == "constant")
  is_low = constant["metrics"]["auc"]["mean"] < 0.48
  assert is_low == (fold == "leave_person_out")
  told = "a model that knows nothing has auc 0.00, not 0.5" in (
    capsys.readouterr().out
  )
  assert told == is_low


def test_what_a_share_of_the_data_does_not_show_is_told(
  swaps, tmp_path, capsys
):
  changes = {"tasks": "kind", "data.ratio": "0.3,1", "num_seeds": 1}
  run(workdir=tmp_path, **swaps, **changes)
  lines = capsys.readouterr().out.splitlines()
  (line,) = (x for x in lines if "in no video of" in x)
  assert line.startswith(
    "WARNING: task 'kind': in no video of kind-knn-0.3-0, 2 videos: "
  )


def test_what_is_named_twice_is_run_once():
  assert configuration.split_names("linear, knn,,linear") == ["linear", "knn"]


def test_every_training_of_pairs_is_of_pairs(swaps, tmp_path, monkeypatch):
  steps = []
  rows = clip_batches.PairedOrder.rows

  def spy(self, step, batch_size):
    steps.append(step)
    return rows(self, step, batch_size)

  monkeypatch.setattr(clip_batches.PairedOrder, "rows", spy)
  run(
    workdir=tmp_path,
    **swaps | {"modes": "linear"},
    **{
      "tasks": "fake",
      "derive.fake": {"label": "kind", "negative": "real"},
      "protocol": "paper",
      "data.pairs": True,
      "num_seeds": 1,
    },
  )
  assert steps


def test_features_by_id_are_of_one_data_set(swaps, tmp_path):
  other = shutil.copytree(swaps["data"], tmp_path / "other")
  changes = {"tasks": "kind", "data.tests": f"{swaps['data']}:val"}
  run(workdir=tmp_path / "w", **swaps, **changes)
  changes["data.tests"] = f"{other}:val"
  with pytest.raises(FeatureTableError, match="both 'val0.mp4' of .* and "):
    run(workdir=tmp_path / "v", **swaps, **changes)


def test_two_videos_do_not_share_features(swaps, tmp_path):
  """Ids without suffixes do not tell 0.mp4 from 0.avi, in train and test."""
  frames = np.zeros((2, 224, 224, 3), np.uint8)
  parts = {
    split: [
      labelled_data.Video(f"{i}{suffix}", "", {"kind": (i % 3,)}, frames)
      for i in numbers
    ]
    for split, suffix, numbers in (
      ("train", ".mp4", range(6)),
      ("val", ".mp4", range(6, 12)),
      ("test", ".avi", range(6)),
    )
  }
  kinds = {"kind": Label(CLASS, ("real", "gan", "face/swap"))}
  data = labelled_data.write(tmp_path / "data", parts, kinds)
  table = str(tmp_path / "t.npz")
  np.savez(table, video_id=np.arange(12).astype(str), features=np.eye(12))
  changes = swaps | {"data": data, "features": table, "tasks": "kind"}
  with pytest.raises(FeatureTableError, match="both '0.mp4' of .* and '0.avi'"):
    run(workdir=tmp_path / "w", **changes)


def test_a_class_may_have_a_name_that_no_file_can_have(swaps, tmp_path):
  rule = {"label": "kind", "negative": "real"}
  changes = {"tasks": "fake", "data.folds": "leave_class_out"}
  results = run(workdir=tmp_path, **swaps, **changes, **{"derive.fake": rule})
  (row,) = (r for r in results["summary"] if r["mode"] == "knn")
  assert list(row["folds"]) == ["gan", "face/swap"]
  assert len(rows_of(tmp_path, "fake-knn-1-0-face%2Fswap")) == 4
  changes = {"tasks": "a/b", "derive.a/b": rule}
  with pytest.raises(TaskError, match="without '/'"):
    run(workdir=tmp_path, **swaps, **changes)


@pytest.mark.parametrize(
  ("folds", "role"), [("leave_class_out", "test"), ("single_class", "train")]
)
def test_a_class_without_videos_is_no_fold(swaps, tmp_path, folds, role):
  """Such as a manipulation that was not prepared."""
  by_role = {
    name: splits.open_split(str(swaps["data"]), name, None)
    for name in ("train", "val", "test")
  }
  labels = {"kind": np.where(by_role[role].labels["kind"] == 1, 2, 0)}
  by_role[role] = dataclasses.replace(
    by_role[role], labels={"kind": np.float32(labels["kind"])}
  )
  task = tasks.make_task(
    "fake",
    tasks.read_labels(str(swaps["data"])),
    {"label": "kind", "negative": "real"},
    "",
  )
  single = folds == "single_class"
  assert [*of_classes(task, by_role, single=single)] == ["face/swap"]
  labels["kind"][:] = 0
  by_role[role] = dataclasses.replace(
    by_role[role], labels={"kind": np.float32(labels["kind"])}
  )
  with pytest.raises(TaskError, match="no video of gan, face/swap"):
    of_classes(task, by_role, single=single)


def test_totals_of_other_folds_are_made_anew(swaps, tmp_path):
  """An earlier version had a fold of a manipulation without videos."""
  changes = swaps | {
    "tasks": "fake",
    "derive.fake": {"label": "kind", "negative": "real"},
    "data.folds": "leave_class_out",
    "data.ratio": "0.7",
    "num_seeds": 2,
  }
  run(workdir=tmp_path, **changes)
  totals = [tmp_path / "cells" / f"fake-knn-0.7-{seed}.json" for seed in (0, 1)]
  before = totals[0].read_text()
  for total in totals:
    cell = json.loads(total.read_text())
    cell["folds"].append(cell["folds"][0] | {"fold": "none"})
    total.write_text(json.dumps(cell))
  results = run(workdir=tmp_path, **changes | {"num_seeds": 1})
  assert totals[0].read_text() == before
  (row,) = (r for r in results["summary"] if r["mode"] == "knn")
  assert row["num_seeds"] == 2
  assert [*row["folds"]] == ["gan", "face/swap"]


@pytest.mark.parametrize(
  "changes",
  [
    {"data.folds": "fold1"},
    {"data.folds": "fold1,fold1"},
    {"data.folds": "people:1"},
    {"data.folds": "people:x"},
    {"data.fold_val": 1.0},
    {"data.tests": "other:test"},
    {"data.train_classes": "Deepfakes"},
  ],
)
def test_folds_that_make_no_sense_are_refused(data, tmp_path, changes):
  with pytest.raises(ConfigError, match=next(iter(changes))):
    cross_validated(tmp_path, data, tasks="mood", **changes)
