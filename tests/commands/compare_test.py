"""Comparisons of evaluations on the same videos."""

import json
import re
import shutil

import numpy as np
import pytest

from configs import eval_far
from marlin_jax import compare
from marlin_jax.eval import results_folder
from marlin_jax.scores import bootstrap
from marlin_jax.weights.architecture import Architecture
from tests.support.labelled_data import run, write_random


@pytest.fixture(scope="module")
def workdirs(face_data, tmp_path_factory):
  """Evaluations of an encoder twice, and of a smaller one."""
  folder = tmp_path_factory.mktemp("compared")
  for name, width in (("first", 32), ("same", 32), ("<b>small", 8)):
    encoder = write_random(
      folder / f"encoder{name}",
      Architecture(
        width=width,
        depth=1,
        num_heads=2,
        mlp_dim=16,
        num_frames=4,
        patch_size=56,
      ),
    )
    run(
      eval_far,
      folder / name,
      face_data,
      encoder,
      tasks="mood",
      modes="linear,knn",
      num_seeds=2,
      **{"data.ratio": "0.25", "data.tests": f"{face_data}:val"},
    )
  return folder


def test_differences_have_paired_intervals(workdirs, capsys):
  paths = [workdirs / name for name in ("first", "same", "<b>small")]
  assert compare.main([*map(str, paths), "--metric", "accuracy"]) == 0
  lines = capsys.readouterr().out.splitlines()
  line = next(x for x in lines if x.startswith("mood ") and " knn " in x)
  assert "(+0.0000 [+0.000, +0.000])" in line
  draws = [
    np.mean(
      [
        results_folder.read_draws(path, f"mood-knn-0.25-{seed}")["accuracy"]
        for seed in (0, 1)
      ],
      axis=0,
    )
    for path in paths
  ]
  low, high = bootstrap.interval(draws[2] - draws[0])
  assert f"[{low:+.3f}, {high:+.3f}]" in line


@pytest.mark.parametrize("kept", ["fewer draws", "of one person"])
def test_draws_of_another_number_are_paired_and_undefined_ones_are_not(
  workdirs, tmp_path, capsys, kept
):
  twin, other = workdirs / "first", workdirs / "<b>small"
  copy = shutil.copytree(twin, tmp_path / "copy")
  for file in (copy / "cells").glob("*.npz"):
    with np.load(file) as arrays:
      content = {
        k: v[:50] if kept == "fewer draws" else v * np.nan
        for k, v in arrays.items()
        if k.startswith("draws:")
      }
    np.savez(file, **content)
  arguments = [str(copy), str(other), "--metric", "accuracy"]
  assert compare.main(arguments) == 0
  lines = capsys.readouterr().out.splitlines()
  line = next(x for x in lines if x.startswith("mood ") and " knn " in x)
  if kept == "of one person":
    assert "(" not in line
    return
  first, second = (
    np.mean(
      [
        results_folder.read_draws(path, f"mood-knn-0.25-{seed}")["accuracy"]
        for seed in (0, 1)
      ],
      axis=0,
    )
    for path in (twin, other)
  )
  low, high = bootstrap.interval((second - first)[:50])
  assert f"[{low:+.3f}, {high:+.3f}]" in line


def test_seeds_have_an_interval_of_their_mean(workdirs):
  results = json.loads((workdirs / "first" / "results.json").read_text())
  (row,) = (row for row in results["summary"] if row["mode"] == "knn")
  number = row["metrics"]["accuracy"]
  assert row["num_seeds"] == 2
  assert number["low"] < number["mean"] < number["high"]
  assert re.search(
    r"knn .* \+- 0\.\d{4} \[", (workdirs / "first" / "results.txt").read_text()
  )


def test_other_data_sets_have_rows_of_their_own(workdirs, face_data, capsys):
  paths = [str(workdirs / name) for name in ("first", "<b>small")]
  assert compare.main([*paths, "--metric", "accuracy"]) == 0
  lines = capsys.readouterr().out.splitlines()
  (line,) = (x for x in lines if "tested on" in x and " knn " in x)
  draws = [
    np.mean(
      [
        results_folder.read_draws(workdirs / name, f"mood-knn-0.25-{seed}")[
          f"{face_data}:val accuracy"
        ]
        for seed in (0, 1)
      ],
      axis=0,
    )
    for name in ("first", "<b>small")
  ]
  low, high = bootstrap.interval(draws[1] - draws[0])
  assert f"[{low:+.3f}, {high:+.3f}]" in line
  # Those of a test stand together.
  titles = [line.partition("  ")[0] for line in lines[2:]]
  assert titles == sorted(titles, key=titles.index)


def test_each_task_has_its_own_metric(workdirs, tmp_path, capsys):
  mixed = shutil.copytree(workdirs / "first", tmp_path / "mixed")
  results = json.loads((mixed / "results.json").read_text())
  number = {"mean": 0.25, "std": None, "low": 0.1, "high": 0.4}
  results["summary"].insert(
    0,
    {
      "task": "affect",
      "mode": "linear",
      "ratio": 0.25,
      "metrics": {"ccc": number, "mae": number},
    },
  )
  (mixed / "results.json").write_text(json.dumps(results))
  page = tmp_path / "page.html"
  assert compare.main([str(mixed), "--output", str(page)]) == 0
  ccc, auc, _ = capsys.readouterr().out.split("\n\n")
  assert ccc.startswith("ccc\n")
  assert "affect" in ccc
  assert "mood" not in ccc
  assert auc.startswith("auc\n")
  assert "mood" in auc
  assert "affect: ccc" in page.read_text()


def test_a_workdir_has_its_name_from_within(workdirs, monkeypatch, capsys):
  monkeypatch.chdir(workdirs / "first")
  assert compare.main([".", "../same/results.json", "--metric=accuracy"]) == 0
  header = capsys.readouterr().out.splitlines()[1]
  assert header.split()[-2:] == ["first", "same"]


def test_the_page_escapes_names(workdirs, tmp_path):
  page = tmp_path / "page.html"
  paths = [workdirs / name for name in ("first", "<b>small")]
  assert compare.main([*map(str, paths), "--output", str(page)]) == 0
  text = page.read_text()
  assert "&lt;b&gt;small" in text
  assert "<b>small" not in text


def test_a_page_marks_differences_and_folders_of_one_name_keep_apart(
  workdirs, tmp_path
):
  """The twin's draws of one mode are 2 lower."""
  twin = shutil.copytree(workdirs / "first", tmp_path / "first")
  for seed in (0, 1):
    file = twin / "cells" / f"mood-knn-0.25-{seed}.npz"
    with np.load(file) as arrays:
      content = {k: v - 2 * k.startswith("draws:") for k, v in arrays.items()}
    np.savez(file, **content)
  page = tmp_path / "page.html"
  first = workdirs / "first"
  assert compare.main([str(first), str(twin), "--output", str(page)]) == 0
  text = page.read_text()
  assert text.count('class="differs"') == 2  # knn, on both data sets
  assert text.count('class="alike"') == 2
  for path in (first, twin):
    assert f"<th>{path}</th>" in text


def test_other_videos_and_other_files_are_refused(workdirs, tmp_path, capsys):
  other = tmp_path / "other"
  other.mkdir()
  results = json.loads((workdirs / "first" / "results.json").read_text())
  results["tasks"]["mood"]["split_sha256"] = "0" * 64
  (other / "results.json").write_text(json.dumps(results))
  first = str(workdirs / "first")
  cut = shutil.copytree(workdirs / "first", tmp_path / "cut")
  results = json.loads((cut / "results.json").read_text())
  results["tasks"]["mood"]["cuts"] = [0.5]
  (cut / "results.json").write_text(json.dumps(results))
  folds = shutil.copytree(workdirs / "first", tmp_path / "folds")
  results = json.loads((folds / "results.json").read_text())
  for cell in results["cells"]:
    cell["test"]["num_videos"] *= 2
  (folds / "results.json").write_text(json.dumps(results))
  retested = shutil.copytree(workdirs / "first", tmp_path / "retested")
  settings = json.loads((retested / "settings.json").read_text())
  settings = {
    k: "0" if k.startswith("data.tests.") else v for k, v in settings.items()
  }
  (retested / "settings.json").write_text(json.dumps(settings))
  damaged = shutil.copytree(workdirs / "first", tmp_path / "damaged")
  (damaged / "settings.json").write_text("{")
  for arguments, words in (
    ([first, str(damaged)], "damaged/settings.json is damaged"),
    ([first, str(retested)], "were tested on different data sets"),
    ([first, str(other)], "differ in the videos or labels of task 'mood'"),
    ([first, str(cut)], "define task 'mood' otherwise, by cuts [] and [0.5]"),
    ([first, str(folds)], "test task 'mood' 16 and 32 times"),
    ([first, str(tmp_path)], "expected the workdir of an evaluation"),
    ([first, "--metric", "ccc"], "no task has the metric 'ccc'"),
  ):
    assert compare.main(arguments) == 1
    assert words in capsys.readouterr().err
