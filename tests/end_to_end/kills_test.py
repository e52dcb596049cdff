"""Runs of data_prep.prepare that are killed, and disks that are full.

Whatever happens, the same command ends with the bytes of an undisturbed run,
and no good video is in the quarantine.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.files import content, read_lines
from tests.support.processes import ROOT, run_prepare
from tests.support.videos import moving_noise, write_video

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
FOOTAGE = ROOT.parent / "shared" / "footage"


def start(flags: list[object], most_bytes: int | None = None):
  """Starts a run; no file of it may become larger than `most_bytes`."""
  run = subprocess.Popen(
    [sys.executable, "-m", "data_prep.prepare", *map(str, flags)],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if most_bytes is not None:
    # Not in a function between fork and exec: this process has threads.
    limits = most_bytes, most_bytes
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, limits)
  return run


def workers_of(run: subprocess.Popen) -> list[int]:
  """Returns the ids of the worker processes of a run."""
  found = []
  try:
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    for pid in children.split():
      if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
        found.append(int(pid))
  except FileNotFoundError:
    pass  # it has ended
  return found


def wait(run: subprocess.Popen, secs: float) -> None:
  try:
    run.wait(secs)
  except subprocess.TimeoutExpired:
    return


def disturb(flags: list[object], num_kills: int, secs: float, seed: int):
  """Runs and kills a command at random moments; a disk is full in between."""
  rng = random.Random(seed)
  for number in range(num_kills):
    if number == num_kills // 2:
      run = start(flags, most_bytes=20_000)
      _, stderr = run.communicate(timeout=600)
      assert run.returncode in (0, 1), stderr
      assert "Traceback" not in stderr
    run = start(flags)
    wait(run, rng.uniform(0, secs))
    if number % 2 and (workers := workers_of(run)):
      os.kill(rng.choice(workers), signal.SIGKILL)
      wait(run, rng.uniform(0, secs))
    run.kill()
    run.communicate()


def check(folder: Path, tmp_path: Path, num_kills: int, seed: int, *more):
  """Compares a disturbed run with an undisturbed one; returns its output."""
  flags = ["--input", folder, "--num_shards=3", "--num_workers=2", *more]
  expected, found = tmp_path / "expected", tmp_path / "found"
  started_at = time.monotonic()
  result = run_prepare(*flags, "--output", expected)
  assert result.returncode == 0, result.stderr
  secs = time.monotonic() - started_at
  disturb([*flags, "--output", found], num_kills, secs, seed)
  result = run_prepare(*flags, "--output", found)
  assert result.returncode == 0, result.stderr
  assert content(found) == content(expected)
  assert read_lines(found / "quarantine.jsonl") == read_lines(
    expected / "quarantine.jsonl"
  )
  return expected


@pytest.mark.slow
def test_a_run_that_is_killed_and_has_a_full_disk_loses_nothing(
  carphone, face_models, tmp_path
):
  for i in range(4):
    carphone(tmp_path / f"in/{i}.mp4", 4 + i)
  write_video(tmp_path / "in/noise.mp4", moving_noise(5))
  (tmp_path / "in/text.mp4").write_text("no video")
  path = check(tmp_path / "in", tmp_path, num_kills=2, seed=0)
  assert [
    line["video_id"] for line in read_lines(path / "quarantine.jsonl")
  ] == [
    "noise.mp4",
    "text.mp4",
  ]


@pytest.mark.slow
def test_real_clips_survive_ten_kills(face_models, tmp_path):
  if not FOOTAGE.exists():
    pytest.skip(f"needs clips of people in {FOOTAGE}")
  clips = sorted(FOOTAGE.glob("clip_*.mp4"), key=os.path.getsize)[:16]
  (tmp_path / "in").mkdir()
  for clip in clips:
    shutil.copy(clip, tmp_path / "in")
  path = check(tmp_path / "in", tmp_path, num_kills=10, seed=1)
  assert len(read_lines(path / "videos.jsonl")) == len(clips)
  assert read_lines(path / "quarantine.jsonl") == []
