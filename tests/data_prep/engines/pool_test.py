"""Videos that fail by no fault of their own are tried again."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import storage
from data_prep.engines import pool
from data_prep.output import ledger, shards
from data_prep.sources.manifest import Source
from data_prep.video import decode, video_to_records
from data_prep.video.video_to_records import Outcome
from tests.support.processes import ROOT

SETTINGS = video_to_records.Settings()


@contextlib.contextmanager
def open_faulty(task_settings):
  """Yields work that does what the name of the video says, and logs it."""
  output, settings, _ = task_settings

  def log(source, what):
    with open(output / "log.txt", "a") as file:
      file.write(f"{source.video_id} {what}\n")

  def work(source, report):
    log(source, "begins")
    name, _, times = source.video_id.partition(" ")
    tried = (output / "log.txt").read_text().count(f"{source.video_id} begins")
    time.sleep(0.2)
    outcome = Outcome(video_to_records.NO_FACE, "no face found")
    if not times or tried <= int(times):
      if name == "kill":
        log(source, "ends")
        os.kill(os.getpid(), signal.SIGKILL)
      if name == "crash":
        log(source, "ends")
        os.kill(os.getpid(), signal.SIGSEGV)
      if name == "fetch":
        outcome = Outcome(video_to_records.FAILED, "cannot fetch: no route")
      if name == "decoder":
        outcome = Outcome(video_to_records.FAILED, decode.KILLED)
    entry = ledger.Entry.of(source, settings, outcome)
    log(source, "ends")
    return entry

  yield work


def run(folder: Path, *names: str) -> dict[str, ledger.Entry]:
  (folder / "parts").mkdir()
  todo = []
  for name in names:
    (folder / name).write_text(name)
    todo.append(Source(name, folder / name, "", "train"))
  return {e.video_id: e for e in pool.run(folder, todo, SETTINGS, 3)}


def test_failures_are_tried_again_the_last_time_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(pool, "open_work", open_faulty)
  names = ("good", "kill 2", "crash", "fetch", "decoder")
  entries = run(tmp_path, *names)
  assert entries.keys() == {*names}
  for name in ("good", "kill 2"):
    assert entries[name].status == video_to_records.NO_FACE
    assert len(entries[name].sha256) == 64
  assert entries["fetch"].reason == "cannot fetch: no route"
  assert entries["fetch"].is_failed
  assert entries["fetch"].sha256 == ""
  assert shards.Part(tmp_path, "fetch").entry() is None
  # What ends its process whenever it is tried is to blame.
  for name, reason in (("crash", "SIGSEGV"), ("decoder", "SIGKILL")):
    assert entries[name].status == video_to_records.QUARANTINED
    assert reason in entries[name].reason
    assert not entries[name].is_failed
    assert shards.Part(tmp_path, name).entry() == entries[name]
  log = (tmp_path / "log.txt").read_text().splitlines()
  for name, num in {"good": 1, "kill 2": 3, "crash": 3, "fetch": 3}.items():
    assert log.count(f"{name} begins") == num
  # Four are tried for the last time.
  for begin, end in zip(log[-8::2], log[-7::2], strict=True):
    assert begin.removesuffix("begins") == end.removesuffix("ends")


@contextlib.contextmanager
def open_greedy(task_settings):
  """Yields work that allocates more than the worker may."""
  output, settings, _ = task_settings

  def work(source, report):
    outcome = Outcome(video_to_records.NO_FACE, "no face found")
    try:
      np.ones(2 << 30, np.uint8)
    except MemoryError:
      outcome = Outcome(video_to_records.FAILED, "no memory")
    return ledger.Entry.of(source, settings, outcome)

  with pool.open_work((output, settings, 1 << 30)):
    yield work


@pytest.mark.skipif(sys.platform != "linux", reason="counts other bytes")
def test_memory_of_a_worker_is_limited(tmp_path, monkeypatch, face_models):
  monkeypatch.setattr(pool, "open_work", open_greedy)
  assert run(tmp_path, "v")["v"].reason == "no memory"


def test_shares_of_the_memory(monkeypatch):
  monkeypatch.setattr(pool.cgroups, "usable_memory", lambda: 64 << 30)
  assert pool._memory_of(8) == 8 << 30
  monkeypatch.setattr(pool.video_to_records, "KEPT_BYTES", 1 << 30)
  assert pool._memory_of(64) == 3 << 30


def test_a_video_that_appears_late_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(pool, "open_work", open_faulty)
  (tmp_path / "parts").mkdir()
  todo = [Source(n, tmp_path / n, "", "train") for n in ("good", "late")]
  todo[0].path.write_text("good")
  events = pool.run(tmp_path, todo, SETTINGS, 1)
  assert next(events).status == video_to_records.NO_FACE
  todo[1].path.write_text("late")
  assert [e.status for e in events] == [video_to_records.NO_FACE]


def test_file_that_cannot_be_read_failed(tmp_path):
  source = Source("v", tmp_path / "none.mp4", "", "train")
  outcome = Outcome(video_to_records.QUARANTINED, "decoder reported damage")
  entry = ledger.Entry.of(source, SETTINGS, outcome)
  assert entry.is_failed
  assert "No such file" in entry.reason
  with pytest.raises(decode.HostError, match="No such file"):
    decode.open_video(source.path)


@pytest.mark.parametrize(
  ("error", "told"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), "TMPDIR"),
    (ConnectionResetError("reset by peer"), "reset by peer"),
    (RuntimeError("429, too many requests"), "RuntimeError: 429"),
  ],
)
def test_video_that_cannot_be_fetched_failed(
  tmp_path, monkeypatch, error, told
):
  """The package for buckets has errors of its own."""
  from etils import epath

  path = epath.Path("gs://bucket/v.mp4")

  def raise_error(*_, **__):
    raise error

  for name in ("is_dir", "copy", "stat"):
    monkeypatch.setattr(type(path), name, raise_error)
  source = Source("v.mp4", path, "", "train")
  entry = pool._process(source, SETTINGS, None, None, None)
  assert entry.is_failed
  assert told in entry.reason
  with pytest.raises(OSError, match=told):
    storage.size(path)


def test_reasons_of_earlier_versions_count_as_failures(tmp_path):
  source = Source("v", tmp_path / "v", "", "train")
  source.path.write_text("v")
  for reason, is_failed in {
    "cannot fetch: [Errno 28] No space left on device": True,
    "the worker process was killed by SIGKILL (out of memory?)": True,
    "decoder passed its deadline of 300 s": True,
    "decoder died of SIGSEGV": False,
    "cannot open: damaged": False,
  }.items():
    outcome = Outcome(video_to_records.QUARANTINED, reason)
    assert ledger.Entry.of(source, SETTINGS, outcome).is_failed == is_failed


# --- Temporary files ----------------------------------------------------------


def test_temporary_files_of_killed_processes_are_removed(tmp_path, monkeypatch):
  code = (
    "import time\n"
    "from data_prep import storage\n"
    "(storage.scratch_folder() / 'v.mp4').write_text('a copy')\n"
    "print(storage.scratch_folder(), flush=True)\n"
    "time.sleep(60)\n"
  )
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  other = tmp_path / "marlin_prepare-notes"
  other.mkdir()
  (tmp_path / "marlin_prepare-12345678").symlink_to(other)
  with subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | {"TMPDIR": str(tmp_path)},
  ) as process:
    folder = Path(process.stdout.readline().strip())
    storage.remove_scratch()
    assert (folder / "v.mp4").exists()  # its process is alive
    process.kill()
  storage.remove_scratch()
  assert not folder.exists()
  assert other.exists()


def test_temporary_files_go_with_their_process(tmp_path):
  code = "from data_prep import storage; print(storage.scratch_folder())"
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"TMPDIR": str(tmp_path)},
  )
  assert result.stdout.startswith(str(tmp_path))
  assert not [*tmp_path.iterdir()]
