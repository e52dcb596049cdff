"""Batches made ahead by threads and by worker processes."""

import collections
import gc
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from marlin_jax.data.prefetch import Prefetcher, WorkerError
from marlin_jax.data.prepared_dataset import DatasetError
from tests.support.numbered_batches import Numbers
from tests.support.processes import ROOT, children

IN_THREADS, IN_WORKERS = (
  {"num_threads": 2},
  {"num_threads": 2, "num_workers": 2},
)
HOW = {"threads": IN_THREADS, "workers": IN_WORKERS}


def assert_is(batch, step):
  want = np.arange(3) + np.array([[0], [0], [10], [10]]) + 100 * step
  np.testing.assert_array_equal(batch["value"], want)
  assert not batch["unset"].any()


@pytest.mark.parametrize("how", HOW)
def test_batches_come_in_order_and_are_kept_while_they_are_used(how):
  batches = Prefetcher(Numbers(), 5, **HOW[how])
  kept = [next(batches) for _ in range(30)]
  for _ in range(10):
    next(batches)
  for step, batch in enumerate(kept, 5):
    assert_is(batch, step)
  processes = {int(i) for batch in kept for i in batch["process"]}
  assert (os.getpid() in processes) == (how == "threads")
  assert all(b["has_jax"].all() == (how == "threads") for b in kept)
  batches.close()
  assert_is(kept[-1], 34)


def test_an_array_keeps_its_memory_from_being_used_again():
  batches = Prefetcher(Numbers(), 0, **IN_THREADS)
  parts = [next(batches)["value"][1:, 1:] for _ in range(3)]
  on_device = [jax.device_put(next(batches)["value"]) for _ in range(3)]
  for step in range(6, 40):
    assert_is(next(batches), step)
  for step, part in enumerate(parts):
    np.testing.assert_array_equal(
      part[:, 0], 1 + 100 * step + np.array([0, 10, 10])
    )
  for step, value in enumerate(on_device, 3):
    assert_is({"value": value, "unset": np.zeros(1)}, step)


def test_memory_is_used_in_turns():
  batches = Prefetcher(Numbers(), 0, **IN_THREADS)
  places = [next(batches)["value"].ctypes.data for _ in range(40)]
  assert len(set(places)) < 10


def test_batches_may_end():
  batches = Prefetcher(Numbers(), 3, **IN_THREADS, num_batches=9)
  for step, batch in enumerate(batches, 3):
    assert_is(batch, step)
  assert step == 11
  assert not list(Prefetcher(Numbers(), 3, **IN_THREADS, num_batches=0))


@pytest.mark.parametrize("how", HOW)
def test_an_error_ends_the_batches_at_its_step(how):
  batches = Prefetcher(Numbers(fails_at=3), 0, **HOW[how])
  for step in range(3):
    assert_is(next(batches), step)
  with pytest.raises(DatasetError, match="step 3 cannot be read") as error:
    next(batches)
  if how == "workers":  # where in the worker, too
    assert 'raise DatasetError(f"step {step}' in str(error.value.__cause__)
  with pytest.raises(StopIteration):
    next(batches)


def test_a_killed_worker_is_told_of():
  batches = Prefetcher(Numbers(dies_at=2), 0, **IN_WORKERS)
  with pytest.raises(WorkerError, match=r"worker \d, one of 2 .*") as error:
    collections.deque(batches, maxlen=0)
  assert "was killed by SIGKILL (out of memory?)" in str(error.value)
  assert error.value.exit_code == 75


def test_an_error_that_cannot_be_sent_is_described():
  source = Numbers(fails_at=0, error="unsendable")
  batches = Prefetcher(source, 0, num_threads=1, num_workers=1)
  with pytest.raises(RuntimeError, match="Unsendable: this and that"):
    next(batches)


def is_mapped():
  with open("/proc/self/maps") as file:
    return "marlin_jax-batches" in file.read()


@pytest.mark.parametrize("ends_by", ["close", "forgotten"])
def test_nothing_is_left_of_batches_that_are_not_wanted_any_more(ends_by):
  before = children(os.getpid())
  batches = Prefetcher(Numbers(), 0, **IN_WORKERS)
  workers = set(next(batches)["process"].tolist())
  assert workers <= children(os.getpid()) - before
  assert is_mapped()
  if ends_by == "close":
    batches.close()
  del batches
  gc.collect()
  assert not workers & children(os.getpid())
  assert not is_mapped()


SCRIPT = """
import os, signal, sys, time
from marlin_jax.data import prefetch
from tests.support.numbered_batches import Numbers

if __name__ == "__main__":
  for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: print("told", flush=True))
  batches = prefetch.Prefetcher(Numbers(), 0, num_threads=1, num_workers=2)
  seen = set()
  for _ in range(20):
    seen |= set(next(batches)["process"].tolist())
  print(*seen, flush=True)
  if sys.argv[1] == "killed":
    time.sleep(60)
  os.killpg(0, signal.SIGTERM)
  os.killpg(0, signal.SIGUSR1)
  for _ in range(20):
    next(batches)
  print("goes on", flush=True)
"""


@pytest.mark.parametrize("ends_by", ["exit", "killed"])
def test_workers_outlive_signals_to_the_group_but_not_their_parent(
  ends_by, tmp_path
):
  path = tmp_path / "script.py"
  path.write_text(SCRIPT)
  with subprocess.Popen(
    [sys.executable, path, ends_by],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    start_new_session=True,
  ) as process:
    workers = list(map(int, process.stdout.readline().split()))
    assert workers
    if ends_by == "killed":
      process.kill()
    else:
      assert process.stdout.read() == "told\ntold\ngoes on\n"
      assert process.wait(30) == 0
  deadline = time.monotonic() + 20
  while alive := [i for i in workers if os.path.exists(f"/proc/{i}")]:
    assert time.monotonic() < deadline, alive
    time.sleep(0.05)


def test_memory_of_records_is_kept():
  """Blocks of a megabyte come from the heap, not from the kernel."""
  code = """
import resource
from marlin_jax.data import prefetch
prefetch._keep_freed_memory()
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(50):
    bytearray(1 << 20)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
  env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env | {"PYTHONPATH": str(ROOT)},
    check=True,
  )
  assert int(result.stdout) < 1000  # 256 pages of 50 blocks otherwise
