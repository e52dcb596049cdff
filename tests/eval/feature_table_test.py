"""Features from elsewhere as rows of the same table."""

import csv

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import eval_far
from marlin_jax import compare, features
from marlin_jax.downstream import feature_table, splits
from marlin_jax.downstream.feature_table import FeatureTableError
from marlin_jax.eval.configuration import validate
from marlin_jax.eval.inputs import InputError
from marlin_jax.records import schema
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights.architecture import Architecture
from tests.support.labelled_data import (
  LABELS,
  draw_face,
  make,
  renamed,
  run,
  tiny,
  write,
  write_random,
)
from tests.support.videos import write_video

CHANGES = {
  "tasks": "mood",
  "modes": "linear,knn",
  "num_seeds": 1,
  "num_resamples": 20,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A data set of 12 videos in train, 6 in val and 6 in test."""
  parts = {
    name: renamed(make(num, draw_face, seed), f"{name}/")
    for seed, (name, num) in enumerate((("train", 12), ("val", 6), ("test", 6)))
  }
  return write(tmp_path_factory.mktemp("data") / "faces", parts, LABELS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  return write_random(
    tmp_path_factory.mktemp("encoder") / "tiny",
    Architecture(
      width=32,
      depth=1,
      num_heads=2,
      mlp_dim=64,
      num_frames=4,
      patch_size=56,
      stride=2,
    ),
  )


@pytest.fixture(scope="module")
def cached(encoder, data, tmp_path_factory):
  """Workdir of an evaluation that computes the features itself."""
  workdir = tmp_path_factory.mktemp("cached") / "run"
  run(eval_far, workdir, data, encoder, **CHANGES)
  return workdir


@pytest.fixture(scope="module")
def extracted(encoder, data, tmp_path_factory):
  """Output of marlin_jax.features on the videos of the data set."""
  folder = tmp_path_factory.mktemp("extracted")
  for name in ("train", "val", "test"):
    split = splits.open_split(str(data), name, None)
    for track in split.tracks:
      records = [split.dataset.source[number][1] for number in track.records]
      frames = [schema.decode_frames(r, range(len(r))) for r in records]
      path = folder / "videos" / split.video_ids[track.video]
      write_video(path, np.concatenate(frames), "libx264rgb", "rgb24", qp="0")
  arguments = [folder / "videos", "--checkpoint", encoder, "--num_workers", 1]
  arguments += ["--output", folder / "npz"]
  assert features.main([str(x) for x in arguments]) == 0
  return folder / "npz"


def probabilities(workdir, mode):
  with np.load(workdir / "cells" / f"mood-{mode}-1-0.npz") as arrays:
    return arrays["probabilities"]


def test_a_probe_on_our_features_equals_the_one_on_cached_features(
  cached, extracted, data, tmp_path, capsys
):
  workdir = tmp_path / "read"
  results = run(eval_far, workdir, data, "", features=str(extracted), **CHANGES)
  for mode in ("linear", "knn"):
    np.testing.assert_allclose(
      probabilities(workdir, mode), probabilities(cached, mode), atol=1e-4
    )
  assert results["checkpoint"]["source"] == str(extracted)
  assert not (workdir / "models").exists()  # there is no encoder to apply
  capsys.readouterr()
  assert compare.main([str(cached), str(workdir)]) == 0
  line = next(x for x in capsys.readouterr().out.splitlines() if "knn" in x)
  assert "(+0.0000 [+0.000, +0.000])" in line


def table_of(folder):
  """Returns the ids, without suffix, and the features of all windows."""
  ids, rows = [], []
  for file in sorted(folder.rglob("*.npz")):
    with np.load(file) as arrays:
      rows.extend(arrays["features"])
      name = file.relative_to(folder).as_posix().partition(".")[0]
      ids.extend([name] * len(arrays["features"]))
  return ids, np.stack(rows)


def write_csv(path, ids, rows, columns=("a", "b", "c")):
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["", *columns[:-1], "video_id", columns[-1]])
    for i, (name, row) in enumerate(zip(ids, rows, strict=True)):
      writer.writerow([i, *row[:-1], name, row[-1]])


def write_parquet(path, ids, rows):
  pyarrow.parquet.write_table(
    pyarrow.table({"features": list(rows), "video_id": ids}), path
  )


def test_tables_of_any_program_hold_the_same(extracted, data, tmp_path):
  ids, rows = table_of(extracted)
  np.savez(tmp_path / "t.npz", video_id=ids, features=rows)
  write_parquet(tmp_path / "t.parquet", ids, rows)
  write_csv(tmp_path / "t.csv", ids, rows, [f"x{i}" for i in range(32)])
  for name in set(ids):
    own = rows[[other == name for other in ids]].mean(0)
    path = tmp_path / "npy" / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, own)
  split = splits.open_split(str(data), "val", None)
  expected = feature_table.read(str(extracted), "mean").of(split)
  assert expected.shape == (6, 32)
  for name in ("t.npz", "t.parquet", "t.csv", "npy"):
    found = feature_table.read(str(tmp_path / name), "mean").of(split)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  # As spreadsheets write it.
  table = (tmp_path / "t.csv").read_text()
  (tmp_path / "marked.csv").write_text(table, encoding="utf-8-sig")
  found = feature_table.read(str(tmp_path / "marked.csv"), "mean").of(split)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  both = feature_table.read(str(tmp_path / "t.npz"), "mean_std").of(split)
  np.testing.assert_array_equal(both[:, :32], expected)
  assert both[:, 32:].min() > 0  # every video has two windows


def test_features_that_lack_a_video_or_are_none_are_refused(data, tmp_path):
  split = splits.open_split(str(data), "val", None)
  three = np.arange(3.0)

  def refused(path, *words):
    with pytest.raises(FeatureTableError) as error:
      feature_table.read(str(path), "mean").of(split)
    for word in words:
      assert word in str(error.value)

  np.savez(tmp_path / "less.npz", video_id=["val/000.mp4"], features=[three])
  refused(tmp_path / "less.npz", "5 of 6 videos", "'val/001.mp4'")
  np.savez(tmp_path / "none.npz", names=["a"], features=[three])
  refused(tmp_path / "none.npz", "video_id")
  np.savez(
    tmp_path / "deep.npz", video_id=["a"], features=np.ones((1, 2, 2, 3))
  )
  refused(tmp_path / "deep.npz", "(2, 3)")
  np.savez(tmp_path / "nan.npz", video_id=["a"], features=[[np.nan, 1]])
  refused(tmp_path / "nan.npz", "'a'", "NaN")
  write_parquet(tmp_path / "ragged.parquet", ["a", "b"], [three, three[:2]])
  refused(tmp_path / "ragged.parquet", "2 lengths")
  write_csv(tmp_path / "words.csv", ["a"], [["happy", 1, 2]])
  refused(tmp_path / "words.csv", "happy")
  (tmp_path / "id.csv").write_text("id,x\na,1\n")
  refused(tmp_path / "id.csv", "no column 'video_id'")
  (tmp_path / "cut.npz").write_bytes(b"PK")
  refused(tmp_path / "cut.npz", "cannot be read")
  refused(tmp_path / "words.txt", "expected a folder")
  refused(tmp_path / "missing.csv", "No such file")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "no file VIDEO_ID.npz")


def test_features_and_an_encoder_are_not_both_given(data, tmp_path):
  for checkpoint, path in (("random", "f.npz"), ("", "")):
    with pytest.raises(InputError):
      run(eval_far, tmp_path, data, checkpoint, features=path, **CHANGES)
  with pytest.raises(ConfigError) as error:
    validate(tiny(eval_far.get_config(), features="f.npz", modes="finetune"))
  assert "finetune needs an encoder" in str(error.value)
