"""A data set has the same bytes from any engine and any number of tasks."""

import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.files import content
from tests.support.processes import ROOT, run_prepare
from tests.support.videos import moving_noise, write_video

NUM_TASKS = 2


@pytest.fixture(scope="module")
def videos(tmp_path_factory, carphone, face_models) -> Path:
  """Clips of a face in two classes, and two videos that are left out."""
  folder = tmp_path_factory.mktemp("videos")
  for i, length in enumerate((3, 4, 5, 6)):
    carphone(folder / f"{'ab'[i % 2]}/{i}.mp4", length)
  write_video(folder / "a/noise.mp4", moving_noise(5))
  (folder / "b/text.mp4").write_text("no video")
  return folder


@pytest.fixture(scope="module")
def flags(videos) -> list[object]:
  # One worker: each loads the models anew.
  return [
    *("--input", videos, "--dataset=class_folders"),
    *("--num_shards=3", "--num_workers=1"),
  ]


@pytest.fixture(scope="module")
def expected(flags, tmp_path_factory) -> dict[str, bytes]:
  """Returns the files that one undisturbed process writes."""
  path = tmp_path_factory.mktemp("expected") / "dataset"
  result = run_prepare(*flags, "--output", path)
  assert result.returncode == 0, result.stderr
  found = content(path)
  assert sum("array_record" in name for name in found) == 3
  return found


def test_an_array_of_tasks_writes_what_one_process_writes(
  flags, expected, tmp_path
):
  path = tmp_path / "dataset"
  for index in (1, 0):  # in any order
    task = [f"--task_index={index}", f"--task_count={NUM_TASKS}"]
    result = run_prepare(*flags, "--output", path, *task)
    assert result.returncode == 0, result.stderr
    assert f"Task {index} of {NUM_TASKS} is done" in result.stdout
    assert not (path / "dataset_info.json").exists()
  again = run_prepare(*flags, "--output", path, *task)
  assert "Nothing to do for" in again.stdout
  result = run_prepare(*flags, "--output", path)
  assert result.returncode == 0, result.stderr
  assert content(path) == expected
  # A task must not remove files of another that may still run.
  other = path / "parts/of_another_task.json"
  other.parent.mkdir()
  other.write_text("{}")
  again = run_prepare(*flags, "--output", path, *task)
  assert again.returncode == 0, again.stderr
  assert other.exists()


def test_tasks_at_the_same_time_one_of_them_killed(flags, expected, tmp_path):
  path = tmp_path / "dataset"
  commands = [
    [
      *(sys.executable, "-m", "data_prep.prepare", *map(str, flags)),
      *("--output", str(path)),
      *(f"--task_index={index}", f"--task_count={NUM_TASKS}"),
    ]
    for index in range(NUM_TASKS)
  ]
  first, second = (
    subprocess.Popen(
      command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for command in commands
  )
  # The first task is killed once a video is being written. The restarted task
  # must not remove files of the other.
  while first.poll() is None and not any((path / "parts").glob("*.json")):
    time.sleep(0.05)
  first.send_signal(signal.SIGKILL)
  first.communicate()
  again = subprocess.run(commands[0], cwd=ROOT, capture_output=True, text=True)
  assert again.returncode == 0, again.stderr
  _, stderr = second.communicate()
  assert second.returncode == 0, stderr
  result = run_prepare(*flags, "--output", path)
  assert result.returncode == 0, result.stderr
  assert content(path) == expected


def test_the_same_task_twice_and_a_whole_run_beside_it_are_refused(
  flags, tmp_path
):
  from marlin_jax.records.folders import Lock

  path = tmp_path / "dataset"
  shared = Lock(path, shared=True)
  whole = run_prepare(*flags, "--output", path)
  assert whole.returncode == 1
  assert "another run is writing" in whole.stderr
  own = Lock(path / "parts", "task-0-of-2.lock")
  task = run_prepare(
    *flags, "--output", path, "--task_index=0", "--task_count=2"
  )
  assert task.returncode == 1
  assert "another run is writing" in task.stderr
  assert "process" in task.stderr  # tells which
  own.close()
  shared.close()


def test_wrong_task_numbers_are_told(flags, tmp_path):
  result = run_prepare(
    *flags, "--output", tmp_path, "--task_index=2", "--task_count=2"
  )
  assert result.returncode == 2
  assert "--task_index is 2, expected less than --task_count, 2" in (
    result.stderr
  )
  result = run_prepare(
    *flags, "--output", tmp_path, "--", "--runner=FlinkRunner"
  )
  assert "--runner=FlinkRunner needs --engine=beam" in result.stderr
  result = run_prepare(*flags, "--output", "gs://bucket/[ab]")
  assert "'gs://bucket/[ab]' contains one of * ? [" in result.stderr


@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is not None,
  reason="Beam is installed",
)
def test_without_beam_nothing_is_begun(flags, tmp_path):
  path = tmp_path / "dataset"
  result = run_prepare(*flags, "--output", path, "--engine=beam")
  assert result.returncode == 2
  assert "pip install 'marlin-jax[beam]'" in result.stderr
  assert not path.exists()


@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None,
  reason="Beam is not installed: pip install 'marlin-jax[beam]'",
)
def test_a_flag_that_beam_does_not_know_is_refused(flags, tmp_path):
  path = tmp_path / "dataset"
  result = run_prepare(
    *(*flags, "--output", path, "--engine=beam", "--"),
    *("--runner=DataflowRunner", "--reqion=us-central1"),
  )
  assert result.returncode == 1
  assert "--reqion is not a flag of Apache Beam; did you mean --region?" in (
    result.stderr
  )
  assert not path.exists()


@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None,
  reason="Beam is not installed: pip install 'marlin-jax[beam]'",
)
def test_flags_of_a_job_server_are_left_to_it():
  from data_prep.engines import beam

  flags = ["--runner=FlinkRunner", "--flink_master=HOST:8081", "--new_flag=1"]
  assert beam.options_of(flags).view_as(beam.StandardOptions).runner == (
    "FlinkRunner"
  )
  with pytest.raises(beam.BeamFlagError, match="stray is not a flag"):
    beam.options_of(["--runner=FnApiRunner", "stray"])
  # Those of the example in DATA.md.
  text = (ROOT / "docs" / "DATA.md").read_text()
  for example in re.findall(r"--engine=beam.*? -- (.*?)\n\n", text, re.DOTALL):
    beam.options_of(example.replace("\\\n", "").split())


@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None,
  reason="Beam is not installed: pip install 'marlin-jax[beam]'",
)
def test_beam_writes_what_the_pool_writes(flags, expected, tmp_path):
  path = tmp_path / "dataset"
  result = run_prepare(*flags, "--output", path, "--engine=beam")
  assert result.returncode == 0, result.stderr
  assert content(path) == expected
