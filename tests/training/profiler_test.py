"""Profiles of a run as its users take them."""

import os
import re
import signal
import subprocess

import jax
import pytest

from marlin_jax.training import goodput, profiler
from tests.support.processes import ROOT
from tests.support.training_runs import command

OVERRIDES = {"num_steps": 100_000, "log_steps": 1, "profile.num_steps": 2}
WRITTEN = r"steps (\d+) to (\d+): profile in "


def annotated_steps(folder):
  """Numbers of the steps in a profile, and the names of all that ran."""
  (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
  ]
  steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
  return steps, {event.name for event in events}


@pytest.fixture(scope="module")
def profiled(sample_dataset, tmp_path_factory):
  """A run with a profile from step 2 on, asked for another; what it printed."""
  workdir = tmp_path_factory.mktemp("profiled")
  overrides = {"data.path": sample_dataset, "profile.start_step": 2}
  process = subprocess.Popen(
    command(workdir, **OVERRIDES | overrides),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  output = ""
  for line in process.stdout:
    if not output:
      process.send_signal(signal.SIGUSR1)
    output += line
    if line.startswith("step 5/"):
      process.send_signal(signal.SIGUSR1)
    if len(re.findall(WRITTEN, output)) == 2:
      process.send_signal(signal.SIGTERM)
      break
  output += process.communicate(timeout=120)[0]
  assert process.returncode == 128 + signal.SIGTERM, output
  return workdir, output


def test_sigusr1_before_the_first_step_does_not_end_the_run(profiled):
  _, output = profiled
  assert "SIGUSR1: no step has run yet" in output


def test_a_profile_holds_the_steps_from_the_one_in_the_configuration(profiled):
  workdir, output = profiled
  folder = workdir / "profile" / "step_0000002"
  assert f"steps 2 to 3: profile in {folder}; " in output
  assert f"xprof --logdir={workdir / 'profile'}\n" in output
  steps, names = annotated_steps(folder)
  assert steps == [2, 3]
  # What the step is made of: its matrix products, under whatever name.
  assert any("dot" in name for name in names)


def test_a_signal_takes_a_profile_of_the_next_steps(profiled):
  workdir, output = profiled
  assert "SIGUSR1: profiling the next 2 steps" in output
  first, last = map(int, re.findall(WRITTEN, output)[1])
  assert first > 5
  steps, _ = annotated_steps(workdir / "profile" / f"step_{first:07d}")
  assert steps == [first, last] == [first, first + 1]
  assert len(list((workdir / "profile").iterdir())) == 2


def test_taking_a_profile_is_no_step_time(profiled):
  _, output = profiled
  assert re.search(r"^time 0:0.*profile \d", output, re.MULTILINE)


def run_three_steps(path):
  """Returns the lines printed by a profiler that may be unable to write."""
  said = []
  timer = goodput.Timer(clips_per_step=1)
  with profiler.Profiler(
    path, str(path), timer, said.append, start_step=1, num_steps=2
  ) as it:
    for step in (1, 2, 3):
      with it.step(step):
        timer.step_started(jax.numpy.ones(()))
  return said


def test_a_profile_without_a_folder_does_not_end_the_run(tmp_path):
  path = tmp_path / "profile"
  path.write_text("a file, where a folder is to be")
  (line,) = run_three_steps(path)
  assert line.startswith("step 1: no profile: ")
  assert str(path) in line


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path):
  blocked = tmp_path / "step_0000001" / "plugins"
  blocked.parent.mkdir()
  blocked.write_text("a file, where a folder is to be")
  (line,) = run_three_steps(tmp_path)
  assert line.startswith("steps 1 to 2: the profile could not be written: ")
  assert str(blocked) in line
  blocked.unlink()
  jax.profiler.stop_trace()  # jax still has it


def test_a_request_after_the_last_step_does_not_end_the_process(tmp_path):
  before = signal.getsignal(signal.SIGUSR1)
  try:
    timer = goodput.Timer(clips_per_step=1)
    with profiler.Profiler(tmp_path, "", timer, print):
      pass
    os.kill(os.getpid(), signal.SIGUSR1)
  finally:
    signal.signal(signal.SIGUSR1, before)
