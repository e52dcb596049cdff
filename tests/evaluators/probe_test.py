"""The probe in training: the numbers of the weights, whatever the mesh."""

import types

import numpy as np
import pytest
from etils import epath

from configs import pretrain_b
from data_prep.sources.listing import CLASS, Label
from marlin_jax.data.prepared_dataset import DatasetError
from marlin_jax.devices import sharding
from marlin_jax.downstream import splits
from marlin_jax.downstream.tasks import TaskError
from marlin_jax.evaluators import quick_probe
from marlin_jax.evaluators.probe import Probe
from marlin_jax.inference import clip_features
from marlin_jax.records import folders
from marlin_jax.weights import formats
from marlin_jax.weights.architecture import Architecture
from tests.support.files import rows_of
from tests.support.labelled_data import LABELS, Video, make, renamed, write
from tests.support.training_runs import refused, run, train

TINY = Architecture(width=16, depth=1, num_heads=2, mlp_dim=32, num_frames=4)
# Some are cut down, so that there is something to choose.
PROBE = {
  "probe.steps": 2,
  "probe.label": "emotion",
  "probe.num_videos": 20,
  "probe.batch_size": 12,
  "probe.k": 3,
  "probe.pool": "mean",
}


def settings(**changes):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(PROBE | changes)
  return config.probe


@pytest.mark.slow
def test_a_run_on_eight_devices_tells_what_its_checkpoint_is_worth_on_one(
  face_data, tmp_path
):
  result = run(
    tmp_path,
    devices=8,
    num_steps=3,
    batch_size=8,
    **{"data.path": face_data, "mesh.fsdp": 4, "mesh.tensor": 2},
    **{"optim.base_lr": 0.1, "mask.strategy": "random"},
    **PROBE,
  )
  assert result.returncode == 0, result.stderr
  rows = [row for row in rows_of(tmp_path) if "eval/probe/auc" in row]
  assert [row["step"] for row in rows] == [2, 3]
  assert rows[0] != rows[1]
  assert (
    "20 of 24 videos of 'train' in 40 windows, 16 of 16 videos of 'val'"
  ) in result.stdout
  assert "AUC for emotion on val: linear probe" in result.stdout

  # The average of the weights, as every reader of a run takes it.
  weights = formats.read(tmp_path)
  mesh = sharding.make_mesh()
  data = quick_probe.open_data(settings(), weights.architecture, str(face_data))
  encode = clip_features.FrozenEncoder(weights, mesh, "float32", "auto")
  seen = []
  alone = quick_probe.QuickProbe(data, settings(), mesh, num_threads=2).scores(
    encode, seen.append
  )
  assert sum(seen) == 40 + 32
  assert alone.keys() == {
    name.removeprefix("eval/") for name in rows[1] if name != "step"
  }
  for name, value in alone.items():
    np.testing.assert_allclose(
      rows[1][f"eval/{name}"], value, rtol=1e-3, err_msg=name
    )


def test_the_labels_are_read_once_also_for_a_workdir_in_a_bucket(
  face_data, tmp_path, monkeypatch
):
  """By process 0; the others and restarted runs read what it found."""
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(PROBE)
  course = types.SimpleNamespace(
    config=config,
    mesh=sharding.make_mesh(),
    trainer=None,
    architecture=TINY,
    probe_path=str(face_data),
  )
  workdir = types.SimpleNamespace(path=epath.Path(tmp_path / "bucket"))
  monkeypatch.setattr(
    folders, "is_remote", lambda path: str(path).startswith(str(workdir.path))
  )
  read = splits._read_records
  reads = []
  monkeypatch.setattr(
    splits, "_read_records", lambda data: reads.append(data.split) or read(data)
  )
  for _ in range(2):
    Probe(course, workdir, alive=lambda *_, **__: None)
  assert reads == ["train", "val"]


def test_videos_are_bounded_with_every_classs_share_and_windows_spread(
  tmp_path,
):
  def draw(i, np_rng):
    frames = np.zeros((40 if i % 2 else 8, 224, 224, 3), np.uint8)
    return Video(f"{i:02d}", f"person {i}", {"mood": (i % 4 == 0,)}, frames)

  path = write(
    tmp_path / "data",
    {"train": make(24, draw), "val": renamed(make(4, draw), "v")},
    {"mood": Label(CLASS, ("dark", "bright"))},
  )
  data = quick_probe.open_data(
    settings(
      **{"probe.label": "mood", "probe.num_videos": 8, "probe.num_windows": 3}
    ),
    TINY,
    str(path),
  )
  assert (data.train.targets == 1).sum() == 2
  assert len(data.train.targets) == 8
  assert data.warnings == []
  tracks = data.train.split.tracks
  for video in range(8):
    own = [
      window
      for window, owner in zip(
        data.train.windows, data.train.owners, strict=True
      )
      if owner == video
    ]
    # Of a long one's five windows the middles of thirds.
    long = tracks[own[0].track].num_frames == 40
    assert [w.start for w in own] == ([0, 16, 32] if long else [0])


def test_people_in_both_splits_are_told_loudly(face_data, tmp_path, capsys):
  videos = make(
    6, lambda i, _: Video(f"{i}", "one", {"mood": (i % 2,)}, FRAMES)
  )
  path = write(
    tmp_path / "data",
    {"train": videos, "val": renamed(videos, "")},
    {"mood": LABELS["mood"]},
  )
  data = quick_probe.open_data(
    settings(**{"probe.label": "mood"}), TINY, str(path)
  )
  assert any("share 1 person" in line for line in data.warnings)
  assert "task 'mood': in no video of 'val': bright" in data.warnings


def test_features_that_are_not_finite_have_no_scores(tmp_path):
  videos = make(
    6, lambda i, _: Video(f"{i}", f"{i}", {"mood": (i % 2,)}, FRAMES)
  )
  path = write(
    tmp_path / "data",
    {"train": videos, "val": renamed(videos, "v")},
    {"mood": LABELS["mood"]},
  )
  config = settings(**{"probe.label": "mood"})
  data = quick_probe.open_data(config, TINY, str(path))
  probe = quick_probe.QuickProbe(
    data, config, sharding.make_mesh(), num_threads=1
  )

  def encode(value):
    return lambda clips: np.arange(2.0) + clips[:, 0, 0, 0, :1] + value

  found = probe.scores(encode(0.0))
  assert np.isfinite(found["probe/loss"])
  undefined = probe.scores(encode(np.nan))
  assert undefined.keys() == found.keys()
  assert np.isnan(list(undefined.values())).all()


FRAMES = np.zeros((8, 224, 224, 3), np.uint8)


@pytest.mark.parametrize(
  ("changes", "error", "words"),
  [
    ({"label": "age"}, TaskError, r"label='age': .* appearance \(binary\), "),
    ({"label": "sentiment"}, TaskError, "expected a label of kind binary or"),
    ({"eval_split": "exam"}, DatasetError, "has no split 'exam', it has"),
  ],
)
def test_what_cannot_be_probed_is_told_before_a_record_is_read(
  face_data, changes, error, words
):
  changes = {f"probe.{key}": value for key, value in changes.items()}
  with pytest.raises(error, match=words):
    quick_probe.open_task(settings(**changes), str(face_data))


def test_a_run_with_nothing_to_probe_ends_before_it_makes_a_workdir(
  sample_dataset, tmp_path
):
  workdir = tmp_path / "run"
  message = refused(train(workdir, **{"data.path": sample_dataset}, **PROBE))
  assert "config.probe.label='emotion'" in message
  assert "none at all: prepare it with labels" in message
  assert not workdir.exists()


@pytest.mark.slow
def test_the_features_of_the_probe_keep_where_things_are(tmp_path):
  """Which half of the face is bright; the mean colour is the same."""

  def draw(i, np_rng):
    left = int(np_rng.integers(2))
    frames = np.full((8, 224, 224, 3), 40, np.uint8)
    half = slice(0, 112) if left else slice(112, None)
    frames[:, :, half] = 200
    noise = np_rng.integers(0, 20, frames.shape, np.uint8)
    return Video(f"{i:02d}", f"person {i}", {"side": (left,)}, frames + noise)

  path = write(
    tmp_path / "data",
    {"train": make(24, draw), "val": renamed(make(16, draw, 1), "v")},
    {"side": Label(CLASS, ("right", "left"))},
  )
  losses = {}
  for pool in ("mean", "grid"):
    result = train(
      tmp_path / pool,
      **{"data.path": path, "mask.strategy": "random", "num_steps": 1},
      **PROBE
      | {"probe.label": "side", "probe.pool": pool, "probe.num_videos": 24},
    )
    assert result.returncode == 0, result.stderr
    (row,) = [r for r in rows_of(tmp_path / pool) if "eval/probe/auc" in r]
    losses[pool] = row["eval/probe/loss"]
  assert losses["grid"] < losses["mean"]
