"""Faults of saving and resuming: kills, full disks, flipped bits, bad copies.

A killed run is in train_test.py, a lost process in distributed_test.py.
"""

import os
import shutil
import signal
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
import pytest

from marlin_jax.checkpoints import checksums, inventory
from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.devices import distributed
from marlin_jax.records import folders
from marlin_jax.training import remote_files
from marlin_jax.weights import formats
from marlin_jax.weights.weights import WeightsError
from tests.support import dying
from tests.support.processes import ROOT
from tests.support.training_runs import command, refused, train


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A workdir with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("two_steps")
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=3)
  for step in (1, 2):
    checkpoints.save(step, dying.state_of(step), {"run": 1})
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(two_steps, tmp_path):
  """A copy of it, to be damaged."""
  return Path(shutil.copytree(two_steps, tmp_path / "run"))


def restored(workdir):
  """The last good checkpoint's step and state, and the warnings."""
  notes = inventory.set_damaged_aside(workdir / "checkpoints")
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=3)
  step = checkpoints.last_saved
  shardings = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    dying.state_of(1),
  )
  state = checkpoints.restore(step, dying.state_of(1), shardings, {"run": 1})
  checkpoints.close()
  return step, state, notes


def assert_is_step(step, state, expected):
  assert step == expected
  jax.tree.map(np.testing.assert_array_equal, state, dying.state_of(expected))


# --- D2: killed while it saves ------------------------------------------------


# In their order: before anything is there, before and after the arrays are
# written, before the whole gets its name, before it has checksums. With the
# step from which the run resumes.
MOMENTS = {
  ("os.mkdir", "2.orbax-checkpoint-tmp"): 1,
  ("open", "_METADATA"): 1,
  ("os.rename", "state.orbax-checkpoint-tmp"): 1,
  ("os.rename", "2.orbax-checkpoint-tmp"): 1,
  ("os.rename", f"{checksums.NAME}."): 2,
}


def die(directory, moment):
  return subprocess.run(
    [
      sys.executable,
      ROOT / "tests" / "support" / "dying.py",
      directory,
      *moment,
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def test_killed_at_any_point_of_a_save_the_last_complete_step_is_restored(
  tmp_path,
):
  workdirs = [tmp_path / str(i) for i in range(len(MOMENTS))]
  directories = [workdir / "checkpoints" for workdir in workdirs]
  with futures.ThreadPoolExecutor(2) as pool:
    results = list(pool.map(die, directories, MOMENTS))
  for workdir, result, last in zip(
    workdirs, results, MOMENTS.values(), strict=True
  ):
    assert result.returncode == -signal.SIGKILL, result.stderr
    step, state, _ = restored(workdir)
    assert_is_step(step, state, last)
    names = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert names == {str(i) for i in range(1, last + 1)}


# --- D3: the disk is full -----------------------------------------------------


def test_a_full_disk_ends_the_run_at_that_save_and_keeps_the_last(
  sample_dataset, tmp_path
):
  argv = command(tmp_path, **{"data.path": sample_dataset, "num_steps": 100})
  result = subprocess.run(
    # As a full disk does: no file may grow past 200 kB. The optimisers' states
    # would.
    ["bash", "-c", 'ulimit -f 200 && exec "$@"', "bash", *argv],
    # Compiled programs would, too.
    env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=250,
  )
  assert result.returncode == distributed.TRY_AGAIN
  # Behind whatever orbax's threads have to say.
  message = result.stderr[result.stderr.rindex("error: ") :]
  assert "the checkpoint of step 3 could not be saved" in message
  assert "full disk" in message
  assert "is saved" not in result.stdout
  assert "step 6/" not in result.stdout
  assert not inventory.steps(tmp_path / "checkpoints")


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(tmp_path):
  remote_files.check_room(tmp_path, 1)
  with pytest.raises(folders.OutputFolderError, match="make room"):
    remote_files.check_room(tmp_path, 10**18)


# --- D5: flipped bits ---------------------------------------------------------


def flip_a_bit(path, np_rng):
  data = bytearray(path.read_bytes())
  data[np_rng.integers(len(data))] ^= 1 << np_rng.integers(8)
  path.write_bytes(bytes(data))


def test_every_flipped_bit_is_found(workdir):
  np_rng = np.random.default_rng(0)
  step = workdir / "checkpoints" / "2"
  files = [p for p in sorted(step.rglob("*")) if p.is_file()]
  files = [p for p in files if p.stat().st_size and p.name != checksums.NAME]
  assert checksums.problem(step) is None
  for i in range(40):
    path = files[i % len(files)]
    before = path.read_bytes()
    flip_a_bit(path, np_rng)
    problem = checksums.problem(step)
    assert problem is not None
    assert str(path.relative_to(step)) in problem
    path.write_bytes(before)
  assert checksums.problem(step) is None


def largest(path):
  return max(
    (p for p in (path / "state").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def test_a_flipped_bit_sends_a_resumed_run_back_to_the_step_before(workdir):
  flip_a_bit(largest(workdir / "checkpoints" / "2"), np.random.default_rng(0))
  step, state, (note,) = restored(workdir)
  assert_is_step(step, state, 1)
  assert "checkpoint 2 is damaged" in note
  assert "its sha256 differs" in note
  # Nothing is lost.
  assert f"moved to {workdir}/damaged/2" in note
  assert (workdir / "damaged" / "2" / "state").is_dir()


def test_damaged_weights_are_not_exported(workdir):
  flip_a_bit(largest(workdir / "checkpoints" / "2"), np.random.default_rng(0))
  with pytest.raises(WeightsError, match="damaged.* sha256 differs"):
    formats.read(str(workdir))


# --- D6: bad copies -----------------------------------------------------------


def lose_everything(step):
  shutil.rmtree(step)
  step.mkdir()


def lose_a_file(step):
  largest(step).unlink()


def cut_metadata(step):
  path = step / "state" / "_METADATA"
  path.write_bytes(path.read_bytes()[:100])


def cut_checksums(step):
  path = step / checksums.NAME
  path.write_bytes(path.read_bytes()[:100])


def lose_checksums(step):
  (step / checksums.NAME).unlink()


def arrays_file(step):
  """Returns the file that holds small arrays."""
  (path,) = (step / "state" / "d").iterdir()
  return path


def lose_checksums_and_arrays(step):
  lose_checksums(step)
  arrays_file(step).unlink()


def lose_checksums_and_half_the_arrays(step):
  lose_checksums(step)
  os.truncate(arrays_file(step), arrays_file(step).stat().st_size // 2)


DAMAGES = {
  lose_everything: "checksums.json is missing",
  lose_a_file: "is missing",
  cut_metadata: "state/_METADATA holds 100 bytes",
  cut_checksums: "checksums.json is damaged",
  lose_checksums_and_arrays: "cannot be read",
  lose_checksums_and_half_the_arrays: "cannot be read",
}


# Orbax may close its event loop while other arrays are still being read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_copy_of_the_last_step_gives_way_to_the_one_before(
  workdir, damage
):
  damage(workdir / "checkpoints" / "2")
  step, state, (note,) = restored(workdir)
  assert_is_step(step, state, 1)
  assert DAMAGES[damage] in note


def test_where_no_checkpoint_is_whole_each_is_named(workdir):
  cut_metadata(workdir / "checkpoints" / "1")
  lose_a_file(workdir / "checkpoints" / "2")
  with pytest.raises(inventory.ResumeError) as error:
    restored(workdir)
  message = str(error.value)
  assert "1: state/_METADATA holds 100 bytes" in message
  assert "2: " in message
  assert "start afresh" in message
  assert inventory.steps(workdir / "checkpoints") == [2, 1]


@pytest.mark.parametrize("is_only", [False, True])
def test_a_complete_checkpoint_without_checksums_is_read_and_used(
  workdir, is_only
):
  if is_only:
    shutil.rmtree(workdir / "checkpoints" / "1")
  lose_checksums(workdir / "checkpoints" / "2")
  step, state, (note,) = restored(workdir)
  assert_is_step(step, state, 2)
  assert "checkpoint 2 had no checksums" in note
  # It has them now.
  assert restored(workdir)[2] == []


def test_two_of_the_same_step_can_be_set_aside(workdir):
  for _ in range(2):
    shutil.copytree(
      workdir / "checkpoints" / "1",
      workdir / "checkpoints" / "2",
      dirs_exist_ok=True,
    )
    lose_a_file(workdir / "checkpoints" / "2")
    restored(workdir)
  names = {p.name for p in (workdir / "damaged").iterdir()}
  assert names == {"2", "2.2"}


# --- D7: another model --------------------------------------------------------


def test_another_tree_is_refused_leaf_by_leaf(workdir):
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=3)
  like = {"a": np.zeros(1000, np.float32), "b": np.zeros((4, 30), int), "c": 1}
  like["c"] = np.zeros(3)
  shardings = jax.tree.map(lambda _: None, like)
  with pytest.raises(inventory.ResumeError) as error:
    checkpoints.restore(2, like, shardings, {"run": 1})
  checkpoints.close()
  message = str(error.value)
  assert "a: was float64 (1000,), is float32 (1000,)" in message
  assert "b: was int64 (30, 30), is int64 (4, 30)" in message
  assert "c: was not there, is float64 (3,)" in message


def test_what_a_run_is_about_may_change_only_where_that_is_meant(workdir):
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=3)
  like = dying.state_of(1)
  shardings = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like
  )
  other = {"run": 1, "seed": 7, "data.fingerprint": "f"}
  with pytest.raises(inventory.ResumeError) as error:
    checkpoints.restore(2, like, shardings, other)
  assert "seed: was None, is 7" in str(error.value)
  assert "--config.allow_change=data.fingerprint,seed" in str(error.value)
  allow = ["seed", "data.fingerprint"]
  state = checkpoints.restore(2, like, shardings, other, allow=allow)
  checkpoints.close()
  assert_is_step(2, state, 2)


# --- D8: two runs, no place to write ------------------------------------------


def test_a_second_run_in_a_workdir_is_refused_and_told_who_is_there(
  sample_dataset, tmp_path
):
  lock = folders.Lock(tmp_path, "lock")
  message = refused(train(tmp_path, **{"data.path": sample_dataset}))
  assert f"another run is writing to {tmp_path}" in message
  assert f"process {os.getpid()} on " in message
  lock.close()
  folders.Lock(tmp_path, "lock").close()


def test_a_workdir_that_cannot_be_made_is_refused(sample_dataset, tmp_path):
  (tmp_path / "file").write_text("")
  result = train(tmp_path / "file" / "run", **{"data.path": sample_dataset})
  assert "a file is where a folder is expected" in refused(result)
