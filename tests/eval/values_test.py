"""Evaluations of numbers, in all modes and protocols, end to end."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from configs import eval_far, eval_fer
from marlin_jax import compare
from marlin_jax.eval import report
from tests.support.labelled_data import metric, run


@pytest.fixture(scope="module")
def workdir(face_data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("values")
  run(
    eval_far,
    folder / "far",
    face_data,
    tasks="affect",
    modes="linear,knn,attentive",
    num_seeds=1,
    plots=True,
    **{"knn.k": 3, "value_loss": "ccc"},
  )
  return folder / "far"


def test_numbers_are_predicted_in_their_units(workdir):
  results = json.loads((workdir / "results.json").read_text())
  with (workdir / "predictions" / "affect-linear-1-0.csv").open() as file:
    rows = list(csv.DictReader(file))
  cell = next(c for c in results["cells"] if c["name"] == "affect-linear-1-0")
  expected = []
  for name in ("valence", "arousal"):
    true, predicted = np.array(
      [
        (float(row[f"true:{name}"]), float(row[f"predicted:{name}"]))
        for row in rows
        if row[f"true:{name}"]
      ]
    ).T
    expected.append(stats.pearsonr(true, predicted)[0])
    assert abs(predicted - true).mean() < 2 * true.std()
  scored = [row["pearson"] for row in cell["test"]["per_class"]]
  np.testing.assert_allclose(scored, expected, atol=1e-4)
  assert metric(results, "linear", "ccc") > 0.8
  assert metric(results, "knn", "ccc") > 0.5
  assert "confusion" not in cell["test"]
  for row in results["summary"]:
    for name in ("ccc", "mae", "rmse"):
      number = row["metrics"][name]
      assert number["low"] <= number["mean"] <= number["high"]


def test_predictions_of_the_validation_split_are_kept(workdir):
  with (workdir / "predictions" / "affect-knn-1-0-val.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["video_id"] for row in rows] == [
    f"v{i:03d}.mp4" for i in range(16)
  ]
  true, predicted = (
    np.array([float(row[f"{kind}:valence"]) for row in rows])
    for kind in ("true", "predicted")
  )
  assert np.corrcoef(true, predicted)[0, 1] > 0.5


def test_the_baseline_predicts_the_mean(workdir):
  results = json.loads((workdir / "results.json").read_text())
  constant = results["summary"][0]
  assert constant["mode"] == "constant"
  assert constant["metrics"]["ccc"]["mean"] == pytest.approx(0, abs=1e-9)
  assert constant["metrics"]["pearson"]["mean"] is None
  assert constant["metrics"]["mae"]["mean"] > 0
  table = (workdir / "results.txt").read_text()
  for name in ("ccc", "pearson", "spearman", "mae", "rmse"):
    assert name in table


def test_numbers_have_pictures(workdir):
  names = {path.name for path in (workdir / "plots").iterdir()}
  assert "affect-linear-1-0-scatter.png" in names
  assert not any("roc" in name for name in names)


def test_a_score_of_0_is_a_point_of_the_plot_over_ratios(tmp_path):
  rows = [
    {
      "task": "affect",
      "mode": "knn",
      "ratio": ratio,
      "metrics": {"ccc": {"mean": mean, "std": None}},
    }
    for ratio, mean in ((0.1, 0.0), (1.0, 0.5))
  ]
  report.plot_ratios(tmp_path, rows)
  assert (tmp_path / "affect-ratios.png").exists()


def test_evaluations_of_numbers_compare(workdir, capsys):
  assert compare.main([str(workdir), str(workdir)]) == 0
  lines = capsys.readouterr().out.splitlines()
  (line,) = (x for x in lines if " knn " in x)
  assert "(+0.0000 [+0.000, +0.000])" in line


def test_training_starts_from_the_mean_of_the_numbers(face_data, tmp_path):
  """Arousal is about 50, to which a head takes 1e5 steps of the paper."""
  results = run(
    eval_far,
    tmp_path,
    face_data,
    tasks="affect",
    protocol="paper",
    modes="linear",
    num_seeds=1,
    num_resamples=2,
  )
  cell = results["cells"][1]
  (arousal,) = (r for r in cell["test"]["per_class"] if r["name"] == "arousal")
  assert arousal["mae"] < 10


def test_the_row_of_mosei(face_data, tmp_path):
  results = run(
    eval_fer,
    tmp_path,
    face_data,
    tasks="sentiment_value,sentiment7_delbrouck",
  )
  value, classes = (
    next(
      row
      for row in results["summary"]
      if (row["task"], row["mode"]) == (task, "linear")
    )["metrics"]
    for task in ("sentiment_value", "sentiment7_delbrouck")
  )
  assert {
    *("mae", "pearson", "accuracy_7"),
    *("accuracy_2", "f1_weighted_2"),
    *("accuracy_2_without_0", "f1_weighted_2_without_0"),
  } <= set(value)
  # Sentiment is -1, 0 or 1 here, and the encoder sees which.
  assert value["accuracy_2_without_0"]["mean"] == 1.0
  assert classes["accuracy"]["mean"] > 0.8
  assert classes["war"] == classes["accuracy"]
  assert "accuracy_2_without_0" in (tmp_path / "results.txt").read_text()


def test_a_rule_may_be_added_but_not_changed(face_data, tmp_path):
  from marlin_jax.records.folders import OutputFolderError

  def evaluate(task, modes="knn", **rules):
    return run(
      eval_far,
      tmp_path,
      face_data,
      tasks=task,
      modes=modes,
      **{f"derive.{name}": rule for name, rule in rules.items()},
    )

  high = {"label": "affect", "cuts": (0.0,)}
  low = {"label": "sentiment", "cuts": (-0.5,)}
  evaluate("mood", low=low)
  evaluate("high", high=high)  # a workdir of before takes it
  evaluate("mood")
  evaluate("high", high=high)
  # Also where only another mode is asked for: the table has both.
  for modes in ("knn", "linear"):
    with pytest.raises(OutputFolderError, match="definition of its task"):
      evaluate("high", modes, high=high | {"cuts": (0.5,)})
  with pytest.raises(OutputFolderError, match=r"derive\.low\.apart: was None"):
    evaluate("mood", low=low | {"apart": 0.0})
