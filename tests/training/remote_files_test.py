"""Small files of a run whose workdir is elsewhere."""

import os

import pytest
from etils import epath

from marlin_jax.training import remote_files
from marlin_jax.training.configuration import ConfigError


def test_a_local_workdir_is_written_directly(tmp_path):
  files = remote_files.RunFiles(epath.Path(tmp_path), is_temporary=False)
  assert files.path == tmp_path
  files.close()
  assert tmp_path.exists()


def test_a_remote_workdir_gets_what_changed_and_a_resumed_run_gets_it_back(
  tmp_path,
):
  workdir = epath.Path(tmp_path)
  files = remote_files.RunFiles(workdir, is_temporary=True)
  local, board = files.path / "metrics.jsonl", files.path / "tensorboard/events"
  board.parent.mkdir()
  board.write_bytes(b"1")
  local.write_text("one\n")
  assert not list(tmp_path.iterdir())
  files.publish()
  assert (workdir / "metrics.jsonl").read_text() == "one\n"

  # What has not changed is not copied again, not even as part of a file.
  (workdir / "tensorboard/events").unlink()
  (workdir / "metrics.jsonl").write_text("ONE\n")
  with local.open("a") as file:
    file.write("two\n")
  files.publish()
  assert (workdir / "metrics.jsonl").read_text() == "ONE\ntwo\n"
  assert os.listdir(tmp_path / "tensorboard") == []
  # A file that has become shorter is another file.
  local.write_text("three\n")
  files.publish()
  assert (workdir / "metrics.jsonl").read_text() == "three\n"
  with local.open("a") as file:
    file.write("four\n")
  files.close()
  assert (workdir / "metrics.jsonl").read_text() == "three\nfour\n"
  assert not files.path.exists()

  files = remote_files.RunFiles(workdir, is_temporary=True)
  assert (files.path / "metrics.jsonl").read_text() == "three\nfour\n"
  files.close()


def test_a_bucket_that_cannot_be_reached_is_told_early(monkeypatch):
  remote_files.check_reachable("runs/b", "sample")
  with pytest.raises(ConfigError, match=r"s3://.*expected .*gs://"):
    remote_files.check_reachable("s3://bucket/runs")
  monkeypatch.setattr(remote_files.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ConfigError, match=r"pip install 'marlin-jax\[gcs\]'"):
    remote_files.check_reachable("runs/b", "gs://bucket/data")
