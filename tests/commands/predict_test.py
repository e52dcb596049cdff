"""Models kept by evaluations, applied to data sets and to video files."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from configs import eval_far
from marlin_jax import Marlin, convert, predict
from marlin_jax.downstream import splits
from marlin_jax.inference import classifier
from marlin_jax.records.folders import OutputFolderError
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import WeightsError
from tests.support.labelled_data import run, write_random
from tests.support.processes import ROOT
from tests.support.videos import write_video

ENCODER = Architecture(
  width=32, depth=1, num_heads=2, mlp_dim=64, num_frames=4, patch_size=56
)
MODES = {
  "appearance": "linear,knn,lora,finetune",
  "mood": "linear,knn,knn_centred,attentive",
  "affect": "linear",
}
# Heads like those, of other tasks.
MORE_MODES = {
  "appearance": "attentive,layernorm",
  "affect": "knn,attentive,finetune",
}
COLUMNS = {"appearance": "p:", "mood": "p:", "affect": "value:"}


def evaluate(folder, face_data, **changes):
  common = {"knn.k": 3, "num_seeds": 1}
  encoder = folder.with_name("encoder")
  run(eval_far, folder, face_data, encoder, **common | changes)


@pytest.fixture(scope="module")
def workdir(face_data, tmp_path_factory):
  """Evaluations of labels, classes and numbers, from one encoder."""
  folder = tmp_path_factory.mktemp("kept")
  write_random(folder / "encoder", ENCODER)
  for task, modes in MODES.items():
    evaluate(folder / "far", face_data, tasks=task, modes=modes)
  evaluate(
    folder / "std",
    face_data,
    tasks="mood",
    modes="linear",
    pool="mean_std",
    **{"data.all_tracks": True},
  )
  return folder


@pytest.fixture(scope="module")
def more(workdir, face_data):
  """Adds the other modes."""
  for task, modes in MORE_MODES.items():
    evaluate(workdir / "far", face_data, tasks=task, modes=modes)


def rows_of(path):
  with open(path) as file:
    return list(csv.DictReader(file))


def numbers(rows, names, column="p:"):
  return np.array(
    [[float(row[column + name]) for name in names] for row in rows]
  )


def cells(modes):
  return [(task, mode) for task in modes for mode in modes[task].split(",")]


@pytest.mark.parametrize(
  ("task", "mode"),
  [
    *cells(MODES),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in cells(MORE_MODES)),
  ],
)
def test_a_kept_model_gives_the_evaluations_predictions(
  workdir, face_data, tmp_path, request, mode, task
):
  if (task, mode) in cells(MORE_MODES):
    request.getfixturevalue("more")
  cell = f"{task}-{mode}-1-0"
  output = tmp_path / "predictions.csv"
  arguments = [
    *("--model", str(workdir / "far" / "models" / cell)),
    *("--output", str(output), "--data", str(face_data)),
  ]
  if mode == "finetune":  # once as a user does, in a fresh process
    result = subprocess.run(
      [sys.executable, "-m", "marlin_jax.predict", *arguments],
      capture_output=True,
      text=True,
      cwd=ROOT,
      check=False,
      timeout=250,
    )
    assert result.returncode == 0, result.stderr
  else:
    assert predict.main(arguments) == 0
  expected = rows_of(workdir / "far" / "predictions" / f"{cell}.csv")
  of_evaluation = "predicted:" if task == "affect" else "p:"
  names = [
    key.removeprefix(of_evaluation)
    for key in expected[0]
    if key.startswith(of_evaluation)
  ]
  videos = [row for row in rows_of(output) if row["row"] == "video"]
  assert [v["video"] for v in videos] == [row["video_id"] for row in expected]
  found = numbers(videos, names, COLUMNS[task])
  np.testing.assert_allclose(
    found, numbers(expected, names, of_evaluation), atol=2e-6, rtol=2e-5
  )
  results = json.loads((workdir / "far" / "results.json").read_text())
  (scored,) = (c for c in results["cells"] if c["name"] == cell)
  thresholds = [row.get("threshold") for row in scored["test"]["per_class"]]
  for row, p in zip(videos, found, strict=True):
    if task == "affect":
      assert row["predicted"] == ""
    elif task == "mood":
      assert row["predicted"] == names[p.argmax()]
    else:
      chosen = [
        n for n, q, t in zip(names, p, thresholds, strict=True) if q > t
      ]
      assert row["predicted"] == ";".join(chosen)


def test_pooled_deviations_over_all_tracks_are_kept_too(
  workdir, face_data, tmp_path
):
  model = workdir / "std" / "models" / "mood-linear-1-0"
  output = tmp_path / "predictions.csv"
  assert (
    predict.main(
      [
        *("--model", str(model), "--output", str(output)),
        *("--data", str(face_data)),
      ]
    )
    == 0
  )
  expected = rows_of(workdir / "std" / "predictions" / "mood-linear-1-0.csv")
  names = ("dark", "grey", "bright")
  np.testing.assert_allclose(
    numbers(rows_of(output), names),
    numbers(expected, names),
    atol=2e-6,
  )


def test_windows_and_their_mean_of_a_video_file(
  workdir, carphone, tmp_path, face_models
):
  video = carphone(tmp_path / "clip.mp4", 20)
  model = workdir / "far" / "models" / "mood-attentive-1-0"
  output = tmp_path / "out" / "predictions.csv"
  arguments = [str(video), "--model", str(model), "--output", str(output)]
  assert predict.main([*arguments, "--num_workers", "1"]) == 0
  *windows, whole = rows_of(output)
  assert [row["row"] for row in windows] == ["window"] * 3
  names = ("dark", "grey", "bright")
  np.testing.assert_allclose(
    numbers(windows, names).mean(axis=0),
    numbers([whole], names)[0],
    atol=2e-6,
  )
  left, top, right, bottom = (
    float(whole[key]) for key in ("x0", "y0", "x1", "y1")
  )
  # The man's face is in the middle of the picture of 176 x 144 pixels.
  assert 0 < (left + right) / 2 < 176
  assert right - left == pytest.approx(bottom - top, abs=1)
  assert 40 < right - left < 200
  prediction = Marlin.load_classifier(model).predict(video)
  assert prediction.as_dict() == pytest.approx(
    dict(zip(names, numbers([whole], names)[0], strict=True)), abs=1e-5
  )
  assert prediction.predicted == (whole["predicted"],)


def test_a_stopped_run_goes_on_and_a_changed_video_is_predicted_again(
  workdir, carphone, tmp_path, face_models, capsys
):
  folder = tmp_path / "videos"
  folder.mkdir()
  for number, length in enumerate((8, 9, 10)):
    carphone(folder / f"{number}.mp4", length)
  write_video(folder / "grey.mp4", [np.full((144, 176, 3), 90, np.uint8)] * 8)
  output = tmp_path / "predictions.csv"
  model = workdir / "far" / "models" / "mood-knn-1-0"
  arguments = [
    *(str(folder), "--model", str(model), "--output", str(output)),
    *("--num_workers", "1"),
  ]
  assert predict.main(arguments) == 0
  rows = rows_of(output)
  assert ["no face" in row["error"] for row in rows[-1:]] == [True]
  journal = tmp_path / "predictions.csv.jsonl"
  lines = journal.read_bytes().splitlines(True)
  # As after a kill in the middle of the third line.
  journal.write_bytes(b"".join(lines[:2]) + lines[2][:20])
  output.unlink()
  before = lines[1]
  assert predict.main(arguments) == 0
  assert rows_of(output) == rows
  assert journal.read_bytes().splitlines(True)[1] == before
  assert "1 of them done before" in capsys.readouterr().out
  carphone(folder / "0.mp4", 12)
  assert predict.main(arguments) == 0
  changed = rows_of(output)
  ends = [
    max(float(row["end_secs"]) for row in table if row["video"] == "0.mp4")
    for table in (changed, rows)
  ]
  assert ends[0] > ends[1]
  others = [
    [row for row in table if row["video"] != "0.mp4"]
    for table in (changed, rows)
  ]
  assert others[0] == others[1]


def test_json_lines_hold_the_same(workdir, face_data, tmp_path):
  model = workdir / "far" / "models" / "mood-linear-1-0"
  output = tmp_path / "predictions.jsonl"
  arguments = ["--model", str(model), "--data", str(face_data)]
  assert predict.main([*arguments, "--output", str(output), "--json"]) == 0
  settings, *entries = map(json.loads, output.read_text().splitlines())
  assert settings["names"] == ["dark", "grey", "bright"]
  table = tmp_path / "table.csv"
  assert predict.main([*arguments, "--output", str(table)]) == 0
  np.testing.assert_array_equal(
    [entry["probabilities"] for entry in entries],
    numbers(rows_of(table), settings["names"]),
  )


def test_tasks_share_the_videos_and_a_run_of_all_joins_them(
  workdir, face_data, tmp_path, capsys
):
  model = workdir / "far" / "models" / "mood-linear-1-0"
  arguments = ["--model", str(model), "--data", str(face_data)]
  alone, joined = tmp_path / "alone.csv", tmp_path / "joined.csv"
  assert predict.main([*arguments, "--output", str(alone)]) == 0
  for index in "01":
    part = ["--task_index", index, "--task_count", "2"]
    assert predict.main([*arguments, "--output", str(joined), *part]) == 0
    assert not joined.exists()
  logs = sorted(path.name for path in tmp_path.glob("joined.csv.jsonl*"))
  assert logs == [f"joined.csv.jsonl-0000{i}-of-00002" for i in (0, 1)]
  lengths = [len((tmp_path / log).read_text().splitlines()) for log in logs]
  assert lengths == [9, 9]  # 16 videos, and the settings of each
  assert predict.main([*arguments, "--output", str(joined)]) == 0
  assert rows_of(joined) == rows_of(alone)
  assert not list(tmp_path.glob("joined.csv.jsonl-*"))
  # One run at a time.
  settings = json.loads(
    (tmp_path / "joined.csv.jsonl").read_text().splitlines()[0]
  )
  with (
    predict.PredictionLog(joined, settings, as_json=False),
    pytest.raises(OutputFolderError, match="another run is writing"),
  ):
    predict.PredictionLog(joined, settings, as_json=False)


def test_calibrated_probabilities_fit_the_validation_split_better(
  workdir, face_data, tmp_path
):
  model = workdir / "far" / "models" / "appearance-knn-1-0"
  losses = []
  for flag in ([], ["--calibrated"]):
    output = tmp_path / f"predictions{len(flag)}.csv"
    assert (
      predict.main(
        [
          *("--model", str(model), "--data", str(face_data)),
          *("--split", "val", "--output", str(output), *flag),
        ]
      )
      == 0
    )
    p = numbers(rows_of(output), ("bright", "red", "never"))
    p = p.clip(1e-7, 1 - 1e-7)
    truth = rows_of_truth(face_data)
    losses.append(-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)))
  assert losses[1] <= losses[0] + 1e-6
  assert classifier.read_description(model).temperature != 1.0


def rows_of_truth(data):
  return splits.open_split(str(data), "val", None).labels["appearance"]


def test_wrong_models_and_outputs_are_refused(
  workdir, face_data, tmp_path, capsys
):
  model = workdir / "far" / "models" / "mood-linear-1-0"
  output = tmp_path / "predictions.csv"
  data = ["--data", str(face_data)]

  def message(*arguments) -> str:
    assert predict.main([*arguments, "--output", str(output)]) == 1
    return capsys.readouterr().err

  assert "model.json" in message("--model", str(tmp_path), *data)
  assert "either videos or --data" in message("--model", str(model))
  other = write_random(
    tmp_path / "other", Architecture(**vars(ENCODER) | {"width": 48})
  )
  wrong = message("--model", str(model), "--checkpoint", str(other), *data)
  assert "hash" in wrong
  output.write_text("mine")
  assert "choose another --output" in message("--model", str(model), *data)
  assert output.read_text() == "mine"


@pytest.mark.parametrize("text", ['{"0.mp4": "happy"}', "[1]\n", '{"a": 1}\n'])
def test_a_file_of_somebody_else_is_not_taken_for_a_log(tmp_path, text):
  output = tmp_path / "labels.json"
  output.write_text(text)
  settings = {"program": "marlin_jax.predict", "names": ["happy"]}
  with pytest.raises(OutputFolderError, match="another --output"):
    predict.PredictionLog(output, settings, as_json=True)
  assert output.read_text() == text
  # What a kill leaves of the first line is begun anew.
  output.write_text(json.dumps(settings)[:20])
  with predict.PredictionLog(output, settings, as_json=True):
    pass
  assert json.loads(output.read_text()) == settings


@pytest.mark.parametrize("flag", ["--split=val", "--dtype=bfloat16"])
def test_predictions_of_other_videos_or_digits_are_not_mixed(
  workdir, face_data, tmp_path, capsys, flag
):
  model = workdir / "far" / "models" / "mood-linear-1-0"
  command = ["--model", str(model), "--data", str(face_data)]
  command += ["--output", str(tmp_path / "out.csv")]
  assert predict.main(command) == 0
  assert predict.main([*command, flag]) == 1
  assert f"{flag[2:].partition('=')[0]} was" in capsys.readouterr().err
  assert len(rows_of(tmp_path / "out.csv")) == 16


def test_predictions_of_another_head_at_the_same_place_are_not_mixed(
  workdir, face_data, tmp_path, capsys
):
  model = shutil.copytree(
    workdir / "far" / "models" / "mood-linear-1-0", tmp_path / "model"
  )
  output = tmp_path / "out.csv"
  command = ["--model", str(model), "--data", str(face_data)]
  command += ["--output", str(output)]
  assert predict.main(command) == 0
  log = tmp_path / "out.csv.jsonl"
  first, *lines = log.read_text().splitlines(keepends=True)
  # One of before the head had a hash goes on.
  settings = json.loads(first)
  for key in ("head_sha256", "split", "dtype"):
    del settings[key]
  log.write_text("".join([json.dumps(settings) + "\n", *lines[:3]]))
  assert predict.main(command) == 0
  assert len(log.read_text().splitlines()) == 1 + len(lines)
  log.write_text("".join([first, *lines[:3]]))
  arrays = safetensors.numpy.load_file(model / "model.safetensors")
  arrays = {name: 2 * array for name, array in arrays.items()}
  safetensors.numpy.save_file(arrays, model / "model.safetensors")
  capsys.readouterr()
  assert predict.main(command) == 1
  assert "head_sha256 was" in capsys.readouterr().err


def test_numbers_are_not_calibrated(workdir, face_data, tmp_path, capsys):
  model = workdir / "far" / "models" / "affect-linear-1-0"
  arguments = ["--model", str(model), "--data", str(face_data)]
  output = ["--output", str(tmp_path / "out.csv")]
  assert predict.main([*arguments, *output, "--calibrated"]) == 1
  assert "predicts numbers" in capsys.readouterr().err
  with pytest.raises(WeightsError, match="predicts numbers"):
    Marlin.load_classifier(model).calibrated(np.zeros(2))


@pytest.mark.parametrize(
  ("task", "is_class"), [("appearance", False), ("mood", True)]
)
def test_models_from_before_there_were_numbers_open(
  workdir, tmp_path, task, is_class
):
  """Version 1 of model.json told classes from labels by `is_class`."""
  model = workdir / "far" / "models" / f"{task}-linear-1-0"
  content = json.loads((model / "model.json").read_text())
  del content["kind"]
  content |= {"version": 1, "is_class": is_class}
  (tmp_path / "model.json").write_text(json.dumps(content))
  opened, now = map(classifier.read_description, (tmp_path, model))
  assert opened == now


def test_a_missing_encoder_is_asked_for(workdir, tmp_path):
  model = workdir / "far" / "models" / "mood-linear-1-0"
  description = classifier.read_description(model)
  moved = tmp_path / "model"
  moved.mkdir()
  content = json.loads((model / "model.json").read_text())
  content["encoder"] = str(tmp_path / "gone")
  (moved / "model.json").write_text(json.dumps(content))
  (moved / "model.safetensors").write_bytes(
    (model / "model.safetensors").read_bytes()
  )
  with pytest.raises(WeightsError, match="--checkpoint"):
    Marlin.load_classifier(moved)
  opened = Marlin.load_classifier(moved, encoder=str(workdir / "encoder"))
  assert opened.description.names == description.names


# --- Export -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("cell", "fold_input"),
  [
    ("appearance-linear", True),
    ("appearance-lora", False),
    ("affect-linear", False),
  ],
)
def test_a_classifier_is_one_of_transformers(
  workdir, tmp_path, sample_videos, capsys, cell, fold_input
):
  model = workdir / "far" / "models" / f"{cell}-1-0"
  flags = ["--fold_input"] if fold_input else []
  convert.convert(
    convert.parse_args(["--to=hf", *flags, str(model), str(tmp_path / "hf")])
  )
  (line,) = re.findall(r": largest difference (\S+)", capsys.readouterr().out)
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  if "affect" in cell:  # arousal is about 50
    assert float(line) < 1e-2
    assert config["id2label"] == {"0": "valence", "1": "arousal"}
    assert config["problem_type"] == "regression"
    return
  assert float(line) < 1e-4
  assert config["id2label"] == {"0": "bright", "1": "red", "2": "never"}
  assert config["problem_type"] == "multi_label_classification"


def test_a_classifier_as_stablehlo_needs_jax_alone(
  workdir, tmp_path, sample_videos
):
  model = workdir / "far" / "models" / "appearance-finetune-1-0"
  file = tmp_path / "mood.stablehlo"
  convert.convert(convert.parse_args(["--to=stablehlo", str(model), str(file)]))
  clips = np.random.default_rng(0).integers(
    0, 256, (3, 4, 224, 224, 3), np.uint8
  )
  np.save(tmp_path / "clips.npy", clips)
  script = (
    "import sys, numpy as np, jax.export as e; a, b, c = sys.argv[1:];"
    "f = e.deserialize(bytearray(open(a, 'rb').read()));"
    "np.save(c, f.call(np.load(b)));"
    "assert not any(m.startswith('marlin_jax') for m in sys.modules)"
  )
  subprocess.run(
    [
      *(sys.executable, "-c", script, file, tmp_path / "clips.npy"),
      tmp_path / "out.npy",
    ],
    check=True,
    cwd=tmp_path,
    timeout=250,
  )
  opened = Marlin.load_classifier(model)
  expected = opened.window_probabilities(np.asarray(opened.outputs(clips)))
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)


def test_a_head_that_is_not_linear_is_not_exported(workdir, tmp_path):
  model = workdir / "far" / "models" / "mood-knn-1-0"
  with pytest.raises(WeightsError, match="can be exported"):
    convert.convert(
      convert.parse_args(["--to=hf", str(model), str(tmp_path / "hf")])
    )
